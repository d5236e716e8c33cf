"""Builds a C++ source file at first use, with the system's compiler, and loads it.

A kernel shipped as a binary has to suit the oldest CPU that anyone has; built where it runs, it uses that CPU's
own vectors. PyTorch's way to build at first use, torch.utils.cpp_extension, wants ninja and Python's headers,
goes by file times, whatever the CPU, and waits forever for a lock that a killed process left. Here the source
has a plain C interface, one call of the compiler builds it, and moving the complete file into place needs no
lock. A source may be several libraries, told apart by macros: each is built when it is wanted, and those wanted
together at the same time.

    1  the key: a hash of source, macros, compiler and its version, flags, CPU
    2  a file of that key in the cache folder, with the checksum in its name: load it
    3  none: try the wanted flags on a tiny program, go without those that are refused (a warning says which)
    4  build in a folder beside the cached files, move the result among them, load it

PyTorch has loaded an OpenMP runtime of its own, and a second one would have a second pool of threads, which
compete with the first. So the build is linked with the very file that PyTorch uses (the loader says where its
omp_get_max_threads lives), and --as-needed drops the compiler's own runtime. clang's code cannot run on GCC's
runtime: where two remain, a warning says so.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from packlight.numerics.cache import cache_folder, checksum, is_private

# No -ffast-math and no contraction to fused multiply-adds: results are compared with PyTorch's.
REQUIRED_FLAGS = "-O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -std=c++17 -Wno-psabi -shared -fPIC".split()
# It needs the linker and OpenMP's header and runtime, as a real source does.
TINY_PROGRAM = """
#ifdef _OPENMP
#include <omp.h>
#endif
extern "C" void packlight_zero(float *x, int n) {
#pragma omp parallel for
  for (int i = 0; i < n; ++i) x[i] = 0;
}
"""
KEPT_OUTPUT_CHARACTERS = 4000
# The lines of /proc/cpuinfo that tell apart what -march=native and -mcpu=native do: x86, ARM, POWER.
CPU_LINES = {"flags", "Features", "CPU implementer", "CPU part", "cpu"}

# Who waits for longer is told what for.
NOTED_SECONDS = 2.0

Flags = tuple[str, ...]
Macros = Mapping[str, int]

_log = logging.getLogger(__name__)
_loaded: dict[tuple[Path, Flags], ctypes.CDLL] = {}
_lock = threading.Lock()


class CompilerMissing(RuntimeError):
    """There is no C++ compiler that can be called."""


class CompilerFailed(RuntimeError):
    """The compiler did not make a library that can be loaded.

    Attributes:
        command: the command line, as one would type it.
        output: the last part of what the compiler, or the loader, said.
    """

    def __init__(self, source: Path, command: Sequence[str], output: str) -> None:
        self.command = shlex.join(command)
        self.output = output[-KEPT_OUTPUT_CHARACTERS:].strip()
        super().__init__(
            f"{source.name} could not be built into a library that loads.\n  {self.command}\n{self.output}\n"
            "Try another compiler (CXX=g++, for instance) or another cache folder (PACKLIGHT_CACHE)."
        )


@dataclass(frozen=True)
class _Build:
    """One source and its macros with one compiler (its command, what it says of its version) and flags by purpose."""

    source: Path
    macros: Flags
    compiler: Flags
    version: str
    flags: tuple[Flags, ...]

    def command(self, output: Path) -> list[str]:
        # The source comes first: --as-needed drops a library that stands before the code that needs it.
        flags = (flag for purpose in (REQUIRED_FLAGS, self.macros, *self.flags) for flag in purpose)
        return [*self.compiler, str(self.source), *flags, "-o", str(output)]

    @functools.cached_property
    def key(self) -> str:
        flags = REQUIRED_FLAGS, self.macros, self.flags
        parts = (self.compiler, self.version, *flags, _cpu_identity(), self.source.read_bytes())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def load(source: Path, macros: Macros | None = None) -> ctypes.CDLL:
    """Load the library that one C++ file makes, building it where no earlier build fits.

    A process loads a library once, after a failure it tries again. Threads and processes may call at the same time.

    Args:
        source: a C++17 file whose functions are `extern "C"`, and which is right without its OpenMP pragmas too.
        macros: names and values; each set of them makes a library of its own.

    Returns:
        The library; its functions have no types yet.

    Raises:
        CompilerMissing: if there is no compiler.
        CompilerFailed: if it cannot build the file, or the result does not load.
        ValueError: if others may write to the cache folder, or CXX is not a command line.
    """
    return load_all(source, [macros or {}])[0]


def load_all(source: Path, choices: Sequence[Macros]) -> list[ctypes.CDLL]:
    """Load several libraries of one C++ file, as `load` does; those that have to be built are built side by side.

    Args:
        source: see `load`.
        choices: the macros of each.

    Returns:
        The libraries.

    Raises:
        CompilerMissing, CompilerFailed, ValueError: as `load`.
    """
    path, wanted = source.resolve(), [tuple(f"-D{name}={value}" for name, value in each.items()) for each in choices]
    with _lock:
        if missing := [macros for macros in dict.fromkeys(wanted) if (path, macros) not in _loaded]:
            libraries = _load(path, missing)
            _loaded.update({(path, macros): library for macros, library in zip(missing, libraries, strict=True)})
        return [_loaded[path, macros] for macros in wanted]


def _load(source: Path, wanted: Sequence[Flags]) -> list[ctypes.CDLL]:
    compiler, version = find_compiler()
    options = _options()
    folder = cache_folder()
    flags = tuple(alternatives[0] for alternatives in options)
    builds = [_Build(source, macros, compiler, version, flags) for macros in wanted]
    found = [_cached(folder, build) for build in builds]
    if absent := [at for at, library in enumerate(found) if library is None]:
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory(prefix="building-", dir=folder, ignore_cleanup_errors=True) as scratch:
                flags = _accepted(builds[0], options, Path(scratch))
                builds = [replace(build, flags=flags) for build in builds]
                with ThreadPoolExecutor(min(len(absent), os.cpu_count() or 1)) as pool:
                    build_one = functools.partial(_cached_or_built, scratch=Path(scratch), folder=folder)
                    for at, library in zip(absent, pool.map(build_one, [builds[at] for at in absent]), strict=True):
                        found[at] = library
        except OSError as error:  # the disk is full, or the result does not load
            raise CompilerFailed(source, builds[0].command(Path("built.so")), str(error)) from error
        _note(source, len(absent), time.perf_counter() - start, folder)
    libraries = [library for library in found if library is not None]
    for complaint in dict.fromkeys(each for pair in zip(builds, libraries, strict=True) for each in _complaints(*pair)):
        warnings.warn(complaint, stacklevel=4)
    return libraries


def _cached_or_built(build: _Build, *, scratch: Path, folder: Path | None) -> ctypes.CDLL:
    return _cached(folder, build) or _built(build, Path(tempfile.mkdtemp(dir=scratch)), folder)


def _note(source: Path, number: int, seconds: float, folder: Path | None) -> None:
    """Say what somebody has waited for."""
    if seconds > NOTED_SECONDS:
        where = "not kept" if folder is None else f"kept in {folder}"
        _log.warning(
            "packlight built %d kernel(s) of %s for this processor in %.1f s, %s", number, source.name, seconds, where
        )


def find_compiler() -> tuple[tuple[str, ...], str]:
    """Find the C++ compiler: the variable CXX, else the first of c++, g++ and clang++.

    Returns:
        The start of its command line (a path, then what CXX has besides), and what it prints for --version.

    Raises:
        CompilerMissing: if none of them is there, or it does not start.
        ValueError: if CXX is not a command line.
    """
    variable = os.environ.get("CXX", "")
    try:
        words = shlex.split(variable)
    except ValueError as error:
        raise ValueError(f"CXX={variable!r} is not a command line ({error}); give one like 'ccache g++'") from error
    names = words[:1] or ["c++", "g++", "clang++"]
    path = next(filter(None, map(shutil.which, names)), None)
    if os.name != "posix" or path is None:
        raise CompilerMissing(f"no C++ compiler: {', '.join(names)} not found. Install g++, or name one in CXX.")
    compiler = (path, *words[1:])
    try:
        code, version = _run([*compiler, "--version"])
    except OSError as error:
        code, version = 1, str(error)
    if code:
        raise CompilerMissing(f"{shlex.join(compiler)} --version fails: {version.strip()}. Name another one in CXX.")
    return compiler, version


def _run(command: Sequence[str], **variables: str) -> tuple[int, str]:
    """Run a compiler with these variables and in English; its exit status and all it wrote."""
    done = subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace")


# Where builds are kept


def _cached(folder: Path | None, build: _Build) -> ctypes.CDLL | None:
    """Load an earlier build; one that is damaged, not ours or does not load is taken away."""
    for path in sorted(folder.glob(f"*-{build.key}-*.so")) if folder else ():
        with contextlib.suppress(OSError):
            # The checksum, because loading a truncated file may kill the process; the owner, because somebody may
            # have put it there while the folder was open to others.
            if is_private(path.stat()) and path.name.endswith(f"-{checksum(path)}.so"):
                return ctypes.CDLL(str(path))
        with contextlib.suppress(OSError):
            path.unlink()
    return None


# Building


def _built(build: _Build, scratch: Path, folder: Path | None) -> ctypes.CDLL:
    """Build in scratch, move the complete file to the folder, load it."""
    output = scratch / "built.so"
    command = build.command(output)
    code, said = _run(command, TMPDIR=str(scratch))
    if code:
        raise CompilerFailed(build.source, command, said)
    output.chmod(0o700)
    if folder:
        output = output.replace(folder / f"{build.source.stem}-{build.key}-{checksum(output)}.so")
    try:
        return ctypes.CDLL(str(output))
    except OSError:
        output.unlink(missing_ok=True)
        raise


def _options() -> tuple[tuple[Flags, ...], ...]:
    """List what not every compiler takes; alternatives, best first, for the CPU, wide vectors, OpenMP."""
    cpu = (("-march=native",), ("-mcpu=native",), ())
    wide = (("-mprefer-vector-width=512",), ()) if "avx512f" in _cpu_identity().split() else ((),)
    if (runtime := _openmp_runtime(_torch_library())) is None:
        return cpu, wide, (("-fopenmp",), ())
    link = (str(runtime), "-Xlinker", "-rpath", "-Xlinker", str(runtime.parent))
    if sys.platform == "darwin":  # Apple's clang has OpenMP behind -Xclang; a second libomp would abort the process
        return cpu, wide, (("-Xclang", "-fopenmp", *link), ())
    return cpu, wide, (("-fopenmp", "-Wl,--as-needed", *link), ("-fopenmp",), ())


def _accepted(build: _Build, options: Sequence[Sequence[Flags]], scratch: Path) -> tuple[Flags, ...]:
    """Choose the first alternative for each purpose with which a tiny program builds and loads."""
    source = scratch / "tiny.cpp"
    source.write_text(TINY_PROGRAM, "utf-8")

    def works(*flags: Flags) -> bool:
        output = Path(tempfile.mkdtemp(dir=scratch)) / "tiny.so"  # the loader knows a library by its path
        command = _Build(source, (), build.compiler, build.version, flags).command(output)
        with contextlib.suppress(OSError):
            return _run(command, TMPDIR=str(scratch))[0] == 0 and bool(ctypes.CDLL(str(output)))
        return False

    if works(*build.flags):
        return build.flags
    # The last alternative, no flag, needs no trial: where that fails too, the real build says why.
    return tuple(next(filter(works, alternatives[:-1]), alternatives[-1]) for alternatives in options)


@functools.cache
def _cpu_identity() -> str:
    """The architecture and the CPU's features, as far as compilers tell CPUs apart, with spaces between."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    lines = (line.partition(":") for line in text.splitlines())
    features = {name.strip(): value.strip() for name, _, value in lines if name.strip() in CPU_LINES}
    return " ".join([platform.machine(), *(features[name] for name in sorted(features))])


