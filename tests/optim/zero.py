"""Optimisers under ZeRO: `torchrun tests/optim/zero.py WHAT-STAGE,... FOLDER [SOURCE]`.

Each rank writes FOLDER/WHAT-STAGE/RANK.json.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

import packlight
from packlight.numerics import moment_formats
from packlight.optim.flat import Flat

# DeepSpeed would compile a kernel for messages in shared memory, for half a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.logger.setLevel("ERROR")

LENGTH, NUM_ROWS = 48, 6


class Decoder(nn.Module):
    """A causal language model on bytes; widths that no block of 128 divides."""

    def __init__(self, width: int = 100, num_blocks: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width + 3, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(num_blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]).to(hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as trainers make them: with decay and without."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, param) for name, param in named if param.dim() > 1], "weight_decay": 0.1},
        {"params": [(name, param) for name, param in named if param.dim() == 1], "weight_decay": 0.0},
    ]


def engine_of(stage: int, state_format: str, *, extra: dict[str, Any] | None = None, bf16: bool = False) -> Any:
    """Return DeepSpeed's engine with packlight's optimiser, or torch's where no format is named."""
    torch.manual_seed(4)
    model = Decoder()
    groups = groups_of(model)
    if state_format == "torch":
        plain = [{**group, "params": [param for _, param in group["params"]]} for group in groups]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(plain, lr=2e-3)
    else:
        optimizer = packlight.AdamW(groups, lr=2e-3, state_format=state_format)
    config = {
        "train_micro_batch_size_per_gpu": NUM_ROWS,
        "zero_optimization": {"stage": stage, **(extra or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 1.0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def train(engine: Any, steps: range) -> list[float]:
    """Train on Python's sources; ranks have different rows; the mean loss of all ranks at each step."""
    text = torch.frombuffer(bytearray(Path(random.__file__).read_bytes()), dtype=torch.uint8).long()
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + distributed.get_rank())
        starts = torch.randint(0, text.numel() - LENGTH - 1, (NUM_ROWS,), generator=generator).tolist()
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        loss = functional.cross_entropy(engine(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        distributed.all_reduce(total)
        losses.append(float(total) / distributed.get_world_size())
    return losses


def partitions(optimizer: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return list(optimizer.state.items())


def masters(engine: Any) -> list[Tensor]:
    """This rank's fp32 partitions."""
    own = engine.optimizer
    flats = getattr(own, "fp32_partitioned_groups_flat", None) or own.single_partition_of_fp32_groups
    return [flat.detach().clone() for flat in flats]


def learns(stage: int, _: Path) -> Iterator[dict[str, Any]]:
    """Train with every format; count bytes fragment by fragment."""
    for state_format in ("torch", "fp32", "4bit", "8bit", "fp8"):
        engine, optimizer = engine_of(stage, state_format)
        losses = train(engine, range(20))
        found: dict[str, Any] = {"format": state_format, "losses": losses, "kinds": type(engine.optimizer).__name__}
        if state_format != "torch":
            states = partitions(optimizer)
            counted = sum(value.untyped_storage().nbytes() for _, state in states for value in state.values())
            lies = [optimizer._members._flats[id(flat)][1] for flat, _ in states]
            assert all(isinstance(each, Flat) for each in lies)
            found |= {
                "counted": counted,
                "said": sum(nbytes for nbytes in [sum(v.nbytes for v in state.values()) for _, state in states]),
                "fragments": [(part.shape[0], part.state_format) for each in lies for part in each.parts],
                "elements": sum(flat.numel() for flat, _ in states),
                "whole": [
                    (name, list(shape), moment_formats(fmt, tuple(shape))[0].coding)
                    for name, shape, fmt in origins(optimizer)
                ],
            }
        yield found


def origins(optimizer: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for group, own in zip(optimizer.param_groups, optimizer._members._origins, strict=True):
        for name, origin in zip(group["param_names"], own, strict=True):
            yield name, origin.shape, origin.state_format


def stops(stage: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Train, save, go on; the rest of the steps and the end are what a run that loads has to have."""
    for state_format in ("4bit", "8bit"):
        engine, _ = engine_of(stage, state_format)
        before = train(engine, range(4))
        engine.save_checkpoint(str(folder / state_format), tag="t")
        after = train(engine, range(4, 8))
        torch.save(masters(engine), folder / f"{state_format}-{distributed.get_rank()}.pt")
        yield {"format": state_format, "losses": before + after}


def resumes(stage: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Load what `stops` has saved, by as many ranks, and go on."""
    source = folder.with_name(f"stops-{stage}")
    for state_format in ("4bit", "8bit"):
        engine, optimizer = engine_of(stage, state_format)
        engine.load_checkpoint(str(source / state_format), tag="t")
        loaded = sorted({str(value.dtype) for state in optimizer.state.values() for value in state.values()})
        after = train(engine, range(4, 8))
        wanted = torch.load(source / f"{state_format}-{distributed.get_rank()}.pt", weights_only=True)
        yield {
            "format": state_format,
            "losses": after,
            "equal": all(map(torch.equal, masters(engine), wanted)),
            "dtypes": loaded,
            "bytes": sum(value.nbytes for state in optimizer.state.values() for value in state.values()),
        }


def universal(stage: int, _: Path) -> Iterator[dict[str, Any]]:
    """Load a universal checkpoint, by another number of ranks."""
    engine, optimizer = engine_of(stage, "4bit", extra=None)
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(Path(sys.argv[3]) / str(stage)), tag="t")
    after = train(engine, range(4, 8))
    dtypes = sorted({str(value.dtype) for state in optimizer.state.values() for value in state.values()})
    steps = sorted({float(v) for state in optimizer.state.values() for k, v in state.items() if k.endswith("step")})
    yield {"losses": after, "dtypes": dtypes, "steps": steps}


def offloaded(stage: int, _: Path) -> Iterator[dict[str, Any]]:
    """ZeRO-Offload: the optimiser steps on the host, with the CPU's kernels."""
    plain, _ = engine_of(stage, "4bit", bf16=True)
    wanted = train(plain, range(8))
    engine, optimizer = engine_of(stage, "4bit", extra={"offload_optimizer": {"device": "cpu"}}, bf16=True)
    losses = train(engine, range(8))
    dtypes = sorted({str(value.dtype) for state in optimizer.state.values() for value in state.values()})
    yield {"losses": losses, "wanted": wanted, "dtypes": dtypes, "class": type(engine.optimizer.optimizer).__name__}


WHAT: dict[str, Callable[[int, Path], Iterator[dict[str, Any]]]] = {
    "learns": learns,
    "stops": stops,
    "resumes": resumes,
    "universal": universal,
    "offloaded": offloaded,
}


def main() -> None:
    """Run some of them, one after the other."""
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for each in sys.argv[1].split(","):
        what, stage = each.split("-")
        folder = Path(sys.argv[2]) / each
        found = list(WHAT[what](int(stage), folder))
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
