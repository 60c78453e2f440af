"""The report wing, on run directories written by hand (asymmetric numbers, L = 3)."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mixadv.errors import UserError
from mixadv.report import (
    draw_curves,
    draw_sweep,
    find_runs,
    read_run,
    report,
    show_run,
    sweep_tables,
    write_table_csv,
)
from mixadv.report.cells import print_narrow
from mixadv.report.compare import compare_with_baseline, compare_with_best_member, counterpart_sentences
from mixadv.report.figures.curves import curves_figure
from mixadv.report.figures.style import member_style, running_mean
from mixadv.report.figures.sweep import sweep_figure
from mixadv.report.names import format_eps, group_name, number
from mixadv.report.tables import run_table
from mixadv.results import to_json
from oracles_intervals import paired_interval_by_weights
from trained_run import WEIGHTS, write_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "train" / "eps=8-255,L=3")
    write_run(path / "baseline", weights=[1.0], robust=0.42, clean=0.86, rows=30, noise=5)
    return path


@pytest.fixture
def sweep_dir(tmp_path: Path) -> Path:
    """3 eps x 2 L x 2 seeds, one failed and one unfinished; [0.1 stays below 0.05 in plain string order]."""
    root = tmp_path / "sweep"
    for i, eps in enumerate((0.05, 0.1, 0.2)):
        for size in (1, 3):
            for seed in (0, 1):
                path = root / f"eps={eps},L={size},seed={seed}"
                noise = 100 * i + 10 * size + seed
                robust = 0.75 - 1.8 * eps + 0.04 * size
                write_run(
                    path,
                    eps=eps,
                    weights=WEIGHTS if size == 3 else [1.0],
                    robust=robust,
                    rows=8,
                    seed=seed,
                    noise=noise,
                    settings={},
                )
                if size == 3:
                    write_run(
                        path / "baseline",
                        eps=eps,
                        weights=[1.0],
                        robust=robust - 0.06,
                        rows=8,
                        noise=noise + 1000,
                        settings={},
                    )
    write_run(root / "eps=10,L=3,seed=0", eps=10.0, state="FAILED", rows=5, settings={})
    write_run(root / "eps=0.4,L=3,seed=0", eps=0.4, state="", rows=5, settings={})
    return root


def recorder(width: int) -> Console:
    return Console(width=width, record=True, file=io.StringIO())


def load(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return dict(file)


def text_of(thing: Any, width: int = 200) -> str:
    console = recorder(width)
    console.print(thing)
    return console.export_text()


def tables_of(runs: Any, width: int = 200) -> str:
    console = recorder(width)
    for table in sweep_tables(runs):
        print_narrow(table, console)
    return console.export_text()


def edit_results(path: Path, **changes: Any) -> dict[str, Any]:
    file = path / "results.json"
    results = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(results))
    return results


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# Reading ----------------------------------------------------------------------------------------------------


def test_read_run_gives_back_what_the_files_hold(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert (run.state, run.reason, run.notes) == ("done", "", ())
    assert to_json(run.results) == json.loads((run_dir / "results.json").read_text())
    assert run.has_results
    assert (run.num_members, run.loss, run.solver, run.seed) == (3, "TRADES", "oracle", 0)
    assert (run.data, run.norm, run.eps) == ("Digits", "linf", 8 / 255)
    expected = rows_of(run_dir / "metrics.csv")
    assert list(run.history) == list(expected[0])
    for name, column in run.history.items():
        texts = [row[name] for row in expected]
        assert np.isnan(column).tolist() == [text == "" for text in texts]
        assert [float(v) for v in column if not np.isnan(v)] == [float(t) for t in texts if t]
    assert np.isfinite(run.history["lambda/2"]).sum() == 13
    assert run.baseline is not None
    assert run.baseline.num_members == 1
    assert run.baseline.path == run_dir / "baseline"


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_last_line_without_its_end_is_ignored_even_if_it_reads_as_numbers(run_dir: Path, cut: int) -> None:
    whole = read_run(run_dir).history
    file = run_dir / "metrics.csv"
    file.write_bytes(file.read_bytes()[:-cut])
    torn = read_run(run_dir)
    assert torn.notes == ()
    assert len(torn.history["epoch"]) == len(whole["epoch"]) - 1
    assert all(np.array_equal(torn.history[k], whole[k][:-1], equal_nan=True) for k in whole)


def test_a_damaged_line_in_the_middle_is_reported_not_skipped(run_dir: Path) -> None:
    file = run_dir / "metrics.csv"
    lines = file.read_text().splitlines(keepends=True)
    lines[7] = "1.0,x\n"
    file.write_text("".join(lines))
    run = read_run(run_dir)
    assert run.history == {}
    assert len(run.notes) == 1
    assert "metrics.csv" in run.notes[0]
    assert "line 8 has 2 cells" in run.notes[0]
    assert "line 8 has 2 cells" in tables_of([run])
    with pytest.raises(UserError, match="nothing to draw"):
        draw_curves(run_dir)


def test_states(tmp_path: Path) -> None:
    failed = read_run(write_run(tmp_path / "a", state="FAILED"))
    assert (failed.state, failed.reason) == ("failed", "the loss became NaN in step 17")
    assert (failed.eps, failed.loss, failed.num_members) == (8 / 255, "TRADES", 3)  # from config.yaml
    unfinished = read_run(write_run(tmp_path / "b", state=""))
    assert (unfinished.state, unfinished.has_results) == ("unfinished", False)
    (write_run(tmp_path / "c") / "results.json").write_text('{"clean": ')
    damaged = read_run(tmp_path / "c")
    assert damaged.state == "failed"
    assert "results.json" in damaged.reason
    assert "results.json cannot be read" in damaged.notes[0]
    (tmp_path / "b" / "config.yaml").write_text("eps: [1, 2")
    assert "config.yaml cannot be read" in read_run(tmp_path / "b").notes[0]
    with pytest.raises(UserError, match="not a directory"):
        read_run(tmp_path / "absent")


def test_find_runs_in_natural_order_without_baselines_and_configuration(sweep_dir: Path) -> None:
    (sweep_dir / "conf").mkdir()
    (sweep_dir / "conf" / "config.yaml").write_text("defaults:\n  - data: digits\nL: 2\n")
    (sweep_dir / "eps=2,L=3,seed=0").mkdir()
    (sweep_dir / "eps=2,L=3,seed=0" / "config.yaml").write_text("eps: 2/255\n")  # killed before anything else
    (sweep_dir / ".hidden").mkdir()
    (sweep_dir / ".hidden" / "DONE").touch()
    names = [run.path.name for run in find_runs(sweep_dir)]
    grid = [f"eps={e},L={size},seed={s}" for e in ("0.05", "0.1", "0.2") for size in (1, 3) for s in (0, 1)]
    assert names == [*grid, "eps=0.4,L=3,seed=0", "eps=2,L=3,seed=0", "eps=10,L=3,seed=0"]
    assert find_runs(sweep_dir)[-2].eps == pytest.approx(2 / 255)
    assert [run.path for run in find_runs(sweep_dir / names[0])] == [sweep_dir / names[0]]


def test_baselines_are_no_runs_of_their_own_but_a_run_may_be_called_baseline(run_dir: Path) -> None:
    named = write_run(run_dir.parent / "baseline", rows=3)
    assert [run.path for run in find_runs(run_dir.parent)] == [named, run_dir]


def test_numbers_and_names() -> None:
    assert number("8/255") == 8 / 255
    assert number("0.031") == 0.031
    assert [number(v) for v in (None, True, math.nan, math.inf, "8px", "1/0", [1])] == [None] * 7
    values = (0.0, 8 / 255, 2 / 255, 0.5 / 255, 0.75 / 255, 0.0375, 0.15, 0.031, 51 / 255, 2.0, None)
    assert [format_eps(v) for v in values] == [
        *("0", "8/255", "2/255", "0.5/255", "0.75/255", "0.0375", "0.15", "0.031", "0.2", "2", "–")
    ]
    assert group_name({"_target_": "mixadv.lambda_solvers.LinearProgram"}) == "lp"
    assert group_name({"_target_": "elsewhere.Mine"}) == "Mine"
    assert group_name("trades") == "TRADES"


# Tables -----------------------------------------------------------------------------------------------------


def test_results_table_holds_the_numbers_of_the_files(run_dir: Path) -> None:
    results = json.loads((run_dir / "results.json").read_text())
    base = json.loads((run_dir / "baseline" / "results.json").read_text())
    text = text_of(run_table(read_run(run_dir)))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}

    def cells(values: dict[str, Any]) -> str:
        low, high = values["robust"]["ci95"]
        value = values["robust"]["expected_accuracy"]
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    assert cells(results) in lines["mixture"]
    assert f"{100 * results['clean']['expected_accuracy']:.1f}" in lines["mixture"]
    assert cells(base) in lines["baseline (one model)"]
    assert "85.8" in lines["ensemble accuracy"]
    for k, (member, weight) in enumerate(zip(results["members"], ("0.500", "0.200", "0.300"), strict=True)):
        assert f"{100 * member['clean']:.1f}" in lines[f"member {k}"]
        low, high = member["ci95"]
        expected = f"{100 * member['robust']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        assert expected in lines[f"member {k}"]
        assert weight in lines[f"member {k}"]
    for part in ("400 of 450 test images", "ε = 8/255", "L = 3", "TRADES", "oracle", "square (num_queries=500)"):
        assert part in text
    assert "pgd-20 (num_steps=20, restarts=5, objective=ExpectedLoss)" in " ".join(text.split())


def test_paired_difference_against_closed_form_and_bootstrap(run_dir: Path) -> None:
    a = load(run_dir / "records.npz")["robust"]
    b = load(run_dir / "baseline" / "records.npz")["robust"]
    result = compare_with_baseline(read_run(run_dir))
    assert result is not None
    assert result.paired
    assert (result.num_examples, result.note) == (400, "")
    assert result.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert (result.low, result.high) == pytest.approx(paired_interval_by_weights(a - b), abs=1e-12)
    assert result.num_differing == sum(x != y for x, y in zip(a, b, strict=True)) < 400
    draws = np.random.default_rng(3).integers(400, size=(4000, 400))
    low, high = np.quantile(a[draws].mean(1) - b[draws].mean(1), [0.025, 0.975])
    assert (result.low, result.high) == pytest.approx((low, high), abs=0.006)


def test_the_best_member_is_compared_on_the_same_images(run_dir: Path) -> None:
    file = run_dir / "records.npz"
    arrays = load(file)
    assert compare_with_best_member(read_run(run_dir)) is None
    draws = np.random.default_rng(8).random((3, 400))
    members = (draws < np.array([[0.3], [0.9], [0.6]])).astype(np.uint8)
    np.savez(file, **arrays, members_robust=members)
    found = compare_with_best_member(read_run(run_dir))
    assert found is not None
    best, how, result = found
    assert how == "chosen on the same images, which favours it"
    assert best == 1
    assert result.difference == pytest.approx(arrays["robust"].mean() - members[1].mean(), abs=1e-12)
    ends = paired_interval_by_weights(arrays["robust"] - members[1])
    assert (result.low, result.high) == pytest.approx(ends, abs=1e-12)
    (sentence,) = counterpart_sentences(read_run(run_dir))
    assert "member 1" in sentence
    assert "its best member alone is more robust than the mixture" in sentence


def test_unpaired_difference_when_records_cannot_be_paired(run_dir: Path) -> None:
    run = read_run(run_dir)
    assert run.baseline is not None
    file = run_dir / "baseline" / "records.npz"
    arrays = load(file)
    variances = [((r.robust.high - r.robust.low) / (2 * 1.96)) ** 2 for r in (run, run.baseline)]  # type: ignore[operator]
    expected = 1.96 * math.sqrt(sum(variances))

    def check(why: str) -> None:
        result = compare_with_baseline(read_run(run_dir))
        assert result is not None
        assert not result.paired
        assert why in result.note
        assert (result.high - result.low) / 2 == pytest.approx(expected, rel=1e-9)

    np.savez(file, **{**arrays, "labels": arrays["labels"][::-1]})
    check("different test images")
    np.savez(file, **{**arrays, "labels": arrays["labels"][:-1], "robust": arrays["robust"][:-1]})
    check("")
    np.savez(file, **{**arrays, "robust": arrays["robust"] * 0.9})
    check("does not match the results.json")
    np.savez(file, labels=arrays["labels"])
    check("has no 'robust'")
    file.write_bytes(b"PK\x03\x04 torn")
    check("cannot be read")
    file.unlink()
    check("missing")
    assert "unpaired, since" in " ".join(shown(run_dir).split())


def shown(path: Path) -> str:
    console = recorder(200)
    show_run(read_run(path), console)
    return console.export_text()


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(0.3, "is more robust"), (-0.3, "is less robust"), (0.0, "no difference is shown")],
)
def test_verdict(run_dir: Path, shift: float, verdict: str) -> None:
    for path, value in ((run_dir, 0.5 + shift / 2), (run_dir / "baseline", 0.5 - shift / 2)):
        (path / "records.npz").unlink()
        edit_results(path, robust={"expected_accuracy": value, "ci95": [value - 0.05, value + 0.05]})
    text = shown(run_dir)
    assert verdict in text
    assert f"{100 * shift:+.1f} points" in text


def test_show_run_says_what_is_wrong_and_where_the_files_are(tmp_path: Path, run_dir: Path) -> None:
    text = shown(run_dir)
    assert "Flag: black box: It beats white box." in text
    assert str(run_dir) in text.replace("\n", "")
    assert "train 131 s" in text
    assert "of 400 test images)" in text
    assert "loss became NaN in step 17" in shown(write_run(tmp_path / "[failed]", state="FAILED"))
    text = shown(write_run(tmp_path / "unfinished", state="", rows=16))
    assert "Unfinished after 8 epochs per model" in text
    assert compare_with_baseline(read_run(tmp_path / "unfinished")) is None


def test_sweep_table_and_csv_agree_with_the_files(sweep_dir: Path, tmp_path: Path) -> None:
    write_run(sweep_dir / "eps=0.1,L=2", eps=0.1, weights=[0.7, 0.3], settings={"solver": "entropic"}, seed=7)
    runs = find_runs(sweep_dir)
    path = write_table_csv(runs, tmp_path / "out.csv")
    rows = rows_of(path)
    lines = tables_of(runs).splitlines()
    assert len({(r["run"], r["who"]) for r in rows}) == len(rows)
    for run in runs:
        (line,) = (text for text in lines if text.strip().startswith(f"{run.path.name} "))
        assert run.state in line
        assert run.solver in line
        assert "TRADES" in line
        mine = {r["who"]: r for r in rows if r["run"] == run.path.name}
        assert mine["mixture"]["state"] == run.state
        assert float(mine["mixture"]["eps"]) == run.eps
        if not run.has_results:
            assert list(mine) == ["mixture"]
            assert mine["mixture"]["robust"] == ""
            continue
        robust = json.loads((run.path / "results.json").read_text())["robust"]
        assert float(mine["mixture"]["robust"]) == robust["expected_accuracy"]
        ends = [float(mine["mixture"][key]) for key in ("robust_low", "robust_high")]
        assert ends == robust["ci95"]
        assert float(mine["ensemble"]["clean"]) == 0.8575
        weights = [float(mine[f"member {k}"]["weight"]) for k in range(len(run.results.weights))]
        assert tuple(weights) == run.results.weights
        low, high = robust["ci95"]
        assert f"{100 * robust['expected_accuracy']:.1f}" in line
        assert f"{100 * low:.1f}–{100 * high:.1f}" in line
        assert " ".join(f"{w:.2f}" for w in weights) in line
        if run.baseline is not None:
            value = json.loads((run.path / "baseline" / "results.json").read_text())["robust"]
            assert float(mine["baseline"]["robust"]) == value["expected_accuracy"]
            assert f"{100 * value['expected_accuracy']:.1f}" in line
    failed = next(r for r in rows if r["state"] == "failed")
    assert failed["reason"] == "the loss became NaN in step 17"


def test_no_column_is_lost_on_a_narrow_console(sweep_dir: Path) -> None:
    for width in (40, 80, 120):
        words = tables_of(find_runs(sweep_dir), width).split()
        assert {"run", "ε", "L", "seed", "clean", "robust", "baseline", "λ"} <= set(words)
        assert words.count("done") == 12
        assert {"TRADES", "oracle"} <= set(words)  # shared by all runs, therefore in the caption


# Figures ----------------------------------------------------------------------------------------------------


def axes_of(figure: Any) -> dict[str, Any]:
    return {axes.get_label(): axes for axes in figure.axes}


def labelled(axes: Any) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.lines}


def test_curves_show_the_history(run_dir: Path) -> None:
    run = read_run(run_dir)
    axes = axes_of(curves_figure(run))
    lines = labelled(axes["accuracy"])
    for name, which in (("mixture", run), ("baseline", run.baseline)):
        for measure in ("clean", "robust"):
            assert which is not None
            keep = np.isfinite(which.history[f"val/{measure}_accuracy"])
            line = lines[f"{name}, {measure}"]
            assert line.get_xdata().tolist() == which.history["epoch"][keep].tolist()
            assert line.get_ydata().tolist() == which.history[f"val/{measure}_accuracy"][keep].tolist()
            assert line.get_linestyle() == ("-" if name == "mixture" else "--")
    assert lines["mixture, robust"].get_color() == lines["baseline, robust"].get_color()
    assert axes["accuracy"].get_ylim() == (0, 1)
    assert "per model" in axes["accuracy"].get_xlabel()

    lines = labelled(axes["lambda"])
    for k in range(3):
        column = run.history[f"lambda/{k}"]
        drawn = lines[f"member {k}"]
        assert drawn.get_ydata().tolist() == [*column[np.isfinite(column)], column[np.isfinite(column)][-1]]
        assert drawn.get_xdata()[-1] == run.history["epoch"][-1]
        assert drawn.get_drawstyle() == "steps-post"
    assert set(lines["1/L = 0.333"].get_ydata()) == {1 / 3}

    lines = labelled(axes["loss"])
    assert lines["training loss"].get_ydata().tolist() == run.history["train/loss"].tolist()
    assert len(lines["game value"].get_ydata()) == 13
    assert np.all(lines["its lower bound"].get_ydata() < lines["game value"].get_ydata())
    assert axes["loss"].get_ylim()[0] == 0


def test_curves_show_the_test_results_with_their_intervals(run_dir: Path) -> None:
    run = read_run(run_dir)
    figure = curves_figure(run)
    axes = axes_of(figure)["test"]
    bars = {container.get_label(): container for container in axes.containers}
    base = run.baseline
    assert base is not None
    for name, interval in (
        ("mixture clean", run.clean),
        ("mixture robust", run.robust),
        ("baseline robust", base.robust),
    ):
        point, _, (segments,) = bars[name]
        assert point.get_ydata().tolist() == [interval.value]
        (low, high) = segments.get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["mixture", "members", "baseline"]
    lines = labelled(axes)
    colours = labelled(axes_of(figure)["lambda"])
    for k, member in enumerate(run.results.members):
        assert lines[f"member {k} robust"].get_ydata().tolist() == [member.robust.value]
        assert lines[f"member {k} clean"].get_color() == colours[f"member {k}"].get_color()
    words = " ".join(text.get_text() for text in figure.texts)
    assert "worst case per image over pgd-20, square" in words
    assert "400 test images" in words
    title = figure.get_suptitle()
    assert title == "Digits · L = 3 · TRADES · oracle · ℓ∞, ε = 8/255"


def test_members_keep_distinct_looks() -> None:
    looks = {(style["color"], str(style["linestyle"])) for style in map(member_style, range(12))}
    assert len(looks) == 12


def test_curves_without_results_or_baseline(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", state="", rows=3))
    axes = axes_of(curves_figure(run))
    assert [text.get_text() for text in axes["test"].texts] == ["not\nevaluated\nyet"]
    assert not axes["accuracy"].lines
    single = read_run(write_run(tmp_path / "one", weights=[1.0]))
    assert "model, robust" in labelled(axes_of(curves_figure(single))["accuracy"])


def test_long_histories_are_smoothed_over_the_raw_line(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", rows=300))
    lines = labelled(axes_of(curves_figure(run))["loss"])
    raw = lines["_train/loss raw"]
    smooth = lines["training loss (mean of 12)"]
    assert raw.get_ydata().tolist() == run.history["train/loss"].tolist()
    assert raw.get_alpha() < 0.5
    assert np.diff(smooth.get_ydata()).std() < np.diff(raw.get_ydata()).std() / 3


def test_running_mean_against_brute_force() -> None:
    values = np.array([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.5])
    for window in (1, 2, 3, 4, 7):
        below = window // 2
        brute = [values[max(i - below, 0) : i - below + window].mean() for i in range(7)]
        np.testing.assert_allclose(running_mean(values, window), brute, atol=1e-12)


@pytest.mark.parametrize("size", [3, 10])
def test_nothing_overlaps_or_leaves_the_figure(tmp_path: Path, size: int) -> None:
    import matplotlib

    from mixadv.report.figures.style import STYLE

    path = write_run(tmp_path / "r", weights=[1 / size] * size, rows=120)
    if size > 1:
        write_run(path / "baseline", weights=[1.0])
    with matplotlib.rc_context(STYLE):
        figure = curves_figure(read_run(path))
        figure.canvas.draw()
        legends = [legend.get_window_extent() for legend in figure.legends]
        texts = [text.get_window_extent() for text in figure.texts]
        for axes in figure.axes:
            low, high = axes.get_xlim()
            ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            labels = [label for at, label in ticks if low <= at <= high]
            labels += [label for label in (axes.xaxis.label, axes.yaxis.label, axes.title) if label.get_text()]
            texts += [label.get_window_extent() for label in labels]
        panels = [axes.get_window_extent() for axes in figure.axes]
        page = figure.bbox
    assert len(legends) == 3
    for i, box in enumerate([*legends, *texts, *panels]):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        others = [*legends[:i], *texts, *panels] if i < len(legends) else []
        assert not [other for other in others if other.overlaps(box)]


def test_sweep_lines_are_seed_means_with_min_max_bands(sweep_dir: Path) -> None:
    runs = find_runs(sweep_dir)
    figure = sweep_figure(runs)
    axes = axes_of(figure)
    for measure in ("clean", "robust"):
        panel = axes[f"{measure} 0"]
        lines = labelled(panel)
        bands = iter(panel.collections)
        for size in (1, 3):
            line = lines[f"L = {size}, TRADES, oracle (2 seeds)"]
            values = []
            for eps in (0.05, 0.1, 0.2):
                paths = [sweep_dir / f"eps={eps},L={size},seed={s}" / "results.json" for s in (0, 1)]
                values.append([json.loads(p.read_text())[measure]["expected_accuracy"] for p in paths])
            np.testing.assert_allclose(line.get_xdata(), [0.05, 0.1, 0.2], atol=0.002)
            np.testing.assert_allclose(line.get_ydata(), np.mean(values, axis=1))
            corners = next(bands).get_paths()[0].vertices
            for x, seeds in zip((0.05, 0.1, 0.2), values, strict=True):
                at = corners[np.isclose(corners[:, 0], x, atol=0.002), 1]
                assert (at.min(), at.max()) == pytest.approx((min(seeds), max(seeds)))
        assert [name for name in lines if name.startswith("_baseline")] == ["_baseline 1"]
        assert panel.get_ylim() == (0, 1)
    base = [
        np.mean([json.loads(p.read_text())["robust"]["expected_accuracy"] for p in paths])
        for eps in (0.05, 0.1, 0.2)
        if (paths := [sweep_dir / f"eps={eps},L=3,seed={s}" / "baseline" / "results.json" for s in (0, 1)])
    ]
    np.testing.assert_allclose(labelled(axes["robust 0"])["_baseline 1"].get_ydata(), base)
    assert [tick.get_text() for tick in axes["robust 0"].get_xticklabels()] == ["0.05", "0.1", "0.2"]
    assert "2 of 14 runs have no results" in " ".join(" ".join(t.get_text() for t in figure.texts).split())


def test_sweep_does_not_average_over_settings_other_than_the_seed(tmp_path: Path) -> None:
    for eps in (2 / 255, 8 / 255):
        for width in (16, 32):
            for seed in (0, 1):
                name = f"eps={round(eps * 255)}-255,width={width},seed={seed}"
                settings = {"model": {"width": width, "cache": f"/tmp/{name}"}, "name": name}
                write_run(tmp_path / name, eps=eps, rows=0, settings=settings, seed=seed, noise=width + seed)
    runs = find_runs(tmp_path)
    axes = axes_of(sweep_figure(runs))["clean 0"]
    assert {name for name in labelled(axes) if name[0] != "_"} == {
        "L = 3, TRADES, oracle, model.width=16 (2 seeds)",
        "L = 3, TRADES, oracle, model.width=32 (2 seeds)",
    }
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2/255", "8/255"]


def write_mixed(root: Path) -> dict[str, Path]:
    """Two data sets, two norms, two protocols, five trainings that differ in five keys, and three tasks."""
    balls = {"a": {}, "b": {"threat_model": {"norm": "l2"}}, "c": {"data": {"name": "Squares"}}}
    paths = {}
    for name, settings in balls.items():
        for eps in (0.1, 0.25):
            path = write_run(root / f"{name},eps={eps}", eps=eps, rows=0, settings=settings, noise=int(100 * eps))
            edit_results(path, threat_model={"norm": "l2" if name == "b" else "linf", "eps": eps}, protocol="fast")
            if name == "c":
                edit_results(path, data={"name": "Squares", "num_test": 400})
            paths[path.name] = path
    for i in range(5):
        keys = {"lr": 0.1 * (i + 1), "momentum": 0.5 + 0.1 * i, "nesterov": i % 2, "decay": i, "dampening": i // 2}
        path = write_run(root / f"many{i}", eps=0.1, rows=0, settings={"optimizer": keys}, noise=i)
        paths[path.name] = path
        edit_results(path, protocol="fast")
    strict = edit_results(write_run(root / "strict", eps=0.1, rows=0), protocol="strict")
    edit_results(root / "strict", attacks={**strict["attacks"], "arc": {"expected_accuracy": 0.5, "settings": {}}})
    # Two measurements that have nothing in common but L and eps.
    for name in ("x", "y"):
        path = write_run(root / f"evaluate-{name}", eps=0.25, rows=0, noise=ord(name))
        config = {"task": "evaluate", "eps": 0.25, "mixture": f"outputs/{name}"}
        paths[path.name] = path
        edit_results(path, task="evaluate", protocol="fast", config=config)
    return paths


def test_only_runs_on_the_same_data_norm_and_attacks_share_a_panel(tmp_path: Path) -> None:
    write_mixed(tmp_path)
    figure = sweep_figure(find_runs(tmp_path))
    titles = [text.get_text() for text in figure.texts if "protocol" in text.get_text()]
    assert titles == [
        "Digits · ℓ2 · protocol fast",
        "Digits · ℓ∞ · protocol fast",
        "Digits · ℓ∞ · protocol strict",
        "Squares · ℓ∞ · protocol fast",
    ]
    assert sorted(axes_of(figure)) == [f"{name} {i}" for name in ("clean", "robust") for i in range(4)]
    lines = {name for name in labelled(axes_of(figure)["robust 0"]) if name[0] != "_"}
    assert lines == {"L = 3, TRADES, oracle"}
    mixed = {name for name in labelled(axes_of(figure)["robust 1"]) if name[0] != "_"}
    # Five trainings with own settings, one with two radii, and two measured mixtures that are not seeds of each other.
    assert len(mixed) == 8
    assert all("settings" in name for name in mixed)


def test_a_point_has_the_interval_of_its_results(tmp_path: Path) -> None:
    paths = write_mixed(tmp_path)
    axes = axes_of(sweep_figure(find_runs(tmp_path)))["robust 0"]
    drawn = sorted(tuple(line.get_ydata()) for line in axes.lines if line.get_label() == "_interval")
    known = [json.loads((paths[f"b,eps={eps}"] / "results.json").read_text())["robust"]["ci95"] for eps in (0.1, 0.25)]
    np.testing.assert_allclose(drawn, sorted(map(tuple, known)))


def test_the_report_of_a_mixed_tree_fits_80_columns(tmp_path: Path) -> None:
    paths = write_mixed(tmp_path)
    write_run(tmp_path / ("a-long-name-" * 5), state="FAILED")
    write_run(tmp_path / "unfinished", state="", rows=2)
    solver = {"solver": "entropic"}
    write_run(tmp_path / "five", eps=8 / 255, weights=[0.2] * 5, robust=0.7, settings=solver, seed=12345)
    write_run(tmp_path / "five" / "baseline", eps=8 / 255, weights=[1.0])
    edit_results(tmp_path / "five", protocol="fast", flags=[{"name": "a", "evidence": "b", "remedy": "c"}] * 12)
    console = recorder(80)
    report(tmp_path, console)
    text = console.export_text()
    tables = text[: text.index(str(tmp_path))]
    assert max(map(len, tables.splitlines())) <= 80
    words = " ".join(tables.split())
    for part in ("Digits · ℓ∞ · protocol fast", "flagged", "entropic", "12345", "8/255", "unfinished", "failed"):
        assert part in words
    # Every number in a legend is explained on the console and in report.csv.
    numbers = {int(at) for at in re.findall(r"settings (\d+)", tables)}
    assert numbers == set(range(1, 9))
    assert words.count("optimizer.momentum=0.7") == 1
    row = next(row for row in rows_of(tmp_path / "report.csv") if row["run"] == paths["many2"].name)
    assert re.fullmatch(r"settings \d: .*optimizer.momentum=0.7.*", row["differing"])


# The whole --------------------------------------------------------------------------------------------------


def test_report_of_one_run(run_dir: Path) -> None:
    console = recorder(120)
    (run_dir / "curves.png").write_text("old")
    assert report(run_dir.parent, console) == [run_dir / "curves.png", run_dir / "report.html"]
    assert (run_dir / "curves.png").read_bytes().startswith(PNG)
    assert "mixture" in console.export_text()
    assert not list(run_dir.glob(".*"))


def test_report_of_a_sweep(sweep_dir: Path) -> None:
    console = recorder(160)
    written = report(sweep_dir, console)
    assert written == [sweep_dir / "report.png", sweep_dir / "report.csv"]
    assert written[0].read_bytes().startswith(PNG)
    assert "14 runs" in console.export_text()


def test_report_of_runs_that_all_failed_still_tells_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, state="FAILED")
    console = recorder(160)
    assert report(tmp_path, console) == [tmp_path / "report.csv"]
    assert console.export_text().count("the loss became NaN") == 2
    with pytest.raises(UserError, match="none of the 2 runs"):
        draw_sweep(find_runs(tmp_path), tmp_path / "x.png")


def test_report_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no runs in .*results\.json, metrics\.csv"):
        report(tmp_path, Console(quiet=True))
    with pytest.raises(UserError, match="not a directory"):
        report(tmp_path / "absent", Console(quiet=True))


def test_a_place_that_cannot_be_written_is_named_and_the_old_file_kept(run_dir: Path) -> None:
    target = run_dir / "absent" / "x.csv"
    with pytest.raises(UserError, match=r"cannot write .*absent/x\.csv"):
        write_table_csv([read_run(run_dir)], target)
    (run_dir / "curves.png").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*curves\.png"):
        draw_curves(run_dir)
    assert not list(run_dir.glob(".curves*"))


def test_the_wing_needs_neither_torch_nor_pyplot(run_dir: Path) -> None:
    program = (
        "import sys\n"
        "from mixadv.report import report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from rich.console import Console\n"
        f"report({str(run_dir)!r}, Console(quiet=True))\n"
        "assert not {'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
    assert (run_dir / "curves.png").exists()
