"""ZeRO's stages as DeepSpeed carries them out: what a rank holds, to the byte, from shapes alone.

DeepSpeed's own estimators know fp32 Adam only, leave buffers and activations out, and take all parameters of a model on
the meta device for one. The paper's formulas (arXiv 1910.02054, section 3) are of the states alone. Here both are
counted as the code allocates (deepspeed 0.19, runtime/zero/stage_1_and_2.py and stage3.py):

    stage 1, 2   a flat buffer of the parameters of each param group, padded to 2 * ranks elements; an fp32 copy of this
                 rank's part of it, which is stepped. Backward: a bucket, and a buffer of all parameters that this part
                 touches. Step: that buffer flattened, and in fp32.
    stage 3      of each parameter ceil(numel / ranks) elements, an fp32 copy of these, a buffer of as many gradients,
                 and a bucket, always. Small parameters are gathered always, the others as they are used, from a copy of
                 this rank's elements of them.
    stage 0      everything, and in bf16 and fp16 fp32 copies of all parameters; gradients are reduced in buckets.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from packlight.sharding.shards import Sharding, Share, Unit, Weight

ALIGNMENT = 2
"""Elements for each rank that a flat buffer's size is a multiple of. Source: `nccl_start_alignment_factor`."""


@dataclass(frozen=True)
class ZeroOptions:
    """What of DeepSpeed's config decides over bytes; the values are DeepSpeed's own where nothing is given.

    Attributes:
        stage: 0 to 3.
        num_ranks: data-parallel processes.
        reduce_bucket_elements: `reduce_bucket_size`.
        overlaps: `overlap_comm`; stages 1 and 2 have two buckets then.
        contiguous_gradients: whether gradients are copied into the bucket.
        prefetch_elements: `stage3_prefetch_bucket_size`.
        persistent_elements: `stage3_param_persistence_threshold`: smaller parameters stay gathered.
        live_elements: `stage3_max_live_parameters`; and as many are kept for being used again.
        sub_group_elements: `sub_group_size`, which stage 3 steps at once.
        accumulates: whether a step has several microbatches.
    """

    stage: int
    num_ranks: int
    reduce_bucket_elements: int = 500_000_000
    overlaps: bool = False
    contiguous_gradients: bool = True
    prefetch_elements: int = 50_000_000
    persistent_elements: int = 100_000
    live_elements: int = 1_000_000_000
    sub_group_elements: int = 1_000_000_000
    accumulates: bool = False

    def __post_init__(self) -> None:
        """Refuse what there is not."""
        if self.stage not in range(4) or self.num_ranks < 1:
            raise ValueError(
                f"ZeRO stage {self.stage} on {self.num_ranks} ranks; wanted a stage from 0 to 3 and 1 rank or more"
            )


def zero_sharding(weights: Sequence[Weight], options: ZeroOptions) -> Sharding:
    """Return what a rank holds under DeepSpeed.

    Args:
        weights: of the model; those that are not trained stay whole on each rank in stages 0 to 2.
        options: of the config.

    Raises:
        ValueError: the parameters are of several dtypes, which DeepSpeed refuses.
    """
    dtypes = {weight.dtype for weight in weights if weight.is_trained}
    if len(dtypes) > 1:
        raise ValueError(f"parameters are of {sorted(map(str, dtypes))}; ZeRO wants one dtype for all")
    if options.stage == 0:
        return _whole(weights, options)
    return _in_partitions(weights, options) if options.stage < 3 else _in_shares(weights, options)


