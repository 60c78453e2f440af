"""Mixtures on disk: what comes back, what is refused, and that nothing in them runs."""

import json
import os
import pickle
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from builders.files import Bomb
from builders.refusals import refusal
from mixadv import Mixture, load_mixture
from mixadv.errors import UserError
from mixadv.members.recipe import build_factory, build_mixture, member_recipes
from mixadv.members.store import read_config, read_mixture, save_mixture
from mixadv.tasks.build import instantiate
from mixadv.tensor_files import write_tensors

RECIPE = {
    "L": 3,
    "model": {
        "name": "small_cnn",
        "num_classes": 4,
        "image_shape": [2, 8, 8],
        "width": 2,
        "hidden": 5,
        "mean": [0.3, 0.6],
    },
    "threat_model": {"norm": "linf", "eps": 0.1},
    "eps": "0.1",
}
RECIPE["model"]["std"] = [0.2, 0.4]
WEIGHTS = [0.5, 0.125, 0.375]


@pytest.fixture
def exported(tmp_path):
    """A folder with three different members, and the mixture that was saved."""
    torch.manual_seed(3)
    mixture = build_mixture(RECIPE)
    mixture.set_weights(WEIGHTS)
    folder = tmp_path / "run" / "mixture"
    save_mixture(mixture, folder, RECIPE, "# card\n")
    return folder, mixture


def change(folder, **keys):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **keys}))


# --- there and back ----------------------------------------------------------------------------------------


def test_a_mixture_comes_back_bit_for_bit(exported):
    folder, mixture = exported
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "mixture.safetensors"]
    assert (folder / "README.md").read_text() == "# card\n"
    found, config = read_mixture(folder)
    assert isinstance(found, Mixture)
    before, after = mixture.state_dict(), found.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert not any(module.training for module in found.modules())
    x = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.member_logits(x), mixture.eval().member_logits(x))
    assert {key: config[key] for key in RECIPE} == RECIPE
    assert config["weights"] == WEIGHTS
    assert config["schema"] == 1


def test_the_names_of_the_classes_come_back_with_the_mixture(exported):
    folder, mixture = exported
    assert load_mixture(folder).class_names is None
    save_mixture(mixture, folder, RECIPE | {"class_names": ["d", "a", "c", "b"]}, "")
    found = load_mixture(folder)
    assert found.class_names == ("d", "a", "c", "b")
    found.set_weights([0.5, 0, 0.5])
    assert found.support().class_names == ("d", "a", "c", "b")


@pytest.mark.parametrize("names", ["abcd", ["a", "b", "c"], ["a", "b", "c", 4], {"a": 1}])
def test_names_that_are_not_those_of_the_classes_are_refused(exported, names):
    folder, _ = exported
    change(folder, class_names=names)
    assert "class_names" in refusal(load_mixture, folder)


