"""Flat partitions: what DeepSpeed's ZeRO puts in the place of the parameters that an optimiser was built with.

ZeRO gives the optimiser one flat fp32 tensor per param group (stage 3: per sub-group), which holds this process's share
of all parameters end to end. Blocks that crossed from one parameter into the next would mix an embedding's numbers
with a norm's, and a format chosen by name would have nothing to hold on to. So the flat tensor is cut where parameters
begin, wherever that can be found out:

    stages 1, 2   each parameter's `_hp_mapping` says where its fragment is
    stage 3       fragments are in the order of the group, each parameter's share rounded up
    otherwise     the whole is one fragment, in the format that most of the elements were to have

Each fragment is stored as a piece in blocks (`formats.PIECE_FORMATS`): rows and columns are lost. What belongs to no
parameter (padding) is stored in fp32. A state has the fragments' tensors under names that begin with their number.

Source: deepspeed 0.19, deepspeed/utils/tensor_fragment.py, deepspeed/runtime/zero/stage3.py.
"""

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight.numerics import moment_formats
from packlight.numerics.formats import PIECE_FORMATS, ROOT_BLOCKS, ROOT_MATRIX
from packlight.optim.layout import Layout
from packlight.optim.state import MOMENTS, State, step_tensor

FRAGMENTS = "fragments"
"""Of a flat partition's state in a state dict: the fragments' tensors, beside torch's moments."""


class Origin(NamedTuple):
    """A parameter that an optimiser was built with.

    Attributes:
        param: it; ZeRO keeps it alive.
        shape: its whole shape.
        state_format: a key of `numerics.FORMATS`.
    """

    param: "weakref.ref[Tensor]"
    shape: tuple[int, ...]
    state_format: str

    @classmethod
    def of(cls, param: Tensor, state_format: str) -> "Origin":
        """Note a parameter."""
        return cls(weakref.ref(param), shape_of(param), state_format)

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return torch.Size(self.shape).numel()

    @property
    def piece_format(self) -> str:
        """The name of what a fragment is stored as; errors are `fragment_format`'s."""
        return fragment_format(self.state_format, self.shape)


def fragment_format(state_format: str, shape: tuple[int, ...]) -> str:
    """Return the name of what a fragment of a parameter of that shape is stored as.

    Raises:
        ValueError: the format's scales are of whole tensors.
    """
    moments = moment_formats(state_format, shape)
    if moments[1] is ROOT_MATRIX:
        moments = moments[0], ROOT_BLOCKS
    if moments not in PIECE_FORMATS:
        raise ValueError(
            f"state format {state_format!r} came for parameters that ZeRO has put into a flat partition, and "
            "its scales are of whole tensors; '4bit', '8bit', 'fp8' or 'fp32' was wanted"
        )
    return PIECE_FORMATS[moments]


def shape_of(param: Tensor) -> tuple[int, ...]:
    """Return a parameter's whole shape; ZeRO-3 leaves an empty tensor in its place."""
    return tuple(getattr(param, "ds_shape", param.shape))


@dataclass(frozen=True)
class Fragment(Layout):
    """A parameter's share of a flat partition.

    Attributes:
        start: its first element.
        prefix: what its keys in the state begin with.
    """

    start: int = 0
    prefix: str = ""

    def view(self, tensor: Tensor) -> Tensor:
        """Return what of a flat tensor it is."""
        return tensor[self.start : self.start + self.shape[0]]

    def if_piece(self) -> Layout:
        """Return this."""
        return self


@dataclass(frozen=True)
class Flat:
    """How the state of a flat partition lies; what `Layout` does for one parameter, for all fragments.

    Attributes:
        parts: the fragments, which fill it.
    """

    parts: tuple[Fragment, ...]

    @property
    def state_format(self) -> str:
        """For messages."""
        return "+".join(sorted({part.state_format for part in self.parts}))

    def is_complete(self, state: Mapping[str, Tensor], moments: tuple[str, ...]) -> bool:
        """Tell whether a state has all tensors that it is to have."""
        return all(part.prefix + key in state for part in self.parts for key in ("step", *part.keys(moments)))

    def copied_state(self, state: Mapping[str, Tensor], device: torch.device, *, moments: Sequence[str]) -> State:
        """Return a copy of a state of this layout.

        Raises:
            ValueError: a tensor has another shape or dtype.
        """
        for part in self.parts:
            part.stored(self.part_state(state, part), moments=moments)
        keys = [part.prefix + key for part in self.parts for key in ("step", *part.keys(tuple(moments)))]
        return {key: state[key].to(device, copy=True) for key in keys}

    def state_bytes(self, dtype: torch.dtype, *, moments: Sequence[str] = MOMENTS, rounding: str = "nearest") -> int:
        """Return the bytes that the state takes; see `state.state_bytes`."""
        return sum(part.state_bytes(dtype, moments=moments, rounding=rounding) for part in self.parts)

    def init_state(self, param: Tensor, **options: Any) -> State:
        """Return the state of a flat partition that has not had a step."""
        return self._together([part.init_state(part.view(param), **options) for part in self.parts])

    def part_state(self, state: Mapping[str, Tensor], part: Layout) -> State:
        """Return a fragment's share of a state; it shares the tensors."""
        assert isinstance(part, Fragment)
        names = [key for key in state if key.startswith(part.prefix)]
        return {key.removeprefix(part.prefix): state[key] for key in names}

    def to_portable(
        self, state: Mapping[str, Tensor], *, moments: Sequence[str] = MOMENTS, device: Any = None
    ) -> State:
        """Return a state as torch's optimiser would hold it for the flat tensor."""
        each = [part.to_portable(self.part_state(state, part), moments=moments, device=device) for part in self.parts]
        together = {name: torch.cat([one[name].view(-1) for one in each]) for name in moments}
        return {"step": step_tensor(each[0]["step"]), **together}

    def from_portable(
        self, portable: Mapping[str, Any], *, moments: Sequence[str] = MOMENTS, device: Any = None
    ) -> State:
        """Return the state that a portable one of the flat tensor stands for.

        Raises:
            ValueError: as `state.from_portable`.
        """
        return self._together(
            [
                part.from_portable(
                    {key: value if key == "step" else part.view(value) for key, value in portable.items()},
                    moments=moments,
                    device=device,
                )
                for part in self.parts
            ]
        )

    def _together(self, states: Iterable[State]) -> State:
        made = zip(self.parts, states, strict=True)
        return {part.prefix + key: value for part, state in made for key, value in state.items()}


