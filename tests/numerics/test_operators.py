"""The steps are operators of torch: honest about what they change, traceable, and no different for it."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from packlight.numerics import AdamWSettings, SGDSettings, moment_formats, operators, zero_moment
from packlight.numerics.call import MUTATED
from packlight.numerics.noise import seed_of
from packlight.numerics.rounding import ERROR_DTYPES
from tests.numerics.cases import Trained, adamw, same, sgd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*two pools of threads compete"),
    pytest.mark.filterwarnings(
        "ignore:packlight's CPU kernels could not be compiled"
    ),  # the reference has the same bits
]
SHAPES = ((130, 256), (64,), (5003,))
NAMES = ("adamw_step", "sgd_step")
FORMATS = ("4bit", "8bit", "fp8", "fp32", "paper4bit")
SETTINGS: dict[str, AdamWSettings | SGDSettings] = {
    "adamw_step": AdamWSettings(1e-2, weight_decay=0.1),
    "sgd_step": SGDSettings(1e-2, momentum=0.9, nesterov=True),
}
NUM_MOMENTS = {"adamw_step": 2, "sgd_step": 1}


@dataclass
class Call:
    """The arguments of an operator, by name."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    errors: list[Tensor]
    numbers: Tensor
    step: Tensor
    found_inf: Tensor | None
    seeds: list[int]
    state_format: str
    stochastic: bool = True
    rounding: str = "nearest"

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def changed(self) -> list[Tensor]:
        return [*self.params, *self.states, *self.errors]


def call(
    name: str, state_format: str, *, dtype: torch.dtype = torch.float32, rounding: str = "nearest", step: int = 1
) -> Call:
    torch.manual_seed(torch.initial_seed())
    states = [
        tensor
        for shape in SHAPES
        for each in moment_formats(state_format, shape)[: NUM_MOMENTS[name]]
        for tensor in zero_moment(shape, each).tensors.values()
    ]
    error = ERROR_DTYPES.get(rounding)
    return Call(
        [torch.randn(shape).to(dtype) for shape in SHAPES],
        [torch.randn(shape).to(dtype) for shape in SHAPES],
        states,
        [] if error is None else [torch.zeros(torch.Size(shape).numel(), dtype=error) for shape in SHAPES],
        torch.tensor(SETTINGS[name].numbers(step)),
        torch.tensor(float(step)),
        None,
        [seed_of(7, index) for index in range(len(SHAPES))],
        state_format,
        rounding=rounding,
    )


def operator(name: str) -> Any:
    return getattr(torch.ops.packlight, name)


def all_same(ours: Call, theirs: Call) -> bool:
    return all(same(a, b) for a, b in zip(ours.changed(), theirs.changed(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state_format", ["4bit", "fp8", "fp32"])
def test_schema_and_fake_are_what_torch_wants(name: str, state_format: str, seed: int) -> None:
    checked = torch.library.opcheck(operator(name).default, call(name, state_format).arguments())
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_fake_hold_with_error_bits_and_found_inf(name: str, seed: int) -> None:
    arguments = call(name, "4bit", dtype=torch.bfloat16, rounding="master24")
    arguments.found_inf = torch.zeros(1)
    assert set(torch.library.opcheck(operator(name).default, arguments.arguments()).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("state_format", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "master24")]
)
def test_the_operator_is_the_step_with_its_own_seeds(
    name: str, state_format: str, dtype: torch.dtype, rounding: Any, seed: int
) -> None:
    ours = call(name, state_format, dtype=dtype, rounding=rounding, step=3)
    states, errors = [], []
    params = [param.clone() for param in ours.params]
    for index, (param, grad) in enumerate(zip(params, ours.grads, strict=True)):
        each = Trained(param, state_format, rounding, seed=7, index=index, num_moments=NUM_MOMENTS[name])
        settings = SETTINGS[name]
        if isinstance(settings, AdamWSettings):
            adamw([each], [grad], 3, settings, stochastic=True)
        else:
            sgd([each], [grad], 3, settings)
        states += [tensor for moment in each.moments for tensor in moment.tensors.values()]
        errors += [] if each.how.error is None else [each.how.error]
    operator(name)(*ours.arguments())
    assert all(same(a, b) for a, b in zip(ours.changed(), [*params, *states, *errors], strict=True))


def test_sgd_without_momentum_takes_no_states(seed: int) -> None:
    ours = call("sgd_step", "fp32")
    ours.states, ours.state_format = [], ""
    ours.numbers = torch.tensor(SGDSettings(0.5).numbers(1))
    expected = [param - 0.5 * grad for param, grad in zip(ours.params, ours.grads, strict=True)]
    operator("sgd_step")(*ours.arguments())
    torch.testing.assert_close(ours.params, expected, rtol=2**-23, atol=2**-23)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("found", [1.0, 3.0])
def test_a_found_infinity_changes_nothing(name: str, found: float, seed: int) -> None:
    ours, before = (call(name, "4bit", dtype=torch.bfloat16, rounding="master32") for _ in range(2))
    ours.grads[0][0] = float("inf")
    ours.found_inf = torch.tensor([found])
    operator(name)(*ours.arguments())
    assert all_same(ours, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("found", [torch.zeros(()), torch.zeros(1)], ids=["0-dim", "1 element"])
def test_no_found_infinity_is_a_step(name: str, found: Tensor, seed: int) -> None:
    ours, theirs = (call(name, "4bit") for _ in range(2))
    ours.found_inf = found
    operator(name)(*ours.arguments())
    operator(name)(*theirs.arguments())
    assert all_same(ours, theirs)
    assert not same(ours.params[0], call(name, "4bit").params[0])


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_keeps_the_operator_whole(name: str, seed: int) -> None:
    ours, theirs = (call(name, "4bit") for _ in range(2))

    def step(
        params: list[Tensor], grads: list[Tensor], states: list[Tensor], numbers: Tensor, number: Tensor
    ) -> Tensor:
        scaled = [grad * 0.5 for grad in grads]
        operator(name)(params, scaled, states, [], numbers, number, None, ours.seeds, "4bit", True, "nearest")
        return params[0].sum()

    arguments = [(each.params, each.grads, each.states, each.numbers, each.step) for each in (ours, theirs)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments[0])
    torch._dynamo.reset()
    assert torch.equal(compiled, step(*arguments[1]))
    assert all_same(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_go_through_without_a_step(name: str) -> None:
    with FakeTensorMode():
        assert operator(name)(*call(name, "4bit").arguments()) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_operator_is_what_the_module_calls_by_that_name(name: str) -> None:
    schema = operator(name).default._schema
    assert [each.name for each in schema.arguments if each.alias_info is not None] == list(MUTATED)
    assert callable(getattr(operators, name))
