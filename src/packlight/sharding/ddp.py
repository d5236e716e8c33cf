"""torch's DistributedDataParallel: every rank holds everything, and gradients are averaged in buckets during backward.

With `gradient_as_bucket_view=True`, which plans take for given, gradients lie in the buckets; else they are held twice.
"""

from collections.abc import Sequence

from packlight.sharding.shards import Sharding, Share, Weight

BUCKET_BYTES = 25 * 2**20
"""`bucket_cap_mb` of DistributedDataParallel."""


def ddp_sharding(weights: Sequence[Weight], *, num_ranks: int) -> Sharding:
    """Return what a rank holds: all of it.

    Args:
        weights: of the model.
        num_ranks: data-parallel processes.
    """
    trained = [weight for weight in weights if weight.is_trained]
    gradients = sum(weight.nbytes for weight in trained)
    return Sharding(
        engine="ddp",
        stage=0,
        num_ranks=num_ranks,
        parameter_bytes=sum(weight.nbytes for weight in weights),
        shares=(tuple(Share(each.name, each.shape, each.shape, each.dtype) for each in trained),),
        sent_bytes=2 * gradients * (num_ranks - 1) // num_ranks,
        num_messages=-(-gradients // BUCKET_BYTES),
    )
