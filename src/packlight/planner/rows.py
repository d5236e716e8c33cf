"""The constraints of an integer program: one by one while they are written, then as a sparse matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """What lives at one event: a constant, and a coefficient by variable (bytes)."""

    constant: int = 0
    coefficients: dict[int, float] = field(default_factory=dict)

    def add(self, variable: int, num_bytes: float) -> None:
        """Add bytes that are there where a variable is 1."""
        self.coefficients[variable] = self.coefficients.get(variable, 0.0) + num_bytes


class Rows:
    """The constraints, as the sparse matrix that HiGHS takes."""

    def __init__(self) -> None:
        self.bounds: list[float] = []
        self._entries: tuple[list[float], list[int], list[int]] = ([], [], [])

    def add(self, coefficients: Mapping[int, float], bound: float) -> None:
        """Add `sum of coefficient * variable <= bound`, scaled so that bytes do not drown the rest."""
        scale = max((abs(value) for value in coefficients.values()), default=1.0) or 1.0
        values, rows, columns = self._entries
        for column, value in coefficients.items():
            values.append(value / scale)
            rows.append(len(self.bounds))
            columns.append(column)
        self.bounds.append(bound / scale)

    def matrix(self, num_columns: int, sparse: Any) -> Any:
        """Return the matrix, of shape (rows, columns)."""
        values, rows, columns = self._entries
        return sparse.csr_array((values, (rows, columns)), shape=(len(self.bounds), num_columns))
