import pytest
import torch
from torch import nn

from mixadv.models import MODELS, Normalize, build_member

# The smallest that each of them gets.
SMALL = {"linear": {}, "mlp": {"hidden": (8, 4)}, "wrn_28_10": {"depth": 10, "widen_factor": 1}}
MEAN, STD = (0.49, 0.48, 0.44), (0.2, 0.3, 0.4)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def multiply_adds(model, image_shape):
    """Counted from the shapes that flow, for convolutions and linear layers."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.zeros(1, *image_shape))
    return total


def test_normalize():
    x = torch.rand(2, 3, 4, 5)
    out = Normalize(MEAN, STD)(x)
    for c in range(3):
        torch.testing.assert_close(out[:, c], (x[:, c] - MEAN[c]) / STD[c])
    assert set(Normalize(MEAN, STD).state_dict()) == {"mean", "std"}
    assert parameters(Normalize(MEAN, STD)) == 0
    with pytest.raises(ValueError, match="channels"):
        Normalize(MEAN, STD[:2])
    with pytest.raises(ValueError, match="positive"):
        Normalize(MEAN, (0.2, 0.0, 0.3))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("num_classes", "image_shape"), [(10, (1, 8, 8)), (4, (3, 32, 32)), (7, (3, 11, 9))])
def test_every_model_takes_images_and_returns_logits(name, num_classes, image_shape):
    own = SMALL.get(name, {"width": 8})
    # A small network may be dead for every image.
    torch.manual_seed(0)
    model = build_member(name, num_classes=num_classes, image_shape=image_shape, **own).eval()
    logits = model(torch.rand(3, *image_shape))
    assert logits.shape == (3, num_classes)
    assert logits.isfinite().all()
    assert len({tuple(row) for row in logits.tolist()}) == 3


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_inside(name):
    """A normalising member at x is the plain member of the same parameters at (x - mean) / std."""
    own = SMALL.get(name, {"width": 4})
    torch.manual_seed(0)
    inside = build_member(name, num_classes=5, mean=MEAN, std=STD, **own).eval()
    plain = build_member(name, num_classes=5, **own).eval()
    keys = plain.load_state_dict(
        {k: v for k, v in inside.state_dict().items() if not k.startswith("normalize")}, strict=False
    )
    assert keys.missing_keys == ["normalize.mean", "normalize.std"]
    x = torch.rand(2, 3, 32, 32)
    normalised = (x - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    torch.testing.assert_close(inside(x), plain(normalised))
    assert not torch.allclose(inside(x), plain(x))


def test_resnet18_is_torchvisions_with_a_small_stem():
    from torchvision.models import resnet18

    torch.manual_seed(1)
    peer = resnet18(num_classes=10)
    peer.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    peer.maxpool = nn.Identity()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = build_member("resnet18", num_classes=10)
    assert parameters(ours) == parameters(peer) == 11_173_962
    ours.net.load_state_dict(peer.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), peer.eval()(x))
        torch.testing.assert_close(ours.train()(x), peer.train()(x))


def test_preact_resnet18_has_the_published_size():
    """11,171,146 is the count without a final batch norm, which adds 2 * 512."""
    ours = build_member("preact_resnet18", num_classes=10)
    assert parameters(ours) == 11_171_146 + 1024
    assert all(m.bias is None for m in ours.modules() if isinstance(m, nn.Conv2d))
    assert multiply_adds(ours, (3, 32, 32)) == pytest.approx(556e6, rel=0.01)


def test_preact_resnet20_has_the_size_counted_by_hand():
    ours = build_member("preact_resnet20", num_classes=10)
    convolutions = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 16 * 32 + 32 * 64
    norms = 2 * (6 * 16 + 16 + 5 * 32 + 32 + 5 * 64 + 64)
    assert parameters(ours) == convolutions + norms + 64 * 10 + 10 == 272_282
    assert multiply_adds(ours, (3, 32, 32)) == pytest.approx(41e6, rel=0.02)


def test_preact_block_normalises_before_it_convolves():
    """With all convolutions of the blocks at zero only identities remain, and the stem reaches the head."""
    model = build_member("preact_resnet18", num_classes=3, width=4).net.eval()
    with torch.no_grad():
        for block in model.blocks:
            block.conv2.weight.zero_()
        x = torch.rand(2, 3, 16, 16)
        out = model.blocks[1](model.blocks[0](model.conv1(x)))
        torch.testing.assert_close(out, nn.functional.conv2d(x, model.conv1.weight, padding=1))
        halved = model.blocks[2]
        normalised = torch.relu(nn.functional.batch_norm(out, torch.zeros(4), torch.ones(4)))
        torch.testing.assert_close(halved(out), nn.functional.conv2d(normalised, halved.shortcut.weight, stride=2))


def test_wide_resnet_has_the_published_size_and_names():
    """The names and shapes of a WRN-28-10 of TRADES or RobustBench, written out."""
    with torch.device("meta"):
        net = build_member("wrn_28_10", num_classes=10).net
    assert parameters(net) == 36_479_194
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    expected = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 640), "fc.bias": (10,)}

    def norm(name, channels):
        expected.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    norm("bn1", 640)
    before = 16
    for group, channels in enumerate((160, 320, 640), 1):
        for block in range(4):
            here = f"block{group}.layer.{block}"
            norm(f"{here}.bn1", before)
            norm(f"{here}.bn2", channels)
            expected[f"{here}.conv1.weight"] = (channels, before, 3, 3)
            expected[f"{here}.conv2.weight"] = (channels, channels, 3, 3)
            if block == 0:
                expected[f"{here}.convShortcut.weight"] = (channels, before, 1, 1)
            before = channels
    assert shapes == expected


def test_small_wide_resnet_has_the_size_counted_by_hand():
    """WRN-16-2: groups of two blocks with 32, 64 and 128 channels."""
    net = build_member("wrn_28_10", num_classes=3, depth=16, widen_factor=2)
    convolutions = 9 * (3 * 16 + 16 * 32 + 3 * 32**2 + 32 * 64 + 3 * 64**2 + 64 * 128 + 3 * 128**2)
    shortcuts = 16 * 32 + 32 * 64 + 64 * 128
    norms = 2 * (16 + 3 * 32 + 32 + 3 * 64 + 64 + 3 * 128 + 128)
    assert parameters(net) == convolutions + shortcuts + norms + 128 * 3 + 3


def test_wide_resnet_is_its_definition():
    """A forward pass in training mode written out with functions, and gradients that reach every parameter."""
    torch.manual_seed(2)
    net = build_member("wrn_28_10", num_classes=3, depth=16, widen_factor=2).net.double()
    p = {name: value.detach() for name, value in net.named_parameters()}

    def normalised(x, name):
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return torch.relu(x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None])

    def convolved(x, name, stride=1, padding=1):
        return nn.functional.conv2d(x, p[f"{name}.weight"], stride=stride, padding=padding)

    x = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    out = convolved(x, "conv1")
    for group, stride in ((1, 1), (2, 2), (3, 2)):
        for block in range(2):
            here, step = f"block{group}.layer.{block}", stride if block == 0 else 1
            first = normalised(out, f"{here}.bn1")
            shortcut = out if block else convolved(first, f"{here}.convShortcut", step, 0)
            out = shortcut + convolved(
                normalised(convolved(first, f"{here}.conv1", step), f"{here}.bn2"), f"{here}.conv2"
            )
    assert out.shape == (4, 128, 4, 4)
    expected = normalised(out, "bn1").mean((2, 3)) @ p["fc.weight"].T + p["fc.bias"]
    logits = net.train()(x)
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    assert all(q.grad is not None and q.grad.any() for q in net.parameters())


@pytest.mark.parametrize("hidden", [(7, 5, 6), (4,), ()])
def test_mlp_is_a_loop_over_its_layers(hidden):
    torch.manual_seed(3)
    model = build_member("mlp", num_classes=3, image_shape=(2, 2, 3), hidden=hidden)
    x = torch.rand(5, 2, 2, 3, requires_grad=True)
    layers = [module for module in model.net if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == [*hidden, 3]
    out = x.flatten(1)
    for number, layer in enumerate(layers):
        out = out @ layer.weight.T + layer.bias
        if number < len(hidden):
            out = torch.where(out > 0, out, torch.zeros(()))
    torch.testing.assert_close(model(x), out)
    model(x).sum().backward()
    assert x.grad.any()


def test_small_models_are_small():
    assert 2e6 <= multiply_adds(build_member("small_resnet", num_classes=10), (3, 32, 32)) <= 5e6
    assert multiply_adds(build_member("small_cnn", num_classes=10), (3, 32, 32)) <= 5e6
    assert parameters(build_member("small_cnn", num_classes=10, image_shape=(1, 8, 8))) < 100_000
    small = parameters(build_member("small_resnet", num_classes=10))
    assert parameters(build_member("small_resnet", num_classes=10, width=32)) > 3 * small


def test_linear_is_an_affine_map():
    model = build_member("linear", num_classes=3, image_shape=(2, 2, 3), mean=(0.5, 0.1), std=(1.0, 2.0))
    weight, bias = model.net[1].weight, model.net[1].bias
    x = torch.rand(4, 2, 2, 3)
    flat = torch.cat([(x[:, 0] - 0.5).flatten(1), ((x[:, 1] - 0.1) / 2).flatten(1)], dim=1)
    torch.testing.assert_close(model(x), flat @ weight.T + bias)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet50", {}, "resnet18, preact_resnet18, preact_resnet20, small_resnet, small_cnn, linear"),
        ("linear", {"num_classes": 1}, "at least 2"),
        ("small_cnn", {"num_classes": 3, "image_shape": (32, 32)}, "image_shape"),
        ("small_cnn", {"num_classes": 3, "width": 0}, "width"),
        ("small_cnn", {"num_classes": 3, "hidden": 0}, "hidden"),
        ("linear", {"num_classes": 3, "mean": MEAN}, "both"),
        ("mlp", {"num_classes": 3, "hidden": 8}, "hidden is 8: it must be a list"),
        ("mlp", {"num_classes": 3, "hidden": [8, 1.5]}, "in hidden is 1.5"),
        ("wrn_28_10", {"num_classes": 3, "depth": 27}, "6 n \\+ 4"),
        ("wrn_28_10", {"num_classes": 3, "depth": 4}, "depth is 4"),
        ("wrn_28_10", {"num_classes": 3, "widen_factor": 0}, "widen_factor is 0"),
        ("linear", {"num_classes": 3, "image_shape": (1, 4, 4), "mean": MEAN, "std": STD}, "channels"),
    ],
)
def test_wrong_settings_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_member(name, **kwargs)


def test_equal_seeds_give_equal_members():
    for name in MODELS:
        own = SMALL.get(name, {"width": 4})
        states = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            states.append(build_member(name, num_classes=3, **own).state_dict())
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
