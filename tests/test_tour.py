"""docs/tour.ipynb: stripped of outputs, and its code runs from top to bottom."""

import ast
import json
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"
NOTEBOOK = json.loads(PAGE.read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs_and_its_code_is_python():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    for code in CELLS:
        ast.parse(code)


def test_the_pages_that_it_names_exist():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    named = re.findall(r"\]\(([^)#]+)", text)
    assert named
    for name in named:
        assert (PAGE.parent / name).is_file(), name


@pytest.mark.slow
def test_the_notebook_runs():
    names = {}
    for code in CELLS:
        exec(compile(code, str(PAGE), "exec"), names)
    outputs = names["folder"] / "outputs"
    game = json.loads((outputs / "game/triangle/results.json").read_text())["game"]
    assert game["exact"]["value"] == "1/2"
    assert set(game["exact"]["deterministic_risks"]) == {"1", "2/3"}
    # With the first two moves, each with 1/2, every classifier errs half the time; the first two members reach that.
    assert names["solution"].value == pytest.approx(0.5, abs=1e-9)
    solved = json.loads((outputs / "solve/weighed/results.json").read_text())
    assert sum(solved["weights"]) == pytest.approx(1)
    assert solved["solve"]["certificate"]["gap"] < 1e-6
    assert len((outputs / "predict/photos/predictions.csv").read_text(encoding="utf-8").splitlines()) == 9
    assert float(names["mixture"].expected_accuracy(names["x"], names["y"]).mean()) > 0.3
