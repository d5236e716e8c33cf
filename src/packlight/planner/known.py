"""Values that are known while a step is traced: what is computed from the batch's integers, or was asked before.

Fake tensors have no values, so a model that looks at its batch (is this mask all ones? are these positions in order?)
stops the trace, or takes another path than in the run: transformers' attention masks do. The idea: integers and
booleans of the batch are small and at hand; operators that take nothing else are run on them too, beside the trace, on
the CPU. So a question about such values has its true answer, and nothing of the model is computed. Where that is not
enough, `answers.py` has those of a real forward.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from packlight.planner.answers import Answers, asks, masks_of

MAX_KNOWN_ELEMENTS = 2**22
"""Larger tensors are not followed."""

_aten = torch.ops.aten
_FACTORIES = {
    *(_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.scalar_tensor.default),
    *(_aten.zeros.default, _aten.ones.default, _aten.full.default),
}


@dataclass
class Noted:
    """What is known of one tensor: its values on the CPU, or how many places it selects."""

    value: torch.Tensor | None = None
    num_places: int | None = None


class KnownValues:
    """The values of fake tensors that hold integers or booleans.

    Args:
        answers: of a real forward of the same call, if there was one.
    """

    def __init__(self, answers: Answers | None = None) -> None:
        self._noted: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._answers = answers

    def learn(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """Remember what a tensor of the batch holds."""
        if isinstance(fake, FakeTensor) and real.device.type != "meta" and _is_followed(real):
            with no_dispatch():
                self.noted(fake).value = real.detach().to("cpu", copy=True)

    def value(self, fake: object) -> torch.Tensor | None:
        """Return a tensor's value on the CPU, None where it is not known."""
        noted: Noted | None = self._noted.get(fake) if isinstance(fake, FakeTensor) else None
        return None if noted is None else noted.value

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator whose result no fake tensor can tell (a number, or a tensor of a size that values decide).

        Returns:
            The result on the CPU; None for other operators, and where a value is not known.
        """
        if not asks(func):
            return None
        answer = None if self._answers is None else self._answers.take(func, (args, kwargs))
        return self._compute(func, args, kwargs) if answer is None else answer

    def with_places(self, func: Any, args: Any) -> Any:
        """Put the places that a known mask selects in place of the mask: a fake mask does not say how many they are."""
        masks = masks_of(func, args)
        if not masks:
            return args
        if self._answers is not None and self._answers.is_in_order():
            for mask, num_places in zip(masks, self._answers.take(func, masks) or (), strict=False):
                self.noted(mask).num_places = num_places
        places: list[Any] = []
        for index in args[1]:
            num_places = self._places_of(index) if any(index is mask for mask in masks) else None
            if num_places is None:
                places.append(index)
            else:
                sizes = [num_places] * index.dim()
                places += [torch.empty(size, dtype=torch.long, device=index.device) for size in sizes]
        return (args[0], places, *args[2:])

    def _places_of(self, mask: torch.Tensor) -> int | None:
        noted = self.noted(mask)
        if noted.value is not None:
            with no_dispatch():
                return int(noted.value.count_nonzero())
        return noted.num_places

    def noted(self, fake: torch.Tensor) -> Noted:
        """Return what is known of a tensor by now; what is learnt of it later is put there too."""
        if fake not in self._noted:
            self._noted[fake] = Noted()
        noted: Noted = self._noted[fake]
        return noted

    def note(self, fake: torch.Tensor, noted: Noted) -> None:
        """Know of a tensor what is known of the one in whose place it is."""
        self._noted[fake] = noted

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any, *, answer: Any = None) -> None:
        """Note the values of an operator's results, where they are integers or booleans.

        Args:
            func: the operator.
            args: its arguments; where there is no answer, all of them have to be known.
            kwargs: its keyword arguments.
            out: its results, fake ones.
            answer: what `answer` returned.
        """
        results = [at for at in tree_leaves(out) if isinstance(at, torch.Tensor)]
        known = answer
        if known is None and results and all(map(_is_followed, results)):
            known = self._compute(func, args, kwargs)
        if known is None:
            self._forget_written(func, args)
        for fake, real in zip(tree_leaves(out), tree_leaves(known), strict=False):
            if isinstance(fake, FakeTensor) and isinstance(real, torch.Tensor) and _is_followed(real):
                self.noted(fake).value = real

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on known values; None where one is missing or the operator draws numbers."""
        tensors = [at for at in tree_leaves((args, kwargs)) if isinstance(at, torch.Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags or not (tensors or func in _FACTORIES):
            return None
        if any(self.value(tensor) is None for tensor in tensors):
            return None
        args, kwargs = tree_map_only(torch.Tensor, self.value, (args, kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        with no_dispatch():
            return func(*args, **kwargs)

    def _forget_written(self, func: Any, args: Any) -> None:
        """Forget a tensor, and all that share its storage, into which unknown values are written."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            known = self.value(value)
            if argument.is_write and known is not None:
                key = known.untyped_storage()._cdata
                for noted in self._noted.values():
                    if noted.value is not None and noted.value.untyped_storage()._cdata == key:
                        noted.value = None

    @contextmanager
    def told(self) -> Iterator[None]:
        """Let transformers look at known values: it takes every fake tensor as a sign of torch.compile otherwise."""
        module: Any = sys.modules.get("transformers.utils.import_utils")
        original = getattr(module, "is_fake_tensor", None)
        if original is None:
            yield
            return
        has_answers = self._answers is not None
        module.is_fake_tensor = lambda value: original(value) and self.value(value) is None and not has_answers
        try:
            yield
        finally:
            module.is_fake_tensor = original


def _is_followed(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= MAX_KNOWN_ELEMENTS
