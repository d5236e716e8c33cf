"""One format named for a whole model means: vectors in fp32, embeddings in 8 bits, the rest as named."""

import pytest
import torch
from torch import nn

from packlight.numerics import FORMATS
from packlight.numerics.formats import MAX_FP32_ELEMENTS
from packlight.optim import AdamW
from packlight.optim.policy import StateFormatChoice, format_of, formats_of, is_embedding
from packlight.optim.state import init_state
from tests.cases import CASES, GPT, Bert

# As PyTorch's own examples, transformers, timm and fairseq name them.
EMBEDDINGS = [
    *("transformer.wte.weight", "transformer.wpe.weight", "wte.weight", "model.embed_tokens.weight"),
    *("bert.embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "embed.weight"),
    *("encoder.embedding.weight", "tok_emb.weight", "pos_emb.weight", "pos_embed", "embedding.weight"),
    *("shared.weight", "model.shared.weight", "gpt_neox.embed_in.weight", "transformer.tokens_embed.weight"),
    *("decoder.embed_positions.weight", "tok_embeddings.weight", "userEmbedding.weight", "item_embedding.weight"),
]
OTHERS = [
    *("lm_head.weight", "patch_embed.proj.weight", "vit.embeddings.patch_embeddings.projection.weight"),
    *(
        "layers.0.self_attn.q_proj.weight",
        "member.weight",
        "embeddings.LayerNorm.bias",
        "weight",
        "0.weight",
        "emb.0.weight",
        *(
            "embed_out.weight",
            "unembed.weight",
            "output_embedding.weight",
            "shared.0.weight",
            "mlp.shared_expert.weight",
        ),
        *(
            "embeddings.patch_embedding.weight",
            "embeddings_project.weight",
            "encoder.embedding_hidden_mapping_in.weight",
        ),
    ),
]
MATRIX, VECTOR = (100, 70), (9001,)
BY_NAME = {"a": "8bit", "b": "paper4bit"}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding_is_told_by_its_name(name: str) -> None:
    assert is_embedding(name)


@pytest.mark.parametrize("name", OTHERS)
def test_other_parameter_is_no_embedding(name: str) -> None:
    assert not is_embedding(name)


@pytest.mark.parametrize("case", ["gpt", "bert", "convnet", "lstm", "moe", "translator", "unet", "vit", "llama"])
def test_only_embeddings_of_real_models_are_taken_for_embeddings(case: str, seed: int) -> None:
    model = CASES[case]().model
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    found = {name for name, _ in model.named_parameters() if is_embedding(name)}
    assert found <= tables
    assert bool(found) is (case in ("bert", "lstm", "moe", "translator", "llama"))


@pytest.mark.parametrize(
    ("choice", "name", "shape", "expected"),
    [
        ("4bit", None, MATRIX, "4bit"),
        ("4bit", "head.weight", MATRIX, "4bit"),
        ("4bit", "embed.weight", MATRIX, "8bit"),
        ("4bit", None, VECTOR, "fp32"),
        ("4bit", "embed", VECTOR, "fp32"),
        ("4bit", None, (), "fp32"),
        ("8bit", "embed.weight", MATRIX, "8bit"),
        ("8bit", None, VECTOR, "fp32"),
        ("fp8", "embed.weight", MATRIX, "fp8"),
        ("fp8", None, VECTOR, "fp32"),
        ("fp32", "embed.weight", MATRIX, "fp32"),
        ("paper4bit", "embed.weight", MATRIX, "paper4bit"),
        ("paper4bit", None, VECTOR, "paper4bit"),
        ("factored", None, VECTOR, "factored"),
        (BY_NAME, "a", VECTOR, "8bit"),
        (BY_NAME, "b", MATRIX, "paper4bit"),
        (dict.fromkeys(["embed.weight"], "4bit"), "embed.weight", MATRIX, "4bit"),
        (lambda name: "fp8" if name == "a" else "fp32", "a", VECTOR, "fp8"),
        (lambda name: "fp8" if name == "a" else "fp32", "b", MATRIX, "fp32"),
    ],
)
def test_format_follows_the_rule(
    choice: StateFormatChoice, name: str | None, shape: tuple[int, ...], expected: str
) -> None:
    assert format_of(choice, name=name, shape=shape) == expected


@pytest.mark.parametrize(
    ("choice", "name", "match"),
    [
        ("5bit", None, "'5bit'"),
        ("", None, "unknown state format"),
        (BY_NAME, None, "named_parameters"),
        (BY_NAME, "c", "'c'"),
        ({"c": "5bit"}, "c", "'5bit'"),
        (lambda name: f"{name}bit", "5", "'5bit'"),
        (lambda name: "4bit", None, "named_parameters"),
    ],
)
def test_format_that_cannot_be_told_is_refused(choice: StateFormatChoice, name: str | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        format_of(choice, name=name, shape=MATRIX)


def test_formats_of_a_model_are_told_by_its_modules_whatever_their_names() -> None:
    net = nn.Module()
    net.table, net.head = nn.Embedding(100, 70), nn.Linear(70, 100, bias=False)
    net.embed_tokens, net.tied = nn.Linear(70, 100), nn.Linear(70, 100, bias=False)
    net.bag = nn.EmbeddingBag(100, 70)
    net.tied.weight = net.table.weight
    assert formats_of(net, "4bit") == {
        "table.weight": "8bit",
        "head.weight": "4bit",
        "embed_tokens.weight": "4bit",
        "embed_tokens.bias": "fp32",
        "bag.weight": "8bit",
    }
    (group,) = AdamW(net.named_parameters(), state_format=formats_of(net, "4bit")).param_groups
    assert group["state_formats"] == list(formats_of(net, "4bit").values())
    assert set(formats_of(net, "fp8").values()) == {"fp8", "fp32"}
    with pytest.raises(ValueError, match="'5bit'"):
        formats_of(net, "5bit")


@pytest.mark.parametrize("state_format", FORMATS)
def test_small_tensors_are_stored_in_fp32_whatever_is_named(state_format: str) -> None:
    small, large = torch.zeros(MAX_FP32_ELEMENTS // 64, 64), torch.zeros(MAX_FP32_ELEMENTS // 64 + 1, 64)
    assert set(init_state(small, state_format)) == {"step", "exp_avg", "exp_avg_sq"}
    assert ("exp_avg" in init_state(large, state_format)) is (state_format == "fp32")


def test_every_parameter_of_a_model_has_its_format_in_the_param_group(seed: int) -> None:
    model = Bert(width=96, num_layers=1)
    (group,) = AdamW(model.named_parameters()).param_groups
    formats = dict(zip(group["param_names"], group["state_formats"], strict=True))
    assert formats.pop("embed.weight") == "8bit"
    assert formats == {
        name: "4bit" if param.ndim > 1 else "fp32" for name, param in model.named_parameters() if name in formats
    }
    assert "state_format" not in group


def test_without_names_an_embedding_is_a_matrix_like_others(seed: int) -> None:
    model = Bert(width=96, num_layers=1)
    (group,) = AdamW(model.parameters()).param_groups
    assert set(group["state_formats"]) == {"4bit", "fp32"}


def test_tied_weight_has_one_state_under_its_first_name(seed: int) -> None:
    model = GPT(width=64, num_layers=1, tied=True)
    seen = []

    def choice(name: str) -> str:
        seen.append(name)
        return "4bit"

    optimizer = AdamW(model.named_parameters(), state_format=choice)
    assert seen == [name for name, _ in model.named_parameters()]
    assert "token.weight" in seen
    assert "head.weight" not in seen
    assert len(optimizer.param_groups[0]["state_formats"]) == len(list(model.parameters()))
