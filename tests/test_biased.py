"""Networks with a bias on their logits: decisions, orders of classes, shared passes, files, and task=solve."""

import csv
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from builders.data import seeded
from builders.networks import Watched, untrained_members
from builders.refusals import refusal
from builders.runs import read_results
from conftest import run_command
from mixadv import Mixture, ThreatModel, load_mixture
from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.search import value_and_gradient
from mixadv.biased import Biased, listed, preferences
from mixadv.evaluation.record import expectation
from mixadv.lambda_solvers import LinearProgram
from mixadv.losses import ZeroOne
from mixadv.members.store import save_mixture
from mixadv.mixture_game import MixtureGame
from mixadv.report import read_run
from mixadv.report.cells import print_narrow
from mixadv.report.figures.solve import solution_figure
from mixadv.report.solve import solution_table
from mixadv.training.checks import check_optimizer
from oracles_game import full_linear_program

BIASES = [(0.5, -0.25, 0.125, 0.0), (0.0, 0.25, -0.75, 0.5)]
MODEL = {"name": "mlp", "num_classes": 4, "image_shape": [1, 8, 8], "hidden": [5]}


class Lines(nn.Module):
    """Logits (0, x, 2x - 1): class 0 below 0, class 1 from 0 to 1, class 2 above 1."""

    def forward(self, x):
        return torch.cat([0 * x, x, 2 * x - 1], dim=1)


class Nearest(nn.Module):
    """Logits -|x - c|^2 for the corners c of an equilateral triangle."""

    CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]], dtype=torch.float64)

    def forward(self, x):
        return -(x[:, None] - self.CORNERS.to(x)).square().sum(-1)


# --- one member --------------------------------------------------------------------------------------------


def test_the_bias_moves_the_boundaries_of_a_linear_network_to_where_they_are_by_hand():
    # x + 0.25 > 0 from -0.25 on; 2x - 1.5 > x + 0.25 from 1.75 on.
    member = Biased(Lines(), [0.0, 0.25, -0.5])
    x = torch.tensor([-1.0, -0.26, -0.24, 0.5, 1.74, 1.76, 9.0])[:, None]
    assert member(x).argmax(1).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert torch.equal(member(x), Lines()(x) + torch.tensor([0.0, 0.25, -0.5]))


def test_a_bias_that_cannot_be_added_is_refused():
    for bias in ([], [0.3], [0.1, float("nan")], [float("inf"), 0.0]):
        assert "finite number for each class" in refusal(Biased, Lines(), bias, error=ValueError)
    assert "3 classes" in refusal(Biased(Lines(), [0.1, 0.2]), torch.zeros(2, 1), error=ValueError)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_preferences_are_the_cyclic_orders_and_their_reverses(num_classes):
    found = preferences([0.5, 2.0], num_classes)
    circle = [*range(num_classes), *range(num_classes)]
    orders = {tuple(circle[first : first + num_classes]) for first in range(num_classes)}
    orders |= {order[::-1] for order in orders}
    wanted = {
        tuple(scale * ((num_classes - 1) / 2 - order.index(label)) for label in range(num_classes))
        for scale, order in itertools.product((0.5, 2.0), orders)
    }
    assert set(found.values()) == wanted
    assert len(found) == 2 * len(orders)
    for one, other in itertools.permutations(range(num_classes), 2):
        assert any(bias[one] > bias[other] for bias in found.values())
    name = {2: "0.5 (1>0)", 3: "0.5 (1>2>0)", 5: "0.5 (1>2..0)"}[num_classes]
    ranked = sorted(range(num_classes), key=lambda label: -found[name][label])
    assert ranked == circle[1 : 1 + num_classes]


def test_rows_of_a_table_are_named_by_their_numbers_where_these_are_few():
    assert listed([[0.3, 0, -0.3], [-0.3, 0, 0.3]]) == {
        "(0.3, 0, -0.3)": (0.3, 0, -0.3),
        "(-0.3, 0, 0.3)": (-0.3, 0, 0.3),
    }
    assert listed([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]) == {"bias 0": (1, 0, 0, 0, 0), "bias 1": (0, 0, 0, 0, 1)}


