"""Classifiers that exist already: what loads and answers as it did, what is refused, and that no file runs code."""

import json
import os
import pickle
import sys
from argparse import Namespace
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from builders.files import Bomb
from builders.refusals import refusal
from mixadv import Mixture, models
from mixadv.errors import UserError
from mixadv.evaluation import distrust
from mixadv.members.checks import check_members
from mixadv.members.recipe import Recipe, build_mixture
from mixadv.members.source import LoadedMember, Source, with_unique_names
from mixadv.members.store import save_mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel

# The settings of model=small_cnn that `plain_net` is by hand.
RECIPE = {"name": "small_cnn", "num_classes": 4, "image_shape": [2, 8, 8], "width": 2, "hidden": 5}
MEAN, STD = [0.3, 0.6], [0.2, 0.4]
REMEDY = "members=[module:callable]"


def plain_net():
    """Three convolutions and two layers, written without mixadv."""
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.ReLU(),
        nn.Linear(5, 4),
    )


def images(*shape, n=5):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    torch.manual_seed(7)
    return plain_net().eval()


@pytest.fixture
def here(own_modules, monkeypatch):
    """An empty working directory, which nothing may add to the places that Python imports from."""
    monkeypatch.chdir(own_modules)
    yield own_modules
    assert str(own_modules) not in sys.path


def one(source, recipe=RECIPE, **kwargs):
    (member,) = Source(str(source)).members(recipe and Recipe.of(recipe), **kwargs)
    assert isinstance(member, LoadedMember)
    assert member.source == str(source)
    assert not any(module.training for module in member.module.modules())
    assert json.loads(json.dumps(member.recipe.record())) == member.recipe.record()
    return member


def refused_source(source, recipe=RECIPE, **kwargs):
    return refusal(lambda: Source(str(source)).members(recipe and Recipe.of(recipe), **kwargs))


def answers_as(member, expected, x):
    # Members of ours keep weights in channels_last, which rounds otherwise than the layout that was saved.
    with torch.no_grad():
        return torch.allclose(member.module(x), expected(x), rtol=1e-4, atol=1e-5)


# --- state dicts: the same logits as the network that was saved --------------------------------------------

PREFIXES = ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "model.net.", "net.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("model_state_dict",), ("net",), ("ema", "model")])
def test_every_nesting_and_prefix_gives_the_logits_of_the_original(tmp_path, net, nest, prefix):
    content = OrderedDict((f"{prefix}{key}", value) for key, value in net.state_dict().items())
    for key in reversed(nest):
        content = {"epoch": 3, "arch": "small", "best_acc": torch.tensor(0.9), key: content}
    torch.save(content, tmp_path / "mine.pt")
    member = one(tmp_path / "mine.pt")
    assert answers_as(member, net, images(2, 8, 8))
    assert (member.name, member.recipe.record()) == ("mine", RECIPE)
    assert member.note == "no normalisation" + (f"; from {'.'.join(nest)}" if nest else "")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_every_kind_of_file(tmp_path, net, suffix):
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save({"state_dict": net.state_dict()}, path, _use_new_zipfile_serialization=suffix != ".bin")
    assert answers_as(one(path), net, images(2, 8, 8))


def test_networks_as_wrappers_save_them(tmp_path, net):
    wrappers = {
        "data parallel": nn.DataParallel(net),
        "average": torch.optim.swa_utils.AveragedModel(net),
        "average of several": nn.DataParallel(torch.optim.swa_utils.AveragedModel(nn.DataParallel(net))),
        "whole of a module": nn.ModuleDict({"backbone": net}),
    }
    for name, wrapper in wrappers.items():
        torch.save(wrapper.state_dict(), tmp_path / f"{name}.pt")
        assert set(wrapper.state_dict()) != set(net.state_dict())
        assert answers_as(one(tmp_path / f"{name}.pt"), net, images(2, 8, 8)), name


@pytest.mark.slow
def test_compiled_networks(tmp_path, net):
    for k, wrapper in enumerate((torch.compile(net), torch.optim.swa_utils.AveragedModel(torch.compile(net)))):
        torch.save(wrapper.state_dict(), tmp_path / f"{k}.pt")
        assert any("_orig_mod" in key for key in wrapper.state_dict())
        assert answers_as(one(tmp_path / f"{k}.pt"), net, images(2, 8, 8))


