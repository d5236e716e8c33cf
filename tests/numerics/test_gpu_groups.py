"""The Triton kernels of grouped codes against the reference, bit for bit.

With a GPU, the checks run there, against the reference on the CPU. Without one, Triton's interpreter runs them on
CPU tensors. It has to be asked for by an environment variable before Triton is imported, so all of them run once more
in a process of its own: `TRITON_INTERPRET=1 pytest tests/numerics/test_gpu_groups.py`.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from packlight.numerics import group_operators
from packlight.numerics.groups import DTYPES, GROUP_FORMATS, GroupFormat
from tests.numerics.test_groups import (
    INPUTS,
    SIZES,
    assert_gives_the_references_bits,
    assert_gives_the_references_mask,
    of_any_bits,
    ordinary,
)

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu" if INTERPRETED else None

# The interpreter is numpy, which warns of infinities and NaNs.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_device = pytest.mark.skipif(DEVICE is None, reason="neither a GPU nor Triton's interpreter")


class OnDevice:
    """The kernels, with tensors that come from the CPU and go back to it."""

    def __init__(self) -> None:
        from packlight.numerics import gpu_groups  # imports Triton

        self.kernels, self.device = gpu_groups, DEVICE

    def encode(self, flat: Tensor, fmt: GroupFormat) -> tuple[Tensor, ...]:
        return tuple(each.cpu() for each in self.kernels.encode(flat.to(self.device), fmt))

    def decode(self, codes: Tensor, scales: Tensor, *how: Any) -> Tensor:
        return self.kernels.decode(codes.to(self.device), scales.to(self.device), *how).cpu()

    def encode_mask(self, flat: Tensor) -> Tensor:
        return self.kernels.encode_mask(flat.to(self.device)).cpu()

    def decode_mask(self, bits: Tensor, *how: Any) -> Tensor:
        return self.kernels.decode_mask(bits.to(self.device), *how).cpu()


@needs_device
@pytest.mark.parametrize("name", GROUP_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).removeprefix("torch."))
def test_codes_are_the_references_bit_for_bit(name: str, dtype: torch.dtype, seed: int) -> None:
    kernels, fmt = OnDevice(), GROUP_FORMATS[name]
    for draw in INPUTS.values():
        assert_gives_the_references_bits(kernels, fmt, draw(4099, dtype))
    for numel in SIZES:
        assert_gives_the_references_bits(kernels, fmt, ordinary(numel, dtype), (torch.bfloat16,))


@needs_device
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda each: str(each).removeprefix("torch."))
def test_masks_are_the_references(dtype: torch.dtype, seed: int) -> None:
    for numel in SIZES[:-1]:
        flat = of_any_bits(numel, dtype)
        assert_gives_the_references_mask(OnDevice(), flat)
        assert_gives_the_references_mask(OnDevice(), flat > 0)


@needs_device
def test_any_cut_into_tiles_gives_the_same_bits(seed: int) -> None:
    from packlight.numerics import gpu_groups

    with mock.patch.object(gpu_groups, "TILE_ELEMENTS", 256):
        for fmt in GROUP_FORMATS.values():
            assert_gives_the_references_bits(OnDevice(), fmt, ordinary(2311, torch.float32))
        assert_gives_the_references_mask(OnDevice(), ordinary(2311, torch.bfloat16))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU; in the interpreter the tensors are the CPU's"
)
@pytest.mark.parametrize("name", [*GROUP_FORMATS, group_operators.MASK])
def test_the_operators_find_the_kernels_of_a_gpu(name: str, seed: int) -> None:
    flat = ordinary(4099, torch.bfloat16)
    expected = group_operators.encode(flat, name)
    found = group_operators.encode(flat.cuda(), name)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    decoded = group_operators.decode(found, name, 4099, flat.dtype)
    assert decoded.is_cuda
    assert torch.equal(decoded.cpu(), group_operators.decode(expected, name, 4099, flat.dtype))


@needs_triton
@pytest.mark.skipif(DEVICE is not None, reason="the tests above run here")
def test_in_the_interpreter(tmp_path: Path, seed: int) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        f"--basetemp={tmp_path / 'base'}",
        __file__,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PACKLIGHT_TEST_SEED": str(seed), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing here")
def test_compiled_code_contracts_and_flushes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an H100, with what Triton brings along: no GPU needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from packlight.numerics import gpu_groups as kernels

    for fmt in GROUP_FORMATS.values():
        scales = "*i16" if fmt.group_elements else "*fp32"
        types = {"flat": "*i16", "codes": "*u8", "scales": scales, "most": "*i32", "numel": "i32"}
        shape = kernels._shape(fmt)
        constants = kernels._scales_range(fmt, torch.bfloat16) | ({"most": None} if fmt.group_elements else {})
        encoding = ptx_of(kernels._encode_kernel, types, shape | constants)
        decoding = ptx_of(kernels._decode_kernel, types, shape | {"MOST": torch.finfo(torch.bfloat16).max})
        assert "div.rn.f32" in encoding
        assert not any("fma.rn.f32" in code or ".ftz" in code for code in (encoding, decoding))
        assert "ld.global.v4" in encoding and "st.global.v4" in decoding, "loads or stores are not wide"


def ptx_of(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    """The code for addresses and a number of elements that are divisible by 16, as those of large tensors are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from packlight.numerics import gpu_groups as kernels

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = list(enumerate(kernel.arg_names))
    values = {(place,): constants[name] for place, name in places if name in constants}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in places if name not in constants}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=aligned)
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels.LAUNCH_OPTIONS)
    return str(found.asm["ptx"])
