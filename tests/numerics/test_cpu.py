"""The compiled steps give the reference's bits: for every format, dtype, rounding, shape and number of threads."""

import itertools
import platform
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import packlight
from packlight.numerics import AdamWSettings, SGDSettings, call, compiler, cpu, decode, reference
from packlight.numerics.formats import PIECE_FORMATS
from packlight.numerics.rounding import RoundingName
from tests.numerics.cases import (
    COMPILED,
    NONFINITE,
    PUBLISHED,
    SHAPES,
    Engine,
    PeakBytes,
    Trained,
    adamw,
    differing,
    from_bits,
    gradient,
    same,
    sgd,
    threads,
)

try:
    compiler.find_compiler()
    HAS_COMPILER = True
except compiler.CompilerMissing:
    HAS_COMPILER = False
pytestmark = [
    pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler"),
    # What clang's code on Linux does: it computes the same with a pool of threads of its own.
    pytest.mark.filterwarnings("ignore:.*two pools of threads compete"),
]
FP32, BF16 = torch.float32, torch.bfloat16
WAYS: list[tuple[torch.dtype, RoundingName]] = [
    (FP32, "nearest"),
    (BF16, "nearest"),
    (BF16, "stochastic"),
    (BF16, "master24"),
    (BF16, "master32"),
]
by_way = pytest.mark.parametrize(("dtype", "rounding"), WAYS, ids=lambda each: str(each).removeprefix("torch."))
DECOUPLED = AdamWSettings(1e-2, weight_decay=0.1)
L2 = AdamWSettings(1e-2, 0.8, 0.95, weight_decay=0.1, decoupled=False, maximize=True, coefficient=0.3)
NESTEROV = SGDSettings(0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
DAMPENED = SGDSettings(0.1, momentum=0.9, dampening=0.2, maximize=True, coefficient=0.3)


def both(
    param: Tensor, name: str, rounding: RoundingName = "nearest", *, num_moments: int = 2
) -> tuple[Trained, Trained]:
    """Two of a kind: for the compiled step and for the reference."""
    compiled, plain = (Trained(param.clone(), name, rounding, num_moments=num_moments) for _ in range(2))
    return compiled, plain


def only_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiled step call the reference no more."""
    monkeypatch.setattr(call, "reference", None)


# The same bits


@by_way
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", COMPILED)
def test_adamw_is_the_references_bit_for_bit(
    name: str,
    shape: tuple[int, ...],
    stochastic: bool,
    dtype: torch.dtype,
    rounding: RoundingName,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    only_compiled(monkeypatch)
    ours, theirs = both(torch.randn(shape).to(dtype), name, rounding)
    for step, settings in enumerate((DECOUPLED, L2, DECOUPLED), 1):
        grad = gradient(shape, dtype)
        if step == 2:
            grad[: shape[0] // 3] = 0
        adamw([ours], [grad], step, settings, engine="cpu", stochastic=stochastic)
        adamw([theirs], [grad], step, settings, stochastic=stochastic)
        assert differing(ours, theirs) == []


@by_way
@pytest.mark.parametrize("name", sorted(set(PIECE_FORMATS.values()) - {"fp32"}))
def test_pieces_are_the_references_bit_for_bit_and_rows_of_the_whole(
    name: str, dtype: torch.dtype, rounding: RoundingName, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Three pieces of a matrix, one of a single row; a second step of theirs needs the maxima of the others."""
    only_compiled(monkeypatch)
    whole, ends = torch.randn(70, 384).to(dtype), (0, 40, 41, 70)
    format_of_whole = name.partition("/")[0]
    alone = Trained(whole.clone(), format_of_whole, rounding)
    pairs = [both(whole[first:last], name, rounding) for first, last in itertools.pairwise(ends)]
    for pair, first in zip(pairs, ends, strict=False):
        for each in pair:
            each.origin = 384 * first
    for step in (1, 2):
        grad = gradient(tuple(whole.shape), dtype)
        adamw([alone], [grad], step, DECOUPLED, stochastic=True)
        for (ours, theirs), (first, last) in zip(pairs, itertools.pairwise(ends), strict=True):
            adamw([ours], [grad[first:last]], step, DECOUPLED, engine="cpu", stochastic=True)
            adamw([theirs], [grad[first:last]], step, DECOUPLED, stochastic=True)
            assert differing(ours, theirs) == []
        if step == 1 or name != "4bit/matrix":  # of a matrix, the second step needs what others found
            together = torch.cat([ours.param for ours, _ in pairs])
            if name != "4bit/blocks":  # the whole is a matrix
                assert torch.equal(together, alone.param)
                codes = torch.cat([ours.moments[1].tensors["codes"] for ours, _ in pairs])
                assert torch.equal(codes, alone.moments[1].tensors["codes"])


@by_way
@pytest.mark.parametrize("settings", [NESTEROV, DAMPENED], ids=["nesterov", "dampened"])
@pytest.mark.parametrize("name", COMPILED)
def test_sgd_is_the_references_bit_for_bit(
    name: str,
    settings: SGDSettings,
    dtype: torch.dtype,
    rounding: RoundingName,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    only_compiled(monkeypatch)
    for shape in SHAPES:
        ours, theirs = both(torch.randn(shape).to(dtype), name, rounding, num_moments=1)
        for step in (1, 2, 3):
            grad = gradient(shape, dtype)
            sgd([ours], [grad], step, settings, engine="cpu")
            sgd([theirs], [grad], step, settings)
        assert differing(ours, theirs) == []


@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("shape", [(256, 384), (100, 333), (5003,), (20, 20)])
@pytest.mark.parametrize("name", COMPILED)
def test_nan_and_inf_go_where_the_reference_has_them(name: str, shape: tuple[int, ...], kind: str, seed: int) -> None:
    ours, theirs = both(torch.randn(shape), name)
    for step in (1, 2, 3):
        grad = gradient(shape)
        if step == 2:
            grad.view(-1)[57] = from_bits(NONFINITE[kind])
        adamw([ours], [grad], step, DECOUPLED, engine="cpu", stochastic=True)
        adamw([theirs], [grad], step, DECOUPLED, stochastic=True)
        # A NaN gets any code, and its block decodes to NaN whatever the codes are.
        assert [each for each in differing(ours, theirs) if "codes" not in each] == []
        assert all(same(decode(a), decode(b)) for a, b in zip(ours.moments, theirs.moments, strict=True))
    assert bool(ours.param.view(-1)[57].isnan())
    assert not any(bool(decode(moment).view(-1)[57].isfinite()) for moment in ours.moments)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(256, 384), (100, 333), (5003,)])
