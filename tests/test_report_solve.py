"""Table and figure of task=solve, from made-up results."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from mixadv.report import show_run
from mixadv.report.figures.solve import solution_figure
from mixadv.report.files import Run
from mixadv.report.solve import solution_table
from mixadv.results import Accuracy, Data, Fit, History, Results, Solve, SolveRow

WHO = ("networks:plain", "b.pt", "c.pt", "uniform mixture", "optimal mixture")


def solved(values: tuple[float, ...], bounds: tuple[float, ...]) -> Run:
    """A run whose columns differ by the images that they are about: 100 for validation, 50 for the test."""
    rows = tuple(
        SolveRow(
            who,
            clean=Accuracy.of(0.50 + 0.02 * k, 50),
            pool=Accuracy.of(0.70 + 0.01 * k, 100),
            fresh=Accuracy.of(0.60 + 0.01 * k, 100),
            test=Accuracy.of(0.30 + 0.02 * k, 50),
        )
        for k, who in enumerate(WHO)
    )
    history = History(values, bounds, tuple((0.5, 0.2, 0.3) for _ in values))
    fit = Fit(num_examples=100, solver="lp", status="converged", num_attacks=4)
    results = Results(
        task="solve",
        norm="linf",
        eps=8 / 255,
        L=3,
        weights=(0.5, 0.2, 0.3),
        num_examples=50,
        data=Data("Digits", num_test=450),
        solve=Solve(fit=fit, rows=rows, history=history),
    )
    return Run(Path("nowhere"), "done", results=results, has_results=True)


def test_each_heading_names_the_images_that_the_column_is_about() -> None:
    table = solution_table(solved((0.3,), (0.3,)))
    first = {column.heading: column.of(table.rows[0]) for column in table.columns}
    assert first == {
        "": "networks:plain",
        "λ": 0.5,
        "validation pool %": 0.70,
        "validation fresh %": 0.60,
        "test clean %": 0.50,
        "test robust % [95 %]": Accuracy.of(0.30, 50),
    }
    assert "(100 validation images" in table.caption
    assert "Test: 50 test images" in table.caption


def test_headings_and_names_are_whole_on_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    show_run(solved((0.3,), (0.3,)), console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    for who in WHO:
        assert len([line for line in lines if line.startswith(f"{who} ")]) == 1
    headings = "validation pool %", "validation fresh %", "test clean %", "test robust % [95 %]", "λ"
    assert sorted(" ".join(lines[1:3]).split()) == sorted(" ".join(headings).split())


@pytest.mark.parametrize("value", [0.825, 0.0, 1.0])
@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_the_axis_of_the_rounds_has_a_point_above_and_below(value: float, noise: float) -> None:
    run = solved((value, value), (value, abs(value - noise)))
    axes = next(axes for axes in solution_figure(run).axes if axes.get_label() == "rounds")
    low, high = axes.get_ylim()
    assert low <= 100 * (1 - value) - 1
    assert high >= 100 * (1 - value) + 1
    axes.figure.canvas.draw()
    assert axes.yaxis.get_offset_text().get_text() == ""