def test_a_submodule_that_was_compiled(tmp_path, net):
    state = {key.replace("4.", "4._orig_mod."): value for key, value in net.state_dict().items()}
    assert "4._orig_mod.weight" in state
    torch.save(state, tmp_path / "inner.pt")
    assert answers_as(one(tmp_path / "inner.pt"), net, images(2, 8, 8))
    torch.save({**net.state_dict(), **state}, tmp_path / "both.pt")
    assert "twice" in refused_source(tmp_path / "both.pt")


@pytest.fixture(scope="module")
def torchvision_net():
    """torchvision's ResNet-18 with the stem for small images and batch-norm statistics that matter."""
    from torchvision.models import resnet18

    torch.manual_seed(11)
    net = resnet18(num_classes=7)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return net.eval()


@pytest.mark.parametrize("form", ["bare", "nested", "safetensors without counts"])
def test_torchvisions_network_answers_as_torchvisions(tmp_path, torchvision_net, form):
    state, path = torchvision_net.state_dict(), tmp_path / "resnet.pth"
    if form == "bare":
        torch.save(state, path)
    elif form == "nested":
        torch.save({"net": {f"module.{key}": value for key, value in state.items()}, "acc": 91.2}, path)
    else:
        path = tmp_path / "resnet.safetensors"
        save_file({key: value for key, value in state.items() if "num_batches" not in key}, path)
    recipe = {"name": "resnet18", "num_classes": 7, "image_shape": (3, 16, 16), "width": 64}
    x = images(3, 16, 16, n=3)
    assert answers_as(one(path, recipe), torchvision_net, x)
    asked = one(path, {**recipe, "mean": [0.4, 0.5, 0.6], "std": (0.2, 0.3, 0.25)})
    assert asked.note.startswith("normalised with the given mean and std")
    assert asked.recipe.arguments["std"] == [0.2, 0.3, 0.25]
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]
    with torch.no_grad():
        assert torch.allclose(asked.module(x), torchvision_net((x - mean) / std), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
@pytest.mark.parametrize("asked", [{}, {"mean": [0.0, 0.5], "std": [2.0, 3.0]}], ids=["silent", "asked"])
def test_a_member_of_ours_brings_its_own_normalisation(tmp_path, net, prefix, asked):
    state = {
        "normalize.mean": torch.tensor(MEAN)[:, None, None],
        "normalize.std": torch.tensor(STD)[:, None, None],
        **{f"net.{key}": value for key, value in net.state_dict().items()},
    }
    torch.save({f"{prefix}{key}": value for key, value in state.items()}, tmp_path / "mine.pt")
    member = one(tmp_path / "mine.pt", {**RECIPE, **asked})
    assert member.note == "normalised as in the file"
    x = images(2, 8, 8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    assert answers_as(member, lambda x: net((x - mean) / std), x)
    # The recipe alone says the normalisation, to the bit.
    again = build_member(**member.recipe.record())
    assert torch.equal(again.normalize.mean, member.module.normalize.mean)
    assert torch.equal(again.normalize.std, member.module.normalize.std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, net, dtype):
    state = {key: value.to(dtype) for key, value in net.state_dict().items()}
    torch.save(state, tmp_path / "mine.pt")
    net.load_state_dict({key: value.float() for key, value in state.items()})
    assert answers_as(one(tmp_path / "mine.pt"), net, images(2, 8, 8))


def test_of_several_state_dicts_the_first_is_taken_and_the_note_says_so(tmp_path, net):
    other = {key: value + 1 for key, value in net.state_dict().items()}
    torch.save({"ema": other, "model_state_dict": net.state_dict()}, tmp_path / "mine.pt")
    member = one(tmp_path / "mine.pt")
    assert member.note == "no normalisation; from model_state_dict (not ema)"
    assert answers_as(member, net, images(2, 8, 8))


def test_a_mapping_within_itself_ends(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pt")
    assert "save module.state_dict()" in refused_source(tmp_path / "loop.pt")


def test_a_path_may_hold_a_colon_and_a_tilde(here, net, monkeypatch):
    torch.save(net.state_dict(), "os:getcwd")
    assert answers_as(one("os:getcwd"), net, images(2, 8, 8))
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    assert one("~/os:getcwd").note == "no normalisation"


# --- state dicts that do not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("4.bias"), "'4.bias' is missing"),
        (lambda s: s.update({"11.weight": torch.ones(2)}), "'11.weight' is unexpected"),
        (
            lambda s: s.update({"module.0.bias": s.pop("0.bias")}),
            "'0.bias' is missing and 'module.0.bias' is unexpected",
        ),
        (lambda s: (s.pop("0.weight"), s.pop("0.bias")), "'0.weight' is missing (1 more)"),
        (
            lambda s: s.update({"2.weight": torch.zeros(4, 3, 3, 3)}),
            "'2.weight' has the shape (4, 3, 3, 3), the model (4, 2",
        ),
        (lambda s: s.update({"7.weight": s["7.weight"].T}), "'7.weight' has the shape (32, 5), the model (5, 32)"),
        (lambda s: s.update({"9.bias": torch.zeros(10)}), "'9.bias' has the shape (10,), the model (4,)"),
        (lambda s: s.update({"9.bias": torch.zeros(4).to_sparse()}), "'9.bias' is not a dense tensor"),
        (lambda s: s.update({"9.bias": torch.zeros(4, device="meta")}), "'9.bias' is not a dense tensor"),
        (lambda s: s.update({"9.bias": torch.zeros(4, dtype=torch.complex64)}), "'9.bias' is not a dense tensor"),
    ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path, net, change, said):
    state = dict(net.state_dict())
    change(state)
    torch.save({"state_dict": state}, tmp_path / "mine.pt")
    message = refused_source(tmp_path / "mine.pt")
    assert message.startswith(f"{tmp_path / 'mine.pt'} (its state_dict)")
    assert said in message
    assert REMEDY in message


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mlp", ", model.hidden=... and data"),
        ("small_cnn", ", model.width=..., model.hidden=... and data"),
        ("wrn_28_10", ", model.depth=..., model.widen_factor=... and data"),
        ("linear", ") and data"),
    ],
)
def test_the_remedy_names_the_settings_that_the_model_has(tmp_path, name, settings):
    torch.save({"head.weight": torch.zeros(4, 3)}, tmp_path / "other.pt")
    recipe = {"name": name, "num_classes": 4, "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.5]}
    message = refused_source(tmp_path / "other.pt", recipe)
    assert f"does not fit model={name}" in message
    assert f"{settings}=... it was trained with" in message


def test_another_architecture_is_refused_with_the_remedy(tmp_path, torchvision_net, net):
    torch.save(torchvision_net.state_dict(), tmp_path / "resnet.pt")
    message = refused_source(tmp_path / "resnet.pt")
    assert "does not fit model=small_cnn" in message
    known = ", ".join(models.MODELS)
    assert f"model=... ({known}), model.width=..." in message
    torch.save(net.state_dict(), tmp_path / "small.pt")
    assert "'0.weight' has the shape (2, 2, 3, 3), the model (3, 2, 3, 3)" in refused_source(
        tmp_path / "small.pt", {**RECIPE, "width": 3}
    )


def test_a_normalisation_that_divides_by_zero_is_refused(tmp_path):
    state = build_member(**RECIPE).state_dict()
    torch.save({**state, "normalize.std": torch.tensor([1.0, 0.0])[:, None, None]}, tmp_path / "mine.pt")
    assert "every entry must be positive" in refused_source(tmp_path / "mine.pt")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "name their architecture with model=... and data=..."),
        ({**RECIPE, "name": "vgg"}, "choose one of resnet18"),
        ({**RECIPE, "depth": 3}, "model=small_cnn: "),
        ({**RECIPE, "mean": MEAN}, "give both mean and std"),
        ({**RECIPE, "std": STD}, "give both mean and std"),
        ({**RECIPE, "width": 0}, "width is 0"),
    ],
)
def test_a_recipe_that_builds_nothing_is_refused(tmp_path, net, recipe, said):
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    assert said in refused_source(tmp_path / "mine.pt", recipe)


