"""Decides what to do with every byte of a training step, and does it.

>>> import torch, packlight
>>> model = torch.nn.Sequential(*[torch.nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)])
>>> optimizer = torch.optim.AdamW(model.parameters())
>>> plan = packlight.plan(model, torch.randn(64, 4, 8), optimizer, budget="2MiB", loss=lambda out, _: out.sum())
>>> plan.estimate.device_peak_bytes <= plan.budget_bytes
True
"""

from packlight.planner.apply import Applied, apply, fit
from packlight.planner.loop import Call, Seen
from packlight.planner.plan import plan
from packlight.planner.profile import ProfileError, profile
from packlight.planner.request import World
from packlight.planner.solve import solve

__all__ = ["Applied", "Call", "ProfileError", "Seen", "World", "apply", "fit", "plan", "profile", "solve"]
