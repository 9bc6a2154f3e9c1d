"""Every Triton kernel with the arguments it is launched with, so that all can be compiled without a GPU."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Each of these modules has a list COMPILE of KernelBuild.
MODULES = ("bits", "threshold", "bracket", "saliency", "keep", "blocks", "adam_builds", "wgrad", "norm")
ARCHS = (80, 90)


@dataclass(frozen=True)
class KernelBuild:
    """One kernel at one set of compile-time arguments.

    name: unique over all modules. kernel: the @triton.jit function. signature: {argument: Triton type, "*fp32" for a
    pointer}, without the constexpr arguments. constants: {constexpr argument: value}. num_warps: as launched.
    widest_load_bits, widest_store_bits: the least that the widest access of global memory must reach.
    unaligned: pointer arguments that may be at any address; all others are launched at multiples of 16 bytes.
    scalar: no access of global memory may take several values at once: the kernel's tensors may be at any address.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    widest_load_bits: int = 0
    widest_store_bits: int = 0
    unaligned: tuple[str, ...] = ()
    scalar: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildReport:
    """What the compiler made of a kernel. spill_bytes: stores and loads. shared_bytes: shared memory per block.
    vector_accesses: loads and stores of several values of global memory at once. instructions: of all branches."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    widest_load_bits: int
    widest_store_bits: int
    vector_accesses: int
    instructions: int


def builds() -> Iterator[KernelBuild]:
    """All kernels of all modules."""
    for module in MODULES:
        yield from importlib.import_module(f".{module}", __package__).COMPILE


def widest_access_bits(ptx: str, operation: str) -> int:
    """Width of the widest global "ld" or "st" in PTX, 0 where there is none; copies to shared memory are loads."""
    pattern = rf"\b{operation}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)\b"
    widths = [int(count or 1) * int(bits) for count, bits in re.findall(pattern, ptx)]
    if operation == "ld":
        widths += [
            8 * int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^,;]*,[^,;]*, (\w+)", ptx)
        ]
    return max(widths, default=0)


def compile_build(build: KernelBuild, arch: int) -> BuildReport:
    """Compile for sm_`arch` with Triton's own assembler. Needs no GPU; TRITON_INTERPRET must not be set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = list(build.kernel.arg_names)
    aligned = {
        (arguments.index(name),): [["tt.divisibility", 16]]
        for name, kind in build.signature.items()
        if kind.startswith("*") and name not in build.unaligned
    }
    signature = {name: build.signature.get(name, "constexpr") for name in arguments}
    source = ASTSource(build.kernel, signature, build.constants, aligned)
    options = {"num_warps": build.num_warps, **build.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spill_bytes, instructions = _assembler_report(ptx)
    return BuildReport(
        build.name,
        f"sm_{arch}",
        registers,
        spill_bytes,
        compiled.metadata.shared,
        widest_access_bits(ptx, "ld"),
        widest_access_bits(ptx, "st"),
        len(re.findall(r"\b(?:ld|st)\.global[\w.:]*\.v\d", ptx)),
        instructions,
    )


def _assembler_report(ptx: str) -> tuple[int, int, int]:
    """(registers per thread, bytes of spill stores and loads, instructions) according to ptxas and nvdisasm."""
    from triton import knobs

    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{source}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        listed = [knobs.nvidia.nvdisasm.path, "-c", f"{source}.cubin"]
        code = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    assert spills, log
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(?!NOP)[A-Z]", code, re.M)
    assert instructions, code[:1000]
    return int(registers[1]), sum(spills), len(instructions)
