"""One call of the kernels for many parameters: which go together, and with which numbers.

A kernel call does all parameters of one device, dtype and state format whose steps are the same number, since
bias correction hangs on it. On the CPU the numbers are computed in Python. On CUDA they are computed on the
device, from the step's tensor there: with a GradScaler nobody on the host knows how many steps were skipped, and
asking would make it wait.

Parameters whose steps went through the same calls have the same number whatever the device decided, so they are
told apart by a history of calls, not by the number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight.numerics import operators
from packlight.numerics.call import Call
from packlight.numerics.formats import MATRIX_PIECE
from packlight.numerics.settings import AdamWSettings, SGDSettings
from packlight.optim.layout import Layout
from packlight.optim.piece import Cut, local_of
from packlight.optim.state import MOMENTS, State, state_keys

# Source: Li et al. 2023, table 1, and our own measurements (benchmarks/quality.py): above it a step changes a
# second moment by less than half a code, and nearest rounding stalls.
MIN_STOCHASTIC_BETA2 = 0.99


class Entry(NamedTuple):
    """One parameter and its gradient.

    Attributes:
        param: the parameter.
        grad: its gradient.
        state: its compact state.
        tensors: those of the state's moments, in the order of `state_keys`.
        state_format: the name of the state's format; "" for SGD without momentum.
        rounding: how the parameter is rounded.
        seed: of its random bits.
        history: equal for parameters that went through the same steps.
        layout: of a DTensor, of which parameter and gradient are what is here; None for a plain tensor.
    """

    param: Tensor
    grad: Tensor
    state: State
    tensors: tuple[Tensor, ...]
    state_format: str
    rounding: str
    seed: int
    history: int
    layout: Layout | None = None

    @property
    def is_copied(self) -> bool:
        """Whether the kernels get a copy of the parameter."""
        return self.layout is not None and self.layout.needs_copy(self.param)


class Scalars(NamedTuple):
    """What scales or forbids a step, on the device or the host.

    Attributes:
        coefficient: gradients are multiplied by it; None: 1.
        found_inf: one element, nothing is done unless it is 0; None: do the step.
    """

    coefficient: Tensor | float | None = None
    found_inf: Tensor | None = None


@dataclass
class Batch:
    """Parameters that one call does.

    Attributes:
        state_format: of all of them, as in `Entry`.
        rounding: of all of them.
        params: the parameters, all of one device and dtype.
        grads: their gradients; a batch that is kept for the next step has none, so that they can be freed.
        states: the tensors of their moments, one parameter's after the other's.
        errors: their error bits, where they have any.
        steps: their step counters, all of one number.
        seeds: of their random bits.
        layouts: of those that are DTensors.
        is_copied: whether the kernels get copies.
    """

    state_format: str
    rounding: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    errors: list[Tensor]
    steps: list[Tensor]
    seeds: list[int]
    layouts: list[Layout | None]
    is_copied: bool = False

    @classmethod
    def of(cls, entries: list[Entry]) -> "Batch":
        """Return the batch of parameters that go together."""
        return cls(
            entries[0].state_format,
            entries[0].rounding,
            [entry.param for entry in entries],
            [entry.grad for entry in entries],
            [tensor for entry in entries for tensor in entry.tensors],
            [local_of(entry.state["param_error"]).view(-1) for entry in entries if "param_error" in entry.state],
            [entry.state["step"] for entry in entries],
            [entry.seed for entry in entries],
            [entry.layout for entry in entries],
            entries[0].is_copied,
        )

    def cuts(self) -> Iterator[Cut]:
        """Yield the matrices of which pieces were stepped; `settle` is to follow."""
        num = len(self.states) // len(self.params)
        if self.state_format != MATRIX_PIECE or num < 4:  # momentum alone has codes and scales
            return
        for at, layout in enumerate(self.layouts):
            assert layout is not None and layout.piece is not None
            rows, cols = self.states[(at + 1) * num - 2 : (at + 1) * num]
            yield Cut(rows, cols, layout.piece.groups())

    def run(self, settings: AdamWSettings | SGDSettings, scalars: Scalars, *, lr: Tensor | float) -> None:
        """Do one step; the arguments are those of `run`."""
        device = self.params[0].device
        found_inf = scalars.found_inf
        skipped = None if found_inf is None else found_inf.to(device, torch.float32).reshape(())
        if device.type != "cuda" and skipped is not None:
            if float(skipped) != 0:
                return
            skipped = None
        operators.count(self.steps, 1)
        try:
            self._call(settings, scalars, skipped, lr)
        except ValueError:
            operators.count(self.steps, -1)
            raise
        if skipped is not None:
            torch._foreach_sub_(self.steps, [(skipped != 0).float()] * len(self.steps))

    def _call(
        self, settings: AdamWSettings | SGDSettings, scalars: Scalars, skipped: Tensor | None, lr: Tensor | float
    ) -> None:
        adamw = isinstance(settings, AdamWSettings)
        params, grads, states = self._copied() if self.is_copied else (self.params, self.grads, self.states)
        call = Call(
            params,
            grads,
            states,
            self.errors,
            _numbers(settings, self.steps[0], scalars.coefficient, lr),
            self.steps[0],
            skipped,
            self.seeds,
            self.state_format,
            isinstance(settings, AdamWSettings) and settings.beta2 >= MIN_STOCHASTIC_BETA2,
            self.rounding,
        )
        operators.run(operators.adamw_step if adamw else operators.sgd_step, call)
        if self.is_copied:
            self._put_back(params, states)

    def _copied(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return what the kernels get, where it lies otherwise than they want it."""
        num, made = len(self.states) // len(self.params), list[Tensor]()
        layouts = [layout for layout in self.layouts if layout is not None]
        for at, layout in enumerate(layouts):
            own = self.states[at * num : (at + 1) * num]
            made += [layout.copied(each) for each in own] if layout.skipped else own
        params, grads = (
            [layout.copied(each) for layout, each in zip(layouts, tensors, strict=True)]
            for tensors in (self.params, self.grads)
        )
        return params, grads, made

    def _put_back(self, params: list[Tensor], states: list[Tensor]) -> None:
        num = len(self.states) // len(self.params)
        for at, layout in enumerate(self.layouts):
            assert layout is not None
            layout.put_back(self.params[at], params[at])
            for own, copied in zip(self.states[at * num : (at + 1) * num], states[at * num :], strict=False):
                if own is not copied:
                    layout.put_back(own, copied)