# --- files that are something else -------------------------------------------------------------------------


BOMBS = {
    "torch": lambda bomb, path: torch.save(bomb, path),
    "among parameters": lambda bomb, path: torch.save({"state_dict": {"0.weight": bomb}}, path),
    "beside parameters": lambda bomb, path: torch.save({"state_dict": plain_net().state_dict(), "args": bomb}, path),
    "legacy": lambda bomb, path: torch.save({"0.weight": bomb}, path, _use_new_zipfile_serialization=False),
    "pickle": lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
    "pickle 0": lambda bomb, path: path.write_bytes(pickle.dumps(bomb, 0)),
    "pickle 2": lambda bomb, path: path.write_bytes(pickle.dumps({"state_dict": bomb}, 2)),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ""])
@pytest.mark.parametrize("form", BOMBS)
def test_a_pickle_cannot_run_code(tmp_path, form, suffix):
    marker, path = tmp_path / "executed", tmp_path / f"evil{suffix}"
    BOMBS[form](Bomb(marker), path)
    message = refused_source(path)
    assert not marker.exists()
    assert str(path) in message
    if suffix != ".safetensors":
        assert "holds objects other than tensors" in message
        assert "convert it to safetensors" in message
        assert REMEDY in message
    # The bomb is a real one.
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()


