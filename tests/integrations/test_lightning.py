"""Lightning's Trainer with the callback, as users write it: budget, bits, checkpoints, and what is left behind."""

import gc
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from packlight import BudgetError
from packlight.integrations.lightning import Packlight, from_environment
from packlight.planner.guest import Guest
from packlight.records import Run
from tests.integrations.cases import SCRIPTS, called_methods, run_script
from tests.torchrun import free_port

PLAIN_METHODS = called_methods()
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of what a small training on a CPU leaves out


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 64))


class Autoencoder(pl.LightningModule):  # type: ignore[misc]
    """Six blocks; with `by_hand` it steps its optimiser itself."""

    def __init__(self, *, by_hand: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.model = nn.Sequential(*[block() for _ in range(6)])
        self.losses: list[float] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.model(rows)
        return made

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        loss: torch.Tensor = (self(batch[0]) - batch[0]).square().mean()
        self.log("loss", loss)
        self.losses.append(loss.item())
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("held_out", (self(batch[0]) - batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Recorder(Callback):  # type: ignore[misc]
    """Notes what a callback is told of, with the metrics that it sees."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.events.append((batch_idx, {name: value.item() for name, value in trainer.callback_metrics.items()}))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        norms = [each.grad.norm().item() for each in pl_module.parameters()]
        self.events.append(("norms", norms))


def fit(
    folder: Path, *callbacks: Callback, resume: Path | None = None, by_hand: bool = False, **options: Any
) -> tuple[list[float], list[Any], list[bytes]]:
    """Train; return losses, what a callback saw, and the parameters as bytes, which are no tensors to be counted."""
    gc.collect()
    torch.manual_seed(0)
    model, recorder = Autoencoder(by_hand=by_hand), Recorder()
    rows = torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(rows), batch_size=512)
    more = {} if by_hand else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        **{"max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        **more,
        **options,
        callbacks=[recorder, *callbacks],
    )
    try:
        trainer.fit(model, loader, DataLoader(TensorDataset(rows[:512]), batch_size=512), ckpt_path=resume)
    finally:
        assert called_methods() == PLAIN_METHODS
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return model.losses, recorder.events, [each.detach().numpy().tobytes() for each in model.parameters()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int]:
    measuring = Packlight(None)
    trained = fit(tmp_path_factory.mktemp("plain"), measuring, enable_checkpointing=False)
    assert measuring.plan is None and measuring.measurement is not None
    return trained, measuring.measurement.device_peak_bytes


def test_an_exact_plan_fits_with_the_same_bits_and_metrics_and_resumes_as_if_never_stopped(
    plain: tuple[Any, int], tmp_path: Path
) -> None:
    trained, peak_bytes = plain
    callback = Packlight(peak_bytes * 8 // 10, exact=True, record=tmp_path / "run.json")
    assert fit(tmp_path, callback, ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)) == trained
    run = Run.load(tmp_path / "run.json")
    assert run.plan is not None and run.plan.recomputed()
    assert run.plan == callback.plan
    assert run.measurement == callback.measurement and run.measurement.num_steps == 4
    assert run.measurement.device_peak_bytes <= run.plan.budget_bytes
    losses, events, parameters = fit(tmp_path, callback, resume=tmp_path / "epoch=0.ckpt", enable_checkpointing=False)
    assert losses == trained[0][4:] and parameters == trained[2]
    assert events[-1][1]["loss"] == trained[1][-1][1]["loss"]
    assert callback.measurement.num_steps == 2


def test_a_lossy_plan_fits_also_where_the_module_steps_by_hand(tmp_path: Path) -> None:
    measuring = Packlight(None)
    plain_losses, *_ = fit(tmp_path, measuring, by_hand=True, enable_checkpointing=False)
    assert measuring.measurement is not None
    callback = Packlight(measuring.measurement.device_peak_bytes * 6 // 10)
    del measuring  # Lightning gives each callback a method of the module, which would count as used
    losses, *_ = fit(tmp_path, callback, by_hand=True, enable_checkpointing=False)
    assert callback.plan is not None and callback.measurement is not None and callback.measurement.num_steps == 8
    assert callback.measurement.device_peak_bytes <= callback.plan.budget_bytes
    assert losses == pytest.approx(plain_losses, rel=0.02)


def test_what_nothing_fits_comes_out_of_fit_as_the_error_that_names_the_smallest_budget(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest budget that fits") as caught:
        fit(tmp_path, Packlight("600KB"), enable_checkpointing=False)
    assert caught.value.smallest_bytes is not None and caught.value.smallest_bytes > 600_000
    caught.value.__traceback__ = None


class _Fails(Callback):  # type: ignore[misc]
    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("broken off")


def test_an_exception_ends_the_session_and_the_callback_can_be_used_again(tmp_path: Path) -> None:
    callback = Packlight(None)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(tmp_path, callback, _Fails(), enable_checkpointing=False)
    fit(tmp_path, callback, enable_checkpointing=False)
    assert callback.measurement is not None and callback.measurement.num_steps == 4


def test_two_plugins_in_one_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one at a time"):
        fit(tmp_path, Packlight("1GiB"), Packlight("1GiB"), enable_checkpointing=False)


def test_gradients_are_not_released_where_the_trainer_clips_or_accumulates_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_clip_val=0.5 and accumulate_grad_batches=2; wanted None and 1"):
        fit(tmp_path, Packlight("1GiB", release_gradients=True), enable_checkpointing=False)


def test_the_environment_asks_for_the_callback_and_without_it_the_entry_point_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert from_environment() == []
    monkeypatch.setenv("PACKLIGHT_BUDGET", "2GiB")
    monkeypatch.setenv("PACKLIGHT_EXACT", "1")
    (callback,) = from_environment()
    assert isinstance(callback, Packlight)
    assert callback.settings.budget == "2GiB" and callback.settings.exact
    monkeypatch.setenv("PACKLIGHT_EXACT", "true")
    with pytest.raises(ValueError, match="PACKLIGHT_EXACT is 'true'; wanted 0 or 1"):
        from_environment()
    monkeypatch.setenv("PACKLIGHT_EXACT", "1")
    monkeypatch.delenv("PACKLIGHT_BUDGET")
    with pytest.raises(ValueError, match="no PACKLIGHT_BUDGET"):
        from_environment()
    monkeypatch.delenv("PACKLIGHT_EXACT")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = project["entry-points"]["lightning.pytorch.callbacks_factory"]
    assert [metadata.EntryPoint(name, value, "").load() for name, value in named.items()] == [from_environment]


def test_a_loop_of_fabric_runs_inside_the_context(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    def loop(guest: Guest) -> list[float]:
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=1)
        module = nn.Sequential(*[block() for _ in range(6)])
        model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters()))
        losses, rows = [], torch.randn(512, 64)
        with guest.during(optimizer):
            for _ in range(4):
                loss = (model(rows) - rows).square().mean()
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    measuring = Packlight(None)
    plain_losses = loop(measuring)
    assert measuring.measurement is not None
    planned = Packlight(measuring.measurement.device_peak_bytes * 85 // 100, exact=True)
    assert loop(planned) == plain_losses and called_methods() == PLAIN_METHODS
    assert planned.plan is not None and planned.plan.recomputed() and planned.measurement is not None
    assert planned.measurement.device_peak_bytes <= planned.plan.budget_bytes


@pytest.mark.slow
def test_the_script_without_the_plugin_s_line_runs_under_packlight_run_with_the_same_bits(tmp_path: Path) -> None:
    script, record = SCRIPTS / "lightning_gpt.py", str(tmp_path / "run.json")
    around = ["-m", "packlight", "run", "--budget", "45MB", "--exact", "--record", record]
    assert run_script(script, "--print-losses", before=around) == run_script(script, "--print-losses")
    run = Run.load(record)
    assert run.plan is not None and run.plan.recomputed()
    assert run.measurement.device_peak_bytes <= run.plan.budget_bytes


@pytest.mark.slow  # a plain script under FSDP2 has a test among the ranks', Lightning on one rank the ones above
def test_two_ranks_under_fsdp2_fit_with_the_same_bits(tmp_path: Path) -> None:
    script, record = SCRIPTS / "lightning_gpt.py", tmp_path / "run.json"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    losses = run_script(script, "--print-losses", "--devices", "2", before=launcher)
    line = ["--packlight", "36MB", "--exact", "--record", str(record)]
    assert sorted(run_script(script, "--print-losses", "--devices", "2", *line, before=launcher)) == sorted(losses)
    for run in map(Run.load, (record, tmp_path / "run.rank1.json")):
        assert run.plan is not None and run.plan.recomputed()
        assert run.measurement.device_peak_bytes <= run.plan.budget_bytes
