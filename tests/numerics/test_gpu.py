"""The Triton kernels against the reference, bit for bit.

With a GPU, the checks run there, against the reference on the CPU. Without one, Triton's interpreter runs them on
CPU tensors. It has to be asked for by an environment variable before Triton is imported, so the checks have a
process of their own: `TRITON_INTERPRET=1 python tests/numerics/test_gpu.py NAME...`.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from packlight.numerics import reference
from packlight.numerics.call import Call
from packlight.numerics.formats import PIECE_FORMATS, matrix_view, moment_formats
from packlight.numerics.moments import Moment, zero_moment
from packlight.numerics.noise import key_at, seed_at, seed_of
from packlight.numerics.reference import Noise
from packlight.numerics.rounding import ERROR_DTYPES, Rounding, RoundingName
from packlight.numerics.settings import AdamWNumbers, AdamWSettings, SGDNumbers, SGDSettings

ROOT = Path(__file__).parents[2]

#: A matrix of whole blocks a row, one whose blocks straddle rows, a short last block, a small one: in fp32.
SHAPES = [(150, 256), (100, 333), (4097,), (33, 5)]
#: Stochastic rounding of second moments, dtype, rounding of parameters.
CASES: dict[str, list[tuple[bool, torch.dtype, RoundingName]]] = {
    "4bit": [
        (False, torch.float32, "nearest"),
        (True, torch.float32, "nearest"),
        (False, torch.bfloat16, "stochastic"),
        (True, torch.bfloat16, "master32"),
        (True, torch.float16, "nearest"),
    ],
    "8bit": [
        (True, torch.float32, "nearest"),
        (False, torch.bfloat16, "stochastic"),
        (True, torch.bfloat16, "master24"),
    ],
    "fp8": [(False, torch.float32, "nearest"), (True, torch.bfloat16, "stochastic")],
    "fp32": [(False, torch.float32, "nearest"), (False, torch.bfloat16, "stochastic")],
}
L2 = AdamWSettings(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, decoupled=False, coefficient=0.4)
DECOUPLED = AdamWSettings(lr=1e-2, beta2=0.95, weight_decay=0.1, maximize=True)
MOMENTUM = SGDSettings(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1)
NESTEROV = SGDSettings(lr=0.1, momentum=0.9, nesterov=True, maximize=True, coefficient=0.5)


class Model(NamedTuple):
    """Parameters and what is stored beside them."""

    params: list[Tensor]
    errors: list[Tensor]
    moments: list[tuple[Moment, ...]]

    def states(self) -> list[Tensor]:
        return [tensor for moments in self.moments for moment in moments for tensor in moment.tensors.values()]

    def to(self, device: str) -> "Model":
        """Return a copy."""
        moments = [
            tuple(
                Moment(m.format, m.shape, {name: _copy(t, device) for name, t in m.tensors.items()}) for m in of_param
            )
            for of_param in self.moments
        ]
        return Model([_copy(p, device) for p in self.params], [_copy(e, device) for e in self.errors], moments)


class Run:
    """The same steps twice: by the kernels on a device, and by the reference on the CPU."""

    def __init__(
        self,
        device: str,
        state_format: str,
        *,
        settings: AdamWSettings | SGDSettings = DECOUPLED,
        stochastic: bool = False,
        dtype: torch.dtype = torch.float32,
        rounding: RoundingName = "nearest",
        params: Sequence[Tensor] = (),
    ) -> None:
        torch.manual_seed(0)
        self.device, self.state_format, self.settings = device, state_format, settings
        self.stochastic, self.rounding, self.step = stochastic, rounding, 0
        params = list(params) or [torch.randn(shape).to(dtype) for shape in SHAPES]
        error_dtype = ERROR_DTYPES.get(rounding)
        errors = [torch.zeros(param.numel(), dtype=error_dtype) for param in params] if error_dtype else []
        moments = [tuple(zero_moment(param.shape, each) for each in self.formats(param)) for param in params]
        self.expected = Model(params, errors, moments).to("cpu")
        self.model = Model(params, errors, moments).to(device)
        self.seeds = [seed_of(7, index) for index in range(len(params))]

    def formats(self, param: Tensor) -> tuple[Any, ...]:
        formats = moment_formats(self.state_format, tuple(param.shape)) if self.state_format else ()
        return formats if isinstance(self.settings, AdamWSettings) else formats[:1]

    def gradients(self) -> list[Tensor]:
        """Draw gradients of very different sizes in different rows."""
        params = self.expected.params
        sizes = [10.0 ** torch.randn(param.shape[0], *[1] * (param.dim() - 1)) for param in params]
        return [
            (torch.randn(param.shape) * torch.rand(param.shape) ** 3 * size * 1e-3).to(param.dtype)
            for param, size in zip(params, sizes, strict=True)
        ]

    def advance(self, grads: Sequence[Tensor], *, exactly: bool = True) -> None:
        """Do a step on both and compare them."""
        self.step += 1
        self.by_kernels([_copy(grad, self.device) for grad in grads])
        self.by_reference(grads)
        if exactly:
            self.compare()
        else:
            for ours, theirs in zip(self.model.params, self.expected.params, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs)

    def by_kernels(self, grads: Sequence[Tensor], found_inf: Tensor | None = None) -> None:
        from packlight.numerics import gpu  # imports Triton

        step = gpu.adamw_step if isinstance(self.settings, AdamWSettings) else gpu.sgd_step
        numbers = torch.tensor(self.settings.numbers(self.step), device=self.device)
        at = torch.tensor(float(self.step), device=self.device)
        model, how = self.model, (self.seeds, self.state_format, self.stochastic, self.rounding)
        step(Call(model.params, grads, model.states(), model.errors, numbers, at, found_inf, *how))

    def by_reference(self, grads: Sequence[Tensor]) -> None:
        numbers, model = self.settings.numbers(self.step), self.expected
        for index, (param, grad, moments) in enumerate(zip(model.params, grads, model.moments, strict=True)):
            noise = Noise(key_at(self.seeds[index], self.step), self.stochastic)
            how = Rounding(self.rounding, model.errors[index] if model.errors else None)
            if isinstance(numbers, AdamWNumbers):
                first, second = moments
                reference.adamw_step(
                    param, grad, exp_avg=first, exp_avg_sq=second, numbers=numbers, noise=noise, rounding=how
                )
            else:
                buffer = moments[0] if moments else None
                reference.sgd_step(param, grad, momentum_buffer=buffer, numbers=numbers, noise=noise, rounding=how)

    def compare(self) -> None:
        _assert_same(self.model.params, self.expected.params, f"{self.state_format} parameter, step {self.step}")
        _assert_same(self.model.errors, self.expected.errors, f"{self.state_format} error, step {self.step}")
        for moments, expected in zip(self.model.moments, self.expected.moments, strict=True):
            for moment, other in zip(moments, expected, strict=True):
                what = f"{self.state_format} {moment.format.coding} {moment.shape}, step {self.step}: {{}}"
                for name, tensor in moment.tensors.items():
                    _assert_same([tensor], [other.tensors[name]], what.format(name))


def _copy(tensor: Tensor, device: str) -> Tensor:
    """Return a copy with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def _assert_same(tensors: Sequence[Tensor], others: Sequence[Tensor], what: str) -> None:
    for tensor, other in zip(tensors, others, strict=True):
        found, wanted = tensor.detach().cpu(), other.detach()
        assert torch.equal(found.isnan(), wanted.isnan()), f"{what}: other NaNs"
        different = (found != wanted) & ~wanted.isnan()
        assert not different.any(), f"{what}: {int(different.sum())} differ, first {different.nonzero()[0].tolist()}"


