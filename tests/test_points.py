"""Saved points are the worst ones, and their replay is a measurement without an attack."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builders.runs import read_results
from conftest import run_command
from mixadv import load_mixture
from mixadv.data.digits import Digits
from mixadv.members.store import read_config, save_mixture
from mixadv.points_file import read

QUICK = ("protocol.diagnosed=0", "trainer.accelerator=cpu", "protocol.attacks.pgd-20.restarts=1")
# A subset of the test set: places in the run and in the data set differ.
IMAGES = ("data.num_test=30",)


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    """A measurement that saved its points: the folder of the command."""
    cwd = tmp_path_factory.mktemp("points")
    argv = ("task=evaluate", f"mixture={trained.path}", "protocol.save_points=true", "name=saved", *IMAGES, *QUICK)
    finished = run_command(cwd, *argv)
    assert finished.rc == 0, finished.err
    return cwd


def place(cwd, name="saved"):
    return cwd / "outputs" / "evaluate" / name


def published():
    """All test images of the data set, in its order."""
    data = Digits()
    data.prepare_data()
    data.setup("fit")
    order = data.test_indices.argsort()
    return data.test_images[order].float() / 255, data.test_labels[order]


def judged(mixture, points, labels):
    """The exact expected accuracy [N], member by member."""
    with torch.no_grad():
        right = [(member(points).argmax(1) == labels).double() for member in mixture.members]
    return sum(w * row for w, row in zip(mixture.weights.tolist(), right, strict=True)).numpy()


def test_the_points_are_those_of_the_numbers(saved, trained):
    found = read(place(saved) / "points.safetensors")
    images, labels = published()
    assert len(found.points) == 30
    assert found.points.dtype == torch.float32
    assert torch.equal(found.labels, labels[found.indices])
    assert not torch.equal(found.indices, torch.arange(30))
    ball = read_results(place(saved))["threat_model"]
    assert (found.ball.norm, found.ball.eps) == (ball["norm"], ball["eps"])
    eps = ball["eps"]
    moved = (found.points.double() - images[found.indices].double()).abs().flatten(1).amax(1)
    assert 0.9 * eps < moved.max() <= eps + 1e-6
    assert 0 <= found.points.min() <= found.points.max() <= 1
    by_hand = judged(load_mixture(trained.path), found.points, found.labels)
    np.testing.assert_allclose(found.expected_accuracy, by_hand, atol=1e-12)
    records = np.load(place(saved) / "records.npz")
    np.testing.assert_allclose(records["robust"], by_hand, atol=1e-12)
    np.testing.assert_array_equal(records["indices"], found.indices)
    clean = judged(load_mixture(trained.path), images[found.indices], found.labels)
    assert by_hand.mean() < clean.mean()
    classes = read_results(place(saved))["classes"]
    assert [one["name"] for one in classes] == [str(c) for c in sorted(set(found.labels.tolist()))]
    for one in classes:
        own = (found.labels == int(one["name"])).numpy()
        assert one["num_examples"] == own.sum()
        assert one["robust"] == pytest.approx(by_hand[own].mean())
        assert one["clean"] == pytest.approx(clean[own].mean())


def replayed(cwd, mixture, *argv, points=None):
    points = points or place(cwd) / "points.safetensors"
    given = () if any(text.startswith("data.") for text in argv) else IMAGES
    return run_command(cwd, "task=evaluate", f"mixture={mixture}", f"points={points}", *given, *QUICK, *argv)


def test_the_replay_gives_the_same_numbers_without_an_attack(saved, trained):
    finished = replayed(saved, trained.path, "name=again")
    assert finished.rc == 0, finished.err
    before, after = read_results(place(saved)), read_results(place(saved, "again"))
    for key in ("clean", "robust", "classes", "num_examples", "threat_model"):
        assert after[key] == before[key], key
    assert list(after["attacks"]) == ["replay"]
    assert after["attacks"]["replay"]["expected_accuracy"] == pytest.approx(after["robust"]["expected_accuracy"])
    assert after["protocol"] == "replay"
    for name in ("robust", "indices", "labels"):
        first, second = (np.load(place(saved, folder) / "records.npz")[name] for folder in ("saved", "again"))
        np.testing.assert_array_equal(first, second)


def test_the_points_are_judged_on_another_mixture(saved, trained):
    mixture = load_mixture(trained.path)
    with torch.no_grad():
        for parameter in mixture.members[0].parameters():
            parameter.neg_()
    save_mixture(mixture, saved / "other", read_config(trained.path), "")
    # The whole test set: only the images with a point are measured.
    assert replayed(saved, "other", "name=transferred", "data.num_test=null").rc == 0
    found = read(place(saved) / "points.safetensors")
    order = found.indices.argsort()
    images, labels = published()
    points, clean = found.points[order], images[found.indices[order]]
    both = [judged(mixture, at, labels[found.indices[order]]) for at in (clean, points)]
    records = np.load(place(saved, "transferred") / "records.npz")
    np.testing.assert_array_equal(records["indices"], found.indices[order])
    np.testing.assert_allclose(records["attack/replay"], both[1], atol=1e-12)
    np.testing.assert_allclose(records["robust"], np.minimum(*both), atol=1e-12)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        # Every saved point lies in the larger balls, but is the worst of none of them.
        (("eps=0.2",), "no worst cases of the linf ball of radius 0.2: give eps=0.05 threat_model=linf"),
        (("eps=0.0500001",), "no worst cases of the linf ball of radius 0.0500001"),
        (("threat_model=l2", "eps=8"), "no worst cases of the l2 ball of radius 8"),
        (("eps=0.01",), "no worst cases of the linf ball of radius 0.01"),
        (("data.num_test=10",), "which this run does not measure"),
        (("protocol.save_points=7",), "must be true or false"),
    ],
)
def test_points_that_do_not_fit_are_refused_in_one_sentence(saved, trained, argv, said):
    finished = replayed(saved, trained.path, "name=bad", *argv)
    assert finished.rc == 1
    assert said in finished.err
    assert finished.err.count("\n") == 1
    assert not place(saved, "bad").exists()


def test_other_files_are_refused(saved, trained, tmp_path):
    good = place(saved) / "points.safetensors"
    tensors = load_file(good)
    record = {"schema": "mixadv.points.1", "norm": "linf", "eps": "0.05"}
    for name, changed in {
        "short": {"labels": tensors["labels"][:7]},
        "swapped": {"labels": (tensors["labels"] + 1) % 10},
        "nan": {"points": tensors["points"] * float("nan")},
        "outside": {"points": 1 - tensors["points"]},
    }.items():
        save_file({**tensors, **changed}, tmp_path / f"{name}.safetensors", record)
    for name, changed in {"norm": {"norm": "l7"}, "text": {"eps": "much"}, "negative": {"eps": "-1"}}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", record | changed)
    for name in ("norm", "eps"):
        rest = {key: value for key, value in record.items() if key != name}
        save_file(tensors, tmp_path / f"no-{name}.safetensors", rest)
    (tmp_path / "torn.safetensors").write_bytes(good.read_bytes()[:100])
    for path, said in [
        (trained.path / "mixture" / "mixture.safetensors", "holds no points of mixadv"),
        (tmp_path / "short.safetensors", "is damaged"),
        (tmp_path / "swapped.safetensors", "other images"),
        (tmp_path / "nan.safetensors", "30 points, the first of image"),
        (tmp_path / "outside.safetensors", "lie outside the linf ball of radius 0.05"),
        (tmp_path / "norm.safetensors", "is damaged: unknown norm 'l7'"),
        (tmp_path / "text.safetensors", "could not convert string to float: 'much'"),
        (tmp_path / "negative.safetensors", "is damaged: eps is -1.0"),
        (tmp_path / "no-norm.safetensors", "save them again with protocol.save_points=true"),
        (tmp_path / "no-eps.safetensors", "save them again with protocol.save_points=true"),
        (tmp_path / "torn.safetensors", "cannot be read"),
        (tmp_path / "nothing.safetensors", "is no file"),
    ]:
        finished = replayed(saved, trained.path, "name=bad", points=path)
        assert (finished.rc, finished.err.count("\n")) == (1, 1)
        assert said in finished.err, path
    finished = run_command(saved, "task=train", f"points={good}")
    assert "task=evaluate" in finished.err
