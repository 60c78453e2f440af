"""Weights & Biases as a mirror of the local files: it may fail, the run goes on.

Online with a key, offline without. The run's id is kept in the run directory, and every row has the number that it has
in metrics.csv: a run that was stopped and continued goes on in the same Weights & Biases run, where each row is once.
"""

import csv
import io
import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console
from rich.text import Text

from mixadv.errors import UserError
from mixadv.redaction import shown

ID_FILE = "wandb-run-id.txt"
MODES = ("online", "offline", "disabled")
SERVICE = "Weights & Biases"
# Offline folders that a later session has replaced; `wandb sync` without arguments does not look there.
SUPERSEDED = "superseded"
# The shell's codes of programs that a signal has ended lie above.
SIGNALLED = 128
SENT_SETTINGS = (Path("wandb/settings"), Path(".wandb/settings"))
LAUNCH = "wandb.sdk.launch.inputs.internal"


def _has_key() -> bool:
    """Whether `wandb login` or the environment left a key."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).hostname
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _id(path: Path) -> str:
    """The run's id, kept in `path`; a new one where there is none. It becomes part of a folder's name."""
    kept = path.read_text(errors="replace").strip() if path.is_file() and not path.is_symlink() else ""
    if not re.fullmatch(r"\w{4,64}", kept, re.ASCII):
        kept = secrets.token_hex(4)
        # Renamed into place: a link that came with the folder is replaced, not followed.
        temporary = path.with_name(f".{path.name}.{kept}")
        temporary.write_text(kept + "\n")
        os.replace(temporary, path)
    return kept


def _rows(path: Path) -> list[dict[str, float]]:
    """The complete rows of a metrics.csv as numbers; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    filled = ({name: cell for name, cell in row.items() if cell} for row in complete)
    return [{name: int(c) if c.isdecimal() else float(c) for name, c in row.items()} for row in filled]


