"""A seeded storm over runs, models and files: kills, signals, full disks, flipped bits, hostile folders, in rounds.

    make storm MINUTES=60                               # rounds until the time is over
    python tests/storm.py --minutes 5 --seed 7          # the same rounds on every machine, as many as there is time for
    python tests/storm.py --seed 7 --round 123          # one round alone

Every round draws what it does from (seed, round) and prints one line. At the end counts are printed; the exit code is 1 if
anything was lost (a run that does not come to the bits of one that nothing befell), falsely stated (damage that went unseen),
or ended in an internal error, a traceback, or a code that it should not have. Not collected by pytest.
"""

from __future__ import annotations

import argparse
import collections
import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

TESTS = Path(__file__).parent
for place in (TESTS, TESTS / "loading", TESTS / "files", TESTS.parent):
    sys.path.insert(0, str(place))

import conftest  # noqa: E402, F401  one thread, as the tests have
import malformed  # noqa: E402
from disk_faults import Fault  # noqa: E402
from least_runs import bare, final_files, left_overs, write_least_recipe  # noqa: E402
from odd_folders import odd_folder, write_models  # noqa: E402
from processes import Started, pecker_fast  # noqa: E402

from pecker_fast import files  # noqa: E402
from pecker_fast.errors import PeckerError  # noqa: E402
from pecker_fast.records import read_events  # noqa: E402
from pecker_fast.records.checkpoint import list_checkpoints, verify_checkpoint  # noqa: E402

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
ANSWER_S, HUNG_S = 10.0, 300.0
STEPS = 130  # on the disk, of a run from its start to its end, and some more


class Found(Exception):
    """What the storm is looking for."""


