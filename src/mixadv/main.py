"""The command line: composes the configuration, checks it, runs one task or a sweep of them.

Refusals are one message on standard error without a traceback; a defect of ours keeps its traceback. Nothing
heavy is imported before the checks have passed.
"""

import errno
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig

from mixadv import config, launchers
from mixadv.errors import UserError
from mixadv.redaction import printable
from mixadv.shipped import config_dir
from mixadv.signals import Stopped

if TYPE_CHECKING:
    from mixadv.tasks.sweep import Outcome, Sweep

# A disk, or somebody's share of it.
FULL = (errno.ENOSPC, errno.EDQUOT)

# The shell's own code for a program ended by Ctrl-C.
INTERRUPTED = 130

# All that is taken from .env: a folder may come with one, and other names choose the code that this program, or one
# that it starts, would run, or where the keys of the shell are sent.
FROM_DOTENV = ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "DATA_DIR")

PATH_KEYS = ("mixture", "runs", "data.root")

# What raises where the processes of jobs end, and not the jobs themselves.
LAUNCHERS = ("joblib.", "submitit.")
# The launchers that Hydra gets from elsewhere, and the extra that installs them.
EXTRAS = {"joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm"}


def _refuse(message: str) -> None:
    sys.stdout.flush()
    # Names and reasons may come from files of others, and are not to give orders to the terminal.
    shown = printable(message, keep="\n")
    print(f"mixadv: {shown}", file=sys.stderr, flush=True)


def _composition_message(error: Exception) -> str:
    """Hydra and OmegaConf spread a refusal over exceptions and lines; keep what a reader can act on."""
    from hydra.core.override_parser.overrides_parser import OverrideParseException
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and choice in EXTRAS:
            extra = EXTRAS[choice]
            return f"launch={extra} needs a launcher that is not installed: pip install 'mixadv[{extra}]'"
        return f"{group}={choice} is unknown: choose one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r} as KEY=VALUE or GROUP=CHOICE; quote values that have spaces or commas"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines[0].startswith("Ambiguous value"):
        return f"{lines[0]}: give one value, or add -m to sweep over all of them"
    if lines[0].startswith("Could not override"):
        key = lines[0].split("'")[1]
        return f"{key}: there is no such key; `--cfg job` shows all of them, --help the groups"
    # The lines after the first name OmegaConf's internals.
    reason = f": {str(error.__cause__).splitlines()[0]}" if error.__cause__ is not None else ""
    return lines[0].removeprefix("Error merging override ") + reason


def _quoted(argument: str) -> str:
    """Quote a path that exists: run directories are called `eps=8-255,L=3`, which Hydra's grammar would take apart."""
    key, _, value = argument.partition("=")
    if set(value) & set("'\""):
        # Whoever quotes any of it quotes all that needs it.
        return argument
    if key in PATH_KEYS and _needs_quotes(value) and Path(value).exists():
        return f"{key}='{value}'"
    if key == "members" and value.startswith("[") and value.endswith("]"):
        # A sweep has several lists.
        lists = (",".join(_quoted_members(text)) for text in value[1:-1].split("],["))
        return "members=" + ",".join(f"[{text}]" for text in lists)
    return argument


def _needs_quotes(value: str) -> bool:
    return bool(set(value) & set("=,()[]{}: "))


def _quoted_members(text: str) -> Iterator[str]:
    """The parts of `text` between commas; as many of them together as make up a path that exists."""
    parts = text.split(",")
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if Path(",".join(parts[:n]).strip()).exists()), 1)
        member = ",".join(parts[:count]).strip()
        parts = parts[count:]
        yield f"'{member}'" if _needs_quotes(member) else member


