"""Real builds of tiny sources, each with a cache folder of its own."""

import ctypes
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from packlight.numerics import compiler
from packlight.numerics.cache import cache_folder, checksum
from packlight.numerics.compiler import CompilerFailed, CompilerMissing, find_compiler, load

try:
    WORDS, VERSION = find_compiler()
except CompilerMissing:
    WORDS, VERSION = (), ""
SYSTEM_COMPILER = shlex.join(WORDS)
TORCH_RUNTIME = compiler._openmp_runtime(compiler._torch_library())
needs_compiler = pytest.mark.skipif(not SYSTEM_COMPILER, reason="there is no C++ compiler")
needs_gcc_on_linux = pytest.mark.skipif(
    "Free Software Foundation" not in VERSION or sys.platform != "linux" or TORCH_RUNTIME is None,
    reason="only GCC's code runs on PyTorch's OpenMP runtime for Linux",
)
# What clang's code on Linux does, see above: the tests of other things pass with it too.
pytestmark = pytest.mark.filterwarnings("ignore:.*two pools of threads compete")

SUM = """
#ifndef START
#define START 0
#endif
extern "C" long sum(long n) {
  long total = START;
#pragma omp parallel for reduction(+ : total)
  for (long i = 1; i <= n; ++i) total += i;
  return total;
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, not made yet, for a process that has loaded nothing."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "sum.cpp"
    path.write_text(SUM)
    return path


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as a new process."""
    monkeypatch.setattr(compiler, "_loaded", {})


def use_compiler(monkeypatch: pytest.MonkeyPatch, script: Path, *, before: str) -> None:
    """Put a shell script in front of the compiler."""
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f'#!/bin/sh\n{before}\nexec {SYSTEM_COMPILER} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(script)))


def refuse(*flags: str) -> str:
    return f'for word in "$@"; do case "$word" in {"|".join(flags)}) exit 1;; esac; done'


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def own_warnings(warned: pytest.WarningsRecorder) -> int:
    return sum("two pools of threads" not in str(warning.message) for warning in warned)


def replace_contents(path: Path, contents: bytes) -> None:
    """Replace a file, not its bytes in place: this process may have it loaded."""
    fresh = path.with_name("fresh")
    fresh.write_bytes(contents)
    fresh.chmod(0o700)
    fresh.replace(path)


# What gets built


@needs_compiler
def test_a_source_is_built_and_computes(folder: Path, source: Path) -> None:
    assert load(source).sum(100) == 5050


