"""`task=predict`: its numbers against a loop over images and members, its draws, and what it refuses."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mixadv.members.recipe import build_mixture
from mixadv.members.store import save_mixture
from mixadv.tasks import predict

NAMES = ["ant", "=bee", "cat", "dog"]
WEIGHTS = (0.5, 0.125, 0.375)
SIZE = (7, 5)  # width, height
QUOTE = "'"  # before a formula in a csv file
CPU = "trainer.accelerator=cpu"


def export(folder, *, channels=3, size=SIZE, **config):
    """A mixture of three different members of one architecture, with large logits."""
    shape = [channels, size[1], size[0]]
    model = {"name": "mlp", "num_classes": 4, "image_shape": shape, "mean": [0.5] * channels, "std": [0.02] * channels}
    recipe = {"L": 3, "model": model, "threat_model": {"norm": "linf", "eps": 0.1}, "eps": "0.1"}
    mixture = build_mixture(recipe, seed=4)
    mixture.set_weights(WEIGHTS)
    save_mixture(mixture, folder, recipe | {"class_names": NAMES} | config, "")
    return mixture.eval()


def pixels(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    """Nine images in two folders, and files that are none."""
    for i in range(9):
        path = tmp_path / "photos" / ("b/c" if i % 2 else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(i)).save(path)
    seen_through = Image.fromarray(pixels(2)).convert("RGBA")
    seen_through.putpixel((1, 1), (*seen_through.getpixel((1, 1))[:3], 0))
    seen_through.save(tmp_path / "photos" / "2.png")
    for name in ("notes.txt", "b/more.TXT", "b/none", ".hidden.png"):
        (tmp_path / "photos" / name).write_text("")
    return tmp_path / "photos"


def lines(folder, name="one"):
    with (folder / "outputs" / "predict" / name / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_has_its_answer_and_the_probabilities_of_all_answers(command, tmp_path, photos):
    mixture = export(tmp_path / "mixture")
    done = command("task=predict", "mixture=mixture", "predict.images=photos", "name=one", CPU)
    assert done.rc == 0, done.err
    assert "left out: .txt files: 2, files without an ending: 1, transparency of images: 1." in done.out
    rows = lines(tmp_path)
    assert [row["file"] for row in rows] == [
        *("0.png", "2.png", "4.png", "6.png", "8.png"),
        *("b/c/1.png", "b/c/3.png", "b/c/5.png", "b/c/7.png"),
    ]
    differing = 0
    for row in rows:
        image = pixels(int(row["file"][-5])).transpose(2, 0, 1).astype(np.float32) / 255
        with torch.no_grad():
            each = [member(torch.from_numpy(image)[None])[0].double().numpy() for member in mixture.members]
        right = [int(z.argmax()) for z in each]
        differing += len(set(right)) > 1
        drawn = int(row["member"])
        assert row["answer"] in (NAMES[right[drawn]], f"'{NAMES[right[drawn]]}")
        for c, name in enumerate(NAMES):
            chance = sum(weight for weight, label in zip(WEIGHTS, right, strict=True) if label == c)
            assert float(row[f"p_answer/{name}"]) == pytest.approx(chance, abs=1e-12)
            shares = [np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in each]
            mean = sum(weight * share[c] for weight, share in zip(WEIGHTS, shares, strict=True))
            assert float(row[f"mean_softmax/{name}"]) == pytest.approx(mean, abs=1e-5)
    assert differing > 3
    results = json.loads((tmp_path / "outputs/predict/one/results.json").read_text())
    assert sum(results["answers"].values()) == results["num_examples"] == 9
    assert results["weights"] == list(WEIGHTS)


def test_the_draws_follow_the_seed_and_not_the_batches(command, tmp_path, photos, monkeypatch):
    export(tmp_path / "mixture")
    for i in range(60):
        Image.fromarray(pixels(i)).save(photos / f"more{i:02d}.png")
    words = ("task=predict", "mixture=mixture", "predict.images=photos", CPU)
    assert command(*words, "name=a").rc == 0
    monkeypatch.setattr(predict, "BATCH", 7)
    assert command(*words, "name=b").rc == 0
    assert command(*words, "name=c", "seed=1").rc == 0
    a, b, c = ([int(row["member"]) for row in lines(tmp_path, name)] for name in "abc")
    assert a == b
    assert a != c
    shares = np.bincount(a + c, minlength=3) / len(a + c)
    assert np.abs(shares - WEIGHTS).max() < 0.15


def test_a_changed_image_is_labelled_anew(command, tmp_path, photos):
    export(tmp_path / "mixture")
    words = ("task=predict", "mixture=mixture", "predict.images=photos", "name=one", CPU)
    assert command(*words).rc == 0
    before = lines(tmp_path)
    counts = Counter(line["answer"] for line in before).most_common()
    again = command(*words)
    assert "is done" in again.out
    said = ", ".join(f"{name.removeprefix(QUOTE)}: {count} image{'s' * (count > 1)}" for name, count in counts)
    assert f"Answers: {said}." in " ".join(again.out.split())
    Image.fromarray(pixels(77)).save(photos / "4.png")
    (photos / "4.png").touch()
    assert "have changed since" in command(*words).out
    assert [a["file"] for a, b in zip(before, lines(tmp_path), strict=True) if a != b] == ["4.png"]


def test_images_of_another_size_are_refused_or_resized(command, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels(0, (9, 6))).save(tmp_path / "photos" / "a.png")
    export(tmp_path / "square", size=(6, 6))
    export(tmp_path / "wide")
    export(tmp_path / "trained", size=(6, 6), data={"image_size": 6})
    words = ("task=predict", "predict.images=photos", CPU)
    refused = command(*words, "mixture=square", "name=a").refusal()
    assert "a.png is 9x6, but the mixture takes 6x6: predict.resize=true" in refused
    assert not (tmp_path / "outputs/predict/a/predictions.csv").exists()
    assert command(*words, "mixture=wide", "predict.resize=true").refusal().endswith("takes 7x5: resize it")
    assert command(*words, "mixture=square", "predict.resize=true", "name=b").rc == 0
    # As the images of its training were.
    assert command(*words, "mixture=trained", "name=c").rc == 0
    assert lines(tmp_path, "b") == lines(tmp_path, "c")


def test_a_grey_mixture_reads_grey_images(command, tmp_path, photos):
    mixture = export(tmp_path / "mixture", channels=1, class_names=None)
    assert command("task=predict", "mixture=mixture", "predict.images=photos", "name=one", CPU).rc == 0
    row = lines(tmp_path)[0]
    grey = np.asarray(Image.fromarray(pixels(0)).convert("L")).astype(np.float32) / 255
    with torch.no_grad():
        answer = mixture.members[int(row["member"])](torch.from_numpy(grey)[None, None]).argmax()
    assert row["answer"] == str(int(answer))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict.images=photos"], "task=predict needs mixture=PATH"),
        (["mixture=mixture"], "predict.images=None is no folder"),
        (["mixture=mixture", "predict.images=photos/0.png"], "is no folder"),
        (["mixture=gone", "predict.images=photos"], "mixture=gone does not exist"),
        (["mixture=mixture", "predict.images=outputs"], "holds no images"),
        (["mixture=mixture", "predict.images=photos", "eps=0.2"], "eps=...: task=predict does not read it"),
        (["mixture=mixture", "predict.images=photos", "data=digits"], "data=...: task=predict does not read it"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(command, tmp_path, photos, words, said):
    export(tmp_path / "mixture")
    (tmp_path / "outputs").mkdir()
    assert said in command("task=predict", *words).refusal()


def test_no_other_task_labels_images(command, photos):
    assert "task=train does not read it" in command("predict.images=photos").refusal()


def test_a_report_of_many_runs_leaves_labels_out(command, tmp_path, photos):
    export(tmp_path / "mixture")
    for name in "ab":
        assert command("task=predict", "mixture=mixture", "predict.images=photos", f"name={name}", CPU).rc == 0
    done = command("task=report", "runs=outputs")
    assert done.rc == 0, done.err
    assert list((tmp_path / "outputs").glob("report*")) == []
    assert "Answers: " in command("task=report", "runs=outputs/predict/a").out
