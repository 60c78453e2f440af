"""Sweeps: how every job ended, in whichever process and on whichever machine it ran.

Hydra gives the results of a sweep's jobs to nobody, and stops at the first job that raises. Therefore jobs do not
raise: each writes an `Outcome` into a hidden folder of the sweep's directory, and the command that started the sweep
reads it. To Hydra's sweeper a job returns a number.
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

from mixadv.files import write_text
from mixadv.run_names import name_in, run_name
from mixadv.runs.locks import holder
from mixadv.wording import counted

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
    """Hydra's callback for a sweep; jobs in processes of their own get a copy of it.

    Attributes:
        directory: the sweep's directory; None in a single run.
        names: the names of the jobs in order; empty if only the sweeper knows them.
        launcher: import path of the launcher's class.
        searches: whether a sweeper other than Hydra's own chooses the jobs by the numbers that they return.
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
        """In the job's process. A process that joblib started stops when its parent ends."""
        Sweep.of_job = self
        if self.launcher.endswith(".JoblibLauncher") and os.getpid() != self._pid:
            _stop_without(self._pid)
            if os.getppid() != self._pid:
                # The parent has ended, but this job was still in the queue.
                os.kill(os.getpid(), signal.SIGTERM)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """In the job's process, unless a signal has ended the job."""
        Sweep.of_job = None
        if self.directory is not None:
            # Trainers and modules refer to each other: free the memory of this job before the next one.
            gc.collect()

    def leave(self, number: int, outcome: Outcome) -> None:
        """In the job's process: write the outcome of job `number` for the process that started the sweep."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / f"{number}.json", json.dumps(asdict(outcome)))

    def outcomes(self) -> list[Outcome]:
        """One for each job, in order; for jobs that wrote none, their directories tell."""
        assert self.directory is not None
        left = {
            int(path.stem): Outcome(**json.loads(path.read_text(encoding="utf-8")))
            for path in self._folder.glob("*.json")
        }
        count = max(len(self.names), max(left, default=-1) + 1)
        return [left[number] if number in left else self._missing(number) for number in range(count)]

    def _missing(self, number: int) -> Outcome:
        assert self.directory is not None
        name = self.names[number] if number < len(self.names) else f"job {number}"
        who = holder(self.directory / name)
        if who is not None:
            return Outcome(name, ELSEWHERE, who)
        return Outcome(name, MISSING, "it was not started, or its process was killed")

    def close(self) -> None:
        """Remove the outcomes that the jobs wrote."""
        if self.directory is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def summary(directory: Path, outcomes: Sequence[Outcome]) -> str:
    """Counts of how the jobs ended, and a line for each job that another process is working on."""
    by_state = {state: sum(outcome.state == state for outcome in outcomes) for state in (FAILED, ELSEWHERE, MISSING)}
    before = sum(outcome.state == BEFORE for outcome in outcomes)
    done = sum(outcome.state == DONE for outcome in outcomes) + before
    parts = [f"{done} done" + (f" ({before} before)" if before else "")]
    parts += [f"{count} {state}" for state, count in by_state.items() if count]
    jobs = counted(len(outcomes), "job")
    lines = [f"Sweep {os.path.relpath(directory)}: {jobs}, {', '.join(parts)}"]
    lines += [f"  {outcome.name}: {ELSEWHERE}, {outcome.reason}" for outcome in outcomes if outcome.state == ELSEWHERE]
    return "\n".join(lines)


def complaint(outcomes: Sequence[Outcome]) -> str:
    """Which jobs failed and why, a line for each; "" where none did."""
    bad = [outcome for outcome in outcomes if outcome.state in (FAILED, MISSING)]
    if not bad:
        return ""
    head = f"{len(bad)} of {counted(len(outcomes), 'job')} failed; the same command runs these again:"
    return "\n".join([head, *(f"  {outcome.name}: {outcome.reason}" for outcome in bad)])


@cache
def _stop_without(parent: int) -> None:
    """Watch the process that started this one; when it ends, send SIGTERM to this process."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        while True:
            os.kill(os.getpid(), signal.SIGTERM)
            # The first signal lets the run save its state; a later one ends the process.
            time.sleep(10)

    threading.Thread(target=watch, daemon=True).start()


def _is_basic(config: DictConfig) -> bool:
    return str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")


def _job_names(config: DictConfig) -> list[str]:
    """The names of the jobs of Hydra's own sweeper; other sweepers choose theirs later."""
    if not _is_basic(config):
        return []
    return job_names(list(config.hydra.overrides.task), Path(config.hydra.sweep.dir))


def job_names(overrides: Sequence[str], folder: Path) -> list[str]:
    """The names of the jobs' directories in `folder`, from the overrides of the sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [name_in(folder, run_name(job)) for job in jobs]
