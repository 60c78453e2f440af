"""task=solve: weights over classifiers that exist, from the command line to the exported mixture."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builders.runs import read_results
from conftest import TINY, run_command
from mixadv import load_mixture
from mixadv.report import read_run
from mixadv.report.figures.solve import solution_figure
from mixadv.report.solve import solution_sentences, solution_table
from oracles_game import full_linear_program
from oracles_intervals import paired_interval_by_weights

FACTORY = """
import torch
from torch import nn

def wide():
    torch.manual_seed(11)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.mul_(4)
    return net
"""
# The split of the runs that were trained: what is fitted on must not have been trained on.
SETTINGS = ("eps=0.05", "data=digits", "data.num_train=200", "data.num_test=60", "trainer.accelerator=cpu")
FAST = (
    *("protocol.diagnosed=0", "protocol.attacks.pgd-20.num_steps=6"),
    *("protocol.attacks.pgd-20.restarts=1", "lambda_solver.num_rounds=4"),
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Two trained runs of different seeds, a state dict of the first, and a factory."""
    cwd = tmp_path_factory.mktemp("shelf")
    for seed in (1, 2):
        finished = run_command(cwd, *TINY, "L=1", f"seed={seed}", f"name='single,seed={seed}'")
        assert finished.rc == 0, finished.err
    export = cwd / "outputs" / "train" / "single,seed=1" / "mixture" / "mixture.safetensors"
    state = {key.removeprefix("members.0."): value for key, value in load_file(export).items() if key != "weights"}
    torch.save({"state_dict": {f"module.{key}": 0.5 * value for key, value in state.items()}}, cwd / "old.pt")
    (cwd / "shelf_models.py").write_text(FACTORY)
    return cwd


@pytest.fixture(scope="module")
def solved(shelf):
    """The weights over all four: look, do not touch."""
    members = "members=[outputs/train/single,seed=1,outputs/train/single,seed=2,old.pt,shelf_models:wide]"
    argv = ("task=solve", members, "model=linear", "name=four", *SETTINGS, *FAST)
    finished = run_command(shelf, *argv)
    assert finished.rc == 0, finished.err
    return shelf / "outputs" / "solve" / "four", finished, argv


def test_the_weights_are_optimal_on_everything_that_was_found(solved):
    path, _, _ = solved
    results = read_results(path)
    solve = results["solve"]
    assert results["L"] == 4
    assert sum(results["weights"]) == pytest.approx(1)
    assert [row["who"] for row in solve["rows"]] == [
        *("single,seed=1", "single,seed=2", "old", "shelf_models:wide"),
        *("uniform mixture", "optimal mixture"),
    ]
    certificate = solve["certificate"]
    assert 0 <= certificate["gap"] < 0.06
    assert certificate["value_lp"] <= certificate["value_at_weights"] + 1e-9 <= certificate["value_at_uniform"] + 2e-9
    assert certificate["value_lp"] <= certificate["best_member"] + 1e-9
    pool = {row["who"]: row["pool"]["accuracy"] for row in solve["rows"]}
    assert pool["optimal mixture"] >= max(pool.values()) - 1e-9
    bounds = solve["history"]["lower_bound"]
    assert bounds == sorted(bounds)
    # The factory's net is random: it gets next to nothing.
    assert results["weights"][3] < 0.1


def test_the_regret_on_the_test_points_is_that_of_the_full_linear_program(solved):
    path, _, _ = solved
    results = read_results(path)
    with np.load(path / "records.npz") as arrays:
        right = np.stack([arrays[name] for name in arrays.files if name.startswith("member_correct/")])
        robust, uniform = arrays["robust"], arrays["robust uniform"]
    losses = 1.0 - right.transpose(2, 0, 1)
    value, _, _ = full_linear_program(losses)
    lam = np.asarray(results["weights"])
    assert results["game"]["value_lp"] == pytest.approx(value, abs=1e-7)
    assert results["game"]["value_at_weights"] == pytest.approx((losses @ lam).max(1).mean(), abs=1e-6)
    assert results["robust"]["expected_accuracy"] == pytest.approx(1 - (losses @ lam).max(1).mean(), abs=1e-6)
    assert uniform.mean() == pytest.approx(1 - losses.mean(2).max(1).mean(), abs=1e-6)
    rows = {row["who"]: row for row in results["solve"]["rows"]}
    assert rows["optimal mixture"]["test"]["accuracy"] == pytest.approx(robust.mean(), abs=1e-6)
    assert rows["uniform mixture"]["test"]["accuracy"] == pytest.approx(uniform.mean(), abs=1e-6)
    for k, who in enumerate(("single,seed=1", "single,seed=2", "old", "shelf_models:wide")):
        assert rows[who]["test"]["accuracy"] == pytest.approx(right[:, k].min(0).mean(), abs=1e-9)


