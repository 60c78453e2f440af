"""Members from a YAML file, each with its model and its normalisation, and from functions in a .py file."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from builders.refusals import refusal
from conftest import TINY, run_command
from mixadv import Mixture
from mixadv.members.factory import build_factory
from mixadv.members.member_list import sources_of
from mixadv.members.recipe import Recipe
from mixadv.members.source import Source
from mixadv.members.store import load_mixture, save_mixture

DEFAULT = Recipe("linear", {"num_classes": 10, "image_shape": [1, 8, 8]})
NETS = """
from pathlib import Path
import torch
from torch import nn
from sizes import WIDTH

def network(file=Path(__file__).with_name("b.pt")):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    net.load_state_dict(torch.load(file, weights_only=True))
    return net
"""


@pytest.fixture
def nets():
    torch.manual_seed(4)
    flat = nn.Flatten()
    return nn.Sequential(flat, nn.Linear(64, 10)), nn.Sequential(flat, nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10))


@pytest.fixture
def shelf(own_modules, nets, monkeypatch):
    """In the working directory a folder `my nets, old` with two state dicts, functions and a list."""
    monkeypatch.chdir(own_modules)
    folder = own_modules / "my nets, old"
    folder.mkdir()
    torch.save(nets[0].state_dict(), folder / "a.pt")
    torch.save(nets[1].state_dict(), folder / "b.pt")
    torch.save(
        {"model": nets[0].state_dict(), "ema": {k: 2 * v for k, v in nets[0].state_dict().items()}}, folder / "c.pt"
    )
    (folder / "nets.py").write_text(NETS)
    (folder / "sizes.py").write_text("WIDTH = 6\n")
    (folder / "list.yaml").write_text(
        "- {source: a.pt, model: linear, mean: [0.5], std: [0.25]}\n"
        "- source: b.pt\n  model: mlp\n  hidden: [6]\n"
        "- {source: 'c.pt:ema'}\n"
    )
    return folder


def test_each_member_has_its_model_and_normalisation(shelf, nets):
    sources = sources_of([str(shelf / "list.yaml"), str(shelf / "a.pt")])
    members = [member for source in sources for member in source.members(DEFAULT)]
    assert [member.name for member in members] == ["a", "b", "c:ema", "a"]
    assert [member.source for member in members[:2]] == [str(shelf / "a.pt"), str(shelf / "b.pt")]
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [nets[0]((x - 0.5) / 0.25), nets[1](x), 2 * nets[0](x), nets[0](x)]
        for member, logits in zip(members, expected, strict=True):
            torch.testing.assert_close(member.module(x), logits)
    # What the measurement is about depends on the settings in the list too.
    assert sources[0].digest() != sources[3].digest()
    digests = [source.digest() for source in sources]
    text = (shelf / "list.yaml").read_text()
    (shelf / "list.yaml").write_text(text.replace("mean: [0.5]", "mean: [0.4]"))
    changed = [source.digest() for source in sources_of([str(shelf / "list.yaml"), str(shelf / "a.pt")])]
    assert [old == new for old, new in zip(digests, changed, strict=True)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no list of members: write lines as - {source: a.pt, model: resnet18"),
        ("source: a.pt", "is no list of members"),
        ("- a.pt", "is no list of members"),
        ("- {model: linear}", "has no source"),
        ("- {source: [a.pt]}", "has no source"),
        ("- [unclosed", "cannot be read as a list of members"),
        ("- !!python/object/apply:os.system ['touch executed']", "cannot be read as a list of members"),
        ("- {source: nowhere.pt}", "there is nothing at "),
        ("- {source: a.pt, num_classes: 3}", "num_classes of a.pt follows from the data"),
        ("- {source: a.pt, model: vgg}", "model=vgg is unknown: choose one of resnet18"),
        ("- {source: a.pt, model: linear, width: 3}", "linear has no such setting"),
        ("- {source: a.pt, model: linear, mean: [0.1]}", "give both mean and std"),
        ("- {source: 'nets.py:network'}", "nets.py:network is code, which runs only if the command names it"),
        ("- {source: saved, model: linear}", "saved records how it is built: leave model out"),
    ],
)
def test_lists_that_cannot_be_used(shelf, text, said):
    recipe = {"name": "linear", "num_classes": 10, "image_shape": [1, 8, 8]}
    save_mixture(Mixture([Recipe.of(recipe).build()]), shelf / "saved", {"L": 1, "model": recipe}, "")
    (shelf / "list.yaml").write_text(text)
    assert said in refusal(lambda: [s.members(DEFAULT) for s in sources_of([str(shelf / "list.yaml")])])
    assert not Path("executed").exists()


# --- functions in a file -----------------------------------------------------------------------------------


def test_a_function_in_a_file_is_found_by_its_path(shelf, nets):
    before = list(sys.path)
    source = f"{shelf}/nets.py:network"
    (member,) = Source(source).members(None)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(member.module(x), nets[1](x))
    assert (member.name, member.recipe.record()) == ("nets.py:network", {"factory": source})
    assert sys.path == before
    assert build_factory(os.path.relpath(source)) is not member.module


def test_two_files_of_one_name_are_two_modules(shelf):
    for number, folder in enumerate(("one", "two")):
        Path(folder).mkdir()
        Path(folder, "nets.py").write_text(f"from torch import nn\ndef f(): return nn.Linear(2, {number + 3})\n")
    assert [build_factory(f"{folder}/nets.py:f").out_features for folder in ("one", "two")] == [3, 4]


def test_files_without_the_function_are_refused(shelf):
    assert "is not a file: name a .py file" in refusal(lambda: Source("nowhere.py:f").members(None))
    assert "has no attribute 'f'" in refusal(lambda: Source(f"{shelf}/nets.py:f").members(None))
    assert "name a function in it, as " in refusal(lambda: Source(f"{shelf}/nets.py"))
    Path("broken.py").write_text("import nothing_here")
    for _ in range(2):
        assert "No module named 'nothing_here'" in refusal(lambda: Source("broken.py:f").members(None))


def test_a_mixture_with_a_file_is_loaded_only_where_the_file_is_named(shelf, nets):
    source = f"{shelf}/nets.py:network"
    save_mixture(Mixture([nets[1]]), Path("saved"), {"L": 1, "model": {"factory": source}}, "")
    assert f"built by {source} (code that is not in this file)" in refusal(lambda: load_mixture("saved"))
    assert load_mixture("saved", [source]).num_members == 1


def test_a_command_takes_lists_files_and_parts_of_files(shelf):
    members = f"members=[{shelf.name}/list.yaml,{shelf.name}/nets.py:network,{shelf.name}/c.pt:model]"
    quick = [text for text in TINY if text.startswith("protocol.attacks")]
    argv = ("task=evaluate", "data=digits", "model=linear", "eps=0.05", "data.num_test=20", "protocol.diagnosed=0")
    finished = run_command(Path.cwd(), *argv, members, "name=one", *quick)
    assert finished.rc == 0, finished.err
    results = json.loads(Path("outputs/evaluate/one/results.json").read_text())
    assert [member["name"] for member in results["members"]] == ["a", "b", "c:ema", "nets.py:network", "c:model"]
    assert [member["note"] for member in results["members"]] == [
        "normalised with the given mean and std",
        "no normalisation",
        "no normalisation; from ema (not model)",
        "as the factory built it",
        "no normalisation; from model (not ema)",
    ]
    # b.pt and the function hold the same network, c.pt holds it twice, the second time with doubled logits.
    clean = [member["clean"] for member in results["members"]]
    assert clean[1] == clean[3]
    assert clean[2] == clean[4]
