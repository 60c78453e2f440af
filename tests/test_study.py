"""Runs of one eps: which settings are compared, how their differences come about, and the figures (L = 1, 2, 3)."""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from evaluated_run import write_results
from mixadv.report import find_runs, report, sweep_tables, write_table_csv
from mixadv.report.cells import on_console
from mixadv.report.compare import Difference, paired
from mixadv.report.figures.sweep import sweep_figure
from mixadv.report.files import read_run
from mixadv.report.names import number
from mixadv.report.records import ALL, APGD, CLEAN, GAP, MEMBERS, PGD, measured
from oracles_intervals import paired_interval_by_weights

SCRIPT = Path(__file__).resolve().parents[1] / "studies" / "figures.py"


def script() -> Any:
    """studies/figures.py as a module, with its folder on the path as when it is run."""
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("study_figures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = script()
BEST_MEMBER, EQUAL_COMPUTING, EQUAL_EPOCHS = figures.BEST_MEMBER, figures.EQUAL_COMPUTING, figures.EQUAL_EPOCHS
LEARNED, MEASURED, MEASURED_SINGLE = figures.LEARNED, figures.MEASURED, figures.MEASURED_SINGLE
SCHEDULES, answers_of, names_of = figures.SCHEDULES, figures.answers_of, figures.names_of
grouped, setting_of = figures.grouped, importlib.import_module("settings").setting_of

COUNT = 60
PASSES = ("pgd-20", "apgd-ce", "apgd-dlr", "arc", "apgd-ce on member 0")
TARGETS = {"oracle": "OracleSubgradient", "entropic": "AcceleratedEntropic", "uniform": "Uniform"}


def write(
    root: Path,
    name: str,
    weights: list[float],
    *,
    seed: int = 0,
    loss: str = "AT",
    solver: str = "oracle",
    kind: str = "shared",
    epochs: int = 6,
    task: str = "train",
    rate: float = 0.1,
    norm: str = "linf",
    restarts: int = 1,
    model: str = "small_cnn",
    extra: dict[str, Any] | None = None,
    noise: int = 0,
) -> Path:
    """A run with the records of an evaluation: who is right at x and at the points of five passes, drawn at random."""
    size, path = len(weights), root / name
    path.mkdir(parents=True)
    rng = np.random.default_rng(noise + 17)
    clean = rng.random((size, COUNT)) < 0.8
    found = {key: clean & (rng.random((size, COUNT)) < 0.6 + 0.05 * i) for i, key in enumerate(PASSES)}
    points = np.stack([clean, *found.values()])
    lam = np.array(weights)
    robust = (np.tensordot(lam, points, (0, 1))).min(axis=0)
    np.savez(
        path / "records.npz",
        labels=np.arange(COUNT) % 10,
        clean=lam @ clean,
        robust=robust,
        members_robust=points.all(axis=0).astype(np.uint8),
        **{f"attack/{key}": lam @ right for key, right in found.items() if " on " not in key},
        **{f"member_correct/{key}": right for key, right in {"clean": clean, **found}.items()},
    )
    solver_keys: dict[str, Any] = {"num_steps": 10} if solver != "uniform" else {}
    config = {
        "task": task,
        "L": size,
        "seed": seed,
        "loss": {"_target_": f"mixadv.losses.{loss}", **({"beta": 6.0} if loss == "TRADES" else {})},
        "lambda_solver": {"_target_": f"mixadv.lambda_solvers.{TARGETS[solver]}", **solver_keys},
        "schedule": {"kind": kind, "epochs": epochs, "T_theta": 50},
        "optimizer": {"lr": rate},
        "model": {"name": model, "width": 16},
        "threat_model": {"norm": norm},
        "data": {"_target_": "mixadv.data.digits.Digits", "seed": seed},
        **(extra or {}),
    }
    results = {
        "schema": 2,
        "task": task,
        "seed": seed,
        "config": config,
        "device": "a device",
        "threat_model": {"norm": norm, "eps": 8 / 255},
        "data": {"name": "Digits"},
        "L": size,
        "weights": weights,
        "num_examples": COUNT,
        "clean": {"expected_accuracy": float((lam @ clean).mean()), "ensemble_accuracy": 0.9},
        "robust": {"expected_accuracy": float(robust.mean())},
        "attacks": {"pgd-20": {"settings": {"num_steps": 20, "restarts": restarts}}},
        "members": [{"clean": float(right.mean())} for right in clean],
        "seconds": {"train": 1.0},
    }
    write_results(path / "results.json", results)
    header = ["epoch", "seconds", "val/robust_accuracy", *(f"lambda/{k}" for k in range(size))]
    if task == "train":
        rows = [[t, 7.0 * t * size, 0.2 + 0.01 * t + 0.001 * noise, *weights] for t in range(1, epochs + 1)]
        (path / "metrics.csv").write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    (path / "DONE").touch()
    return path


TWO, THREE = [0.3, 0.7], [0.5, 0.2, 0.3]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for seed in (0, 1):
        write(tmp_path, f"one,seed={seed}", [1.0], seed=seed, noise=seed)
        write(tmp_path, f"one,18,seed={seed}", [1.0], seed=seed, epochs=18, noise=10 + seed)
        write(tmp_path, f"three,seed={seed}", THREE, seed=seed, noise=20 + seed)
    write(tmp_path, "three,uniform", [1 / 3] * 3, solver="uniform", seed=1, noise=30)
    # Attacks of its own for each member: it costs more than three models.
    write(tmp_path, "three,sampled", THREE, kind="sampled", solver="uniform", seed=1, noise=31)
    write(tmp_path, "two", TWO, noise=40)
    write(tmp_path, "two,sampled", TWO, kind="sampled", noise=41)
    write(tmp_path, "trades,one", [1.0], loss="TRADES", noise=50)
    write(tmp_path, "trades,three", THREE, loss="TRADES", noise=51)
    write(tmp_path, "apart", [0.25, 0.4, 0.35], task="evaluate", noise=60)
    return tmp_path


def records(path: Path) -> dict[str, np.ndarray]:
    with np.load(path / "records.npz") as file:
        return dict(file)


def look_at(root: Path) -> None:
    """All that the report of `root` consists of, but for the writing of pictures, which takes seconds."""
    runs, console = find_runs(root), Console(file=io.StringIO(), width=170)
    for build in figures.study_figures(runs).values():
        build()
    answers, _ = answers_of(runs)
    for table in sweep_tables(runs):
        console.print(on_console(table))
    console.print(on_console(figures.answers_table(answers)))
    figures.write_answers(answers, root / "differences.csv")
    write_table_csv(runs, root / "report.csv")


def test_what_is_compared_and_what_is_not(study: Path) -> None:
    answers, notes = answers_of(find_runs(study))
    assert notes == []
    pairs: dict[str, set[tuple[str, str]]] = {}
    for answer in answers:
        pairs.setdefault(answer.question, set()).add((answer.first, answer.second))
    one, two, three = "AT, L = 1", "AT, L = 2, oracle", "AT, L = 3, oracle"
    long, equal, trades = "AT, L = 1, 18 epochs", "AT, L = 3, uniform", "TRADES, L = 3, oracle"
    sampled = "AT, L = 3, uniform, sampled"
    assert pairs == {
        EQUAL_EPOCHS: {
            *((two, one), (f"{two}, sampled", one), (three, one), (equal, one), (sampled, one)),
            (trades, "TRADES, L = 1"),
        },
        # Two members for 12 epochs have no counterpart.
        EQUAL_COMPUTING: {(three, long), (equal, long)},
        LEARNED: {(three, equal)},
        SCHEDULES: {(f"{two}, sampled", two), (sampled, equal)},
        MEASURED: {("apart", three), ("apart", equal), ("apart", sampled), ("apart", trades)},
        MEASURED_SINGLE: {("apart", one), ("apart", long), ("apart", "TRADES, L = 1")},
        BEST_MEMBER: pairs[BEST_MEMBER],
    }
    # 7 trained mixtures, and the one that was measured.
    assert len([a for a in answers if a.question == BEST_MEMBER]) == 8
    # Seeds meet themselves; what was measured once meets every seed.
    seeds = {(a.question, a.first, a.second): set() for a in answers}
    for a in answers:
        seeds[a.question, a.first, a.second].add(a.difference.seeds)
    assert seeds[EQUAL_EPOCHS, three, one] == {(0,), (1,), (0, 1)}
    assert seeds[LEARNED, three, equal] == {(1,)}
    assert seeds[MEASURED, "apart", three] == {(0,), (1,), (0, 1)}


def test_differences_against_numbers_worked_out_from_the_records(study: Path) -> None:
    answers, _ = answers_of(find_runs(study))
    ones, threes = ([records(study / f"{name},seed={s}") for s in (0, 1)] for name in ("one", "three"))
    got = {
        (a.difference.seeds, a.difference.measure): a.difference.comparison
        for a in answers
        if a.question == EQUAL_EPOCHS and a.first.startswith("AT, L = 3, oracle")
    }
    assert {measure for _, measure in got} == {CLEAN, PGD, APGD, ALL, MEMBERS, GAP}

    def worst(arrays: dict[str, np.ndarray], *attacks: str) -> np.ndarray:
        # By brute force, image by image.
        keys = ["clean", *(f"attack/{name}" for name in attacks)]
        return np.array([min(float(arrays[key][i]) for key in keys) for i in range(COUNT)])

    def expected(measure: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> np.ndarray:
        mean_of_members = sum(w * a["members_robust"][k] for k, w in enumerate(THREE))
        return {
            CLEAN: a["clean"] - b["clean"],
            PGD: worst(a, "pgd-20") - worst(b, "pgd-20"),
            APGD: worst(a, "apgd-ce", "apgd-dlr") - worst(b, "apgd-ce", "apgd-dlr"),
            ALL: a["robust"] - b["robust"],
            MEMBERS: mean_of_members - b["robust"],
            GAP: a["robust"] - mean_of_members,
        }[measure]

    for measure in (CLEAN, PGD, APGD, ALL, MEMBERS, GAP):
        each = [expected(measure, a, b) for a, b in zip(threes, ones, strict=True)]
        for seeds, values in (((0,), each[0]), ((1,), each[1]), ((0, 1), (each[0] + each[1]) / 2)):
            ends = paired_interval_by_weights(values)
            assert got[seeds, measure][:3] == pytest.approx((values.mean(), *ends), abs=1e-12), (seeds, measure)
            assert got[seeds, measure].num_examples == COUNT
            assert got[seeds, measure].num_differing == np.count_nonzero(np.round(values, 6))
    # The two parts are the whole, and a mixture is never below the mean of its members.
    for seeds in ((0,), (1,), (0, 1)):
        parts = got[seeds, MEMBERS].difference + got[seeds, GAP].difference
        assert parts == pytest.approx(got[seeds, ALL].difference, abs=1e-12)
        assert got[seeds, GAP].difference > 0


@pytest.mark.parametrize(
    ("differing", "verdict"), [([0.5] * 30, "first"), ([-0.5] * 30, "second"), ([0.5, -0.5] * 15, "unresolved")]
)
def test_a_verdict_is_where_the_whole_interval_lies(differing: list[float], verdict: str) -> None:
    noisy = np.array(differing) + np.linspace(-0.1, 0.1, 30)
    for measure, said in ((PGD, verdict), (ALL, verdict), (GAP, ""), (MEMBERS, "")):
        assert Difference((0,), measure, paired(noisy)).verdict == said


@pytest.mark.parametrize(
    "other",
    [
        {"rate": 0.2},
        {"model": "small_resnet"},
        {"norm": "l2"},
        {"extra": {"precision": "bf16"}},
        {"extra": {"protocol": {"validation": {"num_steps": 3}}}},
    ],
)
def test_what_was_made_otherwise_is_another_setting_and_not_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path, "one", [1.0])
    write(tmp_path, "three", THREE, noise=1, **other)
    answers, notes = answers_of(find_runs(tmp_path))
    assert {answer.question for answer in answers} == {BEST_MEMBER}
    assert notes == []
    assert len({setting_of(read_run(write(tmp_path, name, THREE, **k))) for name, k in (("a", {}), ("b", other))}) == 2


def test_what_was_measured_by_other_attacks_is_not_compared(tmp_path: Path) -> None:
    write(tmp_path, "one", [1.0])
    write(tmp_path, "three", THREE, noise=1, restarts=5)
    write(tmp_path, "apart", THREE, noise=2, restarts=5, task="evaluate")
    answers, notes = answers_of(find_runs(tmp_path))
    assert {answer.question for answer in answers} == {BEST_MEMBER, MEASURED}
    assert len(notes) == 2
    assert all("other images or by other attacks" in note for note in notes)


def test_a_baseline_is_the_one_model(tmp_path: Path) -> None:
    run = write(tmp_path, "three", THREE, noise=1, extra={"baseline": True})
    write(run, "baseline", [1.0])
    answers, notes = answers_of(find_runs(tmp_path))
    one = next(a for a in answers if (a.question, a.difference.measure) == (EQUAL_EPOCHS, ALL))
    expected = records(run)["robust"] - records(run / "baseline")["robust"]
    assert one.difference.comparison.difference == pytest.approx(expected.mean())
    assert notes == []


def test_repetitions_of_one_seed_are_told(tmp_path: Path) -> None:
    write(tmp_path, "a", THREE)
    write(tmp_path, "b", THREE, noise=1)
    _, notes = answers_of(find_runs(tmp_path))
    assert len(notes) == 1
    assert "repeats setting and seed" in notes[0]


def test_runs_on_other_images_are_not_compared(study: Path) -> None:
    other = records(study / "two")
    np.savez(study / "two" / "records.npz", **{**other, "labels": other["labels"][::-1]})
    answers, notes = answers_of(find_runs(study))
    assert not [a for a in answers if a.first == "AT, L = 2, oracle" and a.question == EQUAL_EPOCHS]
    assert any("AT, L = 2, oracle and AT, L = 1, seed 0: measured on other images" in note for note in notes)
    # Seeds that were measured on different images have no mean.
    for name in ("one", "three"):
        arrays = records(study / f"{name},seed=1")
        np.savez(study / f"{name},seed=1" / "records.npz", **{**arrays, "labels": arrays["labels"][::-1]})
    answers, notes = answers_of(find_runs(study))
    seeds = {a.difference.seeds for a in answers if (a.question, a.first) == (EQUAL_EPOCHS, "AT, L = 3, oracle")}
    assert seeds == {(0,)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {**a, "robust": 0.5 * a["robust"]}, "does not match the results.json"),
        (lambda a: {**a, "robust": np.where(np.arange(COUNT) == 3, np.nan, a["robust"])}, "one finite number"),
        (lambda a: {**a, "attack/pgd-20": a["clean"] * np.nan}, "one finite number"),
        (lambda a: {**a, "attack/pgd-20": a["clean"].astype(str)}, ""),
        (lambda a: {**a, "attack/pgd-20": np.array(["x"] * COUNT)}, "not numeric"),
        (lambda a: {**a, "clean": a["clean"][:, None]}, "one finite number"),
        (lambda a: {key: value[..., :1] for key, value in a.items()}, "fewer than two images"),
        (lambda a: {key: value[..., :0] for key, value in a.items()}, "fewer than two images"),
        (lambda a: {"labels": a["labels"]}, "has no 'robust'"),
        (lambda a: {**a, "members_robust": a["members_robust"][:0]}, ""),
    ],
)
def test_damaged_records_are_told_and_cost_nothing_else(study: Path, change: Any, said: str) -> None:
    arrays = records(study / "three,seed=0")
    np.savez(study / "three,seed=0" / "records.npz", **change(arrays))
    answers, notes = answers_of(find_runs(study))
    assert [said in note for note in notes] == [True] * bool(said)
    assert any(a.difference.seeds == (1,) and a.first == "AT, L = 3, oracle" for a in answers)
    look_at(study)


