"""Sweeps: what became of every job, in whichever process and on whichever machine it ran.

Hydra hands the results of a sweep's jobs to nobody, and stops at the first one that raised. Jobs therefore do not
raise; they leave an `Outcome` in a hidden folder of the sweep's directory, and the command that started them reads it.
What they return to Hydra's sweeper is a number.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from mixadv.config import run_name
from mixadv.files import write_text
from mixadv.runs.locks import holder

DONE = "done"
BEFORE = "done before"
FAILED = "failed"
ELSEWHERE = "running elsewhere"
MISSING = "unfinished"


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `state` is one of the constants above, `reason` why it is not done."""

    name: str
    state: str
    reason: str = ""


class Sweep(Callback):
    """Hydra's callback that follows a sweep; where jobs have processes of their own, a copy of it goes along.

    Attributes:
        directory: the sweep's directory; None in a single run.
        names: the jobs' names in order, as far as they can be known beforehand.
        launcher: the class of Hydra's that starts them.
        searches: whether a sweeper other than Hydra's own draws the jobs and reads their numbers.
    """

    # The sweep that this process has started, and the one that the job in this process belongs to.
    current: Sweep | None = None
    of_job: Sweep | None = None

    def __init__(self) -> None:
        self.directory: Path | None = None
        self.names: list[str] = []
        self.launcher = ""
        self.searches = False
        self._pid = os.getpid()
        self._folder = Path()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """In the process that starts the jobs, before the first of them."""
        self.directory = Path(config.hydra.sweep.dir).absolute()
        self._folder = self.directory / f".jobs-{uuid.uuid4().hex[:8]}"
        self.names = _job_names(config)
        self.launcher = str(config.hydra.launcher.get("_target_"))
        self.searches = not _is_basic(config)
        self._pid = os.getpid()
        Sweep.current = self

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """In the job's process: one on this machine stops with the process that started it."""
        Sweep.of_job = self
        if self.launcher.endswith(".JoblibLauncher") and os.getpid() != self._pid:
            _stop_without(self._pid)
            if os.getppid() != self._pid:
                # The queue still had this job.
                os.kill(os.getpid(), signal.SIGTERM)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """In the job's process, unless a signal has ended the job."""
        Sweep.of_job = None
        if self.directory is not None:
            # Trainers and their modules refer to each other: memory that a job held is not to fail the next one.
            gc.collect()

    def leave(self, number: int, outcome: Outcome) -> None:
        """In the job's process: keep the outcome of job `number` for the process that has started the sweep."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / f"{number}.json", json.dumps(asdict(outcome)))

    def outcomes(self) -> list[Outcome]:
        """One for each job, in order; those that left none are looked up in their directories."""
        assert self.directory is not None
        left = {int(path.stem): Outcome(**json.loads(path.read_text())) for path in self._folder.glob("*.json")}
        count = max(len(self.names), max(left, default=-1) + 1)
        return [left[number] if number in left else self._missing(number) for number in range(count)]

    def _missing(self, number: int) -> Outcome:
        assert self.directory is not None
        name = self.names[number] if number < len(self.names) else f"job {number}"
        who = holder(self.directory / name)
        if who is not None:
            return Outcome(name, ELSEWHERE, who)
        return Outcome(name, MISSING, "it was not started, or its process ended without a word")

    def close(self) -> None:
        """Remove what the jobs have left for `outcomes`."""
        if self.directory is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def summary(directory: Path, outcomes: Sequence[Outcome]) -> str:
    """What became of the jobs: counts, and those that another process is working on."""
    counted = {state: sum(outcome.state == state for outcome in outcomes) for state in (FAILED, ELSEWHERE, MISSING)}
    before = sum(outcome.state == BEFORE for outcome in outcomes)
    done = sum(outcome.state == DONE for outcome in outcomes) + before
    parts = [f"{done} done" + (f" ({before} before)" if before else "")]
    parts += [f"{count} {state}" for state, count in counted.items() if count]
    jobs = f"{len(outcomes)} job{'s' if len(outcomes) != 1 else ''}"
    lines = [f"Sweep {os.path.relpath(directory)}: {jobs}, {', '.join(parts)}"]
    lines += [f"  {outcome.name}: {ELSEWHERE}, {outcome.reason}" for outcome in outcomes if outcome.state == ELSEWHERE]
    return "\n".join(lines)


def complaint(outcomes: Sequence[Outcome]) -> str:
    """Which jobs failed and why, a line for each; "" where none did."""
    bad = [outcome for outcome in outcomes if outcome.state in (FAILED, MISSING)]
    if not bad:
        return ""
    head = f"{len(bad)} of {len(outcomes)} jobs failed; the same command runs these again:"
    return "\n".join([head, *(f"  {outcome.name}: {outcome.reason}" for outcome in bad)])


@cache
def _stop_without(parent: int) -> None:
    """Watch the process that started this one; when it is gone, stop as on SIGTERM."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            # The first lets a run keep what it has; once nobody listens any more, the next ends the process.
            time.sleep(10)

    threading.Thread(target=watch, daemon=True).start()


def _is_basic(config: DictConfig) -> bool:
    return str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")


def _job_names(config: DictConfig) -> list[str]:
    """The names that Hydra's own sweeper gives its jobs; of others nothing is known beforehand."""
    return job_names(list(config.hydra.overrides.task)) if _is_basic(config) else []


def job_names(overrides: Sequence[str]) -> list[str]:
    """The names of a sweep's directories: Hydra writes overrides anew, ``compile=False`` for ``compile=false``."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [run_name(job) for job in jobs]
