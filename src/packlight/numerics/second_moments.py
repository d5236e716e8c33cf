"""Second moments: how each format decays them, and what it has to know about the whole tensor to store them.

A block is scaled alone, so it can be encoded as soon as it is updated. Rows and columns are not: their maxima
are known when the whole tensor is. Formats differ in how they deal with that:

    Blocks    scales of blocks alone; one pass
    Matrix    a root is divided by the least of its row's and its column's largest root *as known one step before*,
              then by the largest quotient in its block. Old maxima only even out the block, and the block scale is
              exact, so one pass does, nothing is clipped, and each element is still coded relative to its row
              and column. A known maximum stays for as long as it is within MAXIMA_SLACK of the true one. Of a piece
              of a parameter, the step leaves what it has found in the place of the old divisors: `rotate` takes it
              over when the other pieces' maxima have come
    Rank1     algorithm 4 of Li et al.: maxima per axis of the new moment; two passes over gradients and codes
    Factored  means per row and column; a pass for the means, then one for the update

`decayed` returns the new second moment's square root, which is what the update divides by, and keeps what `store`
needs.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
algorithm 4; Shazeer, Stern, "Adafactor", ICML 2018 (arXiv 1804.04235), section 3.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from packlight.numerics import codes as coding
from packlight.numerics import moments
from packlight.numerics.moments import UNKNOWN_COLUMN, UNKNOWN_ROW, Moment

# Row and column maxima outside of this range have no use as divisors.
SMALLEST_MAXIMUM, LARGEST_MAXIMUM = 1e-30, 1e30
# A column that was tiny one step before and is not now has the largest quotient of its blocks, and what is small in
# them is rounded up to a level of it. So no divisor is smaller than the largest by more than this; with the slack of
# both, by 64 * 1.4 ** 2, about 125.
MAXIMA_RANGE = 64.0
# A divisor that changes takes every root of its row off its level, and each rounding adds noise that the moment
# remembers for 1 / (1 - beta2) steps. So it stays as long as it is within this factor of the maximum.
MAXIMA_SLACK = 1.4

Gradients = Callable[[], Iterable[tuple[int, Tensor]]]


class SecondMoment(Protocol):
    """What a step does with a second moment, range by range."""

    def prepare(self, gradients: Gradients, *, beta2: float, root_beta2: float) -> None:
        """Read all gradients once, where the format needs that.

        Args:
            gradients: yields offsets and ranges of sqrt(1 - beta2) g, fp32.
            beta2: decay of the second moment, an fp32 number.
            root_beta2: its square root, an fp32 number.
        """

    def decayed(self, start: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return a range of the new second moment and its square root.

        Args:
            start: first element, a multiple of 128.
            gradient: fp32, 1-D: sqrt(1 - beta2) g.

        Returns:
            v: fp32, 1-D: beta2 v + (1 - beta2) g^2.
            root: fp32, 1-D: its square root.
        """

    def load(self, start: int, stop: int) -> Tensor:
        """Return a range of the stored moment, fp32 1-D.

        Args:
            start: first element, a multiple of 128.
            stop: one past the last.
        """

    def store(self, start: int, value: Tensor, root: Tensor, *, key: int | None) -> None:
        """Encode a range.

        Args:
            start: first element, a multiple of 128.
            value: fp32, 1-D: the second moment.
            root: fp32, 1-D: its square root.
            key: of the random bits for stochastic rounding; None: nearest.
        """

    def finish(self) -> None:
        """Store what is known after the last range."""


def second_moment(moment: Moment) -> SecondMoment:
    """Return what a step does with a second moment of that format."""
    kinds: dict[str, Callable[[Moment], SecondMoment]] = {"matrix": Matrix, "rank1": Rank1, "factored": Factored}
    return kinds.get(moment.format.scale, Blocks)(moment)


class Blocks:
    """Scales of blocks alone, or none."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.beta2 = self.root_beta2 = 1.0

    def prepare(self, gradients: Gradients, *, beta2: float, root_beta2: float) -> None:
        """Keep the decay."""
        self.beta2, self.root_beta2 = beta2, root_beta2

    def decayed(self, start: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return a range of the new second moment and its square root."""
        stop = start + gradient.numel()
        if self.moment.format.coding == "root":
            old = moments.root_levels(self.moment, start, stop) * self.units(start, stop, self.root_beta2)
            old = old * old
        else:
            old = moments.load(self.moment, start, stop, factor=self.beta2)
        new = old + gradient * gradient
        return new, coding.square_root(new)

    def load(self, start: int, stop: int) -> Tensor:
        """Return a range of the stored moment, fp32 1-D."""
        if self.moment.format.coding != "root":
            return moments.load(self.moment, start, stop)
        root = moments.root_levels(self.moment, start, stop) * self.units(start, stop, 1.0)
        return root * root

    def units(self, start: int, stop: int, factor: float) -> Tensor:
        """Return what a level of a root is worth, times a factor."""
        return moments.root_units(self.moment, start, stop, factor=factor)

    def store(self, start: int, value: Tensor, root: Tensor, *, key: int | None) -> None:
        """Encode a range, and its block scales."""
        if self.moment.format.coding == "root":
            moments.store_roots(self.moment, start, root, key=key)
        else:
            moments.store(self.moment, start, value, key=key)

    def finish(self) -> None:
        """Nothing is left to store."""