@pytest.mark.parametrize("name", COMPILED)
def test_a_finite_gradient_whose_square_is_not_shows(
    name: str, shape: tuple[int, ...], engine: Engine, seed: int
) -> None:
    """Nothing is held where it is without a sign of it: in fp32, as in torch.optim, the element alone is."""
    trained, reference_trained = both(torch.randn(shape), name)
    for step in range(1, 4):
        grad = gradient(shape).abs() + 0.1
        if step == 2:
            grad.view(-1)[57] = 1e22
        before = trained.param.clone()
        adamw([trained], [grad], step, DECOUPLED, engine=engine, stochastic=True)
        adamw([reference_trained], [grad], step, DECOUPLED, stochastic=True)
    changed = (trained.param != before).view(-1)
    changed[57] = True
    assert bool(changed.all())
    assert bool(trained.param.view(-1)[32:64].isnan().all()) == (name != "fp32")
    assert bool(trained.param.view(-1)[128:].isfinite().all())
    assert [each for each in differing(trained, reference_trained) if "codes" not in each] == []


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(16_384, 128), (65, 2**16), (33, 8191)])
def test_rows_as_short_and_as_long_as_a_matrix_may_have(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    only_compiled(monkeypatch)
    ours, theirs = both(torch.randn(shape).to(dtype), "4bit")
    assert "cols" in ours.moments[1].tensors or shape[0] == 33
    for step in (1, 2):
        grad = gradient(shape, dtype)
        adamw([ours], [grad], step, DECOUPLED, engine="cpu", stochastic=True)
        adamw([theirs], [grad], step, DECOUPLED, stochastic=True)
    assert differing(ours, theirs) == []


@pytest.mark.parametrize("numel", [*range(4097, 4097 + 128, 9), 4224])
@pytest.mark.parametrize("name", COMPILED)
def test_every_length_of_the_last_block(name: str, numel: int, seed: int) -> None:
    ours, theirs = both(torch.randn(numel).bfloat16(), name, "master24")
    for step in (1, 2):
        grad = gradient((numel,), BF16)
        adamw([ours], [grad], step, DECOUPLED, engine="cpu", stochastic=True)
        adamw([theirs], [grad], step, DECOUPLED, stochastic=True)
    assert differing(ours, theirs) == []


# Where tensors lie


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", COMPILED)
def test_tensors_may_start_anywhere(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """A parameter that is a view into a buffer, as fully sharded ones are."""
    only_compiled(monkeypatch)
    numel, guard = 5003, 3.5
    buffer, grads = torch.full((numel + 4,), guard, dtype=dtype), torch.randn(numel + 4).to(dtype)
    ours, theirs = both(torch.randn(numel).to(dtype), name)
    buffer[1:-3] = ours.param
    ours.param, grad = buffer[1:-3], grads[3:-1]
    adamw([ours], [grad], 1, DECOUPLED, engine="cpu", stochastic=True)
    adamw([theirs], [grad], 1, DECOUPLED, stochastic=True)
    assert differing(ours, theirs) == []
    assert buffer[[0, -1, -2, -3]].tolist() == [guard] * 4


@pytest.mark.parametrize("name", COMPILED)
def test_nothing_is_written_beyond_the_end_of_a_state(name: str, seed: int) -> None:
    ours, theirs = both(torch.randn(4100).bfloat16(), name, "master24")
    padded = {}
    for moment in ours.moments:
        for suffix, tensor in list(moment.tensors.items()):
            longer = torch.full((tensor.numel() + 256,), 7, dtype=tensor.dtype)
            longer[: tensor.numel()] = tensor
            moment.tensors[suffix] = longer[: tensor.numel()]  # type: ignore[index]
            padded[longer] = tensor.numel()
    grad = gradient((4100,), BF16)
    adamw([ours], [grad], 1, DECOUPLED, engine="cpu", stochastic=True)
    adamw([theirs], [grad], 1, DECOUPLED, stochastic=True)
    assert differing(ours, theirs) == []
    assert all(bool((longer[numel:] == 7).all()) for longer, numel in padded.items())


@pytest.mark.parametrize("case", ["fp16", "transposed", "fp32 gradient", "strided gradient"])
@pytest.mark.parametrize("name", COMPILED)
def test_what_is_not_compiled_goes_through_the_reference(name: str, case: str, seed: int) -> None:
    start = torch.randn(200, 300).to(torch.float16 if case == "fp16" else BF16)
    start = start.t() if case == "transposed" else start
    ours, theirs = (Trained(start.clone(memory_format=torch.preserve_format), name) for _ in range(2))
    grad = gradient(tuple(start.shape), FP32 if case == "fp32 gradient" else start.dtype)
    grad = grad.t().contiguous().t() if case == "strided gradient" else grad
    beside = Trained(torch.randn(100), name)
    before = beside.param.clone()
    adamw([ours, beside], [grad, torch.ones(100)], 1, DECOUPLED, engine="cpu")
    adamw([theirs], [grad], 1, DECOUPLED)
    assert differing(ours, theirs) == []
    assert not torch.equal(beside.param, before)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats_go_through_the_reference(name: str, seed: int) -> None:
    ours, theirs = both(torch.randn(130, 256), name)
    grad = gradient((130, 256))
    adamw([ours], [grad], 1, DECOUPLED, engine="cpu")
    adamw([theirs], [grad], 1, DECOUPLED)
    assert differing(ours, theirs) == []


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Act as a process that has built nothing and finds nothing built."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_loaded", {})
    cpu.compiled.cache_clear()
    yield monkeypatch
    cpu.compiled.cache_clear()


NARROWER = (
    *(pytest.param(flags, marks=pytest.mark.slow) for flags in ("-mno-avx512f", "-mno-avx2")),
    "-mno-avx -mno-sse4.1",
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("flags", NARROWER)
@pytest.mark.parametrize("name", COMPILED)
def test_processors_with_narrower_vectors_give_the_same_bits(
    name: str, flags: str, fresh: pytest.MonkeyPatch, seed: int
) -> None:
    only_compiled(fresh)
    fresh.setenv("CXX", f"{' '.join(compiler.find_compiler()[0])} {flags}")
    # A build takes seconds, so each format and each processor meets each way, but not all of the 3 * 3 with each other.
    ways: list[tuple[torch.dtype, RoundingName]] = [(FP32, "nearest"), (BF16, "stochastic"), (BF16, "master24")]
    dtype, rounding = ways[(list(COMPILED).index(name) + NARROWER.index(flags)) % len(ways)]
    pairs = [both(torch.randn(shape).to(dtype), name, rounding) for shape in SHAPES]
    for step, settings in enumerate((DECOUPLED, L2), 1):
        grads = [gradient(shape, dtype) for shape in SHAPES]
        stochastic = dtype == BF16
        adamw([ours for ours, _ in pairs], grads, step, settings, engine="cpu", stochastic=stochastic)
        adamw([theirs for _, theirs in pairs], grads, step, settings, stochastic=stochastic)
        assert [differing(*pair) for pair in pairs] == [[]] * len(SHAPES)


def test_a_second_or_two_of_one_processor_build_a_kind(fresh: pytest.MonkeyPatch) -> None:
    """Processor time, as others may be at work here: the largest kind takes 1.8 s where this was written."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert cpu.compiled((cpu.Kind(4, True, 1, 2, True),)) is not None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12


def test_only_what_is_used_is_built(fresh: pytest.MonkeyPatch, tmp_path: Path, seed: int) -> None:
    def built() -> int:
        return len(list((tmp_path / "cache").glob("*.so")))

    trained = [Trained(torch.randn(shape), name) for shape, name in (((5003,), "4bit"), ((300,), "fp32"))]
    grads = [gradient(tuple(each.param.shape)) for each in trained]
    adamw(trained, grads, 1, DECOUPLED, engine="cpu")
    assert built() == 2
    adamw(trained, grads, 2, DECOUPLED, engine="cpu", stochastic=True)  # fp32 is not rounded
    assert built() == 3


@pytest.mark.skipif(sys.platform != "linux", reason="resets the kernel's high-water mark")
@pytest.mark.parametrize("shapes", [[(512, 2**16)], [(2**18, 128)], [(1027, 32_749)], [(256, 2**14)] * 16])
def test_the_step_keeps_less_than_a_mebibyte_for_matrices(shapes: list[tuple[int, int]]) -> None:
    program = f"""
import ctypes, gc, torch
from pathlib import Path
from tests.numerics.cases import Trained, adamw
from packlight.numerics import AdamWSettings
torch.set_num_threads(2)
def kibibytes(field):
    return int(Path("/proc/self/status").read_text().partition(field + ":")[2].split()[0])
trained = [Trained(torch.zeros(shape), "4bit") for shape in {shapes}]
assert all("cols" in each.moments[1].tensors for each in trained)
grads = [torch.ones(shape) for shape in {shapes}]
def step(number):
    adamw(trained, grads, number, AdamWSettings(1e-3), engine="cpu", stochastic=True)
step(1), step(2)
gc.collect(), ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = kibibytes("VmRSS")
step(3)
print(kibibytes("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1024


def test_sgd_without_momentum_has_no_moments(seed: int) -> None:
    ours, theirs = both(torch.randn(5003), "4bit", num_moments=0)
    grad = gradient((5003,))
    sgd([ours], [grad], 1, SGDSettings(0.1), engine="cpu")
    sgd([theirs], [grad], 1, SGDSettings(0.1))
    assert differing(ours, theirs) == []


# How work is split


@pytest.mark.parametrize("name", COMPILED)
def test_results_do_not_depend_on_threads_or_on_what_shares_the_call(name: str, seed: int) -> None:
    shapes = [(700, 384), (0,), (64,), (), (300, 333), (100_003,), (3, 0), (5003,)]
    starts, steps = [torch.randn(shape) for shape in shapes], (1, 2, 3)
    grads = [[gradient(shape) for shape in shapes] for _ in steps]
    results = []
    for number, together in ((1, True), (2, True), (3, True), (2, False)):
        trained = [Trained(start.clone(), name, seed=index) for index, start in enumerate(starts)]
        with threads(number):
            for step in steps:
                calls = [range(len(shapes))] if together else [range(i, i + 1) for i in range(len(shapes))]
                for call in calls:
                    chosen, given = [trained[i] for i in call], [grads[step - 1][i] for i in call]
                    adamw(chosen, given, step, DECOUPLED, engine="cpu", stochastic=True)
        results.append(trained)
    for other in results[1:]:
        assert [differing(ours, theirs) for ours, theirs in zip(results[0], other, strict=True)] == [[]] * len(shapes)


def test_dtypes_and_roundings_share_a_call(seed: int) -> None:
    pairs = [both(torch.randn(5003).to(dtype), "4bit", rounding) for dtype, rounding in WAYS]
    grads = [gradient((5003,), dtype) for dtype, _ in WAYS]
    adamw([ours for ours, _ in pairs], grads, 1, DECOUPLED, engine="cpu")
    adamw([theirs for _, theirs in pairs], grads, 1, DECOUPLED)
    assert [differing(*pair) for pair in pairs] == [[]] * len(WAYS)


def test_a_call_without_parameters_does_nothing() -> None:
    cpu.adamw_step(list, DECOUPLED.numbers(1), plan=cpu.plan_of_slots([]), stochastic=True)
    cpu.sgd_step(list, NESTEROV.numbers(1), plan=cpu.plan_of_slots([]))


# Bytes, and the want of a compiler


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_step_allocates_no_tensor(name: str) -> None:
    ours = Trained(torch.zeros(1000, 1000), name)
    grad = torch.ones(1000, 1000)
    adamw([ours], [grad], 1, DECOUPLED, engine="cpu")  # the tables are made once
    with PeakBytes() as peak:
        adamw([ours], [grad], 2, DECOUPLED, engine="cpu")
    assert (peak.peak, peak.live, peak.operations) == (0, 0, [])


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_random_rounding_lets_a_second_moment_follow_smaller_gradients(engine: Engine, seed: int) -> None:
    """From nearest rounding a second moment comes back as it was: a step changes it by less than half a level."""
    shape, ratios = (130, 256), {}
    signs, numbers = torch.randn(shape).sign(), AdamWSettings(1e-3, beta2=0.999)
    for stochastic in (False, True):
        ours = Trained(torch.zeros(shape), "4bit")
        for step in range(1, 301):
            grad = torch.where(torch.arange(256) % 2 == 0, 1.0, 1.0 if step == 1 else 0.5) * signs
            adamw([ours], [grad], step, numbers, engine=engine, stochastic=stochastic)
            if engine == "reference" and step == 60:
                break
        exact = 0.25 * (1 - 0.999**step) + 0.75 * 0.999 ** (step - 1) * 0.001
        ratios[stochastic] = float(decode(ours.moments[1])[:, 1::2].mean()) / exact
    assert abs(ratios[True] - 1) < 0.1
    assert abs(ratios[False] - 1) > abs(ratios[True] - 1)


def test_without_a_compiler_the_reference_steps_and_a_warning_says_so(
    tmp_path: Path, fresh: pytest.MonkeyPatch, seed: int
) -> None:
    fresh.setenv("CXX", str(tmp_path / "missing"))
    cpu._warn_missing.cache_clear()
    try:
        ours, theirs = both(torch.randn(5003), "4bit")
        grad = gradient((5003,))
        with pytest.warns(UserWarning, match="could not be compiled.*Install a C\\+\\+ compiler, or set CXX"):
            adamw([ours], [grad], 1, DECOUPLED, engine="cpu")
        adamw([theirs], [grad], 1, DECOUPLED)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adamw([ours], [grad], 2, DECOUPLED, engine="cpu")
        adamw([theirs], [grad], 2, DECOUPLED)
        assert differing(ours, theirs) == []
    finally:
        cpu._warn_missing.cache_clear()


def test_without_a_compiler_an_optimiser_steps_all_the_same(tmp_path: Path, fresh: pytest.MonkeyPatch) -> None:
    """Through the operators, which make no slots of what the libraries are to do."""
    fresh.setenv("CXX", str(tmp_path / "missing"))
    cpu._warn_missing.cache_clear()
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    parameter.grad = torch.ones_like(parameter)
    optimizers = packlight.AdamW([parameter], lr=0.5, weight_decay=0.0), packlight.SGD([parameter], 0.5, 0.9)
    try:
        with pytest.warns(UserWarning, match="could not be compiled"):
            for optimizer in optimizers:
                optimizer.step()
        assert torch.allclose(parameter.detach(), torch.full((64, 128), -1.0), rtol=0.02)
    finally:
        cpu._warn_missing.cache_clear()


def test_the_reference_and_the_compiled_step_bear_the_same_names() -> None:
    assert all(callable(getattr(module, name)) for module in (cpu, reference) for name in ("adamw_step", "sgd_step"))
