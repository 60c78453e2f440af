"""The connection to Weights & Biases. It may fail at any time; the console then shows one line, and the run goes on."""

import configparser
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
# Folder for offline folders that a later session replaces; `wandb sync` without arguments ignores it.
SUPERSEDED = "superseded"
# Exit codes above this one mean that a signal ended the program.
SIGNALLED = 128
# Files from which wandb would read settings, relative to the working directory.
LOCAL_SETTINGS = (Path("wandb/settings"), Path(".wandb/settings"))


class Link:
    """The connection shared by the loggers of a mixture and its baseline. The console shows only the first failure.

    The object also serves as wandb's terminal logger (`info`, `warning`, `error`): wandb reports failures of its
    background process only there.

    Args:
        console: for the messages.
        mode: "online", "offline", "disabled", or None: online if there is a key.

    Attributes:
        run: the `wandb.Run`, or None.
        known: records with a smaller number are on the server already.
        warned: whether a failure was reported.
        lost: whether sending has ended for good, by a failure or by `finish`.
        ended: whether `finish` was called.
        follows: whether the rows come from metrics.csv, see `WandbLogger`.
        defined: metrics whose x-axis is set.
    """

    def __init__(self, console: Console, mode: str | None) -> None:
        self.console, self.mode = console, mode
        self.run: Any = None
        self.known = 0
        self.warned = False
        self.lost = mode == "disabled"
        self.ended = False
        self.follows = True
        self.defined: set[str] = set()
        self._listens = False  # while connecting and finishing, wandb raises what it also logs

    def connect(self, arguments: dict[str, Any], settings: dict[str, Any]) -> None:
        """Start a run at the first call: online if there is a key, else (or if that fails) offline, else not at all.

        Args:
            arguments: of `wandb.init`, with ``dir``; None leaves an argument to wandb. The run's ``id`` is added.
            settings: arguments of `wandb.Settings` that override ours.
        """
        if self.lost or self.run is not None:
            return
        # Without the service, wandb's reports of its own errors would fail too, and print a message.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        refused = ""
        # The service, the network, the disk and several libraries raise exceptions of any type.
        try:
            # A folder from somebody else may contain such a file, and it names the server that gets the key.
            found = [path for path in LOCAL_SETTINGS if path.exists()]
            if self.mode is None and any(map(_switches_off, found)):
                self.mode, self.lost = "disabled", True
                return
            arguments["id"] = arguments.get("id") or _kept_id(Path(arguments["dir"]) / ID_FILE, _agents_id())
            if found and self.mode != "offline":
                refused, self.mode = f"{found[0]} could send your key elsewhere: move it to ~/.config/wandb", "offline"
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
            self.warn(f"cannot be used ({refused or shown(error)}); the local files are complete")
            return
        if refused:
            self.warn(f"cannot be reached ({refused}); continuing offline")
            # A later failure to write the offline file gets a warning of its own.
            self.warned = False
        self._listens = True
        if self.mode == "online":
            run: Any = self.run
            self.print(f"{SERVICE}: {run.url}")

    def _start(self, arguments: dict[str, Any], settings: dict[str, Any], mode: Any) -> Any:
        import wandb

        wandb.setup()
        wandb.termsetup(wandb.Settings(silent=True), self)
        ours = {
            "finish_timeout_raises": True,
            "silent": True,
            "console": "off",
            # URLs of git remotes may contain passwords; results.json has the commit and the versions.
            "disable_git": True,
            "x_save_requirements": False,
            # Never continue the run of an earlier job of a sweep in this process.
            "reinit": "create_new",
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        if mode == "offline":
            # An offline file cannot continue another one.
            given.pop("resume", None)
        return wandb.init(mode=mode, settings=wandb.Settings(**{**ours, **settings}), **given)

    def attempt(self, action: Callable[[], object], *, optional: str | None = None) -> None:
        """Call `action`; if it fails, print a warning instead of raising.

        Args:
            action: sends something.
            optional: what it sends, if the rows can go on without it; else a failure ends the sending.
        """
        if self.lost:
            return
        try:
            action()
        except Exception as error:  # no failure of the service may end the training
            self.lost = optional is None
            problem = f"did not accept {optional}" if optional else "stopped accepting values"
            self.warn(f"{problem} ({type(error).__name__}: {shown(error)}); the local files are complete")

    def warn(self, reason: str) -> None:
        """Print a warning, unless there was one."""
        if not self.warned:
            self.warned = True
            self.print(f"{SERVICE} {reason}", style="yellow")

    def print(self, line: str, style: str = "") -> None:
        """Print one line without interpreting markup."""
        self.console.print(Text(line, style=style), soft_wrap=True)

    def send(self, number: int, values: Mapping[str, Any], *, commit: bool = True) -> None:
        """Send record `number` of the run, unless the server has it from an earlier session."""
        if number >= self.known:
            self.run.log(dict(values), step=number, commit=commit)

    def finish(self, exit_code: int) -> None:
        """Close the run, also after failures; later calls send nothing."""
        if exit_code > SIGNALLED:
            self.attempt(self.run.mark_preempting)
        # Close it also after a failure: the next job of a sweep must not find an open run.
        lost, self.lost = self.lost, False
        self.attempt(lambda: self.run.finish(exit_code=exit_code))
        self._listens = False
        folder = Path(self.run.settings.sync_dir)
        if self.lost:
            _release()
        elif not (lost or self.warned):
            self.attempt(lambda: _set_aside(folder, self.run.id))
        if self.mode == "offline" or self.warned:
            state = "is offline" if self.mode == "offline" else "is not complete"
            self.print(f"{SERVICE} {state}; to upload: wandb sync {os.path.relpath(folder)}")
        self.lost = self.ended = True

    def info(self, message: str) -> None:
        """Ignore wandb's information."""

    def warning(self, message: str) -> None:
        """Print the first warning or error of wandb."""
        if self._listens:
            self.warn(f"did not accept everything ({shown(message)}); the local files are complete")

    error = warning


def _has_key() -> bool:
    """Whether the environment or `wandb login` (in .netrc) provides a key."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).hostname
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _agents_id() -> str | None:
    """The run's id if an agent of a Weights & Biases sweep has started this process: wandb takes no other."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


def _switches_off(path: Path) -> bool:
    """Whether ``wandb disabled`` has written this file of settings; nothing else is taken from it."""
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read_string(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, configparser.Error):
        return False
    return settings.get("default", "mode", fallback="") == "disabled"


def _kept_id(path: Path, given: str | None = None) -> str:
    """The run's id: `given`, else from the file `path`, else a new one. It is written there, and part of a folder's
    name."""
    kept = (
        path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() and not path.is_symlink() else ""
    )
    if given and re.fullmatch(r"[\w-]{1,64}", given, re.ASCII):
        write_text(path, given + "\n")
        return given
    if not re.fullmatch(r"\w{4,64}", kept, re.ASCII):
        kept = secrets.token_hex(4)
        # The file is renamed into place, so a symbolic link is replaced, not followed.
        write_text(path, kept + "\n")
    return kept


def _set_aside(folder: Path, run_id: str) -> None:
    """Move the run's earlier offline folders away: `folder` or the server has all their rows."""
    # wandb appends a number to the id if two sessions begin in the same second.
    for other in set(folder.parent.glob(f"offline-run-*-{run_id}*")) - {folder}:
        (folder.parent / SUPERSEDED).mkdir(exist_ok=True)
        os.replace(other, folder.parent / SUPERSEDED / other.name)


def _release() -> None:
    """End wandb's background process, which may be dead, or hold the id of a run that did not start."""
    import wandb

    with suppress(Exception):  # the process may be dead; the next run starts a new one
        wandb.teardown()
