"""State dicts of other programs: their names for the same network, their normalisation, several in one file."""

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from builders.refusals import refusal
from mixadv.members.recipe import Recipe
from mixadv.members.source import Source

MEAN, STD = [0.3, 0.5, 0.6], [0.2, 0.4, 0.3]
SHAPE = {"num_classes": 7, "image_shape": [3, 16, 16], "width": 3}
AVERAGES = (
    *("ema", "state_dict_ema", "model_ema", "ema_state_dict", "swa_state_dict", "unaveraged_model_state_dict"),
    *("averaged", "callbacks.EMA.weights"),
)


class Block(nn.Module):
    """The basic block of kuangliu/pytorch-cifar; `first` puts batch norm and ReLU before the convolutions."""

    def __init__(self, inputs, planes, stride, first):
        super().__init__()
        self.first = first
        self.bn1 = nn.BatchNorm2d(inputs if first else planes)
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride > 1 or inputs != planes:
            convolution = nn.Conv2d(inputs, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, *([] if first else [nn.BatchNorm2d(planes)]))

    def forward(self, x):
        shortcut = getattr(self, "shortcut", lambda z: z)
        if self.first:
            z = relu(self.bn1(x))
            return self.conv2(relu(self.bn2(self.conv1(z)))) + (shortcut(z) if hasattr(self, "shortcut") else x)
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + shortcut(x))


