"""What a training step keeps for backward, and what can be done instead: recompute it, move it, encode it.

>>> import torch, packlight
>>> model = torch.nn.Sequential(*[torch.nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)])
>>> with packlight.recompute(model):
...     model(torch.randn(3, 2, 8)).sum().backward()
>>> with packlight.compress(model, codec="fp8", min_bytes=0):
...     model(torch.randn(3, 2, 8)).sum().backward()
"""

from packlight.activations.alone import compress, offload
from packlight.activations.blocks import Block, find_blocks
from packlight.activations.engine import Engine
from packlight.activations.offload import OffloadError, make_tier
from packlight.activations.recompute import Recomputation, recompute

__all__ = [
    "Block",
    "Engine",
    "OffloadError",
    "Recomputation",
    "compress",
    "find_blocks",
    "make_tier",
    "offload",
    "recompute",
]
