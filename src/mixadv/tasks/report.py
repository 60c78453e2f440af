"""``task=report``: tables and figures of a directory of runs."""

from omegaconf import DictConfig

from mixadv.console import Console


def report_runs(cfg: DictConfig) -> None:
    """Print and draw the runs in ``cfg.runs``.

    Raises:
        UserError: there is no run, or the directory cannot be written.
    """
    from mixadv.report import report

    # Text from files must not be read as markup.
    report(cfg.runs, Console(markup=False))
