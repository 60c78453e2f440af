"""`task=ceiling`: its files, its numbers, its sentences and its figure; the line of trainings and evaluations."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from builders.runs import read_results
from conftest import run_command
from mixadv.data.digits import Digits
from mixadv.report.ceiling import ceiling_sentences, ceiling_table
from mixadv.report.figures.ceiling import ceiling_figure
from mixadv.report.files import read_run
from mixadv.results import CeilingRow, read

RADII = (0.8, 1.0, 1.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three radii, in no order. Shared: look, do not touch."""
    cwd = tmp_path_factory.mktemp("ceiling")
    argv = ["task=ceiling", "data=digits", "threat_model=l2", "ceiling.eps=[1.0,0.8,1.05]"]
    finished = run_command(cwd, *argv, "ceiling.split=[train,validation]", "name=digits")
    assert finished.rc == 0, finished.err
    return cwd / "outputs" / "ceiling" / "digits", finished


@pytest.fixture(scope="module")
def digits():
    """All 1,437 images and labels, in the order of the splits, and their distances across classes."""
    data = Digits()
    data.setup()
    x = np.concatenate([data.train_images, data.val_images]).reshape(-1, 64) / 255
    y = np.concatenate([data.train_labels, data.val_labels])
    return x, y, np.where(y[:, None] == y, np.inf, cdist(x, x))


def test_the_numbers_are_those_of_a_direct_comparison(run, digits):
    found = json.loads((run[0] / "results.json").read_text())
    _, y, apart = digits
    assert (found["task"], found["num_examples"], found["threat_model"]["norm"]) == ("ceiling", len(y), "l2")
    assert found["first_conflict_eps"] == pytest.approx(apart.min() / 2)
    assert tuple(row["eps"] for row in found["ceiling"]) == RADII
    for row in found["ceiling"]:
        close = apart <= 2 * row["eps"]
        assert row["in_conflict"] == pytest.approx(close.any(1).mean())
        assert row["pairs"] == close.sum() / 2
        assert row["gain_at_most"] == pytest.approx(row["randomised_upper"] - row["deterministic"])
        assert row["status"] == "exact"


def test_the_arrays_show_who_is_right(run, digits):
    x, y, apart = digits
    rows = json.loads((run[0] / "results.json").read_text())["ceiling"]
    with np.load(run[0] / "ceiling.npz") as file:
        arrays = dict(file)
    assert (arrays["labels"] == y).all()
    for k, row in enumerate(rows):
        right = arrays[f"right/{k}"] == 1
        assert not (apart[right][:, right] <= 2 * row["eps"]).any()
        assert right.mean() == pytest.approx(row["deterministic"])
        assert arrays[f"q/{k}"].mean() == pytest.approx(row["randomised"])
    i, j = arrays["closest"][0]
    assert apart[i, j] == apart.min() == pytest.approx(arrays["closest_distances"][0])
    middle = arrays["closest_middles"][0].reshape(-1)
    assert np.allclose(middle, (x[i] + x[j]) / 2, atol=1e-6)
    assert np.allclose(arrays["closest_images"][0].reshape(2, -1) / 255, x[[i, j]])


def test_the_csv_repeats_the_results(run):
    rows = json.loads((run[0] / "results.json").read_text())["ceiling"]
    with (run[0] / "ceiling.csv").open() as file:
        written = list(csv.DictReader(file))
    for row, line in zip(rows, written, strict=True):
        assert {name: float(line[name]) for name in row if name != "status"} == {
            name: value for name, value in row.items() if name != "status"
        }
        assert (line["norm"], line["status"]) == ("l2", row["status"])


def test_a_finished_run_is_shown_and_drawn_again(run):
    path, finished = run
    before = (path / "results.json").read_bytes()
    assert "Under attack no classifier is right on more than 64.93 % of them" in " ".join(finished.out.split())
    assert "no mixture on more than 65.38 %" in " ".join(finished.out.split())
    (path / "ceiling.png").unlink()
    again = run_command(path.parent, "task=report", "runs=digits")
    assert again.rc == 0, again.err
    assert "65.38" in again.out
    assert (path / "ceiling.png").read_bytes()[:4] == b"\x89PNG"
    assert (path / "results.json").read_bytes() == before


