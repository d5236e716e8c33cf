"""Schedules for stages that are there; that these are measured, run and fit, tests/pipeline/test_runtime.py shows."""

import pytest

from packlight.pipeline import ScheduleError
from packlight.pipeline.choose import candidates
from packlight.pipeline.simulate import StageCost
from packlight.planner.staged import runnable

UNIT = StageCost(1.0, 1.0, 1.0, held_bytes=1, movable_bytes=1)


def test_compiled_stages_are_given_schedules_whose_backward_is_whole() -> None:
    found = list(candidates((4, 2, 8), [UNIT]))
    assert [each.name for each in runnable(found, reason="compiled")] == ["1F1B-I"]
    assert runnable(found, reason=None) == found
    with pytest.raises(ScheduleError, match=r"a stage is compiled: .* cannot run 5 microbatches; take 4 or a"):
        runnable(list(candidates((4, 3, 5), [UNIT])), reason="compiled")
