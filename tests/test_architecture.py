"""Holds the house's rules by reading the syntax trees of src/packlight; nothing of it is imported.

The table of import arrows is the one in the architecture's "Who may import whom". Each rule is a function
from the modules to complaints, each `path:line: what is wrong`. The second half of the file feeds each rule
a source that breaks it, and one that does not.
"""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "packlight"

#: The first part of a module's name (below packlight) -> the modules it may import besides its own folder and
#: records. A folder's name stands for all in it. "" is packlight/__init__.py.
ARROWS: dict[str, set[str]] = {
    "budget": set(),
    "records": set(),
    "ranks": set(),
    "schedules": set(),
    "serial": set(),
    "step": set(),
    "shortage": set(),
    "control_groups": set(),
    "measurement": set(),
    "memory": set(),
    "lanes": set(),
    "numerics": set(),
    "optim": {"numerics", "activations.copies", "activations.extents", "activations.pages"},
    "activations": {"numerics"},
    "pipeline": {"activations.engine", "activations.offload", "activations.tier"},
    "sharding": set(),
    "checkpoints": {"optim", "numerics"},
    "planner": {"optim", "activations", "pipeline", "sharding", "numerics.formats"},
    "report": set(),
    "integrations": {"planner", "optim.adamw", "sharding.zero"},  # what the frameworks take: an optimiser, a config
    "cli": {"planner", "integrations.script", "report", "demo", "checkpoints", "doctor"},
    "doctor": {"numerics", "optim", "activations", "planner"},  # tries what they do
    "demo": set(),
    "": {"numerics", "optim", "activations", "pipeline", "sharding", "planner", "report"},
    "__main__": {"cli"},  # `python -m packlight` is the console script
}
#: Those that may not import records, or not their own folder: each demo and integration stands alone.
NO_RECORDS = {"demo"}
NO_SIBLINGS = {"integrations"}

#: The third-party packages that a part may import; optional frameworks have a table of their own.
THIRD_PARTY: dict[str, set[str]] = {
    "budget": set(),
    "records": set(),
    "ranks": set(),
    "schedules": set(),
    "serial": set(),
    "step": set(),
    "shortage": set(),
    "control_groups": set(),
    "measurement": set(),
    "memory": set(),
    "lanes": set(),
    "report": {"rich", "plotly"},
    "cli": {"torch", "click", "rich"},
    "planner": {"torch", "numpy", "scipy"},
    "pipeline": {"torch", "numpy"},
    "doctor": {"torch"},
    "demo": {"torch", "rich"},
    "__main__": set(),
}
ELSEWHERE = {"torch"}

#: The only files that may import an optional framework, and only at the top.
FRAMEWORK_FILES: dict[str, set[str]] = {
    "deepspeed": {"sharding.zero", "integrations.deepspeed"},
    "transformers": {"integrations.transformers"},
    "lightning": {"integrations.lightning"},
    "accelerate": {"integrations.accelerate"},
    "triton": {
        f"numerics.{name}"
        for name in ("gpu", "gpu_codes", "gpu_groups", "gpu_kernels", "gpu_matrices", "gpu_moments", "gpu_tables")
    },
    "bitsandbytes": set(),  # so far benchmarks and tests compare with it, the package does not use it
}

BANNED_NAMES = {"utils", "common", "misc", "helpers", "core"}
MOST_FILE_LINES = 350
MOST_EXPORTS, MOST_ROOT_EXPORTS = 12, 14
MOST_PARAMETERS = 7
LONG_BODY_LINES, LONGEST_BODY_LINES, MEDIAN_BODY_LINES = 30, 80, 12

#: (part, function) that may take more parameters or a positional boolean, with the reason.
EXEMPT = {
    ("optim", "AdamW.__init__"): "torch.optim.AdamW's signature comes first",
    ("optim", "Adam.__init__"): "torch.optim.Adam's signature comes first",
    ("optim", "SGD.__init__"): "torch.optim.SGD's signature comes first",
    ("numerics", "adamw_step"): "an operator's schema has tensors and numbers, no records",
    ("numerics", "sgd_step"): "an operator's schema has tensors and numbers, no records",
    ("numerics", "adamw_kernel"): "a launch hands over pointers and numbers, no records",
    ("numerics", "sgd_kernel"): "a launch hands over pointers and numbers, no records",
    ("numerics", "gather"): "a Triton function takes pointers and numbers, no records",
    ("numerics", "store_second"): "a Triton function takes pointers and numbers, no records",
    ("numerics", "store_roots"): "a Triton function takes pointers and numbers, no records",
    ("planner", "plan"): "the documented interface",
    ("planner", "fit"): "the documented interface",
}
#: Methods that override torch's, whose signature they keep.
TORCH_METHODS = {"train", "requires_grad_", "zero_grad", "_load_from_state_dict"}
TORCH_METHODS |= {"backward_one_chunk", "backward_weight_one_chunk"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file: its path below packlight, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def name(self) -> str:
        """Dotted, below packlight; "" for packlight itself."""
        return self.path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]

    def at(self, line: int, message: str) -> str:
        return f"src/packlight/{self.path}:{line}: {message}"


