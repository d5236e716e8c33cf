"""Checkpoints written and loaded by several processes: `torchrun tests/checkpoints/ranks.py WHAT FOLDER SOURCE`.

Each rank writes FOLDER/RANK.json. The model is that of the other tests here, which import it.
"""

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.optim import Optimizer

import packlight

LENGTH, NUM_ROWS = 32, 4


class Decoder(nn.Module):
    """A causal language model on bytes."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits: Tensor = self.head(self.norm(self.block(hidden, src_mask=mask, is_causal=True)))
        return logits


def decoder(width: int = 128) -> Decoder:
    torch.manual_seed(4)
    return Decoder(width)


def loss_of(model: Any, step: int) -> Tensor:
    """The loss on a few rows of Python's own sources, the same on all ranks."""
    text = torch.frombuffer(bytearray(Path(random.__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, text.numel() - LENGTH - 1, (NUM_ROWS,), generator=generator).tolist()
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
    return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as trainers make them: with decay and without."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, param) for name, param in named if param.dim() > 1], "weight_decay": 0.1},
        {"params": [(name, param) for name, param in named if param.dim() == 1], "weight_decay": 0.0},
    ]


def make(kind: str, model: nn.Module) -> Optimizer:
    if kind == "torch":
        return torch.optim.AdamW(groups_of(model), lr=1e-3)
    return packlight.AdamW(groups_of(model), lr=1e-3, state_format=kind)


# FSDP2


def sharded() -> Decoder:
    model = decoder()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def dcp_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def full(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True)
    states: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)["state"]  # type: ignore[assignment]
    return states


def save_sharded(kind: str, folder: Path) -> None:
    model = sharded()
    optimizer = make(kind, model)
    train(model, optimizer, range(2))
    state_dict_saver.save(dcp_state(model, optimizer), checkpoint_id=str(folder / f"fsdp-{kind}"))
    states = full(model, optimizer)
    if distributed.get_rank() == 0:
        torch.save(states, folder / f"fsdp-{kind}.pt")


