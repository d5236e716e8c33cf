"""Several processes that train one model on different batches, each with a share of its states.

ZeRO (arXiv 1910.02054) names the states that need not be on every rank: the optimiser's (stage 1), gradients (2) and
parameters (3). DeepSpeed and torch's FSDP2 do it; here is what each of them holds on a rank and when, byte for byte,
and how it is told to do what a plan says.

    shards.py    what a rank holds of a model, whoever cuts it: the record that the others make
    ddp.py       replicas
    fsdp.py      torch's fully_shard: of a model at hand or to come; and how it is applied
    stages.py    DeepSpeed's ZeRO, stages 0 to 3, from shapes alone
    residual.py  its ZeRO-R: inputs of checkpointed blocks
    zero.py      its engine at hand, and its config from a plan; imports deepspeed
    bare.py      modules without an engine's hooks, to be copied

>>> import torch
>>> from packlight.sharding import weights_of
>>> [weight.shape for weight in weights_of(torch.nn.Linear(3, 2))]
[(2, 3), (2,)]
"""

from packlight.sharding.shards import Sharding, Share, Unit, Weight, weights_of

__all__ = ["Sharding", "Share", "Unit", "Weight", "weights_of"]
