"""What a command says: on the console, and in the log of its run.

Hydra sets the log up (``conf/hydra/job_logging/mixadv.yaml``). What is on the console already is logged by `SAID`,
which writes to the file alone, so that no line is shown twice.
"""

import io
import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import rich.console

from mixadv.redaction import printable

# Known by this name in the configuration of the log.
SAID = logging.getLogger("mixadv.console")
# How many records wait for a directory at most; a command that gets none drops them.
HELD_BACK = 1000
# Lightning's own hints on the console; they are for authors of programs, not for users of ours.
LIGHTNING = "pytorch_lightning"


class RunLog(logging.FileHandler):
    """A log that goes to the directory of the run, once there is one.

    Until `begin_log` names the directory, records wait in memory: a command that is refused, a run that is shown
    again and a directory in which another process works get no file. Records are appended, so that a run that goes
    on keeps what it has said before.

    Args:
        filename: name of the file in the directory of the run; an absolute path stays as it is.
    """

    def __init__(self, filename: str = "mixadv.log") -> None:
        super().__init__(filename, mode="a", encoding="utf-8", delay=True)
        self._filename = filename
        self._waiting: deque[logging.LogRecord] | None = deque(maxlen=HELD_BACK)
        self._ended = False

    def begin(self, directory: Path) -> None:
        """Write to `directory` from now on, first what has waited; it is made if need be.

        A log that has begun, or that has ended, stays as it is.
        """
        if self._waiting is None or self._ended:
            return
        waiting, self._waiting = self._waiting, None
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
        self.baseFilename = os.path.abspath(directory / self._filename)
        for record in waiting:
            self.handle(record)

    def end(self) -> None:
        """Close the file; what comes later is dropped."""
        self._waiting, self._ended = deque(maxlen=0), True
        # What could not be written before cannot be written now.
        with suppress(OSError):
            self.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or let it wait. A disk that takes no more ends no run here: its own files tell of that."""
        if self._waiting is not None:
            self._waiting.append(record)
            return
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `logging` inside its ``except``: raise what came from the disk, show the rest as it does."""
        import sys

        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """The record as text that gives no orders to a terminal: parts of it may come from files of others."""
        return printable(super().format(record), keep="\n\t")


def _logs() -> list[RunLog]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RunLog)]


def begin_log(directory: Path) -> None:
    """Send the log of this run to `directory`; called when its first file is written. Nothing without a `RunLog`."""
    for log in _logs():
        log.begin(directory)


def end_log() -> None:
    """Close the log of this run, for the next job of this process begins its own."""
    for log in _logs():
        log.end()


class Console(rich.console.Console):
    """Rich's console, which also logs what it prints, as plain text."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print and log; arguments are those of Rich. What a quiet console does not show is not logged."""
        super().print(*objects, **options)
        if self.quiet or not SAID.isEnabledFor(logging.INFO):
            return
        text = self._plain(objects, options).strip("\n")
        # A live display prints its orders to the cursor.
        if text.strip():
            SAID.info("%s", text if "\n" not in text else f"\n{text}")

    def _plain(self, objects: tuple[Any, ...], options: dict[str, Any]) -> str:
        page = io.StringIO()
        plain = rich.console.Console(
            file=page, width=self.width, color_system=None, force_terminal=False, markup=self._markup
        )
        plain.print(*objects, **options)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def say(text: str) -> None:
    """Print one line and log it."""
    print(text, flush=True)
    SAID.info("%s", text)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints (which devices there are, ...) off the console while it works; errors are shown.

    Where logging is set up, as in every command, its loggers go where that says. Else Lightning writes to standard
    error by a handler of its own, which is the one that is held back.
    """
    handlers = [handler for handler in logging.getLogger(LIGHTNING).handlers if type(handler) is logging.StreamHandler]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(max(handler.level, logging.ERROR))
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
