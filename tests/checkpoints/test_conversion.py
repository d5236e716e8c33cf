"""Conversion in one process: the real consumer loads the result, finds what it should, and trains on."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

import packlight
from packlight.checkpoints import TARGETS, CheckpointError, convert, dcpfolder
from packlight.checkpoints.scratch import Scratch
from packlight.checkpoints.tree import difference
from packlight.cli.convert import TARGETS as OFFERED
from tests.checkpoints.ranks import decoder, train

OURS: dict[str, Callable[..., Any]] = {
    "AdamW": packlight.AdamW,
    "Adam": packlight.Adam,
    "SGD": lambda params, **options: packlight.SGD(params, lr=1e-2, momentum=0.9, **options),
}
THEIRS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}
FORMATS = ("4bit", "8bit", "fp8", "fp32")
SAVED = ("torch", *FORMATS, "factored")


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


def trained(kind: str, saved: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model after two steps, and a trainer's checkpoint of it."""
    model = decoder()
    optimizer = THEIRS[kind](named(model)) if saved == "torch" else OURS[kind](named(model), state_format=saved)
    train(model, optimizer, range(2))
    checkpoint = {
        "epoch": 3,
        "model": model.state_dict(),
        "training": {"optimizer": optimizer.state_dict(), "history": [0.5, float("nan"), torch.tensor(1.0)]},
        "rng": torch.get_rng_state(),
    }
    return model, checkpoint


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def same_states(left: Optimizer, right: Optimizer) -> bool:
    return difference(left.state_dict()["state"], right.state_dict()["state"]) is None


@pytest.mark.filterwarnings("ignore:the compiled optimiser step")
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("saved", SAVED)
def test_a_file_in_a_format_holds_the_bits_that_an_optimiser_of_that_format_makes_of_the_original(
    kind: str, saved: str, tmp_path: Path
) -> None:
    model, checkpoint = trained(kind, saved)
    torch.save(checkpoint, tmp_path / "in.pt")
    for target in FORMATS:
        convert(tmp_path / "in.pt", target, tmp_path / target)
        found = load(tmp_path / target)
        left, right = copy.deepcopy(model), copy.deepcopy(model)
        direct = OURS[kind](named(left), state_format=target)
        direct.load_state_dict(checkpoint["training"]["optimizer"])
        converted = OURS[kind](named(right), state_format=target)
        converted.load_state_dict(found["training"]["optimizer"])
        assert same_states(converted, direct)
        assert difference(converted.state_dict()["state"], found["training"]["optimizer"]["state"]) is None, "as it is"
        formats = [group["state_formats"] for group in found["training"]["optimizer"]["param_groups"]]
        assert formats == [group["state_formats"] for group in direct.param_groups]
        assert converted.param_groups[0]["lr"] == checkpoint["training"]["optimizer"]["param_groups"][0]["lr"]
        found["training"]["optimizer"] = checkpoint["training"]["optimizer"]
        assert difference(found, checkpoint) is None, "the rest is passed on as it is"
        for net, optimizer in ((left, direct), (right, converted)):
            train(net, optimizer, range(2, 3))
        assert difference(dict(left.named_parameters()), dict(right.named_parameters())) is None


