"""Pipelines of real processes over gloo: gradients, bytes at every event, 50 steps, failures."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from packlight.activations.offload import HostTier
from packlight.pipeline import Runtime, ScheduleError, Stage, grouped, uniform
from tests.pipeline.real import with_copies
from tests.torchrun import ENVIRONMENT, Found, all_found_by, free_port, torchrun

SCRIPT = Path(__file__).parent / "real.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


TOGETHER = {
    2: ("steps", "gradients", "bytes", "planned", "disagreeing", "replicated", "compiled"),
    4: ("gradients", "bytes"),
}


@cache
def start(whats: tuple[str, ...], num_ranks: int, folder: Path) -> dict[str, list[Found]]:
    """Start a process for each rank by torchrun, once for all that these tests ask for."""
    return all_found_by(num_ranks, SCRIPT, whats, folder / f"{num_ranks}-{whats[0]}")


def run(what: str, num_ranks: int, folder: Path) -> list[Found]:
    """Return what each rank found; what fails has processes of its own."""
    whats = TOGETHER[num_ranks] if what in TOGETHER[num_ranks] else (what,)
    found = start(whats, num_ranks, folder)[what]
    assert not list((folder / f"{num_ranks}-{whats[0]}" / what / "spilled").iterdir())
    return found


def test_the_example_of_the_documentation_runs_as_it_stands(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    example = page[page.index("# pipeline.py, a whole example") :].partition("```")[0]
    (tmp_path / "pipeline.py").write_text(example)
    assert "8 microbatches" in torchrun(2, tmp_path / "pipeline.py", cwd=tmp_path)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_losses_and_outputs_are_those_of_the_model_alone(num_ranks: int, folder: Path) -> None:
    for found in run("gradients", num_ranks, folder):
        assert len(found) == 14 and sum(each["num_offloads"] > 0 for each in found) > 4
        for each in found:
            assert each["worst"] <= 1e-6, each
            assert each["losses_are_equal"] and each["outputs_are_equal"], each
            assert (each["moved_bytes"] > 0) == (each["num_offloads"] > 0) and not each["left_bytes"]


def test_where_microbatches_are_added_up_in_one_order_gradients_are_equal_bit_for_bit(folder: Path) -> None:
    found = [each for rank in run("gradients", 2, folder) for each in rank]
    assert all(each["are_equal"] for each in found)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_bytes_after_each_action_are_those_of_the_simulation(num_ranks: int, folder: Path) -> None:
    for found in run("bytes", num_ranks, folder):
        assert any(each["num_offloads"] for each in found)
        for each in found:
            assert each["follows"] and each["wrong"] == 0, each
            assert each["left"] == 0, each


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_peaks_are_as_planned_and_lower_with_copies_by_what_was_planned(num_ranks: int, folder: Path) -> None:
    for found in run("bytes", num_ranks, folder):
        for each in found:
            assert each["recounted"] == each["predicted"]
            assert each["peak"] == each["predicted"], each
    peaks = {each["name"]: each for each in run("bytes", num_ranks, folder)[0]}
    assert peaks["GIS + 2/2"]["peak"] < 0.8 * peaks["GIS"]["peak"]


def test_a_plan_for_a_tight_budget_is_saved_loaded_and_fits_as_predicted(folder: Path) -> None:
    told = [found[0] for found in run("planned", 2, folder)]
    for found in told:
        assert found["is_unchanged"]
        assert found["error"].startswith("no schedule fits 1000 B on every rank; the smallest budget that fits is ")
        assert found["peak"] == found["predicted"] <= found["budget"]
        assert found["stored"] >= found["predicted_stored"]  # the disk rounds each tensor up to a block
        assert bool(found["stored"]) == bool(found["predicted_stored"])
    assert told[0]["orders"] == told[1]["orders"] and told[0]["error"] == told[1]["error"]


def test_compiled_stages_run_by_schedules_that_do_not_split_backward(folder: Path) -> None:
    for (found,) in run("compiled", 2, folder):
        assert found["schedule"] == "1F1B-I" and found["worst"] <= 1e-6


def test_fifty_steps_leave_no_tensor_thread_file_or_place_behind(folder: Path) -> None:
    for (found,) in run("steps", 2, folder):
        first, *others = found["counts"]
        assert len(others) == 5 and len(found["losses"]) == 50
        assert all(count[name] <= first[name] for count in others for name in first)
        assert first["stored"] == 0
        assert found["forwards_are_back"] and not found["hooks"] and found["threads_after"] == 1
    losses = found["losses"]
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_that_fails_gives_up_what_it_has(folder: Path) -> None:
    first, last = (found[0] for found in run("failing", 2, folder))
    assert last["error"] == "ArithmeticError: the loss failed"
    assert first["error"].startswith("RuntimeError")
    for found in (first, last):
        assert found["stored"] == 0 and found["left"] == 0


def test_what_one_rank_does_differently_or_wrong_all_are_told_before_they_wait_for_each_other(folder: Path) -> None:
    for found in run("disagreeing", 2, folder):
        schedules, losses, rows, planned, disk = (each["error"] for each in found)
        assert schedules.startswith("ranks have different schedules")
        assert losses.startswith("some ranks go backward and others do not; pass loss_fn on every rank")
        assert rows == (
            "rank 0: 6 microbatches came for a batch of 5 rows; make the batch larger, or the schedule for fewer "
            "microbatches"
        )
        assert planned.startswith("1000000 microbatches came for a batch of 12 rows")
        assert "there is no folder '/no/such/folder'" in disk


def test_replicated_stages_get_no_split_backward_and_the_mean_of_all_replicas_gradients(folder: Path) -> None:
    for (found,) in run("replicated", 2, folder):
        assert found["refused"] == (
            "PO splits backward, and a stage is replicated by DistributedDataParallel, which would not see the "
            "gradients of its weights; take 1F1B or its interleaved form"
        )
        assert found["schedule"] == "1F1B-I"
        assert found["error"] < 1e-6


def test_a_rank_that_is_killed_ends_the_others_with_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    """Without torchrun, which would end them by itself."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "4"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "killed", str(tmp_path)],
            env={**ENVIRONMENT, **place, "RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(4)
    ]
    try:
        codes = [each.wait(timeout=120) for each in started]
    finally:
        for each in started:
            each.kill()
    assert codes[1] == -9
    assert not list((tmp_path / "killed" / "spilled").iterdir())
    for rank in (0, 2, 3):
        (found,) = json.loads((tmp_path / "killed" / f"{rank}.json").read_text())
        assert found["error"] and found["seconds"] < 30 + 5  # the group's timeout
        assert found["stored"] == 0


