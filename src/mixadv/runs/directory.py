"""A run directory from its lock to DONE: claimed, continued, finished, and never overwritten."""

import errno
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mixadv import records, results
from mixadv.console import begin_log, say
from mixadv.errors import UserError
from mixadv.files import remove_leftovers, write_arrays, write_text
from mixadv.runs.locks import LOCK, DirectoryLock, Held, holder
from mixadv.setting_keys import comparable, flat_settings, is_indifferent, settings_read
from mixadv.shipped import refuse_aliases

# Folders of a run into which files are written; leftovers of killed processes are removed from them.
FOLDERS = (
    "checkpoints",
    "evaluation",
    "mixture",
    "baseline",
    "baseline/checkpoints",
    "baseline/evaluation",
    "baseline/mixture",
)


class State(Enum):
    """What a directory holds."""

    NEW = "new"
    UNFINISHED = "unfinished"
    DONE = "done"


@contextmanager
def claimed(run_dir: Path, cfg: DictConfig, content: str = "") -> Iterator[tuple[Path, State]]:
    """Lock a run directory; yields the directory to work in and its state.

    A finished run that measured other content than `content` (see `seal`) is NEW for this command, and `write_config`
    removes its results. With ``resume=never`` a directory that holds a run stays as it is, and a new one is made beside
    it: NAME.2, NAME.3, ... A finished run is not locked, because nobody writes there. An exception inside leaves FAILED
    with its reason, or no directory if nothing was written.

    Raises:
        UserError: the directory holds a run with other settings, or cannot be written.
        Held: another process works there.
    """
    anew = cfg.resume == "never"
    if not anew and _state(run_dir, cfg) is State.DONE and is_current(run_dir, content):
        # A process that was killed after DONE leaves its lock file.
        with suppress(OSError):
            if holder(run_dir) is None:
                (run_dir / LOCK).unlink(missing_ok=True)
        yield run_dir, State.DONE
        return
    try:
        lock = _fresh(run_dir) if anew else DirectoryLock(run_dir).acquired()
    except OSError as error:
        raise UserError(
            f"cannot write to {run_dir}: {error.strerror}. Choose another place with hydra.run.dir=DIR"
        ) from None
    run_dir = lock.folder
    try:
        for folder in (run_dir, *(run_dir / name for name in FOLDERS)):
            remove_leftovers(folder)
        # Read again: another process may have worked here before this one got the lock.
        state = _state(run_dir, cfg)
        if state is State.DONE and not is_current(run_dir, content):
            say(f"{os.path.relpath(run_dir)}: its mixture, members or images have changed since; measuring anew")
            state = State.NEW
        try:
            yield run_dir, state
        except Exception as error:
            if _holds_something(run_dir):
                # If the disk is full, the first error is the one to report.
                with suppress(OSError):
                    write_text(run_dir / "FAILED", one_line(error) + "\n")
            raise
    finally:
        lock.release()
        _remove_if_empty(run_dir)


def _state(run_dir: Path, cfg: DictConfig) -> State:
    saved = run_dir / "config.yaml"
    if not saved.exists():
        return State.NEW
    try:
        difference = _difference(read_config(saved), cfg)
    except ValueError as error:
        raise UserError(f"{saved} cannot be read ({error}): restore it, or start anew with resume=never") from error
    if difference:
        raise UserError(
            f"{run_dir} holds a run with other settings ({difference}): choose another name=..., "
            "or resume=never to start anew beside it"
        )
    return State.DONE if (run_dir / "DONE").exists() else State.UNFINISHED


