"""The connection to Weights & Biases, which may fail at any time: the program hears of it in one line."""

import netrc
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from mixadv.files import write_text
from mixadv.redaction import shown

ID_FILE = "wandb-run-id.txt"
SERVICE = "Weights & Biases"
# Offline folders that a later session has replaced; `wandb sync` without arguments does not look there.
SUPERSEDED = "superseded"
# The shell's codes of programs that a signal has ended lie above.
SIGNALLED = 128
SENT_SETTINGS = (Path("wandb/settings"), Path(".wandb/settings"))


class Link:
    """The connection that a logger and its views share. Of several failures it reports the first on the console.

    It also receives the messages of wandb's background process, which would otherwise go to the terminal: there is no
    other way to learn that the process failed.

    Args:
        console: for what is told.
        mode: "online", "offline", "disabled", or None for what the key says.
    """

    def __init__(self, console: Console, mode: str | None) -> None:
        self.console, self.mode = console, mode
        self.run: Any = None
        self.is_tried = False  # the connection
        self.known = 0  # records below this number are there already
        self.told = False  # something failed
        self.lost = mode == "disabled"  # nothing more is sent
        self.ended = False
        self.listening = False  # before and after, what wandb reports is an exception as well
        self.follows = True  # metrics.csv, or else whatever is logged
        self.defined: set[str] = set()  # metrics whose axis the service knows

    def connect(self, arguments: dict[str, Any], settings: dict[str, Any]) -> None:
        """Start online if there is a key, else or failing that offline, failing that not at all; at the first call.

        Args:
            arguments: of `wandb.init`, with ``dir``; those that are None are left to wandb. Gets the run's ``id``.
            settings: of `wandb.Settings`, which replace ours.
        """
        if self.is_tried or self.lost or self.run is not None:
            return
        self.is_tried = True
        # wandb's reports of its own errors would fail, and say so, where the service does.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        refused = ""
        # Exceptions are the service's, the network's, the disk's, and what libraries make of them.
        try:
            arguments["id"] = arguments.get("id") or _kept_id(Path(arguments["dir"]) / ID_FILE)
            # wandb would take from there where the key is sent, and through whom: a folder may come with one.
            sent = [path for path in SENT_SETTINGS if path.exists()]
            if sent and self.mode != "offline":
                refused, self.mode = f"{sent[0]} could send your key elsewhere: move it to ~/.config/wandb", "offline"
            self.mode = self.mode or ("online" if _has_key() else "offline")
            if self.mode == "online":
                try:
                    self.run = self._start(arguments, settings, "online")
                    self.known = self.run.starting_step
                except Exception as error:
                    refused, self.mode = shown(error), "offline"
                    _release()
            if self.mode == "offline":
                self.run = self._start(arguments, settings, "offline")
        except Exception as error:
            self.run, self.lost = None, True
            self.tell(f"cannot be used ({refused or shown(error)}); the local files are complete")
            return
        if refused:
            self.tell(f"cannot be reached ({refused}); going on offline")
            # This warning was about the service; a failure to write the offline file gets its own.
            self.told = False
        self.listening = True
        if self.mode == "online":
            run: Any = self.run
            self.say(f"{SERVICE}: {run.url}")

    def _start(self, arguments: dict[str, Any], settings: dict[str, Any], mode: Any) -> Any:
        import wandb

        wandb.setup()
        wandb.termsetup(wandb.Settings(silent=True), self)
        ours = {
            "finish_timeout_raises": True,
            "silent": True,
            "console": "off",
            # Remotes of checkouts may hold passwords; versions and commit are in results.json.
            "disable_git": True,
            "x_save_requirements": False,
            # In a sweep, never the run of the job before.
            "reinit": "create_new",
        }
        # Offline files continue nothing.
        but = {"resume"} if mode == "offline" else set()
        given = {name: value for name, value in arguments.items() if value is not None and name not in but}
        return wandb.init(mode=mode, settings=wandb.Settings(**{**ours, **settings}), **given)

    def attempt(self, action: Callable[[], object], *, but: str | None = None) -> None:
        """Do it, unless something vital has failed before; vital is what has no name `but` is missing alone."""
        if self.lost:
            return
        try:
            action()
        except Exception as error:  # whatever the service does, the training and its local files go on
            self.lost = but is None
            missing = f"did not take {but}" if but else "stopped taking values"
            self.tell(f"{missing} ({type(error).__name__}: {shown(error)}); the local files are complete")

    def tell(self, reason: str) -> None:
        """One warning a run."""
        if not self.told:
            self.told = True
            self.say(f"{SERVICE} {reason}", style="yellow")

    def say(self, line: str, style: str = "") -> None:
        """One line, whatever is in it."""
        self.console.print(Text(line, style=style), soft_wrap=True)

    def send(self, number: int, values: Mapping[str, Any], *, commit: bool = True) -> None:
        """Record `number` of the run, unless the service has it from an earlier session."""
        if number >= self.known:
            self.run.log(dict(values), step=number, commit=commit)

    def finish(self, exit_code: int) -> None:
        """Close the run; it ends whatever happens, and what comes after goes nowhere."""
        if exit_code > SIGNALLED:
            self.attempt(self.run.mark_preempting)
        # Also where values were lost: the next job of a sweep must not meet an open run.
        lost, self.lost = self.lost, False
        self.attempt(lambda: self.run.finish(exit_code=exit_code))
        self.listening = False
        folder = Path(self.run.settings.sync_dir)
        if self.lost:
            _release()
        elif not (lost or self.told):
            self.attempt(lambda: _set_aside(folder, self.run.id))
        if self.mode == "offline" or self.told:
            state = "is offline" if self.mode == "offline" else "is not complete"
            self.say(f"{SERVICE} {state}; to upload: wandb sync {os.path.relpath(folder)}")
        self.lost = self.ended = True

    def info(self, message: str) -> None:
        """Nothing that anybody waits for."""

    def warning(self, message: str) -> None:
        """Something did not arrive."""
        if self.listening:
            self.tell(f"did not take everything ({shown(message)}); the local files are complete")

    error = warning


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


def _kept_id(path: Path) -> str:
    """The run's id, kept in `path`; a new one where there is none. It becomes part of a folder's name."""
    kept = path.read_text(errors="replace").strip() if path.is_file() and not path.is_symlink() else ""
    if not re.fullmatch(r"\w{4,64}", kept, re.ASCII):
        kept = secrets.token_hex(4)
        # Renamed into place: a link that came with the folder is replaced, not followed.
        write_text(path, kept + "\n")
    return kept


def _set_aside(folder: Path, run_id: str) -> None:
    """Move the run's other offline folders, whose rows are all in `folder` or uploaded, out of the way."""
    # Of two that began in one second, the later has a number behind the id.
    for other in set(folder.parent.glob(f"offline-run-*-{run_id}*")) - {folder}:
        (folder.parent / SUPERSEDED).mkdir(exist_ok=True)
        os.replace(other, folder.parent / SUPERSEDED / other.name)


def _release() -> None:
    """End wandb's background process, which may hold the id of a run that did not start, or be dead already."""
    import wandb

    with suppress(Exception):  # of a process that is gone; the next run starts another one
        wandb.teardown()
