"""docs/files.md against real runs, in both directions: what they hold is on the page, what is on the page they hold."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, Trained, run_command
from mixadv.results import GrowthStage

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "files.md").read_text()
TASKS = ("train", "evaluate", "solve", "ceiling", "game", "predict")
Runs = dict[str, Path]
Page = dict[str, tuple[set[str], bool, list[str]]]


def pictures(cwd: Path) -> Path:
    """A folder of 3 x 3 pixels in two classes, with a file that is no image."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 3, 3, 3), dtype=np.uint8)
    for split, classes in zip(("train", "test"), colours, strict=True):
        for name, images in zip(("ant", "bee"), classes, strict=True):
            folder = cwd / "pictures" / split / name
            folder.mkdir(parents=True)
            for number, image in enumerate(images):
                Image.fromarray(image).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("two bees")
    return cwd / "pictures"


@pytest.fixture(scope="module")
def runs(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A directory for each task."""
    cwd = tmp_path_factory.mktemp("files")
    (cwd / "photos").mkdir()
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(cwd / "photos" / "one.png")
    attacks = [text for text in TINY if text.startswith("protocol.attacks")]
    for argv in (
        ["task=evaluate", f"mixture={trained.path}", "protocol.diagnosed=4", "data.num_test=20", *attacks],
        # Another split than the members' own, so that something is flagged.
        [
            *("task=solve", f"members=[{trained.path}]", f"biases={[[0.5] + 9 * [0]]}"),
            *("data.num_val=20", "data.num_test=20", *attacks),
        ],
        [
            "task=ceiling",
            "data=image_folder",
            f"data.root={pictures(cwd)}",
            "data.num_val=3",
            "data.padding=0",
            "eps=0.3",
        ],
        ["task=game", "game.num_steps=5"],
        ["task=predict", f"mixture={trained.path}", "predict.images=photos"],
    ):
        finished = run_command(cwd, *argv, "name=one")
        assert finished.rc == 0, finished.err
    return {task: cwd / "outputs" / task / "one" for task in TASKS} | {"train": trained.path}


def table(title: str) -> Page:
    """The first table below a title: first cell -> the tasks, whether there is a condition, the other cells."""
    below = PAGE[PAGE.index(f"# {title}\n") :]
    rows = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", below, re.MULTILINE)
    assert rows is not None
    found = {}
    for row in rows[1].splitlines():
        name, tasks, *more = (cell.strip() for cell in row.strip("|").split("|"))
        words, condition, _ = tasks.partition(" (")
        named = set(TASKS) if words == "all" else set(words.split(", "))
        assert named <= set(TASKS), row
        found[name.strip("`")] = named, bool(condition), more
    return found


def agree(page: Page, real: dict[str, set[str]]) -> None:
    """The keys of the page are those of the runs: `real` has them by task."""
    for task, keys in real.items():
        allowed = {key for key, (tasks, _, _) in page.items() if task in tasks}
        wanted = {key for key, (tasks, condition, _) in page.items() if task in tasks and not condition}
        assert keys <= allowed, f"not on the page, task={task}"
        assert keys >= wanted, f"not in the run, task={task}"
    assert set(page) == set().union(*real.values())


def keys_of(node: Any, prefix: str = "") -> set[str]:
    """The leaves of a results.json as the page writes them."""
    if prefix in ("config", "training", "attacks.NAME.settings"):
        return {prefix}
    if isinstance(node, list):
        parts = [keys_of(part, f"{prefix}[]") for part in node if isinstance(part, dict)]
        return set().union(*parts) if parts else set() if prefix == "flags" else {prefix}
    if not isinstance(node, dict):
        return {prefix}
    capitals = {"versions": "PACKAGE", "attacks": "NAME", "validation": "METRIC"}
    capitals |= {"data.left_out": "REASON", "answers": "CLASS"}
    names = {key: f"{prefix}.{capitals.get(prefix, key)}" if prefix else key for key in node}
    return set().union(*(keys_of(part, names[key]) for key, part in node.items()))


def test_every_file_is_listed(runs: Runs) -> None:
    real = {}
    for task, path in runs.items():
        files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        # Of the report on a training, where another test asked for it.
        real[task] = files - {"report.html", "images.csv"} if task == "train" else files
    agree(table("The files of a run"), real)


def test_every_key_of_results_json_is_listed(runs: Runs) -> None:
    real = {}
    for task, path in runs.items():
        content = json.loads((path / "results.json").read_text())
        real[task] = keys_of({**content, "game": None} if task == "game" else content)
    page = table("results.json")
    # Of a mixture that grows, which this run does not.
    grown = {key for key in page if key.startswith("stages")}
    assert grown == {f"stages[].{one.name}" for one in dataclasses.fields(GrowthStage)}
    assert all(page.pop(key)[:2] == ({"train"}, True) for key in grown)
    agree(page, real)


@pytest.mark.parametrize("name", ["records.npz", "examples.npz"])
def test_every_array_is_listed_with_its_shape_and_type(runs: Runs, name: str) -> None:
    page, real = table(name), {}
    for task, path in runs.items():
        if not (path / name).exists():
            continue
        results = json.loads((path / "results.json").read_text())
        with np.load(path / name) as file:
            arrays = dict(file)
        kept = len(arrays.get("x", ()))
        sizes = {"L": results["L"], "N": results["num_examples"], "K": kept, "C": 1, "H": 8, "W": 8}
        real[task] = set()
        for key, array in arrays.items():
            folder, slash, _ = key.partition("/")
            listed_as = f"{folder}/{'NAME' if folder == 'attack' else 'PASS'}" if slash else key
            real[task].add(listed_as)
            shape, kind = re.fullmatch(r"\[(.*)\] (\w+)", page[listed_as][2][0]).groups()  # type: ignore[union-attr]
            assert array.shape == tuple(sizes[size] for size in shape.split(", ")), key
            assert kind == ("text" if array.dtype.kind == "U" else str(array.dtype)), key
    agree(page, real)


def test_every_column_of_the_history_is_listed(runs: Runs) -> None:
    with (runs["train"] / "metrics.csv").open() as file:
        columns = {re.sub(r"^lambda/\d+$", "lambda/k", name) for name in next(csv.reader(file))}
    agree(table("metrics.csv"), {"train": columns})


def test_every_column_of_the_images_is_listed(runs: Runs) -> None:
    with (runs["evaluate"] / "images.csv").open(encoding="utf-8") as file:
        names = next(csv.reader(file))
    columns = {re.sub(r"^member_\d+_", "member_k_", re.sub("^attack/.*", "attack/NAME", name)) for name in names}
    agree(table("images.csv"), {"evaluate": columns})
    with (runs["predict"] / "predictions.csv").open(encoding="utf-8") as file:
        columns = {re.sub("/.*", "/CLASS", name) for name in next(csv.reader(file))}
    agree(table("predictions.csv"), {"predict": columns})


def test_every_key_of_a_checkpoint_of_a_mixture_and_of_the_choices_is_listed(runs: Runs) -> None:
    import torch

    content = torch.load(runs["train"] / "checkpoints" / "last.ckpt", weights_only=True)
    agree(table("checkpoints/*.ckpt"), {"train": {"DATA" if key == "Digits" else key for key in content}})
    recipes = {
        task: set(json.loads((runs[task] / "mixture" / "config.json").read_text())) for task in ("train", "solve")
    }
    page = table("mixture/")
    # Of members that are built in different ways, which this run has not.
    assert page.pop("models")[0] == {"solve", "train"}
    # Of a training that starts from members.
    assert page.pop("started_from")[0] == {"train"}
    agree(page, recipes)
    choices = {
        task: set(json.loads((runs[task] / "choices.json").read_text())) for task in ("train", "evaluate", "solve")
    }
    agree(table("choices.json"), choices)