def read_config(path: Path) -> dict[str, Any]:
    """A config.yaml as plain containers. Interpolations are not resolved: the file may come from somebody else.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        refuse_aliases(path)
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise
    # OmegaConf.load raises OSError for a file that holds a bare text or number.
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(next(iter(str(error).splitlines()), type(error).__name__)) from error
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _fresh(run_dir: Path) -> DirectoryLock:
    """Lock the first of NAME, NAME.2, NAME.3, ... that holds no run and that no other process has locked."""
    for number in itertools.count(1):
        path = run_dir if number == 1 else run_dir.with_name(f"{run_dir.name}.{number}")
        if number > 1:
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
        elif (path / "config.yaml").exists():
            continue
        try:
            lock = DirectoryLock(path).acquired()
        except Held:
            continue
        if not (path / "config.yaml").exists():
            return lock
        lock.release()
    raise AssertionError("unreachable")


def _holds_something(run_dir: Path) -> bool:
    return run_dir.is_dir() and any(entry.name != LOCK for entry in run_dir.iterdir())


def _remove_if_empty(run_dir: Path) -> None:
    if run_dir.is_dir() and not any(run_dir.iterdir()) and run_dir.absolute() != Path.cwd():
        try:
            run_dir.rmdir()
        except OSError as error:
            # Another process has begun to write there.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise


def one_line(error: Exception) -> str:
    """An error in one line: the message of a `UserError`; for other errors the type as well."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def leave_reason(run_dir: Path, error: Exception) -> None:
    """Write FAILED for a job that failed before it claimed its directory, so that the table of its sweep lists it.

    Nothing is written if the directory holds a run or is locked, or if the disk is full: the sweep goes on and prints
    the reason at its end.
    """
    with suppress(Held, OSError), DirectoryLock(run_dir):
        if not (run_dir / "config.yaml").exists():
            write_text(run_dir / "FAILED", one_line(error) + "\n")


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """The settings that a run records: those that its task reads, resolved, as plain containers."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    return settings_read(plain)


def digest(cfg: DictConfig) -> str:
    """SHA-256 of the settings that change what is computed."""
    flat = flat_settings(recorded(cfg))
    kept = {key: comparable(value) for key, value in flat.items() if not is_indifferent(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def seal(run_dir: Path, settings: str, content: str = "") -> None:
    """Write two digests into DONE.

    Args:
        settings: `digest` of the settings as the command gave them, without those that files decide.
        content: digests of what was measured, separated by ":", each "" where unknown; "" for tasks that measure what
            they make themselves.
    """
    write_text(run_dir / "DONE", f"{settings}\n{content}\n" if content else f"{settings}\n")


def is_sealed(run_dir: Path, settings: str) -> bool:
    """Whether a finished run of these settings is there; the files that it was made from are not read."""
    return _done(run_dir)[0] == settings


def is_current(run_dir: Path, content: str) -> bool:
    """Whether a finished run is there that measured this content (see `seal`), as far as both are known."""
    pairs = zip(_done(run_dir)[1].split(":"), content.split(":"), strict=False)
    return (run_dir / "DONE").is_file() and all(old == new or not old or not new for old, new in pairs)


def _done(run_dir: Path) -> tuple[str, str]:
    """The digests in DONE; "" where there are none."""
    done = run_dir / "DONE"
    lines = done.read_text(encoding="utf-8").split() if done.is_file() else []
    return (lines[0] if lines else ""), (lines[1] if len(lines) > 1 else "")


def _difference(saved: Any, cfg: DictConfig) -> str:
    old, new = flat_settings(settings_read(saved)), flat_settings(recorded(cfg))
    keys = [key for key in {**old, **new} if not is_indifferent(key)]
    differing = [key for key in keys if comparable(old.get(key)) != comparable(new.get(key))]
    changed = [f"{key}: {old.get(key)} there, {new.get(key)} here" for key in differing]
    return "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    """Write config.yaml, resolved; remove the results of other content and FAILED of an earlier attempt; begin
    mixadv.log."""
    if (run_dir / "DONE").exists():
        for name in ("DONE", results.FILE, records.RECORDS, records.EXAMPLES):
            (run_dir / name).unlink(missing_ok=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(recorded(cfg))))
    (run_dir / "FAILED").unlink(missing_ok=True)
    begin_log(run_dir)


def write_results(
    run_dir: Path, found: results.Results, arrays: dict[str, np.ndarray], arrays_file: str = records.RECORDS
) -> None:
    """Write the arrays, then results.json, each whole or not at all."""
    write_arrays(run_dir / arrays_file, arrays)
    results.write(run_dir / results.FILE, found)


def read_results(run_dir: Path) -> results.Results | None:
    """The results of the run, or None while there are none. Damaged entries are unknown; the report names them.

    Raises:
        ValueError: results.json is no JSON object.
    """
    try:
        return results.read(run_dir / results.FILE)[0]
    except FileNotFoundError:
        return None


def finished_results(run_dir: Path) -> results.Results:
    """The results of a run that is marked as done.

    Raises:
        UserError: they are missing or damaged.
    """
    with suppress(ValueError):
        if (found := read_results(run_dir)) is not None:
            return found
    raise UserError(
        f"{run_dir} is marked as done, but its results.json is missing or damaged: restore it, or remove DONE and "
        "results.json there and repeat the command, which measures anew"
    )


def measured(found: results.Results | None, metric: str) -> float:
    """An accuracy of a run, in [0, 1]; nan if it was not measured.

    Args:
        found: the results of the run; None if there are none.
        metric: ``test/robust_accuracy``, the expected accuracy under attack on the test images; or what selected the
            best epoch, as ``val/robust_accuracy``.
    """
    if found is None:
        return math.nan
    value = {"test/robust_accuracy": found.robust.value, **found.validation}.get(metric)
    return math.nan if value is None else value


def mark_done(run_dir: Path) -> None:
    """Write DONE: from now on the same command shows the run."""
    (run_dir / "FAILED").unlink(missing_ok=True)
    (run_dir / "DONE").touch()
