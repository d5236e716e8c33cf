"""packlight makes a PyTorch training job fit a byte budget with the least slowdown, and says before what to expect.

>>> import torch, packlight
>>> model = torch.nn.Sequential(*[torch.nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)])
>>> optimizer = torch.optim.AdamW(model.parameters())
>>> batch = torch.randn(64, 4, 8)
>>> handle = packlight.fit(model, optimizer, batch, budget="1MiB", loss=lambda out, _: out.square().mean())
>>> model(batch).square().mean().backward(); optimizer.step()
>>> handle.measurement.device_peak_bytes <= 2**20
True
>>> handle.remove()

Names are loaded when they are first used, so that `packlight explain` reads a record on a machine without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packlight.activations.alone import compress, offload
    from packlight.activations.recompute import recompute
    from packlight.budget import Budget, BudgetError
    from packlight.optim.adamw import Adam, AdamW
    from packlight.optim.sgd import SGD
    from packlight.planner.apply import apply, fit
    from packlight.planner.plan import plan
    from packlight.planner.profile import ProfileError, profile
    from packlight.records import Plan

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Budget",
    "BudgetError",
    "Plan",
    "ProfileError",
    "apply",
    "compress",
    "fit",
    "offload",
    "plan",
    "profile",
    "recompute",
]

_HOMES = {
    "SGD": "optim.sgd",
    "Adam": "optim.adamw",
    "AdamW": "optim.adamw",
    "Budget": "budget",
    "BudgetError": "budget",
    "Plan": "records",
    "ProfileError": "planner.profile",
    "apply": "planner.apply",
    "compress": "activations.alone",
    "fit": "planner.apply",
    "offload": "activations.alone",
    "plan": "planner.plan",
    "profile": "planner.profile",
    "recompute": "activations.recompute",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'packlight' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"packlight.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
