"""Figures and the table per attack, on run directories written by hand (asymmetric numbers)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import same_color
from rich.console import Console
from scipy import stats

from evaluated_run import ATTACKS, MIXTURE_ONLY, write_evaluation
from mixadv.errors import UserError
from mixadv.report.attacks import attack_rows, attacks_table, classifiers, settings_text
from mixadv.report.cells import on_console, print_whole
from mixadv.report.figures.evaluation import (
    attacks_figure,
    eps_figure,
    eps_lines,
    evaluation_figures,
    steps_figure,
    steps_lines,
)
from mixadv.report.figures.examples import (
    Examples,
    amplification,
    examples_figure,
    printable,
    read_examples,
    wrong_members,
)
from mixadv.report.figures.style import STYLE, save
from mixadv.report.files import Run, read_run
from mixadv.results import Accuracy

EIGHT = (0.1, 0.2, 0.05, 0.15, 0.1, 0.1, 0.1, 0.2)
TWIN = "averaged twin"


@pytest.fixture
def evaluated(tmp_path: Path) -> tuple[Run, dict[str, Any]]:
    results = write_evaluation(tmp_path / "run")
    return read_run(tmp_path / "run"), results


def edit(run: Run, **changes: Any) -> Run:
    file = run.path / "results.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return read_run(run.path)


def axes_of(figure: Any, label: str) -> Any:
    (axes,) = [axes for axes in figure.axes if axes.get_label() == label]
    return axes


def line_of(axes: Any, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def text_of(run: Run, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_whole(on_console(attacks_table(run)), console)
    return console.export_text()


# Numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "count"), [(0, 40), (40, 40), (1, 3), (237, 400), (5173, 10_000)])
def test_intervals_are_wilsons(right: int, count: int) -> None:
    ci = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert Accuracy.of(right / count, count) == pytest.approx((right / count, ci.low, ci.high), abs=1e-12)


def test_no_interval_is_made_up() -> None:
    assert Accuracy.of(None, 10) == (None, None, None)
    assert Accuracy.of(0.3, None) == (0.3, None, None)
    assert Accuracy.of(0.3, 0) == (0.3, None, None)
    assert Accuracy.of(-0.1, 9) == (-0.1, None, None)


def test_a_curve_is_sorted_and_gaps_stay_gaps(evaluated: tuple[Run, dict[str, Any]]) -> None:
    run, _ = evaluated
    lines = {
        "mixture": [0.1, 0.9, None],
        "members": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "averaged_twin": [0.2, 0.8, 0.4],
    }
    run = edit(run, curves={"eps": {"eps": [0.2, 0, 0.1], **lines}})
    curve = eps_lines(run)
    assert curve is not None
    assert curve.x.tolist() == [0, 0.1, 0.2]
    assert list(curve.of) == ["mixture", "member 0", "member 1", "member 2", TWIN]
    np.testing.assert_array_equal(curve.of["mixture"], [0.9, np.nan, 0.1])
    assert curve.of["member 1"].tolist() == [5, 6, 4]
    assert curve.of[TWIN].tolist() == [0.8, 0.4, 0.2]
    assert steps_lines(run) is None


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ([], "curves.eps is not an object"),
        ({"eps": [0, 0.1], "mixture": [0.5]}, "curves.eps has 1 values of mixture at 2 points"),
        ({"eps": [0, 0.1], "mixture": [0.5, 0.4], "members": [[1, 1], [1]]}, "has 1 values of members[1] at 2 points"),
        ({"eps": [0, "x"]}, "curves.eps.eps[1] is not a finite number"),
        ({"eps": 3}, "curves.eps.eps is not a list"),
        ({"eps": [0.1], "mixture": 0.5}, "curves.eps.mixture is not a list"),
        ({"eps": [0.1], "members": {"0": [1]}}, "curves.eps.members is not a list"),
    ],
)
def test_a_damaged_curve_is_named(evaluated: tuple[Run, dict[str, Any]], entry: Any, match: str) -> None:
    run = edit(evaluated[0], curves={"eps": entry})
    (note,) = run.notes
    assert note.endswith(match)
    assert list(evaluation_figures(run, read_examples(run))) == ["attacks.png", "examples.png"]


def test_settings_in_words_and_seconds_of_all_passes(evaluated: tuple[Run, dict[str, Any]]) -> None:
    run = evaluated[0]
    assert settings_text(ATTACKS["pgd-20"]) == "PGD(num_steps=20, step_size=0.25, restarts=5)"
    assert settings_text(ATTACKS["apgd-ce"]) == "APGD(loss=ce)"
    assert settings_text({"num_queries": 5}) == "num_queries=5"
    assert settings_text(None) == ""
    times = [{"seconds": 3, "seconds_on_parts": 4.5}, {"seconds": 3}, {}]
    run = edit(run, attacks={str(i): entry for i, entry in enumerate(times)})
    assert [row.seconds for row in attack_rows(run)] == [7.5, 3, None]


# The table --------------------------------------------------------------------------------------------------


def test_the_table_holds_every_attack(evaluated: tuple[Run, dict[str, Any]]) -> None:
    run, results = evaluated
    lines = text_of(run).splitlines()
    for name, entry in results["attacks"].items():
        (line,) = [line for line in lines if line.strip("│┃ ").startswith(f"{name} ")]
        cells = [cell.strip() for cell in line.strip("│┃").split("│")]
        ci = stats.binomtest(round(400 * entry["expected_accuracy"]), 400).proportion_ci(method="wilson")
        assert cells[0] == name
        value, low, high = (float(part) for part in cells[1].replace("[", "").replace("]", "").replace(",", "").split())
        assert value == pytest.approx(100 * entry["expected_accuracy"], abs=0.051)
        assert (low, high) == pytest.approx((100 * ci.low, 100 * ci.high), abs=0.2)  # scipy takes whole successes only
        parts = [entry["replayed_from_parts"], entry["averaged_twin"]]
        assert [cells[2], cells[4]] == ["–" if v is None else f"{100 * v:.1f}" for v in parts]
        members = entry["members"]
        assert cells[3] == ("–" if members[0] is None else " ".join(f"{100 * v:.1f}" for v in members))
        assert cells[5] == str(entry["worst_found"])
        assert float(cells[6]) == pytest.approx(entry["seconds"] + entry["seconds_on_parts"], abs=0.051)
    (last,) = [line for line in lines if "all points found" in line]
    low, high = results["robust"]["ci95"]
    assert f"{100 * results['robust']['expected_accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in last
    assert " ".join(f"{100 * member['robust']:.1f}" for member in results["members"]) in last
    assert f"{100 * results['averaged_twin']['robust']:.1f}" in last


def test_the_table_of_one_model_has_no_parts(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", weights=(1.0,))
    text = text_of(read_run(tmp_path / "run"))
    assert "model %" in text
    assert not any(word in text for word in ("members", "mixture %", "parts %", "twin"))


# Figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.2, 0.3), EIGHT], ids=["three", "eight"])
def test_the_figure_of_attacks_shows_the_results(tmp_path: Path, weights: tuple[float, ...]) -> None:
    results = write_evaluation(tmp_path / "run", weights=weights)
    axes = axes_of(attacks_figure(read_run(tmp_path / "run")), "attacks")
    names = list(ATTACKS)
    assert [label.get_text() for label in axes.get_yticklabels()] == [*names, "all points found"]
    entries = [results["attacks"][name] for name in names]
    wanted = {"mixture": [*(e["expected_accuracy"] for e in entries), results["robust"]["expected_accuracy"]]}
    wanted[TWIN] = [*(e["averaged_twin"] for e in entries), results["averaged_twin"]["robust"]]
    for k, member in enumerate(results["members"]):
        wanted[f"member {k}"] = [*(e["members"][k] for e in entries), member["robust"]]
    for who, values in wanted.items():
        x, y = line_of(axes, who)
        rows = [row for row, value in enumerate(values) if value is not None]
        assert x.tolist() == [values[row] for row in rows]
        assert np.round(y).tolist() == rows
        assert (np.abs(y - rows) < 0.4).all()
    assert len(line_of(axes, TWIN)[0]) == len(names) - len(MIXTURE_ONLY) + 1
    bars = [line for line in axes.lines if line.get_label() == "_mixture"]
    assert len(bars) == len(names) + 1
    for bar, value in zip(bars, wanted["mixture"][:-1], strict=False):
        assert list(bar.get_xdata()) == pytest.approx(Accuracy.of(value, 400)[1:])
    assert list(bars[-1].get_xdata()) == results["robust"]["ci95"]
    (last_member,) = [line for line in axes.lines if line.get_label() == "_member 1"]
    assert list(last_member.get_xdata()) == results["members"][1]["ci95"]
    assert line_of(axes, "worst case")[0].tolist() == [results["robust"]["expected_accuracy"]] * 2
    (band,) = [patch for patch in axes.patches if patch.get_label() == "its 95 % interval"]
    assert [band.get_x(), band.get_x() + band.get_width()] == pytest.approx(results["robust"]["ci95"])


@pytest.mark.parametrize("weights", [(0.5, 0.2, 0.3), EIGHT], ids=["three", "eight"])
def test_the_lines_of_curves_are_those_of_the_results(tmp_path: Path, weights: tuple[float, ...]) -> None:
    results = write_evaluation(tmp_path / "run", weights=weights)
    run = read_run(tmp_path / "run")
    for name, lines_of, figure_of in (("eps", eps_lines, eps_figure), ("steps", steps_lines, steps_figure)):
        curve = lines_of(run)
        assert curve is not None
        axes, data = axes_of(figure_of(run, curve), name), results["curves"][name]
        lines = {"mixture": data["mixture"], TWIN: data["averaged_twin"]}
        lines |= {f"member {k}": values for k, values in enumerate(data["members"])}
        for who, values in lines.items():
            x, y = line_of(axes, who)
            assert x.tolist() == data[name]
            assert y.tolist() == values
        looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines[: len(lines)]]
        assert len(set(looks)) == len(lines)
        if name == "eps":
            assert line_of(axes, "ε = 8/255")[0].tolist() == [8 / 255] * 2
            vertices = axes.collections[0].get_paths()[0].vertices
            low, high = zip(*(Accuracy.of(v, 250)[1:] for v in data["mixture"]), strict=True)
            assert set(np.round(vertices[:, 1], 9)) == set(np.round([*low, *high], 9))
            assert [t.get_text() for t in axes.get_xticklabels()][:1] == ["0"]
        else:
            assert axes.get_xscale() == "symlog"
            assert [t.get_text() for t in axes.get_xticklabels()] == [f"{x:g}" for x in data["steps"]]


def test_one_model_is_drawn_once(tmp_path: Path) -> None:
    results = write_evaluation(tmp_path / "run", weights=(1.0,))
    run = read_run(tmp_path / "run")
    assert classifiers(run) == ["model"]
    axes = axes_of(attacks_figure(run), "attacks")
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["model", "worst case"]
    curve = eps_lines(run)
    assert curve is not None
    assert list(curve.of) == ["model"]
    assert curve.of["model"].tolist() == results["curves"]["eps"]["mixture"]


def test_same_colours_in_every_figure(evaluated: tuple[Run, dict[str, Any]]) -> None:
    run, _ = evaluated
    curve = eps_lines(run)
    assert curve is not None
    first, second = axes_of(attacks_figure(run), "attacks"), axes_of(eps_figure(run, curve), "eps")
    colours = []
    for who in ("mixture", "member 0", "member 1", "member 2", TWIN):
        (a,), (b,) = ([line for line in axes.lines if line.get_label() == who] for axes in (first, second))
        assert same_color(a.get_color(), b.get_color())
        assert a.get_marker() == b.get_marker()
        colours.append(a.get_color())
    assert len(set(colours)) == 5


def test_everything_written_lies_inside_the_figures(tmp_path: Path) -> None:
    results = write_evaluation(tmp_path / "run", weights=EIGHT, pictures=11)
    attacks = {f"{name}-of-a-very-long-name-{'x' * 40}": entry for name, entry in results["attacks"].items()}
    run = edit(read_run(tmp_path / "run"), attacks=attacks)
    with matplotlib.rc_context(STYLE):
        for name, build in evaluation_figures(run, read_examples(run)).items():
            figure = build()
            figure.canvas.draw()
            texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text()]
            boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
            for text, box in boxes:
                assert box.x0 >= -1, (name, text)
                assert box.x1 <= 1401, (name, text)
                assert box.y0 >= -1, (name, text)
                assert box.y1 <= figure.bbox.height + 1, (name, text)
            if name == "examples.png":
                below = [(text, box) for text, box in boxes if ("wrong" in text and "member" in text) or "\n" in text]
                for i, (text, box) in enumerate(below):
                    for other, at in below[i + 1 :]:
                        assert box.x1 <= at.x0 + 8 or at.x1 <= box.x0 + 8 or not box.overlaps(at), (text, other)


# Images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [8 / 255, np.float32(8 / 255), 0.5, 0.25, 0.0501, 1.0, 3e-4, 0.05, 0.024])
def test_the_amplification_is_the_largest_round_one_that_fits(largest: float) -> None:
    factors = sorted(step * 10.0**e for step in (1, 2, 5) for e in range(-3, 7))
    assert amplification(np.array([0.0, -largest])) == pytest.approx(
        max(f for f in factors if f * float(largest) <= 0.5 + 1e-6)
    )
    assert amplification(np.zeros(3)) == 1


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_the_grid_shows_the_images_of_the_file(tmp_path: Path, channels: int) -> None:
    write_evaluation(tmp_path / "run", channels=channels, pictures=9)
    run = read_run(tmp_path / "run")
    with np.load(run.path / "examples.npz") as file:
        data = dict(file)
    examples = read_examples(run)
    assert examples is not None
    figure = examples_figure(run, examples)
    assert len(figure.axes) == 27
    for i in range(9):
        shown = {n: axes_of(figure, f"{n} {i}").images[0].get_array() for n in ("clean", "attacked", "difference")}
        x, x_adv = (data[n][i].transpose(1, 2, 0).astype(np.float64) for n in ("x", "x_adv"))
        if channels == 1:
            x, x_adv = x[..., 0], x_adv[..., 0]
        np.testing.assert_array_equal(shown["clean"], x)
        np.testing.assert_array_equal(shown["attacked"], x_adv)
        np.testing.assert_allclose(shown["difference"], 0.5 + 10 * (x_adv - x), atol=1e-6)
        assert np.min(shown["difference"]) >= 0
        assert np.max(shown["difference"]) <= 1
        top = axes_of(figure, f"clean {i}").get_title().replace("\n", " ").rstrip("…")
        assert str(data["labels"][i]).startswith(top)
        below = axes_of(figure, f"difference {i}").get_xlabel().replace("\n", " ")
        wrong = [k for k in range(3) if not data["correct"][k, i]]
        words = {0: "all members right", 3: "all members wrong"}.get(len(wrong), f"wrong: {', '.join(map(str, wrong))}")
        assert below == f"{words} {data['found_by'][i]}"
    assert axes_of(figure, "difference 0").get_ylabel() == "difference\n× 10"
    assert axes_of(figure, "clean 8").get_position().y1 < axes_of(figure, "difference 0").get_position().y0


def test_who_is_wrong_in_words() -> None:
    assert wrong_members(np.array([True])) == "right"
    assert wrong_members(np.array([False])) == "wrong"
    assert wrong_members(np.array([False, True, False])) == "wrong: 0, 2"
    assert wrong_members(np.array([0, 0, 1, 0, 0, 0, 1, 0], dtype=bool)) == "all wrong but 2, 6"


def test_a_long_file_is_cut_and_says_so(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", pictures=30, channels=1)
    run = read_run(tmp_path / "run")
    examples = read_examples(run)
    assert examples is not None
    figure = examples_figure(run, examples)
    assert len(figure.axes) == 3 * 24
    assert any("first 24 of 30" in text.get_text() for text in figure.texts)


def damaged(arrays: dict[str, np.ndarray], **changes: Any) -> dict[str, np.ndarray]:
    return {name: value for name, value in {**arrays, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"correct": None}, "has no 'correct'"),
        ({"x": np.zeros((5, 4, 16, 16))}, "1 or 3 channels"),
        ({"x_adv": np.zeros((5, 3, 16, 15))}, "one shape"),
        ({"labels": np.array(["a"])}, "do not fit 5 images"),
        ({"correct": np.zeros((5, 3))}, "do not fit 5 images"),
        ({"x_adv": np.full((5, 3, 16, 16), np.nan)}, "finite"),
        ({"correct": np.full((3, 5), "x")}, "0 or 1"),
    ],
)
def test_damaged_examples_are_named(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    write_evaluation(tmp_path / "run")
    file = tmp_path / "run" / "examples.npz"
    with np.load(file) as raw:
        arrays = dict(raw)
    np.savez(file, **damaged(arrays, **change))
    with pytest.raises(ValueError, match=match):
        read_examples(read_run(tmp_path / "run"))


def test_no_examples_are_no_damage(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", pictures=0)
    run = read_run(tmp_path / "run")
    assert read_examples(run) is None
    empty = Examples(np.zeros((0, 3, 8, 8)), np.zeros((0, 3, 8, 8)), [], np.zeros((3, 0)), [])
    np.savez(run.path / "examples.npz", **empty._asdict())
    assert read_examples(run) is None


def test_text_that_cannot_be_shown_becomes_spaces() -> None:
    assert printable("a\x00b\nc\ud800d é") == "a b c d é"


# Files ------------------------------------------------------------------------------------------------------


def draw(path: Path) -> tuple[list[str], list[str]]:
    """Every figure that the run has, written beside its files; their names, and what is damaged."""
    run, examples, damage = read_run(path), None, []
    try:
        examples = read_examples(run)
    except ValueError as error:
        damage.append(str(error))
    figures = evaluation_figures(run, examples)
    return [save(build, path / name).name for name, build in figures.items()], [*run.notes, *damage]


def test_figures_show_what_the_files_hold(tmp_path: Path) -> None:
    from PIL import Image

    write_evaluation(tmp_path / "run", weights=(1.0,), pictures=2)
    names = ["attacks.png", "eps.png", "steps.png", "examples.png"]
    # Neither mathematics nor missing characters stop a drawing.
    run = edit(read_run(tmp_path / "run"), data={"name": "$\\frac{\x00 _$"}, threat_model={"norm": "$x$", "eps": 0.25})
    assert draw(run.path) == (names, [])
    for name in names:
        with Image.open(run.path / name) as image:
            image.load()
            assert image.size[0] == 1400
    assert not list(run.path.glob(".*"))


def test_what_is_missing_is_not_drawn_and_damage_is_told(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "run", pictures=0)
    run = read_run(tmp_path / "run")
    edit(run, curves=None)
    assert draw(run.path) == (["attacks.png"], [])
    edit(run, attacks={})
    assert draw(run.path) == ([], [])
    (run.path / "examples.npz").write_bytes(b"PK no archive")
    edit(
        run,
        curves={"eps": 3, "steps": {"steps": [0, 5], "mixture": [0.5, 0.7]}},
        attacks={"pgd-3": {"expected_accuracy": 0.5}},
    )
    drawn, (curves, examples) = draw(run.path)
    assert "curves.eps is not an object" in curves
    assert "examples.npz cannot be read" in examples
    assert drawn == ["attacks.png", "steps.png"]


def test_a_run_without_results_has_nothing_to_draw(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert draw(tmp_path / "run") == ([], [])
    with pytest.raises(UserError, match="not a directory"):
        draw(tmp_path / "absent")