@dataclass
class Storm:
    """The scene: a recipe, a finished run of it and what that came to; damaged models; a folder for the rounds."""

    home: Path
    seed: int
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    found: list[str] = field(default_factory=list)
    whole_s: float = 1.0

    def __post_init__(self) -> None:
        self.recipe, self.whole = write_least_recipe(self.home), self.home / "whole"
        self.models = write_models(self.home / "models")
        self.must(self.start("train", str(self.recipe), f"output={self.whole}"), 0)
        begun = time.monotonic()
        self.must(self.start("train", str(self.recipe), f"output={self.whole}", "resume=never"), 0)
        self.whole_s, self.want = time.monotonic() - begun, final_files(self.whole)

    # -- processes ----------------------------------------------------------------------------------------------------

    def start(self, *words: str, fault: Fault | None = None) -> Started:
        self.log = self.home / "log"
        given = [*words, "--quiet"] if words[0] == "train" else list(words)
        return pecker_fast(*given, log=self.log, first=partial(prepare, fault))

    def told(self) -> str:
        return self.log.read_text(errors="replace")

    def must(self, process: Started, *codes: int) -> int:
        """Wait for its end. Raises what the storm looks for where that is none of `codes`, or not one line."""
        try:
            code = process.wait(HUNG_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Found("hung") from None
        text = self.told()
        if "Traceback" in text or "internal error" in text:
            raise Found(f"internal error: {text[-1500:]}")
        if code not in codes:
            raise Found(f"exit code {code}, not one of {codes}: {text[-500:]}")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if len(errors) != (code != 0):
            raise Found(f"exit code {code} with {len(errors)} lines of error: {text[-500:]}")
        return code

    def train(self, run: Path, *words: str, fault: Fault | None = None) -> Started:
        return self.start("train", str(self.recipe), f"output={run}", *words, fault=fault)

    def goes_on(self, run: Path, *words: str) -> None:
        """The same command, with nothing in its way, comes to the very bits."""
        self.must(self.train(run, *words), 0)
        if final_files(run) != self.want:
            raise Found("the run ended with other bits")
        if left_overs(run):
            raise Found(f"left over: {left_overs(run)}")
        read_events(run / "run.jsonl")
        for folder in list_checkpoints(run):
            verify_checkpoint(folder)

    # -- what befalls ---------------------------------------------------------------------------------------------------

    def begun(self, rng: random.Random, run: Path) -> str:
        """Nothing, or a finished run, to start in; how it is resumed."""
        if rng.random() < 0.5:
            return "auto"
        shutil.copytree(self.whole, run)
        return "never"

    def kills(self, rng: random.Random, run: Path) -> str:
        resume, count = self.begun(rng, run), rng.randint(1, 6)
        for _ in range(count):
            process = self.train(run, f"resume={resume}")
            try:
                process.wait(rng.uniform(0, self.whole_s))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            resume = rng.choice(("auto", resume))
        self.goes_on(run, f"resume={resume}")
        return f"{count} times"

    def signals(self, rng: random.Random, run: Path) -> str:
        resume, signum = self.begun(rng, run), rng.choice(list(SIGNALS))
        process = self.train(run, f"resume={resume}")
        try:
            process.wait(rng.uniform(0.1, 1) * self.whole_s)
        except subprocess.TimeoutExpired:
            begun = time.monotonic()
            process.send_signal(signum)
            # one that came before the command line was up ends the process as signals do
            code = self.must_or_default(process, signum)
            if time.monotonic() - begun > ANSWER_S:
                raise Found(f"answered after {time.monotonic() - begun:.0f} s") from None
            self.goes_on(run, f"resume={rng.choice(('auto', resume))}")
            return f"{signum.name}, {code}"
        return "too late"

    def must_or_default(self, process: Started, signum: int) -> int:
        process.wait(HUNG_S)
        code = process.returncode
        if code == -signum or (
            code == 1 and not self.log.read_bytes()
        ):  # Python's own way, before a line of ours has run
            return code
        return self.must(process, 0, SIGNALS[signal.Signals(signum)])

    def disks(self, rng: random.Random, run: Path) -> str:
        words = rng.choice((["train"], ["wipe"], ["export"], ["report"], ["sample"], ["keep"], ["delta"]))
        if words != ["train"]:
            shutil.copytree(self.whole, run)
        fault = Fault(rng.randrange(STEPS), rng.choice((*ERRORS, None, None)), rng.choice((1, 2, 5, 1 << 30)))
        command = {
            "train": ["train", str(self.recipe), f"output={run}"],
            "wipe": ["train", str(self.recipe), f"output={run}", "resume=never"],
            "keep": ["evaluate", str(run), "--keep", "--samples", "4"],
            "delta": ["export", str(run), "--format", "delta"],
        }.get(words[0], [words[0], str(run)])
        process = self.start(*command, fault=fault)
        if fault.error is None and process.wait(HUNG_S) == 9:
            code = 9
        else:
            code = self.must(process, 0, 2)
        for folder in list_checkpoints(run) if fault.error is not None else []:
            verify_checkpoint(folder)
        self.goes_on(run)
        return f"{words[0]} at {fault.at}, {fault.error and errno.errorcode[fault.error]}, {code}"

    def flips(self, rng: random.Random, run: Path) -> str:
        """One bit of the newest checkpoint: passed over for the one before, and said so."""
        shutil.copytree(self.whole, run)
        newest = list_checkpoints(run)[-1]
        path = rng.choice(sorted(newest.iterdir()))
        where = flip(rng, path)
        (run / "metrics.json").unlink()  # else the run is finished, and no checkpoint is opened
        self.must(self.train(run), 0)
        if "passed over" not in self.told():
            raise Found(f"a flipped bit of {path.name} ({where}) was not told")
        if final_files(run) != self.want:
            raise Found(f"after a flipped bit of {path.name} ({where}) the run ended with other bits")
        return f"{path.name} {where}"

    def exports(self, rng: random.Random, run: Path) -> str:
        """One bit of what is exported: every verb that opens it refuses."""
        shutil.copytree(self.whole, run)
        path = run / "pipeline" / "unet" / files.WEIGHTS_NAME
        where = flip(rng, path)
        verb = rng.choice((["sample", str(run)], ["evaluate", str(run), "--samples", "4"]))
        self.must(self.start(*verb), 2)
        self.must(self.start("export", str(run)), 0)
        self.must(self.start(*verb), 0)
        return f"{verb[0]}, {where}"

    def masks(self, rng: random.Random, run: Path) -> str:
        shutil.copytree(self.whole, run)
        where = flip(rng, run / "mask.safetensors")
        self.must(self.start("mask", str(run)), 0, 2)
        return where

    def folders(self, rng: random.Random, run: Path) -> str:
        """A damaged model: it loads and runs, or is refused in one line."""
        case = odd_folder(self.models, run, number := rng.randrange(10**6))
        path = self.home / "odd.yaml"
        data = {**case.recipe, "output": str(run.with_name("odd-run")), "evaluate": {"every": 0, "final": 0}}
        path.write_text(json.dumps({"steps": 1, "batch_size": 1, "mask": {"samples": 1}, **data}))
        code = self.must(self.start("train", str(path)), 0, 2)
        shutil.rmtree(run.with_name("odd-run"), ignore_errors=True)
        return f"case {number}, {code}"

    def tensors(self, rng: random.Random, run: Path) -> str:
        """Malformed files of tensors: a typed error that names the file, or what a whole file holds."""
        run.mkdir()
        path, refused = run / "x.safetensors", 0
        for data in malformed.generated(50, rng.randrange(1 << 30)):
            path.write_bytes(data)
            try:
                files.read_tensors(path)
            except PeckerError as error:
                refused += 1
                if str(path) not in str(error):
                    raise Found(f"{error} names no file") from None
        return f"{refused} of 50 refused"

    # -- rounds -----------------------------------------------------------------------------------------------------------

    def round(self, number: int, only: str | None = None) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        kinds: list[Callable[[random.Random, Path], str]] = [
            *(
                self.kills,
                self.kills,
                self.signals,
                self.signals,
                self.disks,
                self.disks,
                self.disks,
                self.flips,
                self.flips,
            ),
            *(self.exports, self.masks, self.folders, self.folders, self.tensors),
        ]
        kind = rng.choice([kind for kind in kinds if only in (None, kind.__name__)])
        run = self.home / "round"
        try:
            line = kind(rng, run)
        except Exception as error:
            reason = str(error) if isinstance(error, Found) else f"{type(error).__name__}: {error}"
            self.found.append(f"round {number}, {kind.__name__}: {reason}")
            self.counts[f"{kind.__name__} FOUND"] += 1
            line = f"FOUND {reason}"
        self.counts[kind.__name__] += 1
        print(f"round {number} {kind.__name__}: {line}", flush=True)
        shutil.rmtree(run, ignore_errors=True)


def prepare(fault: Fault | None) -> None:
    """What every process does first."""
    bare()
    if fault is not None:
        fault()


def flip(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"byte {at} bit {bit}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument("--round", type=int, default=None, help="this round alone")
    parser.add_argument("--only", default=None, help="rounds of this kind alone: kills, signals, disks, flips, …")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="storm-", ignore_cleanup_errors=True) as home:
        until, number = time.monotonic() + 60 * options.minutes, 0
        storm = Storm(Path(home), seed)
        if options.round is not None:
            storm.round(options.round, options.only)
        while options.round is None and time.monotonic() < until:
            storm.round(number, options.only)
            number += 1
    print(f"\nseed {seed}: {sum(n for k, n in storm.counts.items() if 'FOUND' not in k)} rounds")
    for kind, count in sorted(storm.counts.items()):
        print(f"  {kind}: {count}")
    for line in storm.found:
        print(f"FOUND {line}")
    return 1 if storm.found else 0


if __name__ == "__main__":
    sys.exit(main())