def _complaints(build: _Build, library: ctypes.CDLL) -> list[str]:
    """What makes this build slower than it could be."""
    kernels, name = build.source.name, shlex.join(build.compiler)
    cpu, _, openmp = build.flags
    used, torchs = _openmp_runtime(library), _openmp_runtime(_torch_library())
    found = []
    if not cpu:
        found.append(f"{name} takes neither -march=native nor -mcpu=native: {kernels} runs without wide vectors")
    if not openmp:
        found.append(f"{name} cannot build with OpenMP (libomp, libgomp): {kernels} runs on a single thread")
    if used and torchs and used != torchs:
        found.append(f"{kernels} runs on {used}, PyTorch on {torchs}: two pools of threads compete for the cores")
    return [f"{complaint}; CXX=g++ may help" for complaint in found]


# OpenMP runtimes


def _openmp_runtime(library: ctypes.CDLL) -> Path | None:
    """The file of the OpenMP runtime that a loaded library uses, if it uses one."""
    try:
        function = ctypes.cast(library.omp_get_max_threads, ctypes.c_void_p)
    except AttributeError:
        return None
    info = (ctypes.c_void_p * 4)()  # dladdr's Dl_info: the file's name, its address, a symbol's name, its address
    found = ctypes.CDLL(None).dladdr(function, info) and info[0]
    return Path(os.fsdecode(ctypes.string_at(found))).resolve() if found else None


def _torch_library() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)
