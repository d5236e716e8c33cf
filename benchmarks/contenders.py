"""AdamW steps to compare: packlight's, torch's and those of other packages, made alike.

Each peer is imported where its step is made, so that one that is missing or does not run here only drops out. All
contenders update the same parameters from the same gradients: the bytes and their pages are the same for each, and
only the states are its own.
"""

import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

import packlight

Step = Callable[[], Any]

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
PEERS = ("deepspeed", "bitsandbytes", "torchao", "flashoptim")


@dataclass(frozen=True)
class Contender:
    """An optimiser to time.

    Attributes:
        name: what tables call it; its first word is its package.
        make: takes parameters that have gradients, returns a call that does one step.
        state_bytes: bytes of its states per parameter; None: two numbers of the parameter's dtype.
        small_state_bytes: the same for tensors of at most 4096 elements.
        flat: it gets every tensor with one dimension.
        shrinks: it is so slow, or takes so many temporary bytes, that on the CPU it gets a part of the elements.
    """

    name: str
    make: Callable[[Sequence[Parameter]], Step]
    state_bytes: float | None
    small_state_bytes: float | None = 8.0
    flat: bool = False
    shrinks: bool = False

    @property
    def package(self) -> str:
        """Return the package that it comes from."""
        return self.name.split()[0]

    def moved_bytes(self, dtype: torch.dtype, *, small: bool) -> float:
        """Return the fewest bytes that a step moves per parameter.

        The parameter is read and written, the gradient read, each state read and written, everything once.

        Args:
            dtype: the dtype of parameters and gradients.
            small: the tensors have at most 4096 elements.

        Returns:
            Bytes per parameter.
        """
        state_bytes = self.small_state_bytes if small else self.state_bytes
        return 3 * dtype.itemsize + 2 * (2 * dtype.itemsize if state_bytes is None else state_bytes)


def contenders(dtype: torch.dtype) -> list[Contender]:
    """Return everyone, the baseline first.

    Args:
        dtype: of the parameters; some peers have options that need 16 bits.

    Returns:
        The contenders.
    """
    sixteen_bit = dtype != torch.float32
    torchao_blocks = {"4bit": 1 + 2 * 4 / 128, "8bit": 2 + 2 * 4 / 256, "Fp8": 2 + 2 * 4 / 256}
    made = [
        Contender("torch fused", functools.partial(_torch, fused=True), None, None),
        Contender("torch foreach", functools.partial(_torch, foreach=True), None, None),
        *_ours(),
        Contender("deepspeed CPUAdam", functools.partial(_deepspeed, fp32_optimizer_states=True), 8.0),
        Contender("bitsandbytes 8bit", _bitsandbytes, 2 + 2 * 4 / 256, shrinks=True),
    ]
    for name, state_bytes in torchao_blocks.items():
        make = functools.partial(_torchao, name=f"AdamW{name}", bf16_stochastic_round=dtype == torch.bfloat16)
        made.append(Contender(f"torchao {name.lower()}", make, state_bytes, None, shrinks=True))
    plain = functools.partial(_flashoptim, master_weight_bits=None)
    made.append(Contender("flashoptim", plain, 2 + 2 * 2 / 32, 2 + 2 * 2 / 32))
    if sixteen_bit:
        narrow = functools.partial(_deepspeed, fp32_optimizer_states=False)
        made.append(Contender("deepspeed CPUAdam, 16-bit states", narrow, None, None))
        master = functools.partial(_flashoptim, master_weight_bits=24)
        made.append(Contender("flashoptim, 24-bit master", master, 3 + 2 * 2 / 32, 3 + 2 * 2 / 32))
    return made


def _ours() -> list[Contender]:
    blocks = 1 + 2 * 4 / 128
    named = functools.partial(_packlight, state_format="4bit", by_name=True)
    return [
        Contender("packlight 4bit", functools.partial(_packlight, state_format="4bit"), blocks),
        Contender("packlight 4bit blocks", named, blocks, flat=True),
        Contender("packlight 4bit blocks, nearest", functools.partial(named, beta2=0.98), blocks, flat=True),
        Contender("packlight 8bit", functools.partial(_packlight, state_format="8bit"), 2 + 2 * 2 / 32),
        Contender("packlight fp8", functools.partial(_packlight, state_format="fp8"), 2 + 2 * (4 + 1) / 128),
        Contender("packlight fp32", functools.partial(_packlight, state_format="fp32"), 8.0),
    ]


