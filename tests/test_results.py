"""The type of results.json: what is written comes back, damage is named, and each file of a run is opened once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from conftest import TINY, Trained, run_command
from evaluated_run import known, write_evaluation
from mixadv import results as results_module
from mixadv.results import (
    Accuracy,
    AttackResult,
    ChosenCounterpart,
    Classifier,
    Counterparts,
    Flag,
    GameValue,
    Results,
    Solve,
    SolveRow,
    VoteCounterpart,
    from_json,
    read,
    to_json,
    write,
)
from trained_run import write_run

STORED = sorted((Path(__file__).resolve().parents[1] / "results" / "small").glob("*/results.json"))
FULL = Results(
    task="solve",
    seed=0,
    norm="linf",
    eps=0.1,
    L=2,
    weights=(0.25, 0.75),
    num_examples=8,
    clean=Accuracy.of(0.5, 8),
    ensemble_accuracy=0.625,
    attacks={"pgd-20": AttackResult(0.25, members=(0.5, None), settings={"num_steps": 20}), "arc": AttackResult()},
    robust=Accuracy.of(0.125, 8),
    averaged_twin=Classifier(0.625, Accuracy.of(0.25, 8)),
    members=(Classifier(0.5, Accuracy.of(0.0, 8), name="a"), Classifier(0.75, Accuracy(0.5))),
    counterparts=Counterparts(
        ChosenCounterpart(0.375, Accuracy.of(0.375, 8), 4),
        VoteCounterpart(0.5, Accuracy.of(0.25, 8), 0.35),
        best_member=ChosenCounterpart(0.75, Accuracy.of(0.0, 8), 0),
        chosen_on="20 validation images",
    ),
    game=GameValue(0.875, 0.75, 0.125, 0.0),
    flags=(Flag("zero-gradients", "0.9 of them", "Look."),),
    solve=Solve(rows=(SolveRow("a", (1.0, 0.0), test=Accuracy.of(0.25, 8)), SolveRow("optimal mixture"))),
    validation={"val/robust_accuracy": 0.5},
)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "results.json", FULL)
    assert read(tmp_path / "results.json") == (FULL, [])
    game = Results(task="game", played={"name": "motivating", "gap": "0"}, flags=())
    write(tmp_path / "results.json", game)
    assert json.loads((tmp_path / "results.json").read_text())["game"] == {"name": "motivating", "gap": "0"}
    assert read(tmp_path / "results.json") == (game, [])


def test_the_keys_on_disk_are_those_of_the_contract() -> None:
    content = to_json(FULL)
    low, high = stats.binomtest(1, 8).proportion_ci(method="wilson")
    assert content["robust"] == {"expected_accuracy": 0.125, "ci95": pytest.approx([low, high], abs=1e-12)}
    assert set(content["clean"]) == {"expected_accuracy", "ci95", "ensemble_accuracy"}
    assert content["threat_model"] == {"norm": "linf", "eps": 0.1}
    assert content["members"][1] == {"clean": 0.75, "robust": 0.5}
    assert content["attacks"]["arc"] == {"replayed_from_parts": None, "averaged_twin": None}
    assert content["attacks"]["pgd-20"]["expected_accuracy"] == 0.25
    assert content["solve"]["rows"][0]["test"]["accuracy"] == 0.25
    assert "weights" not in content["solve"]["rows"][1]
    # Unknown values have no keys; the commit is null where there is none.
    assert content["git"] is None
    assert not {"checks", "curves", "best_epoch", "played"} & set(content)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name[-40:])
def test_files_of_version_0_1_are_read_whole(path: Path) -> None:
    content = json.loads(path.read_text())
    results, problems = read(path)
    assert problems == []
    # Which repeated the weights; task=ceiling has no members.
    assert [member.pop("weight") for member in content.get("members", ())] == list(results.weights)
    assert known(to_json(results)) == known(content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"L": 1.5}, "L is not a whole number"),
        ({"L": True}, "L is not a whole number"),
        ({"task": 3}, "task is not text"),
        ({"robust": {"expected_accuracy": float("nan")}}, "robust.expected_accuracy is not a finite number"),
        ({"robust": {"expected_accuracy": 10**400}}, "robust.expected_accuracy is not a finite number"),
        ({"robust": 3}, "robust is not an object"),
        ({"robust": {"ci95": [0.1, 0.2, 0.3]}}, "robust.ci95 is not an interval in [0, 1]"),
        ({"robust": {"expected_accuracy": 7}}, "robust.expected_accuracy is not in [0, 1]"),
        ({"robust": {"ci95": [0.9, 0.1]}}, "robust.ci95 is not an interval in [0, 1]"),
        ({"weights": [5, -4]}, "weights are not a distribution"),
        ({"weights": [0.5, None]}, "weights[1] is not a finite number"),
        ({"weights": [0.5, 0.5], "members": [{}]}, "weights has 2 numbers for 1 members"),
        ({"members": [{}, "x"]}, "members[1] is not an object"),
        ({"attacks": {"arc": {"seconds": "x"}}}, "attacks.arc.seconds is not a finite number"),
        ({"curves": {"eps": {"eps": [0, 1], "mixture": [1]}}}, "curves.eps has 1 values of mixture at 2 points"),
        ({"solve": {"rows": [{"pool": []}]}}, "solve.rows[0].pool is not an object"),
        ({"flags": {}}, "flags is not a list"),
    ],
)
def test_damage_is_one_line_and_the_rest_is_kept(content: dict[str, Any], problem: str) -> None:
    results, problems = from_json({"seed": 7, "eps": 3, **content})
    assert problems == [problem]
    assert results.seed == 7
    # A second reading of what is left finds nothing wrong.
    again, none = from_json(to_json(results))
    assert (to_json(again), none) == (to_json(results), [])


@pytest.mark.parametrize("text", ["", "[]", "3", '{"L": '])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError):
        read(tmp_path / "results.json")


@pytest.mark.parametrize(("right", "count"), [(0, 40), (40, 40), (1, 3), (237, 400), (5173, 10_000)])
def test_an_accuracy_has_wilsons_interval(right: int, count: int) -> None:
    ci = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert Accuracy.of(right / count, count) == pytest.approx((right / count, ci.low, ci.high), abs=1e-12)


def test_a_new_column_of_the_results_is_one_entry_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the console, in report.csv and on the page."""
    from rich.console import Console

    from mixadv.report import find_runs, tables, write_report, write_table_csv
    from mixadv.report.cells import Column

    new = Column("lost", "lost %", lambda line: _lost(line), ".1%", views="run csv")
    monkeypatch.setattr(tables, "RESULTS", (*tables.RESULTS, new))
    content = write_evaluation(tmp_path / "run", pictures=0)
    lost = content["clean"]["expected_accuracy"] - content["robust"]["expected_accuracy"]
    (run,) = find_runs(tmp_path)
    console = Console(width=200, record=True)
    with console.capture() as shown:
        console.print(tables.run_table(run))
    page = write_report(run).read_text()
    table = write_table_csv([run], tmp_path / "report.csv").read_text().splitlines()
    assert "lost %" in shown.get()
    assert f"{100 * lost:.1f}" in shown.get()
    assert f'<data value="{lost!r}">{100 * lost:.1f}</data>' in page
    assert table[0].endswith(",lost")
    assert table[1].endswith(f",{lost!r}")


