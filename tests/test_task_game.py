"""`task=game`: its files, its figures, its refusals, and how reports take its runs."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from conftest import run_command
from mixadv.errors import UserError
from mixadv.games.gaussians import Gaussians
from mixadv.games.motivating import Motivating
from mixadv.report.figures.games import draw_game
from mixadv.report.files import read_run
from mixadv.report.game_tables import games_table, is_game, print_game
from mixadv.tasks import game as task

FILES = {"DONE", "config.yaml", "game.npz", "game.png", "mixadv.log", "results.json"}
KEYS = {"schema", "task", "seed", "device", "versions", "git", "config", "game", "flags", "seconds"}
SMALL = (
    "task=game",
    "game=gaussians",
    "game.eps=[0,1/2,2.5]",
    "game.draws=2",
    "game.num_points=120",
    "game.num_classifiers=4",
    "game.alphas=[0.1,0.02]",
    "game.num_steps=40",
)


def read(path):
    return json.loads((path / "results.json").read_text())


def stamps(path):
    return {entry.name: entry.stat().st_mtime_ns for entry in path.iterdir()}


@pytest.fixture(scope="module")
def motivating(tmp_path_factory):
    """The motivating game as shipped. Shared: look, do not touch."""
    cwd = tmp_path_factory.mktemp("motivating")
    finished = run_command(cwd, "task=game", "game=motivating")
    assert finished.rc == 0, finished.err
    return cwd / "outputs" / "game" / "game=motivating", finished


@pytest.fixture(scope="module")
def gaussians(tmp_path_factory):
    """A small game on Gaussians. Shared: look, do not touch."""
    cwd = tmp_path_factory.mktemp("gaussians")
    finished = run_command(cwd, *SMALL, "seed=4", "name=small")
    assert finished.rc == 0, finished.err
    return cwd / "outputs" / "game" / "small", finished


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of a small game's time."""
    monkeypatch.setattr(task, "draw_game", lambda run: (run.path / "game.png").touch())


def axes_with_ink(path, boxes):
    """Standard deviation of the grey levels inside each box (left, bottom, width, height) of the figure."""
    from matplotlib.image import imread

    image = imread(path)[..., :3].mean(-1)
    height, width = image.shape
    found = []
    for left, bottom, wide, high in boxes:
        rows = slice(int(height * (1 - bottom - high)), int(height * (1 - bottom)))
        found.append(image[rows, int(width * left) : int(width * (left + wide))].std())
    return found


# --- the motivating example --------------------------------------------------------------------------------


def test_the_motivating_game_leaves_its_files(motivating):
    path, finished = motivating
    assert {entry.name for entry in path.iterdir()} == FILES
    results = read(path)
    assert set(results) == KEYS
    assert (results["task"], results["seed"]) == ("game", 0)
    assert results["config"]["game"] == {
        "_target_": "mixadv.games.motivating.Motivating",
        "eps": "1/2",
        "alpha": 0.01,
        "num_steps": 1000,
    }
    assert {"torch", "scipy", "mixadv"} <= set(results["versions"])
    assert results["game"]["exact"] == {
        "deterministic_risks": ["3/4", "3/4"],
        "weights": ["1/2", "1/2"],
        "value": "1/2",
        "dual": "1/2",
        "gap": "0",
        "pure_attacker": "1/4",
    }
    assert finished.err == ""


def test_the_solvers_agree_with_the_fractions(motivating):
    program, oracle, entropic = read(motivating[0])["game"]["solvers"]
    assert program["value"] == pytest.approx(0.5, abs=1e-9)
    assert program["dual"] == pytest.approx(0.5, abs=1e-9)
    assert program["weights"] == pytest.approx([0.5, 0.5], abs=1e-9)
    assert oracle["value"] == pytest.approx(0.5, abs=0.01)
    assert entropic["value"] == pytest.approx(0.5, abs=0.01 * np.log(9))
    for solver in (oracle, entropic):
        # They start where neither value nor weights are right.
        assert solver["start"] == [1.0, 0.0]
        assert solver["dual"] <= 0.5 <= solver["value"]
        assert solver["deterministic_risks"] == pytest.approx([0.75, 0.75])


def test_the_table_shows_fractions_beside_what_was_computed(motivating):
    path, finished = motivating
    console = Console(width=80, record=True, file=io.StringIO())
    print_game(read_run(path), console)
    narrow = console.export_text()
    for text in (finished.out, narrow):
        assert re.search(r"its risk, V_rand\W+1/2\W+0\.5000", text)
        assert re.search(r"risk of f2 alone\W+3/4\W+0\.7500", text)
        assert re.search(r"D without randomness\W+1/4", text)
        assert "label -1 at 0, mass 1/2: to " in text
        assert "…" not in text
        assert "A constant answer, which is neither of the two classifiers, has the risk 1/2." in text
    assert "clean %" not in finished.out


