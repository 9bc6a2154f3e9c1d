"""The device that a run is planned for: this machine's, or one that is only described."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pecker_fast.errors import RecipeError
from pecker_fast.machine import hardware

FORM = re.compile(r"(cpu|cuda)(?::(\d{1,7}(?:\.\d{1,3})?)(GB|GiB|MB|MiB))?", re.IGNORECASE)
UNITS = {"gb": 10**9, "gib": 1 << 30, "mb": 10**6, "mib": 1 << 20}
EFFICIENCY = 0.3  # of a peak that is on a data sheet: nothing was measured


@dataclass(frozen=True)
class Card:
    """A GPU as its data sheet has it: FLOP/s of dense products."""

    name: str
    bf16: float
    fp32: float


# by memory in GB: the first that has as much
CARDS = (
    (24, Card("RTX 3090", 71e12, 35.6e12)),
    (80, Card("A100", 312e12, 19.5e12)),
    (10**9, Card("H200", 989e12, 67e12)),
)


@dataclass(frozen=True)
class Device:
    """kind: whose rules apply. memory_bytes: 0 = not known. here: it is this machine's own, so rates can be measured."""

    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    name: str
    here: bool

    def sheet_rate(self, precision: str) -> tuple[float, str]:
        """FLOP/s expected of a GPU that is not here, and in words where that comes from."""
        card = next(card for most, card in CARDS if self.memory_bytes <= most * 1.1e9)
        peak = card.bf16 if precision == "bf16" else card.fp32
        words = f"if it is as fast as an {card.name} at {EFFICIENCY:.0%} of its {peak / 1e12:g} TFLOP/s; not measured"
        return EFFICIENCY * peak, words


def device_of(text: str | None = None) -> Device:
    """The device that `text` describes: cpu, cuda, cpu:16GB, cuda:80GB (10⁹ bytes; GiB: 2³⁰); None = what runs here use.

    Raises RecipeError for anything else, and for `cuda` where there is no GPU to ask for its memory.
    """
    import torch

    gpu = torch.cuda.is_available()
    if text is None:
        text = "cuda" if gpu else "cpu"
    found = FORM.fullmatch(text.strip())
    size = round(float(found[2]) * UNITS[found[3].lower()]) if found and found[2] else None
    if found is None or size == 0:
        raise RecipeError(
            f"--device {text[:60]!r}: expected cpu or cuda, or one of a size, such as cuda:80GB or cpu:16GB"
        )
    if found[1].lower() == "cpu":
        return Device("cpu", hardware.memory_bytes() if size is None else size, "processor", here=True)
    if size is not None:
        return Device("cuda", size, f"GPU of {found[2]} {found[3]}", here=False)
    if not gpu:
        raise RecipeError(
            "--device cuda: there is no GPU here; give the memory of the one you plan for: --device cuda:80GB"
        )
    return Device(
        "cuda", int(torch.cuda.get_device_properties(0).total_memory), torch.cuda.get_device_name(0), here=True
    )
