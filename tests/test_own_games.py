"""Games from the user's own files: tables of losses, and points in the plane."""

import itertools
import random
import re
import shlex
from fractions import Fraction as F
from pathlib import Path

import numpy as np
import pytest
import torch

from mixadv.game import FiniteGame
from mixadv.games.base import solve_values
from mixadv.games.motivating import LineGame
from mixadv.games.points import Points
from mixadv.games.rational import evaluate, proved
from mixadv.games.table import Table
from mixadv.threat_model import ThreatModel
from oracles_game import full_linear_program

# --- fractions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_small_games_come_out_in_fractions_of_the_linear_program(seed):
    draw = random.Random(seed)
    n, m, members = draw.randint(1, 3), draw.randint(2, 4), draw.randint(2, 3)
    losses = np.array([[[draw.randint(-4, 6) / 4 for _ in range(members)] for _ in range(m)] for _ in range(n)])
    parts = [draw.randint(1, 5) for _ in range(n)]
    masses = np.array(parts) / sum(parts)
    game = FiniteGame(losses, masses=masses)
    exact = proved(game, solve_values(game))
    value, _, _ = full_linear_program(losses, masses)
    assert exact is not None
    assert exact.gap == 0
    assert float(exact.value) == pytest.approx(value, abs=1e-9)
    # Both sides once more, by loops over the numbers in the file.
    worst = [
        max(sum(w * F(loss) for w, loss in zip(exact.weights, row, strict=True)) for row in rows) for rows in losses
    ]
    assert sum(F(part, sum(parts)) * each for part, each in zip(parts, worst, strict=True)) == exact.value
    assert sum(exact.weights) == 1
    assert min(exact.weights) >= 0


def test_strategies_are_evaluated_by_hand():
    """Two examples with two moves and one move."""
    losses = [[[F(1), F(0)], [F(0), F(1, 2)]], [[F(1, 3), F(1)]]]
    found = evaluate(losses, [F(3, 4), F(1, 4)], [F(1, 3), F(2, 3)], [[F(1, 5), F(4, 5)], [F(1)]])
    assert found.value == F(3, 4) * F(1, 3) + F(1, 4) * F(7, 9)
    assert found.deterministic_risks == (F(3, 4) + F(1, 12), F(3, 8) + F(1, 4))
    assert found.dual == min(F(3, 4) * F(1, 5) + F(1, 12), F(3, 4) * F(2, 5) + F(1, 4))
    assert found.as_text()["gap"] == str(found.value - found.dual)


def test_numbers_that_are_no_small_fractions_have_no_exact_solution():
    game = FiniteGame(torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert proved(game, solve_values(game)) is None
    large = FiniteGame(torch.zeros(100, 101, 2, dtype=torch.uint8))
    assert proved(large, solve_values(large)) is None


# --- tables in files ---------------------------------------------------------------------------------------

RPS = "rock,paper,scissors\n0,1,-1\n-1,0,1\n2,-1,0\n"


def test_a_matrix_with_names_in_csv(tmp_path):
    """Rock, paper, scissors with a double win: the mixed strategies solve 3 linear equations; by hand."""
    path = tmp_path / "rps.csv"
    path.write_text(RPS)
    played = Table(str(path)).play(print).summary
    assert played["members"] == ["rock", "paper", "scissors"]
    assert played["exact"]["weights"] == ["1/4", "5/12", "1/3"]
    assert played["exact"]["value"] == played["exact"]["dual"] == "1/12"
    assert played["exact"]["deterministic_risks"] == ["2", "1", "1"]
    chances = [move["probability"] for move in played["moves"]]
    assert chances == pytest.approx([1 / 3, 5 / 12, 1 / 4])
    columns = np.array([move["losses"] for move in played["moves"]])
    np.testing.assert_allclose(np.array(chances) @ columns, 1 / 12, atol=1e-9)


def test_examples_masses_and_fractions_in_csv(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text("example,mass,a,b\nx,1/3,0,1\ny,2/3,1/2,0\nx,1/3,1,1/4\ny,2/3,0,3/4\ny,2/3,1/3,1/3\n\n")
    game = Table(str(path)).game
    assert game.masses.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert game.mask.tolist() == [[True, True, False], [True, True, True]]
    assert game.losses[1].tolist() == [[0.5, 0.0], [0.0, 0.75], [1 / 3, 1 / 3]]
    losses, masses = game.losses.numpy(), game.masses.numpy()
    value, _, _ = full_linear_program(losses, masses, game.mask.numpy())
    assert float(F(Table(str(path)).play(print).summary["exact"]["value"])) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8, bool])
