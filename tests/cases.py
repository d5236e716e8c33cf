"""What tests run on and how exact they must be: devices, small real models, and the error bounds of lossy formats."""

import functools
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The CPU always; CUDA where there is one.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

#: Largest relative error of one encode and decode of a value in the format's normal range. Each bound is
#: derived from the format, never from what a run gave: a significand of p bits rounds to within 2**-p.
RELATIVE_ERROR = {
    "fp32": 0.0,
    "bf16": 2.0**-8,
    "fp8": 2.0**-4,  # E4M3
}

NUM_BYTES = 256
"""The vocabulary: text is read as bytes."""


@dataclass(frozen=True)
class Case:
    """A model, what it takes, and the loss that a training loop would compute from what it returns."""

    model: nn.Module
    batch: Any
    loss: Callable[[Any, Any], Tensor]

    def output(self, model: nn.Module | None = None) -> Any:
        """Call a model (by default the case's own) the way that packlight documents."""
        called = self.model if model is None else model
        if isinstance(self.batch, dict):
            return called(**self.batch)
        return called(*self.batch) if isinstance(self.batch, tuple) else called(self.batch)

    def value(self, model: nn.Module | None = None) -> Tensor:
        return self.loss(self.output(model), self.batch)


@functools.cache
def text() -> bytes:
    """Real text: the standard library's sources. No tensor: what a test keeps alive would count as used memory."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:10]
    return b"".join(path.read_bytes() for path in sources)


def windows(num: int, length: int) -> Tensor:
    """Draw windows of the text, int64 of shape (num, length)."""
    starts = torch.randint(len(text()) - length, (num,)).tolist()
    return torch.tensor([list(text()[start : start + length]) for start in starts])


@functools.cache
def _digits() -> Any:
    from sklearn.datasets import load_digits  # here: it takes a second that most tests need not wait

    return load_digits()


def digits(num: int) -> tuple[Tensor, Tensor]:
    """Draw images of handwritten digits (num, 1, 8, 8) and which digit each one is."""
    data = _digits()
    chosen = torch.randperm(len(data.images))[:num].tolist()
    images = torch.tensor(data.images[chosen], dtype=torch.float32)
    return images.unsqueeze(1) / 16, torch.tensor(data.target[chosen])


class GPTBlock(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        num, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(num, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(num, length, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out


class GPT(nn.Module):
    def __init__(self, *, width: int = 32, num_layers: int = 4, context: int = 32, tied: bool = False) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(NUM_BYTES, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(GPTBlock(width, 2) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_BYTES, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Bert(nn.Module):
    """A masked language model of torch's own encoder layers, with dropout."""

    def __init__(self, width: int = 32, num_layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, NUM_BYTES)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embed(tokens), src_key_padding_mask=padding))
        return logits


