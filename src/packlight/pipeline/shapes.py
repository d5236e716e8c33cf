"""Transformers by their shape: what a stage of layers computes, holds for backward and sends on, by arithmetic.

A profile needs the model; a pipeline is chosen before there is one on any rank. So a layer's matrices and what autograd
saves of it are counted from a row of a table. Per token, in elements of 2 bytes, h wide, with f in the middle and g for
keys and values together:

    saved anyway        input of both norms 2h, queries h, keys and values g, attention's output h, in front of the
                        activation f (2f where it is gated)
    recomputed or saved outputs of both norms 2h, behind the activation f (2f), dropout's masks h, where it has them

For GPT (f = 4h, g = 2h) that is 20 and 34 bytes times batch, sequence and h, as in Wan et al., "PipeOffload"
(arXiv 2503.01328), appendix C; what is recomputed are norms, activations and masks, which takes next to no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from packlight.pipeline.schedule import ScheduleError
from packlight.pipeline.simulate import StageCost

ELEMENT_BYTES = 2
"""Activations and their gradients are in 16 bits."""
LOGIT_BYTES = 2 + 4
"""Of a logit held for backward: in 16 bits, and its loss in fp32."""


@dataclass(frozen=True)
class Shape:
    """A transformer's shape.

    Attributes:
        name: what a user calls it.
        num_layers, hidden, num_heads, num_kv_heads, inner, vocabulary: its numbers.
        is_gated: whether the activation multiplies two projections (SwiGLU).
        has_dropout: whether masks are saved.
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    inner: int
    vocabulary: int
    is_gated: bool = True
    has_dropout: bool = False

    @property
    def kv_width(self) -> int:
        """Elements of keys and values of one token, together."""
        return 2 * self.hidden // self.num_heads * self.num_kv_heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        projections = 3 if self.is_gated else 2
        return self.hidden * (2 * self.hidden + self.kv_width + projections * self.inner)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; of the head as well."""
        return self.hidden * self.vocabulary

    def layer_bytes(self, *, recompute: bool) -> int:
        """Return what a layer saves of one token.

        Args:
            recompute: whether norms, activations and dropout are computed again in backward.
        """
        wide = (2 if self.is_gated else 1) * self.inner
        saved = 4 * self.hidden + self.kv_width + wide
        return ELEMENT_BYTES * saved + (0 if recompute else self.elementwise_bytes)

    @property
    def elementwise_bytes(self) -> int:
        """Bytes of one token's results of norms, activation and dropout in a layer."""
        wide = (2 if self.is_gated else 1) * self.inner
        return ELEMENT_BYTES * (2 * self.hidden + wide + (self.hidden if self.has_dropout else 0))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one token's gradients of what a layer's matrices return: they wait for the weights' gradients."""
        wide = (2 if self.is_gated else 1) * self.inner
        return ELEMENT_BYTES * (3 * self.hidden + self.kv_width + wide)

    def layer_flops(self, sequence_length: int) -> int:
        """Return the floating-point operations of one token's forward in one layer, attention to all tokens counted."""
        return 2 * self.layer_parameters + 4 * sequence_length * self.hidden


# Layers, width, heads, heads of keys and values, inner width, vocabulary, as published.
SHAPES = {
    each.name: each
    for each in (
        # Touvron et al., "LLaMA", arXiv 2302.13971, table 2; the inner width is in the released configurations
        Shape("llama-7b", 32, 4096, 32, 32, 11008, 32000),
        Shape("llama-13b", 40, 5120, 40, 40, 13824, 32000),
        Shape("llama-33b", 60, 6656, 52, 52, 17920, 32000),
        Shape("llama-65b", 80, 8192, 64, 64, 22016, 32000),
        # Touvron et al., "Llama 2", arXiv 2307.09288
        Shape("llama2-70b", 80, 8192, 64, 8, 28672, 32000),
        # Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783, table 3
        Shape("llama3-8b", 32, 4096, 32, 8, 14336, 128256),
        Shape("llama3-70b", 80, 8192, 64, 8, 28672, 128256),
        Shape("llama3-405b", 126, 16384, 128, 8, 53248, 128256),
        # Brown et al., "Language Models are Few-Shot Learners", arXiv 2005.14165, table 2.1
        Shape("gpt3-13b", 40, 5140, 40, 40, 20560, 50257, is_gated=False, has_dropout=True),
        Shape("gpt3-175b", 96, 12288, 96, 96, 49152, 50257, is_gated=False, has_dropout=True),
    )
}