def test_arrays_of_one_and_of_many_examples(tmp_path, dtype):
    losses = np.random.default_rng(0).integers(0, 2, (5, 4, 3)).astype(dtype)
    masses, mask = np.array([0.1, 0.2, 0.3, 0.25, 0.15]), np.ones((5, 4), dtype=bool)
    mask[1, 2] = mask[4, 0] = False
    np.savez(tmp_path / "game.npz", losses=losses, masses=masses, mask=mask, members=np.array(["a", "b", "c"]))
    np.save(tmp_path / "one.npy", losses[3])
    whole, one = Table(str(tmp_path / "game.npz")), Table(str(tmp_path / "one.npy"))
    value, _, _ = full_linear_program(losses.astype(float), masses, mask)
    assert whole.members == ["a", "b", "c"]
    assert whole.play(print).summary["runs"][0]["v_rand"] == pytest.approx(value, abs=1e-9)
    assert one.members == ["f1", "f2", "f3"]
    assert one.game.losses.shape == (1, 4, 3)


def test_decimals_in_single_precision_are_those_that_were_meant(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0.1, 0.3], [0.2, 0.0]], dtype=np.float32))
    exact = Table(str(tmp_path / "a.npy")).play(print).summary["exact"]
    # 0.1 l + 0.3 (1 - l) = 0.2 l at l = 3/4.
    assert (exact["weights"], exact["value"]) == (["3/4", "1/4"], "3/20")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, r"file=.*none.csv: there is no such file"),
        ("a.txt", "1", r"file=.*a.txt must end in .npy, .npz or .csv"),
        ("a.csv", "", "holds no losses: give a row per move"),
        ("a.csv", "a,b\n", "holds no losses"),
        ("a.csv", "1,2\n3\n", "row 2: 1 cells where 2 are needed"),
        ("a.csv", "a,b\n1,2\n3,x\n", "row 3: 'x' is no number or fraction such as 1/3"),
        ("a.csv", "a,b\n1,1/0\n", "row 2: '1/0' is no number"),
        ("a.csv", "1,nan\n0,1\n", "row 1: 'nan' is no number"),
        ("a.csv", "1,O\n0,1\n", "row 1: 'O' is no number"),
        ("a.csv", "-inf,inf\n0,1\n", "row 1: '-inf' is no number"),
        ("a.csv", ",a,b\n0,1,0\n1,0,1\n", "column 1 has no name"),
        ("a.csv", "example,mass,a\nx,1,1\nx,1/2,0\n", "row 3: example x has two different masses"),
        ("a.csv", "example,mass,a\nx,1,1\ny,1/2,0\n", "masses must sum to 1, got 1.5"),
        ("a.csv", b"\xff\xfe,1", "cannot be read"),
        ("a.npy", b"torn", "cannot be read"),
        ("a.npz", b"torn", "cannot be read"),
        ("a.npy", np.zeros(3), r"losses must be \[examples, perturbations, members\], or"),
        ("a.npy", np.array([["a", "b"]]), "numbers are needed"),
        ("a.npy", np.array([[object()]], dtype=object), "cannot be read"),
        ("a.npy", np.array([[1.0, np.nan]]), r"losses\[0, 0, 1\] is nan"),
        ("a.npz", {"loss": np.zeros((2, 2))}, "has loss: it needs an array losses"),
        ("a.npz", {"losses": np.zeros((2, 2)), "members": np.array(["a"])}, "1 names for 2 members"),
    ],
)
def test_files_that_hold_no_game_are_refused(tmp_path, name, content, said):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ValueError, match=said):
        Table(str(path))


