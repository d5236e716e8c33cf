"""A callback for transformers' Trainer, with which its training fits a byte budget.

`Trainer` has switches for checkpointing and for some optimisers, and nothing that says which of them a device of 12 GiB
needs. Here a session plans around the trainer's own loop. All else (evaluation, clipping, checkpoints) stays its own.

A trainer tells its callbacks when training begins and ends, and not when it fails. So while it trains, the methods of
its loop are wrapped on that trainer, such that an error ends the session; afterwards they are its class's again. What
inherits the loop is covered (TRL's SFTTrainer); a trainer with a loop of its own runs under `packlight run`.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from packlight.optim.adamw import AdamW
from packlight.planner.guest import Guest

_EPOCH, _END = "_run_epoch", "_finalize_training"
"""The methods of which a trainer's loop consists (transformers 5.23), beside the callbacks that it calls."""


class PacklightCallback(Guest, TrainerCallback):  # type: ignore[misc]
    """Plans for the training that a Trainer runs: `Trainer(..., callbacks=[PacklightCallback("12GiB")])`.

    `Guest` says what the options are. What stands against a plan comes out of `trainer.train()` as an error.
    """

    _wrapped: tuple[tuple[Any, str], ...] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the session begin with the first epoch, when other callbacks have begun, and end with any error.

        Raises:
            ValueError: gradients may be released, and the trainer clips or accumulates them; or it has another such
                callback.
        """
        clipped, added = args.max_grad_norm, args.gradient_accumulation_steps
        if clipped > 0 or added > 1:
            self.refuse_release("0 and 1", max_grad_norm=clipped, gradient_accumulation_steps=added)
        self._unwrap()
        trainer, optimizer = _running_trainer(), kwargs["optimizer"]
        if _EPOCH in vars(trainer):
            raise ValueError("the trainer has two PacklightCallbacks; wanted one at a time")
        self._wrapped = ((trainer, _EPOCH), (trainer.callback_handler, "on_epoch_begin"), (trainer, _END))
        for owner, name in self._wrapped:
            begins = [optimizer] if name == _EPOCH else None
            setattr(owner, name, self._guarded(getattr(owner, name), trainer, begins=begins))

    def _guarded(self, method: Callable[..., Any], trainer: Any, *, begins: list[Any] | None) -> Callable[..., Any]:
        """Return a method that ends the session where it fails, and begins it where it is given optimisers."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self.until_error():
                if begins is not None and self in trainer.callback_handler.callbacks:  # else an earlier training failed
                    self.begin(begins)
                return method(*args, **kwargs)

        return guarded

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the session."""
        self.end()
        if self.measurement is None and state.global_step:
            warnings.warn(
                "packlight: the trainer took no step that could be seen, so nothing was planned; a trainer with a loop "
                "of its own runs under packlight run",
                stacklevel=2,
            )

    def end(self) -> None:
        """End the session, and give the trainer its methods back; again it does nothing."""
        self._unwrap()
        super().end()

    def _unwrap(self) -> None:
        wrapped, self._wrapped = self._wrapped, ()
        for owner, name in wrapped:
            delattr(owner, name)


def _running_trainer() -> Any:
    """Return the trainer that calls its callbacks now, which it does not hand to them."""
    frame = sys._getframe(1)
    while not isinstance(frame.f_locals.get("self"), Trainer):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals["self"]


def trainer_kwargs(
    args: TrainingArguments, budget: int | str | None, *, state_format: str = "8bit", **options: Any
) -> dict[str, Any]:
    """Return a Trainer's arguments for packlight's AdamW from the start, and the callback: `Trainer(..., **these)`.

    Args:
        args: the training arguments, whose learning rate, betas and epsilon the optimiser takes.
        budget: of `PacklightCallback`.
        state_format: for all parameters; a Trainer gives its optimiser no names, so embeddings are not told apart.
        **options: further ones of `PacklightCallback`.

    Returns:
        `callbacks` and `optimizer_cls_and_kwargs`.
    """
    betas = args.adam_beta1, args.adam_beta2
    settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "state_format": state_format}
    return {"callbacks": [PacklightCallback(budget, **options)], "optimizer_cls_and_kwargs": (AdamW, settings)}
