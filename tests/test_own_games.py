"""Games from the user's own files: tables of losses."""

import itertools
import random
from fractions import Fraction as F

import numpy as np
import pytest
import torch

from mixadv.game import FiniteGame
from mixadv.games.base import solve_values
from mixadv.games.rational import evaluate, proved
from mixadv.games.table import Table
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
    many = np.random.default_rng(0).random((40, 7, 30)) < 0.3
    np.save(tmp_path / "many.npy", many)
    finished = command("task=game", "game=table", "game.file=many.npy", "name=many")
    assert finished.rc == 0, finished.err
    assert "The 20 members with the largest weights; results.json has all 30." in finished.out
    table = command("task=report", "runs=outputs")
    assert "1/12" in table.out
    assert "game.file has no default: add game.file=..." in command("task=game", "game=table", "name=x").refusal()


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
