"""What randomising gains over several data sets: table, sentences and figure, on made-up runs."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conftest import TINY, run_command
from evaluated_run import interval, write_evaluation, write_results
from mixadv.report import find_runs, report
from mixadv.report.figures.gains import gains_figure
from mixadv.report.gains import COUNTERPARTS, gains_sentences, standings
from oracles_intervals import paired_interval_by_weights

MAKEFILE = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
TRIANGLE = {"eps": 0.262, "num_examples": 400, "in_conflict": 1.0, "pairs": 80, "status": "exact"}
TRIANGLE |= {"randomised": 0.5, "randomised_upper": 0.5, "deterministic": 1 / 3, "deterministic_upper": 1 / 3}
TRIANGLE |= {"gain_at_most": 1 / 6}
NO_CONFLICT = {"eps": 0.15, "num_examples": 400, "in_conflict": 0.0, "pairs": 0, "status": "exact"}
NO_CONFLICT |= {"randomised": 1.0, "randomised_upper": 1.0, "deterministic": 1.0, "deterministic_upper": 1.0}
NO_CONFLICT |= {"gain_at_most": 0.0}


def share(value: float, count: int = 400) -> np.ndarray:
    """1 for the first images, 0 for the others, with this mean."""
    return (np.arange(count) < round(value * count)).astype(np.float64)


def write_mixture(
    path: Path, name: str, ceiling: dict[str, Any] | None, right: dict[str, float]
) -> dict[str, np.ndarray]:
    """A run on the data `name` with these accuracies under attack; returns those of each image."""
    results = write_evaluation(path, weights=(0.5, 0.5), pictures=0)
    each = {who: share(value) for who, value in right.items()}
    # An expected accuracy of two members is 0, 1/2 or 1.
    each["mixture"] = share(min(1.0, 2 * right["mixture"])) / 2 if right["mixture"] <= 0.5 else share(right["mixture"])
    each["constant answer"] = (np.arange(400) % 10 == 3).astype(np.float64)
    members = np.stack([each["best member"], share(0.01)]).astype(np.uint8)

    def stored(who: str) -> dict[str, Any]:
        value = float(each[who].mean())
        return {"clean": 0.9, "robust": value, "ci95": interval(value, 400)}

    results |= {
        "data": {"name": name, "num_test": 400},
        "robust": {"expected_accuracy": stored("mixture")["robust"], "ci95": stored("mixture")["ci95"]},
        "counterparts": {
            "constant": stored("constant answer") | {"which": 3},
            "vote": stored("vote"),
            "averaged_twin": stored("averaged twin"),
            "best_member": stored("best member") | {"which": 0},
            "chosen_on": "120 validation images",
        },
    }
    if ceiling is not None:
        results["ceiling"] = [ceiling]
    write_results(path / "results.json", results)
    with np.load(path / "records.npz") as file:
        arrays = dict(file)
    arrays |= {
        "robust": each["mixture"],
        "members_robust": members,
        "vote_robust": each["vote"].astype(np.uint8),
        "averaged_twin_robust": each["averaged twin"].astype(np.uint8),
    }
    np.savez(path / "records.npz", **arrays)
    single = write_evaluation(path / "baseline", weights=(1.0,), pictures=0)
    single |= {
        "data": results["data"],
        "robust": {"expected_accuracy": right["single model"], "ci95": stored("single model")["ci95"]},
    }
    write_results(path / "baseline" / "results.json", single)
    with np.load(path / "baseline" / "records.npz") as file:
        np.savez(path / "baseline" / "records.npz", **{**file, "robust": each["single model"]})
    return each


WON = {"mixture": 0.475, "single model": 0.01, "best member": 0.3, "vote": 0.2, "averaged twin": 0.15}
OPEN = {"mixture": 0.625, "single model": 0.6, "best member": 0.63, "vote": 0.62, "averaged twin": 0.7}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_mixture(tmp_path / "experiment=digits", "Digits", NO_CONFLICT, OPEN)
    write_mixture(tmp_path / "experiment=triangle", "Triangle", TRIANGLE, WON)
    return tmp_path


def printed(root: Path, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    report(root, console)
    return console.export_text()


def test_margins_are_paired_and_the_largest_possible_gain_comes_first(tmp_path: Path) -> None:
    write_mixture(tmp_path / "a", "Digits", NO_CONFLICT, OPEN)
    each = write_mixture(tmp_path / "b", "Triangle", TRIANGLE, WON)
    found = standings(find_runs(tmp_path))
    assert [one.name for one in found] == ["b", "a"]
    first = found[0]
    assert {who: at.value for who, at in first.robust.items()} == pytest.approx({**WON, "constant answer": 0.1})
    assert set(first.margins) == set(COUNTERPARTS)
    for who, margin in first.margins.items():
        low, high = paired_interval_by_weights(each["mixture"] - each[who])
        assert (margin.difference, margin.low, margin.high) == pytest.approx(
            (WON["mixture"] - each[who].mean(), low, high)
        )


def test_the_table_and_the_sentences_of_a_sweep(sweep: Path) -> None:
    text = printed(sweep)
    # A path has no blank at which it could be folded.
    assert all(len(line.rstrip()) <= 80 or sweep.name in line for line in text.splitlines())
    lines = [
        line.split() for line in text.splitlines() if "(" not in line and line.startswith(("digits ", "triangle "))
    ]
    rows = {name: values for name, *values in lines}
    assert rows["triangle"] == ["33.3", "50.0", "47.5", "1.0", "30.0", "20.0", "15.0", "10.0"]
    assert rows["digits"] == ["100.0", "100.0", "62.5", "60.0", "63.0", "62.0", "70.0", "10.0"]
    words = " ".join(text.split())
    assert (
        "No classifier can be right on more than 33.33 % of these images under attack, and no mixture on more" in words
    )
    assert "The mixture reaches 47.5 %, 95 % of its ceiling: at the points that were found, more than" in words
    assert "It is more robust than the single model (+46.5 points [" in words
    assert "No two of these images of different classes conflict" in words
    # Single runs have no table of their own.
    assert "report.png" not in text
    assert {path.name for path in sweep.iterdir() if path.is_file()} == {"gains.png", "report.csv"}


def test_each_comparison_is_in_its_sentence(tmp_path: Path) -> None:
    each = write_mixture(tmp_path / "a", "Digits", NO_CONFLICT, OPEN)
    write_mixture(tmp_path / "b", "Triangle", TRIANGLE, WON)
    won, lost, reach = gains_sentences(standings(find_runs(tmp_path)))
    assert "training seed" in reach
    for sentence in (won, lost):
        ahead, _, rest = sentence.partition("It is more robust than ")[2].partition("No difference is shown from ")
        same, _, behind = rest.partition("It is less robust than ")
        for who in COUNTERPARTS:
            parts = [f"the {who} (" in part for part in (ahead, same, behind)]
            assert sum(parts) == 1
            if sentence is lost:
                low, high = paired_interval_by_weights(each["mixture"] - each[who])
                assert parts == [low > 0, low <= 0 <= high, high < 0]
    assert "No difference" not in won


def test_no_difference_has_no_sign(tmp_path: Path) -> None:
    """An expected accuracy is a sum of weights, which rounding may leave just below that of a member."""
    write_mixture(tmp_path / "a", "Digits", NO_CONFLICT, {**OPEN, "best member": OPEN["mixture"]})
    write_mixture(tmp_path / "b", "Triangle", TRIANGLE, WON)
    with np.load(tmp_path / "a" / "records.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "a" / "records.npz", **{**arrays, "robust": arrays["robust"] * (1 - 1e-7)})
    assert "the best member (+0.0 points" in gains_sentences(standings(find_runs(tmp_path)))[1]


def test_what_is_not_possible_or_not_known_is_said(tmp_path: Path) -> None:
    equal = {
        **TRIANGLE,
        "in_conflict": 0.7,
        "randomised_upper": 0.65,
        "deterministic": 0.65,
        "deterministic_upper": 0.65,
    }
    cases = {
        "equal": {**equal, "randomised": 0.65, "gain_at_most": 0.0},
        "bounds": {key: NO_CONFLICT[key] for key in ("eps", "num_examples")}
        | {"in_conflict": 0.4, "status": "counted"},
        "none": None,
        # The ceiling is of other images than the measured ones.
        "fewer": {**TRIANGLE, "num_examples": 300},
    }
    for name, row in cases.items():
        write_mixture(tmp_path / name, f"data {name}", row, WON)
    said = {text.split(" (")[0]: text for text in gains_sentences(standings(find_runs(tmp_path)))}
    assert "No classifier and no mixture can be right on more than 65 % under attack" in said["equal"]
    assert said["equal"].endswith("But some classifier could do as well alone.")
    assert "was not computed; task=ceiling bounds it." in said["bounds"]
    assert "What any classifier can reach here is not known." in said["none"]
    assert "more than any classifier can" not in said["fewer"]
    for name in ("bounds", "none"):
        assert "The mixture reaches 47.5 %. It is" in said[name]


def test_a_mixture_that_wins_nowhere_is_said_so(tmp_path: Path) -> None:
    write_mixture(tmp_path / "a", "Digits", NO_CONFLICT, {**OPEN, "mixture": 0.1})
    write_mixture(tmp_path / "b", "Triangle", TRIANGLE, WON)
    assert gains_sentences(standings(find_runs(tmp_path)))[1].endswith("Nothing shows that mixing helps here.")


def test_one_data_set_and_single_models_have_no_such_report(tmp_path: Path) -> None:
    write_mixture(tmp_path / "a", "Digits", NO_CONFLICT, OPEN)
    write_mixture(tmp_path / "b", "Digits", NO_CONFLICT, WON)
    results = write_evaluation(tmp_path / "c", weights=(1.0,), pictures=0)
    write_results(tmp_path / "c" / "results.json", results | {"data": {"name": "CIFAR"}})
    assert standings(find_runs(tmp_path)) == []
    printed(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"report.png", "report.csv"}


def test_runs_that_can_be_compared_keep_their_tables(sweep: Path) -> None:
    write_mixture(sweep / "experiment=again", "Digits", NO_CONFLICT, {**OPEN, "mixture": 0.5})
    text = printed(sweep)
    assert "What randomising gains" in text
    assert "Digits · ℓ∞ · protocol strict" in text
    assert {path.name for path in sweep.iterdir() if path.is_file()} == {"gains.png", "report.csv", "report.png"}


def test_damaged_records_leave_out_what_they_would_show(sweep: Path) -> None:
    (sweep / "experiment=triangle" / "records.npz").write_bytes(b"PK no archive")
    found = {one.name: one for one in standings(find_runs(sweep))}
    # Against the baseline there is an unpaired comparison.
    assert set(found["triangle"].margins) == {"single model"}
    assert found["triangle"].robust.keys() == {"mixture", *COUNTERPARTS}
    printed(sweep)


def test_the_figure_has_every_value_and_both_ceilings_and_no_texts_overlap(sweep: Path) -> None:
    import matplotlib

    from mixadv.report.figures.style import STYLE

    long = "Digits (8x8), classes 1, 5, 7, averages of 16, 3 for each original, draw 104, and so on"
    write_mixture(sweep / "experiment=long", long, {**TRIANGLE, "deterministic_upper": 0.5}, WON)
    write_mixture(sweep / "experiment=more", "$\\hostile_{", TRIANGLE, WON)
    with matplotlib.rc_context(STYLE):
        found = standings(find_runs(sweep))
        figure = gains_figure(found)
        figure.canvas.draw()
        axes = {one.get_label(): one for one in figure.axes}
        assert list(axes) == [f"gains {i}" for i in range(4)]
        for i, standing in enumerate(found):
            panel = axes[f"gains {i}"]
            assert [bar.get_width() for bar in panel.patches] == pytest.approx(
                [standing.robust[who].value for who in ("mixture", *COUNTERPARTS)]
            )
            lines = {line.get_label(): line.get_xdata()[0] for line in panel.lines}
            assert lines["no classifier can exceed this"] == standing.ceiling.deterministic_upper
            assert lines["no mixture can exceed this"] == standing.ceiling.randomised_upper
            ends = sorted(tuple(line.get_xdata()) for line in panel.lines if line.get_marker() == "|")
            assert ends == sorted(at.ends for at in standing.robust.values())
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        for i, (one, box) in enumerate(boxes):
            assert box.x0 >= 0, one
            assert box.x1 <= 1400, one
            for other, second in boxes[:i]:
                assert not box.overlaps(second), (one, other)


@pytest.mark.slow
def test_the_quickstart_ends_with_this_report(tmp_path: Path) -> None:
    """Its commands, with few images and steps."""
    sweep, shown = (
        re.findall(r"\S+", line)
        for line in re.findall(r"python run\.py (.*)", re.search(r"^quickstart:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1])
    )
    small = [f"data.{split}=102" for split in ("num_train", "num_val", "num_test")]
    small += ["trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1", "trainer.limit_train_batches=2"]
    small += ["protocol=fast", *(text for text in TINY if text.startswith("protocol."))]
    finished = run_command(tmp_path, *sweep, *small, "schedule.T_theta=1")
    assert finished.rc == 0, finished.err
    finished = run_command(tmp_path, *shown)
    assert finished.rc == 0, finished.err
    assert re.findall(r"^(\w+),\S+ \(", finished.out, re.M) == ["triangle", "averaged_digits", "quickstart"]
    folder = tmp_path / "outputs" / "sweeps" / "quickstart"
    assert (folder / "gains.png").exists()
    assert list(folder.glob("experiment=triangle*/regions.png"))
    assert "What any classifier" not in finished.out