def test_the_table_the_certificate_and_what_holds_beyond_the_interval_are_printed(solved):
    path, finished, _ = solved
    for part in ("single,seed=2", "uniform mixture", "optimal mixture", "fresh %", "Certain:", "Estimate:"):
        assert part in finished.out, part
    sentences = solution_sentences(read_run(path))
    assert "old: no normalisation" not in sentences[2]
    assert "shelf_models:wide: as the factory built it" in sentences[2]
    with np.load(path / "records.npz") as arrays:
        difference = arrays["robust"] - arrays["robust uniform"]
    points = 100 * difference.mean()
    low, high = (100 * end for end in paired_interval_by_weights(difference))
    assert f"minus uniform mixture: {points:+.1f} points, 95 % interval [{low:+.1f}, {high:+.1f}]" in (sentences[-1])


def test_the_heading_counts_the_classifiers_of_the_table_when_the_weights_are_damaged(solved, tmp_path):
    path = tmp_path / "damaged"
    shutil.copytree(solved[0], path)
    results = read_results(path)
    count = len(results["weights"])
    (path / "results.json").write_text(json.dumps({**results, "weights": [2.0, -1.0]}))
    run = read_run(path)
    assert any("weights" in note for note in run.notes)
    assert f": {count} classifiers weighed" in solution_table(run).title


def test_the_figure_shows_rounds_weights_and_everybody(solved):
    path, _, _ = solved
    assert (path / "solve.png").stat().st_size > 20_000
    run = read_run(path)
    figure = solution_figure(run)
    axes = {axes.get_label(): axes for axes in figure.axes}
    assert len(axes["weights"].lines) == 4
    limit = axes["rounds"].lines[0].get_ydata()
    np.testing.assert_allclose(limit, [100 * (1 - v) for v in run.results.solve.history.lower_bound])
    assert len(axes["accuracy"].get_yticks()) == 6


def test_the_exported_mixture_is_evaluated_by_name_only_where_it_needs_code(solved, shelf):
    path, _, _ = solved
    refused = run_command(shelf, "task=evaluate", f"mixture={path}", "name=no", *FAST[:3])
    assert "shelf_models:wide" in refused.refusal()
    named = run_command(
        shelf,
        "task=evaluate",
        f"mixture={path}",
        "members=[shelf_models:wide]",
        "name=yes",
        *FAST[:3],
        "trainer.accelerator=cpu",
    )
    assert named.rc == 0, named.err
    again = read_results(shelf / "outputs" / "evaluate" / "yes")
    here = read_results(path)
    assert [(m["name"], m["source"]) for m in again["members"]] == [(m["name"], m["source"]) for m in here["members"]]
    assert again["num_examples"] == 60
    assert again["weights"] == pytest.approx(read_results(path)["weights"], abs=1e-7)
    assert again["clean"]["expected_accuracy"] == pytest.approx(
        read_results(path)["clean"]["expected_accuracy"], abs=1e-6
    )
    before = os.getcwd()
    os.chdir(shelf)
    try:
        mixture = load_mixture(path, factories=["shelf_models:wide"])
    finally:
        os.chdir(before)
    assert mixture.num_members == 4
    card = (path / "mixture" / "README.md").read_text()
    assert "factories=['shelf_models:wide']" in card
    assert f"{read_results(path)['robust']['expected_accuracy']:.4f}" in card


def test_the_same_command_shows_what_it_found(solved, shelf):
    path, _, argv = solved
    before = (path / "results.json").read_bytes()
    again = run_command(shelf, *argv)
    assert again.rc == 0
    assert "is done; its results" in again.out
    assert "optimal mixture" in again.out
    assert (path / "results.json").read_bytes() == before


