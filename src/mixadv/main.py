"""The command line: composes the configuration, checks it, runs one task or a sweep of them.

Refusals are one message on standard error without a traceback; a defect of ours keeps its traceback. Nothing
heavy is imported before the checks have passed.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from mixadv import config
from mixadv.errors import UserError
from mixadv.shipped import config_dir

# The shell's own code for a program ended by Ctrl-C.
INTERRUPTED = 130

PATH_KEYS = ("mixture", "runs", "data.root")

_failed: list[str] = []


def _refuse(message: str) -> None:
    sys.stdout.flush()
    print(f"mixadv: {message}", file=sys.stderr, flush=True)


def _composition_message(error: Exception) -> str:
    """Hydra and OmegaConf spread a refusal over exceptions and lines; keep what a reader can act on."""
    from hydra.core.override_parser.overrides_parser import OverrideParseException
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice} is unknown: choose one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r} as KEY=VALUE or GROUP=CHOICE; quote values that have spaces or commas"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
        return f"{key}: there is no such key; `--cfg job` shows all of them, --help the groups"
    # The lines after the first name OmegaConf's internals.
    reason = f": {str(error.__cause__).splitlines()[0]}" if error.__cause__ is not None else ""
    return lines[0].removeprefix("Error merging override ") + reason


def _quoted(argument: str) -> str:
    """Quote a path that exists: run directories are called `eps=8-255,L=3`, which Hydra's grammar would take apart."""
    key, _, value = argument.partition("=")
    if key in PATH_KEYS and _needs_quotes(value) and Path(value).exists():
        return f"{key}='{value}'"
    if key == "members" and value.startswith("[") and value.endswith("]"):
        return f"members=[{','.join(_quoted_members(value[1:-1]))}]"
    return argument


def _needs_quotes(value: str) -> bool:
    return bool(set(value) & set("=,()[]{}: ")) and not set(value) & set("'\"")


def _quoted_members(text: str) -> Iterator[str]:
    """The parts of `text` between commas; as many of them together as make up a path that exists."""
    parts = text.split(",")
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if Path(",".join(parts[:n]).strip()).exists()), 1)
        member = ",".join(parts[:count]).strip()
        parts = parts[count:]
        yield f"'{member}'" if _needs_quotes(member) else member


def _job(cfg: DictConfig) -> None:
    """One task in its run directory; Hydra calls this once for a run, many times for a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    sweep = hydra_cfg.mode == RunMode.MULTIRUN
    try:
        config.check(cfg)
        from mixadv.tasks import run_task

        run_task(cfg, run_dir=run_dir, overrides=overrides, sweep=run_dir.parent.name if sweep else None)
    except UserError as error:
        _refuse(str(error))
        _remove_if_empty(run_dir)
        if not sweep:
            sys.exit(1)
        _failed.append(f"{run_dir.name}: {error}")
        raise
    except Exception as error:
        _remove_if_empty(run_dir)
        if sweep:
            # Hydra would show only the first failure, and that at the end.
            traceback.print_exc()
            _failed.append(f"{run_dir.name}: {type(error).__name__}: {error}")
        raise


def _remove_if_empty(run_dir: Path) -> None:
    """Hydra makes the directory before anything is checked."""
    if run_dir.is_dir() and run_dir != Path.cwd() and not any(run_dir.iterdir()):
        run_dir.rmdir()


def _exit_with(message: str) -> NoReturn:
    _refuse(message)
    sys.exit(1)


def main() -> None:
    """Entry point of ``python run.py`` and of the ``mixadv`` command."""
    from dotenv import dotenv_values

    for key, value in dotenv_values(Path.cwd() / ".env").items():
        # A line left blank means unset; the shell goes first.
        if value:
            os.environ.setdefault(key, value)
    # Exceptions reach this function whole, instead of Hydra's shortened print-out.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    config.register()
    _failed.clear()
    sys.argv[1:] = map(_quoted, sys.argv[1:])

    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")(_job)()
    except UserError as error:
        # Jobs have reported their own refusals already.
        if not _failed:
            _exit_with(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _exit_with(_composition_message(error))
    except OSError as error:
        if _failed or error.filename is None:
            raise
        _exit_with(
            f"cannot write {error.filename}: {error.strerror}. "
            "Choose a writable place with hydra.run.dir=DIR (a sweep: hydra.sweep.dir=DIR)"
        )
    except KeyboardInterrupt:
        _refuse("interrupted; the same command goes on with what it has")
        sys.exit(INTERRUPTED)
    if _failed:
        _exit_with(f"{len(_failed)} job(s) of the sweep failed:\n" + "\n".join(f"  {line}" for line in _failed))


if __name__ == "__main__":
    main()