class Matrix(Blocks):
    """Blocks of roots that are divided by row and column maxima known before the step."""

    def __init__(self, moment: Moment) -> None:
        super().__init__(moment)
        self.rows, self.cols = moment.tensors["rows"], moment.tensors["cols"]
        self.maxima = Maxima(moment, (self.rows.shape[1], self.cols.shape[1]))

    def units(self, start: int, stop: int, factor: float) -> Tensor:
        """Return the least of what rows and columns say a level is worth, times a factor."""
        units = super().units(start, stop, factor)
        row, column = self._at(start, stop)
        by_row, by_column = self.rows[0, row] * units, self.cols[0, column] * units
        return torch.where(by_row < by_column, by_row, by_column)

    def store(self, start: int, value: Tensor, root: Tensor, *, key: int | None) -> None:
        """Divide a range of roots by its rows' and columns' maxima, and encode it."""
        self.maxima.add(root, start)
        row, column = self._at(start, start + root.numel())
        ones = torch.ones_like(root)
        inverse = torch.maximum(ones / self.rows[1, row], ones / self.cols[1, column])
        super().store(start, value, root * inverse, key=key)

    def finish(self) -> None:
        """Take over maxima that have moved away from the divisors, and keep the divisors of this step for decoding."""
        row, column = self.maxima.of_axes()
        if self.moment.format.deferred:
            self.rows[0], self.cols[0] = row, column
            return
        rotate(self.rows, row, largest_of(row), unknown=UNKNOWN_ROW)
        rotate(self.cols, column, largest_of(column), unknown=UNKNOWN_COLUMN)

    def use(self, row: Tensor, column: Tensor, *, largest_row: Tensor | None = None) -> None:
        """Take maxima for the next time that something is stored; `largest_row` is of all pieces' rows."""
        self.rows[1] = _usable(row, largest_of(row) if largest_row is None else largest_row, UNKNOWN_ROW)
        self.cols[1] = _usable(column, largest_of(column), UNKNOWN_COLUMN)

    def keep(self) -> None:
        """Decode by the divisors that were stored with."""
        self.rows[0], self.cols[0] = self.rows[1], self.cols[1]

    def _at(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        offsets = torch.arange(start, stop, device=self.rows.device)
        return offsets // self.cols.shape[1], offsets % self.cols.shape[1]


def rotate(vectors: Tensor, maxima: Tensor, largest: Tensor, *, unknown: float | Tensor) -> None:
    """Keep the divisors of the step that was done, for decoding, and take over maxima that have moved from them.

    Args:
        vectors: fp32, (2, n): divisors of the step before and of this one; changed in place.
        maxima: fp32, (n,): what this step has found.
        largest: fp32, 0-dim or (n,): `largest_of` all maxima of the parameter's rows, or columns.
        unknown: what takes the place of maxima that are no use.
    """
    used, following = vectors[1].clone(), _usable(maxima, largest, unknown)
    changed = (following > used * MAXIMA_SLACK) | (used > following * MAXIMA_SLACK)
    vectors[0], vectors[1] = used, torch.where(changed, following, used)


def largest_of(maxima: Tensor) -> Tensor:
    """Return the largest of the maxima that are of use, 0 where none is; fp32, 0-dim."""
    return torch.where(is_usable(maxima), maxima, 0.0).amax() if maxima.numel() else maxima.new_zeros(())


def is_usable(maxima: Tensor) -> Tensor:
    """Tell which maxima can be divided by."""
    return (maxima >= SMALLEST_MAXIMUM) & (maxima <= LARGEST_MAXIMUM)


def _usable(maxima: Tensor, largest: Tensor, otherwise: float | Tensor) -> Tensor:
    return torch.where(is_usable(maxima), torch.maximum(maxima, largest / MAXIMA_RANGE), otherwise)


class Rank1:
    """Maxima per axis of the new moment: an element's scale is the least of its axes' entries."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.vectors = [moment.tensors[f"scale_{axis}"] for axis in range(len(moment.shape))]
        self.old, self.new, self.beta2 = _Grid(self.vectors), list(self.vectors), 1.0

    def prepare(self, gradients: Gradients, *, beta2: float, root_beta2: float) -> None:
        """Find the maxima of the new moment."""
        self.beta2 = beta2
        maxima = Maxima(self.moment, self.moment.shape)
        for start, gradient in gradients():
            maxima.add(self.decayed(start, gradient)[0], start)
        self.use(maxima)

    def use(self, maxima: "Maxima") -> None:
        """Take these maxima for what is stored from now on."""
        self.new = list(maxima.of_axes())
        self.divisors = _Grid([torch.where(vector == 0, 1.0, vector) for vector in self.new])

    def decayed(self, start: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return a range of the new second moment and its square root."""
        new = self.load(start, start + gradient.numel()) * self.beta2 + gradient * gradient
        return new, coding.square_root(new)

    def load(self, start: int, stop: int) -> Tensor:
        """Return a range of the stored moment."""
        assert self.moment.format.book is not None
        codes = coding.unpack(self.moment.tensors["codes"][start // 2 : (stop + 127) // 128 * 64], stop - start)
        return coding.book_values(codes, self.moment.format.book) * self.old.of_range(start, stop)

    def store(self, start: int, value: Tensor, root: Tensor, *, key: int | None) -> None:
        """Encode a range by the new maxima."""
        assert self.moment.format.book is not None
        ratios = value / self.divisors.of_range(start, start + value.numel())
        packed = coding.pack(coding.nearest_codes(ratios, self.moment.format.book))
        self.moment.tensors["codes"][start // 2 :][: packed.numel()] = packed

    def finish(self) -> None:
        """Replace the old maxima."""
        for old, new in zip(self.vectors, self.new, strict=True):
            old.copy_(new)


class Factored:
    """Means of g^2 per row and column over the last two axes: v = row column / mean(row)."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.row, self.col = moment.tensors["row"], moment.tensors["col"]

    def prepare(self, gradients: Gradients, *, beta2: float, root_beta2: float) -> None:
        """Decay the means and take the new gradients in."""
        inner, columns = math.prod(self.moment.shape[-2:]), self.moment.shape[-1]
        self.row.mul_(beta2)
        self.col.mul_(beta2)
        for start, gradient in gradients():
            offsets = torch.arange(start, start + gradient.numel(), device=gradient.device)
            square = gradient * gradient
            self.row.view(-1).index_add_(0, offsets // columns, square / columns)
            column = offsets // inner * columns + offsets % columns
            self.col.view(-1).index_add_(0, column, square / (inner // columns))
        self.mean = self.row.mean(-1, keepdim=True)

    def decayed(self, start: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return a range of the product of the means, and its square root."""
        value = self.load(start, start + gradient.numel())
        return value, coding.square_root(value)

    def load(self, start: int, stop: int) -> Tensor:
        """Return a range of the product of the means."""
        inner, columns = math.prod(self.moment.shape[-2:]), self.moment.shape[-1]
        first, last = start // columns, -(-stop // columns)
        matrix = torch.arange(first, last, device=self.row.device) // (inner // columns)
        mean = self.row.mean(-1).reshape(-1)[matrix]
        share = torch.where(mean == 0, 0.0, self.row.view(-1)[first:last] / torch.where(mean == 0, 1.0, mean))
        offsets = torch.arange(start, stop, device=self.row.device)
        spread = share[offsets // columns - first]
        return spread * self.col.view(-1)[offsets // inner * columns + offsets % columns]

    def store(self, start: int, value: Tensor, root: Tensor, *, key: int | None) -> None:
        """Everything is stored already."""

    def finish(self) -> None:
        """Nothing is left to store."""


class _Grid:
    """One vector per axis: element i has the least of its entries."""

    def __init__(self, vectors: list[Tensor]) -> None:
        axes = len(vectors) - 1
        spread = [vector.view([-1 if k == axis else 1 for k in range(axes)]) for axis, vector in enumerate(vectors[1:])]
        self.outer, self.inner = vectors[0].clone(), functools.reduce(torch.minimum, spread).reshape(-1).clone()

    def of_range(self, start: int, stop: int) -> Tensor:
        """Return the entries of a range, fp32 1-D."""
        span = self.inner.numel()
        first = start // span
        grid = torch.minimum(self.outer[first : -(-stop // span), None], self.inner)
        return grid.reshape(-1)[start - first * span : stop - first * span]


class Maxima:
    """Gathers the largest value per axis of a non-negative flat tensor that comes in ranges."""

    def __init__(self, moment: Moment, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.outer = torch.zeros(shape[0], dtype=torch.float32, device=moment.device)
        self.inner = torch.zeros(math.prod(shape[1:]), dtype=torch.float32, device=moment.device)

    def add(self, values: Tensor, start: int) -> None:
        """Pad a range with zeros to whole rows, and take them in."""
        span = self.inner.numel()
        before, after = start % span, -(start + values.numel()) % span
        rows = (pad(values, (before, after)) if before or after else values).view(-1, span)
        outer = self.outer[start // span :][: rows.shape[0]]
        torch.maximum(outer, rows.amax(1), out=outer)
        torch.maximum(self.inner, rows.amax(0), out=self.inner)

    def of_axes(self) -> tuple[Tensor, ...]:
        """Return one vector per axis."""
        inner = self.inner.view(self.shape[1:])
        axes = range(inner.dim())
        return (
            self.outer,
            *(inner.amax([k for k in axes if k != axis]) if len(axes) > 1 else inner for axis in axes),
        )