def test_harmless_objects_are_refused_by_their_name(tmp_path, net):
    torch.save({"state_dict": net.state_dict(), "args": Namespace(lr=0.1)}, tmp_path / "args.pt")
    assert "holds objects other than tensors (argparse.Namespace)" in refused_source(tmp_path / "args.pt")
    torch.save(net, tmp_path / "whole.pt")
    assert "holds objects other than tensors (torch.nn.modules" in refused_source(tmp_path / "whole.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_torchscript_program_is_refused(tmp_path, net):
    torch.jit.trace(net, images(2, 8, 8)).save(str(tmp_path / "script.pt"))
    message = refused_source(tmp_path / "script.pt")
    assert "holds objects other than tensors (a TorchScript program)" in message
    assert REMEDY in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: save or download it again"),
        (b"\n \n", "is empty: save or download it again"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"\r\n<html lang='en'>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "fetch it with `git lfs pull`"),
        (b"\x00" * 4096, "save or download it again"),
        (b"PK\x03\x04" + b"\x00" * 100, "save or download it again"),
        (b"{}", "save or download it again"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, suffix, content, said):
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(content)
    message = refused_source(path)
    assert message.startswith(str(path))
    assert said in message


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("form", [".pt", ".safetensors", "legacy"])
def test_truncated_files_are_refused(tmp_path, net, form, share):
    path = tmp_path / f"mine{form if form[0] == '.' else '.pt'}"
    if form == ".safetensors":
        save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=form == ".pt")
    os.truncate(path, max(1, int(share * path.stat().st_size)))
    assert "truncated or of another kind): save or download it again" in refused_source(path)


def test_a_safetensors_header_may_begin_as_a_tag_does(tmp_path, net):
    """Its first bytes are a length, which can spell anything."""
    path = tmp_path / "mine.safetensors"
    save_file(net.state_dict(), path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    # The format allows spaces after the header.
    header = raw[8 : 8 + length].ljust(0x3C20)
    path.write_bytes((0x3C20).to_bytes(8, "little") + header + raw[8 + length :])
    assert path.read_bytes()[:2] == b" <"
    assert answers_as(one(path), net, images(2, 8, 8))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list, not a state dict: save module.state_dict()"),
        (torch.ones(3), "holds a Tensor, not a state dict: save module.state_dict()"),
        ({}, "(it has nothing): save module.state_dict()"),
        ({"epoch": 3, "weights": [torch.ones(1)]}, "(it has 'epoch', 'weights'): save module.state_dict()"),
        ({"state_dict": {}}, "(it has 'state_dict'): save module.state_dict()"),
    ],
)
def test_content_of_other_kinds_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "mine.pt")
    assert said in refused_source(tmp_path / "mine.pt")


