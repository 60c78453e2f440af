"""What the command line can do; the only place that sees the configuration and builds objects from it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mixadv.config import check


def run_task(cfg: DictConfig, *, run_dir: Path, overrides: list[str], sweep: str | None) -> None:
    """Run ``cfg.task`` in `run_dir`; a finished run there is shown instead.

    Args:
        cfg: a checked configuration.
        run_dir: where its files go.
        overrides: what the command line said.
        sweep: name of the sweep this run belongs to.

    Raises:
        UserError: something outside the program has to be fixed; the message says what.
    """
    if cfg.task == "report":
        from mixadv.tasks.report import report_runs

        report_runs(cfg)
        return
    from mixadv.tasks.run_directory import State, claim, show, working_in

    cfg, work = _prepared(cfg, overrides, sweep)
    # What members and mixtures record of themselves has not been looked at yet.
    check(cfg)
    run_dir, state = claim(run_dir, cfg)
    if state is State.DONE:
        show(run_dir, done_before=True)
        return
    with working_in(run_dir):
        work(cfg, run_dir, state)
    show(run_dir)


def _prepared(cfg: DictConfig, overrides: list[str], sweep: str | None) -> tuple[DictConfig, Callable[..., Any]]:
    """The settings, settled where files have a say in them, and what to do: called with (cfg, run_dir, state)."""
    if cfg.task == "train":
        from mixadv.tasks.train import train

        return cfg, partial(train, sweep=sweep)
    if cfg.task == "game":
        from mixadv.tasks.game import play_game

        return cfg, play_game
    if cfg.task == "solve":
        from mixadv.tasks.solve import as_recorded_by_members, solve_weights

        return as_recorded_by_members(cfg, overrides), solve_weights
    from mixadv.export import read_mixture
    from mixadv.tasks.evaluate import as_trained, evaluate_mixture

    mixture, config = read_mixture(cfg.mixture, factories=list(cfg.members))
    return as_trained(cfg, config, overrides), partial(evaluate_mixture, mixture=mixture, config=config)
