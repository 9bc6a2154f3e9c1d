"""The tables of docs/scaling.md: what an iteration would take on 8, 64 and 512 A100s, and the updates that were measured.

    python bench/scaling.py                            # print
    python bench/scaling.py --write docs/scaling.md    # replace what stands between the markers there

Bytes and FLOPs are by formula, the formulas those that bench/test_bench_zero.py and tests/engine/zero/test_traffic.py count;
parameters and FLOPs of SD 1.5 and SDXL are those of bench/results/full_size_meta.json. No A100 was at hand: rates are the
maker's, times a share that is assumed.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
META = ROOT / "bench" / "results" / "full_size_meta.json"
UPDATES = ROOT / "bench" / "results" / "zero.json"

GPU_BYTES = 80e9
PEAK_FLOPS = 312e12  # bf16, dense
HBM_BYTES_PER_S = 2.0e12
NVLINK_BYTES_PER_S = 300e9  # one way, to the other seven of a node
WIRE_BYTES_PER_S = 25e9  # one way and per GPU, between nodes: one 200 Gbit/s adapter each
COMPUTE_SHARE, WIRE_SHARE, HBM_SHARE = 0.4, 0.8, 0.9  # of the peak that is assumed to be reached
RESERVE_BYTES = 4e9  # CUDA context, library workspaces, buckets
DENSITY = 0.1
ADAPTERS = 0.02  # of the weights, `score: lora` at rank 16
RULES = ("differentiated", "salient_only", "salient_only + lora")
WORLDS = (8, 64, 512)
BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Network:
    """weights: N. forward, backward, input_backward: FLOPs of one sample. activation_bytes: of one sample of each branch,
    with checkpointing."""

    name: str
    weights: float
    forward: float
    backward: float
    input_backward: float
    activation_bytes: float


@dataclass(frozen=True)
class Choice:
    """One way to run: seconds of an iteration by what they go into, bytes a rank needs."""

    stage: int
    rule: str
    batch: int
    compute_s: float
    wire_s: float
    step_s: float
    memory_bytes: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.wire_s + self.step_s  # nothing overlaps: overlap_comm is off by default

    @property
    def bottleneck(self) -> str:
        parts = {"compute": self.compute_s, "network": self.wire_s, "optimizer": self.step_s}
        name = max(parts, key=lambda key: parts[key])
        return f"{name} {parts[name] / self.seconds:.0%}"


def networks() -> list[Network]:
    meta = json.loads(META.read_text())
    found = []
    for name, label in (("sd15", "SD 1.5"), ("sdxl", "SDXL")):
        n = meta["networks"][name]
        checkpointed = [m for m in meta["memory"] if m["arch"] == name and m["batch"] == 1 and m["checkpointing"]]
        activations = min(m["parts"]["activations"] for m in checkpointed)
        found.append(Network(label, n["parameters"], n["forward"], n["backward"], n["input_backward"], activations))
    tokens, hidden, blocks = 4096, 3072, 57
    forward = 2 * 12e9 * tokens + 4 * tokens**2 * hidden * blocks
    # one input of each block kept, and one block's inside at a time
    inside = tokens * hidden * 2 * (blocks + 34)
    found.append(Network("12 B transformer", 12e9, forward, 2 * forward, forward, 2 * inside))
    return found


def flops(network: Network) -> float:
    """Of an iteration with one sample of each branch (retain, forget): five forward passes, two ways back to weights, two to
    inputs for each."""
    once = 5 * network.forward + 2 * network.backward + 2 * network.input_backward
    return 2 * once + 2 * 3 * network.forward  # checkpointing passes θ, ψ and the guides forward again


def sent(stage: int, rule: str, n: float, world: int, size: float = 2.0) -> float:
    """Bytes a rank sends in an iteration, values of `size` bytes; docs/scaling.md has the derivation."""
    unit = size * n * (world - 1) / world
    if stage < 3:
        score = 3 * (ADAPTERS if "lora" in rule else 1)
        return unit * (score + (2 * DENSITY if rule.startswith("salient_only") else 3))
    return unit * (4 + (7 if rule == "differentiated" else 5))


def memory(stage: int, rule: str, network: Network, world: int, batch: int) -> float:
    """Bytes of a rank: bf16 weights with float32 masters, β₁ = 0, an average of θ, one gradient of the network in hand."""
    n, w = network.weights, world
    lora, salient = "lora" in rule, DENSITY if rule.startswith("salient_only") else 1.0
    score = ADAPTERS if lora else 1.0
    shards = (4 + 4 * salient + 4) * n / w + 8 * score * n / w  # master, moments, average of θ; master and moments of ψ
    copies = 2 + score
    weights = (
        copies * 2 * n if stage < 3 else copies * 2 * n / w + 2 * 2e9
    )  # stage 3: the teacher too, and what is gathered
    merged = (
        rule == "differentiated"
    )  # two ways back are added up before they are reduced: a whole gradient on every rank
    if stage == 1 or merged:
        gradient = 2 * n
    else:
        gradient = 2 * n / w + (2 * n * DENSITY if rule.startswith("salient_only") and stage == 2 else 0)
    return shards + weights + gradient + n / 8 + batch * network.activation_bytes + RESERVE_BYTES


def choice(network: Network, stage: int, rule: str, world: int, batch: int) -> Choice:
    n = network.weights
    wire = NVLINK_BYTES_PER_S if world <= 8 else WIRE_BYTES_PER_S
    # bytes per weight of θ's step and of ψ's
    moved = ((8.6 if rule.startswith("salient_only") else 20) + 20 * (ADAPTERS if "lora" in rule else 1)) * n / world
    return Choice(
        stage, rule, batch, batch * flops(network) / (COMPUTE_SHARE * PEAK_FLOPS),
        sent(stage, rule, n, world) / (WIRE_SHARE * wire), moved / (HBM_SHARE * HBM_BYTES_PER_S),
        memory(stage, rule, network, world, batch),
    )  # fmt: skip


def best(network: Network, rule: str, world: int) -> Choice | None:
    """Most samples a second that fit; of equals the lower stage."""
    stages = (1, 2) if "lora" in rule else (1, 2, 3)
    fitting = [
        c for stage in stages for batch in BATCHES
        if (c := choice(network, stage, rule, world, batch)).memory_bytes <= GPU_BYTES
    ]  # fmt: skip
    return max(fitting, key=lambda c: (round(c.batch / c.seconds, 6), -c.stage), default=None)


def least_memory(network: Network, stage: int, rule: str, world: int) -> str:
    if stage == 3 and "lora" in rule:
        return "–"
    one = memory(stage, rule, network, world, 1)
    return f"{one / 1e9:.0f}{'' if one <= GPU_BYTES else ' ✗'}"


def at_one(network: Network, rule: str, world: int) -> list[str]:
    """An iteration with one sample of each branch a GPU, at the lowest stage that fits: (ms, of which the network, gain)."""
    stages = (1, 2) if "lora" in rule else (1, 2, 3)
    fitting = [c for stage in stages if (c := choice(network, stage, rule, world, 1)).memory_bytes <= GPU_BYTES]
    if not fitting:
        return ["does not fit", "", ""]
    c = fitting[0]
    dense = choice(network, c.stage, "differentiated", world, 1)
    gain = "" if rule == "differentiated" else f"{dense.seconds / c.seconds:.2f} ×"
    return [f"ZeRO {c.stage}: {1e3 * c.seconds:,.0f}", f"{1e3 * c.wire_s:,.0f}", gain]


def table() -> str:
    heads = [
        "network",
        "GPUs",
        "rule",
        "GB a GPU at batch 1, ZeRO 1 / 2 / 3",
        "batch 1 a GPU: ms",
        "network ms",
        "against `differentiated`",
    ]
    heads += ["most samples a second", "ms", "bottleneck"]
    rows = []
    for network in networks():
        for world in WORLDS:
            for rule in RULES:
                fits = " / ".join(least_memory(network, stage, rule, world) for stage in (1, 2, 3))
                c = best(network, rule, world)
                most = [f"ZeRO {c.stage}, {c.batch} a GPU", f"{1e3 * c.seconds:,.0f}", c.bottleneck] if c else ["–"] * 3
                rows.append([network.name, world, rule, fits, *at_one(network, rule, world), *most])
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def update_table() -> str:
    """bench/results/zero.json: bytes and time of one update, dense and masked."""
    result = json.loads(UPDATES.read_text())
    times: dict[tuple[str, str], tuple[float, float]] = {}
    for entry in result["benchmarks"]:
        stage, density = re.findall(r"\[(\d)-(.*)\]", entry["name"])[0]
        times[stage, density] = sum(entry["extra_info"]["sent_bytes"].values()), 1e3 * entry["stats"]["median"]
    machine = result["machine_info"]
    lines = [f"{machine['device']}, one thread a rank, torch {machine['versions']['torch']}.", ""]
    lines += ["| ZeRO | | MB sent by a rank | ms | dense ÷ this |", "|---|---|---|---|---|"]
    for (stage, density), (sent_bytes, ms) in times.items():
        name = "dense" if density == "dense" else f"`salient_only`, {density}"
        lines.append(
            f"| {stage} | {name} | {sent_bytes / 1e6:.2f} | {ms:.1f} | {times[stage, 'dense'][1] / ms:.1f} × |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    tables = {"scaling:table": table(), "zero:bench": update_table()}
    print("\n\n".join(tables.values()))
    if options.write:
        text = options.write.read_text()
        for mark, lines in tables.items():
            block = f"<!-- {mark} -->\n{lines}\n<!-- /{mark} -->"
            text = re.sub(f"<!-- {mark} -->.*<!-- /{mark} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        options.write.write_text(text)


if __name__ == "__main__":
    main()