def test_the_figure_of_the_motivating_game_shows_both_panels(motivating):
    path, _ = motivating
    line, risk = axes_with_ink(path / "game.png", [(0.02, 0.2, 0.55, 0.6), (0.65, 0.25, 0.32, 0.6)])
    assert line > 0.05
    assert risk > 0.05


@pytest.mark.parametrize("eps", ["21/40", "0.525"])
def test_another_radius_is_as_exact(command, tmp_path, eps, undrawn):
    finished = command("task=game", "game=motivating", f"game.eps={eps}", "game.num_steps=20", "name=wider")
    assert finished.rc == 0, finished.err
    exact = read(tmp_path / "outputs" / "game" / "wider")["game"]["exact"]
    assert exact["deterministic_risks"] == ["1", "1"]
    assert (exact["value"], exact["dual"]) == ("3/4", "3/4")


@pytest.mark.parametrize("eps", [0, 2])
def test_the_figure_can_be_drawn_at_any_radius(command, tmp_path, eps):
    finished = command("task=game", f"game.eps={eps}", "game.num_steps=5", "name=any")
    assert finished.rc == 0, finished.err
    assert (tmp_path / "outputs" / "game" / "any" / "game.png").read_bytes().startswith(b"\x89PNG")


# --- the Gaussians -----------------------------------------------------------------------------------------


def test_the_gaussians_leave_their_files_and_numbers(gaussians):
    path, finished = gaussians
    assert {entry.name for entry in path.iterdir()} == FILES
    results = read(path)
    assert set(results) == KEYS
    game = results["game"]
    assert (results["seed"], game["draws"], game["eps"]) == (4, 2, [0.0, 0.5, 2.5])
    assert [(run["draw"], run["eps"]) for run in game["runs"]] == [(k, e) for k in (0, 1) for e in (0.0, 0.5, 2.5)]
    for run in game["runs"]:
        assert run["dual"] - 1e-7 <= run["v_rand"] <= run["v_det"] + 1e-7
        assert run["gap"] <= 1e-7
        assert sum(run["weights"]) == pytest.approx(1)
        assert len(run["weights"]) == 4
        if run["eps"] == 0:
            assert run["v_rand"] == pytest.approx(run["v_det"], abs=1e-7)
    for draw in (0, 1):
        risks = [run["v_det"] for run in game["runs"] if run["draw"] == draw]
        assert risks == sorted(risks)
        assert risks[0] < risks[-1]
    assert max(game["risks"]) < 0.4
    assert game["order"]["games"] == 6
    assert game["order"]["largest_violation"] <= 1e-7
    assert [entry["alpha"] for entry in game["convergence"]["solvers"]] == [None, 0.1, 0.02]
    assert all(entry["error"] >= -1e-7 for entry in game["convergence"]["solvers"])
    assert finished.err == ""
    for words in ("draw 0: 3 radii solved", "draw 1: 3 radii solved", "Algorithm 1 up to 40 steps", "α = 0.02"):
        assert words in finished.out
    assert "D ≤ V_rand ≤ V_det holds in all 6 games" in finished.out
    assert "V_rand = V_det at ε = 0" in finished.out
    assert "means of 2 draws" in finished.out
    assert re.search(r"gap\s*\n\s*─+\s*\n\s*0( +0\.\d{4}){4} +0\.000–0\.000( +0\.\d{4}){2}", finished.out)


def test_the_arrays_are_those_of_the_first_seed(gaussians):
    path, _ = gaussians
    with np.load(path / "game.npz", allow_pickle=False) as arrays:
        assert arrays["points"].shape == (120, 2)
        assert arrays["normals"].shape == (4, 2)
        # show_eps is not in the list, and has weights of its own.
        assert arrays["weights"].sum() == pytest.approx(1)
        assert arrays["value_errors"].shape == (2, 41)
        assert arrays["oracle_steps"][[0, -1]].tolist() == [1, 40]


def test_the_figure_of_the_gaussians_shows_three_panels(gaussians):
    path, _ = gaussians
    panels = [(0.04, 0.34, 0.29, 0.52), (0.41, 0.34, 0.25, 0.52), (0.73, 0.34, 0.25, 0.52)]
    assert min(axes_with_ink(path / "game.png", panels)) > 0.03


