"""Parts of a user's own, of every kind, that mixadv does not know, through the command line.

The parts are those of docs/extending.md; its commands are run as they stand, and smaller.
"""

import csv
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from builders.runs import read_results
from conftest import TINY, run_command
from mixadv import load_mixture
from mixadv.checkpoint_files import read_checkpoint
from mixadv.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


COMMANDS = [line.removeprefix("mixadv ") for block in blocks("bash") for line in block.splitlines()]


@pytest.fixture
def own(own_modules):
    """A working directory with the parts of the page."""
    (own_modules / "mine.py").write_text("\n\n".join(blocks("python")))
    for text in blocks("yaml"):
        path = own_modules / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return own_modules


def small(words):
    """The words of a command, after those of TINY whose group it does not choose otherwise."""
    chosen = {word.partition("=")[0] for word in words if "=" in word and "." not in word.partition("=")[0]}
    kept = [w for w in TINY if w.partition("=")[0].partition(".")[0] not in chosen - {"data", "model", "protocol"}]
    if any(word.startswith("task=evaluate") for word in words):
        kept = [w for w in kept if w.startswith(("protocol", "trainer", "logger"))]
    # Hydra takes its flags before all keys.
    flags = words[:2] if words[0].startswith("--") else []
    return [*flags, *kept, *words[len(flags) :]]


def run(cwd, text):
    finished = run_command(cwd, *small(shlex.split(text)))
    assert finished.rc == 0, finished.err
    name = re.search(r"name=(\S+)", text)[1]
    task = "evaluate" if "task=evaluate" in text else "train"
    return cwd / "outputs" / task / name


# --- the page ----------------------------------------------------------------------------------------------


def page(own, name):
    """Run the command of the page that goes by this name, and return its directory."""
    (text,) = (text for text in COMMANDS if text.endswith(f"name={name}"))
    return run(own, text)


def test_the_page_says_how_to_bring_every_kind_of_part():
    names = [re.search(r"name=(\S+)", text)[1] for text in COMMANDS]
    assert names == [
        *("own-model", "again", "own-loss", "own-solver", "own-training-attack", "own-attack"),
        *("own-data", "again-data", "own-optimizer", "own-scheduler", "own-function"),
        *("own-callback", "own-metric", "averaged", "own-logger"),
    ]


def test_an_own_model_is_trained_exported_and_evaluated_again(own):
    path = page(own, "own-model")
    record = json.loads((path / "mixture" / "config.json").read_text())
    assert record["model"]["factory"] == "mine:ConvNet"
    arguments = record["model"]["arguments"]
    assert (arguments["num_classes"], arguments["in_channels"], arguments["channels"]) == (10, 1, 3)
    assert len(arguments["mean"]) == len(arguments["std"]) == 1
    assert "image_shape" not in arguments
    mixture = load_mixture(path, factories=["mine:ConvNet"])
    assert mixture.members[0].conv.out_channels == 3
    # It was trained: both members moved, and away from each other.
    assert not torch.equal(mixture.members[0].head.weight, mixture.members[1].head.weight)
    card = (path / "mixture" / "README.md").read_text()
    assert "`mine:ConvNet`" in card
    assert "factories=['mine:ConvNet']" in card
    refused = run_command(own, "task=evaluate", f"mixture={path}", "logger=csv", "name=x").refusal()
    assert "is built by mine:ConvNet (code that is not in this file): name it, members=[mine:ConvNet]" in refused
    again = page(own, "again")
    assert read_results(again)["clean"] == read_results(path)["clean"]
    assert read_results(again)["weights"] == read_results(path)["weights"]


