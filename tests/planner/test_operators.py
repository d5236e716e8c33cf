"""What operators take is found on operands of their own, and leaves nothing behind."""

import gc
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from packlight.planner import operators
from packlight.planner.operators import CallCost, Operators
from packlight.planner.tensors import existing_tensors

CPU = torch.device("cpu")
aten: Any = torch.ops.aten


def measured(func: Any, *args: Any, **kwargs: Any) -> CallCost | None:
    return Operators(CPU).measured(func, args, kwargs)


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


def name_of(each: Any) -> str:
    return str(each) if isinstance(each, torch._ops.OpOverload) else ""


def test_a_call_on_fake_tensors_takes_time_and_more_of_it_where_there_is_more_to_do() -> None:
    small, large = (measured(aten.mm.default, fake(size, size), fake(size, size)) for size in (32, 512))
    assert small is not None and large is not None
    assert 0 < small.seconds < large.seconds
    assert small.scratch_bytes == 0  # nothing counts it on the CPU


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.embedding.default, (fake(10, 4), fake(3, 5, dtype=torch.int64))),
        (aten.index.Tensor, (fake(10, 4), [fake(3, dtype=torch.int64)])),
        (aten.nll_loss_forward.default, (fake(6, 4), fake(6, dtype=torch.int64), None, 1, -100)),
        (aten.cat.default, ([fake(2, 3), fake(5, 3)],)),
        (aten.native_dropout.default, (fake(100), 0.5, True)),
        (aten.add_.Tensor, (fake(8), torch.tensor(2.0))),
        (aten.log.default, (fake(4, 1).expand(4, 9),)),
        (aten.clone.default, (fake(6, 9).t(),)),
        (aten.sum.default, (fake(0, 3),)),
    ],
    ids=name_of,
)
def test_indices_lists_numbers_and_strides_of_any_kind_are_made(func: Any, args: tuple[Any, ...]) -> None:
    found = measured(func, *args)
    assert found is not None and found.seconds > 0


@pytest.mark.parametrize(
    "call",
    [
        (aten.nonzero.default, (fake(5),)),
        (aten.index.Tensor, (fake(5), [fake(5, dtype=torch.bool)])),
        (aten._local_scalar_dense.default, (fake(1),)),
        (aten._foreach_add_.Scalar, ([fake(5)], 1)),
        (aten.empty.memory_format, ([5],)),
        (torch.ops.prims.sin.default, (fake(5),)),
        (aten.mm.default, (fake(5, 4), fake(5, 4))),  # it raises
        (aten.view.default, (fake(6, 4), [24])),
        (aten._assert_async.default, (fake(1),)),
        (aten._grouped_mm.default, (fake(8, 8), fake(2, 8, 8), fake(2, dtype=torch.int32))),
        (aten.bernoulli.default, (fake(5),), {"generator": torch.Generator()}),
        (aten.sin.default, (torch.empty(5, device="meta"),)),
    ],
    ids=lambda call: name_of(call[0]),
)
def test_what_reads_values_draws_shapes_or_raises_is_left_to_others(call: tuple[Any, ...]) -> None:
    func, args, kwargs = (*call, {})[:3]
    assert measured(func, *args, **kwargs) is None


def test_each_distinct_call_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known, runs = Operators(CPU), []

    def measure(*call: Any) -> CallCost:
        runs.append(call)
        return CallCost(1.0)

    monkeypatch.setattr(known, "_measure", measure)
    for size, number in ((8, 1), (8, 1), (8, 2), (9, 1)):
        known.measured(aten.add.Scalar, (fake(size), number), {})
    known.measured(aten.add.Scalar, (fake(8), 1.0), {})  # 1 == 1.0, and yet it is another call
    assert len(runs) == 4


def test_what_would_fill_the_memory_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "free_bytes", lambda _: 4 * 2**20)
    assert measured(aten.sin.default, fake(2**16)) is not None
    assert measured(aten.sin.default, fake(2**19)) is None
    assert Operators(CPU).measured(aten.ones.default, ([4],), {}, fake(2**19)) is None  # results count as operands do


def test_what_would_take_long_is_not_run_and_all_of_it_ends_once_that_has_taken_long() -> None:
    known = Operators(CPU)
    call: tuple[Any, Any, dict[str, Any]] = (aten.sin.default, (fake(8),), {})
    assert known.measured(*call, by_rates=2 * operators.MOST_SECONDS) is None
    assert known.measured(*call) is not None
    known._spent_seconds = 2 * operators.MOST_SECONDS_IN_ALL
    assert known.measured(*call) is not None  # it is known by now
    assert known.measured(aten.cos.default, (fake(8),), {}) is None


def test_integers_are_spread_over_what_they_may_index() -> None:
    made = Operators(CPU)._operand(fake(3, 4, dtype=torch.int64), state_on_host=False, bound=5)
    assert made.tolist() == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]
    assert operators._index_bound((fake(7, 9), [fake(30, dtype=torch.int64)], 4), {}) == 4


def test_random_state_the_caller_s_tensors_and_memory_are_as_before() -> None:
    gc.collect()
    values = torch.ones(100)
    state, before = torch.get_rng_state(), len(existing_tensors("cpu"))
    assert measured(aten.bernoulli_.float, values, 0.5) is not None
    assert torch.equal(values, torch.ones(100))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(existing_tensors("cpu")) == before
