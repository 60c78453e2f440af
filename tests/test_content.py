"""A measurement belongs to the content that it measured: names stay when the files behind them change."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from builders.runs import read_results
from mixadv import load_mixture
from mixadv.members.store import read_config, save_mixture

QUICK = ("protocol.diagnosed=0", "trainer.accelerator=cpu", "name=one")
ANEW, DONE = "have changed since; measuring anew", "is done"
FACTORY = """
import torch
from torch import nn

def from_file():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.load_state_dict(torch.load("net.pt"))
    return net

def random():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
"""


@pytest.fixture
def mixture(trained):
    return load_mixture(trained.path)


def export(mixture, trained, folder):
    save_mixture(mixture, folder, read_config(trained.path), "")


def other(mixture):
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(parameter.flip(0))
    return mixture


def clean(folder, task="evaluate"):
    return read_results(folder / "outputs" / task / "one")["clean"]["expected_accuracy"]


def measured_anew(command, argv, change, folder, task="evaluate"):
    """Measure, again (finished), change, again (measured anew), again (finished): the two accuracies."""
    assert command(*argv).rc == 0
    before = clean(folder, task)
    again = command(*argv)
    assert DONE in again.out
    assert ANEW not in again.out
    change()
    anew = command(*argv)
    assert anew.rc == 0, anew.err
    assert ANEW in anew.out
    after = clean(folder, task)
    again = command(*argv)
    assert DONE in again.out
    assert ANEW not in again.out
    return before, after


def accuracy(mixture):
    """On the test digits, in a loop over members."""
    from mixadv.data.digits import Digits

    data = Digits(num_test=20)
    data.prepare_data()
    data.setup("fit")
    with torch.no_grad():
        answers = [
            (member(data.test_images / 255).argmax(1) == data.test_labels).double() for member in mixture.members
        ]
    return float(sum(w * right.mean() for w, right in zip(mixture.weights.tolist(), answers, strict=True)))


def test_a_mixture_exported_anew_under_the_same_name_is_measured_anew(command, tmp_path, trained, mixture):
    export(mixture, trained, tmp_path / "three")
    first = accuracy(mixture)

    def again():
        mixture.set_weights([0.0, 0.0, 1.0])
        export(mixture, trained, tmp_path / "three")

    argv = ("task=evaluate", "mixture=three", "data.num_test=20", *QUICK)
    before, after = measured_anew(command, argv, again, tmp_path)
    assert (before, after) == (pytest.approx(first), pytest.approx(accuracy(mixture)))
    assert before != after


def test_members_whose_files_change_are_weighed_anew(command, tmp_path, own_modules, trained, mixture):
    """The file of a factory: its name and its code stay."""
    (tmp_path / "content_models.py").write_text(FACTORY)
    export(mixture, trained, tmp_path / "three")
    torch.manual_seed(0)
    torch.save({"1.weight": torch.randn(10, 64), "1.bias": torch.zeros(10)}, tmp_path / "net.pt")

    def change():
        torch.save({"1.weight": torch.zeros(10, 64), "1.bias": 2 * torch.eye(10)[3]}, tmp_path / "net.pt")

    argv = ("task=solve", "members=[three,content_models:from_file]", "data.num_test=20", "data.num_val=20", *QUICK)
    measured_anew(command, argv, change, tmp_path, "solve")
    # Two of twenty digits are a three.
    assert read_results(tmp_path / "outputs" / "solve" / "one")["members"][3]["robust"] == pytest.approx(0.1)


def test_images_that_change_are_measured_anew_and_without_them_results_are_shown(command, tmp_path, own_modules):
    """The factory draws its parameters; that makes it no other content the next time."""
    (tmp_path / "content_models.py").write_text(FACTORY)
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for k in range(4):
                image = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "pictures" / split / name / f"{k}.png")

    def change():
        (tmp_path / "pictures" / "test" / "bee" / "0.png").unlink()

    data = ("data=image_folder", "data.root=pictures", "data.num_val=2", "eps=0.1")
    argv = ("task=evaluate", "members=[content_models:random]", *data, *QUICK)
    measured_anew(command, argv, change, tmp_path)
    assert read_results(tmp_path / "outputs" / "evaluate" / "one")["num_examples"] == 7
    shutil.rmtree(tmp_path / "pictures")
    gone = command(*argv)
    assert gone.rc == 0
    assert DONE in gone.out


def test_a_finished_job_of_a_sweep_is_measured_anew_too(command, tmp_path, trained, mixture):
    export(mixture, trained, tmp_path / "three")
    argv = ("-m", "task=evaluate", "mixture=three", "data.num_test=20,10", *QUICK[:-1])
    assert command(*argv).rc == 0
    assert command(*argv).out.count(DONE) == 2
    export(other(mixture), trained, tmp_path / "three")
    assert command(*argv).out.count(ANEW) == 2


def test_results_stay_until_the_new_measurement_begins(command, tmp_path, trained, mixture):
    """A command that is refused leaves what was there."""
    export(mixture, trained, tmp_path / "three")
    argv = ("task=evaluate", "mixture=three", "data.num_test=20", *QUICK)
    assert command(*argv).rc == 0
    export(other(mixture), trained, tmp_path / "three")
    refused = command(*argv, "trainer.accelerator=mps")
    assert refused.rc == 1
    assert (tmp_path / "outputs" / "evaluate" / "one" / "results.json").exists()
