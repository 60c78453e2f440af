"""Figures and tables from the files of a run.

Imports neither torch nor, before something is drawn, matplotlib.

A *run directory* holds `config.yaml`, `results.json`, `metrics.csv`, `records.npz` and `DONE` or `FAILED`; a
baseline lives in `baseline/` below it with the same files. Everything here reads those files and nothing
else, so that a finished, a failed and a still running run can be looked at from any machine. `read_run` reads
them once; what draws and prints takes the `Run`.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mixadv.errors import UserError
from mixadv.report.cells import print_whole
from mixadv.report.figures.curves import draw_curves
from mixadv.report.figures.games import draw_game
from mixadv.report.figures.solve import draw_solution
from mixadv.report.figures.sweep import draw_sweep
from mixadv.report.files import Run, find_runs, read_run
from mixadv.report.game_tables import games_table, is_game
from mixadv.report.page import write_report
from mixadv.report.show import show_run
from mixadv.report.tables import sweep_table, write_table_csv

__all__ = [
    "Run",
    "draw_curves",
    "draw_solution",
    "draw_sweep",
    "find_runs",
    "read_run",
    "report",
    "show_run",
    "sweep_table",
    "write_report",
    "write_table_csv",
]


def report(root: str | Path, console: Console) -> list[Path]:
    """Everything that can be said about the runs in `root`; returns the files written.

    One run: its `curves.png` is drawn anew (if it has a history) and its table printed. Several: a table of all of
    them is printed, and `report.csv` and `report.png` (only if a run has results: accuracy against eps, or against L
    where all have one eps) are written into `root`.

    Raises:
        UserError: `root` does not exist, holds no run, or cannot be written to.
    """
    root = Path(root)
    runs = find_runs(root)
    if not runs:
        raise UserError(
            f"no runs in {root}: looked, there and in every folder below, for results.json, metrics.csv, "
            "config.yaml, DONE or FAILED; give the directory of a run or of a sweep (runs=DIR)"
        )
    if len(runs) == 1:
        return _report_one(runs[0], console)
    games = [run for run in runs if is_game(run)]
    runs = [run for run in runs if not is_game(run)]
    if games:
        print_whole(games_table(games), console)
    if not runs:
        return []
    print_whole(sweep_table(runs), console)
    written = []
    if any(run.robust.value is not None for run in runs):
        written.append(draw_sweep(runs, root / "report.png"))
    written.append(write_table_csv(runs, root / "report.csv"))
    for path in written:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    return written


def _report_one(run: Run, console: Console) -> list[Path]:
    written = []
    if run.has_history:
        written.append(draw_curves(run))
    if is_game(run) and (run.path / "game.npz").exists():
        written.append(draw_game(run.path))
    if run.results.attacks:
        written.append(write_report(run))
    show_run(run, console)
    return written
