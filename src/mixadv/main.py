"""The command line: composes the configuration, checks it, and runs one task or a sweep of tasks.

A user's error prints one message on standard error without a traceback; a defect of mixadv keeps its traceback.
Neither torch nor Lightning is imported before the checks have passed.
"""

import errno
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from omegaconf import DictConfig

import mixadv
from mixadv import config
from mixadv.command_line import for_hydra
from mixadv.composition import composition_message
from mixadv.errors import UserError
from mixadv.redaction import printable
from mixadv.runs.processes import is_helper
from mixadv.shipped import config_dir
from mixadv.signals import Stopped, output_closed
from mixadv.unknown_keys import misplaced_word

if TYPE_CHECKING:
    from mixadv.runs.sweep import Sweep
    from mixadv.tasks import Ended

# The disk is full, or the user's quota is.
FULL = (errno.ENOSPC, errno.EDQUOT)

# Exit code by which shells report a program that Ctrl-C ended.
INTERRUPTED = 130

# After an interruption, whatever the task was.
AGAIN = "the same command continues a training or an evaluation, and starts task=solve and task=game again"

# The only names that are read from .env. A folder from somebody else may contain a .env, and other variables could
# choose which code runs or where the user's keys are sent.
FROM_DOTENV = ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "DATA_DIR")

# The packages that --version lists: short name -> distribution.
VERSIONS = {"hydra": "hydra-core", "lightning": "pytorch-lightning", "torch": "torch"}

# Modules whose exceptions come from a launcher, not from a job.
LAUNCHERS = ("joblib.", "submitit.")


def _refuse(message: str) -> None:
    sys.stdout.flush()
    # Names and reasons may come from files of other people: no control characters may reach the terminal.
    shown = printable(message, keep="\n")
    print(f"mixadv: {shown}", file=sys.stderr, flush=True)


def _job(cfg: DictConfig) -> float:
    """Run one task in its run directory; Hydra calls this once for a run, and once for each job of a sweep.

    A job of a sweep records its outcome. If it fails, it raises only under an optimising sweeper; Hydra's basic
    sweeper would stop the whole sweep.

    Returns:
        The number that ``optimized_metric`` names, in [0, 1], for Hydra's sweepers; nan if the job failed or does not
        measure it.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from mixadv.console import TRANSCRIPT, end_log

    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    overrides = list(hydra_cfg.overrides.task)
    if hydra_cfg.job.chdir:
        # Hydra has gone to the run directory, but paths of a command are relative to the place where it was typed.
        os.chdir(hydra_cfg.runtime.cwd)
    try:
        if hydra_cfg.mode == RunMode.MULTIRUN:
            return _job_of_sweep(cfg, run_dir, overrides, hydra_cfg.job.num)
        return _single_run(cfg, run_dir, overrides, hydra_cfg.runtime.choices.get("launch"))
    except KeyboardInterrupt:
        TRANSCRIPT.warning("interrupted")
        raise
    except Stopped as stop:
        TRANSCRIPT.warning("stopped by %s", stop)
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
    except BrokenPipeError:
        raise output_closed() from None
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
            f"the disk of {run_dir} is full: free some space, then the same command continues the run; or choose "
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
        _refuse(f"{name}: skipped: {error}")
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
            # Optimising sweepers handle a job that raises; some of them (Optuna's) end the search at nan.
            raise UserError(f"{name}: {outcome.reason}")
    return score


def _log_failure(run_dir: Path, error: Exception) -> None:
    """Log the reason. A defect is logged with its traceback, and creates the log if the run has not."""
    from mixadv.console import TRANSCRIPT, begin_log

    if isinstance(error, UserError):
        TRANSCRIPT.error("%s", error)
        return
    TRANSCRIPT.error("a defect of mixadv", exc_info=error)
    begin_log(run_dir)


def _remove_if_empty(run_dir: Path) -> None:
    """Remove the run directory if it is empty: Hydra creates it before anything is checked."""
    if run_dir.is_dir() and run_dir != Path.cwd() and not any(run_dir.iterdir()):
        run_dir.rmdir()


def _exit_with(message: str) -> NoReturn:
    _refuse(message)
    sys.exit(1)


def _take_dotenv(path: Path) -> None:
    """Set the variables of `FROM_DOTENV` that `path` gives; blank ones are skipped, and the shell's values win."""
    from dotenv import dotenv_values

    try:
        values = dotenv_values(path, interpolate=False)
        for key in FROM_DOTENV:
            if value := values.get(key):
                os.environ.setdefault(key, value)
    except (OSError, ValueError) as error:
        _exit_with(f"{path} cannot be read ({type(error).__name__}): write lines of NAME=VALUE, or remove it")