def batches_of(entries: Iterable[Entry]) -> list[Batch]:
    """Put parameters together that one call can do."""
    batches: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        param = entry.param
        step = entry.state["step"]
        number = entry.history if step.is_cuda else int(step)  # on the host it can be looked at
        alone = None
        if entry.is_copied:  # copies of large ones are there one after the other
            alone = -1 if entry.layout is not None and entry.layout.skipped else id(param)
        key = (param.device, param.dtype, entry.state_format, entry.rounding, number, alone)
        batches.setdefault(key, []).append(entry)
    return [Batch.of(each) for each in batches.values()]


def run(
    entries: Iterable[Entry], settings: AdamWSettings | SGDSettings, scalars: Scalars, *, lr: Tensor | float
) -> None:
    """Do one step on parameters and states, in place.

    Args:
        entries: the parameters, each once.
        settings: the hyper-parameters.
        scalars: what scales or forbids the step.
        lr: the learning rate where it is a tensor on the device; `settings` has it otherwise.
    """
    batches = batches_of(entries)
    for batch in batches:
        batch.run(settings, scalars, lr=lr)
    settle_all(batches, scalars)


def settle_all(batches: Iterable[Batch], scalars: Scalars) -> None:
    """Take over what steps found in pieces of matrices, with the other processes that have pieces of them."""
    cuts = [cut for batch in batches for cut in batch.cuts()]
    if cuts:
        from packlight.optim.settle import settle  # imports torch.distributed

        settle(cuts, skipped=False if scalars.found_inf is None else scalars.found_inf != 0)


def update(
    param: Tensor, grad: Tensor, state: State, *, state_format: str, settings: AdamWSettings, seed: int = 0
) -> None:
    """Do one AdamW step on one parameter and its compact state, in place.

    Args:
        param: fp32, bf16 or fp16, any shape: the parameter, rounded to nearest.
        grad: floating point, the same shape: its gradient.
        state: its compact state.
        state_format: the name of the format that the state has.
        settings: the hyper-parameters.
        seed: of the random bits (`noise.seed_of`).

    Raises:
        ValueError: the gradient is sparse.
    """
    check_dense([grad])
    tensors = tensors_of(state, state_format, param.shape)
    run([Entry(param, grad, state, tensors, state_format, "nearest", seed, 0)], settings, Scalars(), lr=settings.lr)


def tensors_of(state: State, state_format: str, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return the tensors of AdamW's moments in the order of the kernels."""
    return tuple(state[key] for key in state_keys(state_format, shape, MOMENTS))


def check_dense(grads: Iterable[Tensor | None]) -> None:
    """Raise where a gradient is not an ordinary dense tensor.

    Raises:
        ValueError: it is sparse.
    """
    for layout in {grad.layout for grad in grads if grad is not None} - {torch.strided}:
        raise ValueError(
            f"a gradient of layout {layout} came, a dense one was wanted. "
            "Build the embedding with sparse=False, or give its parameter to torch.optim.SparseAdam."
        )


def _numbers(
    settings: AdamWSettings | SGDSettings, step: Tensor, coefficient: Tensor | float | None, lr: Tensor | float
) -> Tensor:
    if step.device.type == "cuda":
        from packlight.numerics import gpu  # imports Triton, which machines without a GPU lack

        on_device: Any = gpu.adamw_numbers if isinstance(settings, AdamWSettings) else gpu.sgd_numbers
        numbers: Tensor = on_device(settings, step=step, lr=lr, coefficient=coefficient)
        return numbers
    scaled = settings if coefficient is None else replace(settings, coefficient=float(coefficient))
    # On the CPU also under torch.set_default_device, since a CPU kernel reads them.
    return torch.tensor(scaled.numbers(float(step)), dtype=torch.float32, device="cpu")