def test_the_command_plays_a_table_and_draws_it(command, tmp_path):
    (tmp_path / "rps.csv").write_text(RPS)
    finished = command("task=game", "game=table", "game.file=rps.csv", "name=rps")
    assert finished.rc == 0, finished.err
    for line in ("best mixture, weight of paper", "5/12", "move 1 with probability 0.4167"):
        assert line in finished.out
    assert (tmp_path / "outputs" / "game" / "rps" / "game.png").read_bytes().startswith(b"\x89PNG")
    again = command("task=game", "game=table", "game.file=rps.csv", "name=rps")
    assert "is done; its results" in again.out
    (tmp_path / "rps.csv").write_text(RPS.replace("2", "1"))
    changed = command("task=game", "game=table", "game.file=rps.csv", "name=rps")
    assert changed.rc == 0, changed.err
    assert re.search(r"weight of paper\W+1/3", changed.out)
    many = np.random.default_rng(0).random((40, 7, 30)) < 0.3
    np.save(tmp_path / "many.npy", many)
    finished = command("task=game", "game=table", "game.file=many.npy", "name=many")
    assert finished.rc == 0, finished.err
    assert "The 20 members with the largest weights; results.json has all 30." in finished.out
    table = command("task=report", "runs=outputs")
    assert re.search(r"rps +done +Table +– +0 +0 +1\b", table.out)
    assert "game.file has no default: add game.file=..." in command("task=game", "game=table", "name=x").refusal()


# --- points in the plane -----------------------------------------------------------------------------------

MOTIVATING = "x1,x2,y,mass\n0,0,-1,0.5\n-1,0,1,0.25\n1,0,1,0.25\n"
THRESHOLDS = [[-1, 0, -0.5], [1, 0, -0.5]]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_motivating_example_from_its_points(tmp_path, norm):
    """Its exact values at every radius are in fractions, from other code."""
    path = tmp_path / "mot.csv"
    path.write_text(MOTIVATING)
    radii = ["0", "1/4", "1/2", "21/40", "1", "3/2"]
    played = Points(str(path), THRESHOLDS, eps=radii, norm=norm).play(lambda _: None)
    assert played.summary["num_samples"] is None
    for eps, run in zip(radii, played.summary["runs"], strict=True):
        exact = LineGame(F(eps)).solve()
        assert run["v_rand"] == pytest.approx(float(exact.value), abs=1e-9)
        assert run["v_det"] == pytest.approx(float(min(exact.deterministic_risks)), abs=1e-9)
        assert run["best_constant"] == pytest.approx(0.5)
        # "+1 iff either says so" is right on every point until the ball of 0 reaches a threshold.
        assert run["best_vote"] == pytest.approx(0 if F(eps) < F(1, 2) else 0.5)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_linear_classifiers_as_functions_are_attacked_on_samples_of_the_same_balls(tmp_path, norm):
    draw = np.random.default_rng(5)
    x, y = draw.normal(size=(30, 2)), draw.integers(2, 4, 30)
    lines = [[1, 0.5, 0.1], [-0.3, 1, -0.2], [0.7, -1, 0.4]]
    np.savez(tmp_path / "points.npz", x=x, y=y)
    (tmp_path / "rules.py").write_text(
        "import numpy as np\n"
        + "".join(f"def f{k}(x):\n    return np.where(x @ {w[:2]} + {w[2]} >= 0, 3, 2)\n" for k, w in enumerate(lines))
    )
    file, eps = str(tmp_path / "points.npz"), [0, 0.5, 1]
    exact = Points(file, lines, eps=eps, norm=norm)
    names = [f"{tmp_path / 'rules.py'}:f{k}" for k in range(3)]
    sampled = Points(file, names, eps=eps, norm=norm, num_samples=3000)
    whole, few = (each.play(lambda _: None).summary for each in (exact, sampled))
    assert few["num_samples"] == 3000
    for one, other in zip(whole["runs"], few["runs"], strict=True):
        assert other["v_rand"] <= one["v_rand"] + 1e-9
        assert one["v_rand"] <= other["v_rand"] + 0.05
    owner, points = sampled.candidates(1.0)
    assert bool(
        ThreatModel(norm, 1.0, bounds=None).contains(torch.from_numpy(points), torch.from_numpy(x[owner])).all()
    )
    # The closed form of one member alone: the dual norm of its normal times eps.
    dual = 2 if norm == "l2" else 1
    for k, (*w, b) in enumerate(lines):
        margins = (x @ w + b) * np.where(y == 3, 1, -1)
        reached = np.mean(margins < whole["show_eps"] * np.linalg.norm(w, dual))
        assert whole["deterministic_risks"][k] == pytest.approx(reached)


