"""Gradients that are out of an optimiser's sight for a while: its step skips parameters that have none."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


class HiddenGradients:
    """Gradients taken from their parameters until `show`, in which none is lost even if a step raises."""

    def __init__(self) -> None:
        self._hidden: list[tuple[Tensor, Tensor]] = []

    def hide(self, params: Iterable[Tensor]) -> None:
        """Take the gradients of parameters that have one."""
        for param in params:
            if param.grad is not None:
                self._hidden.append((param, param.grad))
                param.grad = None

    def show(self) -> None:
        """Give all of them back, but for parameters that have got another one."""
        while self._hidden:
            param, grad = self._hidden.pop()
            if param.grad is None:
                param.grad = grad

    @contextmanager
    def without(self, params: Iterable[Tensor]) -> Iterator[None]:
        """Hide gradients for the time of the context."""
        self.hide(params)
        try:
            yield
        finally:
            self.show()
