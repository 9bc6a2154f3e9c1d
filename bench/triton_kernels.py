"""Compile every Triton kernel for sm_80 and sm_90 and write down what the compiler made of it. Needs no GPU.

    python bench/triton_kernels.py [--output bench/results/triton_kernels.json]

Exits with 1 if a kernel does not compile, spills registers or has narrower global accesses than it declares.
"""

import argparse
import importlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from pecker_kernels.gpu import registry

RESULTS = Path(__file__).resolve().parent / "results" / "triton_kernels.json"


def complaints(build: registry.KernelBuild, report: registry.BuildReport) -> list[str]:
    found = []
    if report.spill_bytes:
        found.append(f"spills {report.spill_bytes} bytes")
    for what in ("load", "store"):
        width, least = getattr(report, f"widest_{what}_bits"), getattr(build, f"widest_{what}_bits")
        if width < least:
            found.append(f"its widest {what} is {width} bits wide, {least} are declared")
    if build.scalar and report.vector_accesses:
        found.append("it takes several values at once from addresses that may not be aligned")
    return [f"{report.kernel} for {report.arch}: {text}" for text in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--module", help="MODULE:NAME of a list of KernelBuild, None for every kernel of the package")
    parser.add_argument("--arch", type=int, choices=registry.ARCHS, help="80 or 90 alone; default: both")
    options = parser.parse_args()
    builds = list(registry.builds())
    if options.module:
        module, _, name = options.module.partition(":")
        builds = getattr(importlib.import_module(module), name)
    rows, bad = [], []
    for build in builds:
        for arch in [options.arch] if options.arch else registry.ARCHS:
            try:
                report = registry.compile_build(build, arch)
            except triton.CompilationError as error:
                bad.append(f"{build.name} for sm_{arch} does not compile: {error}")
                continue
            rows.append(asdict(report))
            bad += complaints(build, report)
    versions = {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    options.output.write_text(
        f'{{\n "command": "python bench/triton_kernels.py",\n "versions": {json.dumps(versions)},\n'
        f' "kernels": [\n  {lines}\n ]\n}}\n'
    )
    print("\n".join(bad) or f"{len(rows)} builds, no spills: {options.output}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
