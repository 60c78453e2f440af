"""The tasks of the command line: they see the configuration and build objects from it."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from mixadv.config import check
from mixadv.runs import processes
from mixadv.signals import REQUEUE, Signals, Stopped, requeue

if TYPE_CHECKING:
    from mixadv.report import Run


class Ended(NamedTuple):
    """How a task ended.

    Attributes:
        worked: False if the run was finished before.
        metric: the accuracy that ``optimized_metric`` names, in [0, 1]; nan for a task that does not measure it, and in
            processes other than rank 0.
    """

    worked: bool
    metric: float = math.nan


def run_task(cfg: DictConfig, *, run_dir: Path, overrides: list[str], sweep: str | None) -> Ended:
    """Run ``cfg.task`` in `run_dir`. A finished run is shown instead; in a sweep it gets one line.

    Args:
        cfg: a checked configuration.
        run_dir: for its files.
        overrides: of the command line.
        sweep: name of the sweep this run belongs to.

    Raises:
        UserError: the message says what the user has to do.
        Held: another process works in `run_dir`.
    """
    if cfg.task == "report":
        from mixadv.tasks.report import report_runs

        report_runs(cfg)
        return Ended(True)
    from mixadv.runs.directory import State, claimed, digest, finished_results, is_sealed, measured, seal

    processes.check(cfg, sweep)
    settings = digest(cfg)
    content_may_change = cfg.task in ("evaluate", "solve", "predict") or (cfg.task == "game" and "file" in cfg.game)
    if sweep is not None and cfg.resume != "never" and not content_may_change and is_sealed(run_dir, settings):
        found = finished_results(run_dir)
        print(f"{run_dir.name} is done", flush=True)
        return Ended(False, measured(found, cfg.optimized_metric))
    cfg, work, content = _prepared(cfg, overrides, sweep)
    # Settings that come from recorded members and mixtures are not checked yet.
    check(cfg)
    if processes.rank(cfg) > 0:
        with _stopped_by_signals(cfg):
            _help_along(cfg, run_dir, work, content)
        return Ended(True)
    with claimed(run_dir, cfg, content) as (path, state):
        if state is not State.DONE:
            processes.work_in(path)
            with _stopped_by_signals(cfg):
                run = work(cfg, path, state)
            if cfg.trainer.fast_dev_run:
                return Ended(True)
            seal(path, settings, content)
    if state is not State.DONE:
        show(run)
        return Ended(True, measured(run.results, cfg.optimized_metric))
    found = finished_results(path)
    if sweep is not None:
        print(f"{path.name} is done", flush=True)
        return Ended(False, measured(found, cfg.optimized_metric))
    from mixadv.report import read_run

    run = read_run(path)
    show(run, done_before=True)
    return Ended(False, measured(run.results, cfg.optimized_metric))


@contextmanager
def _stopped_by_signals(cfg: DictConfig) -> Iterator[None]:
    """Signals stop the work; a training handles them itself. A Slurm job that gets SIGUSR1 is requeued."""
    try:
        with nullcontext() if cfg.task == "train" else Signals():
            yield
    except Stopped as stop:
        if stop.signum == REQUEUE:
            # Imported here because rich would slow down --help.
            from mixadv.console import say

            requeue(say)
        raise


def _prepared(cfg: DictConfig, overrides: list[str], sweep: str | None) -> tuple[DictConfig, Callable[..., Any], str]:
    """`cfg` with the settings that recorded members decide; the task, a function of (cfg, run_dir, state) that returns
    the finished `Run`; and the digest of what is measured, "" for tasks that make it themselves."""
    if cfg.task == "train" and not cfg.members:
        from mixadv.tasks.train import train

        return cfg, partial(train, sweep=sweep), ""
    if cfg.task == "game":
        from mixadv.tasks.game import content_of_game, play_game

        return cfg, play_game, content_of_game(cfg)
    if cfg.task == "ceiling":
        from mixadv.tasks.ceiling import find_ceiling

        return cfg, find_ceiling, ""
    if cfg.task == "predict":
        from mixadv.members.store import read_mixture
        from mixadv.tasks.predict import check_read, content_of_prediction, predict_images

        check_read(overrides)
        mixture, config = read_mixture(cfg.mixture, factories=list(cfg.members))
        return cfg, partial(predict_images, mixture=mixture, config=config), content_of_prediction(cfg)
    from mixadv.members.member_list import sources_of
    from mixadv.members.store import read_mixture
    from mixadv.tasks.content import content_of
    from mixadv.tasks.evaluate import as_trained, evaluate_members, evaluate_mixture
    from mixadv.tasks.members import as_named, as_recorded_by_members

    if cfg.task != "evaluate" or not cfg.mixture:
        sources = sources_of([str(name) for name in cfg.members])
        if cfg.task == "evaluate":
            cfg = as_named(cfg, sources, overrides)
            return cfg, partial(evaluate_members, sweep=sweep, sources=sources), content_of(cfg, sources)
        if cfg.task == "train":
            from mixadv.tasks.train import train

            return as_named(cfg, sources, overrides), partial(train, sweep=sweep, sources=sources), ""
        from mixadv.tasks.solve import solve_weights

        cfg = as_recorded_by_members(cfg, sources, overrides)
        return cfg, partial(solve_weights, sweep=sweep, sources=sources), content_of(cfg, sources)
    mixture, config = read_mixture(cfg.mixture, factories=list(cfg.members))
    cfg = as_trained(cfg, config, overrides)
    return cfg, partial(evaluate_mixture, sweep=sweep, mixture=mixture, config=config), content_of(cfg)


def _help_along(cfg: DictConfig, run_dir: Path, work: Callable[..., Any], content: str) -> None:
    """Run the task in a process other than rank 0: it computes its part and writes no files."""
    from mixadv.runs.directory import State, is_current

    # Rank 0 passes the directory to the processes that it starts; others take it from their command.
    run_dir = Path(os.environ.get(processes.RUN_DIR, run_dir))
    if not is_current(run_dir, content):
        work(cfg, run_dir, State.UNFINISHED)


def show(run: "Run", *, done_before: bool = False) -> None:
    """Print the tables of a finished run, and draw its curves if they are missing."""
    from mixadv.console import Console
    from mixadv.report import draw_curves, show_run

    # Text from files must not be read as markup.
    console = Console(markup=False)
    if done_before:
        where = os.path.relpath(run.path)
        console.print(f"{where} is done; its results (resume=never starts anew beside it):", soft_wrap=True)
    if run.has_history and not (run.path / "curves.png").exists():
        draw_curves(run)
    show_run(run, console)