@pytest.mark.parametrize(
    "changes",
    [
        {"L": 0},
        {"L": None, "config": {}},
        {"L": 100000},
        {"weights": [None, 0.5, 0.5]},
        {"weights": ["a"]},
        {"weights": [[1.0]]},
        {"weights": {}},
        {"members": []},
        {"config": {"schedule": 3, "loss": [1], "lambda_solver": None, "L": 3}},
        {"attacks": [1]},
        {"attacks": {"pgd-20": 3}},
        {"seed": None},
        {"robust": {"expected_accuracy": math.nan}},
        {"clean": None},
        {"data": None, "device": 3},
    ],
)
def test_no_damaged_results_keep_the_others_from_being_reported(study: Path, changes: dict[str, Any]) -> None:
    path = study / "three,seed=0" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    look_at(study)
    answers, _ = answers_of(find_runs(study))
    assert any(a.difference.seeds == (1,) and a.first == "AT, L = 3, oracle" for a in answers)


def test_histories_of_killed_runs_are_drawn_as_far_as_they_go(study: Path) -> None:
    path = study / "three,seed=0"
    for name in ("results.json", "records.npz", "DONE"):
        (path / name).unlink()
    lines = (path / "metrics.csv").read_text().splitlines(keepends=True)
    (path / "metrics.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in lines[:4]))
    config = json.loads((study / "three,seed=1" / "results.json").read_text())["config"]
    (path / "config.yaml").write_text(json.dumps({**config, "seed": 0, "eps": 8 / 255}))
    groups = grouped(find_runs(study))
    at = figures.training_figure(groups, figures.validation_curves(groups)).axes[0]
    line = next(line for line in at.lines if line.get_label() == "L = 3, oracle (2 seeds)")
    means = [np.mean([0.2 + 0.01 * t + 0.001 * noise for noise in ((20, 21) if t < 4 else (21,))]) for t in range(1, 7)]
    np.testing.assert_allclose(line.get_ydata(), means)
    look_at(study)


def test_settings_leave_out_what_changes_no_number(tmp_path: Path) -> None:
    aside = {"compile": True, "name": "x", "trainer": {"enable_progress_bar": False}, "baseline": True, "logger": {}}
    a = read_run(write(tmp_path, "a", TWO, seed=0))
    b = read_run(write(tmp_path, "b", TWO, seed=5, noise=3, extra=aside))
    assert setting_of(a) == setting_of(b)
    others = {"solver": "entropic", "kind": "sampled", "epochs": 7, "rate": 0.3, "loss": "TRADES"}
    changed = [read_run(write(tmp_path, key, TWO, **{key: value})) for key, value in others.items()]  # type: ignore[arg-type]
    settings = [setting_of(run) for run in (a, *changed)]
    assert len(set(settings)) == 1 + len(others)
    names = names_of(settings)
    assert len(set(names.values())) == len(settings)
    assert names[settings[1]] == "AT, L = 2, entropic, optimizer.lr=0.1"
    # One model has no weights to learn: solver and schedule do not tell it from another.
    one = read_run(write(tmp_path, "one", [1.0], solver="oracle", kind="shared"))
    same = read_run(write(tmp_path, "same", [1.0], solver="uniform", kind="sampled"))
    assert setting_of(one) == setting_of(same)
    assert names_of([setting_of(one)]) == {setting_of(one): "L = 1"}


def test_figures_hold_the_numbers_of_the_files(study: Path) -> None:
    runs = find_runs(study)
    groups = grouped(runs)
    assert figures.headline(groups) == "Digits · ℓ∞, ε = 8/255"
    figure = figures.accuracy_figure(groups, figures.accuracies_on_test(groups))
    axes = {str(a.get_label()): a for a in figure.axes}
    assert list(axes) == [CLEAN, PGD, APGD, ALL]
    for measure, panel in axes.items():
        lines = {str(line.get_label()): line for line in panel.lines if not str(line.get_label()).startswith("_")}
        of_line = {
            "AT, one model": {1: ["one,seed=0", "one,seed=1"]},
            "AT, one model, 18 epochs": {1: ["one,18,seed=0", "one,18,seed=1"]},
            "AT, oracle": {2: ["two"], 3: ["three,seed=0", "three,seed=1"]},
            "AT, oracle, sampled": {2: ["two,sampled"]},
            "AT, uniform": {3: ["three,uniform"]},
            "AT, uniform, sampled": {3: ["three,sampled"]},
            "TRADES, one model": {1: ["trades,one"]},
            "TRADES, oracle": {3: ["trades,three"]},
            "apart": {3: ["apart"]},
        }
        assert set(lines) == set(of_line)
        for label, by_size in of_line.items():
            found = {
                name: measured(read_run(study / name)).accuracies[measure]
                for name in itertools.chain(*by_size.values())
            }
            means = [np.mean([found[name].mean() for name in same]) for same in by_size.values()]
            np.testing.assert_allclose(lines[label].get_ydata(), means)
            np.testing.assert_allclose(lines[label].get_xdata(), list(by_size), atol=0.25)

    figure = figures.training_figure(groups, figures.validation_curves(groups))
    at, trades = figure.axes
    assert (at.get_title(), trades.get_title()) == ("AT", "TRADES")
    line = next(line for line in at.lines if line.get_label() == "L = 3, oracle (2 seeds)")
    np.testing.assert_allclose(line.get_xdata(), range(1, 7))
    np.testing.assert_allclose(line.get_ydata(), 0.2 + 0.01 * np.arange(1, 7) + 0.001 * 20.5)
    assert "trainings of 18 epochs are not shown" in " ".join(text.get_text() for text in figure.texts)

    figure = figures.weights_figure(groups, figures.learned_weights(groups))
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["AT, L = 2, oracle", "AT, L = 2, oracle, sampled", "AT, L = 3, oracle", "TRADES, L = 3, oracle"]
    three = figure.axes[2]
    assert sorted({float(line.get_ydata()[-1]) for line in three.lines[:-1]}) == sorted(THREE)

    figure = figures.cost_figure(groups, figures.timed_runs(groups))
    cost = figure.axes[0]
    labels = [tick.get_text() for tick in cost.get_yticklabels()]
    widths = dict(zip(labels, [bar.get_width() for bar in cost.patches], strict=True))
    assert widths["AT, L = 3, oracle"] == pytest.approx(7 * 6)
    assert widths["AT, L = 1, 18 epochs"] == pytest.approx(7 * 18)
    assert "apart" not in labels


def test_the_report_of_a_study(study: Path) -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    assert report(study, console) == [study / "report.png", study / "report.csv"]
    names = ["accuracy.png", "training.png", "weights.png", "cost.png", "differences.csv"]
    assert figures.main(study, console) == [study / name for name in names]
    text = " ".join(console.export_text().split())
    assert "mixture or one model of L times the epochs" in text
    with open(study / "differences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    answers, _ = answers_of(find_runs(study))
    assert len(rows) == len(answers)
    for row, (question, first, second, one) in zip(rows, answers, strict=True):
        assert (row["question"], row["first"], row["second"]) == (question, first, second)
        assert (row["measure"], row["verdict"]) == (one.measure, one.verdict)
        assert float(row["difference"]) == one.comparison.difference
        assert row["seeds"] == " ".join(map(str, one.seeds))
    with open(study / "report.csv", newline="") as file:
        of_runs = {row["run"]: row for row in csv.DictReader(file) if row["who"] == "mixture"}
    three = measured(read_run(study / "three,seed=1")).accuracies
    row = of_runs["three,seed=1"]
    assert (row["schedule"], float(row["epochs"]), float(row["train_seconds"])) == ("shared", 6, 7 * 6 * 3)
    for key, measure in (("pgd_20", PGD), ("apgd", APGD), ("robust", ALL), ("matching_penny_gap", GAP)):
        assert float(row[key]) == pytest.approx(three[measure].mean())


def test_the_figure_of_runs_of_one_eps_is_over_their_sizes(study: Path) -> None:
    robust = sweep_figure(find_runs(study)).axes[1]
    assert (robust.get_label(), robust.get_xlabel()) == ("robust 0", "L (number of members)")
    assert [tick.get_text() for tick in robust.get_xticklabels()] == ["1", "2", "3"]
    lines = {str(line.get_label()): line for line in robust.lines}
    line = lines["AT, oracle, schedule.kind=shared, trainer.max_epochs=6 (1–2 seeds)"]
    means = [
        np.mean([records(study / name)["robust"].mean() for name in names])
        for names in (("one,seed=0", "one,seed=1"), ("two",), ("three,seed=0", "three,seed=1"))
    ]
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3], atol=0.08)  # beside the other lines
    np.testing.assert_allclose(line.get_ydata(), means)
    assert lines["evaluate"].get_ydata() == pytest.approx([records(study / "apart")["robust"].mean()])


