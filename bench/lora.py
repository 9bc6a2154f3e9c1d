"""What `score: lora` saves: time and memory of the passes of φ and ψ, on one copy of the weights against two.

    python bench/lora.py              # writes bench/results/lora.json and prints the table
    python bench/lora.py --quick      # seconds: shows that it works, times nothing

Two pieces of an iteration, without optimizer and generator: the guide (forward through φ and ψ, back to x_t) and the score step
(forward through ψ, back to its weights). Variants take turns in one process. Beside the clock stands the processor's time, which
other work on the machine disturbs less; compare it on one thread. Peak: bytes of all tensors alive, weights too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pecker_fast import files
from pecker_fast.account.live import LiveBytes
from pecker_fast.machine.hardware import environment
from pecker_fast.networks.denoiser import Denoiser, load_denoiser
from pecker_fast.networks.lora import pair_x0, with_adapters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "lora.json"
CROSS_DIM, TOKENS = 64, 24
SIZES = {"digits": 96, "text": 32, "text, wide": 4}  # batch
ADAPTERS = {"lora": (16, "all"), "lora, rank 4": (4, "all"), "lora, attention": (16, "attention")}


class Text(Denoiser):
    """Conditions are rows of a table of text embeddings."""

    table: Tensor

    def _forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.unet(x_t, t, encoder_hidden_states=self.table[c], return_dict=False)[0]

    def clone(self) -> Denoiser:
        twin = Text(super().clone().unet, self.schedule, self.null_class, self.channels_last)
        twin.table = self.table
        return twin


def networks() -> dict[str, Denoiser]:
    """The teacher of the digits, and text-to-image networks on 8×8 latents: a million weights, and layers as wide as SD's first."""
    from diffusers import UNet2DConditionModel

    digits = load_denoiser(files.resolve_model("digits"))
    found: dict[str, Denoiser] = {"digits": digits}
    for name, widths in (("text", (32, 64)), ("text, wide", (160, 320))):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=widths,
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            norm_num_groups=8, attention_head_dim=2, cross_attention_dim=CROSS_DIM,
        )  # fmt: skip
        found[name] = text = Text(unet, digits.schedule)
        text.table = torch.randn(8, TOKENS, CROSS_DIM)
    return {name: teacher.freeze() for name, teacher in found.items()}


class Peak(TorchDispatchMode):
    """Counts the tensors that operations give out, for as long as they live."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = LiveBytes(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.live.see(leaf)
        return out


def guide(teacher: Denoiser, score: Denoiser, given: tuple[Tensor, ...], together: bool = True) -> None:
    x, t, c_p, c_g, e = given
    x = x.detach().requires_grad_(True)
    with score.frozen():
        if together:
            f_p, f_g = pair_x0(teacher, score, x, t, c_p, c_g)
        else:
            f_p, f_g = teacher.x0(x, t, c_p), score.x0(x, t, c_g)
        torch.autograd.grad(((f_p - f_g) * (f_p - x - e)).sum(), x)


def score_step(score: Denoiser, given: tuple[Tensor, ...]) -> None:
    x, t, _, c, e = given
    (e - score.eps(x, t, c)).square().sum().backward()
    for _, p in score.named_parameters():
        p.grad = None


def measure(teacher: Denoiser, batch: int, rounds: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x, e = (torch.randn(batch, *teacher.sample_shape, generator=g) for _ in range(2))
    t = torch.randint(38, 712, (batch,), generator=g)
    given = x, t, torch.ones(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long), e
    scores = {"full": teacher.clone(), **{name: with_adapters(teacher, *how) for name, how in ADAPTERS.items()}}
    if not any("attn" in name or "attention" in name for name, _ in teacher.unet.named_modules()):
        del scores["lora, attention"]
    runs: dict[str, dict[str, Callable[[], None]]] = {
        "guide": {name: lambda s=score: guide(teacher, s, given) for name, score in scores.items()},
        "score step": {name: lambda s=score: score_step(s, given) for name, score in scores.items()},
    }
    runs["guide"]["lora in two passes"] = lambda: guide(teacher, scores["lora"], given, together=False)
    trained = {name: sum(p.numel() for _, p in score.named_parameters()) for name, score in scores.items()}
    found: dict[str, Any] = {"batch": batch, "weights": trained, "parts": {}}
    for part, variants in runs.items():
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for index in range(rounds + min(3, rounds)):
            for name, run in variants.items():
                start = time.perf_counter(), time.process_time()
                run()
                if index >= min(3, rounds):
                    times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        found["parts"][part] = {}
        for name, run in variants.items():
            wall, processor = (1e3 * statistics.median(column) for column in zip(*times[name]))
            size = peak(run, teacher, scores, name, given, part)
            found["parts"][part][name] = {"ms": wall, "processor_ms": processor, "peak_bytes": size}
    return found


def peak(
    run: Callable[[], None], teacher: Denoiser, scores: dict[str, Denoiser], name: str, given: Any, part: str
) -> int:
    """Bytes at the peak: the weights of both networks (of ψ's own alone where it is full), inputs, and what `run` makes."""
    score = scores.get(name, scores["lora"])
    held: list[nn.Parameter] = [p for _, p in score.named_parameters()]
    if part == "guide" or score.unet is not scores["full"].unet:
        held += [p for _, p in teacher.named_parameters()]
    with Peak([*held, *given]) as counter:
        run()
    return counter.live.peak


def table(found: dict[str, Any]) -> str:
    lines = [
        "| network | part | ψ | weights of ψ | ms | processor ms | × full | peak MiB | × full |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network, entry in found["networks"].items():
        for part, variants in entry["parts"].items():
            full = variants["full"]
            for name, one in variants.items():
                lines.append(
                    f"| {network}, batch {entry['batch']} | {part} | {name} "
                    f"| {entry['weights'].get(name, entry['weights']['lora']):,} "
                    f"| {one['ms']:.1f} | {one['processor_ms']:.1f} | {one['processor_ms'] / full['processor_ms']:.2f} "
                    f"| {one['peak_bytes'] / 2**20:.1f} | {one['peak_bytes'] / full['peak_bytes']:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny batches, one round")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick and options.output == RESULTS:
        parser.error("--quick times nothing worth keeping: give --output")
    batches, rounds = (dict.fromkeys(SIZES, 2), 1) if options.quick else (SIZES, 15)
    found = {
        "machine": environment(),
        "command": "python bench/lora.py" + " --quick" * options.quick,
        "rounds": rounds,
        "networks": {name: measure(teacher, batches[name], rounds) for name, teacher in networks().items()},
    }
    options.output.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