def adamw_gives_the_same_bits(device: str, state_format: str) -> None:
    for number, (stochastic, dtype, rounding) in enumerate(CASES[state_format]):
        settings = L2 if number % 2 else DECOUPLED
        run = Run(device, state_format, settings=settings, stochastic=stochastic, dtype=dtype, rounding=rounding)
        for _ in range(3):
            run.advance(run.gradients())


def sgd_gives_the_same_bits(device: str) -> None:
    for number, state_format in enumerate(("", *CASES)):
        settings, dtype = (NESTEROV, torch.bfloat16) if number % 2 else (MOMENTUM, torch.float32)
        run = Run(device, state_format, settings=settings, dtype=dtype, rounding="stochastic")
        for _ in range(2):
            run.advance(run.gradients())


def pieces_of_parameters_give_the_same_bits(device: str) -> None:
    """Maxima of a matrix are left as they were found; random bits are those of the piece's place."""
    for name in sorted(set(PIECE_FORMATS.values()) - {"fp32"}):
        params = [torch.randn(shape).bfloat16() for shape in ((40, 256), (1, 256), (30, 256))]
        run = Run(device, name, stochastic=True, rounding="stochastic", params=params)
        run.seeds = [seed_at(seed, origin * 256) for seed, origin in zip(run.seeds, (0, 40, 41), strict=True)]
        for _ in range(2):
            run.advance(run.gradients())