def test_a_study_that_has_only_begun_is_reported_too(study: Path) -> None:
    for path, name in itertools.product(study.iterdir(), ("results.json", "records.npz", "DONE")):
        (path / name).unlink()
    (study / "one,seed=0" / "config.yaml").write_text("L: 1\neps: 8/255\n")
    console = Console(width=170, file=io.StringIO())
    assert [path.name for path in [*report(study, console), *figures.main(study, console)]] == [
        "report.csv",
        "training.png",
    ]


def test_the_table_of_differences_shows_the_mean_over_seeds(study: Path) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    answers, _ = answers_of(find_runs(study))
    console.print(on_console(figures.answers_table(answers)))
    lines = [line for line in console.export_text().splitlines() if "0, 1" in line]
    chosen = [a.difference for a in answers if a.difference.measure == ALL and a.difference.seeds == (0, 1)]
    for line, answer in zip(lines, chosen, strict=True):
        points, low, high = answer.comparison.in_points()
        assert f"{points} [{low}, {high}]" in line
        assert answer.verdict in line


def test_no_column_of_the_differences_is_lost_on_a_narrow_console(study: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    figures.main(study, console)
    text = console.export_text()
    for heading in ("question", "first minus second", "seeds", "PGD-20", "all points", "members + gap", "ahead"):
        assert heading in text
    assert "L = 3, oracle" in text


STORED = sorted(path.parent for path in (Path(__file__).resolve().parents[1] / "results").glob("*/report.csv"))


@pytest.mark.parametrize("root", STORED, ids=lambda root: root.name)
def test_stored_tables_are_those_of_the_stored_runs(root: Path, tmp_path: Path) -> None:
    """results/NAME is what task=report and studies/figures.py make of the per-run files beside it."""
    runs = find_runs(root)
    assert all(run.state == "done" and not run.notes for run in runs)
    answers, notes = answers_of(runs)
    assert notes == []
    write_table_csv(runs, tmp_path / "report.csv")
    figures.write_answers(answers, tmp_path / "differences.csv")
    for name in ("report.csv", "differences.csv"):
        made, stored = ([*csv.reader((folder / name).read_text().splitlines())] for folder in (tmp_path, root))
        assert len(made) == len(stored)
        for ours, theirs in zip(made, stored, strict=True):
            # The last digit of a mean is the processor's own.
            for cell, kept in zip(ours, theirs, strict=True):
                value = number(cell)
                assert cell == kept if value is None else value == pytest.approx(number(kept), abs=1e-12)
