"""Being told to stop: SIGINT, SIGTERM, SIGUSR1 and, where somebody handles it, SIGUSR2.

A signal ends what can be repeated (an attack, a weights phase, a validation) at once, and what cannot (an update, a
checkpoint being written) when it is done. A second SIGINT does not wait for anything.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

EXIT_BASE = 128  # the shell's code of a program ended by signal n is 128 + n


class Stopped(BaseException):
    """The program was told to stop, and has kept what it needs to go on.

    Not an `Exception`: nothing between the signal and the command line may take it for a failure and go on.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + number of the signal: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1 (Linux)."""
        return EXIT_BASE + self.signum


class Signals:
    """While entered (then it is `active`), signals raise `Stopped`, at once or, inside `shielded`, at the next `check`.

    Handlers that were there before (a cluster's launcher) are put back at the end, and get the signal then. Outside
    the main thread no handler can be set, and signals do what they did before.
    """

    active: "Signals | None" = None

    def __init__(self) -> None:
        self.received: int | None = None
        self._outer: Signals | None = None
        self._is_shielded = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Put the handlers in place (again, where another library has set its own since)."""
        for signum in self._previous:
            signal.signal(signum, self._handle)

    def __enter__(self) -> "Signals":
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            before = signal.getsignal(signum)
            # SIGUSR2 is what submitit sends before a job's time is up; nobody else does.
            if signum == signal.SIGUSR2 and not callable(before):
                continue
            try:
                signal.signal(signum, self._handle)
            except ValueError:
                # Not the main thread: a signal is not ours to take there.
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
        # Clusters repeat SIGTERM; a person who presses Ctrl-C again means it.
        first = self.received is None
        self.received = self.received or signum
        if (first and not self._is_shielded) or (not first and signum == signal.SIGINT):
            raise Stopped(signum)

    def check(self) -> None:
        """Stop now if a signal has come.

        Raises:
            Stopped: it has.
        """
        if self.received is not None:
            raise Stopped(self.received)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Signals wait for `check`, or for the end of the block."""
        with self._set(True):
            yield
        if not self._is_shielded:
            self.check()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside `shielded`: a block that may be left at any point, because it is repeated as a whole."""
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
    """Put the Slurm job that this process belongs to back into the queue; does nothing outside Slurm.

    For jobs submitted by hand (``#SBATCH --signal=USR1@120 --requeue``); submitit requeues its own jobs.
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
