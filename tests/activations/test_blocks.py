"""Which parts of a model are the blocks that a choice is made for."""

import pytest
import torch
from torch import nn

from packlight.activations.blocks import find_blocks
from tests.cases import CASES, DoubleConv

NAMED = {
    "gpt": ["token", "position", *[f"blocks.{at}" for at in range(4)], "norm", "head"],
    "tied": ["token", "position", *[f"blocks.{at}" for at in range(4)], "norm", "head"],
    "lora": ["token", "position", *[f"blocks.{at}" for at in range(4)], "norm", "head"],
    "llama": [
        "model.embed_tokens",
        *[f"model.layers.{at}" for at in range(3)],
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ],
    "bert": ["embed", *[f"encoder.layers.{at}" for at in range(3)], "head"],
    "translator": [
        "embed",
        *[f"transformer.encoder.layers.{at}" for at in range(2)],
        "transformer.encoder.norm",
        *[f"transformer.decoder.layers.{at}" for at in range(2)],
        "transformer.decoder.norm",
        "head",
    ],
    "convnet": ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc"],
    "unet": ["inc", "down1", "down2", "up1", "conv1", "up2", "conv2", "outc"],
    "vit": ["patch", "layers.0", "layers.1", "layers.2", "head"],
    "lstm": ["embed", "lstm", "head"],
    "moe": ["embed", "layers.0", "layers.1", "layers.2", "head"],
    "flat": ["[0:12]", "[12:24]", "[24:28]"],
    "mlp": ["fc1", "fc2", "fc3"],
}


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_named_as_expected(name: str) -> None:
    assert [block.path for block in find_blocks(CASES[name]().model)] == NAMED[name]


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", CASES)
def test_every_path_resolves_and_no_block_lies_inside_another(name: str) -> None:
    model = CASES[name]().model
    covered: list[int] = []
    for block in find_blocks(model):
        module = model.get_submodule(block.module_path)
        assert (block.start is None) == (block.stop is None)
        parts = [module]
        if block.start is not None:
            assert isinstance(module, nn.Sequential)
            parts = list(module)[block.start : block.stop]
            assert parts, f"{block.path} holds no layer"
        covered += [id(inner) for part in parts for inner in part.modules()]
    assert len(covered) == len(set(covered)), "a module belongs to two blocks"


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("vit", "lora")])
def test_every_parameter_belongs_to_a_block_unless_the_model_itself_holds_it(name: str) -> None:
    model = CASES[name]().model
    in_blocks = {
        id(parameter)
        for block in find_blocks(model)
        for parameter in model.get_submodule(block.module_path).parameters()
    }
    assert in_blocks == {id(parameter) for parameter in model.parameters()}


def test_blocks_of_t5_are_the_layers_of_encoder_and_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    paths = [block.path for block in find_blocks(T5ForConditionalGeneration(config))]
    for stack in ("encoder", "decoder"):
        assert [path for path in paths if path.startswith(f"{stack}.block")] == [
            f"{stack}.block.{at}" for at in range(3)
        ]
    assert {"shared", "lm_head"} < set(paths)


def test_blocks_of_transformers_bert_and_gpt2_are_their_layers() -> None:
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    bert = BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0))
    layers = [block.path for model in (bert, gpt2) for block in find_blocks(model) if block.path[-1].isdigit()]
    assert layers == [f"bert.encoder.layer.{at}" for at in range(3)] + [f"transformer.h.{at}" for at in range(3)]


def test_a_shared_module_is_one_block() -> None:
    shared = DoubleConv(4, 4)
    model = nn.ModuleDict({"first": shared, "second": DoubleConv(4, 4), "again": shared})
    assert [block.path for block in find_blocks(model)] == ["first", "second"]


@pytest.mark.parametrize("num_linear", [4, 5, 9, 16, 17])
def test_a_flat_sequential_is_cut_into_about_the_root_of_its_layers_without_a_gap(num_linear: int) -> None:
    model = nn.Sequential(*[layer for _ in range(num_linear) for layer in (nn.Linear(4, 4), nn.ReLU())])
    blocks = find_blocks(model)
    starts, stops = [block.start for block in blocks], [block.stop for block in blocks]
    assert starts == [0, *stops[:-1]] and stops[-1] == len(model)
    assert all(isinstance(model[start], nn.Linear) for start in starts if start is not None)
    longest = max((stop or 0) - (start or 0) for start, stop in zip(starts, stops, strict=True)) // 2
    assert longest - 1 < num_linear**0.5 <= longest


def test_a_model_without_parts_has_no_blocks() -> None:
    assert find_blocks(nn.Linear(2, 2)) == []
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) != []


def test_finding_blocks_changes_nothing() -> None:
    model = CASES["convnet"]().model
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    find_blocks(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
