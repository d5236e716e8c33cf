"""Batches that are split where that is asked for: gradients add up, and the peak is the one that was predicted."""

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packlight.budget import BudgetError
from packlight.planner.apply import fit
from packlight.planner.microbatches import NOT_SPLIT, num_rows, numbers, split
from packlight.planner.plan import plan

pytestmark = pytest.mark.usefixtures("seed")

WIDTH = 64


class Wide(nn.Module):
    """No blocks, and a softmax that cannot be rounded: little can be spared but by fewer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).softmax(-1))
        return out


def loss(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(output, batch["x"][:, :1])


def batch_of(rows: int) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, WIDTH) + 1}  # gradients of the loss do not cancel: they can be compared closely


def smallest_bytes(model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, **options: Any) -> int:
    with pytest.raises(BudgetError) as error:
        plan(model, batch, optimizer, budget=1, loss=loss, **options)
    assert error.value.smallest_bytes is not None
    return error.value.smallest_bytes


def test_a_split_batch_fits_a_budget_that_the_whole_does_not_and_gradients_add_up() -> None:
    model, batch = Wide(), batch_of(1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    whole = torch.autograd.grad(loss(model(**batch), batch), list(model.parameters()))
    whole_bytes = smallest_bytes(model, batch, optimizer)
    budget = smallest_bytes(model, batch, optimizer, max_microbatches=4)
    assert budget < whole_bytes
    handle = fit(model, optimizer, batch, budget=budget, loss=loss, max_microbatches=4)
    with handle:
        assert handle.plan.num_microbatches == 4 and "in 4 microbatches" in str(handle.plan)
        for _ in range(3):
            for part, share in handle.microbatches(batch):
                output = model(**part)
                (loss(output, part) * share).backward()
            optimizer.step()
            optimizer.zero_grad()
        measured = handle.measurement
        for part, share in handle.microbatches(batch):
            (loss(model(**part), part) * share).backward()
    assert measured is not None and measured.device_peak_bytes <= budget
    assert measured.device_peak_bytes == pytest.approx(handle.plan.estimate.device_peak_bytes, rel=0.02)
    assert handle.plan.num_microbatches == 4
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        gradient = parameter.grad
        assert gradient is not None and (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_a_batch_stays_whole_where_it_fits_or_bits_shall_stay() -> None:
    model, batch = Wide(), batch_of(256)
    optimizer = torch.optim.AdamW(model.parameters())
    made = plan(model, batch, optimizer, budget="1GiB", loss=loss, max_microbatches=8)
    assert made.num_microbatches == 1 and made.estimate.slowdown == 1
    exact = smallest_bytes(model, batch, optimizer, max_microbatches=8, exact=True)
    assert exact == smallest_bytes(model, batch, optimizer, exact=True)


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("num", [1, 2, 4, 16])
def test_parts_are_all_of_the_batch_once_and_shares_its_rows(rows: int, num: int) -> None:
    scale, x = torch.tensor(2.0), torch.randn(rows, 3)
    batch = {"x": x, "pair": (x + 1, [x + 2]), "scale": scale, "name": "text"}
    parts = list(split(batch, num))
    sizes = [len(part["x"]) for part, _ in parts]
    assert len(parts) == min(num, rows) and sum(share for _, share in parts) == pytest.approx(1)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert torch.equal(torch.cat([part["x"] for part, _ in parts]), x)
    assert torch.equal(torch.cat([part["pair"][1][0] for part, _ in parts]), x + 2)
    assert all(part["scale"] is scale and part["name"] == "text" for part, _ in parts)
    assert all(len(part["x"]) == round(share * rows) for part, share in parts)
    assert all(part["x"].untyped_storage()._cdata == x.untyped_storage()._cdata for part, _ in parts)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_named_tuples_and_a_tokeniser_s_own_mapping_are_split_too() -> None:
    x = torch.randn(6, 3)
    pairs = [part for part, _ in split(Pair(x, x + 1), 2)]
    assert all(isinstance(part, Pair) for part in pairs)
    assert torch.equal(torch.cat([part.y for part in pairs]), x + 1)
    mappings = [part for part, _ in split(UserDict(x=x), 3)]
    assert len(mappings) == 3 and torch.equal(torch.cat([part["x"] for part in mappings]), x)


def test_a_batch_that_stays_whole_is_the_same_object() -> None:
    batch = Pair(torch.randn(4, WIDTH), torch.randn(4, WIDTH))
    ((part, share),) = split(batch, 1)
    assert part is batch and share == 1


def test_mappings_inside_of_others_are_split() -> None:
    x = torch.randn(4, 3)
    parts = [part for part, _ in split((UserDict(x=x), {"y": UserDict(y=x + 1)}), 2)]
    assert torch.equal(torch.cat([part[0]["x"] for part in parts]), x)
    assert torch.equal(torch.cat([part[1]["y"]["y"] for part in parts]), x + 1)


def test_no_row_is_alone_beside_larger_parts() -> None:
    assert numbers(torch.randn(9, 3), 8) == [1, 2, 4]
    assert numbers(torch.randn(8, 3), 8) == [1, 2, 4, 8]
    assert numbers(torch.randn(3, 3), 8) == [1]


def test_a_batch_of_two_lengths_as_frequent_is_not_split() -> None:
    graph = {"x": torch.randn(6, 3), "edges": torch.zeros(2, 9)}
    assert num_rows(graph) == 0 and numbers(graph, 4) == [1]


class Choosy(Wide):
    """Refuses one number of rows, as a batch norm refuses a single one."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 512:
            raise ValueError("too few rows")
        return super().forward(x)


