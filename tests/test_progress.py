"""The progress display: a line for every validation, and a bar that keeps its times in a narrow terminal."""

import io
import re

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Column

from mixadv.callbacks import ProgressBar


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_times_never_disappear(width):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    # Lightning's column of metrics may be wrapped.
    columns = [*ProgressBar().configure_columns(None), TextColumn("{task.fields[metrics]}", table_column=Column())]
    progress = Progress(*columns, console=console)
    metrics = "loss: 1.234 robust: 0.567 lambda: (0.25, 0.25, 0.25, 0.25) " * 2
    progress.add_task("Epoch 199/199", total=12345, completed=6789, metrics=metrics)
    console.print(progress.get_renderable())
    shown = file.getvalue().splitlines()[0]
    assert re.search(r" 6789/12345 0:00:00 (-:--:--|\d:\d\d:\d\d)", shown)
    assert len(shown) <= width


def test_a_line_for_every_validation_where_there_is_no_terminal(trained):
    lines = [line for line in trained.finished.out.splitlines() if line.startswith("mixture of 3  epoch")]
    assert [line.split()[4] for line in lines] == ["1.0/2", "2.0/2"]
    assert all(re.search(r"clean 0\.\d{3}  robust 0\.\d{3}  lambda \((0\.\d\d, ){2}0\.\d\d\)$", line) for line in lines)
    assert "\x1b" not in trained.finished.out