def any_cut_into_tiles_gives_the_same_bits(device: str) -> None:
    from packlight.numerics import gpu_kernels, gpu_tables

    assert [shape for shape in SHAPES if matrix_view(shape)] == SHAPES[:2]
    sizes: dict[str, Any] = {"HALF_ELEMENTS": 1024, "TILES": 3}
    with (
        mock.patch.multiple(gpu_tables, **sizes),
        mock.patch.multiple(gpu_kernels, **sizes, VECTOR_ELEMENTS=64),
    ):
        params = [torch.randn(shape).bfloat16() for shape in SHAPES[:2]]
        run = Run(device, "4bit", stochastic=True, rounding="stochastic", params=params)
        run.advance(run.gradients())
        run.advance(run.gradients())


def nans_and_infinities_go_through_alike(device: str) -> None:
    for state_format in CASES:
        run = Run(device, state_format, stochastic=True, dtype=torch.bfloat16, rounding="stochastic")
        grads = run.gradients()
        for grad in grads:
            flat, bad = grad.view(-1), torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, 1e-38])
            flat[5], flat[64], flat[66], flat[90], flat[-1] = bad.to(flat.dtype)
        run.advance(grads)
        run.advance(run.gradients())


def an_overflow_changes_nothing(device: str) -> None:
    for settings in (DECOUPLED, MOMENTUM):
        run = Run(device, "4bit", settings=settings, dtype=torch.bfloat16, rounding="master24")
        run.advance(run.gradients())
        run.by_kernels([_copy(grad, device) for grad in run.gradients()], torch.ones((), device=device))
        run.compare()
        grads = run.gradients()
        run.step += 1
        run.by_kernels([_copy(grad, device) for grad in grads], torch.zeros((), device=device))
        run.by_reference(grads)
        run.compare()


def other_strides_and_addresses_give_the_same_bits(device: str) -> None:
    """Transposed and shifted ones, beside ordinary ones."""
    params = [torch.randn(256, 150).t(), torch.randn(100, 130), torch.randn(40, 300)[:, :256], torch.randn(5000)[1:]]
    for settings in (DECOUPLED, MOMENTUM):
        run = Run(device, "4bit", settings=settings, params=params)
        run.model.params[3] = torch.empty(5000, device=device)[1:].copy_(params[3])
        for _ in range(2):
            grads = run.gradients()
            grads[1] = grads[1].t().contiguous().t()
            run.advance(grads)
    for state_format in ("paper4bit", "factored"):
        run = Run(device, state_format)
        # Sums of rows and columns are torch's, whose order is another on a GPU.
        run.advance(run.gradients(), exactly=device == "cpu" or state_format != "factored")


def steps_on_the_same_addresses_copy_nothing(device: str) -> None:
    from packlight.numerics import gpu_tables

    run = Run(device, "4bit")
    run.step = 1
    grads, others = ([_copy(grad, device) for grad in run.gradients()] for _ in range(2))
    run.by_kernels(grads)
    with mock.patch.object(gpu_tables, "_on_device", side_effect=gpu_tables._on_device) as copies:
        run.by_kernels(grads)
        assert copies.call_count == 0
        run.by_kernels(others)  # as after zero_grad(set_to_none=True)
        run.by_kernels(others)
        run.by_kernels(grads)
        assert copies.call_count == len(SHAPES)  # one for each way to be stored


def numbers_are_those_of_the_host(device: str) -> None:
    from packlight.numerics import gpu

    for step in (1.0, 2.0, 10.0, 12345.0):
        at = torch.tensor(step, device=device)
        for settings in (L2, DECOUPLED, AdamWSettings(lr=0.0), AdamWSettings(lr=1e-45)):
            expected = torch.tensor(settings.numbers(step))
            assert torch.equal(gpu.adamw_numbers(settings, step=at).cpu(), expected), (settings, step)
        for each in (MOMENTUM, NESTEROV):
            assert torch.equal(gpu.sgd_numbers(each, step=at).cpu(), torch.tensor(each.numbers(step))), (each, step)
        lr, coefficient = (torch.tensor(value, dtype=torch.float64, device=device) for value in (0.3, 0.7))
        given = AdamWSettings(lr=0.3, coefficient=0.7, weight_decay=0.1, maximize=True)
        found = gpu.adamw_numbers(DECOUPLED, step=at, lr=lr, coefficient=coefficient)
        assert torch.equal(found.cpu(), torch.tensor(AdamWNumbers(*_with_betas(given, DECOUPLED).numbers(step))))
        assert found.dtype == torch.float32 and found.device == at.device
        by_value = gpu.sgd_numbers(MOMENTUM, step=at, lr=0.3, coefficient=0.7)
        changed = SGDSettings(lr=0.3, momentum=0.9, dampening=0.2, weight_decay=0.1, coefficient=0.7)
        assert torch.equal(by_value.cpu(), torch.tensor(SGDNumbers(*changed.numbers(step))))