@pytest.mark.parametrize(
    "source",
    [
        *(
            "nowhere",
            "nowhere.pt",
            "runs/nowhere:x.pt",
            "http://example.com/a.pt",
            "C:\\models\\a.pt",
            "a:",
            ":b",
            "a:b:c",
        ),
        *("a.b:", "a b:c", "1a:b", "a:b()", "../a:b", "", "a\0b", "x" * 5000),
    ],
    ids=lambda source: repr(source[:20]),
)
def test_what_is_not_there_is_refused(here, source):
    # An empty name would be the working directory.
    if source:
        message = refused_source(source)
        assert message.startswith("there is nothing at ")
        assert "name an exported mixture, a run directory, a state dict" in message
    else:
        assert "no mixture at" in refused_source(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    assert "neither a file nor a folder" in refused_source(tmp_path / "pipe.pt")


def test_a_folder_without_a_mixture_is_refused(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    assert "no mixture at" in refused_source(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    (tmp_path / "mine.pt").chmod(0)
    assert "Permission denied" in refused_source(tmp_path / "mine.pt")


# --- mixtures ----------------------------------------------------------------------------------------------

MODELS = [
    {**RECIPE, "mean": MEAN, "std": STD},
    {"name": "linear", "num_classes": 4, "image_shape": [2, 8, 8]},
    {**RECIPE, "width": 3},
]


@pytest.fixture
def mixture():
    torch.manual_seed(5)
    return build_mixture({"L": 3, "models": MODELS}).eval()


@pytest.mark.parametrize("form", ["folder", "run", "parameters", "checkpoint", "renamed checkpoint"])
def test_all_members_of_a_mixture_come_back(tmp_path, mixture, form):
    run = tmp_path / "eps=8-255"
    save_mixture(mixture, run / "mixture", {"L": 3, "models": MODELS}, "")
    source, name = {
        "folder": (run / "mixture", "eps=8-255"),
        "run": (run, "eps=8-255"),
        "parameters": (run / "mixture" / "mixture.safetensors", "eps=8-255"),
        "checkpoint": (run / "checkpoints" / "best.ckpt", "eps=8-255/best"),
        "renamed checkpoint": (run / "mine.pt", "mine"),
    }[form]
    if "checkpoint" in form:
        source.parent.mkdir(exist_ok=True)
        state = {f"mixture.{key}": value for key, value in mixture.state_dict().items()}
        torch.save({"mixture_config": {"L": 3, "models": MODELS}, "state_dict": state, "epoch": 2}, source)
    members = Source(str(source)).members(None)
    assert [member.name for member in members] == [f"{name}#0", f"{name}#1", f"{name}#2"]
    assert [member.recipe.record() for member in members] == MODELS
    assert {(member.source, member.note) for member in members} == {(str(source), "as exported")}
    assert Source(str(source)).record["models"] == MODELS
    x = images(2, 8, 8)
    assert torch.equal(Mixture([member.module for member in members]).member_logits(x), mixture.member_logits(x))


def test_a_single_member_needs_no_number_and_the_working_directory_has_a_name(here, monkeypatch):
    single = build_mixture({"L": 1, "model": MODELS[1]})
    save_mixture(single, Path("alone/mixture"), {"L": 1, "model": MODELS[1]}, "")
    assert one("alone", None).name == "alone"
    monkeypatch.chdir("alone/mixture")
    assert one(".", None).name == "alone"


def test_the_files_of_an_exported_mixture_are_read_once(here, monkeypatch):
    save_mixture(build_mixture({"L": 2, "models": MODELS[:2]}), Path("saved"), {"L": 2, "models": MODELS[:2]}, "")
    read, original = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read.append(path.name) or original(path, **how))
    assert len(Source("saved").members(None)) == 2
    assert read == ["config.json"]


def test_a_mixture_with_code_is_loaded_only_where_the_code_is_named(here):
    write_module(here, "my_nets", "def wide(): return nn.Linear(3, 4)")
    recipe = {"L": 2, "model": {"factory": "my_nets:wide"}}
    save_mixture(Mixture([nn.Linear(3, 4), nn.Linear(3, 4)]), Path("saved"), recipe, "")
    message = refused_source("saved", None)
    assert message == (
        "saved: member 0 is built by my_nets:wide (code that is not in this file): name it, members=[my_nets:wide]"
    )
    assert Source("saved").record["model"] == {"factory": "my_nets:wide"}
    assert Source("my_nets:wide").record is None
    assert "my_nets" not in sys.modules
    members = Source("saved").members(None, factories=["my_nets:wide"])
    assert [member.recipe.record() for member in members] == [{"factory": "my_nets:wide"}] * 2


def test_only_mixtures_record_something(here, net):
    torch.save(net.state_dict(), "mine.pt")
    assert Source("mine.pt").record is None
    assert Source("my_nets:wide").record is None
    torch.save({"mixture_config": {"L": 1, "model": {**MODELS[1], "mean": "${oc.env:HOME}"}}}, "evil.pt")
    for source, said in (("nowhere", "nothing at"), (".", "no mixture at"), ("evil.pt", "interpolation")):
        with pytest.raises(UserError, match=said):
            Source(source)


# --- factories ---------------------------------------------------------------------------------------------


def write_module(folder, name, text):
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import sys\nimport torch\nfrom torch import nn\n\n{text}\n")


def test_a_factory_is_imported_from_the_working_directory(here):
    write_module(
        here, "own.nets", "class Nets:\n    @staticmethod\n    def wide(): return nn.Dropout(0.5)\nmake = nn.Identity"
    )
    member = one("own.nets:Nets.wide", None)
    assert (member.name, member.recipe.record()) == ("own.nets:Nets.wide", {"factory": "own.nets:Nets.wide"})
    assert member.note == "as the factory built it"
    assert isinstance(member.module, nn.Dropout)
    assert isinstance(one("own.nets:make", None).module, nn.Identity)


def test_the_working_directory_comes_first_and_neighbours_can_be_imported(here, monkeypatch):
    write_module(here / "elsewhere", "mod_b", "def build(): return nn.Identity()")
    monkeypatch.syspath_prepend(here / "elsewhere")
    before = list(sys.path)
    write_module(here, "neighbour", "size = 6")
    write_module(here, "mod_b", "def build():\n    from neighbour import size\n    return nn.Linear(size, 2)")
    assert one("mod_b:build", None).module.in_features == 6
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "source", "said"),
    [
        ("", "nothing_here:f", "no module nothing_here in "),
        ("", "mod_a.below:f", "no module mod_a.below in "),
        ("import not_installed_anywhere", "mod_a:f", "No module named 'not_installed_anywhere'"),
        ("", "mod_a:f", "AttributeError: module 'mod_a' has no attribute 'f'"),
        ("f = 3", "mod_a:f", "is a int, not a function"),
        ("f = nn.Linear(2, 3)", "mod_a:f", "name a function that builds and returns one"),
        ("def f(): return {'state_dict': 1}", "mod_a:f", "returned a dict: it must return a torch.nn.Module"),
        ("def f(): return nn.Linear", "mod_a:f", "returned a type: it must return a torch.nn.Module"),
        ("def f(): pass", "mod_a:f", "returned a NoneType"),
        ("def f(width): return nn.Linear(width, 2)", "mod_a:f", "TypeError: f() missing 1 required positional"),
        ("def f(): raise RuntimeError('first\\nsecond')", "mod_a:f", "RuntimeError: first)"),
        ("def f(): raise ValueError", "mod_a:f", "ValueError: no reason given)"),
        ("def f(): return nn.LazyLinear(3)", "mod_a:f", "without shapes: run one batch through it in the factory"),
        ("sys.exit(2)", "mod_a:f", "SystemExit: 2)"),
        ("def f(: pass", "mod_a:f", "SyntaxError"),
        ("raise KeyError('x')", "mod_a:f", "KeyError: 'x')"),
        (
            "def f(): return torch.export.export(nn.Linear(3, 4).eval(), (torch.rand(2, 3),)).module()",
            "mod_a:f",
            "returned a program of torch.export, which has no eval mode: return the module it was made from",
        ),
    ],
)
def test_a_factory_that_fails_is_refused_with_the_reason(here, text, source, said):
    write_module(here, "mod_a", text)
    message = refused_source(source, None)
    assert said in message
    assert message.startswith(source)