@dataclass(frozen=True)
class Import:
    """One imported module: a dotted absolute name, where it stands, and whether at the file's top."""

    target: str
    line: int
    at_top: bool


def read_modules() -> list[Module]:
    paths = sorted(SOURCE.rglob("*.py"))
    return [Module(path.relative_to(SOURCE).as_posix(), path.read_text("utf-8")) for path in paths]


# What a module imports


def imports(module: Module, names: set[str]) -> Iterator[Import]:
    """Every import, those inside functions and under TYPE_CHECKING too; `names` are packlight's modules."""
    for node in ast.walk(module.tree):
        for target in imported_by(node, module, names):
            yield Import(target, getattr(node, "lineno", 1), node in module.tree.body)


def imported_by(node: ast.AST, module: Module, names: set[str]) -> list[str]:
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            origin = absolute(node, module)
            return sorted({submodule_or_origin(origin, alias.name, names) for alias in node.names})
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(target)), *_],
        ):
            return [target]
    return []


def absolute(node: ast.ImportFrom, module: Module) -> str:
    """The module that `from ... import` names, with leading dots resolved."""
    if not node.level:
        return node.module or ""
    steps = ["packlight", *filter(None, module.name.split("."))]
    up = node.level - module.is_package
    return ".".join([*steps[: len(steps) - up], *filter(None, [node.module])])


def submodule_or_origin(origin: str, name: str, names: set[str]) -> str:
    """`from a import b` imports a.b where that is a module of ours, else a."""
    return f"{origin}.{name}" if below_packlight(f"{origin}.{name}") in names else origin


def below_packlight(target: str) -> str | None:
    """The name below packlight, or None for another package's module."""
    first, _, rest = target.partition(".")
    return rest if first == "packlight" else None


def inside(name: str, folder: str) -> bool:
    return name == folder or name.startswith(folder + ".")


# The rules: modules -> complaints


def keeps_to_the_arrows(modules: Sequence[Module]) -> Iterator[str]:
    names = {module.name for module in modules}
    for module in modules:
        if module.part not in ARROWS:
            yield module.at(1, f"{module.part!r} is not in the architecture's table of imports")
            continue
        for found in imports(module, names):
            target = below_packlight(found.target)
            if target is not None and not may_import(module, target):
                yield module.at(found.line, f"{module.part or 'packlight'} may not import {found.target}")


def may_import(module: Module, target: str) -> bool:
    allowed = set(ARROWS[module.part])
    if module.part not in NO_RECORDS:
        allowed |= {"budget", "control_groups", "lanes", "measurement", "memory", "ranks", "records", "schedules"}
        allowed |= {"serial", "shortage", "step"}
    if module.part not in {"", *NO_SIBLINGS}:
        allowed.add(module.part)
    return any(inside(target, name) for name in allowed)


