"""Budgets: how many bytes are allowed on each tier, as a person writes them.

PyTorch takes a share of a device (`set_per_process_memory_fraction`) and no number of bytes that would mean the same on
every machine; here a budget is an exact integer of bytes, read from what people write ("16GiB", "800MB", "80%").
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MOST_BYTES = 2**63  # what 64-bit sizes cannot count


class BudgetError(ValueError):
    """No plan fits the budget; `smallest_bytes` is the least budget that would, None where it is not known."""

    def __init__(self, message: str, *, smallest_bytes: int | None = None) -> None:
        """Keep the smallest budget that fits (bytes) beside the message."""
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


def least_of(errors: Iterable[BudgetError]) -> BudgetError:
    """Return the error that names the smallest budget."""
    return min(errors, key=lambda error: error.smallest_bytes or math.inf)


def format_bytes(num_bytes: float, *, rounds_up: bool = False) -> str:
    """Write a number of bytes for a person.

    Args:
        num_bytes: the number.
        rounds_up: whether what is written is at least as much, as a budget has to be.

    Returns:
        The number with two digits after the point and the largest binary unit up to GiB that it reaches.

    >>> format_bytes(3 * 2**30 // 2)
    '1.50 GiB'
    >>> format_bytes(2**20 + 1), format_bytes(2**20 + 1, rounds_up=True)
    ('1.00 MiB', '1.01 MiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(num_bytes) >= size:
            hundredths = math.ceil(num_bytes * 100 / size) if rounds_up else num_bytes * 100 / size
            return f"{hundredths / 100:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """Write a time for a person, "-" where it is not known.

    Returns:
        The seconds with three significant digits.

    >>> format_seconds(0.12345)
    '0.123 s'
    """
    return "-" if seconds is None else f"{seconds:.3g} s"


def parse_bytes(text: object, *, total_bytes: int | None = None) -> int:
    """Read a number of bytes: an int, "12GiB", "800MB", or "80%" of `total_bytes`.

    Returns:
        The number of bytes, at least 1.

    Raises:
        ValueError: it cannot be read, or is not positive.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    wanted = 'wanted bytes as an int or a string such as "16GiB", "800MB" or "80%"'
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ValueError(f"budget {text!r} is a {type(text).__name__}; {wanted}")
    match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*([a-zA-Z%]*)\s*", str(text))
    unit = match.group(2).upper() or "B" if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise ValueError(f"budget {text!r} cannot be read; {wanted}")
    if unit == "%" and total_bytes is None:
        raise ValueError(f"budget {text!r} is a share of a device, and none is known here; {wanted}")
    size = Fraction(total_bytes or 0, 100) if unit == "%" else _UNITS[unit]
    num_bytes = int(Fraction(match.group(1)) * size)  # a float would lose bytes above 2**53
    if num_bytes <= 0:
        raise ValueError(f"budget {text!r} is {num_bytes} bytes; wanted more than 0")
    if num_bytes >= _MOST_BYTES:
        raise ValueError(f"budget {text!r} is more than any device has; {wanted}")
    return num_bytes


@dataclass(frozen=True)
class Budget:
    """Bytes allowed on the training device, in host memory (None: not to be used), and the disk tier's folder.

    >>> Budget.of("2MiB").device_bytes
    2097152
    """

    device_bytes: int
    host_bytes: int | None = None
    disk: str | None = None

    def __post_init__(self) -> None:
        """Refuse a size that only `Budget.of` reads, or that allows nothing."""
        sizes: list[object] = [self.device_bytes, *([] if self.host_bytes is None else [self.host_bytes])]
        for size in sizes:
            if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
                raise ValueError(f"Budget takes bytes as an int above 0 and got {size!r}; Budget.of reads strings")

    @classmethod
    def of(cls, budget: "int | str | Budget", *, total_bytes: int | None = None) -> "Budget":
        """Read a budget of device bytes, and hold it against the device's size `total_bytes` where that is known.

        Returns:
            The budget.

        Raises:
            ValueError: it cannot be read, is not positive, or is larger than the device.
        """
        if isinstance(budget, Budget):
            read = budget
        else:
            read = cls(parse_bytes(budget, total_bytes=total_bytes))
        if total_bytes is not None and read.device_bytes > total_bytes:
            raise ValueError(
                f"budget {budget!r} is {format_bytes(read.device_bytes)} and the device has "
                f'{format_bytes(total_bytes)}; try a smaller one, or "100%"'
            )
        return read