def flat_layout(flat: Tensor, origins: Sequence[Origin]) -> Flat:
    """Return how the state of a flat partition lies.

    Args:
        flat: fp32, 1-D: the partition.
        origins: the parameters of its group.

    Raises:
        ValueError: it is not flat, or a format does not go with flat partitions.
    """
    if flat.dim() != 1:
        raise ValueError(
            f"a parameter of shape {tuple(flat.shape)} came into a param group that was built with others; a flat "
            "partition of DeepSpeed's ZeRO was wanted. Use add_param_group for new parameters."
        )
    found = _by_mapping(flat, origins) or _by_shares(flat, origins) or [(0, flat.numel(), _most_common(origins))]
    spans, end = list[tuple[int, int, str]](), 0
    for start, numel, name in sorted(found):
        assert start >= end, "two parameters have the same place in a flat partition"
        if start > end:
            spans.append((end, start - end, "fp32"))
        spans.append((start, numel, name))
        end = start + numel
    if end < flat.numel():
        spans.append((end, flat.numel() - end, "fp32"))
    return Flat(
        tuple(
            Fragment((numel,), name, start=start, prefix=f"{number}.")
            for number, (start, numel, name) in enumerate(spans)
        )
    )


def _by_mapping(flat: Tensor, origins: Sequence[Origin]) -> list[tuple[int, int, str]]:
    """Return the fragments that DeepSpeed's stages 1 and 2 tell of."""
    found = []
    for origin in origins:
        mapping = getattr(origin.param(), "_hp_mapping", None)
        fragment = getattr(mapping, "hp_fragment", None)
        if isinstance(fragment, Tensor) and fragment.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr():
            start = int(fragment.storage_offset()) - int(flat.storage_offset())
            found.append((start, fragment.numel(), origin.piece_format))
    return found


def _by_shares(flat: Tensor, origins: Sequence[Origin]) -> list[tuple[int, int, str]]:
    """Return the fragments of a stage-3 sub-group: a run of parameters whose shares fill the flat tensor."""
    shares = [
        (origin, share) for origin in origins if isinstance(share := getattr(origin.param(), "ds_tensor", None), Tensor)
    ]
    if len(shares) < len(origins):
        return []
    runs = [run for first in range(len(shares)) if (run := _run(shares[first:], flat.numel()))]
    if len(runs) > 1:  # sub-groups: one of them begins as the flat tensor does
        runs = [run for run in runs if _starts_with(flat, run[0][1])]
    if len(runs) != 1:
        return []
    starts = itertools.accumulate((share.numel() for _, share in runs[0]), initial=0)
    return [
        (start, share.numel(), origin.piece_format) for start, (origin, share) in zip(starts, runs[0], strict=False)
    ]


def _run(shares: Sequence[tuple[Origin, Tensor]], numel: int) -> Sequence[tuple[Origin, Tensor]]:
    """Return the first shares that have so many elements together; nothing if none have."""
    ends = itertools.accumulate(share.numel() for _, share in shares)
    return next((shares[: number + 1] for number, end in enumerate(ends) if end == numel), ())


def _starts_with(flat: Tensor, share: Tensor) -> bool:
    """Tell whether a flat tensor begins with a parameter's share, up to the rounding of 16 bits."""
    num = min(share.numel(), 64)
    if share.numel() == 0 or flat.numel() < num:
        return False
    ours = flat.detach()[:num].to("cpu", share.dtype)
    return torch.equal(ours, share.detach().view(-1)[:num].to("cpu"))


def _most_common(origins: Sequence[Origin]) -> str:
    """Return the format that most elements were to have."""
    elements: dict[str, int] = {}
    for origin in origins:
        elements[origin.piece_format] = elements.get(origin.piece_format, 0) + origin.numel
    return max(elements, key=lambda name: elements[name], default="fp32")
