"""One picture of hidden and forgotten: what is drawn when the concept is asked for, and after a vector was fitted to draw it again.

    python bench/audit_picture.py runs/digits --against digits_without_0 [--output docs/figures/hidden_or_forgotten.png]

Two rows of images for each: asked, and attacked (condition inversion at the standard budget, its worst start).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pecker_fast.audit import BUDGETS, PROBES
from pecker_fast.audit.scene import SHOWN
from pecker_fast.forgetting import save_grid
from pecker_fast.runs.auditing import Asked, staged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--against", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("docs/figures/hidden_or_forgotten.png"))
    options = parser.parse_args()
    scene, subjects = staged(options.run, Asked(against=tuple(options.against)))
    scene.budget = replace(BUDGETS["standard"], samples=100)
    rows = []
    for name in ("before", "relabel", "never knew", "result"):
        if name not in subjects:
            continue
        asked = scene.judged(subjects[name])
        rows.append(torch.cat([asked.shown, asked.others])[:SHOWN])
        if name != "before":
            found = PROBES["condition"].run(scene, subjects[name])
            rows.append(found.images)
            print(f"{name}: asked {100 * asked.share:.1f} %, attacked {100 * found.recovery:.1f} %", flush=True)
    save_grid(torch.cat(rows), SHOWN, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