def _with_betas(settings: AdamWSettings, other: AdamWSettings) -> AdamWSettings:
    return AdamWSettings(
        lr=settings.lr,
        beta1=other.beta1,
        beta2=other.beta2,
        eps=other.eps,
        weight_decay=settings.weight_decay,
        maximize=settings.maximize,
        coefficient=settings.coefficient,
    )


def compiled_code_contracts_and_flushes_nothing() -> None:
    """Compiles for an H100 with what Triton brings along, no GPU needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from packlight.numerics import gpu_kernels as kernels

    numbers = {"numbers": "*fp32", "step": "*fp32", "values": "*fp32", "borders": "*i32", "maxima": "*i32"}
    signature = {"tensors": "*i64", "gradients": "*i64", "owners": "*i32", **numbers}
    common = {"found_inf": None, "limits": None, "TYPE": kernels.TYPES[torch.bfloat16], "ROUNDING": "stochastic"}
    common |= {"FIRST": "book", "WHOLE": True, "ALIGNMENT": 16, "LINES": 2, "WIDTH": 64, "TILES": 32}
    for kernel, more in (
        (kernels.adamw_kernel, {"SECOND": "root", "MATRIX": "strips", "STOCHASTIC": True}),
        (kernels.sgd_kernel, {}),
    ):
        constants = common | more
        types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
        values = {(place,): constants[name] for place, name in enumerate(kernel.arg_names) if name in constants}
        source = ASTSource(kernel, signature=types, constexprs=values)
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=kernels.LAUNCH_OPTIONS).asm["ptx"]
        assert "div.rn.f32" in code and "fma.rn.f32" not in code and ".ftz" not in code
        assert "ld.global.v2" in code, "loads are not wide"


CHECKS: dict[str, Callable[[str], None]] = {
    **{
        f"adamw_{each}": lambda device, each=each: adamw_gives_the_same_bits(device, each)  # type: ignore[misc]
        for each in CASES
    },
    **{
        check.__name__: check
        for check in (
            sgd_gives_the_same_bits,
            pieces_of_parameters_give_the_same_bits,
            any_cut_into_tiles_gives_the_same_bits,
            nans_and_infinities_go_through_alike,
            an_overflow_changes_nothing,
            other_strides_and_addresses_give_the_same_bits,
            steps_on_the_same_addresses_copy_nothing,
            numbers_are_those_of_the_host,
        )
    },
}


def what_is_wrong(name: str) -> str:
    """Run a check; return its traceback, or nothing where it passes."""
    try:
        compiled_code_contracts_and_flushes_nothing() if name == "compiled_code" else CHECKS[name]("cpu")
    except Exception:
        return traceback.format_exc()
    return ""


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_alone(*names: str, **variables: str) -> dict[str, str]:
    """Run checks in a process of their own: the variables have to be there before Triton is imported.

    Returns what went wrong in each.
    """
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    # The interpreter is numpy, which warns of divisions by zero and of NaNs.
    command = [sys.executable, "-W", "ignore::RuntimeWarning", __file__, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return wrong


@cache
def interpreted() -> dict[str, str]:
    """What the interpreter found wrong in each check; one process for all, because a start takes longer than most."""
    return run_alone(*CHECKS, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str) -> None:
    assert interpreted()[name] == ""


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name: str) -> None:
    CHECKS[name]("cuda")


@needs_triton
def test_compiled_code_contracts_and_flushes_nothing(tmp_path: Path) -> None:
    assert run_alone("compiled_code", TRITON_CACHE_DIR=str(tmp_path)) == {"compiled_code": ""}


if __name__ == "__main__":
    print(json.dumps({name: what_is_wrong(name) for name in sys.argv[1:]}))
