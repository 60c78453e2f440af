"""The answers in the plane: the arrays of regions.npz, their figure, and the runs that have them."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import TINY, run_command
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationRecord
from mixadv.mixture import Mixture
from mixadv.report.figures.regions import draw_regions, read_regions, regions_figure
from mixadv.report.files import Run
from mixadv.results import Accuracy, Classifier, Results
from mixadv.tasks.regions import GRID, keep_regions

ROOT = Path(__file__).resolve().parents[1]


class Rule(nn.Module):
    """Answers 2 to the right of `right`, else 1 above `above`, else 0; no answer where x + y > 1.8."""

    def __init__(self, right, above):
        super().__init__()
        self.right, self.above = right, above
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        x, y = images.flatten(1).T
        answer = torch.where(x > self.right, 2, torch.where(y > self.above, 1, 0))
        logits = nn.functional.one_hot(answer, 3).float()
        return torch.where((x + y > 1.8)[:, None], torch.nan, logits)

    def answer(self, x, y):
        """The same in plain Python."""
        return -1 if x + y > 1.8 else 2 if x > self.right else 1 if y > self.above else 0


RULES = [Rule(0.3, 0.6), Rule(0.5, 0.9), Rule(0.8, 0.2)]
WEIGHTS = [0.5, 0.2, 0.3]
POINTS = [[0.1, 0.2], [0.9, 0.3], [0.2, 0.7], [0.11, 0.5], [0.12, 0.1]]
LABELS = [0, 2, 1, 0, 0]


@pytest.fixture
def kept(tmp_path):
    """A run directory with the regions of three members on five points in two batches."""
    images = torch.tensor(POINTS).view(-1, 1, 1, 2)
    labels = np.array(LABELS)
    moved = torch.tensor([[0.0, 0.05 * (label != 2)] for label in LABELS]).view_as(images)
    record = EvaluationRecord(
        np.array(WEIGHTS),
        labels,
        np.ones((3, 5)),
        np.ones(5),
        worst_points=images + moved,
    )
    batches = [(images[:3], torch.tensor(LABELS[:3])), (images[3:], torch.tensor(LABELS[3:]))]
    keep_regions(tmp_path, Mixture(RULES, WEIGHTS), batches, record, ("ant", "bee", "cow"))
    results = Results(
        weights=tuple(WEIGHTS),
        norm="l2",
        eps=0.15,
        L=3,
        robust=Accuracy(0.42),
        members=tuple(Classifier(robust=Accuracy(value)) for value in (0.1, 0.2, 0.3)),
    )
    return Run(tmp_path, "done", results=results)


def test_every_cell_has_the_answers_at_its_centre(kept):
    regions = read_regions(kept)
    assert regions.answers.shape == (3, GRID, GRID)
    for i, j in np.random.default_rng(0).integers(0, GRID, (300, 2)):
        x, y = (i + 0.5) / GRID, (j + 0.5) / GRID
        assert regions.answers[:, j, i].tolist() == [rule.answer(x, y) for rule in RULES]
    np.testing.assert_allclose(regions.points, POINTS, rtol=1e-6)
    assert regions.labels.tolist() == LABELS
    assert regions.class_names == ["ant", "bee", "cow"]
    # Of class 0 the point that is nearest to the mean (0.11, 0.267).
    assert regions.shown.tolist() == [0, 2, 1]
    np.testing.assert_allclose(regions.worst, [[0.1, 0.25], [0.2, 0.75], [0.9, 0.3]], rtol=1e-6)


def test_images_of_more_numbers_have_no_regions(tmp_path):
    images = torch.zeros(2, 1, 1, 3)
    record = EvaluationRecord(np.ones(1), np.zeros(2, int), np.ones((1, 2)), np.ones(2), worst_points=images)
    keep_regions(tmp_path, Mixture([nn.Linear(3, 2)]), [(images, torch.zeros(2))], record, ("a", "b"))
    assert list(tmp_path.iterdir()) == []
    assert draw_regions(Run(tmp_path, "done")) is None


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_colours_outlines_and_arrows_are_where_they_belong(kept, norm):
    run = replace(kept, results=replace(kept.results, norm=norm))
    figure = regions_figure(run, read_regions(run))
    axes = {one.get_label(): one for one in figure.axes}
    assert list(axes) == ["member 0", "member 1", "member 2", "mixture"]
    assert axes["member 1"].get_title() == "member 1 (λ = 0.20): 20.0 % robust"
    assert axes["mixture"].get_title() == "mixture: 42.0 % robust"

    def colour(name, x, y):
        return np.asarray(axes[name].images[0].get_array())[int(y * GRID), int(x * GRID)]

    for name in axes:
        assert axes[name].images[0].origin == "lower"
        assert list(axes[name].images[0].get_extent()) == [0, 1, 0, 1]
    # Where all agree, each class has a colour of its own; the mixture's is the weighted mean of the members'.
    pure = {0: (0.1, 0.1), 1: (0.1, 0.95), 2: (0.9, 0.4)}
    for x, y in pure.values():
        assert len({tuple(colour(name, x, y).round(9)) for name in axes}) == 1
    assert len({tuple(colour("mixture", x, y).round(9)) for x, y in pure.values()}) == 3
    x, y = 0.4, 0.7  # answers 2, 0, 1
    by_members = sum(weight * colour(f"member {k}", x, y) for k, weight in enumerate(WEIGHTS))
    np.testing.assert_allclose(colour("mixture", x, y), by_members, atol=1e-12)
    np.testing.assert_allclose(colour("mixture", 0.95, 0.95), 1.0)
    assert [len(axes["mixture"].lines[k].get_xdata()) for k in range(3)] == [3, 1, 1]
    outlines = axes["mixture"].patches
    for point, outline in zip([POINTS[0], POINTS[2], POINTS[1]], outlines, strict=True):
        box = outline.get_path().get_extents(outline.get_patch_transform())
        np.testing.assert_allclose([box.x0, box.y0, box.x1, box.y1], [*np.subtract(point, 0.15), *np.add(point, 0.15)])
        assert type(outline).__name__ == ("Circle" if norm == "l2" else "Rectangle")
    # A point that does not move has no arrow.
    arrows = [(text.xyann, text.xy) for text in axes["mixture"].texts]
    np.testing.assert_allclose(arrows, [[(0.1, 0.2), (0.1, 0.25)], [(0.2, 0.7), (0.2, 0.75)]], rtol=1e-6)


def test_one_model_has_one_picture_and_many_members_the_heaviest(kept):
    regions = read_regions(kept)
    one = replace(kept, results=replace(kept.results, weights=(1.0,), L=1))
    figure = regions_figure(one, regions._replace(answers=regions.answers[:1]))
    assert [axes.get_label() for axes in figure.axes] == ["model"]
    many = replace(kept, results=replace(kept.results, weights=(0.1, 0.3, 0.1, 0.3, 0.2), L=5, members=()))
    figure = regions_figure(many, regions._replace(answers=regions.answers[[0, 1, 2, 0, 1]]))
    assert [axes.get_label() for axes in figure.axes] == ["member 1", "member 3", "member 4", "mixture"]


def test_the_arrays_are_those_of_the_page(kept):
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    section = page[page.index("## regions.npz") :].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| \[(.*?)\] \w+ \|", section, re.MULTILINE))
    kinds = dict(re.findall(r"^\| `(\w+)` \| \[.*?\] (\w+) \|", section, re.MULTILINE))
    sizes = {"L": 3, "G": GRID, "N": 5, "S": 3, "M": 3, "2": 2}
    with np.load(kept.path / "regions.npz") as file:
        assert set(file.files) == set(listed)
        for name in file.files:
            assert file[name].shape == tuple(sizes[size] for size in listed[name].split(", ")), name
            assert kinds[name] == ("text" if file[name].dtype.kind == "U" else str(file[name].dtype)), name


def test_damage_is_named(kept):
    path = kept.path / "regions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    for change in (
        {"answers": arrays["answers"][:2]},
        {"answers": arrays["answers"] + 1},
        {"answers": arrays["answers"].astype(float)},
        {"points": arrays["points"][:3]},
        {"shown": arrays["shown"] + 3},
        {"worst": arrays["worst"][:1]},
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(UserError, match=r"does not match the results\.json beside it"):
            draw_regions(kept)
    np.savez(path, **{name: array for name, array in arrays.items() if name != "shown"})
    with pytest.raises(UserError, match="has no 'shown'"):
        draw_regions(kept)


def test_runs_in_the_plane_have_the_picture_and_the_page_embeds_it(tmp_path):
    small = ("data=triangle", "data.num_train=30", "data.num_val=6", "data.num_test=9", "model=linear", "L=2")
    run = ("threat_model=l2", "eps=0.262", "trainer.max_epochs=1", "logger=none", "name=one")
    protocol = [text for text in TINY if text.startswith("protocol.")]
    finished = run_command(tmp_path, *small, *run, *protocol, "attack.num_steps=1", "data.batch_size=10")
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / "train" / "one"
    assert "regions.png" in finished.out
    assert (path / "regions.png").exists()
    with np.load(path / "regions.npz") as file, np.load(path / "records.npz") as known:
        assert file["labels"].tolist() == known["labels"].tolist() == [0, 1, 2] * 3
        assert (np.linalg.norm(file["worst"] - file["points"][file["shown"]], axis=1) <= 0.262 + 1e-5).all()
    assert run_command(tmp_path, "task=report", f"runs={path}").rc == 0
    assert "The answers in the plane" in (path / "report.html").read_text(encoding="utf-8")
    for argv in (("task=evaluate", f"mixture={path}"), ("task=solve", f"members=[{path}]", "data.num_val=6")):
        finished = run_command(tmp_path, *argv, *protocol, "name=two", "logger=none")
        assert finished.rc == 0, finished.err
        assert (tmp_path / "outputs" / argv[0].removeprefix("task=") / "two" / "regions.png").exists()
