"""The bytes of a rank's share of a state, from shapes alone: what a plan reckons with before any process is started."""

import torch

from packlight.optim.flat import fragment_format
from packlight.optim.layout import gathered_layout
from packlight.optim.state import MOMENTS, state_bytes


def rows_bytes(shape: tuple[int, ...], local_shape: tuple[int, ...], dtype: torch.dtype, state_format: str) -> int:
    """Return the bytes of the state of some rows of a parameter, as FSDP2 cuts them.

    Args:
        shape: of the whole parameter.
        local_shape: of the rows; its first number may be 0.
        dtype: of the parameter.
        state_format: "4bit", "8bit", "fp8" or "fp32".

    Raises:
        ValueError: the format is of whole tensors.

    >>> rows_bytes((512, 256), (256, 256), torch.float32, "fp32")
    524292
    """
    return gathered_layout(shape, state_format, local_shape).state_bytes(dtype)


def fragment_bytes(shape: tuple[int, ...], numel: int, state_format: str) -> int:
    """Return the bytes of the state of a fragment of a flat fp32 partition, as ZeRO cuts it.

    Args:
        shape: of the whole parameter.
        numel: of the fragment.
        state_format: as for `rows_bytes`.

    Raises:
        ValueError: the format is of whole tensors.
    """
    return state_bytes((numel,), torch.float32, fragment_format(state_format, shape), moments=MOMENTS)
