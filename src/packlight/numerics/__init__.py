"""Low-bit numbers, shared by optimiser states and activations.

`formats` holds the formats as data (code values, block size, scale rule, bytes), `reference` is their
definition in plain PyTorch. A compiled or Triton version of an operation bears the same name and is compared
with `reference` by value.

Example:
    >>> import torch
    >>> from packlight.numerics import encode, decode, moment_formats
    >>> exp_avg, _ = moment_formats("paper4bit", (64, 128))
    >>> moment = encode(torch.linspace(-1, 1, 64 * 128).view(64, 128), exp_avg)
    >>> moment.tensors["codes"].numel(), decode(moment).shape
    (4096, torch.Size([64, 128]))
"""

from packlight.numerics.formats import FORMATS, MomentFormat, moment_formats, state_format
from packlight.numerics.moments import Moment, zero_moment
from packlight.numerics.reference import adamw_step, decode, encode, sgd_step
from packlight.numerics.settings import AdamWSettings, SGDSettings

__all__ = [
    "FORMATS",
    "AdamWSettings",
    "Moment",
    "MomentFormat",
    "SGDSettings",
    "adamw_step",
    "decode",
    "encode",
    "moment_formats",
    "sgd_step",
    "state_format",
    "zero_moment",
]