@pytest.mark.skipif(os.name == "nt", reason="there are no modes")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_exported_files_have_the_mode_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_mixture(build_mixture(RECIPE), tmp_path / "mixture", RECIPE, "")
        write_tensors(tmp_path / "points.safetensors", {"x": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


@pytest.mark.parametrize("form", [str, Path])
def test_a_run_directory_stands_for_the_mixture_in_it(exported, form):
    folder, mixture = exported
    found = load_mixture(form(folder.parent))
    assert torch.equal(found.weights, mixture.weights)


def test_saving_again_replaces_and_leaves_no_temporary_files(exported):
    folder, mixture = exported
    mixture.set_weights([0.25, 0.25, 0.5])
    save_mixture(mixture, folder, RECIPE, "# new\n")
    assert load_mixture(folder).weights.tolist() == [0.25, 0.25, 0.5]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "mixture.safetensors"]


def test_saving_detaches_and_keeps_the_mixture(exported, tmp_path):
    _, mixture = exported
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    mixture.train()
    save_mixture(mixture, tmp_path / "b", RECIPE, "")
    assert mixture.training
    assert all(p.requires_grad for p in mixture.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in mixture.state_dict().items())


def test_a_run_exports_what_it_measured_and_its_checkpoint_holds_the_same(trained):
    results = json.loads((trained.path / "results.json").read_text())
    found, config = read_mixture(trained.path)
    best, _ = read_mixture(trained.path / "checkpoints" / "best.ckpt")
    assert found.weights.tolist() == pytest.approx(results["weights"], abs=1e-7)
    for name, tensor in best.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert (config["seed"], config["eps"], config["data_name"]) == (5, "0.05", "Digits (8x8)")
    card = (trained.path / "mixture" / "README.md").read_text()
    assert f"{results['robust']['expected_accuracy']:.4f}" in card
    assert f"{results['clean']['expected_accuracy']:.4f}" in card


# --- members that differ -----------------------------------------------------------------------------------

LINEAR = {"name": "linear", "num_classes": 4, "image_shape": [2, 8, 8]}
FACTORY = "mixadv_test_nets:wide"
FACTORIES = """
import pathlib
import torch
from torch import nn

pathlib.Path("imported").touch()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)
        self.second.weight = self.first.weight
        self.register_buffer("all", torch.arange(6.0).reshape(2, 3))
        self.register_buffer("row", self.all[1])
        self.register_buffer("count", torch.tensor(3))
        self.norm = nn.BatchNorm1d(128)

    def forward(self, x):
        return self.second(self.norm(self.first(x.flatten(1))))[:, :4] + self.row.sum() * self.count


def wide():
    return Tied()


def wider():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 4))
"""


@pytest.fixture
def nets(own_modules, monkeypatch):
    """A working directory with a module of factories, which leaves a file when it is imported."""
    (own_modules / "mixadv_test_nets.py").write_text(FACTORIES)
    monkeypatch.chdir(own_modules)
    paths = list(sys.path)
    yield own_modules / "imported"
    assert sys.path == paths


def different(*models):
    return {**{key: value for key, value in RECIPE.items() if key != "model"}, "L": len(models), "models": [*models]}


def test_members_that_differ_come_back_bit_for_bit(nets):
    recipe = different(RECIPE["model"], LINEAR, {"factory": FACTORY})
    torch.manual_seed(4)
    mixture = build_mixture(recipe, [FACTORY])
    mixture.set_weights(WEIGHTS)
    with torch.no_grad():
        for buffer in mixture.members[2].norm.buffers():
            buffer.add_(2)
    folder = Path("run/mixture")
    save_mixture(mixture, folder, recipe, "# card\n")
    # Nothing of the mixture that was saved is left but the folder.
    expected, before = mixture.eval(), {name: t.clone() for name, t in mixture.state_dict().items()}
    sys.modules.pop("mixadv_test_nets")
    torch.manual_seed(99)
    found, config = read_mixture(folder.parent, [FACTORY])
    assert list(found.state_dict()) == list(before)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    assert [type(member).__name__ for member in found.members] == ["Sequential", "Sequential", "Tied"]
    assert found.members[2].first.weight is found.members[2].second.weight
    assert not any(module.training for module in found.modules())
    x = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.member_logits(x), expected.member_logits(x))
    assert config == {"schema": 2, **recipe, "weights": WEIGHTS}
    assert read_config(folder) == config
    # And once more, from what was read.
    save_mixture(found, Path("again"), config, "")
    assert Path("again/mixture.safetensors").read_bytes() == (folder / "mixture.safetensors").read_bytes()
    assert json.loads(Path("again/config.json").read_text()) == config


@pytest.mark.parametrize("same", [True, False])
def test_one_recipe_for_all_is_stored_once_in_the_older_schema(tmp_path, same):
    models = [LINEAR, dict(LINEAR), LINEAR if same else {**LINEAR, "mean": [0.5, 0.5], "std": [1.0, 1.0]}]
    save_mixture(build_mixture(different(*models)), tmp_path, different(*models), "")
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["schema"] == (1 if same else 2)
    assert ("model" in record, "models" in record) == (same, not same)
    assert [recipe.record() for recipe in member_recipes(record)] == models
    assert load_mixture(tmp_path).num_members == 3


def test_saving_again_may_change_the_form(tmp_path):
    first, second = different(LINEAR, RECIPE["model"]), {"L": 1, "model": LINEAR}
    save_mixture(build_mixture(first), tmp_path, first, "")
    _, config = read_mixture(tmp_path)
    save_mixture(build_mixture(second), tmp_path, {**config, **different(LINEAR)}, "")
    found, config = read_mixture(tmp_path)
    assert (found.num_members, config["schema"], config["model"], "models" in config) == (1, 1, LINEAR, False)


