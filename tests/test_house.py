"""The rules of the house that a machine can check: imports, length, quiet import, names, mirrored tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mhc_compile"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted(
    path for room in ("mhc_compile", "tests", "examples", "benchmarks") for path in (ROOT / room).rglob("*.py")
)

# Rooms from the ground up. A room may import its own files and those of any lower floor, never one above; rooms that
# share a floor know nothing of each other.
FLOORS: list[set[str]] = [
    {"errors"},
    {"config", "compat"},
    {"ops"},
    {"cost"},
    {"patterns", "lowering"},
    {"capture"},
    {"passes", "scheduler"},
    {"model"},
    {"report"},
    {"convert"},
    {"runtime", "verify"},
    {"api", "backend"},
    {"standalone"},
    {"pipeline"},
    {"__init__"},
    {"__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MAX_LINES = 500


def room_of(module: str) -> str:
    """``mhc_compile.passes.widen`` → ``passes``; the package itself → ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if len(parts) > 2 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def _checking_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: all but the bodies of ``if TYPE_CHECKING``, which are for the type checker only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _checking_types(child):
            for other in child.orelse:
                yield other
                yield from _statements(other)
            continue
        yield child
        yield from _statements(child)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of ours that runs in this file, also the late ones inside functions."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mhc_compile":
                    yield node.lineno, room_of(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "mhc_compile":
                for alias in node.names:
                    yield node.lineno, alias.name if alias.name in FLOOR else "__init__"
            elif module.split(".")[0] == "mhc_compile":
                yield node.lineno, room_of(module)


def upward(path: Path) -> list[str]:
    own = room_of(module_of(path))
    if own not in FLOOR:
        return [f"{path.name}: the room {own!r} has no floor; put it into FLOORS"]
    found = []
    for line, room in imports_of(path):
        if room == own:
            continue
        if room not in FLOOR:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {room!r}, which has no floor")
        elif FLOOR[room] >= FLOOR[own]:
            found.append(f"{path.relative_to(ROOT)}:{line} {own} imports {room}, which is on the same floor or above")
    return found


# ------------------------------------------------------------------------------------------------ the rules
def test_imports_point_one_way() -> None:
    assert [problem for path in SOURCES for problem in upward(path)] == []


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_source_file_has_its_test() -> None:
    missing = []
    for path in SOURCES:
        inside = path.relative_to(PACKAGE)
        # An __init__ lists names or the order of passes: it is tested through what it lists.
        wanted = ROOT / "tests" / inside.parent / f"test_{inside.stem.strip('_')}.py"
        if inside.name != "__init__.py" and not wanted.exists():
            missing.append(f"{inside} → {wanted.relative_to(ROOT)}")
    assert missing == []


def test_nothing_is_left_unfinished() -> None:
    """No to-do notes, no stubs, and every silenced type error says why."""
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "raise NotImplemented" + "Error")
    found = []
    for path in EVERYTHING:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if any(word in line for word in words):
                found.append(f"{path.relative_to(ROOT)}:{number} {line.strip()}")
            silenced = line.partition("# type: " + "ignore")[2]
            if silenced and len(silenced.partition("]")[2].strip(" #\"')(")) < 8:
                found.append(f"{path.relative_to(ROOT)}:{number} type error silenced without a reason")
    assert found == []


def test_every_source_file_says_what_it_is_for() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert [
        str(path.relative_to(ROOT)) for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)
    ] == []