def _lost(line: Any) -> float | None:
    clean, robust = line.clean.value, line.robust.value
    return None if clean is None or robust is None else clean - robust


COUNTING = """
import sys
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and "r" in str(arguments[1]):
        opened.append(arguments[0])
sys.addaudithook(hook)
if "=" in sys.argv[-1]:
    from mixadv.main import main
    main()
else:
    from mixadv.report import report
    from rich.console import Console
    report(sys.argv[1], Console(quiet=True))
print(*opened, sep="\\n")
"""
FILES = ("results.json", "metrics.csv", "records.npz", "examples.npz", "game.npz", "DONE", "config.yaml")


def opens(root: Path, *argv: object, cwd: Path | None = None) -> Counter[str]:
    """How often each of `FILES` below `root` is opened for reading by a report of `root`, or by a command."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, *(argv or (root,))], capture_output=True, text=True, check=True, cwd=cwd
    )
    lines = map(Path, done.stdout.splitlines())
    return Counter(str(line.relative_to(root)) for line in lines if line.name in FILES and line.is_relative_to(root))


@pytest.mark.parametrize("kind", ["one", "many"])
def test_a_report_opens_each_file_once(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "runs"
    for name in ("a",) if kind == "one" else ("a", "b"):
        path = write_run(root / name, weights=[0.5, 0.2, 0.3])
        write_run(path / "baseline", weights=[1.0], robust=0.42, noise=5)
        members = np.random.default_rng(0).random((3, 400)) < 0.4
        with np.load(path / "records.npz") as file:
            np.savez(path / "records.npz", **{**file, "members_robust": members})
    counts = opens(root)
    assert {f"a/{name}" for name in FILES[:3]} <= set(counts)
    # A table of many runs needs no records of baselines.
    assert {f"a/baseline/{name}" for name in (FILES[:3] if kind == "one" else FILES[:2])} <= set(counts)
    assert set(counts.values()) == {1}


def test_the_report_of_a_game_opens_each_file_once(tmp_path: Path) -> None:
    assert run_command(tmp_path, "task=game", "game.num_steps=5", "name=one").rc == 0
    counts = opens(tmp_path / "outputs" / "game" / "one")
    assert counts["results.json"] == counts["game.npz"] == 1


def test_the_page_and_the_table_of_an_evaluation_share_what_is_read(trained: Trained, tmp_path: Path) -> None:
    attacks = [text for text in TINY if text.startswith("protocol.attacks")]
    argv = (
        "task=evaluate",
        f"mixture={trained.path}",
        "data.num_test=20",
        "protocol.diagnosed=0",
        *attacks,
        "name=one",
    )
    counts = opens(tmp_path / "outputs" / "evaluate" / "one", *argv, cwd=tmp_path)
    assert counts["records.npz"] == counts["examples.npz"] == 1
    assert counts["results.json"] == 1


def test_the_types_need_neither_torch_nor_rich() -> None:
    program = "import sys, mixadv.results; print({'torch', 'pytorch_lightning', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_schema_is_named() -> None:
    assert to_json(Results()) == {"schema": results_module.SCHEMA, "git": None}
