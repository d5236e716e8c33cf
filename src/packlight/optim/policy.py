"""Which parameter gets which state format.

Low-bit states are worth their loss where the bytes are: in the large matrices. Norms, biases and other vectors
have few elements and much effect, and an embedding's rows are touched so rarely that blocks mix used and unused
ones. So a format that is named once for a whole model means: vectors and tensors of at most 4096 elements in fp32,
embeddings in 8 bits if the rest has 4, and the rest as named. A mapping or a callable decides for each parameter by
its name instead;
only the small tensors stay in fp32 then too, which is the formats' own rule. The published formats have the
published rule: everything above 4096 elements.

Names can mislead: where the model is at hand, `formats_of` goes by its modules. Otherwise the decision needs nothing
but name and full shape, so one device, shards and a resumed run agree on it.

Source: Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", NeurIPS 2023 (arXiv 2309.01507),
appendix D.1 (small tensors, norms and biases); the embedding rule is that of 8-bit optimisers, Dettmers et al.,
ICLR 2022 (arXiv 2110.02861), section 2.3.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from packlight.numerics.formats import moment_formats

StateFormatChoice = str | Mapping[str, str] | Callable[[str], str]

EMBEDDING_FORMATS = {"4bit": "8bit"}
OWN_FORMATS = frozenset({"4bit", "8bit", "fp8"})
# The module that holds the weight: word_embeddings, position_embedding, tok_emb, pos_embed; embed_tokens, embed_in;
# wte and wpe (GPT-2), shared (T5, BART). Not patch embeddings, which are convolutions, nor embed_out and unembeddings,
# which are heads, nor projections between widths (embeddings_project, embedding_hidden_mapping_in).
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:"
    r"(?!\w*(?:patch|output|unembed))\w*(?:embed|embeds|embedding|embeddings|(?:\b|_)emb)"
    r"|embed(?:ding)?_(?:tokens?|positions?|words?|types?|in|table)"
    r"|wte|wpe|shared"
    r")(?:\.weight)?$",
    re.IGNORECASE,
)


def format_of(
    choice: StateFormatChoice, *, name: str | None, shape: Sequence[int], embedding: bool | None = None
) -> str:
    """Return the state format of one parameter.

    Args:
        choice: a format's name, a mapping from every parameter's name to one, or a callable.
        name: the parameter's name in its model; None where the optimiser was not told.
        shape: the parameter's full shape.
        embedding: whether it is an embedding's weight; None: told by its name.

    Returns:
        A key of `numerics.FORMATS`.

    Raises:
        ValueError: an unknown format, no name where the choice is by name, or a mapping without it.
    """
    if isinstance(choice, str):
        moment_formats(choice, tuple(shape))
        if choice not in OWN_FORMATS:
            return choice
        if len(shape) <= 1:
            return "fp32"
        if embedding is None:
            embedding = name is not None and is_embedding(name)
        return EMBEDDING_FORMATS.get(choice, choice) if embedding else choice
    if name is None:
        raise ValueError(
            "state_format is given by parameter name, but the parameters have no names. "
            "Pass model.named_parameters() instead of model.parameters()."
        )
    if isinstance(choice, Mapping) and name not in choice:
        raise ValueError(
            f"state_format has no entry for the parameter {name!r}. "
            "Add one, or pass a callable: lambda name: mapping.get(name, '4bit')."
        )
    chosen = choice[name] if isinstance(choice, Mapping) else choice(name)
    moment_formats(chosen, tuple(shape))
    return chosen


def formats_of(model: nn.Module, choice: str) -> dict[str, str]:
    """Return every parameter's format as a name once for all gives it, with embeddings told by their modules.

    Args:
        model: the model; its embeddings are the `nn.Embedding` and `nn.EmbeddingBag` in it.
        choice: a format's name.

    Returns:
        From each parameter's name to its format, for an optimiser's `state_format`.

    Raises:
        ValueError: an unknown format.

    Example:
        >>> formats_of(nn.ModuleDict({"table": nn.Embedding(200, 64), "up": nn.Linear(64, 256)}), "4bit")
        {'table.weight': '8bit', 'up.weight': '4bit', 'up.bias': 'fp32'}
    """
    modules = (each for each in model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag))
    tables = {id(module.weight) for module in modules}
    return {
        name: format_of(choice, name=name, shape=param.shape, embedding=id(param) in tables)
        for name, param in model.named_parameters()
    }


def is_embedding(name: str) -> bool:
    """Tell from a parameter's name whether it is an embedding's weight.

    Args:
        name: as `model.named_parameters()` gives it.

    Returns:
        True for names such as "transformer.wte.weight", "shared.weight" and "embeddings.word_embeddings.weight".
    """
    return _EMBEDDING.search(name) is not None