def test_no_file_can_name_a_factory_by_being_a_source(here):
    """Only the name on the command line is imported, not what a file with recipes says."""
    write_module(here, "trap", "open('executed', 'w').close()\ndef f(): return nn.Identity()")
    weights = {"mixture.weights": torch.ones(1)}
    torch.save({"mixture_config": {"L": 1, "model": {"factory": "trap:f"}}, "state_dict": weights}, "evil.ckpt")
    torch.save({"factory": "trap:f", "state_dict": {"factory": "trap:f"}}, "evil.pt")
    assert "members=[trap:f]" in refused_source("evil.ckpt", None)
    refused_source("evil.pt")
    assert not Path("executed").exists()
    one("trap:f", None)
    assert Path("executed").exists()


# --- names -------------------------------------------------------------------------------------------------


def test_names_become_unique_and_keep_their_order():
    def named(*names):
        return [LoadedMember(nn.Identity(), name, "", {}, "") for name in names]

    renamed = with_unique_names(named("best", "best (2)", "best", "other", "best"))
    assert [member.name for member in renamed] == ["best", "best (2)", "best (3)", "other", "best (4)"]


# --- what a member must be ---------------------------------------------------------------------------------


class Net(nn.Module):
    """A network whose forward is `function(logits, x)`."""

    def __init__(self, function=lambda z, x: z, num_classes=4):
        super().__init__()
        torch.manual_seed(num_classes)
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(128, num_classes))
        self.function = function

    def forward(self, x):
        return self.function(self.inner(x), x)


