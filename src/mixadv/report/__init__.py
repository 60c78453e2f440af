"""Figures and tables from the files of a run.

Imports neither torch nor, before something is drawn, matplotlib.

A *run directory* holds `config.yaml`, `results.json`, `metrics.csv`, `records.npz` and `DONE` or `FAILED`; a
baseline lives in `baseline/` below it with the same files. Everything here reads those files and nothing
else, so that a finished, a failed and a still running run can be looked at from any machine.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mixadv.errors import UserError
from mixadv.report.cells import print_whole
from mixadv.report.differences import compare_settings, differences_table, write_differences_csv
from mixadv.report.figures.curves import draw_curves
from mixadv.report.figures.games import draw_game
from mixadv.report.figures.sweep import draw_sweep
from mixadv.report.files import Run, find_runs, read_run
from mixadv.report.game_tables import games_table, is_game
from mixadv.report.page import write_report
from mixadv.report.show import show_run
from mixadv.report.solve import draw_solution
from mixadv.report.study import draw_study
from mixadv.report.tables import sweep_table, write_table_csv

__all__ = [
    "compare_settings",
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
    them is printed, and `report.csv` and `report.png` (accuracy against eps; only if a run has results) are written
    into `root`. Several runs of one eps are a study: `report.png` has accuracy against L, `training.png`,
    `weights.png` and `cost.png` are drawn beside it, and the differences between settings, where any two can be
    compared, are printed and written to `differences.csv`.

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
    written: list[Path] = []
    if len(runs) == 1:
        if runs[0].has_history:
            written.append(draw_curves(runs[0].path))
        if is_game(runs[0]) and (runs[0].path / "game.npz").exists():
            written.append(draw_game(runs[0].path))
        if runs[0].attacks:
            written.append(write_report(runs[0].path))
        show_run(runs[0], console)
        return written
    games = [run for run in runs if is_game(run)]
    runs = [run for run in runs if not is_game(run)]
    if games:
        print_whole(games_table(games), console)
    if not runs:
        return written
    print_whole(sweep_table(runs), console)
    if len({run.eps for run in runs} - {None}) <= 1:
        written += _study(runs, root, console)
    elif any(run.robust.value is not None for run in runs):
        written.append(draw_sweep(runs, root / "report.png"))
    written.append(write_table_csv(runs, root / "report.csv"))
    for path in written:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    return written


def _study(runs: list[Run], root: Path, console: Console) -> list[Path]:
    answers, notes = compare_settings(runs)
    for note in notes:
        console.print(f"Not compared: {note}", style="yellow", markup=False, highlight=False)
    if not answers:
        return draw_study(runs, root)
    print_whole(differences_table(answers), console)
    return [*draw_study(runs, root), write_differences_csv(answers, root / "differences.csv")]