def test_the_same_seed_gives_the_same_game_and_another_seed_another(gaussians, command, tmp_path, undrawn):
    path, _ = gaussians
    numbers = {}
    for name, seed in (("again", 4), ("other", 6)):
        assert command(*SMALL, f"seed={seed}", f"name={name}").rc == 0
        numbers[name] = read(tmp_path / "outputs" / "game" / name)["game"]
    first = read(path)["game"]
    assert numbers["again"] == first
    assert numbers["other"]["risks"] != first["risks"]
    for name in ("v_det", "v_rand"):
        assert [run[name] for run in numbers["other"]["runs"]] != [run[name] for run in first["runs"]]
    # A draw does not depend on how many there are.
    assert command(*SMALL, "seed=4", "game.draws=1", "name=one").rc == 0
    assert read(tmp_path / "outputs" / "game" / "one")["game"]["runs"] == first["runs"][:3]


def test_one_of_everything_is_a_game_too(command, tmp_path):
    least = ["game.num_points=1", "game.num_samples=0", "game.num_classifiers=1", "game.num_steps=1", "game.draws=1"]
    rest = ["game.alphas=0.1", "game.eps=1/2", "game.max_risk=1", "name=least"]
    finished = command("task=game", "game=gaussians", *least, *rest)
    assert finished.rc == 0, finished.err
    (run,) = read(tmp_path / "outputs" / "game" / "least")["game"]["runs"]
    assert run["v_rand"] == run["v_det"] == run["dual"]


# --- a game of the user's own ------------------------------------------------------------------------------

PENNIES = """
import torch

from mixadv.game import FiniteGame
from mixadv.games.base import Playable, Played, solve_values


class Pennies(Playable):
    def __init__(self, eps: float, stake: float = 1.0) -> None:
        if not stake > 0:
            raise ValueError(f"stake={stake} must be positive")
        self.eps, self.stake = eps, stake

    def play(self, log):
        log("two pennies")
        values = solve_values(FiniteGame(self.stake * torch.eye(2)[None]))
        return Played("pennies", {"runs": [values.row(0, self.eps)]}, {})
"""


