"""A callback for Lightning's Trainer, with which its training fits a byte budget.

Lightning's strategies say over how many devices a model goes, and nothing in it makes a model fit the devices that
there are. Here a session plans around Lightning's own loops, between `on_train_start`, when strategy and precision have
wrapped everything and checkpoints have been restored, and the end of training or an exception. What is planned for is
the module that `training_step` calls, or the strategy's wrapper around the whole.

Installed, packlight is an entry point of Lightning's, too: where the environment variable PACKLIGHT_BUDGET is set, and
only there, each Trainer gets the callback (PACKLIGHT_EXACT=1, PACKLIGHT_HOST_BUDGET, PACKLIGHT_DISK and
PACKLIGHT_RECORD are its options). Fabric has no loop to listen to; there `with Packlight("12GiB").during(optimizer):`
stands around the loop.
"""

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from packlight.planner.guest import Guest


class Packlight(Guest, Callback):  # type: ignore[misc]
    """Plans for the training that a Trainer runs: `Trainer(..., callbacks=[Packlight("12GiB")])`.

    `Guest` says what the options are. What stands against a plan comes out of `trainer.fit()`, as a BudgetError that
    names the smallest budget or as a ValueError.

    Attributes:
        plan: the plan in force, or the last one that was.
        measurement: what the last training took.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the session.

        Raises:
            ValueError: gradients may be released, and the trainer clips or accumulates them; or another session is in
                force.
        """
        clipped, added = trainer.gradient_clip_val, trainer.accumulate_grad_batches
        if clipped or added != 1:
            self.refuse_release("None and 1", gradient_clip_val=clipped, accumulate_grad_batches=added)
        self.begin(trainer.optimizers)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the session."""
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the session by an error."""
        self.fail(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the session, where Lightning's tuner has stopped training."""
        self.end()


def from_environment() -> list[Callback]:
    """Return the callback that the environment asks for; none where PACKLIGHT_BUDGET is not set.

    Returns:
        A list of one callback, or of none.

    Raises:
        ValueError: PACKLIGHT_EXACT is neither 0 nor 1, or an option is set without PACKLIGHT_BUDGET.
    """
    given: dict[str, Any] = {
        option: os.environ.get(f"PACKLIGHT_{option.upper()}") or None
        for option in ("budget", "host_budget", "disk", "record")
    }
    budget, exact = given.pop("budget"), os.environ.get("PACKLIGHT_EXACT") or "0"
    if exact not in ("0", "1"):
        raise ValueError(f"PACKLIGHT_EXACT is {exact!r}; wanted 0 or 1")
    if budget is None and (exact == "1" or any(given.values())):
        raise ValueError("options of packlight are set in the environment, and no PACKLIGHT_BUDGET; set it, too")
    return [] if budget is None else [Packlight(budget, exact=exact == "1", **given)]
