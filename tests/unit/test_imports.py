"""The one-way flow of docs/design/0001-architecture.md: a module imports only what stands left of it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pecker_fast"
KERNELS = ROOT / "kernels" / "pecker_kernels"
DOORS = {"__init__", "__main__"}  # the package's own doors look at everything
KERNEL_IMPORTS = {"torch", "triton", "numpy", "safetensors"}


def documented_order() -> list[str]:
    text = (ROOT / "docs" / "design" / "0001-architecture.md").read_text()
    block = re.search(r"## One-way flow.*?```\n(.*?)```", text, re.DOTALL)
    assert block, "the architecture note has lost its list"
    return [name.strip() for name in re.split(r"[·\n]", block[1]) if name.strip()]


def imports_of(source: str, module: str) -> set[str]:
    """Absolute names of everything imported anywhere in `source`, which is the dotted `module` (a file, no package)."""
    found: set[str] = set()
    parents = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def violations(folder: Path, order: list[str]) -> list[str]:
    """Every import that goes right, and every module that the order does not name."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        top = parts[0]
        if len(parts) == 1 and top in DOORS:
            continue
        if top not in order:
            found.append(f"{path.name}: `{top}` is not in the documented order")
            continue
        for name in imports_of(path.read_text(), ".".join(["pecker_fast", *parts])):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package != "pecker_fast" or other == top or other == "__version__":
                continue
            if other not in order or order.index(other) > order.index(top):
                found.append(f"{'/'.join(parts)} imports {name}")
    return found


def test_a_module_imports_only_what_stands_left_of_it():
    assert violations(PACKAGE, documented_order()) == []


def test_every_documented_module_exists():
    present = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(documented_order()) == present - DOORS


@pytest.mark.parametrize(
    "line",
    [
        "from pecker_fast.runs.start import train",
        "import pecker_fast.cli.app",
        "from pecker_fast import loop",
        "from .run import train",
        "def f():\n    from pecker_fast.report import write_report",
        "from pecker_fast.nowhere import x",
    ],
)
def test_a_planted_violation_is_found(tmp_path, line):
    order = documented_order()
    (tmp_path / "losses.py").write_text("from pecker_fast.networks.denoiser import Denoiser\n")
    assert violations(tmp_path, order) == []
    (tmp_path / "losses.py").write_text(line + "\n")
    assert len(violations(tmp_path, order)) == 1
    (tmp_path / "losses.py").unlink()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "deep.py").write_text(line.replace("from .run", "from ..run") + "\n")
    assert len(violations(tmp_path, order)) == 1
    (tmp_path / "newcomer.py").write_text("")
    assert "newcomer.py: `newcomer` is not in the documented order" in violations(tmp_path, order)


def test_the_kernels_import_torch_and_little_else():
    for path in KERNELS.rglob("*.py"):
        module = ".".join(["pecker_kernels", *path.relative_to(KERNELS).with_suffix("").parts])
        for name in imports_of(path.read_text(), module):
            top = name.split(".")[0]
            known = top in KERNEL_IMPORTS or top in sys.stdlib_module_names or top == "pecker_kernels"
            assert known, f"{path.name} imports {name}"


def loaded_by(statement: str, *modules: str) -> list[str]:
    """Which of `modules` a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {modules!r} if name in sys.modules])"
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_kernels_load_without_the_engine():
    modules = ("pecker_fast", "diffusers", "pydantic", "transformers", "torch", "typer", "yaml")
    assert loaded_by("import pecker_kernels", *modules) == ["torch"]


def test_the_command_line_loads_without_torch():
    heavy = ("torch", "diffusers", "transformers", "torchmetrics", "matplotlib", "sklearn", "pecker_kernels")
    assert loaded_by("import pecker_fast.cli.app, pecker_fast.recipe.schema", *heavy) == []
