import pytest
import torch
from torch import nn

from mixadv.models import MODELS, Normalize, build_member

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
    own = {} if name == "linear" else {"width": 8}
    model = build_member(name, num_classes=num_classes, image_shape=image_shape, **own).eval()
    logits = model(torch.rand(3, *image_shape))
    assert logits.shape == (3, num_classes)
    assert logits.isfinite().all()
    assert len({tuple(row) for row in logits.tolist()}) == 3


@pytest.mark.parametrize("name", MODELS)
def test_normalisation_is_inside(name):
    """A normalising member at x is the plain member of the same parameters at (x - mean) / std."""
    own = {} if name == "linear" else {"width": 4}
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
        ("linear", {"num_classes": 3, "image_shape": (1, 4, 4), "mean": MEAN, "std": STD}, "channels"),
    ],
)
def test_wrong_settings_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_member(name, **kwargs)


def test_equal_seeds_give_equal_members():
    for name in MODELS:
        own = {} if name == "linear" else {"width": 4}
        states = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            states.append(build_member(name, num_classes=3, **own).state_dict())
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