class Kuangliu(nn.Module):
    """ResNet-18 (`kind` resnet), PreActResNet-18 (preact), and Rice's with a last batch norm (rice)."""

    def __init__(self, kind, width=3, head="linear"):
        super().__init__()
        self.kind, self.last, first = kind, head, kind != "resnet"
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        if not first:
            self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(4):
            planes = width * 2**stage
            blocks = [Block(inputs, planes, 1 + (stage > 0), first), Block(planes, planes, 1, first)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = planes
        if kind == "rice":
            self.bn = nn.BatchNorm2d(inputs)
        setattr(self, head, nn.Linear(inputs, 7))

    def forward(self, x):
        z = self.conv1(x)
        if self.kind == "resnet":
            z = relu(self.bn1(z))
        for stage in range(4):
            z = getattr(self, f"layer{stage + 1}")(z)
        if self.kind == "rice":
            z = relu(self.bn(z))
        return getattr(self, self.last)(z.mean((2, 3)))


class Normalise(nn.Module):
    """(x - mean) / std, with buffers of any names, and a view or not."""

    def __init__(self, mean="mean", std="std", shape=(3, 1, 1), scale=1.0):
        super().__init__()
        self.names = mean, std
        self.register_buffer(mean, torch.tensor(MEAN).reshape(shape) * scale)
        self.register_buffer(std, torch.tensor(STD).reshape(shape) * scale)

    def forward(self, x):
        mean, std = (getattr(self, name).reshape(3, 1, 1) for name in self.names)
        return (x - mean) / std


class Attacked(nn.Module):
    """As the robustness library of MadryLab saves a model: the network and its normalisation twice."""

    def __init__(self, net):
        super().__init__()
        self.normalizer, self.model = Normalise("new_mean", "new_std"), net
        self.attacker = nn.Module()
        self.attacker.normalize, self.attacker.model = Normalise("new_mean", "new_std"), net


def randomised(net):
    """The network in eval mode, with batch statistics and affine maps that matter."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith(("running_var", "bn1.weight", "bn2.weight")):
                tensor.uniform_(0.5, 2)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.3)
    return net.eval()


@pytest.fixture(scope="module")
def kuangliu():
    torch.manual_seed(3)
    return {kind: randomised(Kuangliu(kind)) for kind in ("resnet", "preact", "rice")}


@pytest.fixture
def resnet(kuangliu):
    return kuangliu["resnet"]


def one(path, name="resnet18", **arguments):
    return Source(str(path)).members(Recipe(name, {**SHAPE, **arguments}))[0]


def refused(path, name="resnet18", **arguments):
    return refusal(lambda: one(path, name, **arguments))


def same(member, expected):
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.allclose(member.module(x), expected(x), rtol=1e-4, atol=1e-4)


def normalised(net):
    return nn.Sequential(Normalise(), net).eval()


# --- names of the same network -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("kind", ["resnet", "preact", "rice"])
def test_networks_of_the_kuangliu_family_answer_as_they_did(tmp_path, kuangliu, kind, prefix):
    net, model = kuangliu[kind], "resnet18" if kind == "resnet" else "preact_resnet18"
    torch.save(
        {"net": {prefix + key: value for key, value in net.state_dict().items()}, "acc": 93.0}, tmp_path / "a.pt"
    )
    member = one(tmp_path / "a.pt", model)
    assert same(member, net)
    assert ("without a batch norm" in member.note) == (kind == "preact")
    # The recipe alone builds the network again.
    again = member.recipe.build().eval()
    again.load_state_dict(member.module.state_dict())
    assert same(member, again)


@pytest.mark.parametrize("head", ["fc", "classifier", "head"])
def test_other_names_of_the_last_layer(tmp_path, head):
    net = randomised(Kuangliu("resnet", head=head))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    assert same(one(tmp_path / "a.pt"), net)


def test_the_unused_layer_of_wide_networks_is_left_out_and_named(tmp_path):
    recipe = Recipe("wrn_28_10", {"num_classes": 7, "image_shape": [3, 16, 16], "depth": 10, "widen_factor": 1})
    whole = recipe.build().eval()
    state = {key.removeprefix("net."): value for key, value in whole.state_dict().items() if key.startswith("net.")}
    extra = {f"sub_{key}": value + 1 for key, value in state.items() if key.startswith("block1.")}
    assert extra
    torch.save({"state_dict": {f"module.{key}": value for key, value in (state | extra).items()}}, tmp_path / "a.pt")
    (member,) = Source(str(tmp_path / "a.pt")).members(recipe)
    assert member.note == "no normalisation; without sub_block1, which the network does not use; from state_dict"
    assert same(member, whole)


def test_what_does_not_fit_is_told_layer_by_layer(tmp_path, resnet, kuangliu):
    state = resnet.state_dict()
    torch.save(
        {key.replace("layer3.0.shortcut", "layer3.0.skip"): value for key, value in state.items()}, tmp_path / "a.pt"
    )
    message = refused(tmp_path / "a.pt")
    assert "(what fits: conv1, bn1, layer1, layer2, layer4, fc; what does not: layer3)" in message
    assert "'layer3.0.skip.0.weight' is unexpected" in message
    torch.save(kuangliu["preact"].state_dict(), tmp_path / "b.pt")
    assert "(what fits: conv1, layer1, fc; what does not: bn1, layer2, layer3, layer4)" in refused(tmp_path / "b.pt")
    # A wide network of the same family is none of narrow layers.
    assert "has the shape (3, 3, 3, 3), the model (5, 3, 3, 3)" in refused(
        tmp_path / "b.pt", "preact_resnet18", width=5
    )


# --- normalisation in the file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda net: nn.Sequential(Normalise(), net),
        lambda net: nn.Sequential(Normalise("mu", "sigma", (1, 3, 1, 1)), net),
        lambda net: nn.DataParallel(nn.ModuleDict({"normalize": Normalise(shape=(3,)), "model": net})),
        lambda net: nn.DataParallel(Attacked(net)),
    ],
    ids=["Sequential 0 and 1", "mu and sigma", "normalize. and model.", "MadryLab's robustness"],
)
def test_a_normalisation_in_the_file_is_used_and_recorded(tmp_path, resnet, wrapped):
    torch.save({"model": wrapped(resnet).state_dict()}, tmp_path / "a.pt")
    member = one(tmp_path / "a.pt", mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 2.0])
    assert same(member, normalised(resnet))
    assert member.note.startswith("normalised as in the file; from model")
    assert "not" not in member.note
    assert member.recipe.arguments["mean"] == pytest.approx(MEAN)


def test_a_layer_without_parameters_before_the_network_is_mentioned(tmp_path, resnet):
    torch.save(nn.Sequential(nn.Identity(), resnet).state_dict(), tmp_path / "a.pt")
    assert "names begin with 1.: if layer 0 normalised, give model.mean" in one(tmp_path / "a.pt").note
    assert one(tmp_path / "a.pt", mean=MEAN, std=STD).note == "normalised with the given mean and std"


def test_a_normalisation_that_cannot_be_used_is_refused(tmp_path, resnet):
    torch.save(nn.Sequential(Normalise(scale=255.0), resnet).state_dict(), tmp_path / "a.pt")
    assert "for pixels in 0..255: members take images in [0, 1]" in refused(tmp_path / "a.pt")
    state = {f"1.{key}": value for key, value in resnet.state_dict().items()}
    torch.save({**state, "0.mean": torch.zeros(3, 16, 16), "0.std": torch.ones(3, 16, 16)}, tmp_path / "b.pt")
    assert "normalises with a mean of shape (3, 16, 16), the images have 3 channels" in refused(tmp_path / "b.pt")


# --- several state dicts in a file -------------------------------------------------------------------------


def nested(keys, value):
    first, _, rest = keys.partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize("key", AVERAGES)
def test_every_other_state_dict_is_named_and_can_be_chosen(tmp_path, resnet, key):
    torch.manual_seed(8)
    other = randomised(Kuangliu("resnet"))
    path = tmp_path / "both.pt"
    torch.save({"epoch": 3, **nested(key, other.state_dict()), "state_dict": resnet.state_dict()}, path)
    member = one(path)
    assert same(member, resnet)
    assert member.note == f"no normalisation; from state_dict (not {key})"
    chosen = one(f"{path}:{key}")
    assert same(chosen, other)
    assert chosen.note == f"no normalisation; from {key} (not state_dict)"
    assert (chosen.name, chosen.source) == (f"both:{key}", f"{path}:{key}")
    assert same(one(f"{path}:state_dict"), resnet)
    assert refused(f"{path}:emma").endswith(f"has no state dict emma: choose one of its own (state_dict, {key})")


def test_mappings_that_are_no_network_and_copies_are_not_named(tmp_path, resnet):
    torch.save(
        {
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
            "model": resnet.state_dict(),
            "best": {key: value.clone() for key, value in resnet.state_dict().items()},
            "scheduler": {"base": torch.ones(1)},
        },
        tmp_path / "a.pt",
    )
    assert one(tmp_path / "a.pt").note == "no normalisation; from model"


def test_a_module_that_holds_its_average(tmp_path, resnet):
    """As Lightning saves it: both networks in one state dict, told apart by the first part of their names."""
    torch.manual_seed(8)
    other, path = randomised(Kuangliu("resnet")), tmp_path / "a.ckpt"
    state = {f"net.{key}": value for key, value in resnet.state_dict().items()}
    state |= {f"ema_model.module.{key}": value for key, value in other.state_dict().items()}
    state["ema_model.n_averaged"] = torch.tensor(7)
    torch.save({"state_dict": state}, path)
    member = one(path)
    assert same(member, resnet)
    assert member.note == "no normalisation; from state_dict.net (not state_dict.ema_model)"
    assert same(one(f"{path}:state_dict.ema_model"), other)
    # Beside other parameters the network has to be chosen: they may be layers before it.
    torch.save({"state_dict": {**state, "scaler.gain": torch.ones(3)}}, path)
    message = refused(path)
    assert "holds model=resnet18 in state_dict.net, and other parameters in state_dict.scaler" in message
    assert f"choose {path}:state_dict.net" in message
    assert same(one(f"{path}:state_dict.net"), resnet)
