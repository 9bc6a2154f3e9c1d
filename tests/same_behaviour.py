"""Did a change leave behaviour alone? sha256 of what users get, written down before it and compared after it.

    python tests/same_behaviour.py record before.json      # at the commit before the change
    python tests/same_behaviour.py check before.json       # at the commit after it
    python tests/same_behaviour.py list                    # the cases; `record F CASE…` and `check F CASE…` run some of them

Every case runs in a process and a folder of its own, over the command line, with `--python` (default: this interpreter).
Compared are weights, masks, pictures, metrics, events, cards and recipes of runs, exports in every format, a model made by
`pretrain`, predicted memory, and the text of every `--help`. Left out is what time, memory and paths are written into.
Bits depend on the processor, the thread count and torch: a file of another machine is refused, not compared. All cases
take about eight minutes on two cores. Not collected by pytest: it compares two commits, not one with itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VERBS = ["train", "pretrain", "sample", "evaluate", "report", "mask", "export", "doctor", "bench", "recipes"]
HELP = [
    "--help",
    *(f"{verb} --help" for verb in VERBS),
    *(f"recipes {v} --help" for v in ["list", "show", "copy", "keys"]),
]
TEXTS = [*HELP, "--version", "recipes list", "recipes keys", "recipes show digits --all", "recipes show sdxl_celebrity"]

# keys whose values are times, sizes of the process, or facts of the machine
LEFT_OUT = re.compile(
    r"(sha256|.*_s|ms|.*_ms|share|images_per_s|peak_memory_bytes|memory|versions|device|threads|.*measured.*|iterations_timed)"
)
SHORT = "evaluate.every=0 evaluate.samples=64 evaluate.final=64 evaluate.teacher_steps=4"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 -m pecker_fast"

TINY_SHAPES = """
from dataclasses import replace
from pecker_fast.pretrain.shapes import ShapesSettings, pretrain_shapes
d = ShapesSettings()
pretrain_shapes("model", seed=0, distill_steps=4, settings=ShapesSettings(
    teacher=replace(d.teacher, steps=6, batch_size=8, checkpoint_every=4), vae=replace(d.vae, steps=4, batch_size=4),
    judge=replace(d.judge, steps=4, batch_size=8),
    second=replace(d.second, steps=4, batch_size=8), pool=64, vae_channels=(8, 8, 8), unet_channels=(16, 16),
    text_width=16, judge_width=4, references=40, samples=8, sampler_steps=2, guidances=(2.0,)))
"""

# name: command lines in order; arguments of `python -m pecker_fast` unless they start with `-m` or are code
CASES: dict[str, list[str]] = {
    "help": TEXTS,
    "digits": [
        "train digits steps=20 output=run",
        "sample run --classes 0,1 --count 4 --output grid.png",
        "evaluate run --samples 200 --seed 5",
        "mask run",
        "export run --output diffusers",
        "export run --weights raw --output raw",
        "export run --format unet --output unet.safetensors",
        "export run --format delta --output delta.safetensors",
    ],
    "digits_paper": ["train digits_paper steps=10 output=run"],
    "digits_rows": [
        f"train digits steps=4 mask.structure=row mask.density=0.2 mask.refresh=2 checkpoint.every=2 output=run {SHORT}"
    ],
    "digits_alternating": [
        f"train digits steps=4 update_rule=alternating mask.data=teacher mask.scope=tensor output=run {SHORT}"
    ],
    "digits_two_stages": [f"train digits steps=3 distill_steps=3 generator=null mask.source=random output=run {SHORT}"],
    "digits_tiles": [
        f"train digits steps=3 mask.structure=tile mask.tile=[16,16] precision=bf16 engine.micro_batch=32 output=run {SHORT}"
    ],
    "shapes": [
        "train shapes steps=5 output=run",
        'sample run --prompt "a red circle on the left" --count 2 --output grid.png',
        "export run --output diffusers",
        "export run --format unet --output unet.safetensors",
        "export run --format single --output single.safetensors",
        "export run --format delta --output delta.safetensors",
    ],
    "shapes_lora": [f"train shapes steps=3 score=lora mask.structure=row output=run {SHORT}"],
    "ranks": [
        f"{TORCHRUN} train digits steps=6 engine.zero=2 output=run {SHORT}",
        f"{TORCHRUN} train digits steps=3 engine.zero=3 mask.structure=row output=three {SHORT}",
    ],
    "pretrain": ["pretrain digits --steps 20 --distill-steps 10 --output model"],
    "pretrain_shapes": [TINY_SHAPES],
    "memory": ["doctor digits", "doctor shapes", "doctor shapes score=lora", "doctor digits mask.structure=row"],
}


def sha256(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def timeless(value: Any) -> Any:
    """`value` without the keys that are left out."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not LEFT_OUT.fullmatch(str(key))}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def facts_of_file(path: Path) -> dict[str, str]:
    """What is compared of one file: by default its bytes."""
    if path.name == "report.html":  # pictures of times; that it is written counts
        return {"": "written"}
    if path.name == "manifest.json" or path.name.startswith("shard-"):
        return {}  # hashes of files that hold times; and the padding behind the last weight, whatever memory held there
    if path.name == "run.jsonl":
        events = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        return {"": sha256(json.dumps([event for event in events if event.get("event") != "memory"]))}
    if path.suffix == ".json":
        content = timeless(json.loads(path.read_text()))
        if not isinstance(content, dict):
            return {"": sha256(json.dumps(content))}
        return {f"#{key}": sha256(json.dumps(item)) for key, item in content.items()}
    if path.suffix == ".md":
        return {"": sha256(re.sub(r"\d+(\.\d+)? (s|ms|min|MB|GB)\b", "", path.read_text()))}
    return {"": sha256(path.read_bytes())}


