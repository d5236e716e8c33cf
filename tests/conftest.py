"""Fixtures that every test shares: a fresh seed, and the check that a test leaves nothing behind."""

import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

# Before torch is imported, and for the programs that tests start: `pytest -n auto` has a process for each core, and
# threads of two processes that wait for each other on the same cores took most of the suite's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from packlight.planner.tensors import existing_tensors

#: What may stay behind, with the reason.
ALLOWED_VARIABLES = {
    "PYTEST_CURRENT_TEST",  # pytest's own
    "KMP_DUPLICATE_LIB_OK",  # set by the import of sklearn
    "KMP_INIT_AT_FORK",  # the same
    "PYTORCH_NVML_BASED_CUDA_CHECK",  # set by the import of deepspeed and lightning
    "CUDA_MODULE_LOADING",  # set by torch when CUDA is initialised
    "TORCHINDUCTOR_CACHE_DIR",  # set by the import of torch.distributed.pipelining and others
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",  # set by torch.compile
}
ALLOWED_FILES = (
    "torchinductor_",  # torch.compile's cache
    ".hypothesis",  # hypothesis's cache
    ".pytest_cache",
    "__pycache__",
)
ALLOWED_THREADS = {"tqdm_monitor"}  # tqdm's, one for the life of the process

# Tables of packlight's formats, made at their first use: 264,192 for fp8, 4,160 for each code book, of which tests make
# some of their own. More would crowd the tight budgets of later tests.
MAX_TENSOR_BYTES = 330_000 * (2 if torch.cuda.is_available() else 1)

# torch.compile's pool would outlive its test. Set here: inductor reads it at its import, which other imports may cause.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

SEED_VARIABLE = "PACKLIGHT_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE, random.SystemRandom().randrange(2**31)))

# No database: it would write into the checkout. No deadline: other jobs share the machine's cores.
hypothesis.settings.register_profile("packlight", database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile("packlight")


def pytest_report_header() -> str:
    return f"{SEED_VARIABLE}={SEED}"


def pytest_collection_finish() -> None:
    """Spare each collection of garbage, and each look for tensors, the hundreds of thousands of objects of imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seed() -> int:
    """This run's seed, fresh unless PACKLIGHT_TEST_SEED fixes it; random and torch start from it."""
    print(f"to repeat: {SEED_VARIABLE}={SEED}")  # pytest shows it where the test fails
    random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session", autouse=True)
def private_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point tempfile, here and in child processes, at a folder that no other program writes to."""
    folder = str(tmp_path_factory.mktemp("tempfile"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="session")
def first_tensor_bytes() -> int:
    return tensor_bytes()


@pytest.fixture(scope="module", autouse=True)
def keeps_no_tensors(first_tensor_bytes: int, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail where tests leave tensors alive, say in a cache: later tests would count them as used."""
    before, failed = tensor_bytes(), request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        sys.last_value = sys.last_traceback = None  # the frames of a test that failed hold its tensors
    left_bytes = tensor_bytes() - first_tensor_bytes
    if left_bytes > max(MAX_TENSOR_BYTES, before - first_tensor_bytes):  # it is said once, by the file that did it
        pytest.fail(f"the tests up to this file left {left_bytes} bytes of tensors alive", pytrace=False)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(private_temporary_folder: None) -> Iterator[None]:
    """Fail a test after which a thread, a variable, a hook, a mode, a process group or a file is left."""
    variables, others, excepthook = dict(os.environ), observe(), sys.excepthook
    yield
    sys.excepthook = excepthook  # torch.distributed puts its own there, with the first process group
    wait_for_threads(others)
    left = sorted(observe() - others) + changed_variables(variables)
    if left:
        pytest.fail("the test left behind or changed: " + ", ".join(left), pytrace=False)


def tensor_bytes() -> int:
    """Bytes of all tensors that Python holds on the CPU and on a GPU."""
    gc.collect()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    held = (tensor.untyped_storage() for device in devices for tensor in existing_tensors(device))
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())


def observe() -> set[str]:
    """What a test could leave behind, one line each; the environment is compared apart."""
    return {*threads(), *hooks(), *torch_settings(), *files()}


def threads() -> set[str]:
    # torch's own threads that once ran a Python hook show up as dummies; they end with the process.
    own = (t for t in threading.enumerate() if not isinstance(t, threading._DummyThread))
    return {f"thread {t.name} ({t.ident})" for t in own if t.name not in ALLOWED_THREADS}


def wait_for_threads(before: set[str]) -> None:
    """Give threads that were told to stop a second to do so."""
    deadline = time.monotonic() + 1.0
    while threads() - before and time.monotonic() < deadline:
        time.sleep(0.01)


def hooks() -> set[str]:
    tables = {
        f"{owner.__name__}.{name}": value
        for owner in (torch_module, torch_optimizer)
        for name, value in vars(owner).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    return {f"{name}[{key}]" for name, table in tables.items() for key in table}


def torch_settings() -> set[str]:
    """Settings and modes; one that changed shows with its new value."""
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    return {
        f"process group {'initialised' if group else 'absent'}",
        f"saved-tensor hooks {torch._C._autograd._top_saved_tensors_default_hooks(True)}",
        f"gradients {'on' if torch.is_grad_enabled() else 'off'}",
        f"default dtype {torch.get_default_dtype()}",
        f"{torch.get_num_threads()} torch threads",
        f"working directory {os.getcwd()}",
        *(f"active mode {type(mode).__name__} (number {depth})" for depth, mode in enumerate(modes)),
    }


def files() -> set[str]:
    folders = (os.getcwd(), tempfile.gettempdir())
    found = (os.path.join(folder, name) for folder in folders for name in os.listdir(folder))
    return {f"file {path}" for path in found if not os.path.basename(path).startswith(ALLOWED_FILES)}


def changed_variables(before: dict[str, str]) -> list[str]:
    after = dict(os.environ)
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return [f"environment variable {name}" for name in sorted(names - ALLOWED_VARIABLES)]