def test_a_number_that_cannot_be_traced_is_left_out_with_a_note() -> None:
    model, batch = Choosy(), batch_of(1024)
    optimizer = torch.optim.AdamW(model.parameters())
    whole, parts = (smallest_bytes(model, batch, optimizer, max_microbatches=most) for most in (1, 4))
    assert parts < whole
    made = plan(model, batch, optimizer, budget=parts, loss=loss, max_microbatches=4)
    assert made.num_microbatches == 4
    assert any(note.startswith("not in 2 microbatches: ") for note in made.notes)


def test_the_smallest_budget_is_that_of_all_numbers_tried() -> None:
    model, batch = Wide(), batch_of(512)
    optimizer = torch.optim.AdamW(model.parameters())
    least, whole = (smallest_bytes(model, batch, optimizer, max_microbatches=most) for most in (4, 1))
    made = plan(model, batch, optimizer, budget=least, loss=loss, max_microbatches=4)
    assert least < whole and made.num_microbatches == 4 and made.smallest_budget_bytes == least


@pytest.mark.parametrize("options", [{"exact": True}, {}])
def test_a_batch_that_cannot_be_split_is_planned_whole_and_a_note_says_so(options: dict[str, Any]) -> None:
    model, batch = Wide(), batch_of(8 if options else 1)
    made = plan(
        model, batch, torch.optim.AdamW(model.parameters()), budget="1GiB", loss=loss, max_microbatches=8, **options
    )
    assert made.num_microbatches == 1 and NOT_SPLIT in made.notes


def test_on_the_meta_device_the_whole_batch_lives_beside_a_part() -> None:
    with torch.device("meta"):
        model, batch = Wide(), {"x": torch.empty(4096, WIDTH)}
    optimizer = torch.optim.AdamW(model.parameters())
    whole_bytes = smallest_bytes(model, batch, optimizer)
    budget = smallest_bytes(model, batch, optimizer, max_microbatches=4)
    made = plan(model, batch, optimizer, budget=budget, loss=loss, max_microbatches=4)
    assert budget < whole_bytes and made.num_microbatches == 4
    assert made.estimate.peak_by_category["other"] >= batch["x"].nbytes


def test_what_has_no_rows_is_not_split() -> None:
    assert num_rows({"x": torch.tensor(1.0), "n": 3}) == 0
    assert numbers(torch.tensor(1.0), 8) == [1] and numbers(torch.randn(4), 8) == [1, 2, 4]
    with pytest.raises(ValueError, match="max_microbatches=0 came; wanted 1"):
        numbers(torch.randn(3), 0)