# --- several in a mixture ----------------------------------------------------------------------------------


def pool_of_four(watched=False):
    """Two networks, the first also with two biases; the weights differ."""
    first, second = untrained_members(2, "mlp", num_classes=4, hidden=[5])
    first = Watched(first) if watched else first
    members = [first, Biased(first, BIASES[0]), second, Biased(first, BIASES[1])]
    return Mixture(members, [0.4, 0.3, 0.2, 0.1]).eval(), first


def test_a_shared_network_runs_once_and_gives_every_member_its_own_logits():
    mixture, first = pool_of_four(watched=True)
    x = torch.rand(6, 1, 8, 8, generator=seeded(1))
    alone = torch.stack([member(x) for member in mixture.members])
    first.passes = 0
    assert torch.equal(mixture.member_logits(x), alone)
    assert first.passes == 1
    assert all(torch.equal(mixture.logits_of(k, x), alone[k]) for k in range(4))


def test_the_gradient_of_an_expectation_is_that_of_the_sum_over_members():
    mixture, first = pool_of_four(watched=True)
    x, y = torch.rand(6, 1, 8, 8, generator=seeded(1)), torch.tensor([0, 1, 2, 3, 0, 1])
    leaf = x.clone().requires_grad_()
    terms = zip(mixture.weights.tolist(), mixture.members, strict=True)
    value = sum(weight * cross_entropy(member(leaf), y, reduction="none") for weight, member in terms)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    first.passes = 0
    logits, found, grad = value_and_gradient(mixture, ExpectedLoss("ce"), x, y, None)
    assert first.passes == 1
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(grad, slope)
    assert torch.equal(logits, mixture.member_logits(x))


def test_compiled_networks_stay_shared_and_can_be_uncompiled():
    mixture, _ = pool_of_four()
    x = torch.rand(20, 1, 8, 8, generator=seeded(1))
    with torch.no_grad():
        plain = mixture.member_logits(x)
        mixture.compile(backend="eager")
        torch.testing.assert_close(mixture.member_logits(x), plain)
        mixture.uncompile()
        assert torch.equal(mixture.member_logits(x), plain)


def test_a_training_refuses_members_that_share_a_network():
    mixture, _ = pool_of_four()
    with pytest.raises(ValueError, match="members 0 and 1 are the same module, or share one"):
        check_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), None, list(mixture.members))


def discs(points, radius):
    """720 points around each of the points, and each itself: [N, m, 2]."""
    angles = torch.arange(720, dtype=torch.float64) * (2 * math.pi / 720)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    around = torch.cat([share * radius * circle[::4] for share in (0.5, 0.8, 0.9, 0.95, 1.0)])
    return points[:, None] + torch.cat([torch.zeros(1, 2, dtype=torch.float64), around])


class Exhaustive:
    """The worst of all points of `discs`."""

    def __call__(self, mixture, x, y, threat_model, generator=None):
        candidates = discs(x, threat_model.eps)
        with torch.no_grad():
            right = [mixture.expected_accuracy(candidates[:, j], y) for j in range(candidates.shape[1])]
        return candidates[torch.arange(len(x)), torch.stack(right).argmin(0)]


def test_one_network_with_biases_reaches_the_optimum_of_the_linear_program_over_all_points():
    """Corners at distance 1, radius 0.52 > 1/2: the balls meet in pairs. Any classifier is right on one class at most.

    In the lens of two balls their logits differ by at most 2 * 0.52 - 1 = 0.04; a bias of 0.07 decides all of it. One
    of two opposite members is right at any point, because 0.52 cos 30 < (1 - 0.07) / 2: the best mixture has 1/2.
    """
    corners, y, ball = Nearest.CORNERS, torch.tensor([0, 1, 2]), ThreatModel("l2", 0.52, bounds=None)
    table = preferences([0.07], 3).values()
    net = Nearest()
    mixture = Mixture([net, *(Biased(net, bias) for bias in table)])
    found = LinearProgram(num_rounds=50).solve(MixtureGame(mixture, corners, y, ball, [Exhaustive()], ZeroOne()))
    points = discs(corners, ball.eps).numpy()
    logits = -((points[:, :, None] - corners.numpy()) ** 2).sum(-1)
    wrong = [(logits + np.asarray(bias)).argmax(-1) != np.arange(3)[:, None] for bias in ((0, 0, 0), *table)]
    losses = np.stack(wrong, axis=-1).astype(float)
    value, _, _ = full_linear_program(losses)
    assert value == pytest.approx(1 / 2, abs=1e-7)
    assert losses.max(1).mean(0).min() == pytest.approx(2 / 3)
    assert found.value == pytest.approx(value, abs=2e-3)
    # No linear program is needed to see it: equal weights on two opposite orders have it too.
    assert losses[..., [1, 4]].mean(-1).max(1).mean() == pytest.approx(1 / 2)