class Inner(nn.Module):
    """Computes in float64."""

    def __init__(self):
        super().__init__()
        self.net = Net().double()

    def forward(self, x):
        return self.net(x.double()).float()


def member(module, name):
    return LoadedMember(module.eval(), name, "", {}, "")


def checked(*modules):
    x = images(2, 8, 8, n=6)
    before = x.clone()
    count = check_members([member(module, f"m{k}") for k, module in enumerate(modules)], x)
    assert torch.equal(x, before)
    assert not x.requires_grad
    return count


def test_good_members_are_counted():
    log_probabilities = Net(lambda z, x: z.log_softmax(-1))
    constant = Net(lambda z, x: 0 * z + torch.arange(4.0))
    with_batch_norm = nn.Sequential(nn.BatchNorm2d(2), Net())
    assert checked(Net(), log_probabilities, constant, with_batch_norm, Mixture([Net(), Net()])) == 4
    assert checked(Net(num_classes=3)) == 3
    # A double inside is the network's own affair.
    assert checked(Inner()) == 4


def without_gradient(z, x):
    with torch.no_grad():
        return z * 1


def noisy(z, x):
    return z + 0.1 * torch.randn_like(z)


def one_hot(z, x):
    return nn.functional.one_hot(z.argmax(-1), 4).float() + 0 * z


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Net(lambda z, x: z.softmax(-1)), "outputs probabilities, not logits: return log-probabilities or logits"),
        (Net(one_hot), "outputs probabilities"),
        (Net(lambda z, x: z.sum(-1)), "returns (6,) for 6 images"),
        (Net(lambda z, x: z[:3]), "returns (3, 4) for 6 images"),
        (Net(lambda z, x: z[:, :1]), "returns (6, 1) for 6 images"),
        (Net(lambda z, x: z[:, :, None]), "returns (6, 4, 1) for 6 images"),
        (Net(lambda z, x: (z, x)), "returns a tuple for 6 images"),
        (
            Net(lambda z, x: {"logits": z}),
            "returns a dict for 6 images, not logits [batch, classes]: wrap it in a module",
        ),
        (Net(lambda z, x: z.half()), "returns logits in torch.float16"),
        (Net(lambda z, x: z.bfloat16()), "returns logits in torch.bfloat16"),
        (Net().half(), "has parameters in torch.float16, the images are torch.float32: convert it with module.float()"),
        (Net().double(), "has parameters in torch.float64"),
        (Net(lambda z, x: z.argsort()), "not all finite numbers"),
        (Net(lambda z, x: z / 0), "not all finite numbers"),
        (Net(lambda z, x: z.where(torch.arange(len(z))[:, None] != 5, float("nan"))), "not all finite numbers"),
        (nn.Sequential(nn.Conv2d(3, 2, 1), Net()), "fails on images (2, 8, 8)"),
        (Net(without_gradient), "is not differentiable"),
        (nn.Sequential(Net(lambda z, x: z.detach().requires_grad_())), "is not differentiable"),
        (Net(lambda z, x: Net().inner((x * 255).round() / 255)), "has no gradient though its answers vary"),
        (Net(lambda z, x: z + (x - x).sum() ** 0.5), "gradients that are not finite"),
        (Net(noisy), "answers the same images differently each time"),
        (Net(lambda z, x: z - z.mean(0)), "answers an image differently in another batch"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), Net()), "differently in another batch"),
        (Net(lambda z, x: z.flip(0)), "answers an image differently in another batch"),
        (Net(lambda z, x: z if len(x) == 6 else z[:1]), "answers an image differently in another batch"),
        (
            Net(lambda z, x: z if len(x) == 6 else z[[0, 1, 2, 0, 1, 2]]),
            "answers an image differently in another batch",
        ),
        (
            nn.Sequential(nn.ReLU6(inplace=True), nn.Threshold(0.5, 0.1, inplace=True), Net()),
            "changes its input in place",
        ),
        (Net(num_classes=5), "member m0 has 4 classes, member m1 has 5"),
    ],
)
def test_a_member_that_attacks_cannot_use_is_named(module, said):
    with pytest.raises(UserError) as error:
        checked(Net(), module)
    assert "\n" not in str(error.value)
    assert said in str(error.value)
    assert "member m1" in str(error.value)


