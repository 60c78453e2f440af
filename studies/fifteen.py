#!/usr/bin/env python3
"""What a GPU that is there for a quarter of an hour is used for. Not longer than SECONDS; the same command goes on.

    python3 studies/fifteen.py SECONDS

1. Checks (a minute): the attacks, an epoch with L = 2, kill and resume with deterministic=true, what auto chooses, and
   whether CPU and GPU agree: studies/gpu_checks.py.
2. Speed (two minutes): benchmarks/gpu.py, ResNet-18, PGD-10, the eager float32 loop against mixadv.
3. The paper's question (nine minutes): ResNet-18 on CIFAR-10 (JPEG), L = 1 for E epochs, L = 3 for E, and L = 1 for 3E,
   with as many epochs E as fit, by a measured step; then their worst points are replayed on each other.

Results go to $OUT, or outputs/fifteen/out: fifteen.json (everything, with estimated and measured seconds), tables and
figures of the trainings, and runs.tar.gz with their small files, for results/. --cpu goes through all steps on a CPU
with tiny settings.

On a machine without a network, from the bare repository. Here, with the archive of the images in DATA_DIR:

    DATA_DIR=DIR studies/carry.sh

There, with .carry/ copied into the repository, first for ten minutes and at once again for what is left:

    python3 -m pip install --quiet --no-index --no-deps .carry/*.whl && python3 studies/fifteen.py 580

State and runs are in outputs/fifteen; without that folder everything begins anew.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_processes  # first: its clock begins before torch is imported
import torch
from gpu_plan import FULL, REPLAYS, TINY, Rates, Size, Training, plan
from gpu_processes import ROOT, start, stop, wait
from harness import environment, table

from mixadv.files import write_text

PARTS = ("checks", "speed", "question")
# Small files of a run, from which tables and figures are made.
KEPT = ("results.json", "metrics.csv", "records.npz", "config.yaml", "choices.json", "DONE", "FAILED")
# Tables and figures that leave the machine beside fifteen.json and runs.tar.gz; eight files together.
SHOWN = ("report.csv", "differences.csv", "curves.png", "accuracy.png", "weights.png", "cost.png")
# Of `main`: everything is done; a step failed; time ran out.
DONE, FAILED, AGAIN = 0, 1, 3


class Fifteen:
    """The steps, their clock, and what is known of them, in state.json.

    Attributes:
        size: of everything.
        left: seconds until the command has to end.
        question: seconds for the third part, in all commands together.
        state: "steps": name -> status (done, failed, cut: ended by the limit of its part), seconds, and seconds
            estimated; "plan": the trainings; and what the steps found.
    """

    def __init__(self, size: Size, seconds: float, question: float, carried: Path, folder: Path) -> None:
        self.size, self.question, self.carried, self.folder = size, question, carried, folder
        self.end = gpu_processes.BEGUN + seconds
        self.out = Path(os.environ.get("OUT") or folder / "out").resolve()
        self.root = folder / "cifar10-jpeg"
        self.cpu = ["--cpu"] if size.accelerator == "cpu" else []
        for place in (folder, self.out):
            place.mkdir(parents=True, exist_ok=True)
        file = folder / "state.json"
        self.state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"steps": {}}
        # Whether the clock has ended a step: then none is begun.
        self.stopped = False
        self.running: list[Any] = []
        self.images: Any = None

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        print(f"[{time.monotonic() - gpu_processes.BEGUN:5.0f} s] {text}", flush=True)

    def keep(self) -> None:
        """Write state.json, and fifteen.json for the reader."""
        text = json.dumps(self.state, indent=1) + "\n"
        write_text(self.folder / "state.json", text)
        write_text(self.out / "fifteen.json", text)

    def is_over(self, name: str) -> bool:
        """Whether a step is not run again; checks and speed are tried once."""
        status = self.state["steps"].get(name, {}).get("status")
        return status in ("done", "cut") or (status == "failed" and name in PARTS)

    def step(
        self,
        name: str,
        command: Sequence[str | Path],
        limit: float,
        planned: float,
        projected: float | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        """Run a command as a step, unless it is over; what the clock ends goes on with the next command.

        Args:
            name: of the step.
            command: of Python.
            limit: seconds that the step may take.
            planned: seconds that it should take.
            projected: the same before anything was measured, if that is another number.
            env: further variables of its environment.
        """
        if self.is_over(name):
            return
        available = self.left - self.size.wrap_up
        if available < 1 or self.stopped:
            return
        row = self.state["steps"].setdefault(name, {"seconds": 0.0})
        row |= {"projected": planned if projected is None else projected, "planned": planned}
        self.say(f"{name}: about {planned:.0f} s")
        begun = time.monotonic()
        process = start(*command, env=env or {})
        self.running.append(process)
        code = wait(process, min(limit, available))
        self.running.remove(process)
        row["seconds"] += time.monotonic() - begun
        ended = "cut" if limit < available else "stopped"
        self.stopped = code is None and ended == "stopped"
        row["status"] = ended if code is None else "failed" if code else "done"
        self.say(f"{name}: {row['status']} after {row['seconds']:.0f} s")
        self.keep()

    def begin_images(self) -> None:
        """Unpack and decode the images, beside the checks and the measurement of speed."""
        if not any(self.root.glob(".mixadv-cache/*.npz")):
            command = ("studies/gpu_question.py", "images", "--archive", self.carried / "cifar10-jpeg.tar.gz")
            self.images = start(*command, "--root", self.root)
            self.running.append(self.images)

    def checks(self) -> None:
        """The first part."""
        file, name = self.folder / "checks.json", "checks"
        if self.is_over(name):
            return
        for run in ("straight", "killed", "long", "subset"):
            shutil.rmtree(self.folder / "checks" / run, ignore_errors=True)
        where = ["--folder", self.folder / "checks", "--root", self.root, "--out", file]
        # Three starts in a row: a training, the rest of the killed one, and their measurements.
        limit = self.size.checks
        self.step(name, ["studies/gpu_checks.py", *where, *self.cpu], limit, min(limit, 4 * self.size.start))
        self.read("checks", file)

    def speed(self) -> None:
        """The second part."""
        options = ["--parts", "speed", "ablations", "--repeats", "2", "--members", "1", str(self.size.members)]
        options += ["--variants", "eager float32", "ours", "without compile", "--ablations", "CUDA graphs"]
        options += self.cpu or ["--seconds", "0.5"]
        command = ["benchmarks/gpu.py", *options]
        self.step("speed", command, self.size.speed, self.size.speed, env={"OUT": str(self.folder)})
        self.read("speed", self.folder / "gpu.json")

    def read(self, name: str, file: Path) -> None:
        """Take what a step has written into the state."""
        if file.exists():
            self.state[name] = json.loads(file.read_text(encoding="utf-8"))
            self.keep()

    def asked(self) -> float:
        """Seconds that the third part has taken so far."""
        return sum(row["seconds"] for name, row in self.state["steps"].items() if name not in ("checks", "speed"))

    def ask(self) -> None:
        """The third part."""
        if self.images is not None:
            code = wait(self.images, self.left - self.size.wrap_up)
            self.running.remove(self.images)
            if code:
                self.state["steps"]["images"] = {"status": "failed", "seconds": 0.0}
                self.keep()
                self.say("the images could not be prepared: see above")
            if code != 0:
                return
        file = self.folder / "step.json"
        command = ["studies/gpu_question.py", "step", "--out", file, *self.cpu]
        self.step("seconds of a step", command, self.question, 2 * self.size.start)
        if not self.is_over("seconds of a step"):
            return
        self.read("step", file)
        if "plan" not in self.state:
            steps = {int(members): seconds for members, seconds in self.state["step"]["steps"].items()}
            rates = Rates(steps, self.state["step"]["exact_pass"])
            trainings = plan(self.size, self.question - self.asked(), rates)
            self.state["plan"] = [asdict(one) for one in trainings]
            self.keep()
        trainings = [Training(**one) for one in self.state["plan"]]
        self.say(f"E = {trainings[0].epochs} epochs fit")
        for one in trainings:
            settings = self.size.training(self.root, one.num_members, one.epochs, self.folder / "runs" / one.name)
            self.step(one.name, ["run.py", *settings], float("inf"), one.planned, projected=one.projected)
        runs = [self.folder / "runs" / one.name for one in trainings if self.is_over(one.name)]
        if len(runs) == len(trainings):
            file = self.folder / "replays.json"
            command = ["studies/gpu_question.py", "replays", "--out", file, *self.cpu, "--runs", *runs]
            self.step("replays", command, float("inf"), REPLAYS)
            self.read("replays", file)

    def show(self) -> None:
        """Tables and figures of the trainings, in $OUT."""
        runs = self.folder / "runs"
        begun = sorted(file.parent for file in runs.glob("*/metrics.csv"))
        if not begun:
            return
        curves = ["studies/gpu_question.py", "curves", "--out", runs / "curves.png", "--runs", *begun]
        for command in (curves, ["run.py", "task=report", f"runs={runs}"], ["studies/figures.py", runs]):
            process = start(*command)
            self.running.append(process)
            if wait(process, self.left - 2, grace=1):
                self.say(f"{command[0]} failed: see above")
            self.running.remove(process)
        for name in SHOWN:
            if (runs / name).exists():
                shutil.copy(runs / name, self.out / name)
        with tarfile.open(self.out / "runs.tar.gz", "w:gz") as tar:
            for file in sorted(file for name in KEPT for file in runs.glob(f"*/{name}")):
                tar.add(file, file.relative_to(runs))

    def summary(self) -> int:
        """Print what was found and how long it took; the exit code."""
        print()
        for name in ("checks", "replays"):
            table(self.state.get(name, []))
            print()
        rows = self.state.get("speed", {}).get("rows", [])
        table(rows, list(dict.fromkeys(key for row in rows for key in row)))
        print()
        wanted = {"checks": {}, "speed": {}, "seconds of a step": {}}
        wanted |= {one["name"]: one for one in self.state.get("plan", [])} | {"replays": {}}
        table(
            [
                {"step": name, **{key: found.get(key) for key in ("projected", "planned", "seconds", "status")}}
                for name, found in ((name, self.state["steps"].get(name, {})) for name in wanted)
            ]
        )
        statuses = {row.get("status") for row in self.state["steps"].values()}
        if "failed" in statuses or not all(row["ok"] for row in self.state.get("checks", [])):
            return FAILED
        return DONE if all(map(self.is_over, wanted)) else AGAIN

    def stop(self) -> None:
        """End whatever runs."""
        for process in self.running:
            with suppress(ProcessLookupError):
                stop(process, grace=2)


def _refuse(message: str) -> None:
    sys.exit(f"fifteen.py: {message}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet; the exit code is 0 if everything is done, 1 if a step failed, 3 if time ran out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, help="the command ends before")
    parser.add_argument("--question", type=float, default=540, help="seconds of the third part, all commands together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--carried", type=Path, default=ROOT / ".carry", help="folder with cifar10-jpeg.tar.gz")
    parser.add_argument("--cpu", action="store_true", help="all steps on the CPU, with tiny settings")
    args = parser.parse_args(arguments)
    size = TINY if args.cpu else FULL
    if not args.cpu and not torch.cuda.is_available():
        _refuse("there is no GPU here; --cpu goes through all steps on a CPU, with tiny settings")
    if args.seconds <= size.wrap_up:
        _refuse(f"{args.seconds:g} seconds are too few: tables and figures alone take up to {size.wrap_up:g}")
    if not (args.carried / "cifar10-jpeg.tar.gz").is_file():
        _refuse(f"there is no {args.carried}/cifar10-jpeg.tar.gz: make it with studies/carry.sh, or give --carried DIR")
    folder = ROOT / "outputs" / ("fifteen-cpu" if args.cpu else "fifteen")
    work = Fifteen(size, args.seconds, args.question, args.carried.resolve(), folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    work.state.setdefault("environments", []).append(environment())
    parts: dict[str, Callable[[], None]] = {"checks": work.checks, "speed": work.speed, "question": work.ask}
    try:
        work.begin_images()
        for part in args.parts:
            parts[part]()
        work.show()
        return work.summary()
    finally:
        work.stop()
        work.keep()


if __name__ == "__main__":
    sys.exit(main())