# --- files -------------------------------------------------------------------------------------------------


def recipe_of(biases, **more):
    models = [MODEL | ({"bias": list(bias)} if bias else {}) for bias in biases]
    return {"L": len(models), "models": models, **more}


@pytest.fixture
def exported(tmp_path):
    """Members z, z + b, another network z', and z + b' in a folder; the mixture that was saved."""
    mixture, _ = pool_of_four()
    folder = tmp_path / "mixture"
    save_mixture(mixture, folder, recipe_of([None, BIASES[0], None, BIASES[1]]), "# card\n")
    return folder, mixture


def test_a_mixture_with_biases_loads_bit_for_bit_and_shares_its_network_again(exported):
    folder, mixture = exported
    loaded = load_mixture(folder)
    x = torch.rand(5, 1, 8, 8, generator=seeded(1))
    assert torch.equal(loaded.member_logits(x), mixture.member_logits(x))
    assert torch.equal(loaded.weights, mixture.weights)
    assert loaded.by_network() == [[0, 1, 3], [2]]
    records = json.loads((folder / "config.json").read_text())["models"]
    assert [record.get("bias") for record in records] == [None, list(BIASES[0]), None, list(BIASES[1])]


def test_networks_that_differ_are_not_shared(tmp_path):
    nets = untrained_members(2, "mlp", num_classes=4, hidden=[5])
    mixture = Mixture([Biased(net, bias) for net, bias in zip(nets, BIASES, strict=True)]).eval()
    save_mixture(mixture, tmp_path, recipe_of(BIASES), "")
    assert load_mixture(tmp_path).by_network() == [[0], [1]]


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ([0.5, -0.25, 0.125, 0.5], "the recipe has bias=[0.5, -0.25, 0.125, 0.5] for member 1, the file"),
        ([0.5, -0.25, 0.125], "size mismatch"),
        ([0.5, -0.25, 0.125, math.inf], "expected a finite number for each class"),
        ("0.5", "expected a finite number for each class"),
        ([True, 0, 0, 0], "expected a finite number for each class"),
        ([], "expected a finite number for each class"),
    ],
)
def test_a_changed_bias_is_refused(exported, bias, said):
    folder, _ = exported
    record = json.loads((folder / "config.json").read_text())
    record["models"][1]["bias"] = bias
    (folder / "config.json").write_text(json.dumps(record))
    assert said in refusal(load_mixture, folder)


def test_a_bias_of_other_classes_than_the_network_is_refused(tmp_path):
    (net,) = untrained_members(1, "mlp", num_classes=4, hidden=[5])
    save_mixture(Mixture([Biased(net, [0.1, 0.2])]), tmp_path, recipe_of([[0.1, 0.2]]), "")
    assert "the bias of member 0 has 2 numbers for 4 classes" in refusal(load_mixture, tmp_path)


# --- task=solve --------------------------------------------------------------------------------------------

