"""Figures and tables from the files of a run.

This package does not import torch, and it imports matplotlib only to draw.

A *run directory* holds `config.yaml`, `results.json`, `metrics.csv`, `records.npz` and `DONE` or `FAILED`, and its
baseline has the same files in `baseline/`. A report uses nothing but these files, so it works for finished, failed and
running runs on any machine. `read_run` reads them once; tables and figures take the `Run`.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from mixadv.errors import UserError
from mixadv.report.ceiling import ceilings_table, is_ceiling, write_ceiling
from mixadv.report.cells import print_narrow, print_whole
from mixadv.report.figures.curves import draw_curves
from mixadv.report.figures.gains import draw_gains
from mixadv.report.figures.games import draw_game
from mixadv.report.figures.regions import draw_regions
from mixadv.report.figures.solve import draw_solution
from mixadv.report.figures.sweep import draw_sweep
from mixadv.report.files import Run, find_runs, opened, read_run
from mixadv.report.gains import gains_sentences, gains_table, standings
from mixadv.report.game_tables import games_table, is_game
from mixadv.report.page import write_report
from mixadv.report.panels import panels_of
from mixadv.report.show import show_run
from mixadv.report.tables import sweep_tables, write_table_csv

__all__ = [
    "Run",
    "draw_curves",
    "draw_regions",
    "draw_solution",
    "draw_sweep",
    "find_runs",
    "opened",
    "read_run",
    "report",
    "show_run",
    "sweep_tables",
    "write_report",
    "write_table_csv",
]


def report(root: str | Path, console: Console) -> list[Path]:
    """Print and draw the runs in `root`; returns the written files.

    For one run: draw its figures and its page again, and print its tables. For several: print a table per panel
    (`panels.Panel`), and write `report.csv` and, if a run has results, `report.png` (see `draw_sweep`) into `root`. For
    mixtures on several data sets: also a table and sentences of what randomising gains, and `gains.png` (see
    `draw_gains`); they take the place of the others where each panel has one run.

    Raises:
        UserError: `root` does not exist, holds no run, or cannot be written to.
    """
    root = Path(root)
    runs = find_runs(root)
    if not runs:
        raise UserError(
            f"no runs in {root}: neither there nor in a folder below is a results.json, metrics.csv, config.yaml, DONE "
            "or FAILED; give the directory of a run or of a sweep (runs=DIR)"
        )
    if len(runs) == 1:
        return _report_one(runs[0], console)
    games, ceilings = ([run for run in runs if kind(run)] for kind in (is_game, is_ceiling))
    # task=predict measures nothing.
    runs = [run for run in runs if run not in games and run not in ceilings and run.task != "predict"]
    if games:
        print_whole(games_table(games), console)
    if ceilings:
        print_narrow(ceilings_table(ceilings), console)
    if not runs:
        return []
    found, written = standings(runs), []
    # Where no two runs can be compared with each other, tables and curves of runs would have one line each.
    if len(found) < len(runs) or any(len(panel.runs) > 1 for panel in panels_of(runs)):
        for table in sweep_tables(runs):
            print_narrow(table, console)
        if any(run.robust.value is not None for run in runs):
            written.append(draw_sweep(runs, root / "report.png"))
    if found:
        print_narrow(gains_table(found), console)
        for sentence in gains_sentences(found):
            console.print(Text(f"{sentence}\n"))
        written.append(draw_gains(found, root / "gains.png"))
    written.append(write_table_csv(runs, root / "report.csv"))
    for path in written:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    return written


def _report_one(run: Run, console: Console) -> list[Path]:
    written = []
    if run.has_history:
        written.append(draw_curves(run))
    if is_game(run) and (run.path / "game.npz").exists():
        written.append(draw_game(run))
    if is_ceiling(run) and run.has_results:
        written += write_ceiling(run)
    if run.results.attacks:
        written.append(write_report(run))
    show_run(run, console)
    return written
