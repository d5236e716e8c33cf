"""A converted checkpoint: written as its container's library writes it, and read again to compare."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from packlight.checkpoints import dcpfolder, torchfile, universal
from packlight.checkpoints.refusal import CheckpointError
from packlight.checkpoints.scratch import Scratch
from packlight.checkpoints.states import States
from packlight.checkpoints.targets import DCP, TORCH, Target
from packlight.checkpoints.tree import Path as TreePath
from packlight.checkpoints.tree import at, difference, is_model, written


@dataclass(frozen=True)
class Result:
    """What is to be written.

    Attributes:
        target: what was asked for.
        tree: all entries, with the optimiser's new ones.
        optimizer_path: where those are.
        states: what was read.
        weights: the model's state dict, where a target has weights.
    """

    target: Target
    tree: Any
    optimizer_path: TreePath
    states: States
    weights: Mapping[str, Tensor]

    def write(self, path: Path, scratch: Scratch) -> None:
        """Write a new file or folder.

        Raises:
            CheckpointError: weights are wanted, and there are none.
        """
        if self.target.container == TORCH:
            torchfile.write(self.tree, path)
        elif self.target.container == DCP:
            dcpfolder.write(self.tree, path)
        else:
            universal.write(path, self._by_parameter(scratch), self._beside())

    def check(self, path: Path, scratch: Scratch) -> None:
        """Read it again, and compare it bit by bit with what was to be written.

        Raises:
            CheckpointError: it differs.
        """
        if self.target.container == TORCH:
            place = difference(self.tree, torchfile.read(path))
        elif self.target.container == DCP:
            flat, _ = flatten_state_dict(self.tree)
            place = difference(flat, flatten_state_dict(dcpfolder.read(path, scratch))[0])
        else:
            universal.check(path, self._by_parameter(scratch))
            place = None
        if place is not None:
            raise CheckpointError(
                f"what was written differs from what was meant at {written(place)}; is the disk sound?"
            )

    def _by_parameter(self, scratch: Scratch) -> Iterator[tuple[str, dict[str, Any]]]:
        states = at(self.tree, self.optimizer_path)["state"]
        for parameter in self.states.parameters:
            name = str(parameter.name)
            weight = self.weights.get(name)
            if weight is None:
                raise CheckpointError(
                    f"{parameter} has no weights, and a universal checkpoint has them. Give the model's state dict: "
                    "--model FILE."
                )
            plain = weight.detach()
            if plain.dtype != torch.float32 or not plain.is_contiguous():
                plain = scratch.empty(plain.shape, torch.float32).copy_(plain)
            yield name, {"fp32": plain, **states[name]}

    def _beside(self) -> universal.Beside:
        optimizer = at(self.tree, self.optimizer_path)
        shapes = [
            {str(each.name): each.known_shape for each in self.states.parameters if each.group == number}
            for number in range(len(self.states.groups))
        ]
        step = next(iter(optimizer["state"].values()))["step"]
        entries = self.tree.items() if isinstance(self.tree, Mapping) and self.optimizer_path else ()
        used = self.optimizer_path[:1]
        client = {key: value for key, value in entries if key not in used and not is_model(value)}
        module = dict(self.weights)
        return universal.Beside(optimizer["param_groups"], shapes, step=step, module=module, client=client)