def main() -> None:
    """The command line of ``sys.argv``; `mixadv.__main__.start` calls it."""
    if "--version" in sys.argv[1:]:
        print(_versions())
        return
    _take_dotenv(Path.cwd() / ".env")
    # Let exceptions reach this function; else Hydra prints a shortened traceback and exits.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    config.register()
    if strange := next((word for word in sys.argv[1:] if not _is_text(word)), None):
        _exit_with(f"{strange!a} is not text in the encoding of this system: set PYTHONUTF8=1, or LANG=C.UTF-8")
    sys.argv[1:] = map(for_hydra, sys.argv[1:])

    import hydra
    from hydra._internal.utils import get_args_parser

    from mixadv.runs.sweep import Sweep

    if message := misplaced_word(sys.argv[1:], get_args_parser(), config.TASKS):
        _exit_with(message)
    Sweep.current = None
    try:
        _refusing(hydra.main(version_base="1.3", config_path=config_dir(), config_name="config")(_job))
        if Sweep.current is not None:
            _conclude(Sweep.current)
    finally:
        if Sweep.current is not None:
            Sweep.current.close()


def _is_text(word: str) -> bool:
    """Whether `word` has no bytes that Python could not decode."""
    return not any("\udc80" <= char <= "\udcff" for char in word)


def _versions() -> str:
    others = ", ".join(f"{name} {version(package)}" for name, package in VERSIONS.items())
    return f"mixadv {mixadv.__version__} ({others})"


def _refusing(application: Callable[[], Any]) -> None:
    """Run Hydra's application; an error that the user can fix ends in one message and exit code 1."""
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
        # The error spreads file and line over several lines of text.
        _exit_with(f"a configuration file cannot be read: {' '.join(str(error).split())}")
    except OSError as error:
        if error.filename is None:
            raise
        _exit_with(
            f"cannot write {error.filename}: {error.strerror}. "
            "Choose a writable place with hydra.run.dir=DIR (a sweep: hydra.sweep.dir=DIR)"
        )
    except ValueError as error:
        # Hydra raises these for GROUP=null or GROUP=3, and for -m --cfg.
        if str(error).startswith("Config group override must be"):
            _exit_with("a group takes a name: write GROUP=CHOICE, as loss=at; --help lists the groups")
        if str(error).startswith("Only one of --run"):
            _exit_with(str(error))
        raise
    except KeyboardInterrupt:
        _refuse(f"interrupted; {AGAIN}")
        sys.exit(INTERRUPTED)
    except Stopped as stop:
        if is_helper():
            # The process that started this one stops too and prints the message. A non-zero exit code here would make
            # Lightning kill that process before it has saved.
            sys.exit(0)
        _refuse(f"stopped by {stop}; {AGAIN}")
        sys.exit(stop.exit_code)
    except Exception as error:
        # A killed process or a job that the cluster cancelled: the summary of the other jobs is still printed.
        if not type(error).__module__.startswith(LAUNCHERS) and not _lacks_slurm():
            raise
        _refuse(f"the launcher failed, {type(error).__name__}: {str(error).strip().splitlines()[0]}")


def _lacks_slurm() -> bool:
    from mixadv.runs.sweep import Sweep

    on_slurm = Sweep.current is not None and Sweep.current.launcher.endswith(".SlurmLauncher")
    return on_slurm and shutil.which("srun") is None


def _conclude(sweep: "Sweep") -> None:
    """Print the outcome of all jobs; exit with code 1 unless each is done or being run by another process."""
    from mixadv.runs.sweep import complaint, summary

    assert sweep.directory is not None
    outcomes = sweep.outcomes()
    print(summary(sweep.directory, outcomes), flush=True)
    if message := complaint(outcomes):
        _exit_with(message)
