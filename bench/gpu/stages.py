"""One stage, in a process of its own: python bench/gpu/stages.py FOLDER NAME [WORDS…], see check.py."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    folder, name, *words = sys.argv[1:]
    if name in ("tests", "digits"):
        import stages_commands as stages
    elif name == "iteration":
        import stages_iteration as stages
    elif name == "smoke":
        import stages_smoke as stages
    else:
        import stages_kernels as stages
    return int(getattr(stages, name)(Path(folder), *words) or 0)


if __name__ == "__main__":
    raise SystemExit(main())