@pytest.fixture
def alone() -> Any:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())  # type: ignore[attr-defined]
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("is_frozen", [False, True], ids=["", "first stage frozen"])
@pytest.mark.parametrize("num_moved", [0, 3])
def test_on_one_rank_stages_hand_over_what_they_make(num_moved: int, is_frozen: bool) -> None:
    torch.manual_seed(3)
    modules = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)]
    modules[0].requires_grad_(not is_frozen)
    stages = [Stage(module, at, 3, torch.device("cpu"), min_bytes=0) for at, module in enumerate(modules)]
    x = torch.randn(8, 8)
    schedule, tier = with_copies(uniform(1, 3, 4), num_moved), HostTier(device=torch.device("cpu"))
    loss_fn = nn.functional.mse_loss
    with Runtime(stages, schedule, loss_fn=loss_fn, tier=tier) as runtime:
        runtime.step(x, target=x, return_outputs=False)
        assert (runtime.tier_traffic().bytes_out > 0) == (num_moved > 0)
    gradients = [parameter.grad for module in modules for parameter in module.parameters()]
    for module in modules:
        module.zero_grad()
    for part in x.split(2):
        loss_fn(nn.Sequential(*modules)(part), part).backward()
    for parameter in (each for module in modules for each in module.parameters()):
        found = gradients.pop(0)
        assert (found is None) == (parameter.grad is None) == (not parameter.requires_grad)
        assert found is None or (parameter.grad is not None and torch.equal(found, parameter.grad / 4))


