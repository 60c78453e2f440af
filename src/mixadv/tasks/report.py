"""``task=report``: tables and curves over a directory of runs."""

from omegaconf import DictConfig

from mixadv.console import Console


def report_runs(cfg: DictConfig) -> None:
    """Show and draw everything below ``cfg.runs``.

    Raises:
        UserError: there is no run below it.
    """
    from mixadv.report import report

    # Names come from files: nothing in them is markup.
    report(cfg.runs, Console(markup=False))
