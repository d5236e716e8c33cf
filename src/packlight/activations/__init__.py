"""What a training step keeps for backward, and what can be done instead.

>>> import torch, packlight
>>> model = torch.nn.Sequential(*[torch.nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)])
>>> with packlight.recompute(model):
...     model(torch.randn(3, 2, 8)).sum().backward()
"""

from packlight.activations.blocks import Block, find_blocks
from packlight.activations.recompute import Recomputation, recompute

__all__ = ["Block", "Recomputation", "find_blocks", "recompute"]
