"""Optimisers on FSDP2's parameters, one process a rank: `torchrun tests/optim/sharded.py WHAT,... FOLDER [SOURCE]`.

Each rank writes FOLDER/WHAT/RANK.json. Gradients are the same on any number of ranks, unless a model makes them.
"""

import copy
import json
import os
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional
from torch.optim import Optimizer

import packlight
from packlight.optim import adopt
from packlight.optim.piece import local_of

NUM_STEPS = 4
WIDTHS = {"whole": 256, "odd": 200}


class Parts(nn.Module):
    """Parameters of many shapes; rows of `width` elements."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(301, width)
        self.up = nn.Linear(width, 515)
        self.head = nn.Linear(width, 130, bias=False)
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Conv2d(width, 20, 4)
        self.small = nn.Linear(width, 5)


def parts(width: int, dtype: torch.dtype = torch.float32) -> Parts:
    torch.manual_seed(1)
    return Parts(width).to(dtype)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),))


def sharded(width: int, dtype: torch.dtype = torch.float32) -> Parts:
    model = parts(width, dtype)
    fully_shard(model, mesh=mesh())
    return model


def give_gradients(model: nn.Module, step: int) -> None:
    """The same gradients for a plain and for a sharded model, their rows of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        rows = 10.0 ** torch.randint(-4, 1, (param.shape[0], *[1] * (param.dim() - 1)), generator=generator)
        whole = (torch.randn(param.shape, generator=generator) * rows).to(param.dtype)
        one: Tensor = param
        param.grad = spread(whole, one.device_mesh, one.placements) if isinstance(one, DTensor) else whole


def spread(tensor: Tensor, on: DeviceMesh, placements: Any) -> DTensor:
    """Return a tensor that every rank has as a DTensor; gloo could not send it in 16 bits."""
    return distribute_tensor(tensor, on, placements, src_data_rank=None)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of all of a tensor; gloo gathers no 16-bit numbers, so objects go."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    (placement,) = tensor.placements
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, tensor.to_local().detach())
    return torch.cat(found, placement.dim) if isinstance(placement, Shard) else found[0].clone()


def states_of(optimizer: Optimizer) -> list[Tensor]:
    """All tensors of all states, whole and in the shape of a plain parameter's."""
    return [whole(value).reshape(-1) for state in optimizer.state.values() for _, value in sorted(state.items())]


def are_equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(
        one.dtype == two.dtype and torch.equal(one.reshape(-1), two.reshape(-1))
        for one, two in zip(these, those, strict=True)
    )


