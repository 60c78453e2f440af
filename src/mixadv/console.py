"""What a command prints on the console and writes to the log of its run.

Hydra configures the log (``conf/hydra/job_logging/mixadv.yaml``). Lines that mixadv has printed itself are logged by
`TRANSCRIPT`, which writes to the file only, so that no line is printed twice.
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
from mixadv.signals import output_closed

# conf/hydra/job_logging/mixadv.yaml refers to this name.
TRANSCRIPT = logging.getLogger("mixadv.console")
# Most records that are kept in memory until the run has a directory.
MAX_WAITING = 1000
# Lightning's logger. Its hints are advice to authors of training loops, not to users of mixadv.
LIGHTNING = "pytorch_lightning"


class RunLog(logging.FileHandler):
    """A log file in the run directory, opened when the run begins to write there.

    Until `begin_log` names the directory, records wait in memory. No file appears if the command is refused, if it only
    prints a finished run, or if another process works in the directory. Records are appended, so that a resumed run
    keeps its earlier log.

    Args:
        filename: name of the file in the run directory, or an absolute path.
    """

    def __init__(self, filename: str = "mixadv.log") -> None:
        super().__init__(filename, mode="a", encoding="utf-8", delay=True)
        self._filename = filename
        self._waiting: deque[logging.LogRecord] | None = deque(maxlen=MAX_WAITING)
        self._ended = False

    def begin(self, directory: Path) -> None:
        """Write to `directory` from now on, waiting records first. The directory is created if it does not exist.

        Has no effect on a log that has begun or ended.
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
        """Close the file; later records are dropped."""
        self._waiting, self._ended = deque(maxlen=0), True
        # Closing flushes, which fails on a full disk.
        with suppress(OSError):
            self.close()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or keep it until `begin`. A failed write is ignored: the run's own files report a full
        disk."""
        if self._waiting is not None:
            self._waiting.append(record)
            return
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise errors of the disk, which `emit` ignores, and print others as `logging` does (called in ``except``)."""
        import sys

        if isinstance(sys.exc_info()[1], OSError):
            raise
        super().handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """The record without control characters: parts of it may come from files of other people."""
        return printable(super().format(record), keep="\n\t")


def _logs() -> list[RunLog]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RunLog)]


def begin_log(directory: Path) -> None:
    """Write the log of this run to `directory`; called when the run writes its first file there."""
    for log in _logs():
        log.begin(directory)


def end_log() -> None:
    """Close the log of this run; the next job of a sweep in this process opens its own."""
    for log in _logs():
        log.end()


class Console(rich.console.Console):
    """Rich's console, which also logs what it prints as plain text."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print and log; a quiet console does neither. Arguments: see Rich."""
        super().print(*objects, **options)
        if self.quiet or not TRANSCRIPT.isEnabledFor(logging.INFO):
            return
        text = self._plain(objects, options).strip("\n")
        # Rich's live displays print control codes without text.
        if text.strip():
            TRANSCRIPT.info("%s", text if "\n" not in text else f"\n{text}")

    def on_broken_pipe(self) -> None:
        """Stop as for a signal: the reader of the output has ended, as `head` does."""
        raise output_closed()

    def _plain(self, objects: tuple[Any, ...], options: dict[str, Any]) -> str:
        page = io.StringIO()
        plain = rich.console.Console(
            file=page, width=self.width, color_system=None, force_terminal=False, markup=self._markup
        )
        plain.print(*objects, **options)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def say(text: str) -> None:
    """Print one line and log it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise output_closed() from None
    TRANSCRIPT.info("%s", text)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Inside the block, Lightning prints only errors, no hints such as the list of devices.

    This changes the handlers for standard error that Lightning adds itself. Where logging is configured, as in every
    command, it adds none, and the configuration decides.
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
