"""Several processes that train one model on different batches, each with a share of its states.

ZeRO (arXiv 1910.02054) names the states that need not be on every rank: the optimiser's (stage 1), gradients (2) and
parameters (3). DeepSpeed and torch's FSDP2 do it; here is what each of them holds on a rank and when, byte for byte,
and how it is told to do what a plan says.

    shards.py   what a rank holds of a model, whoever cuts it
    fsdp.py     torch's fully_shard: what it holds of a model at hand or to come, and how it is applied
    zero.py     DeepSpeed's stages 0 to 3, as the formulas of its code say; and its config

>>> import torch
>>> from packlight.sharding import weights_of
>>> [weight.shape for weight in weights_of(torch.nn.Linear(3, 2))]
[(2, 3), (2,)]
"""

from packlight.sharding.shards import Sharding, Share, Unit, Weight, weights_of

__all__ = ["Sharding", "Share", "Unit", "Weight", "weights_of"]