SETTINGS = (
    *("data=digits", "data.classes=[1,5,7]", "data.average=16", "threat_model=l2", "eps=1.05", "model=linear"),
    *("trainer.accelerator=cpu", "logger=none", "protocol.diagnosed=0"),
)
FAST = (
    *(f"~protocol.attacks.{name}" for name in ("arc", "subsets", "square", "climber")),
    *("protocol.attacks.pgd-20.restarts=1", "protocol.attacks.pgd-20.num_steps=6"),
)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A single linear model, and its copies weighed: look, do not touch."""
    cwd = tmp_path_factory.mktemp("biases")
    train = ("L=1", "lambda_solver=uniform", "trainer.max_epochs=5", "optimizer.lr=0.05", "name=one", *SETTINGS, *FAST)
    solve = ("task=solve", "members=[outputs/train/one]", "biases=[1,4]", "name=one", *SETTINGS[-3:], *FAST)
    for argv in (train, solve):
        finished = run_command(cwd, *argv)
        assert finished.rc == 0, finished.err
    return cwd, finished


def test_the_members_are_the_network_and_its_copies_for_every_order_and_scale(solved):
    cwd, finished = solved
    results = read_results(cwd / "outputs" / "solve" / "one")
    orders = ["(0>1>2)", "(1>2>0)", "(2>0>1)", "(2>1>0)", "(0>2>1)", "(1>0>2)"]
    names = ["one", *(f"one + {scale} {order}" for scale in (1, 4) for order in orders)]
    assert [member["name"] for member in results["members"]] == names
    assert results["L"] == 13
    assert "bias" not in results["members"][0]
    assert results["members"][1]["bias"] == [1, 0, -1]
    assert results["members"][8]["bias"] == [-4, 4, 0]
    assert {member["source"] for member in results["members"]} == {"outputs/train/one"}
    assert "13 classifiers weighed" in " ".join(finished.out.split())


def test_the_table_has_one_line_for_members_of_weight_0_and_fits_80_columns(solved):
    cwd, _ = solved
    run = read_run(cwd / "outputs" / "solve" / "one")
    results = run.results
    best = max(range(13), key=lambda k: results.solve.rows[k].fresh.value)
    kept = [k for k in range(13) if k in (0, best) or results.weights[k] > 0]
    table = solution_table(run)
    names = [results.members[k].name for k in kept]
    assert 13 - len(kept) >= 7
    assert [line.row.who for line in table.rows] == [
        *(*names, f"{13 - len(kept)} biased members"),
        *("uniform mixture", "optimal mixture"),
    ]
    console = Console(width=80, file=io.StringIO())
    print_narrow(table, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 26
    axes = {axes.get_label(): axes for axes in solution_figure(run).axes}
    assert len(axes["weights"].lines) == 13
    assert len(axes["weights"].get_legend().get_texts()) == len(kept)
    assert len(axes["accuracy"].get_yticks()) == len(table.rows)


def test_members_of_positive_weight_are_exported_and_are_what_python_computes(solved):
    cwd, _ = solved
    path = cwd / "outputs" / "solve" / "one"
    results, config = read_results(path), json.loads((path / "mixture" / "config.json").read_text())
    drawn = [k for k, weight in enumerate(results["weights"]) if weight > 0]
    assert config["member_names"] == [results["members"][k]["name"] for k in drawn]
    assert config["weights"] == pytest.approx([results["weights"][k] for k in drawn], abs=1e-15)
    (net,) = load_mixture(cwd / "outputs" / "train" / "one").members
    mixture = load_mixture(path)
    x = torch.rand(7, 1, 8, 8, generator=seeded(2))
    wanted = [net(x) + torch.tensor(results["members"][k].get("bias", [0.0] * 3)) for k in drawn]
    assert torch.equal(mixture.member_logits(x), torch.stack(wanted))
    card = (path / "mixture" / "README.md").read_text()
    assert f"Optimal weights over {len(drawn)} classifier" in card
    assert "no weights over the 13 classifiers that were weighed" in card


def test_the_exported_mixture_is_evaluated_and_predicts_as_python_does(solved):
    cwd, _ = solved
    finished = run_command(cwd, "task=evaluate", "mixture=outputs/solve/one", "name=again", *SETTINGS[-3:], *FAST)
    assert finished.rc == 0, finished.err
    again, first = (read_results(cwd / "outputs" / task) for task in ("evaluate/again", "solve/one"))
    assert again["clean"]["expected_accuracy"] == pytest.approx(first["clean"]["expected_accuracy"], abs=1e-12)
    drawn = [k for k, weight in enumerate(first["weights"]) if weight > 0]
    assert [one.get("bias") for one in again["members"]] == [first["members"][k].get("bias") for k in drawn]
    (cwd / "photos").mkdir(exist_ok=True)
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(cwd / "photos" / f"{i}.png")
    predicted = run_command(
        cwd, "task=predict", "mixture=outputs/solve/one", "predict.images=photos", "name=one", SETTINGS[-3]
    )
    assert predicted.rc == 0, predicted.err
    with (cwd / "outputs" / "predict" / "one" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (net,) = load_mixture(cwd / "outputs" / "train" / "one").members
    z = net(torch.tensor(pixels[:, None]).float() / 255)
    answers = [(z + torch.tensor(first["members"][k].get("bias", [0.0] * 3))).argmax(1).tolist() for k in drawn]
    for i, row in enumerate(rows):
        assert row["answer"] == "157"[answers[int(row["member"])][i]]


def test_a_training_that_starts_from_biased_members_updates_them_apart(solved):
    cwd, _ = solved
    (net,) = load_mixture(cwd / "outputs" / "train" / "one").members
    mixture = Mixture([Biased(net, [2.0, 0.0, -2.0]), Biased(net, [-2.0, 0.0, 2.0])])
    recipe = json.loads((cwd / "outputs" / "train" / "one" / "mixture" / "config.json").read_text())
    models = [recipe.pop("model") | {"bias": [2.0, 0.0, -2.0]}]
    models.append(models[0] | {"bias": [-2.0, 0.0, 2.0]})
    save_mixture(mixture, cwd / "pair", recipe | {"L": 2, "models": models}, "")
    finished = run_command(
        cwd, "members=[pair]", "trainer.max_epochs=1", "lambda_solver=uniform", "name=on", *SETTINGS[-3:], *FAST
    )
    assert finished.rc == 0, finished.err
    trained = load_mixture(cwd / "outputs" / "train" / "on")
    assert [member.bias.tolist() for member in trained.members] == [[2.0, 0.0, -2.0], [-2.0, 0.0, 2.0]]
    weights = [member.net.net[1].weight for member in trained.members]
    assert not torch.equal(*weights)
    assert all(not torch.equal(weight, net.net[1].weight) for weight in weights)


def test_the_python_of_the_page_runs_as_printed(solved, monkeypatch):
    cwd, _ = solved
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "preferences" in block]
    monkeypatch.chdir(cwd)
    generator = seeded(7)
    names = {"x": torch.rand(4, 1, 8, 8, generator=generator), "y": torch.tensor([0, 1, 2, 0])}
    exec(code.replace("RUN", "one"), names)
    assert names["pool"].num_members == 19
    assert len(names["pool"].by_network()) == 1
    assert names["mixture"].num_members == int((names["pool"].weights > 0).sum())


def test_a_table_of_another_width_is_refused_before_any_attack(solved):
    cwd, _ = solved
    argv = ("task=solve", "members=[outputs/train/one]", "biases=[[0.3,0.2,0.1,0]]", "name=no", *SETTINGS[-3:])
    said = run_command(cwd, *argv).refusal()
    assert "biases=[...] has 4 columns, but Digits (8x8), classes 1, 5, 7, averages of 16 has 3 classes" in said
    assert not (cwd / "outputs" / "solve" / "no").exists()


def test_one_member_alone_is_told_of_biases(solved):
    cwd, _ = solved
    said = run_command(cwd, "task=solve", "members=[outputs/train/one]", "name=no", *SETTINGS[-3:]).refusal()
    assert "biases=[0.1,0.3,1]" in said


def test_equal_weights_of_many_members_sum_to_one():
    """25 weights of 1/25 sum to a number above 1, which results.json would call damaged."""
    right = np.ones((25, 4))
    right[0, 1] = 0
    assert expectation(np.full(25, 1 / 25), right).tolist() == pytest.approx([1, 0.96, 1, 1])
    assert expectation(np.full(25, 1 / 25), right).max() == 1.0