@pytest.mark.filterwarnings("ignore:the compiled optimiser step")
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("saved", SAVED)
def test_torchs_optimiser_loads_the_portable_form_bit_for_bit(kind: str, saved: str, tmp_path: Path) -> None:
    model, checkpoint = trained(kind, saved)
    torch.save(checkpoint, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", "torch", tmp_path / "out.pt")
    theirs = THEIRS[kind](named(model))
    theirs.load_state_dict(load(tmp_path / "out.pt")["training"]["optimizer"])
    original = checkpoint["training"]["optimizer"]
    wanted: Any = original
    if saved != "torch":
        ours = OURS[kind](named(model), state_format=saved)
        ours.load_state_dict(original)
        wanted = ours.state_dict(format="portable")
    assert difference(theirs.state_dict()["state"], wanted["state"]) is None
    assert set(theirs.param_groups[0]) == set(THEIRS[kind](named(model)).param_groups[0])
    train(model, theirs, range(2, 3))


@pytest.mark.parametrize("saved", ["torch", "4bit", "8bit"])
def test_ways_there_and_back_change_no_bit(saved: str, tmp_path: Path) -> None:
    _, checkpoint = trained("AdamW", saved)
    torch.save(checkpoint, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", "dcp", tmp_path / "dcp")
    convert(tmp_path / "dcp", "dcp", tmp_path / "again")
    one, other = (dcpfolder.read(tmp_path / name, Scratch(tmp_path)) for name in ("dcp", "again"))
    assert difference(one, other) is None
    convert(tmp_path / "again", "torch", tmp_path / "back.pt")
    convert(tmp_path / "in.pt", "torch", tmp_path / "direct.pt")
    back, direct = load(tmp_path / "back.pt"), load(tmp_path / "direct.pt")
    assert difference(back["training"]["optimizer"]["state"], direct["training"]["optimizer"]["state"]) is None
    assert difference(dict(back["model"]), dict(checkpoint["model"])) is None and back["epoch"] == 3
    convert(tmp_path / "direct.pt", "deepspeed-universal", tmp_path / "universal")
    convert(tmp_path / "universal", "deepspeed-universal", tmp_path / "universal-again")
    convert(tmp_path / "universal-again", "torch", tmp_path / "last.pt")
    last = load(tmp_path / "last.pt")
    assert difference(last["optimizer"]["state"], direct["training"]["optimizer"]["state"]) is None
    assert difference(last["model"], dict(checkpoint["model"])) is None and last["epoch"] == 3
    if saved != "torch":
        convert(tmp_path / "in.pt", saved, tmp_path / "same.pt")
        assert difference(load(tmp_path / "same.pt"), checkpoint) is None


def test_a_bare_state_dict_goes_to_a_folder_that_torchs_optimiser_loads_by_name(tmp_path: Path) -> None:
    model, checkpoint = trained("AdamW", "torch")
    original = checkpoint["training"]["optimizer"]
    torch.save(original, tmp_path / "optimizer.pt")
    convert(tmp_path / "optimizer.pt", "dcp", tmp_path / "dcp")
    read = dcpfolder.read(tmp_path / "dcp", Scratch(tmp_path))
    optimizer = torch.optim.AdamW(named(model), lr=5.0)
    assert set(get_optimizer_state_dict(model, optimizer)) == set(read)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=read)
    assert difference(optimizer.state_dict()["state"], original["state"]) is None
    assert optimizer.param_groups[0]["lr"] == 1e-3


def trainers_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters without names, matrices first: as transformers' Trainer has them."""
    return [
        {"params": [param for param in model.parameters() if param.dim() > 1], "weight_decay": 0.1},
        {"params": [param for param in model.parameters() if param.dim() == 1], "weight_decay": 0.0},
    ]


def safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the format by hand: a length, a header, bytes."""
    header, blob = {}, b""
    for name, tensor in tensors.items():
        part = tensor.detach().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(blob), len(blob) + len(part)]}
        blob += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


@pytest.mark.parametrize("beside", ["in the file", "torch", "safetensors"])
def test_names_are_found_by_the_models_order_and_shapes(beside: str, tmp_path: Path) -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(trainers_groups(model))
    train(model, optimizer, range(2))
    weights = dict(model.state_dict())
    inside = {"model": weights} if beside == "in the file" else {}
    torch.save({**inside, "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    torch.save(weights, tmp_path / "model.torch")
    safetensors(tmp_path / "model.safetensors", weights)
    given = None if inside else tmp_path / f"model.{beside}"
    convert(tmp_path / "in.pt", "4bit", tmp_path / "out.pt", model=given)
    groups = load(tmp_path / "out.pt")["optimizer"]["param_groups"]
    names = dict(zip((name for group in groups for name in group["param_names"]), range(99), strict=False))
    numbers = {id(param): number for number, (_, param) in enumerate(named(model))}
    assert len(numbers) == len(names)
    order = [param for group in trainers_groups(model) for param in group["params"]]
    assert [name for name in names] == [next(n for n, each in named(model) if each is param) for param in order]
    assert groups[0]["state_formats"][:3] == ["8bit", "8bit", "4bit"], "embeddings, by their names"
    convert(tmp_path / "in.pt", "deepspeed-universal", tmp_path / "universal", model=given)
    read = load(tmp_path / "universal" / "universal" / "zero" / "wpe.weight" / "fp32.pt")["param"]
    assert torch.equal(read, weights["wpe.weight"])


@pytest.mark.parametrize("model_class", [nn.Sequential])
def test_names_that_could_be_others_are_not_guessed(model_class: Any, tmp_path: Path) -> None:
    model = model_class(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    model.register_buffer("table", torch.ones(128, 128))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match="parameter 0 of shape \\(128, 128\\) has no name"):
        convert(tmp_path / "in.pt", "4bit", tmp_path / "out.pt")
    with pytest.raises(CheckpointError, match="the model has the shape of one of them and may be it"):
        convert(tmp_path / "in.pt", "torch", tmp_path / "out.pt", model=tmp_path / "in.pt")
    convert(tmp_path / "in.pt", "torch", tmp_path / "out.pt")


def test_rows_that_are_no_whole_blocks_are_rounded_anew_for_a_folder_and_that_is_said(tmp_path: Path) -> None:
    model = nn.Linear(200, 300)
    optimizer = packlight.AdamW(named(model))
    model(torch.randn(4, 200)).square().sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    done = convert(tmp_path / "in.pt", "dcp", tmp_path / "dcp")
    assert done.notes[0].startswith("1 states were rounded anew")
    convert(tmp_path / "dcp", "torch", tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")["optimizer"]["state"][0]
    exact = optimizer.state_dict(format="portable")["state"][0]
    # NF4's widest gap, and a level of 16 of the root
    assert float((found["exp_avg"] - exact["exp_avg"]).abs().max()) <= 0.153 * float(exact["exp_avg"].abs().max())
    error = (found["exp_avg_sq"].sqrt() - exact["exp_avg_sq"].sqrt()).abs()
    assert float(error.max()) <= (1 / 16 + 1e-3) * float(exact["exp_avg_sq"].sqrt().max())


def test_a_parameter_without_a_gradient_has_zeros_where_all_have_states(tmp_path: Path) -> None:
    model = decoder()
    model.head.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(named(model))
    train(model, optimizer, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", "4bit", tmp_path / "4bit.pt")
    assert len(load(tmp_path / "4bit.pt")["optimizer"]["state"]) == len(named(model)) - 1
    convert(tmp_path / "in.pt", "deepspeed-universal", tmp_path / "universal")
    place = tmp_path / "universal" / "universal" / "zero" / "head.weight"
    assert not load(place / "exp_avg_sq.pt")["param"].any() and float(load(place / "step.pt")) == 2


def test_error_bits_stay_with_their_format_and_their_loss_is_said(tmp_path: Path) -> None:
    model = decoder().to(torch.bfloat16)
    optimizer = packlight.AdamW(named(model), bf16_rounding="master24")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", "8bit", tmp_path / "8bit.pt").notes == ()
    states = load(tmp_path / "8bit.pt")["optimizer"]["state"]
    for number, state in checkpoint["optimizer"]["state"].items():
        assert torch.equal(states[number]["param_error"], state["param_error"])
    (note,) = convert(tmp_path / "in.pt", "torch", tmp_path / "torch.pt").notes
    assert note.startswith("error bits of 17 bf16 parameters")


def test_states_of_bitsandbytes_go_where_loading_them_takes_them(tmp_path: Path) -> None:
    model = nn.Linear(128, 64)
    theirs = torch.optim.AdamW(named(model)).state_dict()
    generator, count = torch.Generator().manual_seed(1), 128 * 64
    codes = [torch.randint(0, 256, (64, 128), dtype=torch.uint8, generator=generator) for _ in range(2)]
    tables = {"qmap1": torch.linspace(-1, 1, 256), "qmap2": torch.linspace(0, 1, 256)}
    scales = {f"absmax{at}": torch.rand(count // 256, generator=generator) for at in (1, 2)}
    small = {"step": 2, "state1": torch.randn(64, generator=generator), "state2": torch.rand(64, generator=generator)}
    theirs["state"] = {0: {"step": 2, "state1": codes[0], "state2": codes[1], **tables, **scales}, 1: small}
    torch.save(theirs, tmp_path / "in.pt")
    convert(tmp_path / "in.pt", "8bit", tmp_path / "out.pt")
    direct = packlight.AdamW(named(model), state_format="8bit")
    direct.load_state_dict(theirs)
    assert difference(load(tmp_path / "out.pt")["state"], direct.state_dict()["state"]) is None
    convert(tmp_path / "in.pt", "torch", tmp_path / "torch.pt")
    torch.optim.AdamW(named(model)).load_state_dict(load(tmp_path / "torch.pt"))


def test_the_commands_choices_are_the_targets() -> None:
    assert set(OFFERED) == set(TARGETS)
