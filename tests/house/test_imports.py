"""The house: rooms in one order, read from docs/design/0001-architecture.md, doors between them, no circle anywhere."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"pecker_fast": ROOT / "pecker_fast", "pecker_kernels": ROOT / "kernels" / "pecker_kernels"}
KERNEL_IMPORTS = {"torch", "triton", "numpy", "safetensors"}
CONTENTS = {"assets"}  # folders that hold no code


def documented_order(package: str) -> list[str]:
    """The line of the architecture note that starts with the package's name."""
    text = (ROOT / "docs" / "design" / "0001-architecture.md").read_text()
    found = re.search(rf"^{package}: (.*)$", text, re.MULTILINE)
    assert found, f"the architecture note has lost the order of {package}"
    return [room.strip() for room in found[1].split("·")]


def modules(folder: Path, package: str) -> dict[str, Path]:
    """Every module below `folder`, by dotted name; a package stands for its door."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return found


def imports_of(source: str, module: str, is_door: bool = False) -> set[str]:
    """Absolute names of everything imported anywhere in `source`, inside functions and for type checkers too."""
    found: set[str] = set()
    parents = module.split(".") if is_door else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def graph(folder: Path, package: str) -> dict[str, set[str]]:
    """For each module the modules of the package that it imports: `from a import b` is a.b where that is a module."""
    known = modules(folder, package)
    found: dict[str, set[str]] = {}
    for module, path in known.items():
        names = imports_of(path.read_text(), module, path.name == "__init__.py")
        targets = {name if name in known else name.rpartition(".")[0] for name in names}
        found[module] = {name for name in targets if name in known and name != module}
    return found


def room_of(module: str) -> str:
    """ "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def violations(folder: Path, package: str, order: list[str]) -> list[str]:
    """Imports that go right, or past the door of another room of pecker_fast; modules in no room of the order."""
    found = []
    known = modules(folder, package)
    doors = {module for module, path in known.items() if path.name == "__init__.py"}
    for module, targets in graph(folder, package).items():
        room = room_of(module)
        if room in ("", "__main__"):
            continue
        if room not in order:
            found.append(f"{module}: `{room}` is not in the documented order")
            continue
        for target in sorted(targets):
            other = room_of(target)
            if other in ("", room):
                continue
            if other not in order or order.index(other) > order.index(room):
                found.append(f"{module} imports {target}")
            elif (
                package == "pecker_fast"
                and target not in doors
                and target.count(".") > 1
                and not is_named(module, target, known)
            ):
                found.append(f"{module} goes past the door: {target}")
        names = imports_of(known[module].read_text(), module, known[module].name == "__init__.py")
        lost = [name for name in names if name.startswith(f"{package}.") and not exists(name, known)]
        found += [f"{module} imports {name}, which is nowhere" for name in lost]
    return found


def is_named(module: str, target: str, known: dict[str, Path]) -> bool:
    """Whether a module of another room is imported as a whole, as `from pecker_fast.machine import hardware`."""
    return target in imports_of(known[module].read_text(), module, known[module].name == "__init__.py")


def exists(name: str, known: dict[str, Path]) -> bool:
    return name in known or name.rpartition(".")[0] in known


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, however long the way round; the package's own door looks at everything."""
    reach = {module: {t for t in targets if "." in t} for module, targets in edges.items() if "." in module}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = set().union(*(reach.get(t, set()) for t in targets)) - targets
            changed = changed or bool(more)
            targets |= more
    return sorted({tuple(sorted(m for m in reach if m in reach[n] and n in reach[m])) for n in reach if n in reach[n]})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_imports_only_rooms_to_its_left_and_by_their_doors(package):
    assert violations(PACKAGES[package], package, documented_order(package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_anywhere(package):
    assert circles(graph(PACKAGES[package], package)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_documented_room_exists(package):
    folder = PACKAGES[package]
    present = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert set(documented_order(package)) == present - {"__init__", "__main__"} - CONTENTS


@pytest.mark.parametrize(
    "line",
    [
        "from pecker_fast.runs import train",
        "import pecker_fast.cli",
        "from pecker_fast import runs",
        "from ..runs import train",
        "def f():\n    from pecker_fast.report import write_report",
        "from pecker_fast.nowhere import x",
        "from pecker_fast.networks.denoiser import Denoiser",
    ],
)
def test_a_planted_violation_is_found(tmp_path, line):
    order = documented_order("pecker_fast")
    for room, name in (
        ("networks", "denoiser"),
        ("forgetting", "losses"),
        ("engine", "deep"),
        ("runs", "x"),
        ("report", "x"),
        ("cli", "x"),
    ):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("")
        (tmp_path / room / f"{name}.py").write_text("")
    (tmp_path / "forgetting" / "losses.py").write_text("from pecker_fast.networks import Denoiser\n")
    assert violations(tmp_path, "pecker_fast", order) == []
    (tmp_path / "forgetting" / "losses.py").write_text(line + "\n")
    assert violations(tmp_path, "pecker_fast", order)
    (tmp_path / "forgetting" / "losses.py").write_text("")
    (tmp_path / "engine" / "deep.py").write_text(line + "\n")
    assert violations(tmp_path, "pecker_fast", order)
    (tmp_path / "engine" / "deep.py").write_text("")
    (tmp_path / "newcomer.py").write_text("")
    assert violations(tmp_path, "pecker_fast", order) == [
        "pecker_fast.newcomer: `newcomer` is not in the documented order"
    ]


def test_a_planted_circle_is_found(tmp_path):
    (tmp_path / "a.py").write_text("from . import b\n")
    (tmp_path / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .c import x\n")
    (tmp_path / "c.py").write_text("")
    assert circles(graph(tmp_path, "p")) == []
    (tmp_path / "c.py").write_text("def f():\n    from .a import y\n")
    assert circles(graph(tmp_path, "p")) == [("p.a", "p.b", "p.c")]


def test_the_kernels_import_torch_and_little_else():
    for module, path in modules(PACKAGES["pecker_kernels"], "pecker_kernels").items():
        for name in imports_of(path.read_text(), module, path.name == "__init__.py"):
            top = name.split(".")[0]
            known = top in KERNEL_IMPORTS or top in sys.stdlib_module_names or top == "pecker_kernels"
            assert known, f"{path.name} imports {name}"


def loaded_by(statement: str, *modules: str) -> list[str]:
    """Which of `modules` a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {modules!r} if name in sys.modules])"
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_kernels_load_without_the_engine():
    modules = ("pecker_fast", "diffusers", "pydantic", "transformers", "torch", "typer", "yaml")
    assert loaded_by("import pecker_kernels", *modules) == ["torch"]


def test_the_command_line_loads_without_torch():
    heavy = ("torch", "diffusers", "transformers", "torchmetrics", "matplotlib", "sklearn", "pecker_kernels")
    assert loaded_by("import pecker_fast.cli, pecker_fast.recipe", *heavy) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    """No file above 400 lines, half of them at most 150."""
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGES[package].rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 150
