"""studies/pays.py: gathers the runs of a sweep, and compares mixtures with all their counterparts."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mixadv import results
from mixadv.report.files import find_runs
from mixadv.results import Accuracy, CeilingRow, ChosenCounterpart, Counterparts, Data, Results
from oracles_intervals import paired_interval_by_weights

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "results" / "pays"
COUNT = 30
OFF = {"loss": {"_target_": "mixadv.losses.AT", "class_weights": None}, "attack": {"targets": "none"}}
WEIGHTED, TARGETED = {"loss": {"class_weights": "antithetic"}}, {"attack": {"targets": "random"}}


def script():
    """studies/pays.py as a module."""
    spec = importlib.util.spec_from_file_location("study_pays", ROOT / "studies" / "pays.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pays = script()


def write(
    root, name, weights, right, *, seed, eps=1.06, epochs=40, hidden=(128, 128), kind="shared", task="train", **changed
):
    """A finished run: right [L, COUNT] says whether a member is right at all points; one point fools who is wrong."""
    path = root / name
    path.mkdir(parents=True)
    lam, labels = np.array(weights), np.arange(COUNT) % 3
    robust = lam @ right
    np.savez(
        path / "records.npz",
        labels=labels,
        clean=np.ones(COUNT),
        robust=robust,
        members_robust=right.astype(np.uint8),
        vote_robust=(lam @ right > 0.5).astype(np.uint8),
        averaged_twin_robust=right[0].astype(np.uint8),
    )
    best = ChosenCounterpart(1.0, Accuracy(right[-1].mean()), len(right) - 1) if len(right) > 1 else None
    config = {"task": task, "L": len(right), "schedule": {"kind": kind}, "trainer": {"max_epochs": epochs}}
    config |= {
        "model": {"hidden": list(hidden)},
        **{key: {**part, **changed.get(key, {})} for key, part in OFF.items()},
    }
    results.write(
        path / "results.json",
        Results(
            task=task,
            seed=seed,
            config=config,
            norm="l2",
            eps=eps,
            L=len(right),
            weights=tuple(weights),
            num_examples=COUNT,
            clean=Accuracy(1.0),
            robust=Accuracy(float(robust.mean())),
            members=tuple(results.Classifier() for _ in right),
            counterparts=Counterparts(ChosenCounterpart(1 / 3, Accuracy(1 / 3), 2), best_member=best),
            ceiling=(CeilingRow(eps, COUNT, randomised_upper=0.6, deterministic_upper=0.5),),
            data=Data(f"Averages, draw {seed}" if seed else "Averages"),
            seconds={"train": 10.0 + seed},
        ),
    )
    (path / "DONE").touch()


@pytest.fixture
def sweep(tmp_path):
    """Three seeds of the recipe, two of a single model, one network with biases at another radius, and a ceiling."""
    rng = np.random.default_rng(5)
    root = tmp_path / "sweep"
    for seed in range(3):
        halves = rng.random(COUNT) < 0.5
        write(
            root,
            f"A{seed}",
            [0.5, 0.5],
            np.stack([halves, ~halves | (rng.random(COUNT) < 0.4)]),
            seed=seed,
            **WEIGHTED,
            **TARGETED,
        )
    for seed in (0, 2):
        write(
            root, f"S{seed}", [1.0], rng.random((1, COUNT)) < 0.3, seed=seed, epochs=80, hidden=(181, 181), **TARGETED
        )
    write(root, "B0", [0.2, 0.8], rng.random((2, COUNT)) < 0.4, seed=0, eps=1.1, task="evaluate")
    smoothed = {"_target_": "mixadv.losses.SmoothedZeroOne"}
    write(root, "Z0", [1.0], rng.random((1, COUNT)) < 0.3, seed=0, loss=smoothed)
    write(root, "P0", [0.6, 0.4], rng.random((2, COUNT)) < 0.3, seed=0)
    write(root, "G0", [1.0], rng.random((1, COUNT)) < 0.3, seed=0, kind="grow")
    folder = root / "ceiling"
    folder.mkdir()
    rows = (
        CeilingRow(1.06, COUNT, randomised_upper=0.55, deterministic_upper=0.52),
        CeilingRow(1.1, 7, randomised_upper=0.1),
    )
    results.write(
        folder / "results.json",
        Results(task="ceiling", norm="l2", eps=1.06, ceiling=rows, num_examples=COUNT, data=Data("Averages, draw 2")),
    )
    (folder / "DONE").touch()
    return root


def robust_of(sweep, *names):
    runs = {run.path.name: run for run in find_runs(sweep)}
    return [runs[name].records["robust"] for name in names]


def test_a_run_has_the_name_of_what_was_trained(sweep):
    study, notes = pays.gather(sweep)
    methods = {line.run: line.method for line in study.lines}
    single = "one model, random targets, 2 x epochs, layers of 181"
    assert notes == []
    assert methods == {
        **{f"A{seed}": "recipe" for seed in range(3)},
        **{
            "S0": single,
            "S2": single,
            "B0": "one network, biases",
            "P0": "Algorithm 2, shared attacks",
            "G0": "grown",
            "Z0": "one model, smoothed 0/1 loss",
        },
    }
    assert {line.data for line in study.lines} == {"Averages"}


def test_sampled_updates_are_another_method(sweep):
    write(sweep, "sampled", [0.5, 0.5], np.ones((2, COUNT)), seed=0, kind="sampled")
    study, _ = pays.gather(sweep)
    assert {line.method for line in study.lines if line.run == "sampled"} == {"Algorithm 2"}


def test_the_ceiling_of_a_run_is_the_least_that_any_run_found_on_its_images(sweep):
    study, _ = pays.gather(sweep)
    found = {line.run: (line.any_mixture, line.any_classifier) for line in study.lines}
    assert found["A2"] == found["S2"] == (0.55, 0.5)
    assert found["A0"] == found["A1"] == found["B0"] == (0.6, 0.5)


def test_runs_that_are_not_done_are_named(sweep):
    (sweep / "P0" / "DONE").unlink()
    study, notes = pays.gather(sweep)
    assert notes == ["P0 is unfinished"]
    assert "P0" not in {line.run for line in study.lines}


def test_two_runs_of_one_name_are_refused(sweep):
    write(sweep, "P0-again", [0.6, 0.4], np.ones((2, COUNT)), seed=0)
    with pytest.raises(ValueError, match="2 runs have one name"):
        pays.gather(sweep)


def test_what_is_written_comes_back(sweep, tmp_path):
    study, _ = pays.gather(sweep)
    pays.write_study(study, tmp_path)
    again = pays.read_study(tmp_path)
    assert repr(again.lines) == repr(study.lines)
    for mine, theirs in zip(again.accuracies, study.accuracies, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_differences_have_both_intervals(sweep):
    study, _ = pays.gather(sweep)
    found = {(one.mixture, one.other): one for one in pays.differences(study, ("Averages", "l2"), 1.06)}
    mine, theirs = robust_of(sweep, "A0", "A2"), robust_of(sweep, "S0", "S2")
    each = [x - y for x, y in zip(mine, theirs, strict=True)]
    single = found["recipe", "one model, random targets, 2 x epochs, layers of 181"]
    assert single.each == pytest.approx({0: each[0].mean(), 2: each[1].mean()}, abs=1e-6)
    student = stats.ttest_1samp([one.mean() for one in each], 0).confidence_interval(0.95)
    assert single.over_seeds == pytest.approx((student.low, student.high), abs=1e-6)
    assert single.over_images == pytest.approx(paired_interval_by_weights(np.concatenate(each)), abs=1e-6)
    best = found["recipe", "best member"]
    runs = {run.path.name: run for run in find_runs(sweep)}
    gains = [runs[f"A{seed}"].records for seed in range(3)]
    assert best.mean == pytest.approx(np.mean([one["robust"] - one["members_robust"][1] for one in gains]), abs=1e-6)
    constant = found["recipe", "constant answer"]
    assert constant.mean == pytest.approx(np.mean([one["robust"] for one in gains]) - 1 / 3, abs=1e-6)
    # A mixture that did not grow is its own best member.
    assert found["grown", "best member"].mean == 0
    # One seed has no interval over seeds, so that nothing is claimed.
    assert np.isnan(found["Algorithm 2, shared attacks", "vote"].over_seeds).all()
    assert not found["Algorithm 2, shared attacks", "vote"].holds


@pytest.mark.parametrize(
    ("gains", "holds"), [((0.06, 0.07, 0.08), True), ((0.03, 0.04, 0.05), False), ((0.3, 0.0, 0.1), False)]
)
def test_a_claim_needs_five_points_and_an_interval_over_the_seeds(gains, holds):
    zeros = {seed: np.zeros(4000) for seed in range(3)}
    ahead = {seed: (np.arange(4000) < 4000 * gain).astype(float) for seed, gain in enumerate(gains)}
    assert pays.difference("a", "b", ahead, zeros).holds is holds
    with pytest.raises(ValueError, match="no seed in common"):
        pays.difference("a", "b", ahead, {7: np.zeros(4000)})


def test_the_command_writes_tables_and_figure_and_leaves_the_rest_of_the_page(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(f"# Head\n\n{pays.BEGIN}\nold\n{pays.END}\n\nFoot.\n")
    rng = np.random.default_rng(7)
    for eps in (1.01, 1.1):
        write(sweep, f"A{eps}", [0.5, 0.5], rng.random((2, COUNT)) < 0.4, seed=0, eps=eps, **WEIGHTED)
    assert pays.main([str(sweep), str(out)]) == 0
    page = (out / "README.md").read_text()
    assert page.startswith("# Head\n")
    assert page.endswith("\n\nFoot.\n")
    assert "old" not in page
    (mean,) = re.findall(r"\*\*recipe\*\* \| ([\d.]+) \|", page)
    assert float(mean) == pytest.approx(100 * np.mean(robust_of(sweep, "A0", "A1", "A2")), abs=0.051)
    assert "| l2 1.01 | l2 1.06 | l2 1.1 |" in page
    assert (out / "eps.png").stat().st_size > 10_000
    # Again from the two files alone.
    made = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"}
    assert pays.main([str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"} == made
    capsys.readouterr()


@pytest.mark.skipif(not (STORED / "runs.csv").exists(), reason="the study has not been stored")
def test_stored_tables_are_those_of_the_stored_numbers():
    study = pays.read_study(STORED)
    assert pays.tables(study) in (STORED / "README.md").read_text(encoding="utf-8")