def test_mixtures_of_own_models_are_members_where_the_model_is_named(own):
    for seed in (0, 1):
        run(own, f"model=linear model._target_=mine.ConvNet seed={seed} L=1 trainer.max_epochs=1 name=run{seed}")
    words = [*(w for w in TINY if w.startswith(("protocol", "trainer", "logger"))), "task=solve", "lambda_solver=lp"]
    words += ["members=[outputs/train/run0,outputs/train/run1]", "name=weighed"]
    assert run_command(own, *words).refusal().endswith("or model._target_=mine.ConvNet beside members=[...]")
    finished = run_command(own, *words, "model=linear", "model._target_=mine.ConvNet")
    assert finished.rc == 0, finished.err
    solved = load_mixture(own / "outputs" / "solve" / "weighed", factories=["mine:ConvNet"])
    for member, seed in zip(solved.members, (0, 1), strict=True):
        (trained,) = load_mixture(own / "outputs" / "train" / f"run{seed}", factories=["mine:ConvNet"]).members
        assert torch.equal(member.head.weight, trained.head.weight)


def test_mixtures_of_own_models_label_new_images(own):
    """Its constructor takes no image_shape, so the shape of the images is not in the recipe."""
    path = run(own, "model=linear model._target_=mine.ConvNet L=2 trainer.max_epochs=1 name=own-model")
    mixtures = [path, path / "checkpoints" / "last.ckpt"]
    solve = [*(w for w in TINY if w.startswith(("protocol", "trainer", "logger"))), "task=solve", "lambda_solver=lp"]
    solve += [f"members=[{path}]", "model=linear", "model._target_=mine.ConvNet", "name=weighed"]
    assert (finished := run_command(own, *solve)).rc == 0, finished.err
    mixtures.append(own / "outputs" / "solve" / "weighed")
    (own / "photos").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(own / "photos" / "a.png")
    x = torch.arange(64.0).reshape(1, 1, 8, 8) / 255
    for i, mixture in enumerate(mixtures):
        words = (f"mixture={mixture}", "members=[mine:ConvNet]", "predict.images=photos", f"name=p{i}")
        finished = run_command(own, "task=predict", *words, "trainer.accelerator=cpu")
        assert finished.rc == 0, finished.err
        with (own / "outputs" / "predict" / f"p{i}" / "predictions.csv").open(newline="") as file:
            (line,) = csv.DictReader(file)
        members = load_mixture(mixture, factories=["mine:ConvNet"])
        with torch.no_grad():
            answers = [int(member(x).argmax()) for member in members.members]
        for c in range(10):
            right = sum(float(w) for w, a in zip(members.weights, answers, strict=True) if a == c)
            assert float(line[f"p_answer/{c}"]) == pytest.approx(right, abs=1e-6)


def test_an_own_model_goes_on_from_its_checkpoint_and_is_shown_when_done(own):
    text = "model=linear model._target_=mine.ConvNet name=twice"
    path = run(own, text)
    before = (path / "mixture" / "mixture.safetensors").read_bytes()
    for name in ("DONE", "results.json"):
        (path / name).unlink()
    run(own, text)
    assert (path / "mixture" / "mixture.safetensors").read_bytes() == before
    shown = run_command(own, *small(shlex.split(text)))
    assert shown.rc == 0


def test_an_own_loss_from_an_own_configuration_directory(own):
    path = page(own, "own-loss")
    assert "share: 0.2" in (path / "config.yaml").read_text()
    # Smoothing changes what is learned.
    plain = run(own, "name=plain")
    with (path / "metrics.csv").open() as first, (plain / "metrics.csv").open() as second:
        losses = [[row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]] for file in (first, second)]
    assert losses[0] != losses[1]


def test_an_own_solver(own):
    path = page(own, "own-solver")
    weights = read_results(path)["weights"]
    assert sum(weights) == pytest.approx(1)
    assert weights[0] != weights[1]


def test_own_attacks_of_training_and_of_evaluation(own):
    assert read_results(page(own, "own-training-attack"))["weights"]
    found = read_results(page(own, "own-attack"))
    assert "corners" in found["attacks"]
    assert {"pgd-20", "arc", "subsets"} <= set(found["attacks"])


def test_own_data_are_said_again_when_a_mixture_is_read(own):
    path = page(own, "own-data")
    assert read_results(path)["data"]["name"] == "Stripes"
    assert len(read_results(path)["weights"]) == 2
    refused = run_command(own, "task=evaluate", f"mixture={path}", "logger=csv", "name=x").refusal()
    assert refused == (
        f"the record of {path} names data of 'mine.Stripes', which is not part of mixadv: give data=... (or "
        "data._target_=mine.Stripes) on the command line"
    )
    assert read_results(page(own, "again-data"))["clean"] == read_results(path)["clean"]


