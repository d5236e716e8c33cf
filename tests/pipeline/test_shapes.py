"""Bytes and operations of transformers by their shape: the published figures, and sums that have to agree."""

import random

import pytest

from packlight.pipeline.schedule import ScheduleError
from packlight.pipeline.shapes import SHAPES, Rates, Shape, layers_of, parameters_of, shape_named, stage_costs

pytestmark = pytest.mark.usefixtures("seed")

RATES = Rates(220e12, 24e9)
# Parameters in billions, by their papers' names; Llama 3's count embeddings of 128,256 tokens twice.
BILLIONS = {
    "llama-7b": 6.7,
    "llama-13b": 13.0,
    "llama-33b": 32.5,
    "llama-65b": 65.2,
    "llama2-70b": 69.0,
    "llama3-8b": 8.0,
    "llama3-70b": 70.6,
    "llama3-405b": 405.0,
    "gpt3-13b": 12.9,
    "gpt3-175b": 174.6,
}


def gpt(hidden: int) -> Shape:
    return Shape("gpt", 8, hidden, hidden // 128, hidden // 128, 4 * hidden, 50257, is_gated=False, has_dropout=True)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_as_many_as_the_name_says(name: str) -> None:
    shape = shape_named(name)
    heads = 1 if name.startswith("gpt3") else 2  # GPT-3's head is its embedding
    total = shape.num_layers * shape.layer_parameters + heads * shape.embedding_parameters
    assert total / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)


@pytest.mark.parametrize("hidden", [1024, 4096, 10240])
def test_a_gpt_layer_holds_34_or_20_bytes_a_token_and_element(hidden: int) -> None:
    assert gpt(hidden).layer_bytes(recompute=False) == 34 * hidden
    assert gpt(hidden).layer_bytes(recompute=True) == 20 * hidden


def test_a_gpt_layer_does_24_h_squared_and_4_s_h_operations_a_token() -> None:
    assert gpt(4096).layer_flops(8192) == 24 * 4096**2 + 4 * 8192 * 4096


def test_stages_add_up_to_the_model_and_backward_takes_twice_the_forward() -> None:
    for shape in SHAPES.values():
        num_ranks, num_chunks = random.randint(1, 8), random.randint(1, 4)
        num_stages, length, size = num_ranks * num_chunks, random.randint(1, 9000), random.randint(1, 4)
        costs = stage_costs(shape, num_stages, RATES, sequence_length=length, microbatch_size=size)
        assert len(costs) == num_stages and sum(layers_of(shape, num_stages)) == shape.num_layers
        tokens = length * size
        flops = shape.num_layers * shape.layer_flops(length) + 2 * shape.embedding_parameters
        assert sum(cost.forward_seconds for cost in costs) == pytest.approx(tokens * flops / 220e12)
        for cost in costs:
            assert cost.input_seconds + cost.weight_seconds == pytest.approx(2 * cost.forward_seconds)
            assert cost.input_seconds >= cost.forward_seconds * (1 - 1e-12)
        assert sum(cost.movable_bytes for cost in costs) == tokens * shape.num_layers * shape.layer_bytes(
            recompute=True
        )
        assert costs[-1].held_bytes - costs[-1].movable_bytes == 6 * tokens * shape.vocabulary
        assert all(cost.held_bytes == cost.movable_bytes for cost in costs[:-1])
        counted = parameters_of(shape, num_ranks, num_chunks)
        assert sum(counted) == shape.num_layers * shape.layer_parameters + 2 * shape.embedding_parameters


def test_layers_are_dealt_out_evenly_the_larger_stages_first() -> None:
    assert layers_of(shape_named("llama-13b"), 32) == [2] * 8 + [1] * 24


def test_what_cannot_be_costed_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="'llama-14b' is not known; wanted one of llama-7b, llama-13b"):
        shape_named("llama-14b")
    with pytest.raises(ScheduleError, match=r"41 stages came for the 40 layers of llama-13b.*at most 40"):
        layers_of(shape_named("llama-13b"), 41)
    for length, size, name in ((0, 1, "sequence length of 0"), (1, 0, "microbatch size of 0")):
        with pytest.raises(ScheduleError, match=name):
            stage_costs(shape_named("llama-7b"), 2, RATES, sequence_length=length, microbatch_size=size)