def test_the_figure_shows_the_optima_and_the_closest_pairs(run, monkeypatch):
    from mixadv.report import ceiling

    drawn = {}
    monkeypatch.setattr(ceiling, "save", lambda build, path: drawn.setdefault(path.name, build()))
    ceiling.write_ceiling(read_run(run[0]))
    axes = {ax.get_label(): ax for ax in drawn["ceiling.png"].axes}
    lines = {line.get_label(): line.get_ydata() for line in axes["optima"].lines}
    rows = json.loads((run[0] / "results.json").read_text())["ceiling"]
    assert np.allclose(lines["best mixture"], [row["randomised"] for row in rows])
    assert np.allclose(lines["best classifier"], [row["deterministic"] for row in rows])
    assert np.allclose(lines["images without a conflict"], [1 - row["in_conflict"] for row in rows])
    assert {f"{name} {k}" for name in ("first", "middle", "second") for k in range(6)} <= set(axes)


def test_a_figure_of_bounds_draws_no_value_and_its_title_fits(run):
    known = read_run(run[0])
    rows = (
        CeilingRow(1.0, 543, 1.0, 9, 0.5, 0.5, 0.4, 0.48, 0.1, "the deterministic optimum is only bounded", 1.0),
        CeilingRow(1.1, 543, 1.0, 9, 0.3, 0.45, 0.3, 0.4, 0.15, "the randomised optimum is only bounded", 1.0),
    )
    figure = ceiling_figure(replace(known, results=replace(known.results, ceiling=rows)), "x" * 160, None)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert np.array_equal(lines["best mixture"], [0.5, np.nan], equal_nan=True)
    assert np.isnan(lines["best classifier"]).all()
    # Bounds of a single radius are drawn too.
    ends = {tuple(segment[:, 1]) for group in axes.collections for segment in getattr(group, "get_segments", list)()}
    assert {(0.3, 0.45), (0.4, 0.48), (0.3, 0.4)} == ends
    extent = figure._suptitle.get_window_extent(figure.canvas.get_renderer())
    assert 0 < extent.x0 < extent.x1 < figure.bbox.width


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train", "training images"),
        (["train", "validation"], "training and validation images"),
        ("all", "training, validation and test images"),
    ],
)
def test_the_splits_are_named_in_english(run, split, words):
    known = read_run(run[0])
    config = {**known.config, "ceiling": {"split": split}}
    assert words in ceiling_table(replace(known, config=config)).title


def test_reports_of_several_runs_list_them(run, command, tmp_path):
    finished = command("task=ceiling", "data=digits", "eps=0.3", "ceiling.split=all", "name=other")
    assert finished.rc == 0, finished.err
    (tmp_path / "outputs" / "ceiling" / "digits").symlink_to(run[0])
    shown = command("task=report", "runs=outputs/ceiling")
    assert shown.rc == 0, shown.err
    assert "1,797" in shown.out


def test_a_damaged_file_of_arrays_is_named(run, tmp_path):
    path = tmp_path / "damaged"
    path.mkdir()
    for name in ("results.json", "config.yaml", "DONE"):
        (path / name).write_bytes((run[0] / name).read_bytes())
    np.savez(path / "ceiling.npz", labels=np.zeros(3))
    finished = run_command(tmp_path, "task=report", "runs=damaged")
    assert finished.rc == 1
    assert "ceiling.npz is damaged" in finished.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("ceiling.eps=[]", "ceiling.eps=[] names no radius"),
        ("ceiling.eps=[0.1,8]", "did you mean ceiling.eps=8/255?"),
        ("ceiling.eps=[wide]", "ceiling.eps=wide is not a number"),
        ("ceiling.eps=[-1]", "ceiling.eps=-1 must be finite and at least 0"),
        ("ceiling.split=trian", "ceiling.split=trian is unknown: choose one of train, validation, test, all"),
        ("ceiling.split=[]", "names no split"),
        ("ceiling.time_limit=-1", "ceiling.time_limit=-1"),
        ("ceiling.spilt=train", "ceiling.split"),
        ("mixture=here", "task=ceiling does not read it"),
        ("members=[a]", "task=ceiling does not read it"),
    ],
)
def test_what_cannot_be_is_refused_before_the_data_are_read(command, argv, message):
    finished = command("task=ceiling", "data=digits", argv)
    assert finished.rc == 1
    assert message in finished.err