@pytest.mark.parametrize("form", ["folder", "checkpoint"])
@pytest.mark.parametrize("recipe", ["models", "model"])
@pytest.mark.parametrize(
    "named",
    [
        *([], ["mixadv_test_nets"], ["mixadv_test_nets:wid"], ["mixadv_test_nets:wider"], ["mixadv_test_nets:*"]),
        *([" mixadv_test_nets:wide"], ["MIXADV_TEST_NETS:WIDE"], ["mixadv_test_nets.wide"]),
    ],
    ids=str,
)
def test_code_runs_only_where_it_is_named(nets, form, recipe, named):
    factory = {"factory": FACTORY}
    config = different(LINEAR, factory) if recipe == "models" else {"L": 2, "model": factory}
    mixture = build_mixture(config, [FACTORY])
    assert nets.exists()
    nets.unlink()
    sys.modules.pop("mixadv_test_nets")
    path = Path("saved")
    if form == "folder":
        save_mixture(mixture, path, config, "")
    else:
        path = Path("saved.ckpt")
        state = {f"mixture.{name}": tensor for name, tensor in mixture.state_dict().items()}
        torch.save({"state_dict": state, "mixture_config": config}, path)
    message = refusal(read_mixture, path, named)
    k = 1 if recipe == "models" else 0
    remedy = ",".join([*named, FACTORY])
    assert message == (
        f"{path}: member {k} is built by {FACTORY} (code that is not in this file): name it, members=[{remedy}]"
    )
    assert read_config(path)["L"] == 2
    with pytest.raises(UserError, match="members="):
        build_mixture(config, named)
    assert not nets.exists()
    assert "mixadv_test_nets" not in sys.modules
    assert load_mixture(path, [*named, FACTORY]).num_members == 2
    assert nets.exists()


def test_all_code_that_is_wanted_is_named_at_once(nets):
    config = different({"factory": FACTORY}, LINEAR, {"factory": "mixadv_test_nets:wider"}, {"factory": FACTORY})
    with pytest.raises(UserError, match=r"members=\[mixadv_test_nets:wide,mixadv_test_nets:wider\]$"):
        build_mixture(config)
    assert not nets.exists()


def test_a_text_is_no_list_of_factories(nets):
    """Its parts would count as names."""
    with pytest.raises(ValueError, match="give a list"):
        build_mixture({"L": 1, "model": {"factory": "mixadv_test_nets:wide"}}, "mixadv_test_nets:wider")
    assert not nets.exists()


def test_parameters_come_from_the_file_and_have_to_fit_the_code(nets):
    config = {"L": 1, "model": {"factory": FACTORY}}
    save_mixture(build_mixture(config, [FACTORY]), Path("saved"), config, "")
    change(Path("saved"), model={"factory": "mixadv_test_nets:wider"})
    message = refusal(read_mixture, "saved", ["mixadv_test_nets:wider"])
    assert "do not fit its recipe (L=1): Missing key(s)" in message
    assert len(message) < 400


def test_a_factory_gives_a_module_in_eval_mode(nets):
    module = build_factory(FACTORY)
    assert type(module).__name__ == "Tied"
    assert not any(part.training for part in module.modules())
    with pytest.raises(UserError, match="has no attribute 'narrow'"):
        build_factory("mixadv_test_nets:narrow")


class Extra(nn.Linear):
    """Keeps a word in its state dict."""

    def get_extra_state(self):
        return "word"

    def set_extra_state(self, state):
        pass


def odd_buffer(value):
    module = nn.Linear(2, 2)
    module.register_buffer("odd", value)
    return module


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Extra(2, 2), "members.0._extra_state is a str: only tensors can be exported"),
        (odd_buffer(torch.zeros(2).to_sparse()), "members.0.odd is not a dense tensor"),
        (odd_buffer(torch.zeros(2, device="meta")), "members.0.odd is not a dense tensor"),
        (odd_buffer(torch.zeros(2, dtype=torch.complex128)), "cannot store tensors of torch.complex128"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path, module, said):
    with pytest.raises(UserError) as error:
        save_mixture(Mixture([module]), tmp_path / "saved", {"L": 1, "model": {"factory": "a:b"}}, "")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "saved").iterdir())


@pytest.mark.parametrize(
    "config",
    [
        *({"L": 2, "model": LINEAR}, {"L": 4, "model": LINEAR}, {"L": 3, "models": [LINEAR] * 2}, {"L": 3}),
        *({"L": 3, "model": LINEAR, "models": [LINEAR] * 3}, {"L": True, "model": LINEAR}, {"L": 3.0, "model": LINEAR}),
    ],
    ids=str,
)
def test_a_recipe_that_is_not_the_mixtures_is_not_stored(exported, tmp_path, config):
    with pytest.raises(ValueError, match=r"L|model"):
        save_mixture(exported[1], tmp_path / "b", config, "")
    assert not (tmp_path / "b").exists()