def test_three_classes_and_the_moves_of_the_picture(tmp_path):
    x, y = np.array([[0.0, 0], [2, 0], [1, 2]]), np.array([0, 5, 9])
    np.savez(tmp_path / "three.npz", x=x, y=y)
    (tmp_path / "near.py").write_text(
        "import numpy as np\nX, Y = np.array([[0.0, 0], [2, 0], [1, 2]]), np.array([0, 5, 9])\n"
        "def nearest(z):\n    return Y[((z[:, None] - X) ** 2).sum(2).argmin(1)]\n"
        "def never(z):\n    return np.full(len(z), 4)\n"
    )
    names = [f"{tmp_path / 'near.py'}:{name}" for name in ("never", "nearest")]
    played = Points(str(tmp_path / "three.npz"), names, eps=[0.9, 1.05], num_samples=4000).play(lambda _: None)
    first, second = played.summary["runs"]
    assert first["v_rand"] == 0
    # Only the points at distance 2 are within 1.05 of the border; those at sqrt 5 are not.
    assert second["v_rand"] == pytest.approx(2 / 3)
    assert second["best_constant"] == pytest.approx(2 / 3)
    assert "best_vote" not in second
    moves = played.arrays["moves"]
    assert sorted(map(tuple, moves[:, :2])) == [(0.0, 0.0), (2.0, 0.0)]
    assert np.hypot(*(moves[:, 2:] - moves[:, :2]).T).max() <= 1.05
    assert played.arrays["shares"].shape[2] == 3


