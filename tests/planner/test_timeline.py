"""The line of events counts each storage once, from its birth to its death, to the byte."""

import gc
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from packlight.planner.tensors import existing_tensors, flat_tensors, inner_tensors, storage_bytes
from packlight.planner.timeline import Entry, Timeline
from packlight.records import CATEGORIES
from tests.cases import CASES

N = 1000
BYTES = 4 * N
"""A float32 tensor of N elements."""

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def line() -> Iterator[Timeline]:
    line = Timeline("cpu")
    yield line
    line.close()


def test_a_new_tensor_counts_until_it_dies(line: Timeline) -> None:
    with line:
        a = torch.empty(N)
        assert line.live_bytes == BYTES
        b = torch.empty(N, dtype=torch.float64)
        assert line.live_bytes == 3 * BYTES
        del a
        assert line.live_bytes == 2 * BYTES
        del b
    assert line.live_bytes == 0
    assert line.events == [0, 1, ~0, ~1]
    assert line.entries == [Entry(BYTES, 0, "loss", died=2), Entry(2 * BYTES, 1, "loss", died=3)]


def test_what_dies_after_the_mode_has_ended_is_still_followed(line: Timeline) -> None:
    with line:
        a = torch.empty(N)
    view = a[1:]
    del a
    assert line.live_bytes == BYTES, "the view keeps the storage"
    del view
    assert line.live_bytes == 0


def test_views_in_place_operators_and_expansions_take_no_bytes(line: Timeline) -> None:
    with line:
        a = torch.ones(N)
        made = [a.view(10, -1), a[::2], a.expand(7, N), a.t(), a.detach(), a.reshape(20, 50).transpose(0, 1)]
        a.add_(1).mul_(2).clamp_(max=3)
        made += [*a.chunk(4), *a.unbind(), a.real]
        assert line.live_bytes == BYTES
        made.append(a.expand(7, N).contiguous())
        assert line.live_bytes == 8 * BYTES
        made.append(a.view(20, 50).t().reshape(-1))
        assert line.live_bytes == 9 * BYTES


def test_a_slice_counts_as_the_whole_storage_that_it_keeps_alive(line: Timeline) -> None:
    with line:
        kept = torch.ones(N)[:1]
        assert line.live_bytes == BYTES
        kept = kept.clone()
        assert line.live_bytes == 4


def test_every_result_of_an_operator_counts(line: Timeline) -> None:
    with line:
        values, indices = torch.ones(N).sort()
        parts = torch._foreach_add([values, values], 1.0)
        assert line.live_bytes == BYTES + 2 * BYTES + 2 * BYTES
        del indices, parts
    assert line.live_bytes == BYTES


def test_a_temporary_inside_an_expression_raises_the_peak_only(line: Timeline) -> None:
    with line:
        a = torch.ones(N)
        b = (a + 1) * 2
        del a
    assert line.live_bytes == BYTES
    peak_bytes, _, _ = line.peak()
    assert peak_bytes == 3 * BYTES
    del b


def test_results_written_into_given_tensors_count_once_also_where_these_are_resized(line: Timeline) -> None:
    a = torch.ones(N)
    with line:
        out = torch.empty(N)
        torch.add(a, 1, out=out)
        assert line.live_bytes == BYTES
        grown = torch.empty(0)
        torch.add(a, 1, out=grown)
        assert line.live_bytes == 2 * BYTES
        grown.untyped_storage().resize_(0)
        grown.detach()
        assert line.live_bytes == BYTES
        del out, grown
    assert line.live_bytes == 0


def test_a_sparse_gradient_counts_with_its_indices_and_values(line: Timeline) -> None:
    table = nn.Embedding(N, 8, sparse=True)
    ids = torch.tensor([3, 3, 5, 8])
    line.leave_out(ids)
    with line:
        table(ids).sum().backward()
        assert table.weight.grad is not None and table.weight.grad.layout == torch.sparse_coo
        assert line.live_bytes == storage_bytes([table.weight.grad]) >= len(ids) * (8 + 4 * 8)
        assert line.index(table.weight.grad) is not None
        table.weight.grad = None
        assert line.live_bytes == 0


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr])
def test_sparse_tensors_are_the_plain_ones_inside(layout: torch.layout) -> None:
    dense = torch.diag(torch.ones(8))
    size = (2, 2) if layout == torch.sparse_bsr else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        sparse = dense.to_sparse(layout=layout, blocksize=size)
    parts = list(inner_tensors(sparse))
    assert [part.layout for part in parts] == [torch.strided] * len(parts)
    assert sum(part.sum() for part in parts if part.is_floating_point()) == 8
    assert {part.untyped_storage()._cdata for part in parts} <= {
        each.untyped_storage()._cdata for each in existing_tensors("cpu")
    }


