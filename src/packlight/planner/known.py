"""Values that are known while a step is traced: what is computed from the batch's integers alone.

Fake tensors have no values, so a model that looks at its batch (is this mask all ones? are these positions in order?)
stops the trace, or takes another path than in the run: transformers' attention masks do. The idea: integers and
booleans of the batch are small and at hand; operators that take nothing else are run on them too, beside the trace, on
the CPU. So a question about such values has its true answer, and nothing of the model is computed.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

MAX_KNOWN_ELEMENTS = 2**22
"""Larger tensors are not followed."""

_aten = torch.ops.aten
_FACTORIES = {
    *(_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.scalar_tensor.default),
    *(_aten.zeros.default, _aten.ones.default, _aten.full.default),
}
_INDEXED = {
    *(_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default),
    _aten._unsafe_index.Tensor,
}


class KnownValues:
    """The values of fake tensors that hold integers or booleans and depend on the batch alone."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def learn(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """Remember what a tensor of the batch holds."""
        if isinstance(fake, FakeTensor) and real.device.type != "meta" and _is_followed(real):
            with no_dispatch():
                self._values[fake] = real.detach().to("cpu", copy=True)

    def value(self, fake: object) -> torch.Tensor | None:
        """Return a tensor's value on the CPU, None where it is not known."""
        known: torch.Tensor | None = self._values.get(fake) if isinstance(fake, FakeTensor) else None
        return known

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator whose result no fake tensor can tell (a number, or a tensor of a size that values decide).

        Returns:
            The result on the CPU; None for other operators, and where a value is not known.
        """
        asks = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        return self._compute(func, args, kwargs) if asks else None

    def with_places(self, func: Any, args: Any) -> Any:
        """Put the places that a known mask selects in place of the mask: a fake mask does not say how many they are."""
        if func not in _INDEXED or len(args) < 2:
            return args
        places: list[Any] = []
        for index in args[1]:
            known = self.value(index)
            if known is None or known.dtype not in (torch.bool, torch.uint8):
                places.append(index)
            else:
                with no_dispatch():
                    sizes = [at.shape for at in known.nonzero(as_tuple=True)]
                places += [torch.empty(size, dtype=torch.long, device=index.device) for size in sizes]
        return (args[0], places, *args[2:])

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note the values of an operator's results, where they are integers or booleans and its arguments known."""
        results = [at for at in tree_leaves(out) if isinstance(at, torch.Tensor)]
        known = self._compute(func, args, kwargs) if results and all(map(_is_followed, results)) else None
        if known is None:
            self._forget_written(func, args)
        for fake, real in zip(tree_leaves(out), tree_leaves(known), strict=False):
            if isinstance(fake, FakeTensor) and isinstance(real, torch.Tensor):
                self._values[fake] = real

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
                shared = [at for at, real in self._values.items() if real.untyped_storage()._cdata == key]
                for fake in shared:
                    del self._values[fake]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Let transformers look at known values: it takes every fake tensor as a sign of torch.compile otherwise."""
        module: Any = sys.modules.get("transformers.utils.import_utils")
        original = getattr(module, "is_fake_tensor", None)
        if original is None:
            yield
            return
        module.is_fake_tensor = lambda value: original(value) and self.value(value) is None
        try:
            yield
        finally:
            module.is_fake_tensor = original


def _is_followed(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= MAX_KNOWN_ELEMENTS
