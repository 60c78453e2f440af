"""The command line: composes the configuration, checks it, runs one task or a sweep of them.

Refusals are one message on standard error without a traceback; a defect of ours keeps its traceback. Nothing
heavy is imported before the checks have passed.
"""

import errno
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig

import mixadv
from mixadv import config
from mixadv.composition import composition_message
from mixadv.errors import UserError
from mixadv.redaction import printable
from mixadv.runs.processes import is_helper
from mixadv.shipped import config_dir
from mixadv.signals import Stopped
from mixadv.unknown_keys import misplaced_word

if TYPE_CHECKING:
    from mixadv.runs.sweep import Sweep
    from mixadv.tasks import Ended

# A disk, or somebody's share of it.
FULL = (errno.ENOSPC, errno.EDQUOT)

# The shell's own code for a program ended by Ctrl-C.
INTERRUPTED = 130

# All that is taken from .env: a folder may come with one, and other names choose the code that this program, or one
# that it starts, would run, or where the keys of the shell are sent.
FROM_DOTENV = ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "DATA_DIR")

PATH_KEYS = ("mixture", "runs", "data.root")

# What --version tells of: its short name -> the distribution.
VERSIONS = {"hydra": "hydra-core", "lightning": "pytorch-lightning", "torch": "torch"}

# What raises where the processes of jobs end, and not the jobs themselves.
LAUNCHERS = ("joblib.", "submitit.")


def _refuse(message: str) -> None:
    sys.stdout.flush()
    # Names and reasons may come from files of others, and are not to give orders to the terminal.
    shown = printable(message, keep="\n")
    print(f"mixadv: {shown}", file=sys.stderr, flush=True)


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


def _job(cfg: DictConfig) -> float:
    """One task in its run directory; Hydra calls this once for a run, many times for a sweep.

    A job of a sweep leaves its outcome; it raises only for sweepers that search: Hydra's own would end the sweep.

    Returns:
        The robust accuracy in [0, 1], for Hydra's sweepers; nan where the job failed or measures none.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from mixadv.console import SAID, end_log

    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    try:
        if hydra_cfg.mode == RunMode.MULTIRUN:
            return _job_of_sweep(cfg, run_dir, overrides, hydra_cfg.job.num)
        return _single_run(cfg, run_dir, overrides, hydra_cfg.runtime.choices.get("launch"))
    except KeyboardInterrupt:
        SAID.warning("interrupted")
        raise
    except Stopped as stop:
        SAID.warning("stopped by %s", stop)
        raise
    finally:
        end_log()


def _single_run(cfg: DictConfig, run_dir: Path, overrides: list[str], launch: str | None) -> float:
    try:
        if launch != "serial":
            raise UserError(f"launch={launch} is for sweeps: add -m, which also takes a single job")
        return _run(cfg, run_dir, overrides, sweep=None).metric
    except UserError as error:
        _refuse(str(error))
        _log_failure(run_dir, error)
        _remove_if_empty(run_dir)
        sys.exit(1)
    except Exception as error:
        _log_failure(run_dir, error)
        _remove_if_empty(run_dir)
        raise


def _run(cfg: DictConfig, run_dir: Path, overrides: list[str], sweep: str | None) -> "Ended":
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


def _job_of_sweep(cfg: DictConfig, run_dir: Path, overrides: list[str], number: int) -> float:
    from mixadv.runs.directory import leave_reason, one_line
    from mixadv.runs.locks import Held
    from mixadv.runs.sweep import BEFORE, DONE, ELSEWHERE, FAILED, Outcome, Sweep

    name, score = run_dir.name, math.nan
    try:
        ended = _run(cfg, run_dir, overrides, sweep=run_dir.parent.name)
        outcome, score = Outcome(name, DONE if ended.worked else BEFORE), ended.metric
    except Held as error:
        _refuse(f"{name}: passed over, {error}")
        outcome = Outcome(name, ELSEWHERE, error.who)
    except Exception as error:
        if isinstance(error, UserError):
            _refuse(f"{name}: {error}")
        else:
            traceback.print_exc()
        _log_failure(run_dir, error)
        if cfg.task != "report":
            leave_reason(run_dir, error)
        outcome = Outcome(name, FAILED, one_line(error))
    if Sweep.of_job is not None:
        Sweep.of_job.leave(number, outcome)
        if Sweep.of_job.searches and outcome.state in (FAILED, ELSEWHERE):
            # Sweepers that search know what to do about a job that raised; nan ends some of them (Optuna's).
            raise UserError(f"{name}: {outcome.reason}")
    return score


def _log_failure(run_dir: Path, error: Exception) -> None:
    """Keep the reason in the log: of a refusal where the run has begun one, of a defect anyhow, with its traceback."""
    from mixadv.console import SAID, begin_log

    if isinstance(error, UserError):
        SAID.error("%s", error)
        return
    SAID.error("a defect of mixadv", exc_info=error)
    begin_log(run_dir)


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
    """Entry point of ``python run.py``, ``python -m mixadv`` and the ``mixadv`` command."""
    if "--version" in sys.argv[1:]:
        print(_versions())
        return
    _take_dotenv(Path.cwd() / ".env")
    # Exceptions reach this function whole, instead of Hydra's shortened print-out.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    config.register()
    sys.argv[1:] = map(_quoted, sys.argv[1:])

    import hydra
    from hydra._internal.utils import get_args_parser

    from mixadv.runs.sweep import Sweep

    flags = {flag: action.nargs != 0 for action in get_args_parser()._actions for flag in action.option_strings}
    if message := misplaced_word(sys.argv[1:], flags, config.TASKS):
        _exit_with(message)
    Sweep.current = None
    try:
        _refusing(hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")(_job))
        if Sweep.current is not None:
            _conclude(Sweep.current)
    finally:
        if Sweep.current is not None:
            Sweep.current.close()


def _versions() -> str:
    others = ", ".join(f"{name} {version(package)}" for name, package in VERSIONS.items())
    return f"mixadv {mixadv.__version__} ({others})"


def _refusing(application: Callable[[], Any]) -> None:
    """Run Hydra's application; what the user has to fix ends in one message and exit code 1."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        application()
    except UserError as error:
        _exit_with(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _exit_with(composition_message(error))
    except YAMLError as error:
        # It spreads the file and the line over several lines.
        _exit_with(f"a configuration file cannot be read: {' '.join(str(error).split())}")
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
        if is_helper():
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
    from mixadv.runs.sweep import Sweep

    on_slurm = Sweep.current is not None and Sweep.current.launcher.endswith(".SlurmLauncher")
    return on_slurm and shutil.which("srun") is None


def _conclude(sweep: "Sweep") -> None:
    """Say what became of the jobs; exit code 1 if not all of them are done or in somebody's hands."""
    from mixadv.runs.sweep import complaint, summary

    assert sweep.directory is not None
    outcomes = sweep.outcomes()
    print(summary(sweep.directory, outcomes), flush=True)
    if message := complaint(outcomes):
        _exit_with(message)


if __name__ == "__main__":
    main()