def test_other_devices_do_not_count(line: Timeline) -> None:
    with line:
        a = torch.empty(N, device="meta")
        assert line.add(a) is None
        assert line.live_bytes == 0 and not line.entries


def test_existing_tensors_are_added_once_by_storage(line: Timeline) -> None:
    weight = torch.ones(N)
    assert line.add(weight, category="parameters") == 0
    assert line.add(weight[3:]) == 0
    assert line.index(weight.view(-1, 10)) == 0
    assert line.index(torch.ones(N)) is None
    assert line.live_bytes == BYTES
    assert line.entries[0].category == "parameters"


def test_a_category_can_be_told_later(line: Timeline) -> None:
    with line:
        a = torch.ones(N)
    line.add(a, category="gradients")
    assert line.peak()[2] == dict.fromkeys(CATEGORIES, 0) | {"gradients": BYTES}


def test_what_is_left_out_is_never_counted_nor_any_view_of_it(line: Timeline) -> None:
    weight = torch.ones(N)
    line.leave_out(weight)
    with line:
        views = [weight.detach(), weight[1:]]
        assert line.add(weight, category="parameters") is None
        assert line.index(weight) is None
    del weight, views
    assert line.live_bytes == 0 and not line.entries


def test_nothing_that_is_made_in_a_pause_counts_and_pauses_nest(line: Timeline) -> None:
    with line:
        with line.paused():
            with line.paused():
                a = torch.ones(N)
            b = torch.ones(N)
        assert line.live_bytes == 0
        c = torch.ones(N)
        assert line.live_bytes == BYTES
    del a, b, c


def test_a_pause_ends_with_an_exception(line: Timeline) -> None:
    with pytest.raises(KeyError), line, line.paused():
        raise KeyError
    with line:
        a = torch.ones(N)
    assert line.live_bytes == BYTES
    del a


def test_storages_made_inside_backward_count(line: Timeline) -> None:
    a, b = torch.ones(N, requires_grad=True), torch.ones(N, requires_grad=True)
    with line:
        loss = (a * b).exp().sum()
        forward_bytes = line.live_bytes
        assert forward_bytes == BYTES + 4, "exp keeps its result, mul keeps a and b that are not followed"
        loss.backward()
        assert line.live_bytes == 2 * BYTES + 4
    grown = [entry for entry in line.entries if entry.phase == "backward"]
    # mul of exp's gradient, then a gradient for each factor; the expanded gradient of sum takes nothing
    assert [entry.num_bytes for entry in grown if entry.num_bytes > 4] == [BYTES] * 3
    assert line.peak()[:2] == (4 + 4 + 3 * BYTES, "backward"), "exp's result goes before the last two are made"