@pytest.mark.usefixtures("alone")
def test_stages_that_a_schedule_is_not_for_are_refused_and_left_as_they_were() -> None:
    modules = [nn.Linear(4, 4) for _ in range(2)]
    stages = [Stage(module, at, 2, torch.device("cpu")) for at, module in enumerate(modules)]
    for given, schedule, said in (
        ([], uniform(1, 2, 2), "no stage came"),
        (stages, uniform(2, 1, 2), "stages of a pipeline of 2 on 1 ranks came for a schedule of 2 stages on 2 ranks"),
        (stages[::-1], uniform(1, 2, 2), r"rank 0 has the stages \[1, 0\]; wanted \[0, 1\]"),
    ):
        with pytest.raises(ScheduleError, match=said):
            Runtime(given, schedule)
    compiled = [Stage(torch.compile(module), at, 2, torch.device("cpu")) for at, module in enumerate(modules)]  # type: ignore[arg-type]
    with pytest.raises(ScheduleError, match="GIS splits backward, and a stage is compiled"):
        Runtime(compiled, grouped(1, 2, 2, group_size=1))
    with Runtime(stages, uniform(1, 2, 2)), pytest.raises(RuntimeError, match="is run by another Runtime"):
        Runtime(stages, uniform(1, 2, 2))
    assert all("forward" not in vars(module) for module in modules)


@pytest.mark.usefixtures("alone")
def test_a_closed_runtime_and_batches_of_uneven_microbatches_are_refused() -> None:
    stages = [Stage(nn.Linear(4, 4), at, 2, torch.device("cpu")) for at in range(2)]
    data = torch.randn(8, 4)
    with Runtime(stages, uniform(1, 2, 4), loss_fn=nn.functional.mse_loss) as runtime:
        runtime.step(data, target=data, return_outputs=False)
        for call in (runtime.step, runtime.eval):
            with pytest.raises(
                ValueError, match=r"microbatch 3 gives stage 0 outputs of shapes \[\(1, 4\)\], and the pipe"
            ):
                call(data[:7], target=data[:7])
        with torch.no_grad():
            model = nn.Sequential(*[stage.submod for stage in stages])
            wanted = torch.cat([model(part) for part in data.chunk(4)])  # rows' bits hang on how many there are
            assert torch.equal(runtime.eval(data, target=data), wanted)
        runtime.step(data, target=data, return_outputs=False)
    runtime.close()
    with pytest.raises(RuntimeError, match="this Runtime is closed; make a new one"):
        runtime.step(data, target=data)


@pytest.mark.usefixtures("alone")
def test_a_forward_that_fails_leaves_no_parcel_open_and_the_tier_is_closed_with_a_runtime_that_is_not_made() -> None:
    class Fails(nn.Linear):
        fails = True

        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            result = super().forward(tensor).tanh()
            if self.fails:
                raise KeyboardInterrupt
            return result

    module, data, tier = Fails(64, 64), torch.randn(8, 64), HostTier(device=torch.device("cpu"))
    stage = Stage(module, 0, 1, torch.device("cpu"), min_bytes=0)
    with Runtime([stage], with_copies(uniform(1, 1, 4), 1), loss_fn=nn.functional.mse_loss, tier=tier) as runtime:
        with pytest.raises(KeyboardInterrupt):
            runtime.step(data, target=data)
        module.fails = False
        module(data)
        assert tier.traffic().stored_bytes == 0
        runtime.step(data, target=data, return_outputs=False)
    unused = HostTier(device=torch.device("cpu"))
    with pytest.raises(ScheduleError, match="no stage came"):
        Runtime([], uniform(1, 1, 4), tier=unused)
    with pytest.raises(RuntimeError, match="closed"):
        unused.put(data.view(-1))
