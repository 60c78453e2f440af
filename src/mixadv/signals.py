"""Stopping on SIGINT, SIGTERM and, where the system has them, SIGUSR1 and, if a launcher handles it, SIGUSR2.

Work that is repeated later (an attack, a weights phase, a validation) stops at once. Work that must be whole (an
update, the writing of a checkpoint) is finished first. A second SIGINT stops at once in any case.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# Windows has neither SIGUSR1 nor SIGUSR2.
HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
# Asks a job to stop and to go back into the queue, see `requeue`.
REQUEUE: int | None = getattr(signal, "SIGUSR1", None)
EXIT_BASE = 128  # shells report 128 + n for a program that signal n ended


class Stopped(BaseException):
    """A signal asked the program to stop.

    Not an `Exception`, so that no ``except Exception`` between the signal and the command line swallows it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + number of the signal: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1 (Linux)."""
        return EXIT_BASE + self.signum


def output_closed() -> Stopped:
    """What to raise when the reader of the output has ended, as `head` does: other programs end by SIGPIPE then."""
    return Stopped(getattr(signal, "SIGPIPE", signal.SIGTERM))


class Signals:
    """A context in which signals raise `Stopped`: at once or, inside `shielded`, at the next `check`.

    Earlier handlers, such as those of a cluster's launcher, are restored at the end; the handler of a signal that was
    received is called then. Outside the main thread Python allows no handlers, and signals keep their effect.

    Attributes:
        active: the innermost context that has been entered, or None.
        received: number of the first signal, or None.
    """

    active: "Signals | None" = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._outer: Signals | None = None
        self._is_shielded = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Set the handlers again: another library may have replaced them."""
        for signum in self._previous:
            signal.signal(signum, self._handle)

    def __enter__(self) -> "Signals":
        for signum in HANDLED:
            before = signal.getsignal(signum)
            # Only submitit uses SIGUSR2: it sends it before the time limit of a job.
            if signum == getattr(signal, "SIGUSR2", None) and not callable(before):
                continue
            try:
                signal.signal(signum, self._handle)
            except ValueError:
                # Not the main thread.
                break
            self._previous[signum] = before
        self._outer, Signals.active = Signals.active, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        Signals.active = self._outer
        for signum, before in self._previous.items():
            signal.signal(signum, before)
        inherited = self._previous.get(self.received) if self.received is not None else None
        self._previous.clear()
        if callable(inherited) and inherited is not signal.default_int_handler:
            inherited(self.received, None)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Clusters repeat SIGTERM, so only a second SIGINT (Ctrl-C) interrupts shielded work.
        first = self.received is None
        self.received = self.received or signum
        if (first and not self._is_shielded) or (not first and signum == signal.SIGINT):
            raise Stopped(signum)

    def check(self) -> None:
        """Stop if a signal was received.

        Raises:
            Stopped: a signal was received.
        """
        if self.received is not None:
            raise Stopped(self.received)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Inside the block, signals take effect at `check`, or at its end."""
        with self._set(True):
            yield
        if not self._is_shielded:
            self.check()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside `shielded`: a block that a signal may end at any point, because it is repeated as a whole later."""
        with self._set(False):
            self.check()
            yield

    @contextmanager
    def _set(self, value: bool) -> Iterator[None]:
        before = self._is_shielded
        self._is_shielded = value
        try:
            yield
        finally:
            self._is_shielded = before


def requeue(say: Callable[[str], None]) -> None:
    """Requeue this process's Slurm job; does nothing outside Slurm.

    For jobs submitted by hand (``#SBATCH --signal=USR1@120 --requeue``); submitit requeues its own jobs.

    Args:
        say: prints one line about the result.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")
    if not job or "SUBMITIT_EXECUTOR" in os.environ:
        return
    try:
        answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        say(f"cannot requeue Slurm job {job}: scontrol: {error.strerror}")
        return
    if answer.returncode:
        say(f"cannot requeue Slurm job {job}: {answer.stderr.strip() or answer.stdout.strip()}")
    else:
        say(f"Slurm job {job} is back in the queue")
