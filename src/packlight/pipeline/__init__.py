"""Pipeline schedules with offload: which actions, when, with how many bytes, and which to choose; and stages that run.

A schedule is a list of actions for each rank. `one_f_one_b`, `interleaved`, `grouped` and `uniform` make one by a rule;
`packlight.planner.staged.plan_stages` chooses one for stages that are there; `Runtime` carries it out.

Names are loaded when they are first used: choosing a schedule needs nothing of torch.distributed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packlight.pipeline.runtime import Runtime
    from packlight.pipeline.schedule import Schedule, ScheduleError, grouped, interleaved, one_f_one_b, uniform
    from packlight.pipeline.stage import Stage
    from packlight.pipeline.whole import read

__all__ = ["Runtime", "Schedule", "ScheduleError", "Stage", "grouped", "interleaved", "one_f_one_b", "read", "uniform"]

_HOMES = {name: "schedule" for name in __all__} | {"Runtime": "runtime", "Stage": "stage", "read": "whole"}


def __getattr__(name: str) -> Any:
    """Load a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'packlight.pipeline' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"packlight.pipeline.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