def test_an_l2_radius_beyond_the_box_is_refused(command):
    finished = command("task=ceiling", "data=digits", "threat_model=l2", "ceiling.eps=[1,9]")
    assert "exceeds the diagonal 8.00" in finished.err


# --- the line of other tasks -------------------------------------------------------------------------------


def test_trainings_and_evaluations_say_what_is_possible(trained, command, tmp_path):
    found, damage = read(trained.path / "results.json")
    assert damage == []
    (row,) = found.ceiling
    assert (row.eps, row.num_examples) == (found.eps, found.num_examples)
    # No two digits of different classes are that close.
    assert (row.in_conflict, row.randomised, row.deterministic, row.gain_at_most) == (0, 1, 1, 0)
    assert found.first_conflict_eps > row.eps
    argv = [f"mixture={trained.path}", "threat_model=l2", "eps=1.3", "data.num_test=90", "protocol.diagnosed=0"]
    finished = command("task=evaluate", *argv, "~protocol.attacks.arc", "~protocol.attacks.subsets", "name=wide")
    assert finished.rc == 0, finished.err
    assert "of the 90 test images conflict." in " ".join(finished.out.split())
    page = (tmp_path / "outputs" / "evaluate" / "wide" / "report.html").read_text()
    assert "of the 90 test images conflict." in page


def sentence(run, **values):
    known = read_run(run[0])
    row = CeilingRow(eps=1.0, num_examples=1_000, in_conflict=0.5, **values)
    return ceiling_sentences(replace(known, results=replace(known.results, ceiling=(row,))))[0]


def test_sentences_say_what_is_not_known(run):
    exact = {"randomised": 0.7, "randomised_upper": 0.7, "deterministic": 0.6999, "deterministic_upper": 0.6999}
    said = sentence(run, **exact, gain_at_most=0.0001, status="exact")
    assert "no classifier is right on more than 69.99 %" in said
    assert said.endswith("adds at most 0.01 points.")
    assert sentence(run, **exact, gain_at_most=1e-6, status="exact").endswith("adds at most 0.0001 points.")
    bounded = sentence(run, **exact, gain_at_most=0.0001, status="sets of more than 4 points were left out")
    assert bounded.endswith("These are bounds: sets of more than 4 points were left out.")
    assert "were not computed" in sentence(run, status="only the conflicts were counted")


def test_an_evaluation_that_is_above_the_ceiling_is_flagged(command, tmp_path):
    """A deterministic classifier on the triangle, of which the attacks see nothing or enough."""
    (tmp_path / "nets.py").write_text(
        """
import torch


class Nearest(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.corners = torch.nn.Parameter(torch.tensor([[0.25, 0.28], [0.75, 0.28], [0.5, 0.72]]))

    def forward(self, images):
        return -torch.cdist(images.flatten(1), self.corners) * 10
"""
    )
    own = ("task=evaluate", "members=[nets.py:Nearest]", "data=triangle", "threat_model=l2", "eps=0.262", "logger=none")
    only = [f"~protocol.attacks.{name}" for name in ("arc", "subsets", "square", "climber")]
    for steps, flagged in ((0, True), (20, False)):
        attack = (*only, f"protocol.attacks.pgd-20.num_steps={steps}", "protocol.diagnosed=0", f"name=steps{steps}")
        finished = command(*own, "data.num_test=30", *attack)
        assert finished.rc == 0, finished.err
        results = read_results(tmp_path / "outputs" / "evaluate" / f"steps{steps}")
        assert "above-the-ceiling" in results["checks"]
        assert [flag["name"] for flag in results["flags"]] == (["above-the-ceiling"] if flagged else [])
        assert ("Flag: above-the-ceiling: member 0 is right" in " ".join(finished.out.split())) == flagged
