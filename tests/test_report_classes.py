"""The table by class and images.csv against loops over the records."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from evaluated_run import write_evaluation
from mixadv.report import read_run, show_run, write_report
from mixadv.report.classes import classes_table

WEIGHTS = (0.5, 0.2, 0.3)
NAMES = ["=ant", "bee", "cat <b>", "dog", *(f"kind {k}" for k in range(8))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An evaluation whose labels leave classes out; results.json has the accuracies of the others."""
    path = tmp_path / "run"
    write_evaluation(path, weights=WEIGHTS, count=50)
    content, arrays = json.loads((path / "results.json").read_text()), dict(np.load(path / "records.npz"))
    labels = np.arange(len(arrays["labels"])) ** 2 % 12
    present = sorted(set(labels.tolist()))
    content["classes"] = [
        {
            "name": NAMES[label],
            "num_examples": int(sum(labels == label)),
            "clean": float(np.mean([a for a, own in zip(arrays["clean"], labels, strict=True) if own == label])),
            "robust": float(np.mean([a for a, own in zip(arrays["robust"], labels, strict=True) if own == label])),
        }
        for label in present
    ]
    (path / "results.json").write_text(json.dumps(content))
    indices = labels * 1000 + np.arange(len(labels))
    np.savez(path / "records.npz", **{**arrays, "labels": labels, "indices": indices})
    return path


def test_the_console_and_the_page_have_every_class(path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, markup=False)
    show_run(read_run(path), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    page = write_report(path).read_text(encoding="utf-8")
    for row in json.loads((path / "results.json").read_text())["classes"]:
        (line,) = [line for line in shown.splitlines() if line.strip(" │┃").startswith(row["name"])]
        assert f" {row['num_examples']} " in line
        assert f" {100 * row['clean']:.1f} [" in line
        assert f" {100 * row['robust']:.1f} [" in line
        assert row["name"].replace("<b>", "&lt;b&gt;") in page


def test_a_long_table_keeps_the_least_robust_classes(path: Path) -> None:
    content = json.loads((path / "results.json").read_text())
    content["classes"] = [
        {"name": f"c{k}", "num_examples": 3, "clean": 1.0, "robust": (7 * k % 15) / 15} for k in range(15)
    ]
    (path / "results.json").write_text(json.dumps(content))
    run = read_run(path)
    order = sorted(range(15), key=lambda k: 7 * k % 15)
    table = classes_table(run)
    assert [row.name for row in table.rows] == [f"c{k}" for k in order[:10]]
    assert "10 least robust of 15 classes" in table.title
    assert [row.name for row in classes_table(run, None).rows] == [f"c{k}" for k in range(15)]


def test_every_image_has_its_line(path: Path) -> None:
    write_report(path)
    with (path / "images.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    arrays = dict(np.load(path / "records.npz"))
    assert len(lines) == len(arrays["labels"])
    for i, line in enumerate(lines):
        label = int(arrays["labels"][i])
        # A spreadsheet must not run the name of a class.
        assert line["class"] == ("'=ant" if label == 0 else NAMES[label])
        assert (int(line["label"]), int(line["image"])) == (label, arrays["indices"][i])
        assert (float(line["clean"]), float(line["robust"])) == (arrays["clean"][i], arrays["robust"][i])
        assert line["found_by"] == arrays["found_by"][i]
        for k in range(len(WEIGHTS)):
            assert int(line[f"member_{k}_robust"]) == arrays["members_robust"][k, i]
        assert float(line["attack/pgd-20"]) == arrays["attack/pgd-20"][i]


def test_records_of_another_run_are_told_on_the_page_and_give_no_lines(path: Path) -> None:
    arrays = dict(np.load(path / "records.npz"))
    np.savez(path / "records.npz", **{**arrays, "robust": arrays["robust"] / 2})
    assert "does not match the results.json" in write_report(path).read_text(encoding="utf-8")
    assert not (path / "images.csv").exists()