# --- tampered folders --------------------------------------------------------------------------------------

MODEL = RECIPE["model"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": None}, "schema None"),
        ({"schema": "1"}, "schema 1"),
        ({"model": {**MODEL, "name": "vgg"}}, "'vgg'"),
        ({"model": {**MODEL, "name": "os.system"}}, "'os.system'"),
        ({"model": {}}, "None"),
        ({"model": {**MODEL, "width": 3}}, "do not fit"),
        ({"model": {**MODEL, "num_classes": 5}}, "do not fit"),
        ({"model": {**MODEL, "num_classes": "4"}}, "do not fit"),
        ({"model": {**MODEL, "image_shape": [2, 8]}}, "image_shape"),
        ({"model": {**MODEL, "std": [0, 0.1]}}, "std"),
        ({"model": {**MODEL, "extra": 1}}, "extra"),
        ({"L": 2}, "L=2"),
        ({"L": 4}, "L=4"),
        ({"L": 0}, "at least one member"),
        ({"L": "many"}, "L=many"),
        ({"L": None}, "L=None"),
        ({"L": True}, "L=True"),
        ({"L": 3.0}, "not a whole number"),
        ({"L": 10**12}, "there are weights for 3 members"),
        ({"L": float("inf")}, "not a whole number"),
        ({"models": [RECIPE["model"]] * 3}, "schema 1"),
        ({"schema": 2, "models": [RECIPE["model"]] * 3}, "either model, for all members, or models"),
        ({"model": {"factory": "os:getcwd", "name": "linear"}}, "expected only factory=package.module:callable"),
        ({"model": {"factory": 3}}, "expected only factory="),
        ({"model": {"factory": "a:b", "arguments": [1]}}, "expected plain values"),
        ({"model": {"factory": "a:b", "arguments": {"x": {"_target_": "os.getcwd"}}}}, "expected plain values"),
        ({"model": {"factory": "a:b", "arguments": {"x": ["${oc.env:HOME}"]}}}, "expected plain values"),
        ({"model": {"factory": "a:b", "arguments": {"width": 3}}}, "members=[a:b]"),
        ({"model": {"factory": "os.getcwd"}}, "expected only factory="),
        ({"model": {"factory": "a:b\nc"}}, "expected only factory="),
        ({"model": {"factory": "os:getcwd"}}, "members=[os:getcwd]"),
    ],
    ids=str,
)
def test_a_tampered_recipe_is_refused_in_one_line(exported, keys, said):
    folder, _ = exported
    change(folder, **keys)
    assert said in refusal(read_mixture, folder)


@pytest.mark.parametrize("model", ["small_cnn", None, ["small_cnn"], {**MODEL, "name": ["small_cnn"]}], ids=str)
def test_a_recipe_of_other_types_is_refused_in_one_line(exported, model):
    folder, _ = exported
    change(folder, model=model)
    assert "model" in refusal(read_mixture, folder)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (None, "not a list of mappings"),
        (LINEAR, "not a list of mappings"),
        ([LINEAR, None, LINEAR], "not a list of mappings"),
        ([LINEAR, "linear", LINEAR], "not a list of mappings"),
        ([], "recipes for 0 members"),
        ([LINEAR] * 2, "recipes for 2 members"),
        ([LINEAR, LINEAR, {**LINEAR, "name": "vgg"}], "'vgg'"),
        ([LINEAR, LINEAR, {**LINEAR, "name": ["linear"]}], "['linear']"),
        ([LINEAR, LINEAR, {}], "wants the model None"),
        ([LINEAR, {**LINEAR, "num_classes": 5}, LINEAR], "do not fit"),
        ([LINEAR, {**LINEAR, "width": 5}, LINEAR], "width"),
        ([LINEAR, {**LINEAR, "mean": "${oc.env:HOME}"}, LINEAR], "interpolation"),
        ([LINEAR, {"factory": "os:getcwd", "x": 1}, LINEAR], "expected only factory="),
        ([LINEAR, {"factory": "os:getcwd"}, LINEAR], "member 1 is built by os:getcwd"),
    ],
    ids=str,
)
def test_every_recipe_of_a_list_is_checked(tmp_path, models, said):
    config = {"L": 3, "model": LINEAR}
    save_mixture(build_mixture(config), tmp_path, config, "")
    record = json.loads((tmp_path / "config.json").read_text())
    del record["model"]
    (tmp_path / "config.json").write_text(json.dumps({**record, "schema": 2, "models": models}))
    assert said in refusal(read_mixture, tmp_path)


