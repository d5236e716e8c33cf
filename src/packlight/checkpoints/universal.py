"""Universal checkpoints of DeepSpeed: a folder of plain tensors for each parameter, for any number of processes.

    FOLDER/latest_universal                     the name of the folder beside it
    FOLDER/universal/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt
    FOLDER/universal/zero/optimizer_state.pt    param groups, and what is the same for all parameters
    FOLDER/universal/mp_rank_00_model_states.pt, zero_pp_rank_0_mp_rank_00_model_states.pt
                                                the run's counters; stages 1 and 2 read the first, stage 3 the other

DeepSpeed counts steps once for all, and has moments for each parameter. One that has had no gradient has zeros there,
as it has in DeepSpeed's own flat partitions.

Source: deepspeed 0.19, deepspeed/checkpoint/ds_to_universal.py, universal_checkpoint.py, runtime/base_optimizer.py,
runtime/zero/stage3.py.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packlight.checkpoints import torchfile
from packlight.checkpoints.refusal import CheckpointError
from packlight.checkpoints.tree import difference
from packlight.optim.state import MOMENTS

TAG = "universal"
LATEST = "latest_universal"
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
# DeepSpeed 0.19's version of the layout, and one of the package that writes it.
UNIVERSAL_VERSION, DEEPSPEED_VERSION = 0.4, "0.19.0"
STRANGERS = ("deepspeed.",)
# What DeepSpeed has in its model file besides a script's own entries.
_OWN = {"module", "optimizer", "param_shapes", "buffer_names", "universal_checkpoint_info", "ds_version", "ds_config"}
_OWN |= {"dp_world_size", "mp_world_size", "global_samples", "skipped_steps", "shared_params", "num_experts"}
_OWN |= {"frozen_param_shapes", "frozen_param_fragments", "ds_autoep_layers", "sparse_tensor_module_names"}
_OWN |= {"data_sampler", "random_ltd", "global_steps"}


def tag_folder(path: Path) -> Path | None:
    """Return the folder with `zero` in it, None where there is none: it may be named in a file."""
    if (path / "zero").is_dir():
        return path
    latest = path / LATEST
    named = path / latest.read_text(encoding="utf-8").strip() if latest.is_file() else path
    return named if (named / "zero").is_dir() else None


def read(path: Path) -> dict[str, Any]:
    """Return what a folder holds, as a trainer would have saved it: model, optimizer, and the script's own entries.

    Raises:
        CheckpointError: a file is missing or damaged, or the groups do not tell which parameters they have.
    """
    folder = tag_folder(path)
    assert folder is not None
    common = _file(folder / "zero" / "optimizer_state.pt")
    model_file = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if model_file is None:
        raise CheckpointError(f"{folder}: neither {MODEL_FILES[0]} nor {MODEL_FILES[1]} is there. Copy all files.")
    beside = _file(model_file)
    shapes = _shapes_by_group(common, beside, folder)
    weights, states = {}, {}
    for name, shape in (each for group in shapes for each in group.items()):
        weights[name], states[name] = _parameter(folder / "zero" / name, tuple(shape), common)
    groups = [{**group, "params": list(each)} for group, each in zip(common["param_groups"], shapes, strict=True)]
    others = {key: value for key, value in beside.items() if key not in _OWN}
    module = beside.get("module") or {}
    model = {**{key: value for key, value in module.items() if isinstance(value, Tensor)}, **weights}
    return {"model": model, "optimizer": {"state": states, "param_groups": groups}, **others}


def write(folder: Path, parameters: Iterator[tuple[str, dict[str, Any]]], beside: "Beside") -> None:
    """Write a new folder, parameter by parameter.

    Args:
        folder: it must not be there.
        parameters: names, and for each what its files hold: fp32, exp_avg, exp_avg_sq (fp32 tensors), step.
        beside: what is not a parameter's own.
    """
    inner = folder / TAG
    (inner / "zero").mkdir(parents=True)
    for name, files in parameters:
        place = inner / "zero" / name
        place.mkdir()
        for key, value in files.items():
            torchfile.write(_file_of(key, value), place / f"{key}.pt")
    torchfile.write(beside.optimizer_file(), inner / "zero" / "optimizer_state.pt")
    for name in MODEL_FILES:
        torchfile.write(beside.model_file(with_module=name == MODEL_FILES[0]), inner / name)
    (folder / LATEST).write_text(TAG, encoding="utf-8")


def check(folder: Path, parameters: Iterator[tuple[str, dict[str, Any]]]) -> None:
    """Raise where a written folder does not hold what was to be written.

    Raises:
        CheckpointError: a file differs.
    """
    for name, files in parameters:
        for key, value in files.items():
            path = folder / TAG / "zero" / name / f"{key}.pt"
            if difference(_file(path), _file_of(key, value)) is not None:
                raise CheckpointError(f"{path} does not hold what was written; is the disk sound?")


class Beside:
    """What a universal checkpoint has besides parameters' own files."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        shapes: Sequence[Mapping[str, Sequence[int]]],
        *,
        step: Tensor,
        module: Mapping[str, Any],
        client: Mapping[str, Any],
    ) -> None:
        """Take it.

        Args:
            groups: param groups as torch saves them.
            shapes: of each group, its parameters' names and shapes.
            step: fp32, 0-dim: how many steps were done.
            module: the model's state dict.
            client: the script's own entries.
        """
        self._groups = [{**group, "params": [at]} for at, group in enumerate(groups)]
        self._shapes = [OrderedDict((name, torch.Size(each)) for name, each in group.items()) for group in shapes]
        self._step, self._module, self._client = step, module, client

    def optimizer_file(self) -> dict[str, Any]:
        """Return what optimizer_state.pt holds; stage 3 looks for groups and step a level below."""
        state = {"state": {0: {"step": self._step}}, "param_groups": self._groups}
        return {"ds_version": DEEPSPEED_VERSION, "param_groups": self._groups, "optimizer_state_dict": state}

    def model_file(self, *, with_module: bool) -> dict[str, Any]:
        """Return what a file of model states holds; a scheduler of the script's is where DeepSpeed looks for it."""
        names = {name for group in self._shapes for name in group}
        return {
            **{"lr_scheduler": self._client.get("scheduler"), **self._client},
            "module": self._module if with_module else {},
            "buffer_names": [name for name in self._module if name not in names],
            "param_shapes": self._shapes,
            "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
            "ds_version": DEEPSPEED_VERSION,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "global_steps": int(self._step),
            "skipped_steps": 0,
        }