def test_dropout_is_no_chance_in_eval_mode_but_is_one_in_training():
    net = nn.Sequential(nn.Dropout(0.5), Net())
    assert checked(net) == 4
    with pytest.raises(UserError, match="differently each time"):
        check_members([LoadedMember(net.train(), "m", "", {}, "")], images(2, 8, 8))


def test_probabilities_are_told_from_logits_by_their_sum():
    assert checked(Net(lambda z, x: z.softmax(-1) * 0.99)) == 4
    assert checked(Net(lambda z, x: z.softmax(-1) + torch.tensor([-2.0, 2.0, 0, 0]))) == 4
    with pytest.raises(UserError, match="probabilities"):
        checked(Net(lambda z, x: z.softmax(-1) * 0.99995))


@pytest.mark.parametrize(("noise", "refused"), [(0.003, False), (0.05, True)])
def test_what_is_refused_of_a_member_is_what_an_evaluation_flags(noise, refused):
    def moved(z, x):
        spread = (z.amax(1) - z.amin(1))[:, None]
        return z + noise * spread * torch.randn(len(z), 1).clamp(-1, 1) * torch.eye(4)[0]

    x, net = images(2, 8, 8, n=8), Net(moved)
    flags = distrust(Mixture([net]), x, torch.arange(8) % 4, ThreatModel("linf", 0.1))
    assert ("random-outputs" in {flag.name for flag in flags}) is refused
    with pytest.raises(UserError, match="differently each time") if refused else nullcontext():
        check_members([member(net, "m")], x)


def test_misuse_is_a_value_error():
    with pytest.raises(ValueError, match="two images"):
        check_members([member(Net(), "m")], images(2, 8, 8, n=1))
    with pytest.raises(ValueError, match="0 members"):
        check_members([], images(2, 8, 8))


def test_loaded_members_pass(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    assert check_members([one(tmp_path / "mine.pt")], images(2, 8, 8)) == 4


# --- checkpoints of ours as members ------------------------------------------------------------------------

LEAST = (
    *("data.num_test=20", "data.num_val=10", "protocol.diagnosed=0", "protocol.attacks.pgd-20.num_steps=2"),
    *("~protocol.attacks.arc", "~protocol.attacks.subsets", "trainer.accelerator=cpu", "name=x"),
)


@pytest.mark.parametrize("argv", ["task=evaluate mixture=", "task=evaluate members=", "task=solve members="])
def test_a_checkpoint_that_was_changed_is_refused_by_every_reader(command, trained, tmp_path, argv):
    content = torch.load(trained.path / "checkpoints" / "best.ckpt", weights_only=True)
    name = next(name for name in content["state_dict"] if name.endswith("weight"))
    content["state_dict"][name].view(-1)[0] += 1
    torch.save(content, tmp_path / "flipped.ckpt")
    task, key = argv.split()
    refusal = command(task, f"{key}[flipped.ckpt]" if "members" in key else f"{key}flipped.ckpt", *LEAST).refusal()
    assert refusal.startswith("flipped.ckpt has changed since it was written (its digest does not fit)")
    assert not list(tmp_path.glob("outputs/**/results.json"))


@pytest.mark.parametrize("task", ["evaluate", "solve"])
def test_every_checkpoint_is_loaded_once(command, trained, tmp_path, monkeypatch, task):
    names = [f"{k}.ckpt" for k in range(3)]
    for name in names:
        (tmp_path / name).write_bytes((trained.path / "checkpoints" / "best.ckpt").read_bytes())
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **kwargs: loaded.append(Path(path).name) or load(path, **kwargs))
    finished = command(f"task={task}", f"members=[{','.join(names)}]", *LEAST)
    assert finished.rc == 0, finished.err
    assert sorted(loaded) == names