def _job(cfg: DictConfig) -> Any:
    """One task in its run directory; Hydra calls this once for a run, many times for a sweep.

    A job of a sweep returns its outcome and does not raise: Hydra would end the sweep.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    if hydra_cfg.mode == RunMode.MULTIRUN:
        return _job_of_sweep(cfg, run_dir, overrides)
    try:
        launch = hydra_cfg.runtime.choices.get("launch")
        if launch != "serial":
            raise UserError(f"launch={launch} is for sweeps: add -m, which also takes a single job")
        _run(cfg, run_dir, overrides, sweep=None)
    except UserError as error:
        _refuse(str(error))
        _remove_if_empty(run_dir)
        sys.exit(1)
    except Exception:
        _remove_if_empty(run_dir)
        raise
    return None


def _run(cfg: DictConfig, run_dir: Path, overrides: list[str], sweep: str | None) -> bool:
    config.check(cfg)
    from mixadv.tasks import run_task

    try:
        return run_task(cfg, run_dir=run_dir, overrides=overrides, sweep=sweep)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"the disk of {run_dir} is full: free some space, and the same command goes on with what it has; or choose "
            "another place with hydra.run.dir=DIR"
        ) from error


def _job_of_sweep(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> "Outcome":
    from mixadv.locks import Held
    from mixadv.tasks.run_directory import leave_reason, one_line
    from mixadv.tasks.sweep import BEFORE, DONE, ELSEWHERE, FAILED, Outcome

    name = run_dir.name
    try:
        return Outcome(name, DONE if _run(cfg, run_dir, overrides, sweep=run_dir.parent.name) else BEFORE)
    except Held as error:
        _refuse(f"{name}: passed over, {error}")
        return Outcome(name, ELSEWHERE, error.who)
    except Exception as error:
        if isinstance(error, UserError):
            _refuse(f"{name}: {error}")
        else:
            traceback.print_exc()
        if cfg.task != "report":
            leave_reason(run_dir, error)
        return Outcome(name, FAILED, one_line(error))


def _remove_if_empty(run_dir: Path) -> None:
    """Hydra makes the directory before anything is checked."""
    if run_dir.is_dir() and run_dir != Path.cwd() and not any(run_dir.iterdir()):
        run_dir.rmdir()


def _exit_with(message: str) -> NoReturn:
    _refuse(message)
    sys.exit(1)


def _take_dotenv(path: Path) -> None:
    """Set what `path` says of `FROM_DOTENV`; a line left blank means unset, and the shell goes first."""
    from dotenv import dotenv_values

    try:
        values = dotenv_values(path, interpolate=False)
        for key in FROM_DOTENV:
            if value := values.get(key):
                os.environ.setdefault(key, value)
    except (OSError, ValueError) as error:
        _exit_with(f"{path} cannot be read ({type(error).__name__}): write lines of NAME=VALUE, or remove it")


def main() -> None:
    """Entry point of ``python run.py`` and of the ``mixadv`` command."""
    _take_dotenv(Path.cwd() / ".env")
    # Exceptions reach this function whole, instead of Hydra's shortened print-out.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    config.register()
    sys.argv[1:] = map(_quoted, sys.argv[1:])

    import hydra

    from mixadv.tasks.sweep import Sweep

    Sweep.current = None
    try:
        with _one_store():
            _refusing(hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")(_job))
        if Sweep.current is not None:
            _conclude(Sweep.current)
    finally:
        if Sweep.current is not None:
            Sweep.current.close()


@contextmanager
def _one_store() -> Iterator[None]:
    """For ``--help`` Hydra copies all that it has in store once for every group that it lists, a second's work.

    It reads the copies alone, so they may be the store itself.
    """
    if not {"--help", "-h"} & set(sys.argv[1:]):
        yield
        return
    from hydra.core.config_store import ConfigStore

    setattr(ConfigStore, "__deepcopy__", lambda store, memo: store)  # noqa: B010
    try:
        yield
    finally:
        delattr(ConfigStore, "__deepcopy__")


def _refusing(application: Callable[[], Any]) -> None:
    """Run Hydra's application; what the user has to fix ends in one message and exit code 1."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        application()
    except UserError as error:
        _exit_with(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _exit_with(_composition_message(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit_with(
            f"cannot write {error.filename}: {error.strerror}. "
            "Choose a writable place with hydra.run.dir=DIR (a sweep: hydra.sweep.dir=DIR)"
        )
    except ValueError as error:
        # Hydra's own, for GROUP=null or GROUP=3.
        if not str(error).startswith("Config group override must be"):
            raise
        _exit_with("a group takes a name: write GROUP=CHOICE, as loss=at; --help lists the groups")
    except KeyboardInterrupt:
        _refuse("interrupted; the same command goes on with what it has")
        sys.exit(INTERRUPTED)
    except Stopped as stop:
        if launchers.is_helper():
            # The process that started this one stops as well, and says so. A failure of ours would kill it first.
            sys.exit(0)
        _refuse(f"stopped by {stop}; the same command goes on with what it has")
        sys.exit(stop.exit_code)
    except Exception as error:
        # A process that was killed, or a job that the cluster has cancelled: what became of the others is still told.
        if not type(error).__module__.startswith(LAUNCHERS) and not _lacks_slurm():
            raise
        _refuse(f"the launcher gave up, {type(error).__name__}: {str(error).strip().splitlines()[0]}")


def _lacks_slurm() -> bool:
    from mixadv.tasks.sweep import Sweep

    on_slurm = Sweep.current is not None and Sweep.current.launcher.endswith(".SlurmLauncher")
    return on_slurm and shutil.which("srun") is None


def _conclude(sweep: "Sweep") -> None:
    """Say what became of the jobs; exit code 1 if not all of them are done or in somebody's hands."""
    from mixadv.tasks.sweep import complaint, summary

    assert sweep.directory is not None
    outcomes = sweep.outcomes()
    print(summary(sweep.directory, outcomes), flush=True)
    if message := complaint(outcomes):
        _exit_with(message)


if __name__ == "__main__":
    main()
