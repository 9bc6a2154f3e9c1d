"""The evidence: does saliency help, which score, structure, density and rule. See docs/evidence.md.

python bench/study.py run       # every stage; goes on where it was stopped; about 90 minutes on 2 cores
python bench/study.py time      # what an iteration of each finalist takes; wants a quiet machine
python bench/study.py collect   # bench/results/study.json
python bench/study.py figures   # the tables of docs/evidence.md and docs/figures/study_*.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evidence import report, stages, timing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "time", "collect", "figures"))
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where the result of every run is kept")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--stages", nargs="+", default=list(stages.STAGES), choices=stages.STAGES)
    options = parser.parse_args()
    if options.command == "run":
        for name in options.stages:
            stages.run_stage(name, options.runs, options.jobs)
    elif options.command == "time":
        timing.measure(options.runs)
    elif options.command == "collect":
        report.collect(options.runs)
    else:
        report.figures()
    return 0


if __name__ == "__main__":
    sys.exit(main())
