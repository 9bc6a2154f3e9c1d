"""The folder from which kernel-builder makes a kernel for the Hugging Face hub, out of kernels/pecker_kernels itself.

    make hub-kernel
    python kernels/hub/make.py [OUTPUT] [--repo OWNER/NAME] [--built]

OUTPUT: a new folder, by default build/hub. What is compiled (csrc) stays out: Triton and torch serve alone. Operations get the
namespace of the builder, so that several versions, and an installed pecker_kernels, live in one process.
--built: also the variant of this machine as the builder lays it out, so that `kernels.get_local_kernel(OUTPUT)` loads it without
Nix; it is unsigned.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "pecker_kernels"
NAME, VERSION, LICENSE = "pecker_kernels", 1, "Apache-2.0"
REPO = "OWNER/pecker-kernels"
OLDEST = (3, 10)  # Python that the kernels package itself needs
OPERATION = re.compile(r'"pecker::(\w+)"')
NAMESPACE = "torch.ops.pecker"
FROM_BUILDER = "from {dots}_ops import add_op_namespace_prefix, ops\n"
_OPS = '''"""As kernel-builder writes it."""

import torch

_OPS_NAME = "{namespace}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def sources() -> dict[str, str]:
    """{path in the package: text}, in the builder's namespace. Raises SystemExit for what older Pythons cannot read."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE)
        text = with_namespace(path.read_text(encoding="utf-8"), len(where.parts))
        try:
            ast.parse(text, feature_version=OLDEST)
        except SyntaxError as error:
            raise SystemExit(f"error: {where}: Python {OLDEST[0]}.{OLDEST[1]} cannot read it: {error}") from None
        found[str(where)] = text
    return found


def with_namespace(text: str, depth: int) -> str:
    """A module that registers or calls operations, with the builder's names for them. depth: 1 = at the top of the package."""
    if NAMESPACE not in text and not OPERATION.search(text):
        return text
    text = OPERATION.sub(r'add_op_namespace_prefix("\1")', text).replace(NAMESPACE, "ops")
    lines = text.split("\n")
    last = max(i for i, line in enumerate(lines) if line.startswith(("from .", "import ", "from torch")))
    while not balanced("\n".join(lines[: last + 1])):
        last += 1
    return "\n".join([*lines[: last + 1], FROM_BUILDER.format(dots="." * depth).rstrip(), *lines[last + 1 :]])


def balanced(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def public_names() -> list[str]:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    found = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    return list(ast.literal_eval(found))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def make(output: Path, repo: str, built: bool) -> None:
    """Raises SystemExit where OUTPUT is not empty."""
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"error: {output}: is not empty; remove it, or give another folder")
    filled = {name: (HERE / name).read_text(encoding="utf-8") for name in ("build.toml", "flake.nix", "CARD.md")}
    filled["build.toml"] = filled["build.toml"].replace("{repo}", repo)
    filled["CARD.md"] = filled["CARD.md"].replace("{repo}", repo).replace("{names}", "`, `".join(public_names()))
    code = {**sources(), "py.typed": ""}
    write(output, filled)
    write(output / "torch-ext" / NAME, code)
    tests = {"__init__.py": "", "test_masked_adam.py": (HERE / "test_masked_adam.py").read_text(encoding="utf-8")}
    write(output / "tests", tests)
    bench = (HERE / "benchmark_masked_adam.py").read_text(encoding="utf-8")
    write(output / "benchmarks", {"benchmark_masked_adam.py": bench})
    if built:
        _build(output, code)


def _build(output: Path, code: dict[str, str]) -> None:
    """build/torch-BACKEND with metadata.json, for this machine's torch."""
    import torch

    backend = "cuda" if torch.version.cuda else "cpu"
    mark = hashlib.sha256("".join(code.values()).encode()).hexdigest()[:7]
    identity = f"_{NAME}_{backend}_{mark}"
    variant = output / "build" / f"torch-{backend}"
    files = {**code, "_ops.py": _OPS.format(namespace=identity)}
    write(variant, files)
    digests = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in files.items()}
    metadata = {
        "name": NAME.replace("_", "-"), "id": identity, "version": VERSION, "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend, **({"archs": ["8.0", "9.0"]} if backend == "cuda" else {})},
        "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, default=HERE.parents[1] / "build" / "hub")
    parser.add_argument("--repo", default=REPO, help="repository on the hub")
    parser.add_argument("--built", action="store_true", help="the variant of this machine too")
    options = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo):
        print(f"error: --repo {options.repo}: give OWNER/NAME", file=sys.stderr)
        return 2
    make(options.output, options.repo, options.built)
    print(f"kernel: {options.output}; kernel-builder makes and uploads it from there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