class _Link:
    """The connection that a mirror and its views share; of all that goes wrong, the first thing is told.

    wandb reports to it instead of the terminal: the program hears nothing else of errors of the background process.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.run: Any = None
        self.known = 0  # records below this number are there already
        self.told = False  # something failed
        self.lost = False  # nothing more is sent
        self.listening = False  # before and after, what wandb reports is an exception as well

    def attempt(self, action: Callable[[], object], *, vital: bool = True) -> None:
        """Do it, unless something vital has failed before."""
        if self.lost:
            return
        try:
            action()
        except Exception as error:  # whatever the mirror does, the training and its local files go on
            self.lost = vital
            missing = "stopped taking values" if vital else "did not take the images"
            self.tell(f"{missing} ({type(error).__name__}: {shown(error)}); the local files are complete")

    def tell(self, reason: str) -> None:
        """One warning a run."""
        if not self.told:
            self.told = True
            self.console.print(Text(f"{SERVICE} {reason}", style="yellow"), soft_wrap=True)

    def send(self, number: int, values: dict[str, Any]) -> None:
        """Record `number` of the run, unless the service has it from an earlier session."""
        if number >= self.known:
            self.run.log(values, step=number, commit=True)

    def info(self, message: str) -> None:
        """Nothing that anybody waits for."""

    def warning(self, message: str) -> None:
        """Something did not arrive."""
        if self.listening:
            self.tell(f"did not take everything ({shown(message)}); the local files are complete")

    error = warning


class WandbMirror:
    """One Weights & Biases run for one run directory.

    Records are numbered (W&B's ``_step``): row i of metrics.csv is number i, the table of images follows the last
    row, and the baseline's rows and table follow that. A session that continues a run sends the rows of metrics.csv
    that the service has not got, from the beginning where it is offline, for offline files do not continue each
    other: uploading one replaces the other. The folders of earlier sessions are then moved to wandb/superseded.

    A stop by a signal shows as preempted, any other failure as failed.

    Args:
        run_dir: its files go to run_dir/wandb; its id to run_dir/wandb-run-id.txt.
        project, entity: where it is shown.
        name: of the run; group: of the sweep, None outside one.
        config: plain containers, stored with the run.
        init_timeout: seconds to wait for the service before going on offline.
        finish_timeout: seconds to wait at the end until the service has everything.
        console: for the one line that says how to see the curves, and for one warning.

    Raises:
        UserError: WANDB_MODE is none of online, offline and disabled.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        entity: str | None,
        name: str,
        group: str | None,
        config: dict[str, Any],
        init_timeout: float,
        console: Console,
        finish_timeout: float = 30,
    ) -> None:
        self.console, self.run_dir = console, run_dir
        self.run: Any = None
        self._prefix, self._directory = "", run_dir
        self._link = _Link(console)
        # Rows sent or known; None before the first, when those of earlier sessions are looked after.
        self._count: int | None = None
        self._offset = 0
        self._mixture: WandbMirror | None = None
        self._views = [self]
        self.mode: Any = os.environ.get("WANDB_MODE")
        if self.mode and self.mode not in MODES:
            raise UserError(f"WANDB_MODE={self.mode} is unknown: choose one of {', '.join(MODES)}, or leave it unset")
        if self.mode == "disabled":
            self._link.lost = True
            return
        # wandb's reports of its own errors would fail, and say so, where the service does.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        arguments = {"project": project, "entity": entity, "name": name, "group": group, "config": config}
        self._connect(arguments, {"init_timeout": init_timeout, "finish_timeout": finish_timeout})
        self._link.attempt(self._define_axes)
        if self.mode == "online" and self.run is not None:
            console.print(Text(f"{SERVICE}: {self.run.url}"), soft_wrap=True)

    def _connect(self, arguments: dict[str, Any], timeouts: dict[str, Any]) -> None:
        """Start online if there is a key, else or failing that offline, failing that not at all."""
        refused = ""
        # Exceptions are the service's, the network's, the disk's, and what libraries make of them.
        try:
            self.id = _id(self.run_dir / ID_FILE)
            # wandb would take from there where the key is sent, and through whom: a folder may come with one.
            sent = [path for path in SENT_SETTINGS if path.exists()]
            if sent and self.mode != "offline":
                refused, self.mode = f"{sent[0]} could send your key elsewhere: move it to ~/.config/wandb", "offline"
            self.mode = self.mode or ("online" if _has_key() else "offline")
            if self.mode == "online":
                try:
                    self._start(arguments, timeouts, resume="allow")
                    self._link.known = self.run.starting_step
                except Exception as error:
                    refused, self.mode = shown(error), "offline"
                    _release()
            if self.mode == "offline":
                self._start(arguments, timeouts)
        except Exception as error:
            self._link.lost = True
            self._link.tell(f"cannot be used ({refused or shown(error)}); the local files are complete")
            return
        if refused:
            self._link.tell(f"cannot be reached ({refused}); going on offline")
            # What befalls the offline file is another matter.
            self._link.told = False
        self._link.listening = True

    def _start(self, arguments: dict[str, Any], timeouts: dict[str, Any], **how: Any) -> None:
        import wandb

        wandb.setup()
        wandb.termsetup(wandb.Settings(silent=True), self._link)
        settings = wandb.Settings(
            **timeouts,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            # Remotes of checkouts may hold passwords; versions and commit are in results.json.
            disable_git=True,
            x_save_requirements=False,
            # In a sweep, never the run of the job before.
            reinit="create_new",
        )
        # What wandb looks through for inputs of W&B Launch takes longer to import than all the rest, a second or two;
        # it goes on without. None is what Python takes for a module that cannot be imported.
        modules: dict[str, Any] = sys.modules
        blocked = modules.setdefault(LAUNCH, None) is None
        try:
            run = wandb.init(mode=self.mode, settings=settings, id=self.id, dir=str(self.run_dir), **arguments, **how)
        finally:
            if blocked:
                del modules[LAUNCH]
        self.run = self._link.run = run

    def _define_axes(self) -> None:
        # A bare "*" would also claim the baseline's curves.
        for pattern in ("train/*", "val/*", "weights/*", "lambda/*", "epoch", "member_updates", "seconds"):
            self.run.define_metric(pattern, step_metric="step")
        self.run.define_metric("baseline/*", step_metric="baseline/step")

    def baseline(self) -> "WandbMirror":
        """A view on the same run that logs under ``baseline/``, after everything of the mixture."""
        view = object.__new__(WandbMirror)
        view.__dict__ = {**self.__dict__, "_prefix": "baseline/", "_directory": self.run_dir / "baseline"}
        view._count, view._mixture = None, self
        self._views.append(view)
        return view

    def _named(self, values: dict[str, Any]) -> dict[str, Any]:
        return {f"{self._prefix}{name}": value for name, value in values.items()}

    def _catch_up(self, but: int = 0) -> int:
        """Send the rows of earlier sessions: those of metrics.csv, `but` so many at its end; how many there are."""
        if self._count is None:
            if self._mixture is not None:
                # One number is the mixture's table's, whether it has one or not.
                self._offset = self._mixture._catch_up() + 1
            rows = _rows(self._directory / "metrics.csv")
            self._count = max(0, len(rows) - but)
            for i, row in enumerate(rows[: self._count]):
                self._link.send(self._offset + i, self._named(row))
        return self._count

    def log(self, row: dict[str, float]) -> None:
        """Send one row of the history, the last one in metrics.csv."""

        def send() -> None:
            count = self._catch_up(but=1)
            self._link.send(self._offset + count, self._named(row))
            self._count = count + 1

        self._link.attempt(send)

    def summary(self, results: dict[str, Any]) -> None:
        """The final numbers."""
        clean, robust = results["clean"], results["robust"]
        numbers = {"clean": clean["expected_accuracy"], "ensemble": clean["ensemble_accuracy"]}
        numbers["robust"] = robust["expected_accuracy"]
        values = self._named({f"test/{name}_accuracy": number for name, number in numbers.items()})
        self._link.attempt(lambda: self.run.summary.update(values))

    def images(
        self, clean: np.ndarray, adversarial: np.ndarray, labels: Sequence[str], wrong: Sequence[str], eps: float
    ) -> None:
        """A table of clean, adversarial and difference images, [N, C, H, W] in [0, 1].

        The difference is scaled so that -eps is black and +eps is white. The service is asked for a place, which takes
        20 seconds where it does not answer: rows go on without a table, and where something has failed none is tried.
        """
        if self._link.told or self._link.lost:
            return
        import wandb

        def picture(image: np.ndarray) -> Any:
            pixels = np.clip(np.round(image * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
            return wandb.Image(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)

        def send() -> None:
            difference = 0.5 + (adversarial - clean) / (2 * eps) if eps > 0 else np.full_like(clean, 0.5)
            rows = [
                [picture(a), picture(b), picture(d), label, members]
                for a, b, d, label, members in zip(clean, adversarial, difference, labels, wrong, strict=True)
            ]
            columns: list[str | int] = ["clean", "adversarial", "difference", "label", "fooled members"]
            number = self._catch_up() + self._offset
            self._link.send(number, self._named({"examples": wandb.Table(columns=columns, data=rows)}))

        self._link.attempt(send, vital=False)

    def finish(self, exit_code: int) -> None:
        """Close the run, a stop by a signal (above 128) as preempted; say how to upload what is not uploaded."""
        if self.run is None:
            return
        for view in self._views:
            self._link.attempt(view._catch_up)
        if exit_code > SIGNALLED:
            self._link.attempt(self.run.mark_preempting)
        # Also where values were lost: the next job of a sweep must not meet an open run.
        lost, self._link.lost = self._link.lost, False
        self._link.attempt(lambda: self.run.finish(exit_code=exit_code))
        self._link.listening = False
        folder = Path(self.run.settings.sync_dir)
        if self._link.lost:
            _release()
        elif not (lost or self._link.told):
            self._link.attempt(lambda: self._set_aside(folder))
        if self.mode == "offline" or self._link.told:
            state = "is offline" if self.mode == "offline" else "is not complete"
            command = f"wandb sync {os.path.relpath(folder)}"
            self.console.print(Text(f"{SERVICE} {state}; to upload: {command}"), soft_wrap=True)

    def _set_aside(self, folder: Path) -> None:
        """Move the run's other offline folders, whose rows are all in `folder` or uploaded, out of the way."""
        # Of two that began in one second, the later has a number behind the id.
        for other in set(folder.parent.glob(f"offline-run-*-{self.id}*")) - {folder}:
            (folder.parent / SUPERSEDED).mkdir(exist_ok=True)
            os.replace(other, folder.parent / SUPERSEDED / other.name)


def _release() -> None:
    """End wandb's background process, which may hold the id of a run that did not start, or be dead already."""
    import wandb

    with suppress(Exception):  # of a process that is gone; the next run starts another one
        wandb.teardown()
