"""ZeRO-R: what DeepSpeed's activation checkpointing keeps of the inputs of checkpointed blocks on a rank.

Ranks that compute one batch together (a model-parallel group) hold the same inputs. With `partition_activations` each
keeps a part and they gather the whole before a block runs again; with `cpu_checkpointing` the parts wait in host
memory; with `contiguous_memory_optimization` the parts of all blocks are allocated at the first block, so that what
lives long lies in one place. Data-parallel ranks have different inputs, and nothing of this helps them.

Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 6; deepspeed 0.19,
runtime/activation_checkpointing/checkpointing.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Checkpointing:
    """DeepSpeed's `activation_checkpointing` config.

    Attributes:
        num_parallel: ranks that compute a batch together.
        partitions: `partition_activations`.
        on_host: `cpu_checkpointing`.
        is_contiguous: `contiguous_memory_optimization`.
        num_checkpoints: `number_checkpoints`: blocks that buffers are made for.
    """

    num_parallel: int = 1
    partitions: bool = False
    on_host: bool = False
    is_contiguous: bool = False
    num_checkpoints: int | None = None

    def __post_init__(self) -> None:
        """Refuse what DeepSpeed refuses."""
        if self.num_parallel < 1:
            raise ValueError(f"{self.num_parallel} ranks came that compute a batch together; wanted 1 or more")
        if self.is_contiguous and not self.partitions:
            raise ValueError("contiguous buffers are of partitioned activations only; set partitions, too")
        if self.is_contiguous and self.num_checkpoints is None:
            raise ValueError("contiguous buffers are made for a number of blocks; say it in num_checkpoints")

    def config(self) -> dict[str, bool | int]:
        """Return what stands in DeepSpeed's config."""
        made: dict[str, bool | int] = {
            "partition_activations": self.partitions,
            "cpu_checkpointing": self.on_host,
            "contiguous_memory_optimization": self.is_contiguous,
        }
        return made if self.num_checkpoints is None else {**made, "number_checkpoints": self.num_checkpoints}


@dataclass(frozen=True)
class CheckpointBytes:
    """What a rank holds of the inputs of blocks; bytes.

    Attributes:
        device_bytes, host_bytes: from forward until each block's backward.
        gathered_bytes: of the whole inputs of one block, while it runs again.
        sent_bytes: what a rank sends in a step to gather them.
    """

    device_bytes: int
    host_bytes: int
    gathered_bytes: int
    sent_bytes: int


def checkpoint_bytes(
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]], num_blocks: int, how: Checkpointing
) -> CheckpointBytes:
    """Return what the inputs of checkpointed blocks take on a rank.

    Args:
        inputs: shape and dtype of each floating-point tensor that a block is called with.
        num_blocks: blocks with such inputs.
        how: what DeepSpeed does with them.

    Returns:
        The bytes, without the states of random generators that DeepSpeed keeps for each block.

    Raises:
        ValueError: a tensor cannot be divided among the ranks, or there are more blocks than buffers.

    >>> checkpoint_bytes([((8, 1024, 4096), torch.bfloat16)], 24, Checkpointing(4, partitions=True)).device_bytes
    402653184
    """
    divisor = how.num_parallel if how.partitions else 1
    for shape, _ in inputs:
        if math.prod(shape) % divisor:
            raise ValueError(f"an input of shape {shape} cannot be divided among {divisor} ranks; pad it")
    if how.is_contiguous and num_blocks > (how.num_checkpoints or 0):
        raise ValueError(f"{num_blocks} blocks came for buffers of {how.num_checkpoints}; raise num_checkpoints")
    whole = sum(math.prod(shape) * dtype.itemsize for shape, dtype in inputs)
    held = whole // divisor * ((how.num_checkpoints or num_blocks) if how.is_contiguous else num_blocks)
    gathered = whole if divisor > 1 or how.on_host else 0
    return CheckpointBytes(
        device_bytes=0 if how.on_host else held,
        host_bytes=held if how.on_host else 0,
        gathered_bytes=gathered,
        sent_bytes=num_blocks * (whole - whole // divisor),
    )