@pytest.mark.parametrize("start", ['{"L": 1', "[", '{"a":'])
def test_numbers_and_nesting_without_end_are_refused(exported, start):
    folder, _ = exported
    (folder / "config.json").write_text(start + start[-1] * 5000 + "}" if start[-1] == "1" else start * 100_000)
    assert "cannot be read" in refusal(read_mixture, folder)


@pytest.mark.parametrize("text", ["", "{", "not JSON", "[]", "null", '"text"', "\x00\x01", '{"schema": 1'])
def test_a_recipe_that_is_no_json_object_is_refused(exported, text):
    folder, _ = exported
    (folder / "config.json").write_text(text)
    assert str(folder) in refusal(read_mixture, folder)


def test_a_recipe_that_is_no_text_is_refused(exported):
    folder, _ = exported
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    refusal(read_mixture, folder)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.001, 0.01, 0.25, 0.5, 0.9, 0.999])
def test_truncated_parameters_are_refused(exported, share):
    folder, _ = exported
    file = folder / "mixture.safetensors"
    size = file.stat().st_size
    os.truncate(file, 1 if share == 1e-9 else int(size * share))
    assert "cannot be read" in refusal(read_mixture, folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4096, b"\xff" * 64, b"PK\x03\x04" + b"\x00" * 100, b"{}"])
def test_parameters_that_are_something_else_are_refused(exported, content):
    folder, _ = exported
    (folder / "mixture.safetensors").write_bytes(content)
    assert "cannot be read" in refusal(read_mixture, folder)


def test_a_flipped_header_byte_is_refused_or_changes_nothing_but_numbers(exported):
    folder, mixture = exported
    file = folder / "mixture.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    shapes = {name: tensor.shape for name, tensor in mixture.state_dict().items()}
    refusals = []
    for position in range(0, header, 37):
        damaged = bytearray(good)
        damaged[position] ^= 0x20
        file.write_bytes(damaged)
        try:
            found = load_mixture(folder)
        except UserError as error:
            refusals.append(str(error))
        else:
            assert {name: tensor.shape for name, tensor in found.state_dict().items()} == shapes
    assert len(refusals) > 10
    assert not any("\n" in text for text in refusals)


@pytest.mark.parametrize("part", ["missing member", "foreign tensor", "wrong shape", "no weights"])
def test_parameters_that_do_not_fit_are_refused(exported, part):
    folder, _ = exported
    file = folder / "mixture.safetensors"
    state = load_file(file)
    name = next(key for key in state if key.startswith("members.2.") and key.endswith("weight"))
    if part == "missing member":
        state = {key: value for key, value in state.items() if not key.startswith("members.1.")}
    elif part == "foreign tensor":
        state["members.3.net.weight"] = torch.zeros(2)
    elif part == "wrong shape":
        state[name] = torch.zeros(*state[name].shape, 2)
    else:
        del state["weights"]
    save_file(state, file)
    assert "do not fit its recipe (L=3)" in refusal(read_mixture, folder)


@pytest.mark.parametrize("weights", [[5.0, -4.0, 0.0], [float("nan"), 1.0, 0.0], [0.5, 0.5, 0.5]], ids=str)
def test_weights_that_are_no_distribution_are_refused(exported, weights):
    folder, _ = exported
    file = folder / "mixture.safetensors"
    save_file({**load_file(file), "weights": torch.tensor(weights)}, file)
    assert "weights" in refusal(read_mixture, folder)


@pytest.mark.parametrize("missing", ["config.json", "mixture.safetensors", "both", "folder"])
def test_what_is_not_there_is_named(exported, tmp_path, missing):
    folder, _ = exported
    for name in ("config.json", "mixture.safetensors"):
        if missing in (name, "both"):
            (folder / name).unlink()
    path = tmp_path / "nowhere" if missing == "folder" else folder
    assert str(path) in refusal(read_mixture, path)


