"""A training loop around Accelerate's objects that fits a byte budget.

Accelerate prepares what a user's own loop is made of, and has no loop itself, so nothing tells when training begins.
What its users write is `accelerator.prepare` and a loop; here a context stands around the loop, and begins a session
with the optimisers that have been prepared:

>>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # doctest: +SKIP
>>> with packlight_budget(accelerator, "12GiB"):  # doctest: +SKIP
...     for batch in loader:
...         with accelerator.accumulate(model):
...             ...

`accumulate`, `backward`, `clip_grad_norm_`, `save_state` and `load_state` stay as they are: parameters, gradients and
states are the accelerator's own, and states in few bits are saved as fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from packlight.planner.guest import Guest


@contextmanager
def packlight_budget(accelerator: Accelerator, budget: int | str | None, **options: Any) -> Iterator[Guest]:
    """Plan for the loop inside the context; what stands against a plan is a BudgetError or a ValueError there.

    Args:
        accelerator: by which models and optimisers have been prepared; later ones are heard of.
        budget: bytes allowed on each process's device, as for `packlight.plan`; None: measure, and change nothing.
        **options: `exact`, `host_budget`, `disk`, `record`, `release_gradients`, as `Guest` says.

    Yields:
        The session's `plan`, and at the end its `measurement`.

    Raises:
        ValueError: gradients may be released, and the accelerator accumulates them; or another session is in force.
    """
    guest, added = Guest(budget, **options), accelerator.gradient_accumulation_steps
    if added != 1:
        guest.refuse_release("1", gradient_accumulation_steps=added)
    with guest.during(*accelerator._optimizers):
        yield guest