def rows(path):
    """metrics.csv, column by column: the numbers that are there."""
    with (path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in table if row[name]] for name in table[0]}


def test_an_optimizer_of_torch(own):
    path = page(own, "own-optimizer")
    last = read_checkpoint(path / "checkpoints" / "last.ckpt")
    # Adam's, one for each member, as the checkpoint keeps them.
    assert len(last["optimizer_states"]) == 2
    for state in last["optimizer_states"]:
        assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["param_groups"][0]["weight_decay"] == 5e-4
    assert rows(path)["train/lr"][0] == 0.001


def test_schedulers_of_torch_and_of_ones_own_get_their_length(own):
    """200 images in batches of 20, two members: 40 updates in two epochs, so 20 for each."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    cycle = torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([parameter], 0.1), max_lr=0.2, total_steps=20)
    found = rows(page(own, "own-scheduler"))["train/lr"]
    rates = []
    for _ in range(20):
        rates.append(cycle.get_last_lr()[0])
        cycle.optimizer.step()
        cycle.step()
    assert len(set(found)) > 2
    assert all(min(abs(rate - one) for one in rates) < 1e-6 for rate in found)
    # By hand: four updates up, then one over the root.
    by_hand = [0.1 * min((done + 1) / 4, (4 / (done + 1)) ** 0.5) for done in range(20)]
    found = rows(page(own, "own-function"))["train/lr"]
    assert len(set(found)) > 2
    assert all(min(abs(rate - one) for one in by_hand) < 1e-6 for rate in found)


def test_an_own_callback(own):
    (text,) = (text for text in COMMANDS if text.endswith("name=own-callback"))
    finished = run_command(own, *small(shlex.split(text)))
    assert finished.rc == 0, finished.err
    assert finished.out.count("lambda: [") == 2


def test_what_an_own_callback_logs_and_remembers(own):
    path = page(own, "own-metric")
    last = read_checkpoint(path / "checkpoints" / "last.ckpt")
    first, second = (
        torch.cat([last["state_dict"][f"mixture.members.{k}.{name}"].flatten() for name in names_of(last, k)])
        for k in range(2)
    )
    distances = rows(path)["val/distance"]
    assert len(distances) == 2
    assert distances[1] == pytest.approx(2 * float((first - second).norm()), rel=1e-6)
    assert last["callbacks"]["Distances"]["largest"] == pytest.approx(max(distances), rel=1e-6)


def names_of(checkpoint, k):
    """Of the parameters of member k; linear members have no buffers but those of the normalisation."""
    prefix = f"mixture.members.{k}."
    names = [name.removeprefix(prefix) for name in checkpoint["state_dict"] if name.startswith(prefix)]
    return [name for name in names if name.endswith(("weight", "bias"))]


def test_averages_and_early_stopping_beside_the_defaults(own):
    path = page(own, "averaged")
    last = read_checkpoint(path / "checkpoints" / "last.ckpt")
    kept = {name.partition("{")[0] for name in last["callbacks"]}
    assert kept == {"mixadv.Checkpoints", "EMAWeightAveraging", "EarlyStopping"}
    # The rate of each member, beside the rate of the update.
    assert {name for name in rows(path) if name.startswith("lr-")} == {"lr-SGD", "lr-SGD-1"}
    mixture = load_mixture(path)
    best = read_checkpoint(path / "checkpoints" / "best.ckpt")["state_dict"]
    for k, member in enumerate(mixture.members):
        for name, value in member.state_dict().items():
            assert torch.equal(value, best[f"mixture.members.{k}.{name}"])


def test_an_own_logger_beside_the_history(own):
    path = page(own, "own-logger")
    lines = [json.loads(line) for line in (path / "lines.jsonl").read_text().splitlines()]
    settings, history, measured = lines[0], lines[1:-1], lines[-1]
    assert settings == {"L": 2, "eps": 0.05}
    with (path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in history] == [int(row["step"]) for row in table]
    for line, row in zip(history, table, strict=True):
        for name in ("train/loss", "val/robust_accuracy", "lambda/0"):
            assert (name in line) == bool(row[name])
            assert name not in line or line[name] == pytest.approx(float(row[name]), rel=1e-6)
    assert measured["test/robust_accuracy"] == read_results(path)["robust"]["expected_accuracy"]


# --- what is refused ---------------------------------------------------------------------------------------

REFUSED = {
    "loss._target_=mine.Smothed": ("loss._target_='mine.Smothed' does not exist: mine has no Smothed", ""),
    "loss._target_=nowhere.Smoothed": ("loss._target_='nowhere.Smoothed' does not exist: no module nowhere in ", ""),
    "loss._target_=broken.Loss": (
        "loss._target_='broken.Loss' cannot be imported (ZeroDivisionError: ",
        "of broken.py",
    ),
    "loss._target_=leaving.Loss": ("loss._target_='leaving.Loss' cannot be imported (SystemExit: ", ""),
    "loss._target_=mine.Softmin": ("loss._target_=mine.Softmin is no RobustLoss", "mixadv.losses.RobustLoss"),
    "loss._target_=parts.give_number": ("loss._target_=parts.give_number is no RobustLoss", ""),
    "loss._target_=parts.Unfinished": ("loss._target_=parts.Unfinished is a base class", ""),
    "loss._target_=mine.Smoothed +loss.share=2": ("loss: share is 2: it must be in [0, 1)", ""),
    "loss._target_=mine.Smoothed +loss.share=much": ("loss.share=much must be a number", ""),
    "loss._target_=mine.Smoothed +loss.part=1": ("loss.part: Smoothed has no such setting; it has share", "~loss.part"),
    "loss._target_=parts.Needy": ("loss.beta has no default: add loss.beta=...", ""),
    "loss._target_=parts.Failing": ("loss: KeyError: 'x', line ", "of parts.py"),
    "loss._target_=parts.Choosy +loss.kind=c": ("loss.kind=c must be 'a' or 'b'", ""),
    "attack._target_=mine.corners": ("attack.num_steps: corners has no such setting", "~attack.num_steps"),
    "attack._target_=mine.corners +attack._partial_=true": ("attack.num_steps: corners has no such setting", ""),
    "protocol.validation._target_=parts.Attack": ("protocol.validation.num_steps: Attack has no such", ""),
    "+protocol.attacks.x={_target_:mine.ConvNet}": ("protocol.attacks.x._target_=mine.ConvNet is no Attack", ""),
    "data._target_=mine.Smoothed": ("data._target_=mine.Smoothed is no ImageDataModule", ""),
    "model._target_=mine.Smoothed +model.share=0.5": ("mine:Smoothed returned a Smoothed", ""),
    "model._target_=mine.ConvNet +model.channels=many": ("model.channels=many must be a whole number", ""),
    "model._target_=mine.ConvNet +model.width=3": ("model.width: ConvNet has no such setting", "channels"),
    "model._target_=mine.ConvNet +model.channels={_target_:os.getcwd}": ("model.channels=", "plain values"),
    "model._target_=mine.ConvNet +model._partial_=true": ("model._partial_=True", "plain values"),
    "model._target_=mine.ConvNet +model.num_classes=7": ("model: mine:ConvNet tells 7 classes apart", "has 10"),
    "model._target_=parts.two_answers": ("member parts:two_answers returns a tuple", ""),
    "model._target_=parts.centred": ("member parts:centred answers an image differently in another batch", ""),
    "model._target_=os.system": ("model._target_='os.system' is refused", ""),
}
PARTS = """
import torch
from typing import Literal
from dataclasses import dataclass
from torch import nn
from mixadv.losses import AT, RobustLoss

