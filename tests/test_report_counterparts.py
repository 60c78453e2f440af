"""The deterministic counterparts in sentences, tables, figure and page, on made-up runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluated_run import interval, write_evaluation, write_results
from mixadv.report import read_run, write_report, write_table_csv
from mixadv.report.compare import counterpart_sentences
from mixadv.report.figures.evaluation import attacks_figure
from oracles_intervals import paired_interval_by_weights


def with_counterparts(path: Path, member: int, threshold: float | None = None, **weights: Any) -> dict[str, np.ndarray]:
    """A run whose best member was chosen elsewhere; the records, with those of the counterparts."""
    results = write_evaluation(path, pictures=0, **weights)
    with np.load(path / "records.npz") as file:
        arrays = dict(file)
    count = len(arrays["labels"])
    right = {
        "constant": arrays["labels"] == 3,
        "vote": (np.random.default_rng(1).random(count) < 0.4).astype(np.uint8),
        "averaged_twin": arrays["averaged_twin_robust"],
        "best_member": arrays["members_robust"][member],
    }
    made = {
        name: {"clean": 0.875, "robust": float(each.mean()), "ci95": interval(float(each.mean()), count)}
        for name, each in right.items()
    }
    made["constant"]["which"], made["best_member"]["which"] = 3, member
    made["vote"]["threshold"] = threshold
    if len(results["members"]) == 1:
        made = {"constant": made["constant"]}
    results["counterparts"] = {**made, "chosen_on": "120 validation images"}
    write_results(path / "results.json", results)
    np.savez(path / "records.npz", **arrays, vote_robust=right["vote"])
    return {**right, "mixture": arrays["robust"]}


def test_each_counterpart_has_a_sentence_with_its_paired_difference(tmp_path: Path) -> None:
    right = with_counterparts(tmp_path / "run", member=1)
    sentences = counterpart_sentences(read_run(tmp_path / "run"))
    names = {
        "its best member (member 1, chosen on 120 validation images)": "best_member",
        "the vote of its members": "vote",
        "its averaged twin": "averaged_twin",
        "the best constant answer": "constant",
    }
    assert len(sentences) == len(names)
    for sentence, (name, key) in zip(sentences, names.items(), strict=True):
        difference = right["mixture"] - right[key]
        low, high = paired_interval_by_weights(difference)
        differ = sum(abs(one) > 1e-6 for one in difference)
        assert sentence.startswith(
            f"Mixture minus {name}: {100 * difference.mean():+.1f} points, 95 % interval [{100 * low:+.1f}, "
            f"{100 * high:+.1f}] (paired: the two differ on {differ} of 400 test images): "
        )
    # The made-up twin is far ahead of nobody, the constant far behind.
    assert sentences[3].endswith(": the mixture is more robust.")


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        (60, 0, "the best constant answer is more robust than the model."),
        (12, 8, "the best constant answer is ahead, but no difference is shown."),
        (10, 10, "no difference is shown."),
        (8, 12, "no difference is shown."),
        (0, 60, "the model is more robust."),
    ],
)
def test_the_text_says_who_is_ahead(tmp_path: Path, better: int, worse: int, said: str) -> None:
    path = tmp_path / "run"
    results = write_evaluation(path, weights=(1.0,), count=100, pictures=0)
    labels = np.zeros(100, dtype=np.int64)
    labels[:better] = 1
    robust = np.zeros(100)
    robust[better : better + worse] = 1
    results["robust"] = {"expected_accuracy": worse / 100, "ci95": interval(worse / 100, 100)}
    results["counterparts"] = {"constant": {"clean": better / 100, "robust": better / 100, "which": 1}}
    write_results(path / "results.json", results)
    np.savez(path / "records.npz", labels=labels, robust=robust, clean=robust, members_robust=robust[None])
    (sentence,) = counterpart_sentences(read_run(path))
    assert sentence.startswith("Model minus the best constant answer: ")
    assert sentence.endswith(": " + said)


def test_rows_of_the_tables_and_the_figure(tmp_path: Path) -> None:
    right = with_counterparts(tmp_path / "run", member=1)
    run = read_run(tmp_path / "run")
    with open(write_table_csv([run], tmp_path / "report.csv"), newline="") as file:
        rows = {row["who"]: row for row in csv.DictReader(file)}
    for who, key in (("vote", "vote"), ("constant answer", "constant"), ("averaged twin", "averaged_twin")):
        assert float(rows[who]["robust"]) == pytest.approx(right[key].mean())
        assert float(rows[who]["robust_low"]) == pytest.approx(interval(right[key].mean(), 400)[0])
    (axes,) = attacks_figure(run).axes
    lines = {line.get_label(): line for line in axes.lines}
    for who, key in (("vote", "vote"), ("constant answer", "constant")):
        assert lines[who].get_xdata() == pytest.approx([right[key].mean()])


@pytest.mark.parametrize("threshold", [None, 0.375])
def test_the_page_tells_them_and_for_two_classes_cites_why(tmp_path: Path, threshold: float | None) -> None:
    with_counterparts(tmp_path / "run", member=2, threshold=threshold)
    page = " ".join(write_report(tmp_path / "run").read_text().split())
    assert "member 2 (best on 120 validation images)" in page
    assert "Mixture minus the vote of its members" in page
    assert "Chosen on 120 validation images: the class, the best member" in page
    assert ("arXiv:2302.07221" in page) == (threshold is not None)
    assert (">0.375</data>" in page) == (threshold is not None)


def test_a_choice_that_the_members_do_not_have_is_not_followed(tmp_path: Path) -> None:
    with_counterparts(tmp_path / "run", member=1)
    file = tmp_path / "run" / "results.json"
    results = json.loads(file.read_text())
    results["counterparts"]["best_member"]["which"] = 7
    file.write_text(json.dumps(results))
    assert "chosen on the same images, which favours it" in counterpart_sentences(read_run(tmp_path / "run"))[0]