def printed_facts(command: str, printed: str) -> str:
    """What is compared of a command's output: the part that no machine or moment changes."""
    if command.startswith("doctor"):
        printed = printed.partition("memory (predicted)")[2]
    elif not command.startswith(("recipes", "mask", "evaluate", "-")) and "--help" not in command:
        return ""
    return printed


def run_case(name: str, commands: list[str], python: str) -> dict[str, str]:
    """Carry out the commands of a case in an empty folder and return its facts."""
    import shlex

    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_", "PECKER"))}
    environment |= {
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait do not spin: no bit depends on it, the time on a shared machine does
        "CUDA_VISIBLE_DEVICES": "",
    }
    facts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for command in commands:
            if "\n" in command:
                words, label = ["-c", command], "code"
            else:
                words = shlex.split(command)
                words = words if command.startswith("-m ") else ["-m", "pecker_fast", *words]
                label = command
            done = subprocess.run(
                [python, *words], cwd=scratch, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{name}: `{label}` ended with {done.returncode}\n{done.stderr[-2000:]}")
            if text := printed_facts(command, done.stdout):
                facts[f"{name}: {label}"] = sha256(text)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                place = path.relative_to(scratch).as_posix()
                facts |= {f"{name}/{place}{key}": value for key, value in facts_of_file(path).items()}
    return facts


def machine(python: str) -> dict[str, str]:
    """What bits depend on."""
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    torch = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    return {
        "processor": cpu[1] if cpu else platform.processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.stdout.strip(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "check", "list"])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--python", default=sys.executable, help="interpreter whose pecker_fast is tried")
    given = parser.parse_args()
    if given.what == "list" or given.file is None:
        print(*CASES, sep="\n")
        return 0
    if unknown := set(given.cases) - set(CASES):
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; one of {', '.join(CASES)}")
    here, before = machine(given.python), {}
    if given.what == "check":
        before = json.loads(given.file.read_text())
        if before["machine"] != here:
            sys.exit(
                f"{given.file}: written on {before['machine']}, this is {here}; record it here, at the commit before"
            )
    found: dict[str, str] = {}
    for name in given.cases or CASES:
        facts = run_case(name, CASES[name], given.python)
        found |= facts
        print(f"{name}: {len(facts)} facts", flush=True)
    if given.what == "record":
        given.file.write_text(json.dumps({"machine": here, "facts": found}, indent=1) + "\n")
        return 0
    tried = {*(given.cases or CASES)}
    known = {key: value for key, value in before["facts"].items() if re.split(r"[:/]", key)[0] in tried}
    other = sorted(key for key in known.keys() | found.keys() if known.get(key) != found.get(key))
    for key in other:
        print(f"differs: {key}" if key in known and key in found else f"{'new' if key in found else 'gone'}: {key}")
    print(f"{len(known) - len(set(other) & set(known))} of {len(known)} facts are the same, {len(other)} are not")
    return 1 if other else 0


if __name__ == "__main__":
    sys.exit(main())