def load_sharded(kind: str, place: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Load a folder as a training script does, compare, and do a step."""
    model = sharded()
    optimizer = make(kind, model)
    state = dcp_state(model, optimizer)
    state_dict_loader.load(state, checkpoint_id=str(place))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
    wrong = same_states(full(model, optimizer), wanted)
    said = refused_by(model, optimizer) if kind != "torch" else ""
    wrong += same_states(full(model, optimizer), wanted)
    lr = sorted({group["lr"] for group in optimizer.param_groups})
    train(model, optimizer, range(2, 3))
    steps = {float(each["step"]) for each in optimizer.state.values()}
    return {"wrong": wrong, "lr": lr, "steps": sorted(steps), "said": said}


def refused_by(model: nn.Module, optimizer: Optimizer) -> str:
    """What is said to a state whose scales are NaN on all ranks."""
    state: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    state["state"]["head.weight"]["exp_avg_scale"].to_local().fill_(float("nan"))
    try:
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)
    except ValueError as error:
        return str(error)
    return ""


def same_states(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs, by name."""
    wrong = [name for name in wanted if name not in found]
    for name, state in found.items():
        if name not in wanted or state.keys() != wanted[name].keys():
            wrong.append(name)
        else:
            pairs = {key: (state[key].reshape(-1), wanted[name][key].reshape(-1)) for key in state}  # rows of codes
            wrong += [f"{name} {key}" for key, (one, other) in pairs.items() if not torch.equal(one, other)]
    return wrong


# DeepSpeed


def engine_of(stage: int, kind: str, *, universal: bool = False) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": NUM_ROWS,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
    }
    model = decoder()
    groups = groups_of(model)
    if kind == "torch":
        plain = [{**group, "params": [param for _, param in group["params"]]} for group in groups]
        optimizer: Optimizer = torch.optim.AdamW(plain, lr=1e-3)
    else:
        optimizer = packlight.AdamW(groups, lr=1e-3, state_format=kind)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def steps_of(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def whole_states(engine: Any) -> dict[str, Any]:
    """What DeepSpeed says each parameter's weights and moments are."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, param in engine.module.named_parameters():
        moments = {key: safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")}
        shape = moments["exp_avg"].shape
        found[name] = {"fp32": safe_get_full_fp32_param(param).view(shape), **moments}
    return found


def save_zero(stage: int, folder: Path) -> None:
    engine = engine_of(stage, "torch")
    steps_of(engine, range(2))
    engine.save_checkpoint(str(folder / f"zero{stage}"), tag="t")
    if stage == 2:  # deepspeed 0.19 links states after the first group's step, when the second group has none
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    states = whole_states(engine)
    if distributed.get_rank() == 0:
        torch.save(states, folder / f"zero{stage}.pt")


def load_universal(stage: int, kind: str, place: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    engine = engine_of(stage, kind, universal=True)
    path, client = engine.load_checkpoint(str(place))
    # packlight's states are codes from the next step on, and DeepSpeed knows none
    wrong = same_states(whole_states(engine), wanted)
    states = list(engine.optimizer.optimizer.state.values())
    steps = sorted({float(value) for state in states for key, value in state.items() if key.endswith("step")})
    losses = steps_of(engine, range(2, 4))
    states = list(engine.optimizer.optimizer.state.values())
    dtypes = sorted({str(value.dtype) for state in states for value in state.values() if isinstance(value, Tensor)})
    known = {"epoch": client.get("epoch"), "global_steps": engine.global_steps, "loaded": path is not None}
    decay = [group["weight_decay"] for group in engine.optimizer.optimizer.param_groups]
    return {"wrong": wrong, "steps": steps, "losses": losses, "dtypes": dtypes, "decay": decay, **known}


def refused_by_zero(place: Path) -> dict[str, Any]:
    """What DeepSpeed says to as many files as there are not ranks, and whether the optimiser is as it was."""
    engine = engine_of(2, "4bit")
    steps_of(engine, range(1))
    optimizer = engine.optimizer.optimizer
    before = copy.deepcopy([dict(state) for state in optimizer.state.values()])
    try:
        engine.load_checkpoint(str(place), tag="t")
    except Exception as error:
        pairs = zip(before, optimizer.state.values(), strict=True)
        same = all(torch.equal(state[key], one[key]) for one, state in pairs for key in one)
        return {"said": f"{type(error).__name__}: {error}", "same": same}
    return {"said": ""}


def saves(folder: Path, _: Path) -> Iterator[dict[str, Any]]:
    for kind in ("4bit", "torch"):
        save_sharded(kind, folder)
    for stage in (2, 3):
        save_zero(stage, folder)
    yield {}


def loads(_: Path, source: Path) -> Iterator[dict[str, Any]]:
    for kind in ("torch", "4bit", "8bit"):
        wanted = torch.load(source / f"{kind}-wanted.pt", weights_only=True)
        yield {"name": f"dcp {kind}", **load_sharded(kind, source / f"{kind}-dcp", wanted)}
    if distributed.get_world_size() == 1:
        yield {"name": "zero of two ranks", **refused_by_zero(source.parent / "saves" / "zero2")}
    wanted = torch.load(source / "universal-wanted.pt", weights_only=True)
    for stage, kind in ((2, "torch"), (2, "4bit"), (3, "torch")):
        yield {
            "name": f"universal {stage} {kind}",
            **load_universal(stage, kind, source / "universal", wanted),
        }


WHAT: dict[str, Callable[[Path, Path], Iterator[dict[str, Any]]]] = {"saves": saves, "loads": loads}


def main() -> None:
    """Run one of them."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles for half a minute
    deepspeed.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[2])
    found = list(WHAT[sys.argv[1]](folder, Path(sys.argv[3])))
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