QUIET = """
import logging, sys, warnings
import torch
import torch._dynamo, torch._inductor.config
import torch.nn.modules.module as nn_module
import torch.optim.optimizer as optimizer

def picture():
    loggers = {name: logger.level for name, logger in logging.root.manager.loggerDict.items()
               if isinstance(logger, logging.Logger)}
    handlers = len(logging.root.handlers)
    spaces = [torch, torch.nn.Module, torch.Tensor, torch._dynamo, torch.optim.Optimizer, torch.nn.functional,
              torch.autograd, torch.fx.Graph, torch.fx.GraphModule]
    names = {repr(space): {name: id(value) for name, value in vars(space).items()} for space in spaces}
    hooks = len(optimizer._global_optimizer_pre_hooks), len(nn_module._global_forward_pre_hooks)
    settings = {key: repr(value) for config in (torch._dynamo.config, torch._inductor.config)
                for key, value in config.get_config_copy().items()}
    return loggers, logging.root.level, handlers, names, hooks, settings, list(warnings.filters)

def watched(name, function):
    def call(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        assert not caller.startswith("mhc_compile"), f"torch.cuda.{name} called by {caller} at import"
        return function(*args, **kwargs)
    return call

for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties",
             "current_stream", "synchronize", "_lazy_init"):
    setattr(torch.cuda, name, watched(name, getattr(torch.cuda, name)))

before = picture()
import mhc_compile
for name in sys.argv[1:]:
    __import__(name)
assert not torch.cuda.is_initialized(), "CUDA initialised at import"
after = picture()
new = {name: level for name, level in after[0].items() if name not in before[0]}
ours = {name: level for name, level in new.items() if name.startswith("mhc_compile")}
assert all(level == 0 for level in ours.values()), f"logger level set at import: {ours}"
assert all(after[0][name] == level for name, level in before[0].items()), "level of another logger changed"
assert before[1:3] == after[1:3], "root logger changed"
for space, names in before[3].items():
    # New submodules appear in torch's namespace when they are imported; what was there must be the same object.
    now = after[3][space]
    changed = [name for name, value in names.items() if now.get(name) != value and not name.startswith("__")]
    assert not changed, f"patched at import: {space} {changed}"
assert before[4] == after[4], "global hook registered at import"
assert before[5] == after[5], "torch configuration changed at import"
assert before[6] == after[6], "warning filters changed at import"
"""


def test_import_does_nothing() -> None:
    """No CUDA call, no patched torch, no logger level, no hook, no changed setting: in a fresh interpreter."""
    if not (PACKAGE / "__init__.py").exists():
        pytest.skip("the package has no __init__ yet")
    modules = [module_of(path) for path in SOURCES if path.name != "__main__.py"]
    command = [sys.executable, "-c", QUIET, *modules]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_at_most_ten_public_names() -> None:
    if not (PACKAGE / "__init__.py").exists():
        pytest.skip("the package has no __init__ yet")
    import mhc_compile

    public = set(mhc_compile.__all__) - {"errors"}
    assert len(public) <= 10, sorted(public)
    assert all(getattr(mhc_compile, name, None) is not None for name in mhc_compile.__all__)


def test_the_backend_is_registered() -> None:
    """The entry point of pyproject.toml names what is there (the installed metadata may be of another checkout)."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["mhc"].partition(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        pytest.skip("there is no backend yet")
    functions = [
        node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    assert name in functions


# ------------------------------------------------------------------------------------------------ the rules work
@pytest.mark.parametrize(
    ("name", "text", "problems"),
    [
        ("ops/a.py", "from mhc_compile.errors import OptionError\nfrom mhc_compile.ops.spec import X", 0),
        ("ops/a.py", "from mhc_compile import backend", 1),
        ("ops/a.py", "def f():\n    import mhc_compile.passes.widen", 1),
        ("ops/a.py", "from mhc_compile import Options", 1),
        ("ops/a.py", "from ..patterns import sinkhorn", 1),
        ("ops/a.py", "from . import spec\nfrom .spec import X", 0),
        ("patterns/a.py", "from mhc_compile.lowering import base", 1),
        ("lowering/a.py", "from mhc_compile.patterns import base", 1),
        ("passes/a.py", "from mhc_compile.scheduler import dag", 1),
        ("passes/a.py", "from mhc_compile.capture import graph\nfrom mhc_compile.patterns import base", 0),
        ("ops/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mhc_compile.passes import Pass", 0),
        ("attic/a.py", "", 1),
        ("__main__.py", "import mhc_compile\nfrom mhc_compile.report import explain", 0),
        ("report.py", "import mhc_compile", 1),
    ],
)
def test_upward_imports_are_seen(
    name: str, text: str, problems: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "mhc_compile" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert len(upward(path)) == problems


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("import torch; torch.cuda.is_available()", "called by mhc_compile at import"),
        ("import torch; torch.nn.Module.forward = None", "patched at import"),
        ("import logging; logging.getLogger(__name__).setLevel(10)", "logger level set at import"),
    ],
)
def test_a_loud_import_is_heard(text: str, needle: str, tmp_path: Path) -> None:
    (tmp_path / "mhc_compile").mkdir()
    (tmp_path / "mhc_compile" / "__init__.py").write_text(text)
    command = [sys.executable, "-c", QUIET]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert needle in result.stderr