def _file_of(key: str, value: Any) -> Any:
    return value if key == "step" else {"param": value}


def _file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing. Copy all files, or make the folder anew.")
    if not torchfile.is_torch_file(path):
        raise CheckpointError(f"{path} is not a file of torch.save, or is cut off. Take another copy.")
    return torchfile.read(path, strangers=STRANGERS)


def _parameter(place: Path, shape: tuple[int, ...], common: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    loaded = {key: _file(place / f"{key}.pt") for key in ("fp32", *MOMENTS)}
    tensors = {}  # flat where stage 3 wrote them
    for key, value in loaded.items():
        tensor = value.get("param") if isinstance(value, Mapping) else value
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{place / key}.pt holds no tensor under 'param'")
        if tensor.numel() != math.prod(shape):
            raise CheckpointError(f"{place / key}.pt has shape {tuple(tensor.shape)}, {shape} was wanted")
        tensors[key] = tensor.view(shape)
    if (place / "step.pt").is_file():
        step = _file(place / "step.pt")
    else:  # stage 3 has one for all
        inner = common.get("optimizer_state_dict", {}).get("state", {})
        step = next((each["step"] for each in inner.values() if "step" in each), None)
    if step is None:
        raise CheckpointError(f"{place}: step.pt is missing, and optimizer_state.pt has no step")
    return tensors["fp32"], {"step": step, **{key: tensors[key] for key in MOMENTS}}


def _shapes_by_group(
    common: Mapping[str, Any], beside: Mapping[str, Any], folder: Path
) -> list[dict[str, Sequence[int]]]:
    """Return the parameters of each group, and their shapes: DeepSpeed keeps shapes by group, stage 3 by sub-group."""
    shapes, groups = beside.get("param_shapes"), common.get("param_groups")
    if not isinstance(shapes, list) or not isinstance(groups, list):
        raise CheckpointError(f"{folder}: its files have no param_shapes or no param_groups, which tell the groups")
    found = [dict(each) for each in shapes]
    if len(groups) == 1:
        return [{name: shape for each in found for name, shape in each.items()}]
    if len(found) != len(groups):
        raise CheckpointError(
            f"{folder}: {len(groups)} param groups and {len(found)} lists of parameters came, as many were wanted to "
            "tell which parameter is in which group"
        )
    return found
