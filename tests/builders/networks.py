"""Small networks: untrained ones, ones that disagree, ones trained on digits, and members that misbehave."""

from functools import cache

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