def test_a_game_of_the_users_own_is_played_shown_and_drawn(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pennies_of_mine.py").write_text(PENNIES)
    own = ("task=game", "game._target_=pennies_of_mine.Pennies", "~game.alpha", "~game.num_steps", "name=own")
    finished = command(*own, "game.eps=0.5", "+game.stake=0.8")
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / "game" / "own"
    assert {entry.name for entry in path.iterdir()} == FILES
    game = read(path)["game"]
    assert game["name"] == "pennies"
    (run,) = game["runs"]
    assert [run[key] for key in ("eps", "dual", "v_rand", "v_det")] == pytest.approx([0.5, 0.4, 0.4, 0.8])
    assert run["weights"] == pytest.approx([0.5, 0.5])
    assert "two pennies" in finished.out
    assert re.search(r"0\.5\W+0\.4000\W+0\.4000\W+0\.8000\W+0\.4000", finished.out)
    assert min(axes_with_ink(path / "game.png", [(0.3, 0.27, 0.4, 0.58)])) > 0.03
    refusal = command(*own[:-1], "name=none", "game.eps=0.5", "+game.stake=0").refusal()
    assert refusal == "game: stake=0 must be positive"


# --- a run directory ---------------------------------------------------------------------------------------


def test_a_finished_game_is_shown_and_not_played_again(gaussians, monkeypatch):
    path, first = gaussians
    monkeypatch.setattr(Gaussians, "play", None)
    before = stamps(path)
    again = run_command(path.parents[2], *SMALL, "seed=4", "name=small")
    assert again.rc == 0, again.err
    assert stamps(path) == before
    assert "outputs/game/small is done; its results" in again.out
    table = first.out[first.out.index("4 linear classifiers") :]
    assert table in again.out


def test_an_interrupted_game_starts_again(command, tmp_path, monkeypatch, undrawn):
    path = tmp_path / "outputs" / "game" / "broken"
    argv = ["task=game", "game.num_steps=5", "name=broken"]
    with monkeypatch.context() as patch:
        patch.setattr(Motivating, "play", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command(*argv)
    assert "ZeroDivisionError" in (path / "FAILED").read_text()
    finished = command(*argv)
    assert finished.rc == 0, finished.err
    assert "Starting again in outputs/game/broken" in finished.out
    assert {entry.name for entry in path.iterdir()} == FILES


def test_other_settings_do_not_share_a_directory(command, undrawn):
    assert command("task=game", "game.num_steps=5", "name=one").rc == 0
    refusal = command("task=game", "game.num_steps=6", "name=one").refusal()
    assert "game.num_steps: 5 there, 6 here" in refusal


def test_a_figure_is_drawn_again_from_the_files(gaussians, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(gaussians[0], copy)
    (copy / "game.png").unlink()
    assert draw_game(copy) == copy / "game.png"
    assert (copy / "game.png").read_bytes().startswith(b"\x89PNG")
    (copy / "game.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"game\.npz cannot be read: .*resume=never"):
        draw_game(copy)
    (copy / "results.json").unlink()
    with pytest.raises(UserError, match="holds no results of task=game"):
        draw_game(copy)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["game=chess"], "game=chess is unknown: choose one of gaussians, motivating, points, table, triangle"),
        (["game.eps=-1/2"], "game: eps=-1/2 is no radius"),
        (["game.eps=[0,1]"], "game.eps=[0, 1] must be a number or text"),
        (["game.alpha=hot"], "game.alpha=hot must be a number"),
        (["+game.foo=1"], "game.foo: Motivating has no such setting; it has eps, alpha, num_steps"),
        (["game._target_=mixadv.losses.ZeroOne"], "game._target_=mixadv.losses.ZeroOne is no Playable: name one that"),
        (["game=gaussians", "game.eps=[]"], "game: eps=[] is empty: give at least one number"),
        (["game=gaussians", "game.max_risk=0.05"], "game: max_risk=0.05: in draw 0 of seed 0 only 0 of 20,000 random"),
        (["game=gaussians", "game.draws=true"], "game.draws=True must be a whole number"),
        (["game=gaussians", "game.num_points=1.5"], "game.num_points=1.5 must be a whole number"),
        (["L=3"], "L=3: task=game has a key of its own, game.num_classifiers"),
        (["eps=0.3"], "eps=0.3: task=game has a key of its own, game.eps"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(command, tmp_path, overrides, start):
    refusal = command("task=game", *overrides, "name=bad").refusal()
    assert refusal.startswith(start), refusal
    assert not (tmp_path / "outputs" / "game" / "bad").exists()


# --- reports -----------------------------------------------------------------------------------------------


def test_games_have_a_table_of_their_own(motivating, gaussians, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("task: game\ngame:\n  _target_: mixadv.games.gaussians.Gaussians\n")
    runs = [read_run(path) for path in (motivating[0], gaussians[0], unfinished)]
    assert all(map(is_game, runs))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(games_table(runs))
    lines = [line.split() for line in console.export_text().splitlines() if " done " in line or "unfinished " in line]
    assert lines[0][-5:] == ["Motivating", "1/2", "1/2", "1/2", "3/4"]
    last = [run for run in read(gaussians[0])["game"]["runs"] if run["eps"] == 2.5]
    means = [f"{np.mean([run[key] for run in last]):.4f}" for key in ("dual", "v_rand", "v_det")]
    assert lines[1][-5:] == ["Gaussians", "2.5", *means]
    assert lines[2][-6:] == ["unfinished", "Gaussians", "–", "–", "–", "–"]


def test_a_report_on_one_game_shows_it(command, tmp_path):
    assert command("task=game", "game.num_steps=5", "name=one").rc == 0
    path = tmp_path / "outputs" / "game" / "one"
    (path / "game.png").unlink()
    shown = command("task=report", "runs=outputs/game/one")
    assert (shown.rc, shown.err) == (0, "")
    assert "Two classifiers on the line" in shown.out
    assert "clean %" not in shown.out
    assert (path / "game.png").exists()


def test_games_among_other_runs_are_reported_apart(command, tmp_path, undrawn):
    assert command("task=game", "game.num_steps=5", "name=one").rc == 0
    assert command("task=game", "game.num_steps=5", "game.eps=0", "name=two").rc == 0
    only = command("task=report", "runs=outputs")
    assert (only.rc, only.err) == (0, "")
    assert "2 games" in only.out
    assert "clean %" not in only.out
    assert not (tmp_path / "outputs" / "report.csv").exists()
    for eps in (0.05, 0.1):
        folder = tmp_path / "outputs" / "train" / f"run{eps}"
        folder.mkdir(parents=True)
        accuracies = {name: {"expected_accuracy": 0.9 - eps, "ci95": [0.5, 1]} for name in ("clean", "robust")}
        results = {"task": "train", "L": 1, "threat_model": {"norm": "linf", "eps": eps}, **accuracies}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "DONE").touch()
    both = command("task=report", "runs=outputs")
    assert (both.rc, both.err) == (0, "")
    assert "2 games" in both.out
    assert "2 runs" in both.out
    with (tmp_path / "outputs" / "report.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"run0.05", "run0.1"}


def test_a_sweep_over_games(command, tmp_path, undrawn):
    swept = command("-m", "task=game", "game.eps=0,1/2", "game.num_steps=5", "name=radii")
    assert swept.rc == 0, swept.err
    runs = sorted((tmp_path / "outputs" / "sweeps" / "radii").glob("*/results.json"))
    assert [json.loads(path.read_text())["game"]["exact"]["value"] for path in runs] == ["1/4", "1/2"]
