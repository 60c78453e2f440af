"""What the command line can do; the only place that sees the configuration and builds objects from it."""

from pathlib import Path

from omegaconf import DictConfig


def run_task(cfg: DictConfig, *, run_dir: Path, overrides: list[str], sweep: str | None) -> None:
    """Run ``cfg.task`` in `run_dir`.

    Args:
        cfg: a checked configuration.
        run_dir: where its files go.
        overrides: what the command line said.
        sweep: name of the sweep this run belongs to.

    Raises:
        UserError: something outside the program has to be fixed; the message says what.
    """
    if cfg.task == "train":
        from mixadv.tasks.run_directory import State, claim, show, working_in

        run_dir, state = claim(run_dir, cfg)
        if state is State.DONE:
            show(run_dir, done_before=True)
            return
        with working_in(run_dir):
            from mixadv.tasks.train import train

            train(cfg, run_dir, state, sweep)
    elif cfg.task == "game":
        from mixadv.tasks.run_directory import claim, working_in

        run_dir, state = claim(run_dir, cfg)
        with working_in(run_dir):
            from mixadv.tasks.game import play_game

            play_game(cfg, run_dir, state)
    elif cfg.task == "evaluate":
        from mixadv.tasks.evaluate import evaluate_mixture

        evaluate_mixture(cfg, run_dir, overrides)
    else:
        from mixadv.tasks.report import report_runs

        report_runs(cfg)