def test_another_solver_may_play(shelf):
    members = "members=[outputs/train/single,seed=1,outputs/train/single,seed=2]"
    # Data, eps and norm are those that the members record.
    finished = run_command(
        shelf,
        "task=solve",
        members,
        "lambda_solver=oracle",
        "lambda_solver.num_steps=3",
        "name=oracle",
        *FAST[:3],
        "trainer.accelerator=cpu",
        "trainer.limit_val_batches=1",
        "data.eval_batch_size=7",
    )
    assert finished.rc == 0, finished.err
    results = read_results(shelf / "outputs" / "solve" / "oracle")
    assert results["solve"]["fit"]["num_examples"] == 7
    assert results["threat_model"] == {"norm": "linf", "eps": 0.05}
    assert results["solve"]["certificate"]["gap"] >= 0
    assert results["solve"]["fit"]["num_attacks"] == 4


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ((), "needs members=["),
        (("members=[outputs/train/single,seed=1]",), "holds one classifier"),
        (("members=[outputs/train/single,seed=1,nowhere.pt]",), "nothing at nowhere.pt"),
        (("members=[old.pt,old.pt]", "model=small_cnn"), "model="),
        (("members=[old.pt,shelf_models:narrow]", "model=linear"), "shelf_models:narrow"),
        (("members=[old.pt,shelf_models:wide]", "model=linear", "eps=2"), "larger than the whole input range"),
        (("members=[old.pt,shelf_models:wide]", "model=linear", "lambda_solver.num_rounds=0"), "num_rounds"),
        (("members=[old.pt,shelf_models:wide]", "model=linear", "lambda_solver=uniform"), "solves nothing"),
        (("members=[old.pt,shelf_models:wide]", "model=linear", "lambda_solver.time_limit=1e-6"), "out of time"),
    ],
)
def test_what_cannot_be_weighed_is_refused_in_one_line(shelf, argv, part):
    finished = run_command(shelf, "task=solve", "name=refused", *SETTINGS, *FAST[:3], *argv)
    assert part in finished.refusal()
    if "time_limit" not in str(argv):
        assert not (shelf / "outputs" / "solve" / "refused").exists()


def test_members_trained_for_other_balls_need_a_decision(shelf):
    other = run_command(shelf, *TINY, "L=1", "seed=3", "eps=0.1", "name=other")
    assert other.rc == 0, other.err
    members = "members=[outputs/train/single,seed=1,outputs/train/other]"
    finished = run_command(shelf, "task=solve", members, "name=undecided")
    assert "was trained with eps=0.1" in finished.refusal()
    assert "say eps=..." in finished.refusal()


def test_members_that_answer_with_probabilities_are_refused(shelf):
    (shelf / "soft_models.py").write_text(
        "from torch import nn\n\ndef soft():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))\n"
    )
    finished = run_command(shelf, "task=solve", "members=[old.pt,soft_models:soft]", "model=linear", *SETTINGS)
    assert "probabilities" in finished.refusal()


def test_members_of_other_classes_are_refused(shelf):
    (shelf / "few_models.py").write_text(
        "from torch import nn\n\ndef few():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )
    finished = run_command(shelf, "task=solve", "members=[old.pt,few_models:few]", "model=linear", *SETTINGS)
    assert "7" in finished.refusal()


def test_a_safetensors_file_is_a_member(shelf):
    state = torch.load(shelf / "old.pt", weights_only=True)["state_dict"]
    save_file({key.removeprefix("module."): value for key, value in state.items()}, shelf / "new.safetensors")
    finished = run_command(
        shelf, "task=solve", "members=[old.pt,new.safetensors]", "model=linear", "name=twins", *SETTINGS, *FAST
    )
    assert finished.rc == 0, finished.err
    results = read_results(shelf / "outputs" / "solve" / "twins")
    # The same classifier twice: nothing to gain.
    rows = results["solve"]["rows"]
    assert len({row["pool"]["accuracy"] for row in rows}) == 1
    assert results["game"]["matching_penny_gap"] == pytest.approx(0, abs=1e-9)


def test_another_split_than_the_members_own_is_flagged(shelf):
    members = "members=[outputs/train/single,seed=1,outputs/train/single,seed=2]"
    argv = ("task=solve", members, "name=leaky", "data.val_fraction=0.3", *FAST, "trainer.accelerator=cpu")
    finished = run_command(shelf, *argv)
    assert finished.rc == 0, finished.err
    (first, second) = read_results(shelf / "outputs" / "solve" / "leaky")["flags"]
    assert first["name"] == second["name"] == "fitted-on-training-images"
    assert "val_fraction" in first["evidence"]
    assert "Flag: fitted-on-training-images" in finished.out


def test_what_a_foreign_record_says_is_checked(shelf):
    source = shelf / "outputs" / "train" / "single,seed=1" / "mixture"
    for number, (key, value, part) in enumerate(
        [("threat_model", {}, "threat_model.norm"), ("threat_model", {"norm": "l7"}, "l7"), ("eps", 99, "eps=99")]
    ):
        copy = shelf / f"foreign{number}"
        shutil.copytree(source, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {key: value}))
        finished = run_command(shelf, "task=solve", f"members=[foreign{number},foreign{number}]", *FAST)
        assert part in finished.refusal()
        assert part in run_command(shelf, "task=evaluate", f"mixture=foreign{number}").refusal()
