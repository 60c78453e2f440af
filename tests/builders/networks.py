"""Small networks: untrained ones, ones that disagree, ones trained on digits, and members that misbehave."""

from functools import cache

import pytest
import torch
from torch import nn

from builders.data import digits_tensors, seeded
from mixadv.mixture import Mixture
from mixadv.models import build_member

# The first member weighs as much as the other two together: attacks meet a tie.
WEIGHTS = [0.5, 0.2, 0.3]


def untrained_members(count=3, name="linear", *, seed=5, num_classes=10, image_shape=(1, 8, 8), **settings):
    """`count` members of one architecture with random parameters, by default for digits."""
    torch.manual_seed(seed)
    return [build_member(name, num_classes=num_classes, image_shape=image_shape, **settings) for _ in range(count)]


def untrained_mixture(name="linear", *, weights=WEIGHTS, **settings):
    """A mixture of `untrained_members`, in train mode as torch builds modules."""
    return Mixture(untrained_members(len(weights), name, **settings), weights)


def disagreeing_mixture(name="small_resnet", image_shape=(3, 8, 8)):
    """Three members that answer differently (their logits are centred over the batch), 6 inputs and their labels.

    Returns:
        The mixture in eval mode; x [6, *image_shape] in [0, 1]; y [6], what its average answers, of 4 classes.
    """
    own = {"width": 6} if name == "small_resnet" else {}
    mixture = untrained_mixture(name, num_classes=4, image_shape=image_shape, **own).eval()
    x = torch.rand(6, *image_shape, generator=seeded(6))
    with torch.no_grad():
        for member in mixture.members:
            head = member.net.fc if name == "small_resnet" else member.net[1]
            head.weight *= 5
            head.bias -= member(x).mean(0)
        return mixture, x, mixture(x).argmax(-1)


def trained_member(member, x, y, epochs, *, seed=0, lr=5e-3, batch_size=64, attack=None, ball=None, clean_epochs=0):
    """Train `member` by Adam; from epoch `clean_epochs` on, on the points that `attack` finds in `ball`.

    Returns:
        The member in eval mode.
    """
    generator = seeded(seed)
    optimizer = torch.optim.Adam(member.parameters(), lr=lr)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            images = x[rows]
            if attack is not None and epoch >= clean_epochs:
                images = attack(member, images, y[rows], ball, generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(member(images), y[rows]).backward()
            optimizer.step()
    return member.eval()


@cache
def network_on_digits():
    """A small convolutional network trained on digits for a second or two, frozen. Shared: never change it."""
    x, y, _, _ = digits_tensors()
    with torch.random.fork_rng([]):
        (member,) = untrained_members(1, "small_cnn", seed=0, width=8, hidden=32)
    return trained_member(member, x, y, 6, lr=3e-3).requires_grad_(False)


class Step(nn.Module):
    """Without gradient: class 1 where the first coordinate is above one half."""

    def forward(self, x):
        return nn.functional.one_hot((x.flatten(1)[:, 0] > 0.5).long(), 2).float()


class Fragile(nn.Module):
    """Logits finite everywhere, gradient NaN for the examples whose first coordinate is below one half."""

    def forward(self, x):
        u = x.flatten(1)[:, 0]
        bit = torch.where(u < 0.5, 0 * u, 0 * u + 1)
        score = u + bit.sqrt() - bit
        return torch.stack([torch.zeros_like(u), score], dim=1)


class Failing(nn.Module):
    """A member that raises in its n-th forward pass."""

    def __init__(self, member, n):
        super().__init__()
        self.member, self.left = member, n

    def forward(self, x):
        self.left -= 1
        if not self.left:
            raise RuntimeError("out of order")
        return self.member(x)


class Watched(nn.Module):
    """Counts its forward passes, and notes whether any of them was in train mode or with parameters to train."""

    def __init__(self, member):
        super().__init__()
        self.member, self.passes, self.undisturbed = member, 0, True

    def forward(self, x):
        self.passes += 1
        self.undisturbed &= not self.training and not any(p.requires_grad for p in self.parameters())
        return self.member(x)


class InFloat64(nn.Module):
    """Computes in float64, so that sign() of a gradient does not depend on rounding; notes its largest batch."""

    def __init__(self, net):
        super().__init__()
        self.net = net.double()
        self.most = 0

    def forward(self, x):
        self.most = max(self.most, len(x))
        return self.net(x.double())


def patchwork_mixture(member_of):
    """For digits, in train mode: batch norm, dropout, and a member made of the third one.

    Modes, frozen parameters and gradients differ from module to module, so that a change of any of them shows.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        first = nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 10))
        second = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Dropout(0.5), nn.BatchNorm1d(12), nn.Linear(12, 10))
        third = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
    mixture = Mixture([first, second, member_of(third)], WEIGHTS).train()
    second[3].eval()
    second[1].weight.requires_grad_(False)
    third[3].bias.requires_grad_(False)
    third[3].weight.grad = torch.full_like(third[3].weight, 0.5)
    return mixture


def assert_left_as_found(mixture_of, call):
    """call(mixture) changes nothing of the mixture nor of torch's global state, also when a member raises in it.

    Args:
        mixture_of: a function of one that wraps a member; returns a mixture whose last member is wrapped.
        call: makes at least 4 passes through the last member; the same number each time.
    """
    mixture = mixture_of(Watched)
    before = _everything(mixture)
    call(mixture)
    _assert_same(_everything(mixture), before)
    watched = mixture.members[-1]
    assert watched.undisturbed
    assert watched.passes >= 4
    for fatal in (1, watched.passes // 2, watched.passes):
        broken = mixture_of(lambda member, fatal=fatal: Failing(member, fatal))
        before = _everything(broken)
        with pytest.raises(RuntimeError, match="out of order"):
            call(broken)
        _assert_same(_everything(broken), before)


def _everything(mixture):
    return (
        [module.training for module in mixture.modules()],
        [p.requires_grad for p in mixture.parameters()],
        [id(t) for t in (*mixture.parameters(), *mixture.buffers())],
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        {key: value.clone() for key, value in mixture.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in mixture.parameters()],
        torch.get_rng_state(),
    )


def _assert_same(after, before):
    assert after[:4] == before[:4]
    torch.testing.assert_close(after[4:], before[4:], rtol=0, atol=0)


def same_tensors(one, two):
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