@pytest.mark.parametrize("foreach", [False, True])
def test_storages_made_inside_an_optimiser_s_step_count(line: Timeline, foreach: bool) -> None:
    weights = [nn.Parameter(torch.ones(N)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.ones(N)
        line.leave_out(weight)
        line.leave_out(weight.grad)
    optimizer = torch.optim.AdamW(weights, foreach=foreach)
    with line:
        line.explicit_phase = "optimizer"
        optimizer.step()
    assert line.live_bytes == 3 * (2 * BYTES + 4), "two moments and a step count each"
    assert {entry.phase for entry in line.entries} == {"optimizer"}
    peak_bytes, phase, _ = line.peak()
    assert phase == "optimizer"
    assert peak_bytes > line.live_bytes, "it has temporaries too"
    more_bytes = line.highest_bytes() - line.live_bytes
    assert more_bytes == peak_bytes - line.live_bytes
    # all weights at once, or one weight and its root, quotient and denominator at a time
    assert more_bytes >= 3 * BYTES if foreach else more_bytes <= 3 * BYTES


def test_phases_are_told_apart(line: Timeline) -> None:
    weight = nn.Parameter(torch.ones(N))
    with line:
        line.explicit_phase = "forward"
        out = weight * 2
        line.explicit_phase = None
        loss = (out + 1).sum()
        loss.backward()
        line.explicit_phase = "optimizer"
        left = weight.grad * 2 if weight.grad is not None else None
    # weight * 2; out + 1, its sum and the gradient of that; the weight's gradient; twice that
    assert [entry.phase for entry in line.entries] == ["forward", "loss", "loss", "loss", "backward", "optimizer"]
    del left


def test_the_peak_is_divided_into_categories_that_add_up(line: Timeline) -> None:
    case = CASES["gpt"]()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
    case.value().backward()
    optimizer.step()
    for parameter in case.model.parameters():
        line.add(parameter, category="parameters")
        line.add(optimizer.state[parameter]["momentum_buffer"], category="optimizer_states")
    parameter_bytes = sum(parameter.nbytes for parameter in case.model.parameters())
    optimizer.zero_grad()
    with line:
        loss = case.value()
        held_bytes = line.live_bytes - 2 * parameter_bytes
        loss.backward()
        for parameter in case.model.parameters():
            line.add(parameter.grad, category="gradients")  # type: ignore[arg-type]
    peak_bytes, phase, by_category = line.peak()
    assert sum(by_category.values()) == peak_bytes and set(by_category) == set(CATEGORIES)
    assert phase in ("loss", "backward")
    assert by_category["parameters"] == by_category["optimizer_states"] == parameter_bytes
    assert 0 < by_category["activations"] <= held_bytes


def test_the_peak_can_be_asked_for_from_an_event_on(line: Timeline) -> None:
    with line:
        a = torch.ones(3 * N)
        del a
        start = line.now()
        b = torch.ones(N)
    assert line.peak()[0] == 3 * BYTES
    assert line.peak(start=start)[0] == BYTES
    del b


def test_highest_bytes_starts_anew_at_each_call(line: Timeline) -> None:
    with line:
        a = torch.ones(N)
        b = torch.ones(2 * N)
        del b
        assert line.highest_bytes() == 3 * BYTES
        assert line.highest_bytes() == BYTES
        b = torch.ones(N)
        assert line.highest_bytes() == 2 * BYTES
    del a, b


def test_the_line_keeps_nothing_alive(line: Timeline) -> None:
    case = CASES["convnet"]()
    with line:
        case.value().backward()
    case.model.zero_grad()
    del case
    gc.collect()
    assert line.live_bytes == 0
    assert sum(entry.num_bytes for entry in line.entries if entry.died is None) == 0


def test_events_and_entries_agree_over_a_whole_step(line: Timeline) -> None:
    case = CASES["bert"]()
    with line:
        case.value().backward()
    live, lives = 0, set()
    for at, event in enumerate(line.events):
        if event >= 0:
            assert line.entries[event].born == at and event not in lives
            lives.add(event)
            live += line.entries[event].num_bytes
        else:
            assert line.entries[~event].died == at
            lives.remove(~event)
            live -= line.entries[~event].num_bytes
    assert live == line.live_bytes
    assert lives == {at for at, entry in enumerate(line.entries) if entry.died is None}


def test_existing_tensors_finds_what_python_holds() -> None:
    held = {"deep": [torch.ones(N)]}
    assert any(tensor is held["deep"][0] for tensor in existing_tensors("cpu"))
    assert not any(tensor is held["deep"][0] for tensor in existing_tensors("meta"))


def test_flat_tensors_looks_into_outputs_of_every_kind() -> None:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    a, b, c = (torch.ones(at) for at in (1, 2, 3))
    nested = ({"x": a, "y": [b, "text", 3]}, CausalLMOutputWithPast(logits=c), None)
    found: list[Tensor] = list(flat_tensors(nested))
    assert [tensor.numel() for tensor in found] == [1, 2, 3]
