"""A loop around DeepSpeed's engine with a byte budget for each rank, and DeepSpeed's config from a plan.

DeepSpeed shares states over ranks, in stages and by buckets that its config names, and leaves it to the user to find
those with which a step fits. `config` writes down what a plan for several ranks has chosen (`packlight.plan` with
`world`, or `packlight plan --world --save`). What layers save, and the states' formats, are planned for when the engine
is there: a context stands around the loop, whose lines stay as they are:

>>> made = config(plan, "ds.json")  # doctest: +SKIP
>>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=made)  # doctest: +SKIP
>>> with packlight_budget(engine, "12GiB"):  # doctest: +SKIP
...     for batch in loader:
...         engine.backward(engine(**batch).loss)
...         engine.step()
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from packlight.planner.guest import Guest
from packlight.records import Plan
from packlight.sharding import zero


@contextmanager
def packlight_budget(engine: DeepSpeedEngine, budget: int | str | None, **options: Any) -> Iterator[Guest]:
    """Plan for the loop inside the context; what stands against a plan is a BudgetError or a ValueError there.

    Args:
        engine: what `deepspeed.initialize` has returned.
        budget: bytes allowed on each rank's device, as for `packlight.plan`; None: measure, and change nothing.
        **options: `exact`, `host_budget`, `disk`, `record`, as `Guest` says.

    Yields:
        The session's `plan`, and at the end its `measurement`.

    Raises:
        ValueError: gradients may be released, which ZeRO does not know; or another session is in force.
    """
    if options.get("release_gradients"):
        raise ValueError("release_gradients came; wanted it left out: under DeepSpeed parameters are stepped by step()")
    optimizer = zero.Engine(engine).optimizer
    with Guest(budget, **options).during(*[] if optimizer is None else [optimizer]) as guest:
        yield guest


def config(
    plan: Plan, base: Mapping[str, Any] | str | os.PathLike[str] | None = None, *, microbatch_size: int | None = None
) -> dict[str, Any]:
    """Return a config for `deepspeed.initialize` that does what a plan says of sharding.

    Args:
        plan: made with `world`, with ZeRO chosen.
        base: a config whose other entries are kept, or the name of its JSON file.
        microbatch_size: rows of a microbatch on a rank; None where the base says it.

    Returns:
        A dict that JSON can hold, with the flags that let packlight's optimisers stay.

    Raises:
        ValueError: the plan shares no states by ZeRO, or nobody says the microbatch's size.
    """
    if isinstance(base, Mapping) or base is None:
        return zero.config(plan, microbatch_size=microbatch_size, base=base)
    read = json.loads(Path(base).read_text(encoding="utf-8"))
    return zero.config(plan, microbatch_size=microbatch_size, base=read)