def imports_only_its_third_parties(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        allowed = {"packlight", *sys.stdlib_module_names, *FRAMEWORK_FILES}
        allowed |= THIRD_PARTY.get(module.part, ELSEWHERE)
        for found in imports(module, set()):
            if found.target.partition(".")[0] not in allowed:
                yield module.at(found.line, f"{module.part or 'packlight'} may not import {found.target}")


def imports_frameworks_in_their_file_only(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        for found in imports(module, set()):
            framework = framework_of(found.target)
            if framework is None:
                continue
            if module.name not in FRAMEWORK_FILES[framework]:
                yield module.at(found.line, f"{framework} is optional and may not be imported here")
            elif not found.at_top:
                yield module.at(found.line, f"{framework} must be imported at the top of the file")


def framework_of(target: str) -> str | None:
    first = target.partition(".")[0]
    first = {"pytorch_lightning": "lightning", "lightning_fabric": "lightning"}.get(first, first)
    return first if first in FRAMEWORK_FILES else None


def has_no_import_cycle(modules: Sequence[Module]) -> Iterator[str]:
    names = {module.name: module for module in modules}
    edges: dict[str, dict[str, int]] = {module.name: {} for module in modules}
    for module in modules:
        for found in imports(module, set(names)):
            target = below_packlight(found.target)
            if target in names:
                edges[module.name].setdefault(target, found.line)
    for start in sorted(edges):
        for target, line in sorted(edges[start].items()):
            if start in reachable(target, edges):
                yield names[start].at(line, f"import cycle through packlight.{target}")


def reachable(start: str, edges: dict[str, dict[str, int]]) -> set[str]:
    seen, waiting = {start}, [start]
    while waiting:
        fresh = edges[waiting.pop()].keys() - seen
        seen |= fresh
        waiting += fresh
    return seen


def has_telling_names(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        for name in module.name.split("."):
            if name.strip("_") in BANNED_NAMES:
                yield module.at(1, f"the name {name!r} says nothing; name the idea")


def has_docstrings(modules: Sequence[Module]) -> Iterator[str]:
    return (module.at(1, "no docstring") for module in modules if not ast.get_docstring(module.tree))


def exports_few_names(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.is_package:
            names, most = exported(module), MOST_EXPORTS if module.name else MOST_ROOT_EXPORTS
            if names is None:
                yield module.at(1, "an __init__.py with code in it states __all__ as a plain list")
            elif len(names) > most:
                yield module.at(1, f"__all__ has {len(names)} names, more than {most}")


def exported(module: Module) -> list[str] | None:
    """The names in __all__, none for a file that is only a docstring; None where __all__ is missing."""
    if len(module.tree.body) == 1 and ast.get_docstring(module.tree):
        return []
    for node in module.tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id="__all__"), value=ast.expr() as value):
                pass
            case _:
                continue
        return list(ast.literal_eval(value))
    return None


def keeps_files_short(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        lines = len(module.text.splitlines())
        if lines > MOST_FILE_LINES:
            yield module.at(lines, f"{lines} lines, more than {MOST_FILE_LINES}")


def keeps_functions_short(modules: Sequence[Module]) -> Iterator[str]:
    sizes = [(body_lines(node), module, node) for module in modules for _, node in functions(module.tree)]
    longest = sorted(sizes, key=lambda entry: -entry[0])
    typical, num_long = (
        median([0, *(size for size, _, _ in sizes)]),
        sum(s >= LONG_BODY_LINES for s, _, _ in sizes),
    )
    for size, module, node in longest:
        if size > LONGEST_BODY_LINES:
            yield module.at(node.lineno, f"{node.name} has {size} lines, more than {LONGEST_BODY_LINES}")
    if num_long * 10 > len(sizes):
        for size, module, node in longest[:num_long]:
            yield module.at(node.lineno, f"{node.name} has {size} lines; over one in ten have {LONG_BODY_LINES}+")
    if typical > MEDIAN_BODY_LINES:
        yield f"src/packlight:1: the median function has {typical} lines, more than {MEDIAN_BODY_LINES}"


def body_lines(node: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its qualified name, those inside classes and functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield prefix + node.name, node
        name = f"{prefix}{node.name}." if isinstance(node, Function | ast.ClassDef) else prefix
        yield from functions(node, name)


def takes_few_parameters(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        for name, node in functions(module.tree):
            number = len(parameters(node)) + len(node.args.kwonlyargs)
            public = all(step == "__init__" or not step.startswith("_") for step in name.split("."))
            exempt = (module.part, name) in EXEMPT or is_command(node)
            if public and not exempt and number > MOST_PARAMETERS:
                yield module.at(node.lineno, f"{name} has {number} parameters, more than {MOST_PARAMETERS}")


def is_command(node: Function) -> bool:
    """Whether click calls it: then it has one parameter for each option."""
    calls = (item.func for item in node.decorator_list if isinstance(item, ast.Call))
    return any(isinstance(call, ast.Attribute) and call.attr == "command" for call in calls)


def parameters(node: Function) -> list[ast.arg]:
    """Those that can be given by position, without self and cls."""
    return [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in {"self", "cls"}]


def takes_booleans_by_keyword(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        for name, node in functions(module.tree):
            if (module.part, name) in EXEMPT or node.name in TORCH_METHODS:
                continue
            # Defaults belong to the last parameters.
            defaults = dict(zip(reversed(parameters(node)), reversed(node.args.defaults), strict=False))
            for argument in parameters(node):
                if is_boolean(argument.annotation) or is_truth_value(defaults.get(argument)):
                    yield module.at(argument.lineno, f"{name} takes the boolean {argument.arg} by position")


def is_boolean(annotation: ast.AST | None) -> bool:
    """Whether the annotation is bool, or a union or Optional with bool in it."""
    match annotation:
        case ast.Name(id="bool"):
            return True
        case ast.Constant(value=str(text)):
            return is_boolean(ast.parse(text, mode="eval").body)
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return is_boolean(left) or is_boolean(right)
        case ast.Subscript(value=ast.Name(id="Optional" | "Union" | "Annotated"), slice=ast.Tuple(elts=parts)):
            return any(map(is_boolean, parts))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=part):
            return is_boolean(part)
    return False


def is_truth_value(default: ast.expr | None) -> bool:
    return isinstance(default, ast.Constant) and isinstance(default.value, bool)


Rule = Callable[[Sequence[Module]], Iterable[str]]
RULES: list[Rule] = [
    keeps_to_the_arrows,
    imports_only_its_third_parties,
    imports_frameworks_in_their_file_only,
    has_no_import_cycle,
    has_telling_names,
    has_docstrings,
    exports_few_names,
    keeps_files_short,
    keeps_functions_short,
    takes_few_parameters,
    takes_booleans_by_keyword,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_packlight(rule: Rule) -> None:
    complaints = list(rule(read_modules()))
    assert not complaints, "\n".join(["", *complaints])


# The rules themselves: each catches what it is for

LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 31
SEVEN = "a, b, c, d, e, f, g"
BREACHES: list[tuple[Rule, dict[str, str], str]] = [
    (keeps_to_the_arrows, {"optim/adamw.py": "import packlight.planner"}, "optim/adamw.py:1"),
    (keeps_to_the_arrows, {"optim/adamw.py": "from packlight import cli", "cli.py": ""}, "adamw.py:1"),
    (keeps_to_the_arrows, {"optim/adamw.py": "from packlight import cli"}, "adamw.py:1"),
    (keeps_to_the_arrows, {"optim/adamw.py": "\nfrom ..planner.solve import solve"}, "adamw.py:2"),
    (keeps_to_the_arrows, {"optim/__init__.py": "from ..planner import solve"}, "optim/__init__.py:1"),
    (keeps_to_the_arrows, {"numerics/cpu.py": "def f():\n    from .. import optim"}, "cpu.py:2"),
    (
        keeps_to_the_arrows,
        {"report/text.py": "if TYPE_CHECKING:\n    from packlight.planner import Plan"},
        "text.py:2",
    ),
    (keeps_to_the_arrows, {"pipeline/stage.py": "from packlight.activations import disk"}, "stage.py:1"),
    (keeps_to_the_arrows, {"planner/cost.py": "from packlight.numerics import reference"}, "cost.py:1"),
    (keeps_to_the_arrows, {"planner/cost.py": "import packlight.numerics.formats_old"}, "cost.py:1"),
    (keeps_to_the_arrows, {"cli.py": "from packlight.integrations import lightning"}, "cli.py:1"),
    (keeps_to_the_arrows, {"__init__.py": "from . import cli", "cli.py": ""}, "__init__.py:1"),
    (keeps_to_the_arrows, {"demo/train.py": "import packlight.records"}, "train.py:1"),
    (
        keeps_to_the_arrows,
        {"integrations/a.py": "from . import b", "integrations/b.py": ""},
        "integrations/a.py:1",
    ),
    (keeps_to_the_arrows, {"planner/a.py": "import_module('packlight.cli')"}, "planner/a.py:1"),
    (keeps_to_the_arrows, {"errors.py": ""}, "'errors' is not in"),
    (imports_only_its_third_parties, {"records.py": "import json\nimport torch"}, "records.py:2"),
    (imports_only_its_third_parties, {"report/html.py": "from torch import nn"}, "html.py:1"),
    (imports_only_its_third_parties, {"planner/solve.py": "import pandas as pd"}, "solve.py:1"),
    (imports_frameworks_in_their_file_only, {"planner/apply.py": "import transformers"}, "apply.py:1"),
    (
        imports_frameworks_in_their_file_only,
        {"sharding/zero.py": "def f():\n    import deepspeed.ops"},
        "zero.py:2: deepspeed must",
    ),
    (imports_frameworks_in_their_file_only, {"cli.py": "import pytorch_lightning"}, "cli.py:1: lightning"),
    (has_no_import_cycle, {"a.py": "from packlight import b", "b.py": "import packlight.a"}, "b.py:1"),
    (has_no_import_cycle, {"p/__init__.py": "from .a import x", "p/a.py": "from . import y"}, "p/a.py:1"),
    (has_telling_names, {"planner/_utils.py": ""}, "planner/_utils.py:1"),
    (has_telling_names, {"core/plan.py": ""}, "core/plan.py:1"),
    (has_docstrings, {"cli.py": "x = 1"}, "cli.py:1"),
    (exports_few_names, {"optim/__init__.py": "import torch"}, "optim/__init__.py:1"),
    (exports_few_names, {"optim/__init__.py": f"__all__ = {['x'] * 13}"}, "13 names"),
    (exports_few_names, {"__init__.py": f"__all__: list[str] = {['x'] * 15}"}, "15 names"),
    (keeps_files_short, {"cli.py": "\n" * 351}, "cli.py:351"),
    (keeps_functions_short, {"cli.py": LONG_FUNCTION}, "cli.py:1: f has 31 lines; over"),
    (keeps_functions_short, {"cli.py": LONG_FUNCTION}, "the median function has"),
    (keeps_functions_short, {"cli.py": "\ndef f():\n" + "    x = 1\n" * 81}, "cli.py:2: f has 81"),
    (takes_few_parameters, {"cli.py": f"def f({SEVEN}, *, h): ..."}, "cli.py:1: f has 8"),
    (takes_few_parameters, {"a.py": f"class A:\n  def __init__(self, {SEVEN}, h): ..."}, "a.py:2"),
    (takes_booleans_by_keyword, {"a.py": "def f(x: bool): ..."}, "f takes the boolean x"),
    (takes_booleans_by_keyword, {"a.py": "def f(x, y=True): ..."}, "the boolean y"),
    (takes_booleans_by_keyword, {"a.py": "class A:\n  def f(self, x: 'bool | None'): ..."}, "a.py:2: A.f"),
    (takes_booleans_by_keyword, {"a.py": "def f(x: Optional[bool] = None): ..."}, "the boolean x"),
]

SOUND = {
    "__init__.py": '"""Docs."""\nfrom packlight.planner import plan\n__all__ = ["plan"]',
    "records.py": '"""Docs."""\nfrom __future__ import annotations\nimport json',
    "numerics/__init__.py": '"""Docs."""\n__all__ = []',
    "numerics/formats.py": '"""Docs."""\nimport torch',
    "numerics/gpu.py": '"""Docs."""\nimport triton.language as tl',
    "activations/offload.py": '"""Docs."""\nfrom ..numerics import formats\nfrom .. import records',
    "pipeline/stage.py": '"""Docs."""\nfrom packlight.activations import offload',
    "planner/__init__.py": '"""Docs."""\nfrom .solve import plan\n__all__ = ["plan"]',
    "planner/solve.py": '"""Docs."""\nfrom packlight.numerics import formats\nimport packlight.records',
    "cli.py": '"""Docs."""\nimport click\nfrom packlight import planner\nfrom .integrations import script',
    "integrations/script.py": '"""Docs."""\ndef run(path, *, exact: bool = False, **rest: bool): ...',
    "demo/__init__.py": '"""Docs."""',
    "demo/train.py": '"""Docs."""\nimport torch, rich.progress, math',
}


def modules_of(files: dict[str, str]) -> list[Module]:
    return [Module(path, text) for path, text in files.items()]


@pytest.mark.parametrize(("rule", "files", "complaint"), BREACHES)
def test_rule_catches_its_breach(rule: Rule, files: dict[str, str], complaint: str) -> None:
    complaints = list(rule(modules_of(files)))
    assert any(complaint in line for line in complaints), complaints


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_lets_a_sound_package_pass(rule: Rule) -> None:
    assert list(rule(modules_of(SOUND))) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_passes_where_nothing_is_written_yet(rule: Rule) -> None:
    assert list(rule([])) == []


def test_every_rule_has_a_breach() -> None:
    assert {rule for rule, _, _ in BREACHES} == set(RULES)