@needs_compiler
def test_a_product_is_rounded_before_it_is_added(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "muladd.cpp"
    source.write_text('extern "C" float muladd(float a, float b, float c) { return a * b + c; }')
    muladd = load(source).muladd
    muladd.argtypes, muladd.restype = [ctypes.c_float] * 3, ctypes.c_float
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24, and fp32 drops the last; a fused operation keeps it.
    assert muladd(1 + 2**-12, 1 + 2**-12, -1 - 2**-11) == 0


@needs_compiler
def test_arguments_in_cxx_reach_the_compiler(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path / "a folder" / "c++", before="")
    monkeypatch.setenv("CXX", os.environ["CXX"] + " -DSTART='(3 + 4)'")
    assert load(source).sum(100) == 5057


@needs_gcc_on_linux
def test_the_library_runs_on_the_openmp_runtime_of_pytorch(folder: Path, source: Path) -> None:
    before = mapped_openmp_files()
    library = load(source)
    assert library.sum(100) == 5050
    assert compiler._openmp_runtime(library) == TORCH_RUNTIME
    assert mapped_openmp_files() == before


def mapped_openmp_files() -> set[str]:
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {name for name in files if Path(name).name.startswith(("libgomp", "libomp", "libiomp"))}


@needs_gcc_on_linux
def test_a_runtime_of_another_name_stands_in_for_the_compilers_own(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = build_runtime(tmp_path)  # as in wheels whose libgomp has a hash in its name
    torchs, find = compiler._torch_library()._name, compiler._openmp_runtime
    monkeypatch.setattr(compiler, "_openmp_runtime", lambda lib: runtime if lib._name == torchs else find(lib))
    assert load(source).sum(100) == 5050
    (file,) = kept(folder)
    assert runtime.name.encode() in file.read_bytes()
    assert b"libgomp" not in file.read_bytes()


def build_runtime(folder: Path) -> Path:
    """An OpenMP runtime with one thread."""
    runtime, code = folder / "libomp-1234.so", folder / "runtime.cpp"
    code.write_text("""
      extern "C" void GOMP_parallel(void (*body)(void *), void *data, unsigned, unsigned) { body(data); }
      extern "C" int omp_get_num_threads() { return 1; }
      extern "C" int omp_get_max_threads() { return 1; }
      extern "C" int omp_get_thread_num() { return 0; }
    """)
    options = ["-shared", "-fPIC", f"-Wl,-soname,{runtime.name}", "-o"]
    subprocess.run([*WORDS, str(code), *options, str(runtime)], check=True)
    return runtime


# What is built again, and what is not


@needs_compiler
def test_a_process_asks_for_the_compiler_once(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load(source)
    use_compiler(monkeypatch, tmp_path / "c++", before="exit 1")
    assert load(source) is library
    assert load(source.parent / "." / source.name) is library


@needs_compiler
def test_a_later_process_loads_the_file_and_builds_nothing(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    use_compiler(monkeypatch, tmp_path / "c++", before=f'echo "$@" >> {shlex.quote(str(log))}')
    load(source)
    assert sum("sum.cpp" in line for line in log.read_text().splitlines()) == 1
    files = kept(folder)
    log.unlink()
    forget(monkeypatch)
    assert load(source).sum(4) == 10
    assert log.read_text() == "--version\n"
    assert kept(folder) == files


@needs_compiler
def test_source_flags_version_and_cpu_each_make_another_file(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files_after_loading() -> int:
        forget(monkeypatch)
        load(source)
        return len(kept(folder))

    assert files_after_loading() == 1
    source.write_text(SUM + "\n// another\n")
    assert files_after_loading() == 2
    monkeypatch.setenv("CXX", f"{SYSTEM_COMPILER} -DSTART=1")
    assert files_after_loading() == 3
    use_compiler(monkeypatch, tmp_path / "c++", before="")
    assert files_after_loading() == 4
    use_compiler(monkeypatch, tmp_path / "c++", before='[ "$1" = --version ] && echo newer')
    assert files_after_loading() == 5
    identity = compiler._cpu_identity()
    monkeypatch.setattr(compiler, "_cpu_identity", lambda: f"{identity} another")
    assert files_after_loading() == 6


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "emptied", "altered"])
def test_a_damaged_file_is_built_anew(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    load(source)
    (file,) = kept(folder)
    whole = file.read_bytes()
    half = len(whole) // 2
    damaged = {"truncated": whole[:half], "emptied": b"", "altered": whole[:half] + b"?" + whole[half + 1 :]}
    replace_contents(file, damaged[damage])
    forget(monkeypatch)
    assert load(source).sum(4) == 10
    assert [path.read_bytes() for path in kept(folder)] == [whole]


@needs_compiler
def test_a_sound_file_that_does_not_load_is_built_anew(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(source)
    (file,) = kept(folder)
    replace_contents(file, b"for another system")
    stem = file.name.rpartition("-")[0]
    other = file.rename(folder / f"{stem}-{checksum(file)}.so")
    forget(monkeypatch)
    assert load(source).sum(4) == 10
    assert kept(folder) == [file]
    assert not other.exists()


@needs_compiler
def test_a_file_that_others_may_write_to_is_not_loaded(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(source)
    (file,) = kept(folder)
    before = file.stat()
    file.chmod(0o777)
    forget(monkeypatch)
    load(source)
    (file,) = kept(folder)
    assert (file.stat().st_ino, file.stat().st_ctime_ns) != (before.st_ino, before.st_ctime_ns)
    assert stat.S_IMODE(file.stat().st_mode) == 0o700


@needs_compiler
def test_each_set_of_macros_makes_a_library(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = compiler.load_all(source, [{"START": 1}, {"START": 2}, {"START": 1}])
    assert [library.sum(4) for library in libraries] == [11, 12, 11]
    assert len(kept(folder)) == 2
    assert compiler.load_all(source, [{"START": 2}]) == libraries[1:2]
    forget(monkeypatch)
    assert load(source, {"START": 2}).sum(4) == 12
    assert len(kept(folder)) == 2


# Many at once


@needs_compiler
def test_threads_share_one_build(folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    use_compiler(monkeypatch, tmp_path / "c++", before=f'echo "$@" >> {shlex.quote(str(log))}')
    with ThreadPoolExecutor(8) as pool:
        libraries = list(pool.map(load, [source] * 8))
    assert all(library is libraries[0] for library in libraries)
    assert sum("sum.cpp" in line for line in log.read_text().splitlines()) == 1


@needs_compiler
def test_processes_that_build_at_the_same_time_do_each_other_no_harm(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    # Each compiler of sum.cpp waits until the other has started, at most 60 s.
    wait = (
        f'cd {shlex.quote(str(meeting))}; case "$1" in *sum.cpp) touch $$; for i in $(seq 600); do '
        "[ $(ls | wc -l) -ge 2 ] && break; sleep 0.1; done; [ $(ls | wc -l) -ge 2 ] || exit 1;; esac"
    )
    use_compiler(monkeypatch, tmp_path / "c++", before=wait)
    program = "import sys, pathlib; from packlight.numerics.compiler import load; "
    program += "print(load(pathlib.Path(sys.argv[1])).sum(100))"
    command = [sys.executable, "-c", program, str(source)]
    environment = {**os.environ, "PYTHONPATH": str(Path(compiler.__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert load(source).sum(100) == 5050
        assert other.communicate(timeout=60)[0] == "5050\n"
    assert len(list(meeting.iterdir())) == 2
    assert all(path.suffix == ".so" for path in kept(folder))
    forget(monkeypatch)
    assert load(source).sum(4) == 10


# The folder


def test_the_folder_is_private_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert cache_folder() == folder
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
@pytest.mark.parametrize("linked", [False, True], ids=["named", "linked"])
def test_a_folder_that_others_may_write_to_is_refused(folder: Path, tmp_path: Path, mode: int, linked: bool) -> None:
    shared = tmp_path / "shared" if linked else folder
    shared.mkdir()
    shared.chmod(mode)
    if linked:
        folder.symlink_to(shared)
    with pytest.raises(ValueError, match=f"mode 0{mode:o}.*nobody else may write.*chmod go-w .*PACKLIGHT_CACHE"):
        cache_folder()


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ValueError, match=rf"belongs to user {owner} .*\(user {owner + 1}\)"):
        cache_folder()


@needs_compiler
def test_a_refused_folder_stops_the_load(folder: Path, source: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="nobody else may write"):
        load(source)
    assert kept(folder) == []


@needs_compiler
def test_without_a_folder_it_builds_for_this_process_and_warns(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("a file where the folder should be")
    monkeypatch.setenv("PACKLIGHT_CACHE", str(folder / "below"))
    with pytest.warns(UserWarning, match="cannot keep its compiled kernels") as warned:
        assert load(source).sum(100) == 5050
    assert own_warnings(warned) == 1


def test_the_default_folder_follows_the_xdg_variable_and_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PACKLIGHT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "packlight"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # invalid, says the specification
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "packlight"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "packlight"


# What goes wrong


@needs_compiler
def test_a_source_with_an_error_raises_what_the_compiler_said(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int f() { return nonsense; }")
    with pytest.raises(CompilerFailed, match="nonsense") as raised:
        load(source)
    assert f" {shlex.quote(str(source))} -O3 " in raised.value.command
    assert "nonsense" in raised.value.output
    assert raised.value.command in str(raised.value)
    assert kept(folder) == []


@needs_compiler
def test_a_library_that_does_not_load_raises_what_the_loader_said(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "unlinked.cpp"
    source.write_text('extern "C" int nowhere(); int here = nowhere();')
    with pytest.raises(CompilerFailed, match="nowhere") as raised:
        load(source)
    assert f" {shlex.quote(str(source))} -O3 " in raised.value.command
    assert kept(folder) == []


@needs_compiler
def test_only_the_end_of_a_long_output_is_kept(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    babble = '[ "$1" = --version ] || { seq 20000; echo the end; exit 1; }'
    use_compiler(monkeypatch, tmp_path / "c++", before=babble)
    with pytest.raises(CompilerFailed) as raised:
        load(source)
    assert raised.value.output.endswith("\n20000\nthe end")
    assert len(raised.value.output) <= compiler.KEPT_OUTPUT_CHARACTERS


@needs_compiler
def test_an_interrupted_build_leaves_nothing(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiler._run

    def interrupted(command: list[str], **variables: str) -> tuple[int, str]:
        outcome = run(command, **variables)
        if str(source) in command:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(compiler, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(source)
    assert kept(folder) == []


@needs_compiler
def test_after_a_failure_it_tries_again(folder: Path, source: Path) -> None:
    source.write_text("nonsense")
    with pytest.raises(CompilerFailed):
        load(source)
    source.write_text(SUM)
    assert load(source).sum(100) == 5050


@needs_compiler
def test_without_openmp_it_warns_and_runs_on_a_single_thread(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path / "c++", before=refuse("-fopenmp"))
    for _ in range(2):  # the second takes the file of the first, and says so too
        forget(monkeypatch)
        with pytest.warns(UserWarning, match=r"cannot build with OpenMP .* sum\.cpp runs on a single thread") as warned:
            assert load(source).sum(100) == 5050
        assert own_warnings(warned) == 1
        assert len(kept(folder)) == 1


@needs_compiler
def test_a_refused_cpu_flag_is_left_out_with_a_warning(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path / "c++", before=refuse("-march=native", "-mcpu=native"))
    with pytest.warns(UserWarning, match="neither -march=native nor -mcpu=native") as warned:
        assert load(source).sum(100) == 5050
    assert own_warnings(warned) == 1


@needs_compiler
def test_a_refused_vector_width_is_left_out_silently(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(monkeypatch, tmp_path / "c++", before=refuse("-mprefer-vector-width=512"))
    assert load(source).sum(100) == 5050


@needs_compiler
def test_a_second_openmp_runtime_is_warned_of(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = compiler._torch_library()._name
    monkeypatch.setattr(
        compiler, "_openmp_runtime", lambda library: Path("/torchs") if library._name == torchs else Path("/another")
    )
    monkeypatch.setattr(compiler, "_options", lambda: ((("-march=native",), ()), ((),), (("-fopenmp",), ())))
    with pytest.warns(UserWarning, match=r"runs on /another, PyTorch on /torchs: two pools"):
        assert load(source).sum(100) == 5050


# Finding the compiler


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is all of PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path / "bin"


def test_no_compiler_is_an_error_that_names_those_tried(folder: Path, source: Path, empty_path: Path) -> None:
    with pytest.raises(CompilerMissing, match=r"c\+\+, g\+\+, clang\+\+ not found.*CXX"):
        load(source)
    assert not folder.exists()


def test_a_compiler_in_cxx_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(CompilerMissing, match="no-such-compiler not found"):
        find_compiler()


@pytest.mark.parametrize("program", ["#!/bin/sh\necho out of order\nexit 1\n", "\0 not a program\n"])
def test_a_compiler_that_does_not_start_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    broken = tmp_path / "broken"
    broken.write_text(program)
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(CompilerMissing, match=r"broken --version fails: .*(out of order|format)"):
        find_compiler()


def test_an_unbalanced_quote_in_cxx_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '-DX")
    with pytest.raises(ValueError, match=r"CXX=.* is not a command line"):
        find_compiler()


def test_the_first_compiler_on_path_is_taken(empty_path: Path) -> None:
    for name in ("clang++", "g++", "c++"):
        (empty_path / name).write_text(f"#!/bin/sh\necho this is {name}\n")
        (empty_path / name).chmod(0o755)
        assert find_compiler() == ((str(empty_path / name),), f"this is {name}\n")
    assert shutil.which("c++") == str(empty_path / "c++")