class Translator(nn.Module):
    """Encoder and decoder (torch's nn.Transformer), with dropout."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 2 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, NUM_BYTES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        mixed = self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True)
        logits: Tensor = self.head(mixed)
        return logits


class ResidualBlock(nn.Module):
    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False)
        self.bn_1, self.bn_2 = nn.BatchNorm2d(num_channels), nn.BatchNorm2d(num_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn_2(self.conv_2(self.relu(self.bn_1(self.conv_1(x)))))
        out += x
        activated: Tensor = self.relu(out)
        return activated


class ConvNet(nn.Module):
    def __init__(self, num_channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, num_channels, 3, padding=1), nn.BatchNorm2d(num_channels), nn.ReLU(inplace=True)
        )
        self.layer1 = nn.Sequential(ResidualBlock(num_channels), ResidualBlock(num_channels))
        self.layer2 = nn.Sequential(ResidualBlock(num_channels), ResidualBlock(num_channels))
        self.fc = nn.Linear(num_channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layer2(self.layer1(self.stem(images))).mean(dim=(2, 3)))
        return logits


class DoubleConv(nn.Module):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, padding=1),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_out, num_out, 3, padding=1),
            nn.BatchNorm2d(num_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.double_conv(x)
        return out


class UNet(nn.Module):
    def __init__(self, num: int = 8) -> None:
        super().__init__()
        self.inc = DoubleConv(1, num)
        self.down1, self.down2 = DoubleConv(num, 2 * num), DoubleConv(2 * num, 4 * num)
        self.up1 = nn.ConvTranspose2d(4 * num, 2 * num, 2, stride=2)
        self.conv1 = DoubleConv(4 * num, 2 * num)
        self.up2 = nn.ConvTranspose2d(2 * num, num, 2, stride=2)
        self.conv2 = DoubleConv(2 * num, num)
        self.outc = nn.Conv2d(num, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.inc(image)
        middle = self.down1(F.max_pool2d(fine, 2))
        coarse = self.down2(F.max_pool2d(middle, 2))
        middle = self.conv1(torch.cat([middle, self.up1(coarse)], dim=1))
        out: Tensor = self.outc(self.conv2(torch.cat([fine, self.up2(middle)], dim=1)))
        return out


class ViT(nn.Module):
    def __init__(self, width: int = 32, num_layers: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.cls, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        layers = (
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1) + self.position
        logits: Tensor = self.head(self.layers(x)[:, 0])
        return logits


class RecurrentModel(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, NUM_BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embed(tokens))[0])
        return logits


class ExpertLayer(nn.Module):
    """Top-2 routing of static shape: each expert sees every token, weighted by its gate (0 where not chosen)."""

    def __init__(self, width: int, num_experts: int = 4) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        scores, chosen = self.router(normed).softmax(dim=-1).topk(2)
        gates = scores.new_zeros(*x.shape[:-1], len(self.experts)).scatter(-1, chosen, scores)
        for at, expert in enumerate(self.experts):
            x = x + gates[..., at : at + 1] * expert(normed)
        return x


class MoE(nn.Module):
    def __init__(
        self, width: int = 32, num_layers: int = 3, *, layer: Callable[[int], nn.Module] = ExpertLayer
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_BYTES, width)
        self.layers = nn.ModuleList(layer(width) for _ in range(num_layers))
        self.head = nn.Linear(width, NUM_BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class MLP(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(images.flatten(1))))))
        return out


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained update of low rank (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 100)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + F.linear(F.linear(x, self.down), self.up)
        return out


def _with_adapters(model: GPT) -> GPT:
    model.requires_grad_(False)
    for block in model.blocks:
        assert isinstance(block, GPTBlock)
        block.qkv, block.up = LoRALinear(block.qkv), LoRALinear(block.up)  # type: ignore[assignment]
    return model


def _next_byte(output: Tensor, batch: Any) -> Tensor:
    tokens = batch if isinstance(batch, Tensor) else batch[-1]
    return F.cross_entropy(output[:, :-1].reshape(-1, NUM_BYTES), tokens[:, 1:].reshape(-1))


def _masked_byte(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.reshape(-1, NUM_BYTES), batch["tokens"].reshape(-1))


def _language(model: nn.Module, *, num: int = 8, length: int = 32) -> Case:
    return Case(model, windows(num, length), _next_byte)


def _bert() -> Case:
    padding = torch.arange(32) >= torch.randint(20, 33, (8, 1))
    return Case(Bert(), {"tokens": windows(8, 32), "padding": padding}, _masked_byte)


def _llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM  # here: it takes seconds that most tests need not wait

    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    tokens = windows(8, 32)
    return Case(LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}, lambda output, _: output.loss)


def _classifier(model: nn.Module, *, num: int = 64) -> Case:
    images, targets = digits(num)
    return Case(model, images, lambda output, _: F.cross_entropy(output, targets))


def _unet() -> Case:
    images, _ = digits(32)
    noisy = images + 0.1 * torch.randn_like(images)
    return Case(UNet(), noisy, lambda output, _: F.mse_loss(output, images))


def _flat() -> Case:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(64, 64), nn.ReLU()]
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Dropout(0.1)]
    return _classifier(nn.Sequential(*layers, nn.Linear(64, 10)), num=128)


CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: _language(GPT()),
    "tied": lambda: _language(GPT(tied=True)),
    "lora": lambda: _language(_with_adapters(GPT())),
    "llama": _llama,
    "bert": _bert,
    "translator": lambda: Case(Translator(), (windows(8, 24), windows(8, 32)), _next_byte),
    "convnet": lambda: _classifier(ConvNet()),
    "unet": _unet,
    "vit": lambda: _classifier(ViT()),
    "lstm": lambda: _language(RecurrentModel()),
    "moe": lambda: _language(MoE()),
    "flat": _flat,
    "mlp": lambda: _classifier(MLP()),
}
"""Small models of every kind, each with a batch and a loss; they draw from torch's generator."""