# --- nothing runs code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pickle", "torch", "inside state_dict", "zip"])
def test_a_checkpoint_cannot_run_code(tmp_path, form):
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    bomb = Bomb(marker)
    if form == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif form == "torch":
        torch.save(bomb, path)
    elif form == "inside state_dict":
        torch.save({"state_dict": {"mixture.weights": bomb}, "mixture_config": RECIPE}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", pickle.dumps({"state_dict": bomb}))
            archive.writestr("evil/version", "3")
    assert "not a readable checkpoint" in refusal(read_mixture, path)
    assert not marker.exists()
    # The bomb is a real one.
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists()


def test_parameters_cannot_be_a_pickle(exported, tmp_path):
    folder, _ = exported
    marker = tmp_path / "executed"
    (folder / "mixture.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
    refusal(read_mixture, folder)
    torch.save({"weights": Bomb(marker)}, folder / "mixture.safetensors")
    refusal(read_mixture, folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": torch.ones(1)}, "holds no state_dict"),
        ([1, 2], "holds no state_dict"),
        ({"state_dict": {}}, "was not written by mixadv"),
        ({"state_dict": {}, "mixture_config": RECIPE}, "do not fit its recipe"),
        ({"state_dict": 3, "mixture_config": RECIPE}, "holds no state_dict"),
        ({"state_dict": {"mixture.weights": "x"}, "mixture_config": RECIPE}, "do not fit its recipe"),
        ({"state_dict": {}, "mixture_config": [1]}, "is a list, not a mapping"),
        ({"state_dict": {}, "mixture_config": {**RECIPE, "eps": torch.ones(1)}}, "more than plain settings"),
        ({"state_dict": {}, "mixture_config": {**RECIPE, "model": None}}, "model=None"),
        ({"state_dict": {}, "mixture_config": {"L": 1}}, "wants the model None"),
    ],
)
def test_a_foreign_checkpoint_is_refused(tmp_path, content, said):
    path = tmp_path / "foreign.ckpt"
    torch.save(content, path)
    assert said in refusal(read_mixture, path)


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert "no checkpoint at" in refusal(read_mixture, tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "subprocess.Popen", "builtins.eval", "eval", "", "posix.system", "mixadv"),
        *("mixadv.nothing.Thing", "mixadv.losses.Nothing", "mixadvance.evil.Thing", "mixadv.members.store.os.system"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(target, tmp_path):
    with pytest.raises(UserError, match="_target_") as error:
        instantiate({"_target_": target, "command": f"touch {tmp_path / 'executed'}"}, "loss")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("loss._target_")
    assert not (tmp_path / "executed").exists()


def test_a_nested_target_is_held_to_the_same_rule():
    with pytest.raises(UserError, match=r"attack\.objective\._target_='os\.system' is refused"):
        instantiate({"_target_": "mixadv.attacks.pgd.PGD", "objective": {"_target_": "os.system"}}, "attack")


@pytest.mark.parametrize(
    "target", ["os.system", "mine.Data", "mixadv.members.store.Path", "mixadv.data.cifar10.Reader"]
)
def test_the_record_of_a_mixture_names_data_of_mixadv_alone(command, trained, tmp_path, target):
    shutil.copytree(trained.path / "mixture", tmp_path / "mixture")
    (tmp_path / "mine.py").write_text("open('executed', 'w').close()\n")
    record = json.loads((tmp_path / "mixture" / "config.json").read_text())
    change(tmp_path / "mixture", data={**record["data"], "_target_": target})
    assert command("task=evaluate", "mixture=mixture", "name=x").refusal() == (
        f"the record of mixture names data of {target!r}, which is not part of mixadv: give data=... (or "
        f"data._target_={target}) on the command line"
    )
    assert not (tmp_path / "executed").exists()


def test_a_mixtures_recipe_cannot_read_the_environment(command, trained, tmp_path):
    shutil.copytree(trained.path / "mixture", tmp_path / "mixture")
    record = json.loads((tmp_path / "mixture" / "config.json").read_text())
    record["data"]["batch_size"] = "${oc.decode:${oc.env:SOME_NUMBER}}"
    (tmp_path / "mixture" / "config.json").write_text(json.dumps(record))
    finished = command("task=evaluate", "mixture=mixture", "name=leak", "data.num_test=10", SOME_NUMBER="4321")
    written = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file() and b"4321" in path.read_bytes()]
    assert "4321" not in finished.out + finished.err
    assert written == []


@pytest.mark.parametrize(("key", "value"), [("threat_model", "linf"), ("threat_model", None), ("data", None)])
def test_a_recipe_whose_settings_are_of_other_types_is_refused_in_one_line(command, trained, tmp_path, key, value):
    shutil.copytree(trained.path / "mixture", tmp_path / "mixture")
    change(tmp_path / "mixture", **{key: value})
    assert key in command("task=evaluate", "mixture=mixture", "name=types").refusal()
