"""Memory that runs out in the first steps does not show in training; a wrong prediction is mended once, and said."""

import gc
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from packlight.activations.standin import StandIn
from packlight.budget import parse_bytes
from packlight.planner.apply import apply, fit
from packlight.planner.exhausted import is_out_of_memory
from packlight.planner.mend import TOLERANCE, _done, all_recomputed, like
from packlight.planner.plan import plan
from packlight.planner.request import SessionStop, Settings
from packlight.planner.session import Session
from packlight.records import Choice, Plan

ROWS, WIDTH, NUM_STEPS = 512, 64, 4
SAID = "packlight: "

pytestmark = pytest.mark.usefixtures("seed", "no_garbage")


@pytest.fixture
def no_garbage() -> Iterator[None]:
    gc.collect()
    yield
    gc.collect()


class Failing(nn.Module):
    """Runs out of memory at some of its calls, in forward or in backward; a trace does not count."""

    def __init__(self, where: str, *calls: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.where, self.calls, self.error, self.num_calls = where, calls, error, 0

    def pass_by(self, where: str) -> None:
        self.num_calls += where == self.where
        if where == self.where and self.num_calls in self.calls:
            raise self.error("CUDA out of memory (injected)")

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            return x
        self.pass_by("forward")
        out: Tensor = _Passing.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Failing) -> Tensor:
        ctx.owner = owner
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        ctx.owner.pass_by("backward")
        return gradients[0], None


class Hungry(nn.Module):
    """Allocates in a real forward what a trace does not see."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes = num_bytes

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            torch.empty(self.num_bytes, dtype=torch.uint8)
        return x


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH))


def model_with(part: nn.Module, *, in_block: bool = False) -> nn.Module:
    """Return blocks with dropout around a part, and batch norm: its buffers move in forward."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    blocks = [block() for _ in range(6)]
    if in_block:
        blocks[2] = nn.Sequential(block(), part)
        return nn.Sequential(stem, *blocks)
    return nn.Sequential(stem, *blocks[:3], part, *blocks[3:])


def mean_of_squares(output: Tensor, _: object = None) -> Tensor:
    return nn.functional.dropout(output, 0.1).square().mean()


def batch() -> Tensor:
    return torch.randn(ROWS, WIDTH)


@dataclass
class Trained:
    losses: list[float]
    gradients: list[bytes]
    values: list[Tensor]
    draw: float


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, num_microbatches: int = 1) -> Trained:
    torch.manual_seed(1)
    losses, gradients = [], []
    for _ in range(NUM_STEPS):
        for _ in range(num_microbatches):
            loss = mean_of_squares(model(batch()))
            loss.backward()
            losses.append(loss.item())
        gradients += [at.grad.numpy().tobytes() for at in model.parameters() if at.grad is not None]  # no tensors
        optimizer.step()
        optimizer.zero_grad()
    return Trained(losses, gradients, [at.clone() for at in model.state_dict().values()], torch.rand(()).item())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def assert_equal(found: Trained, expected: Trained) -> None:
    assert found.losses == expected.losses and found.draw == expected.draw
    assert found.gradients == expected.gradients
    assert all(map(torch.equal, found.values, expected.values))


def plain(num_microbatches: int = 1, *, in_block: bool = False) -> Trained:
    model = model_with(Failing("never"), in_block=in_block)
    return train(model, adamw(model), num_microbatches=num_microbatches)


Run = Callable[[nn.Module, torch.optim.Optimizer, list[str]], AbstractContextManager[Any]]


@contextmanager
def fitted(model: nn.Module, optimizer: torch.optim.Optimizer, said: list[str]) -> Iterator[Any]:
    budget = "18MiB"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fit(model, optimizer, batch(), budget=budget, loss=mean_of_squares, exact=True) as handle:
            yield handle
    said += [str(each.message).removeprefix(SAID) for each in caught if str(each.message).startswith(SAID)]


@contextmanager
def in_session(model: nn.Module, optimizer: torch.optim.Optimizer, said: list[str]) -> Iterator[Any]:
    settings = Settings("18MiB", exact=True, tell=lambda made, title: said.append(f"{title}{made}"))
    with Session(settings) as session:
        session.optimizer_made(optimizer)
        yield session