def give_number():
    return 3

class Unfinished(RobustLoss):
    pass

class Needy(AT):
    def __init__(self, beta):
        pass

class Failing(AT):
    def __init__(self):
        {}["x"]

class Choosy(AT):
    def __init__(self, kind: Literal["a", "b"] = "a"):
        pass

class Attack:
    def __call__(self, mixture, x, y, threat_model, generator):
        return x

class Two(nn.Linear):
    def forward(self, x):
        return (super().forward(x.flatten(1)), x)

def two_answers(num_classes, image_shape):
    return Two(64, num_classes)

class Centred(nn.Linear):
    def forward(self, x):
        z = super().forward(x.flatten(1))
        return z - z.mean(0)

def centred(num_classes, image_shape):
    return Centred(64, num_classes)
"""


@pytest.mark.parametrize("words", REFUSED)
def test_an_own_part_that_cannot_work_is_refused_in_one_line(own, words):
    start, also = REFUSED[words]
    (own / "parts.py").write_text(PARTS)
    (own / "broken.py").write_text("\n\n1 / 0\n")
    (own / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    refused = run_command(own, *TINY, *shlex.split(words), "name=bad").refusal()
    assert refused.startswith(start), refused
    assert also in refused
    assert not (own / "outputs" / "train" / "bad").exists()


# --- details -----------------------------------------------------------------------------------------------


def test_parameters_alone_fit_an_own_model(own):
    path = run(own, "model=linear model._target_=mine.ConvNet name=first")
    member = load_mixture(path, factories=["mine:ConvNet"]).members[1]
    torch.save(member.state_dict(), own / "member.pt")
    words = "task=evaluate members=[member.pt] data=digits data.num_train=200 data.num_test=50 eps=0.05 name=alone"
    # Mean and deviation have no default; those of the file take their place.
    alone = run(own, f"{words} model=linear model._target_=mine.ConvNet +model.mean=[0.0] +model.std=[1.0]")
    assert read_results(alone)["clean"]["expected_accuracy"] == read_results(path)["members"][1]["clean"]
    record = json.loads((own / "outputs" / "evaluate" / "alone" / "results.json").read_text())
    assert record["members"][0]["note"].startswith("with the normalisation of its factory")


def test_old_and_new_runs_of_one_model_are_one_setting():
    from mixadv.report.settings import relevant_settings

    old, new = {"name": "resnet18", "width": 64}, {"_target_": "mixadv.models.resnet18", "width": 64}
    found = relevant_settings({"model": old})
    assert found == relevant_settings({"model": new}) == {"model": "resnet18", "model.width": "64"}


def test_a_function_with_some_arguments_given_is_a_model(own):
    (own / "parts.py").write_text("import functools, mine\nthree = functools.partial(mine.ConvNet, channels=3)\n")
    path = run(own, "model=linear model._target_=parts.three trainer.max_epochs=1 name=three")
    assert load_mixture(path, factories=["parts:three"]).members[0].conv.out_channels == 3


def test_a_nested_part_is_built_and_a_name_of_a_package_is_no_hurdle(own):
    from mixadv.tasks.build import instantiate

    (own / "nested").mkdir()
    (own / "nested" / "__init__.py").write_text("from nested.inner import Climb\n")
    (own / "nested" / "inner.py").write_text(
        "from mixadv.attacks.objectives import ExpectedLoss\nclass Climb(ExpectedLoss):\n    pass\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(own)
        node = {"_target_": "mixadv.attacks.pgd.PGD", "num_steps": 3, "objective": {"_target_": "nested.Climb"}}
        attack = instantiate(node, "attack")
        assert type(attack.objective).__name__ == "Climb"
        with pytest.raises(UserError, match=r"attack\.objective\.loss: Climb|attack\.objective\.x: Climb has no"):
            instantiate({**node, "objective": {"_target_": "nested.Climb", "x": 1}}, "attack")


def test_the_working_directory_hides_no_installed_package(own):
    """It comes last: a folder that was unpacked somewhere does not replace what mixadv itself imports."""
    (own / "torchmetrics.py").write_text("raise SystemExit('taken from the working directory')")
    run(own, "loss._target_=mine.Smoothed name=beside")
    assert "torchmetrics" not in sys.modules or "site-packages" in str(sys.modules["torchmetrics"].__file__)
    assert sys.path[-1] == str(own)