@pytest.mark.parametrize(
    ("content", "classifiers", "settings", "said"),
    [
        (MOTIVATING, [], {}, r"classifiers=\[\] is empty"),
        (MOTIVATING, [[1, 2]], {}, r"\[1, 2\] are not the three finite numbers"),
        (MOTIVATING, ["nothing"], {}, "'nothing' is neither module:callable nor file.py:callable"),
        (MOTIVATING, ["no_such_module_of_mine:f"], {}, r"cannot be imported \(ModuleNotFoundError"),
        (MOTIVATING, ["none.py:f"], {}, r"none.py:f cannot be imported \(FileNotFoundError"),
        (MOTIVATING, ["math:pi"], {}, "math:pi is no function"),
        (MOTIVATING, ["math:sin"], {}, r"math:sin failed on x of shape \[3, 2\] \(TypeError"),
        (MOTIVATING, ["numpy:sin"], {}, r"numpy:sin returned shape \[3, 2\] for x of shape \[3, 2\]"),
        (MOTIVATING, THRESHOLDS, {"norm": "l1"}, "norm=l1 is unknown: choose one of linf, l2"),
        (MOTIVATING, THRESHOLDS, {"eps": []}, r"eps=\[\] is empty"),
        (MOTIVATING, THRESHOLDS, {"eps": -1}, "eps=-1 is no radius"),
        (MOTIVATING, THRESHOLDS, {"show_eps": "x"}, "show_eps=x is no radius"),
        (MOTIVATING, THRESHOLDS, {"num_samples": 0}, "num_samples=0 must be at least 1"),
        ("0,0,1\n1,1,2\n2,2,3\n", THRESHOLDS, {}, "is linear and needs two labels, there are 3"),
        ("x,y\n0,1\n", THRESHOLDS, {}, "needs the columns x1, x2, y"),
        ("", THRESHOLDS, {}, "needs the columns x1, x2, y"),
        ("0,0,1\n0,a,1\n", THRESHOLDS, {}, "0,a,1 are not numbers"),
        ("0,O,1\n0,1,1\n", THRESHOLDS, {}, "0,O,1 are not numbers"),
        ("0,0,0.5\n", THRESHOLDS, {}, "labels must be whole numbers"),
        ("0,nan,1\n", THRESHOLDS, {}, "x must hold finite numbers"),
        ("0,0,1,0.5\n1,0,2,0.7\n", THRESHOLDS, {}, "masses must sum to 1"),
    ],
)
def test_points_and_classifiers_that_make_no_game_are_refused(tmp_path, content, classifiers, settings, said):
    path = tmp_path / "points.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        Points(str(path), classifiers, **settings)


def test_the_command_plays_points_and_draws_them(command, tmp_path):
    (tmp_path / "mot.csv").write_text(MOTIVATING)
    settings = ["game.file=mot.csv", "game.classifiers=[[-1,0,-0.5],[1,0,-0.5]]", "game.eps=[0,1/2]"]
    finished = command("task=game", "game=points", *settings, "name=mot")
    assert finished.rc == 0, finished.err
    assert "[-1,0,-0.5] with probability 0.5000 (alone its error rate is 0.7500)" in finished.out
    assert (tmp_path / "outputs" / "game" / "mot" / "game.png").read_bytes().startswith(b"\x89PNG")
    refusal = command("task=game", "game=points", "game.file=mot.csv", "game.classifiers=[7]", "name=x").refusal()
    assert refusal.startswith("game.classifiers=[7] must be")


def test_the_command_plays_the_triangle_in_every_regime(command, tmp_path):
    for eps, accuracies in (("1/4", {"1"}), ("11/20", {"0", "1/3", "1/2"}), ("3/5", {"1/3"})):
        finished = command("task=game", "game=triangle", f"game.eps={eps}", f"name=t{eps.replace('/', '-')}")
        assert finished.rc == 0, finished.err
        rows = [
            line.strip("│ \n").split("│")
            for line in finished.out.splitlines()
            if "V_" in line or "each overlap" in line
        ]
        assert {row[-1].strip() for row in rows if len(row) == 3} == accuracies
        for row in rows:
            if len(row) == 3:
                assert F(row[1].strip()) + F(row[2].strip()) == 1
    assert len(list(itertools.chain(tmp_path.glob("outputs/game/*/game.png")))) == 3


# --- the page ----------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_work_on_the_files_of_the_page(command, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "games.md").read_text()
    rps, examples, points = re.findall(r"```csv\n(.*?)```", page, re.DOTALL)
    (tmp_path / "game.csv").write_text(rps)
    (tmp_path / "points.csv").write_text(points)
    (tmp_path / "examples.csv").write_text(examples)
    assert Table(str(tmp_path / "examples.csv")).game.num_examples == 2
    said = []
    for line in re.findall(r"```bash\n(.*?)\n```", page, re.DOTALL):
        words = shlex.split(line)
        assert words[:2] == ["python", "run.py"]
        finished = command(*words[2:])
        assert finished.rc == 0, finished.err
        said.append(finished.out)
    for number in ("1/4", "5/12", "1/3", "1/12"):
        assert number in said[0]
        assert number in page
    assert "holds in all 4 games" in said[1]