def shape_named(name: str) -> Shape:
    """Look a shape up by its name.

    Returns:
        The shape.

    Raises:
        ValueError: there is none of this name; the message lists those that there are.

    >>> shape_named("llama-13b").layer_parameters * 40 // 10**9
    12
    """
    if name not in SHAPES:
        raise ValueError(f"model {name!r} is not known; wanted one of {', '.join(SHAPES)}")
    return SHAPES[name]


@dataclass(frozen=True)
class Rates:
    """What a rank does in a second.

    Attributes:
        flops_per_second: in 16-bit matrix products, as a training step reaches them.
        hop_bytes_per_second: from one rank to the next.
    """

    flops_per_second: float
    hop_bytes_per_second: float


def stage_costs(
    shape: Shape,
    num_stages: int,
    rates: Rates,
    *,
    sequence_length: int,
    microbatch_size: int = 1,
    recompute: bool = True,
) -> list[StageCost]:
    """Cost each stage for one microbatch.

    Layers are dealt out as evenly as can be, the larger stages first; the first stage has the embedding, the last one
    the head and the loss. Backward has twice the forward's operations; as many as the forward's matrices have are for
    the weights, and attention, which has none, falls to the gradient of the input.

    Args:
        shape: of the model.
        num_stages: of the whole pipeline.
        rates: of each rank.
        sequence_length: in tokens.
        microbatch_size: in sequences.
        recompute: whether norms, activations and dropout are computed again in backward.

    Returns:
        By stage.

    Raises:
        ScheduleError: there are more stages than layers, or a number below 1.
    """
    for name, number in (("sequence length", sequence_length), ("microbatch size", microbatch_size)):
        if number < 1:
            raise ScheduleError(f"a {name} of {number} came; wanted 1 or more")
    num_tokens = sequence_length * microbatch_size
    sent_bytes = ELEMENT_BYTES * num_tokens * shape.hidden
    costs = []
    for stage, num_layers in enumerate(layers_of(shape, num_stages)):
        is_last = stage == num_stages - 1
        head_flops = 2 * shape.embedding_parameters * is_last
        flops = num_layers * shape.layer_flops(sequence_length) + head_flops
        in_weights = 2 * num_layers * shape.layer_parameters + head_flops
        forward_seconds = num_tokens * flops / rates.flops_per_second
        weight_seconds = num_tokens * in_weights / rates.flops_per_second
        movable_bytes = num_tokens * num_layers * shape.layer_bytes(recompute=recompute)
        logit_bytes = num_tokens * shape.vocabulary * LOGIT_BYTES * is_last
        again_bytes = num_tokens * shape.elementwise_bytes * recompute
        waiting_bytes = num_tokens * num_layers * shape.gradient_bytes
        received_bytes = sent_bytes if stage else 0
        backward_bytes = waiting_bytes + again_bytes + received_bytes + logit_bytes
        costs.append(
            StageCost(
                forward_seconds=forward_seconds,
                input_seconds=2 * forward_seconds - weight_seconds,
                weight_seconds=weight_seconds,
                held_bytes=movable_bytes + logit_bytes,
                movable_bytes=movable_bytes,
                message_bytes=0 if is_last else sent_bytes,
                unheld_bytes=0 if is_last else sent_bytes,
                waiting_bytes=waiting_bytes if stage else 0,
                forward_bytes=again_bytes + received_bytes,
                input_bytes=backward_bytes,
                backward_bytes=backward_bytes,
                hop_seconds=sent_bytes / rates.hop_bytes_per_second,
            )
        )
    return costs


def layers_of(shape: Shape, num_stages: int) -> list[int]:
    """Deal layers out to stages.

    Returns:
        How many each stage has.

    Raises:
        ScheduleError: there are more stages than layers.
    """
    if num_stages > shape.num_layers:
        raise ScheduleError(
            f"{num_stages} stages came for the {shape.num_layers} layers of {shape.name}; "
            f"wanted at most {shape.num_layers}"
        )
    few, more = divmod(shape.num_layers, num_stages)
    return [few + (stage < more) for stage in range(num_stages)]


def parameters_of(shape: Shape, num_ranks: int, num_chunks: int) -> Sequence[int]:
    """Count each rank's parameters, of its stages."""
    layers = layers_of(shape, num_ranks * num_chunks)
    counts = [sum(layers[rank::num_ranks]) * shape.layer_parameters for rank in range(num_ranks)]
    counts[0] += shape.embedding_parameters
    counts[-1] += shape.embedding_parameters
    return counts
