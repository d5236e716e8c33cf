"""A loop around Accelerate's objects inside the context, as users write it: budget, bits, checkpoints, what is left."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from packlight import BudgetError
from packlight.integrations.accelerate import packlight_budget
from packlight.records import Run
from tests.integrations.cases import SCRIPTS, called_methods, run_script

PLAIN_METHODS = called_methods()


def loop(
    budget: int | str | None, folder: Path, *, epochs: int = 2, resume: Path | None = None, **options: Any
) -> tuple[list[float], list[bytes], Any]:
    """Train with accumulation and clipping, and save after each epoch; return losses, parameters and the guest."""
    gc.collect()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    blocks = [nn.Sequential(nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 64)) for _ in range(6)]
    model: nn.Module = nn.Sequential(*blocks)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(rows), batch_size=512))
    first = 0 if resume is None else 1
    if resume is not None:
        accelerator.load_state(str(resume))
    losses = []
    with packlight_budget(accelerator, budget, **options) as guest:
        for epoch in range(first, epochs):
            for (batch,) in loader:
                with accelerator.accumulate(model):
                    loss = (model(batch) - batch).square().mean()
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
            accelerator.save_state(str(folder / f"epoch{epoch}"))
    assert called_methods() == PLAIN_METHODS
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return losses, [each.detach().numpy().tobytes() for each in model.parameters()], guest


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], list[bytes], int]:
    losses, parameters, guest = loop(None, tmp_path_factory.mktemp("plain"))
    assert guest.plan is None
    return losses, parameters, guest.measurement.device_peak_bytes


def test_an_exact_plan_fits_with_the_same_bits_and_resumes_as_if_never_stopped(plain: Any, tmp_path: Path) -> None:
    losses, parameters, peak_bytes = plain
    allowed = peak_bytes * 8 // 10
    found = loop(allowed, tmp_path, exact=True, record=tmp_path / "run.json")
    assert found[:2] == (losses, parameters)
    run = Run.load(tmp_path / "run.json")
    assert run.plan is not None and run.plan.recomputed()
    assert run.measurement.device_peak_bytes <= allowed and run.measurement.num_steps == 4
    resumed = loop(allowed, tmp_path, exact=True, resume=tmp_path / "epoch0")
    assert resumed[:2] == (losses[4:], parameters) and resumed[2].measurement.num_steps == 2


def test_a_lossy_plan_fits_also_when_it_is_resumed(plain: Any, tmp_path: Path) -> None:
    losses, _, peak_bytes = plain
    found = loop(peak_bytes * 6 // 10, tmp_path)
    assert {"8bit", "4bit"} & set(found[2].plan.state_formats.values())
    resumed = loop(peak_bytes * 6 // 10, tmp_path, resume=tmp_path / "epoch0")
    for _, _, guest in (found, resumed):
        assert guest.measurement.device_peak_bytes <= guest.plan.budget_bytes
    assert found[0] == pytest.approx(losses, rel=0.02) and resumed[0] == pytest.approx(losses[4:], rel=0.02)


def test_what_nothing_fits_is_the_error_that_names_the_smallest_budget(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="smallest budget that fits") as caught:
        loop("600KB", tmp_path)
    assert caught.value.smallest_bytes is not None and caught.value.smallest_bytes > 600_000
    assert called_methods() == PLAIN_METHODS
    caught.value.__traceback__ = None


def test_gradients_are_not_released_where_the_accelerator_accumulates_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2; wanted 1"):
        loop("1GiB", tmp_path, release_gradients=True)


def test_one_context_in_another_is_refused(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    with packlight_budget(accelerator, None), pytest.raises(ValueError, match="one at a time"):
        with packlight_budget(accelerator, "1GiB"):
            pass
    assert called_methods() == PLAIN_METHODS


@pytest.mark.slow
def test_the_script_without_the_context_runs_under_packlight_run_with_the_same_bits(tmp_path: Path) -> None:
    script, record = SCRIPTS / "accelerate_gpt.py", tmp_path / "run.json"
    around = ["-m", "packlight", "run", "--budget", "23MB", "--exact", "--record", str(record)]
    assert run_script(script, "--print-losses", before=around) == run_script(script, "--print-losses")
    run = Run.load(record)
    assert run.plan is not None and run.plan.recomputed()
    assert run.measurement.device_peak_bytes <= run.plan.budget_bytes
