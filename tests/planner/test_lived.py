"""The step that is kept of a measured run is the one in which its peak stands, and its storages bear their names."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import packlight
from packlight.planner.measure import StepWatch
from packlight.planner.places import Places
from packlight.planner.timeline import Timeline
from tests.cases import CASES

pytestmark = pytest.mark.usefixtures("seed")


class Two(nn.Module):
    """Two layers, a buffer, and a result of each line."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # large enough to be told one by one also where much else lives in the process
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)
        self.register_buffer("scale", torch.ones(2**15))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out: Tensor = self.second(hidden.exp())
        return out * self.scale[0]


def watched(model: nn.Module, batches: list[Tensor]) -> StepWatch:
    optimizer = torch.optim.AdamW(model.parameters())
    watch = StepWatch(model, [optimizer])
    watch.attach(optimizer)
    for batch in batches:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return watch


def line_of(code: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"test_lived.py:{next(at for at, line in enumerate(lines, 1) if line.strip() == code)}"


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_the_step_with_the_peak_is_kept_and_is_the_measurement_to_the_byte(largest: int) -> None:
    rows = [512, 512, 512]
    rows[largest] = 1024
    watch = watched(Two(), [torch.ones(each, 64) for each in rows])
    memory, measured = watch.lived.memory, watch.measurement()
    assert memory is not None and memory.step == largest + 1
    assert memory.peak_bytes == measured.device_peak_bytes
    assert max(map(sum, zip(*memory.by_category().values(), strict=True))) == measured.device_peak_bytes
    assert dict.fromkeys(measured.peak_by_category, 0) | memory.at(memory.peak) == measured.peak_by_category
    assert [phase.name for phase in memory.phases] == ["forward", "loss", "backward", "optimizer"]
    assert memory.phase_at(memory.peak) == measured.peak_moment


def test_what_lives_bears_the_names_of_parameters_modules_and_lines() -> None:
    memory = watched(Two(), [torch.ones(512, 64)] * 3).lived.memory
    assert memory is not None
    made = {(each.category, each.site): each for each in reversed(memory.held)}  # the largest of one name
    for name in ("first.weight", "second.weight"):
        assert ("parameters", name) in made and ("gradients", f"gradient of {name}") in made
        assert ("optimizer_states", f"exp_avg of {name}") in made
        assert ("optimizer_states", f"exp_avg_sq of {name}") in made
    assert ("other", "buffer scale") in made
    first, second = line_of("hidden = self.first(x)"), line_of("out: Tensor = self.second(hidden.exp())")
    assert made["activations", "Two"].code == f"{second} in forward"  # exp's result is made by the model's own forward
    assert made["temporaries", "first"].code == f"{first} in forward"
    assert made["temporaries", "backward of second"].code == f"{second} in forward"
    assert made["gradients", "gradient of first.weight"].code == f"{first} in forward"


def test_what_a_recomputed_block_makes_in_backward_has_its_own_lines() -> None:
    case = CASES["gpt"]()
    model, batch = case.model, case.batch
    blocks = [f"blocks.{at}" for at in range(len(model.blocks))]  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with packlight.recompute(model, blocks):
        watch = StepWatch(model, [optimizer])
        watch.attach(optimizer)
        case.loss(model(batch), batch).backward()
        optimizer.step()
        watch.close()
    memory = watch.lived.memory
    assert memory is not None
    backward = next(phase for phase in memory.phases if phase.name == "backward")
    again = [
        each
        for each in memory.held
        if each.category == "activations" and backward.start < each.born < backward.end and each.site
    ]
    assert any(each.site.startswith("blocks.0.") and each.code.startswith("cases.py:") for each in again)


def in_another_thread(line: Timeline, run: Callable[[], None]) -> None:
    """As autograd runs what is on a GPU: in a thread with a count of nodes of its own."""

    def followed() -> None:
        with line:
            run()

    thread = threading.Thread(target=followed)
    thread.start()
    thread.join()


def test_backward_in_another_thread_has_the_lines_of_its_forward_whatever_ran_before() -> None:
    line, model, slope = Timeline("cpu"), Two(), torch.ones(512, 64)
    line.places = Places(model)
    with line:
        first = model(torch.ones(512, 64))
        second = model(torch.ones(512, 64)).exp()
    in_another_thread(line, lambda: first.backward(slope))
    with line:
        between = torch.ones(2**16)
    num_before = len(line.entries)
    in_another_thread(line, lambda: second.backward(slope))
    found = next(each for each in line.entries[num_before:] if each.code)
    assert found.num_bytes == slope.nbytes and between.numel() == 2**16
    assert found.code.startswith(line_of("second = model(torch.ones(512, 64)).exp()"))


def test_blocks_that_are_recomputed_in_another_thread_have_the_lines_that_they_have_in_one() -> None:
    line, model = Timeline("cpu"), nn.Sequential(Two(), Two())
    line.places = Places(model)
    made = []
    with packlight.recompute(model, ["0", "1"]):
        for is_another in (False, True):
            with line:
                loss = model(torch.ones(512, 64)).sum()
                num_before = len(line.entries)
                if not is_another:
                    loss.backward()
            if is_another:
                in_another_thread(line, loss.backward)
            made.append([(each.site, each.code, each.num_bytes) for each in line.entries[num_before:] if each.site])
            model.zero_grad()
    assert made[0] == made[1] and {site.partition(".")[0] for site, *_ in made[1]} >= {"0", "1", "backward of 0"}


def test_a_step_that_is_not_followed_has_no_record() -> None:
    watch = watched(Two(), [])
    assert watch.lived.memory is None and watch.lived.now() == ((0, "", {}), None)


@pytest.mark.filterwarnings("ignore:packlight. after step 2:UserWarning")  # of what else lives in the process
def test_a_handle_has_the_step_in_which_its_measured_peak_stands() -> None:
    model = Two()
    optimizer = torch.optim.AdamW(model.parameters())
    with packlight.fit(model, optimizer, torch.ones(512, 64), budget="1GiB", loss=lambda out, _: out.sum()) as handle:
        assert handle.measured is None
        for _ in range(4):
            model(torch.ones(512, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle.measurement is not None and handle.measured is not None
        assert handle.measured.peak_bytes == handle.measurement.device_peak_bytes
        shown = handle._repr_html_()
        assert shown.startswith(handle.plan._repr_html_()) and "measured: peak" in shown