def _torch(parameters: Sequence[Parameter], **options: bool) -> Step:
    return torch.optim.AdamW(parameters, **OPTIONS, **options).step


def _packlight(
    parameters: Sequence[Parameter], *, state_format: str, by_name: bool = False, beta2: float = 0.999
) -> Step:
    """Name a format for each parameter where `by_name`: then it holds for 1-D tensors too."""
    named = [(f"tensor{index}", parameter) for index, parameter in enumerate(parameters)]
    choice = {name: state_format for name, _ in named} if by_name else state_format
    options = {**OPTIONS, "betas": (OPTIONS["betas"][0], beta2)}
    return packlight.AdamW(named, **options, state_format=choice).step


def _deepspeed(parameters: Sequence[Parameter], *, fp32_optimizer_states: bool) -> Step:
    """Build its C++ code at the first call, which takes one to two minutes."""
    if parameters[0].device.type != "cpu":
        raise ValueError("DeepSpeedCPUAdam steps parameters in host memory only")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The build calls `ninja` by name; an environment that is not activated has it beside its python only.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made = DeepSpeedCPUAdam(parameters, **OPTIONS, fp32_optimizer_states=fp32_optimizer_states)
    return cast(Step, made.step)


def _bitsandbytes(parameters: Sequence[Parameter]) -> Step:
    import bitsandbytes

    return cast(Step, bitsandbytes.optim.AdamW8bit(parameters, **OPTIONS).step)


def _torchao(parameters: Sequence[Parameter], *, name: str, bf16_stochastic_round: bool) -> Step:
    import torchao.optim

    optimizer = getattr(torchao.optim, name)(parameters, **OPTIONS, bf16_stochastic_round=bf16_stochastic_round)
    return cast(Step, optimizer.step)


def _flashoptim(parameters: Sequence[Parameter], *, master_weight_bits: int | None) -> Step:
    import flashoptim

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bf16 without a master copy is fragile; speed is all we ask here
        optimizer = flashoptim.FlashAdamW(parameters, **OPTIONS, master_weight_bits=master_weight_bits)
    return cast(Step, optimizer.step)


class Storage:
    """Parameters and gradients of a workload: two flat tensors that every contender's parameters are views of."""

    def __init__(self, num_elements: int, *, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.values = torch.empty(num_elements, dtype=dtype, device=device).normal_(0, 1, generator=generator)
        self.gradients = torch.empty_like(self.values).normal_(0, 1e-3, generator=generator)

    def parameters(self, shapes: Sequence[tuple[int, ...]]) -> list[Parameter]:
        """Return parameters with gradients, views of consecutive parts.

        Args:
            shapes: theirs.

        Returns:
            The parameters.
        """
        made, start = [], 0
        for shape in shapes:
            end = start + math.prod(shape)
            parameter = Parameter(self.values[start:end].view(shape))
            parameter.grad = self.gradients[start:end].view(shape)
            made.append(parameter)
            start = end
        return made


def stored_bytes(step: Step) -> int:
    """Count the bytes of an optimiser's states.

    Args:
        step: the bound method that `Contender.make` returned.

    Returns:
        Bytes of all tensors, also of those inside of a package's own state objects.
    """
    optimizer = cast(torch.optim.Optimizer, cast(Any, step).__self__)
    return sum(_nbytes(value) for state in optimizer.state.values() for value in state.values())


def _nbytes(value: object) -> int:
    # torchao's tensors and flashoptim's objects keep codes and scales as attributes.
    inner = [each for each in getattr(value, "__dict__", {}).values() if isinstance(each, Tensor)]
    if inner:
        return sum(each.nbytes for each in inner)
    return value.nbytes if isinstance(value, Tensor) else 0