RUNS = {"fit": fitted, "session": in_session}


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize(("where", "step"), [("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2)])
@pytest.mark.parametrize("run", RUNS)
def test_memory_that_runs_out_once_does_not_show(run: str, where: str, step: int, num_microbatches: int) -> None:
    expected, said = plain(num_microbatches), list[str]()
    model = model_with(Failing(where, step * num_microbatches))  # the last microbatch: gradients are there already
    optimizer = adamw(model)
    with RUNS[run](model, optimizer, said):
        found = train(model, optimizer, num_microbatches=num_microbatches)
    assert_equal(found, expected)
    assert sum(f"out of memory in {where} of step {step}" in each for each in said) == 1


@pytest.mark.parametrize("run", RUNS)
def test_memory_may_run_out_while_a_block_is_recomputed(run: str) -> None:
    expected, said = plain(in_block=True), list[str]()
    model = model_with(Failing("forward", 2), in_block=True)
    optimizer = adamw(model)
    with RUNS[run](model, optimizer, said):
        found = train(model, optimizer)
    assert_equal(found, expected)
    assert sum("out of memory in" in each for each in said) == 1


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_only_errors_of_an_allocator_are_caught(error: type[Exception]) -> None:
    said, model = list[str](), model_with(Failing("forward", 1, error=error))
    optimizer = adamw(model)
    with fitted(model, optimizer, said):
        if error is MemoryError:
            train(model, optimizer)
        else:
            with pytest.raises(RuntimeError, match="injected"):
                train(model, optimizer)
    assert len(said) == (error is MemoryError)


def test_torch_s_own_error_on_the_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("run", RUNS)
def test_memory_that_runs_out_again_and_again_goes_up_with_what_can_be_done(run: str, where: str) -> None:
    said, model = list[str](), model_with(Failing(where, *range(2, 10)))
    optimizer = adamw(model)
    with RUNS[run](model, optimizer, said), pytest.raises(torch.OutOfMemoryError) as caught:
        train(model, optimizer)
    (note,) = caught.value.__notes__
    assert f"out of memory in {where} of step 2, under a plan for 18.00 MiB; the most saving plan failed too" in note
    assert "Live then: parameters" in note and "optimizer states" in note
    _, _, after = note.partition("The largest:\n")
    largest, _, changes = after.partition("What would free most")
    assert len(largest.splitlines()) == 10
    sizes = [parse_bytes("".join(line.split()[:2])) for line in largest.splitlines()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
    assert "test_mend.py:" in largest and "  activations  " in largest
    ranked = changes.splitlines()[1:]
    assert [line.split()[0] for line in ranked] == [f"{at}." for at in range(1, len(ranked) + 1)] and len(ranked) >= 2
    assert "half the rows of a batch" in changes and "a smaller budget, --budget" in changes


@pytest.mark.parametrize("run", RUNS)
def test_gradients_that_a_first_backward_has_made_are_told_as_gradients(run: str) -> None:
    said, model = list[str](), model_with(Failing("backward", *range(1, 10)))
    optimizer = adamw(model)
    with RUNS[run](model, optimizer, said), pytest.raises(torch.OutOfMemoryError) as caught:
        train(model, optimizer)
    (note,) = caught.value.__notes__
    assert "out of memory in backward of step 1" in note
    (live,) = [line for line in note.splitlines() if line.startswith("Live then: ")]
    assert ", gradients " in live


def hook_on_the_output(model: nn.Module) -> None:
    output = model(batch())
    output.register_hook(lambda gradient: 2 * gradient)
    mean_of_squares(output).backward()


def keep_the_graph(model: nn.Module) -> None:
    mean_of_squares(model(batch())).backward(retain_graph=True)


def use_a_parameter_in_the_loss(model: nn.Module) -> None:
    penalty = next(model.parameters()).square().sum()
    (mean_of_squares(model(batch())) + penalty).backward()


def add_two_forwards(model: nn.Module) -> None:
    (mean_of_squares(model(batch())) + mean_of_squares(model(batch()))).backward()


def hook_on_a_parameter(model: nn.Module) -> None:
    hook = next(model.parameters()).register_hook(lambda gradient: 2 * gradient)
    mean_of_squares(model(batch())).backward()
    hook.remove()


def retain_the_gradient_of_the_output(model: nn.Module) -> None:
    output = model(batch())
    output.retain_grad()
    mean_of_squares(output).backward()
    assert output.grad is not None
    bias = next(at for at in model.parameters() if at.shape == output.shape[1:])
    bias.grad = output.grad.sum(0)  # so that it is compared with that of the run without a plan


UNUSUAL: dict[Callable[[nn.Module], None], str] = {
    hook_on_the_output: "hooks",
    keep_the_graph: "more than the gradient of one loss",
    use_a_parameter_in_the_loss: "other ways than the outputs",
    add_two_forwards: "other ways than the outputs",
    hook_on_a_parameter: "hooks",
    retain_the_gradient_of_the_output: "retains those of its outputs",
}


@pytest.mark.parametrize("step", UNUSUAL)
def test_what_cannot_be_repeated_goes_up_with_the_reason(step: Callable[[nn.Module], None]) -> None:
    model = model_with(Failing("backward", 1))
    with fitted(model, adamw(model), []), pytest.raises(torch.OutOfMemoryError) as caught:
        step(model)
    assert "it could not be repeated" in caught.value.__notes__[0] and UNUSUAL[step] in caught.value.__notes__[0]


@pytest.mark.parametrize("step", UNUSUAL)
def test_unusual_steps_give_the_same_gradients_as_without_a_plan(step: Callable[[nn.Module], None]) -> None:
    found = []
    for is_planned in (False, True):
        model = model_with(Failing("never"))
        with fitted(model, adamw(model), []) if is_planned else torch.enable_grad():
            torch.manual_seed(1)
            step(model)
            step(model)
        found.append([at.grad for at in model.parameters()])
    assert all(map(torch.equal, *found))


class NoGradient(torch.autograd.Function):
    """Passes two tensors on, and a gradient to the first of them alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*[block() for _ in range(3)])
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.first(x), self.second(x)


def one_sided(output: tuple[Tensor, Tensor], _: object = None) -> Tensor:
    summed: Tensor = NoGradient.apply(*output)  # type: ignore[no-untyped-call]
    return summed.square().mean()


def test_an_output_that_a_loss_gives_no_gradient_is_left_alone() -> None:
    found = []
    for is_planned in (False, True):
        torch.manual_seed(0)
        model = TwoHeads()
        optimizer = adamw(model)
        with fit(model, optimizer, batch(), budget="18MiB", loss=one_sided) if is_planned else torch.enable_grad():
            torch.manual_seed(1)
            one_sided(model(batch())).backward()
        found.append([at.grad for at in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or theirs is None or torch.equal(ours, theirs))


def test_a_plan_with_a_disk_outlives_a_model_that_is_called_twice_a_step(tmp_path: Path) -> None:
    """Two forwards of a step share their sites, so nothing can be moved: what the first plan moved is forgotten."""
    torch.manual_seed(0)
    model = nn.Sequential(*[block() for _ in range(6)])
    optimizer = adamw(model)
    settings = Settings("14MiB", exact=True, disk=str(tmp_path), tell=lambda made, title: None)
    with Session(settings) as session:
        session.optimizer_made(optimizer)
        for _ in range(3):
            (mean_of_squares(model(batch()[:64])) + mean_of_squares(model(batch()[:64]))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert session.measurement() is not None


def test_gradients_of_the_parameters_can_still_be_asked_for() -> None:
    model = model_with(Failing("never"))
    with fitted(model, adamw(model), []):
        gradients = torch.autograd.grad(mean_of_squares(model(batch())), list(model.parameters()))
    assert len(gradients) == len(list(model.parameters()))


def stand_ins_ever(model: nn.Module) -> list[StandIn]:
    """What stands in for the model's forward, also what only stepped aside."""
    found, forward = list[StandIn](), vars(model).get("forward")
    while isinstance(forward, StandIn):
        found.append(forward)
        forward = forward._forward
    return found


@pytest.mark.parametrize("where", ["forward", "backward", "never"])
@pytest.mark.parametrize("run", RUNS)
def test_after_two_steps_nothing_stands_around_and_nothing_is_held(run: str, where: str) -> None:
    model, backward = model_with(Failing(where, 2)), torch.autograd.backward
    optimizer, held = adamw(model), list[Any]()
    with RUNS[run](model, optimizer, []):
        for _ in range(2):
            x = batch()
            output = model(x)
            loss = mean_of_squares(output)
            held += [weakref.ref(each) for each in (x, output, loss)]
            loss.backward()
            del x, output, loss
            optimizer.step()
            optimizer.zero_grad()
            gc.collect()
            assert not any(each() is not None for each in held)
        assert not [at for at in stand_ins_ever(model) if type(at).__module__ == "packlight.planner.retry"]
        assert run == "session" or torch.autograd.backward is backward
    assert torch.autograd.backward is backward and "forward" not in vars(model)


# What was predicted wrongly


def hidden(num_bytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that allocates bytes nobody knows of, where most of the activations live."""
    torch.manual_seed(0)
    model = nn.Sequential(*[block() for _ in range(6)], Hungry(num_bytes))
    return model, adamw(model)


@pytest.mark.parametrize("run", RUNS)
def test_a_peak_that_was_not_predicted_is_mended_once_and_then_kept(run: str) -> None:
    model, optimizer = hidden(7 * 2**20)
    said = list[str]()
    with RUNS[run](model, optimizer, said) as running:
        train(model, optimizer)
        measured = running.measurement if run == "fit" else running.measurement()
        made: Plan = running.plan
    assert measured is not None and measured.plan_peak_bytes is not None
    assert sum("was predicted" in each.splitlines()[0] for each in said) == 1
    assert measured.device_peak_bytes > made.budget_bytes >= measured.plan_peak_bytes
    assert abs(measured.plan_peak_bytes - made.estimate.device_peak_bytes) <= 0.2 * measured.plan_peak_bytes
    assert made.recomputed() and "made again after step" in made.notes[-1]


@pytest.mark.parametrize("run", RUNS)
def test_a_peak_that_no_plan_mends_is_said_and_the_most_saving_plan_kept(run: str) -> None:
    model, optimizer = hidden(40 * 2**20)
    said = list[str]()
    with RUNS[run](model, optimizer, said) as running:
        train(model, optimizer)
        made: Plan = running.plan
    assert sum("ABOVE THE BUDGET of 18.00 MiB, which no plan mends" in each for each in said) == 1
    assert len(made.recomputed()) >= len(made.choices) - 1  # the last block's recomputation may spare nothing


def test_a_mended_plan_splits_the_batch_as_before_and_is_compared_with_the_same_step() -> None:
    model, optimizer = hidden(0)
    before = plan(model, batch(), optimizer, budget="1GiB", loss=mean_of_squares)
    estimate = replace(before.estimate, step_seconds=2.0, slowdown=1.5, plain_peak_bytes=123)
    split = replace(before, num_microbatches=4, estimate=estimate)
    other = replace(before, estimate=replace(estimate, step_seconds=4.0, slowdown=9.0, plain_peak_bytes=456))
    low_bit = replace(before, state_formats={"weight": "8bit"}, estimate=estimate)
    for plan_before in (split, low_bit):
        made = like(other, plan_before)
        assert made.num_microbatches == plan_before.num_microbatches
        assert made.estimate.slowdown == 3.0 and made.estimate.plain_peak_bytes == 123
    assert like(other, replace(split, num_microbatches=1)).estimate == other.estimate


def test_an_optimiser_that_is_made_within_a_step_does_not_end_it() -> None:
    with Session(Settings(budget=None)) as session:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        first, second = torch.optim.AdamW(model[0].parameters()), None
        for _ in range(5):
            mean_of_squares(model(batch())).backward()
            first.step()
            second = second or torch.optim.AdamW(model[1].parameters())
            second.step()
            model.zero_grad()
        measured = session.measurement()
    assert measured is not None and measured.num_steps == 5


def test_a_plan_through_a_narrower_window_is_another_plan() -> None:
    model, optimizer = hidden(0)
    wide = replace(plan(model, batch(), optimizer, budget="1GiB", loss=mean_of_squares), tier="disk", window_bytes=2)
    assert _done(wide) != _done(replace(wide, window_bytes=1))


def test_a_script_refuses_a_plan_that_splits_its_batches() -> None:
    model, optimizer = hidden(0)
    made = plan(model, batch(), optimizer, budget="1GiB", loss=mean_of_squares)
    Settings(budget=None).check(made)
    with pytest.raises(SessionStop, match="4 parts"):
        Settings(budget=None).check(replace(made, num_microbatches=4))


@pytest.mark.parametrize("run", RUNS)
def test_a_prediction_that_holds_is_left_alone(run: str) -> None:
    model, optimizer = hidden(0)
    said = list[str]()
    with RUNS[run](model, optimizer, said) as running:
        train(model, optimizer)
        measured = running.measurement if run == "fit" else running.measurement()
        predicted_bytes = running.plan.estimate.device_peak_bytes
    assert len(said) == {"fit": 0, "session": 2}[run]
    assert abs(measured.plan_peak_bytes - predicted_bytes) <= TOLERANCE / 2 * predicted_bytes


def test_a_plan_without_a_profile_is_not_made_again_but_a_wrong_peak_is_said() -> None:
    model, optimizer = hidden(7 * 2**20)
    made = plan(model, batch(), optimizer, budget="18MiB", loss=mean_of_squares, exact=True)
    with pytest.warns(UserWarning, match=r"measured .* MiB where .* MiB was predicted, ABOVE THE BUDGET") as warned:
        with apply(made, model, optimizer) as handle:
            train(model, optimizer)
            assert handle.plan is made
    assert [each.filename for each in warned] == [__file__]  # the line that stepped, not torch's or packlight's
    with pytest.warns(UserWarning, match=r"measured .* where .* was predicted, and the plan stays as it is"):
        with apply(replace(made, budget_bytes=2**30), model, optimizer):
            train(model, optimizer)


def test_a_peak_below_its_prediction_is_noted_beside_the_measurement_and_no_reason_to_warn() -> None:
    model, optimizer = hidden(0)
    made = plan(model, batch(), optimizer, budget="18MiB", loss=mean_of_squares, exact=True)
    above = replace(made, estimate=replace(made.estimate, device_peak_bytes=19 * 2**20), budget_bytes=20 * 2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply(above, model, optimizer) as handle:
            train(model, optimizer)
            measured, shown = handle.measurement, handle._repr_html_()
    assert measured is not None and measured.predicted_peak_bytes == 19 * 2**20 > measured.device_peak_bytes
    (note,) = measured.notes
    assert re.fullmatch(r"after step \d, measured .* where 19.00 MiB was predicted, and the plan stays as it is", note)
    assert note in str(measured) and note in shown


def test_a_plan_without_a_profile_is_tightened_to_all_its_blocks() -> None:
    expected, model = plain(), model_with(Failing("forward", 2))
    optimizer = adamw(model)
    made = plan(model, batch(), optimizer, budget="18MiB", loss=mean_of_squares, exact=True)
    with pytest.warns(UserWarning, match="with every block recomputed"), apply(made, model, optimizer) as handle:
        found = train(model, optimizer)
        assert handle.plan.recomputed() == {choice.group for choice in made.choices if not choice.sites}
    assert_equal(found, expected)


def test_recomputing_all_blocks_leaves_choices_outside_of_them() -> None:
    model, _ = hidden(0)
    made = plan(model, batch(), None, budget="1GiB", loss=mean_of_squares)
    sites = [Choice(at, "compress", 0, 0.0, codec="mask", sites=(at,)) for at in ("0.1:0", "head:0", ":0")]
    everything = all_recomputed(replace(made, choices=(*made.choices, *sites)))
    assert everything.recomputed() == {choice.group for choice in made.choices}
    assert set(everything.site_choices()) == {"head:0", ":0"}
