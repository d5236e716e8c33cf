"""Finds the model that a script trains: the outermost module called with gradients that an optimiser holds."""

import weakref
from collections.abc import Collection

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from packlight.planner.cut import model_of, trained_by
from packlight.planner.request import SessionStop


class Finder:
    """The optimisers that a script has made, and the model that their parameters tell."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[Optimizer]] = []

    def optimizer_made(self, optimizer: Optimizer) -> None:
        """Remember an optimiser, for as long as it lives."""
        self._made.append(weakref.ref(optimizer))

    def find(self, module: nn.Module, *, is_planned: bool) -> tuple[nn.Module, list[Optimizer]] | None:
        """Return the model inside a module that is called, and the optimisers that train it; None where none does.

        Args:
            module: the outermost module that is called.
            is_planned: whether a plan is to be made; else other models may be trained beside it.

        Raises:
            SessionStop: another model is trained, too.
        """
        own: set[torch.Tensor] = set(module.parameters())
        model = model_of(module)
        trained = [optimizer for optimizer in self._living() if own.intersection(trained_by(optimizer))]
        if not trained:
            return None
        if is_planned:
            self.refuse_others(module)
        return model, trained

    def refuse_others(self, module: nn.Module) -> None:
        """Refuse a script that trains what is no part of a module, too."""
        own: set[torch.Tensor] = set(module.parameters())
        others = [optimizer for optimizer in self._living() if not own.intersection(trained_by(optimizer))]
        if others:
            raise SessionStop(
                f"two models are trained: {type(module).__name__}, and what {type(others[0]).__name__} steps. "
                "Packlight plans for one; call packlight.fit on each instead",
                exit_status=2,
            )

    def others(self, model: nn.Module, known: Collection[Optimizer]) -> list[Optimizer]:
        """Return the optimisers that train a model and are not among known ones."""
        others = [optimizer for optimizer in self._living() if optimizer not in known]
        own: set[torch.Tensor] = set(model.parameters()) if others else set()
        return [optimizer for optimizer in others if own.intersection(trained_by(optimizer))]

    def _living(self) -> list[Optimizer]:
        return [optimizer for made in self._made if (optimizer := made()) is not None]