def bits(_: Path) -> Iterator[dict[str, Any]]:
    """Hold parameters and states of sharded models against those of plain ones."""
    makes: dict[str, Callable[[nn.Module], Optimizer]] = {
        "AdamW": lambda model: packlight.AdamW(model.named_parameters(), lr=1e-2),
        "AdamW 8bit": lambda model: packlight.AdamW(model.named_parameters(), lr=1e-2, state_format="8bit"),
        "AdamW fp8": lambda model: packlight.AdamW(model.named_parameters(), lr=1e-2, state_format="fp8"),
        "AdamW fp32": lambda model: packlight.AdamW(model.named_parameters(), lr=1e-2, state_format="fp32"),
        "Adam": lambda model: packlight.Adam(model.named_parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        "SGD": lambda model: packlight.SGD(model.named_parameters(), lr=1e-2, momentum=0.9, nesterov=True),
        "plain SGD": lambda model: packlight.SGD(model.named_parameters(), lr=1e-2),
        "adopted": adopted,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in makes.items():
            pairs = [(each, make(each)) for each in (parts(WIDTHS["whole"], dtype), sharded(WIDTHS["whole"], dtype))]
            for model, optimizer in pairs:
                train(model, optimizer, range(NUM_STEPS))
            (plain, one), (cut, other) = pairs
            params = [[whole(param) for param in model.parameters()] for model in (plain, cut)]
            yield {
                "name": f"{name} {dtype}",
                "params": are_equal(*params),
                "states": are_equal(states_of(one), states_of(other)),
                "nan": any(bool(param.isnan().any()) for param in params[0]),
            }
    for rounding in ("nearest", "master24", "master32"):
        results = []
        for model in (parts(WIDTHS["whole"], torch.bfloat16), sharded(WIDTHS["whole"], torch.bfloat16)):
            optimizer = packlight.AdamW(model.named_parameters(), lr=1e-2, bf16_rounding=rounding)
            train(model, optimizer, range(NUM_STEPS))
            results.append([whole(param) for param in model.parameters()] + states_of(optimizer))
        yield {"name": rounding, "params": are_equal(*results), "states": True, "nan": False}


def adopted(model: nn.Module) -> Optimizer:
    """torch's own optimiser, whose states are made compact in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    adopt(optimizer, {param: "4bit" for param in model.parameters() if param.dim() > 1})
    return optimizer


def nbytes(_: Path) -> Iterator[dict[str, Any]]:
    """Count the bytes of what is here, against the formula of each piece."""
    for kind, width in WIDTHS.items():
        for state_format in ("4bit", "8bit", "fp8", "fp32"):
            model = sharded(width)
            optimizer = packlight.AdamW(model.named_parameters(), state_format=state_format)
            before = optimizer.state_bytes()
            train(model, optimizer, range(1))
            tensors = [local_of(value) for state in optimizer.state.values() for value in state.values()]
            yield {
                "kind": kind,
                "format": state_format,
                "before": before,
                "after": optimizer.state_bytes(),
                "counted": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
                "fp32": sum(8 * local_of(param).numel() + 4 for param in model.parameters()),
                "each": [
                    (list(param.shape), list(local_of(param).shape), name, bytes_of(optimizer.state[param]))
                    for group in optimizer.param_groups
                    for param, name in zip(group["params"], group["state_formats"], strict=True)
                ],
                "dtypes": sorted({str(tensor.dtype) for tensor in tensors}),
            }


def bytes_of(state: dict[str, Tensor]) -> int:
    return sum(local_of(value).nbytes for value in state.values())


def save(folder: Path) -> Iterator[dict[str, Any]]:
    """Train and save; go on to the end, and save that, too, as a whole."""
    for kind, width in WIDTHS.items():
        for state_format in ("4bit", "8bit"):
            model = sharded(width)
            optimizer = packlight.AdamW(model.named_parameters(), lr=1e-2, state_format=state_format)
            train(model, optimizer, range(2))
            place = folder / f"{kind}-{state_format}"
            state_dict_saver.save(dcp_state(model, optimizer), checkpoint_id=str(place))
            saved = [whole(param) for param in model.parameters()] + states_of(optimizer)
            options = StateDictOptions(full_state_dict=True)
            full = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            train(model, optimizer, range(2, NUM_STEPS))
            ended = [whole(param) for param in model.parameters()] + states_of(optimizer)
            if distributed.get_rank() == 0:
                torch.save({"saved": saved, "ended": ended, "full": full}, place / "whole.pt")
            yield {"name": place.name}


def load(folder: Path) -> Iterator[dict[str, Any]]:
    """Load into a model that is sharded otherwise, and go on."""
    source = Path(sys.argv[3])
    for kind, width in WIDTHS.items():
        for state_format in ("4bit", "8bit"):
            place = source / f"{kind}-{state_format}"
            model = sharded(width)
            optimizer = packlight.AdamW(model.named_parameters(), lr=1e-2, state_format=state_format)
            state = dcp_state(model, optimizer)
            steps_before = sorted({float(each["step"]) for each in optimizer.state.values()})
            state_dict_loader.load(state, checkpoint_id=str(place))
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, optimizer, optim_state_dict=state["optimizer"])
            wanted = torch.load(place / "whole.pt", weights_only=True)
            loaded = [whole(param) for param in model.parameters()] + states_of(optimizer)
            train(model, optimizer, range(2, NUM_STEPS))
            ended = [whole(param) for param in model.parameters()] + states_of(optimizer)
            yield {
                "name": place.name,
                "steps_before": steps_before,
                "loaded": are_equal(loaded, wanted["saved"]),
                "ended": are_equal(ended, wanted["ended"]),
                "plain": plain_from(wanted["full"], width, state_format, wanted["saved"]),
            }


def plain_from(full: dict[str, Any], width: int, state_format: str, saved: list[Tensor]) -> bool:
    """Load a whole state dict of a sharded model into a plain one's optimiser; where rows are whole, bits are kept."""
    model = parts(width)
    optimizer = packlight.AdamW(model.named_parameters(), lr=1e-2, state_format=state_format)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=full, options=StateDictOptions(full_state_dict=True))
    num_params = len(list(model.parameters()))
    return are_equal(states_of(optimizer), saved[num_params:])


def dcp_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def portable(_: Path) -> Iterator[dict[str, Any]]:
    """Take states to torch's own optimiser and back."""
    for kind, width in WIDTHS.items():
        model = sharded(width)
        optimizer = packlight.AdamW(model.named_parameters(), lr=1e-2)
        train(model, optimizer, range(2))
        state_dict = optimizer.state_dict(format="portable")
        own = torch.optim.AdamW(model.parameters())
        own.load_state_dict(state_dict)
        moments = [whole(own.state[param]["exp_avg_sq"]) for param in model.parameters()]
        again = packlight.AdamW(model.named_parameters(), lr=1e-2)
        again.load_state_dict(own.state_dict())
        other = again.state_dict(format="portable")["state"]
        errors = [
            float((whole(other[at]["exp_avg_sq"]) - each).abs().max() / each.abs().max().clamp(min=1e-30))
            for at, each in enumerate(moments)
        ]
        yield {
            "kind": kind,
            "steps": sorted({float(state["step"]) for state in again.state.values()}),
            "error": max(errors),
            "are_dtensors": all(isinstance(state["exp_avg"], DTensor) for state in state_dict["state"].values()),
        }


def refusals(_: Path) -> Iterator[dict[str, Any]]:
    """Ask for what cannot be."""
    model = sharded(256)

    def said(act: Callable[[], object]) -> str:
        try:
            act()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    yield {"paper4bit": said(lambda: packlight.AdamW(model.parameters(), state_format="paper4bit"))}
    plain = packlight.AdamW(parts(256).parameters())
    for param in plain.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    plain.step()
    optimizer = packlight.AdamW(model.parameters())
    yield {"plain": said(lambda: optimizer.load_state_dict(plain.state_dict())), "states": len(optimizer.state)}
    own = torch.optim.AdamW(model.parameters())
    yield {"host": said(lambda: adopt(own, {next(model.parameters()): "4bit@host"}))}


def placed(_: Path) -> Iterator[dict[str, Any]]:
    """Parameters that are replicated, or cut along another axis."""
    torch.manual_seed(2)
    values, slope = torch.randn(64, 8, 256), torch.randn(64, 8, 256)
    for name, placement in (("replicated", Replicate()), ("second axis", Shard(1)), ("last axis", Shard(2))):
        param = nn.Parameter(spread(values, mesh(), [placement]))
        alone = nn.Parameter(values.clone())
        for each in (param, alone):
            optimizer = packlight.AdamW([("weight", each)], lr=1e-2, betas=(0.9, 0.95))
            for _step in range(NUM_STEPS):
                each.grad = spread(slope, mesh(), [placement]) if each is param else slope
                optimizer.step()
            if each is param:
                found, num_bytes = optimizer.state[param], optimizer.state_bytes()
        yield {
            "name": name,
            "keys": sorted(found),
            "equal": torch.equal(whole(param), alone.detach()),
            "error": float((whole(param) - alone.detach()).abs().max()),
            "bytes": num_bytes,
        }


class Decoder(nn.Module):
    """A causal language model on bytes."""

    def __init__(self, width: int = 128, num_blocks: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(num_blocks)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        hidden = self.wte(ids) + self.wpe(torch.arange(length))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def learns(_: Path) -> Iterator[dict[str, Any]]:
    """Train a language model on Python's sources with each format; ranks have different rows of each batch."""
    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    for name in ("torch", "fp32", "4bit", "8bit"):
        torch.manual_seed(4)
        model = Decoder()
        for block in model.blocks:
            fully_shard(block, mesh=mesh())
        fully_shard(model, mesh=mesh())
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
        if name != "torch":
            optimizer = packlight.AdamW(model.named_parameters(), lr=2e-3, weight_decay=0.0, state_format=name)
        generator, losses = torch.Generator().manual_seed(5), []
        for _step in range(24):
            starts = torch.randint(0, text.numel() - 65, (12,), generator=generator)
            rows = torch.stack([text[start : start + 65] for start in starts.tolist()])[rank::num_ranks]
            loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach() * len(rows)
            distributed.all_reduce(total)
            losses.append(float(total) / 12)
        yield {"name": name, "losses": losses}


WHAT: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "bits": bits,
    "nbytes": nbytes,
    "save": save,
    "load": load,
    "portable": portable,
    "refusals": refusals,
    "placed": placed,
    "learns": learns,
}


def main() -> None:
    """Run some of them, one after the other."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for what in sys.argv[1].split(","):
        folder = Path(sys.argv[2]) / what
        found = list(WHAT[what](folder))
        (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
