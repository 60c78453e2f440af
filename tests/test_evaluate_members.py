"""task=evaluate members=[...]: any classifiers with the weights that the command gives."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from builders.runs import read_results
from conftest import run_command
from mixadv import Mixture, load_mixture
from mixadv.data.digits import Digits
from mixadv.members.store import read_config, save_mixture
from mixadv.report import read_run

# Fractions of two: float32 holds them exactly.
EXACT = (0.625, 0.125, 0.25)
FIVE = (0.1, 0.3, 0.05, 0.35, 0.2)
FACTORY = """
import torch
from torch import nn

def wide():
    torch.manual_seed(11)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.mul_(4)
    return net

def soft():
    return nn.Sequential(wide(), nn.Softmax(1))

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
"""
QUICK = (
    *("protocol.diagnosed=0", "protocol.attacks.pgd-20.num_steps=4", "protocol.attacks.pgd-20.restarts=1"),
    *("protocol.attacks.arc.num_steps=2", "protocol.attacks.subsets.num_steps=2", "trainer.accelerator=cpu"),
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, trained):
    """`three`, the trained mixture with weights EXACT; `old.pt`, a state dict made from it; a module of factories."""
    cwd = tmp_path_factory.mktemp("shelf")
    mixture = load_mixture(trained.path)
    mixture.set_weights(EXACT)
    save_mixture(mixture, cwd / "three", read_config(trained.path), "")
    state = mixture.members[2].state_dict()
    # Halved logits in another order of classes: unlike any other member, and its answers can be counted.
    torch.save({"state_dict": {f"module.{k}": v for k, v in net_of(state, 0.5).items()}}, cwd / "old.pt")
    (cwd / "evaluated_models.py").write_text(FACTORY)
    return cwd


def net_of(state, factor):
    return {
        key.removeprefix("net."): (factor * value).flip(0) for key, value in state.items() if key.startswith("net.")
    }


def results_named(cwd, name):
    return read_results(cwd / "outputs" / "evaluate" / name)


def records_of(cwd, name):
    with np.load(cwd / "outputs" / "evaluate" / name / "records.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def weights(values):
    return f"weights=[{','.join(map(str, values))}]"


@pytest.fixture(scope="module")
def five(shelf):
    """Five members from three sources with weights of their own: look, do not touch."""
    members = "members=[three,old.pt,evaluated_models:wide]"
    argv = ("task=evaluate", members, weights(FIVE), "model=linear", "name=five", *QUICK)
    finished = run_command(shelf, *argv)
    assert finished.rc == 0, finished.err
    return finished, argv


def test_a_mixture_and_its_members_with_its_weights_have_the_same_numbers(shelf):
    for name, argv in (("whole", ["mixture=three"]), ("parts", ["members=[three]", weights(EXACT)])):
        finished = run_command(shelf, "task=evaluate", *argv, f"name={name}", "data.num_test=20", "seed=5", *QUICK)
        assert finished.rc == 0, finished.err
    whole, parts = results_named(shelf, "whole"), results_named(shelf, "parts")
    for key in ("L", "weights", "num_examples", "clean", "robust", "averaged_twin", "game", "threat_model", "data"):
        assert parts[key] == whole[key], key
    assert parts["weights"] == list(EXACT)
    assert parts["config"]["L"] == 3
    for ours, theirs in zip(parts["members"], whole["members"], strict=True):
        assert {key: ours[key] for key in theirs} == theirs
    ours, theirs = records_of(shelf, "parts"), records_of(shelf, "whole")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_every_member_is_counted_under_its_name_in_the_order_of_the_list(shelf, five):
    results = results_named(shelf, "five")
    found = [(m["name"], m["source"], m["note"]) for m in results["members"]]
    assert found == [
        *((f"three#{k}", "three", "as exported") for k in range(3)),
        ("old", "old.pt", "no normalisation; from state_dict"),
        ("evaluated_models:wide", "evaluated_models:wide", "as the factory built it"),
    ]
    assert results["weights"] == pytest.approx(FIVE, abs=1e-7)
    assert results["weights"] == pytest.approx(FIVE, abs=1e-7)
    assert (results["L"], results["config"]["L"], results["config"]["mixture"]) == (5, 5, None)
    assert results["config"]["weights"] == list(FIVE)

    # Their answers, from scikit-learn's images and the parameters alone.
    data = Digits(num_train=200, num_test=50)
    data.setup()
    pixels = np.rint(load_digits().images * (255 / 16)).reshape(-1, 64)
    x, y = data.test_images.reshape(-1, 64).double() / 255, data.test_labels
    assert {tuple(row) for row in (255 * x.numpy()).round()} <= {tuple(row) for row in pixels}
    stored = load_file(shelf / "three" / "mixture.safetensors")
    logits = []
    for k in range(3):
        state = {key.removeprefix(f"members.{k}."): v.double() for key, v in stored.items() if f"members.{k}." in key}
        (weight,) = (v for v in state.values() if v.ndim == 2)
        (bias,) = (v for v in state.values() if v.shape == (10,))
        mean, std = state["normalize.mean"].flatten(), state["normalize.std"].flatten()
        logits.append(((x - mean) / std) @ weight.T + bias)
    logits.append((0.5 * (x @ weight.T + bias)).flip(1))
    torch.manual_seed(11)
    wide = torch.nn.Linear(64, 10).double()
    logits.append(4 * x @ wide.weight.T.detach() + wide.bias.detach())
    right = torch.stack([z.argmax(1) == y for z in logits]).double().mean(1)
    assert [m["clean"] for m in results["members"]] == pytest.approx(right.tolist(), abs=1e-9)
    assert len(set(right.tolist())) > 3
    expected = sum(lam * share for lam, share in zip(FIVE, right.tolist(), strict=True))
    assert results["clean"]["expected_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_the_number_is_the_worst_expectation_over_all_points_found(shelf, five):
    results, records = results_named(shelf, "five"), records_of(shelf, "five")
    right = np.stack([value for key, value in records.items() if key.startswith("member_correct/")])
    worst = np.einsum("plN,l->pN", right.astype(float), np.array(FIVE)).min(0)
    assert results["robust"]["expected_accuracy"] == pytest.approx(worst.mean(), abs=1e-6)
    np.testing.assert_allclose(records["robust"], worst, atol=1e-6)
    assert records["labels"].shape == (50,)
    assert set(results["attacks"]) == {"pgd-20", "arc", "subsets", "square", "climber"}


def test_data_eps_and_norm_are_the_records_and_the_report_is_whole(shelf, five):
    results = results_named(shelf, "five")
    assert results["threat_model"] == {"norm": "linf", "eps": 0.05}
    assert results["data"] == {"name": "Digits (8x8)", "num_test": 50}
    assert results["config"]["data"]["num_train"] == 200
    assert results["flags"] == []
    path = shelf / "outputs" / "evaluate" / "five"
    assert {"DONE", "report.html", "attacks.png", "examples.npz"} <= {entry.name for entry in path.iterdir()}
    page = (path / "report.html").read_text()
    assert "a mixture of 5 classifiers" in page
    assert read_run(path).state == "done"


def test_the_members_are_named_before_the_attacks_and_a_finished_run_is_shown(shelf, five):
    finished, argv = five
    lines = finished.out.splitlines()
    assert lines[3] == "member 3: old, weight 0.3500 (from old.pt, no normalisation; from state_dict)"
    before = (shelf / "outputs" / "evaluate" / "five" / "results.json").read_bytes()
    again = run_command(shelf, *argv)
    assert (again.rc, again.err) == (0, "")
    assert "is done; its results" in again.out
    assert (shelf / "outputs" / "evaluate" / "five" / "results.json").read_bytes() == before
    other = run_command(shelf, *argv, "weights=[0.2,0.2,0.2,0.2,0.2]")
    assert "weights" in other.refusal()


def test_without_weights_all_are_drawn_alike_and_members_of_another_split_are_flagged(shelf):
    argv = ("task=evaluate", "members=[three,old.pt]", "model=linear", "data.val_fraction=0.3", "name=even", *QUICK)
    finished = run_command(shelf, *argv, "data.num_test=20")
    assert finished.rc == 0, finished.err
    results = results_named(shelf, "even")
    # Not the weights that the mixture brings.
    assert results["weights"] == pytest.approx([1 / 4] * 4, abs=1e-7)
    (flag,) = results["flags"]
    assert flag["name"] == "another-split"
    assert "three was trained with another split (data.val_fraction=0.15 there, 0.3 here)" in flag["evidence"]
    assert "Flag: another-split" in finished.out
    assert "another-split" in (shelf / "outputs" / "evaluate" / "even" / "report.html").read_text()


def test_a_classifier_may_be_alone_and_so_may_an_image(shelf):
    argv = ("members=[old.pt]", "model=linear", "data=digits", "eps=0.05", "data.num_test=1", "name=alone")
    finished = run_command(shelf, "task=evaluate", *argv, *QUICK)
    assert finished.rc == 0, finished.err
    results = results_named(shelf, "alone")
    assert (results["L"], results["weights"], results["members"][0]["name"]) == (1, [1.0], "old")
    assert results["num_examples"] == 1


def test_a_mixture_with_code_needs_its_name_beside_it(shelf):
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    recipe = {"L": 1, "model": {"factory": "evaluated_models:wide"}}
    save_mixture(Mixture([linear]), shelf / "coded", recipe, "")
    said = ("data=digits", "eps=0.05", "data.num_test=4", "name=coded", *QUICK)
    refusal = run_command(shelf, "task=evaluate", "members=[coded]", *said).refusal()
    assert "built by evaluated_models:wide (code that is not in this file)" in refusal
    argv = ("task=evaluate", "members=[coded,evaluated_models:wide]", "weights=[1,0]", *said)
    finished = run_command(shelf, *argv)
    assert finished.rc == 0, finished.err
    results = results_named(shelf, "coded")
    assert [member["source"] for member in results["members"]] == ["coded", "evaluated_models:wide"]
    assert results["weights"] == [1, 0]


def test_a_sweep_may_vary_the_weights(shelf):
    argv = ("-m", "task=evaluate", "members=[three]", "weights=[0,1,0],[0.25,0.75,0]", "name=lam", *QUICK)
    finished = run_command(shelf, *argv, "data.num_test=12")
    assert finished.rc == 0, finished.err
    runs = sorted((shelf / "outputs" / "sweeps" / "lam").glob("*/results.json"))
    first, second = (json.loads(path.read_text()) for path in runs)
    assert [first["weights"], second["weights"]] == [[0, 1, 0], [0.25, 0.75, 0]]
    # Whoever is always drawn is alone.
    assert first["robust"]["expected_accuracy"] == first["members"][1]["robust"]


def test_members_of_other_balls_or_images_need_a_decision(shelf):
    # A file that cannot be loaded: what records say is compared before that.
    other = shelf / "other"
    config = read_config(shelf / "three")
    for key, value, part in (
        ("eps", "0.1", "eps=0.1, three with 0.05: say eps=..."),
        ("threat_model", {"norm": "l2", "eps": 0.05}, "threat_model.norm=l2, three with linf: say threat_model.norm"),
        ("data", config["data"] | {"num_train": 300}, "data.num_train=300, three with 200: say data.num_train=..."),
    ):
        other.mkdir(exist_ok=True)
        (other / "config.json").write_text(json.dumps(config | {key: value}))
        finished = run_command(shelf, "task=evaluate", "members=[three,other]", "name=undecided")
        assert f"other was trained with {part}" in finished.refusal()
    (other / "config.json").write_text(json.dumps(config | {"L": "3"}))
    assert "cannot be read" in run_command(shelf, "task=evaluate", "members=[three,other]", *QUICK).refusal()
    assert not (shelf / "outputs" / "evaluate" / "undecided").exists()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (
            ["members=[three,old.pt]", "weights=[0.5,0.5]"],
            "weights=[...] has 2 numbers, but members=[...] holds 4: three#0, three#1, three#2, old; give one for each",
        ),
        (["members=[three]", "weights=[0.25,0.25,0.25,0.25]"], "has 4 numbers, but members=[...] holds 3: three#0, "),
        (["members=[three]", "L=3"], "L=3: task=evaluate counts the members"),
        (["members=[three,nowhere.pt]"], "there is nothing at nowhere.pt"),
        (["members=[old.pt,evaluated_models:soft]"], "probabilities"),
        (["members=[old.pt,evaluated_models:few]"], "evaluated_models:few has 7"),
        (["members=[evaluated_models:few]"], "7 classes apart, but Digits (8x8) has 10"),
        (["members=[old.pt]", "eps=9", "threat_model=l2"], "exceeds the diagonal 8.00"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(shelf, argv, part):
    said = ("model=linear", "data=digits", "eps=0.05", "name=refused")
    finished = run_command(shelf, "task=evaluate", *said, *QUICK, *argv)
    assert part in finished.refusal()
    assert not (shelf / "outputs" / "evaluate" / "refused").exists()