def _whole(weights: Sequence[Weight], options: ZeroOptions) -> Sharding:
    trained = [weight for weight in weights if weight.is_trained]
    gradients = sum(weight.nbytes for weight in trained)
    numel, largest = _elements(trained), max((weight.numel for weight in trained), default=0)
    itemsize = _itemsize(trained)
    in_half = itemsize < 4
    bucket = min(numel, max(options.reduce_bucket_elements, largest)) * itemsize * (options.num_ranks > 1)
    return Sharding(
        engine="zero",
        stage=0,
        num_ranks=options.num_ranks,
        parameter_bytes=sum(weight.nbytes for weight in weights),
        master_bytes=4 * numel * in_half,
        shares=(tuple(_share(weight, weight.numel) for weight in trained),),
        step_bytes=max(bucket, 4 * numel * in_half),
        num_flats=len(trained),
        sent_bytes=2 * gradients * (options.num_ranks - 1) // options.num_ranks,
        num_messages=2 * -(-numel // max(1, options.reduce_bucket_elements)),
    )


def _in_partitions(weights: Sequence[Weight], options: ZeroOptions) -> Sharding:
    """Stages 1 and 2: an equal part of each param group's flat buffer."""
    groups = _groups(weights)
    ranks, itemsize = options.num_ranks, _itemsize([weight for group in groups for weight in group])
    sizes = [-(-_elements(group) // (ALIGNMENT * ranks)) * ALIGNMENT for group in groups]
    shares = tuple(_shares_of_rank(groups, sizes, rank) for rank in range(ranks))
    numel, touched = sum(sizes), max(_touched(groups, sizes, rank) for rank in range(ranks))
    whole = numel * ranks * itemsize
    keeps_whole = options.stage == 1 and options.accumulates
    buckets = options.reduce_bucket_elements * itemsize * (2 if options.overlaps else 1)
    return Sharding(
        engine="zero",
        stage=options.stage,
        num_ranks=ranks,
        parameter_bytes=whole + sum(weight.nbytes for weight in weights if not weight.is_trained),
        master_bytes=4 * numel,
        shares=shares,
        state_share=numel / max(1, sum(map(_elements, groups))),
        gradient_share=1.0 if keeps_whole else 0.0,
        bucket_bytes=options.reduce_bucket_elements * itemsize,
        partition_bytes=touched * itemsize,
        kept_gradient_bytes=touched * itemsize * (options.stage == 2 and options.accumulates),
        backward_bytes=buckets if options.contiguous_gradients else 0,
        step_bytes=numel * itemsize + (4 * numel if itemsize < 4 else 0),
        num_flats=len(groups),
        sent_bytes=whole * (ranks - 1) // ranks,
        after_bytes=whole * (ranks - 1) // ranks,
        num_messages=2 * len(groups) * max(1, -(-numel * ranks // options.reduce_bucket_elements)),
    )


def _in_shares(weights: Sequence[Weight], options: ZeroOptions) -> Sharding:
    """Stage 3: a part of each parameter."""
    trained = [weight for weight in weights if weight.is_trained]
    ranks, itemsize = options.num_ranks, _itemsize(weights)
    parts = [(weight, -(-weight.numel // ranks)) for weight in weights]
    numel = sum(part for weight, part in parts if weight.is_trained)
    persistent = [weight for weight in weights if weight.numel <= options.persistent_elements]
    others = [weight for weight in weights if weight.numel > options.persistent_elements]
    largest = max((weight.numel for weight in others), default=0)
    live = min(_elements(others), max(options.live_elements, largest) + options.prefetch_elements)
    step = min(numel, max(options.sub_group_elements, -(-largest // ranks)))
    gathered = _elements(others) * itemsize * (ranks - 1) // ranks
    return Sharding(
        engine="zero",
        stage=3,
        num_ranks=ranks,
        parameter_bytes=sum(part * weight.dtype.itemsize for weight, part in parts),
        master_bytes=4 * numel,
        buffer_bytes=options.reduce_bucket_elements * itemsize,
        persistent_bytes=sum(weight.nbytes for weight in persistent),
        shares=(tuple(_share(weight, part) for weight, part in parts if weight.is_trained),),
        state_share=numel / max(1, _elements(trained)),
        gradient_share=0.0,
        kept_gradient_bytes=numel * itemsize,
        step_bytes=4 * step + (itemsize * step if itemsize < 4 else 0),
        units=(Unit("", live * itemsize, extra_bytes=-(-live // ranks) * itemsize, is_kept=True),) if live else (),
        num_flats=max(1, -(-numel // options.sub_group_elements)),
        sent_bytes=_elements(trained) * itemsize * (ranks - 1) // ranks,
        gathered_bytes=2 * gathered,
        num_messages=3 * len(others),
    )


def _groups(weights: Sequence[Weight]) -> list[list[Weight]]:
    """Return the trained parameters of each param group, in order."""
    trained = sorted((weight for weight in weights if weight.is_trained), key=lambda weight: weight.group)
    return [list(group) for _, group in itertools.groupby(trained, key=lambda weight: weight.group)]


def _spans(group: Sequence[Weight], size: int, rank: int) -> Iterator[tuple[Weight, int]]:
    """Yield the parameters that a rank's part of a flat buffer touches, and how many elements it has of each."""
    start = 0
    for weight in group:
        end = start + weight.numel
        here = min(end, (rank + 1) * size) - max(start, rank * size)
        if here > 0:
            yield weight, here
        start = end


def _shares_of_rank(groups: Sequence[Sequence[Weight]], sizes: Sequence[int], rank: int) -> tuple[Share, ...]:
    shares = []
    for group, size in zip(groups, sizes, strict=True):
        own = [_share(weight, here) for weight, here in _spans(group, size, rank)]
        missing = size - sum(share.numel for share in own)
        shares += own
        shares += [Share("", (missing,), (missing,), torch.float32, is_fragment=True)] if missing else []
    return tuple(shares)


def _touched(groups: Sequence[Sequence[Weight]], sizes: Sequence[int], rank: int) -> int:
    """Return the elements of all parameters that a rank's parts touch, each whole."""
    pairs = zip(groups, sizes, strict=True)
    return sum(weight.numel for group, size in pairs for weight, _ in _spans(group, size, rank))


def _share(weight: Weight, numel: int) -> Share:
    return Share(weight.name, weight.shape, (numel,), torch.float32, is_fragment=True)


def _elements(weights: Sequence[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def _itemsize(weights: Sequence[Weight]) -> int:
    return next((weight.dtype.itemsize for weight in weights), 4)


def paper_bytes(numel: int, *, stage: int, num_ranks: int, state_bytes: float = 12.0) -> float:
    """Return what the paper counts: states of mixed-precision training, with parameters and gradients in 16 bits.

    Args:
        numel: of the model.
        stage: 0 (data parallel) to 3.
        num_ranks: data-parallel processes.
        state_bytes: of a parameter: an fp32 copy and the optimiser's states (12 for Adam's in fp32).

    Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 3 and figure 1.

    >>> [round(paper_bytes(7_500_000_000, stage=stage, num_ranks=64) / 1e9, 2) for stage in range(4)]
    [120.0, 31.41, 16.64, 1.88]
    """
    sizes = ((2.0, 3), (2.0, 2), (state_bytes, 1))  # each with the first stage that cuts it
    return numel * sum(size / num_ranks if stage >= first else size for size, first in sizes)
