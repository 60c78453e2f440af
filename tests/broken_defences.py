"""Defences that do not defend, and sound models to tell them from: digits, 8x8, one small network for all."""

from functools import cache

import torch
from torch import nn

from builders.data import digits_tensors
from builders.networks import trained_member, untrained_members
from mixadv.attacks import APGD, PGD, Square, UniformNoise
from mixadv.evaluation import evaluate
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

BALL = ThreatModel("linf", 0.1)
NUM_IMAGES = 60

# What a careful evaluation runs, and what a careless one does.
SUITE = {
    "noise": UniformNoise(num_samples=25),
    "pgd": PGD(num_steps=10),
    "apgd-ce": APGD(num_steps=10),
    "apgd-dlr": APGD(num_steps=10, loss="dlr"),
    "square": Square(num_queries=40),
}
CARELESS = {"pgd-20": PGD(num_steps=20)}


def measured_on():
    """The images that defences are measured on, and their labels."""
    return tuple(part[:NUM_IMAGES] for part in digits_tensors()[2:])


def small_network(name="small_cnn", seed=0, epochs=12, attack=None, **build):
    """A network after a few passes over the training images, in eval mode; `attack` moves them first."""
    build = build or ({"width": 6, "hidden": 32} if name == "small_cnn" else {})
    x, y, _, _ = digits_tensors()
    with torch.random.fork_rng([]):
        (member,) = untrained_members(1, name, seed=seed, **build)
    return trained_member(member, x, y, epochs, seed=seed, batch_size=96, attack=attack, ball=BALL)


@cache
def natural(seed=0):
    """A small network trained as usual."""
    return small_network(seed=seed)


@cache
def robust():
    """A small network trained against PGD."""
    return small_network(attack=PGD(num_steps=2, step_size=0.7, keep="last"), epochs=8)


class Then(nn.Module):
    """After the network, on its logits."""

    def __init__(self, net, f):
        super().__init__()
        self.net, self.f = net, f

    def forward(self, x):
        return self.f(self.net(x))


class First(Then):
    """Before the network, on the images."""

    def forward(self, x):
        return self.net(self.f(x))


class StaysInTraining(nn.Module):
    """Batch normalisation that goes on to measure its batch, because its module overrides `train`."""

    def __init__(self, net):
        super().__init__()
        images = digits_tensors()[0]
        self.norm = nn.BatchNorm2d(1)
        self.net = net
        # On a large batch the network sees the images that it was trained on.
        nn.init.constant_(self.norm.weight, float(images.std()))
        nn.init.constant_(self.norm.bias, float(images.mean()))

    def train(self, mode=True):
        super().train(mode)
        self.norm.train(True)
        return self

    def forward(self, x):
        return self.net(self.norm(x))


# The outer columns of a digit are empty almost everywhere. Their upper halves hold the label in binary, a bit as the
# difference of two pixels.
BITS = (torch.arange(10)[:, None] >> torch.arange(4)) & 1


def marked(x, y):
    """Images with their label written into the margin."""
    x = x.clone()
    x[:, 0, :4, 0] = BITS[y].to(x)
    x[:, 0, :4, 7] = 1 - BITS[y].to(x)
    return x


class ReadsTheMark(nn.Module):
    """Answers with the label that the data set wrote into the margin; below it a network that has a gradient."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        label = ((x[:, 0, :4, 0] > x[:, 0, :4, 7]) * 2 ** torch.arange(4)).sum(1)
        return self.net(x) + 50 * nn.functional.one_hot(label, 16)[:, :10]


class WeightNoise(nn.Module):
    """The last layer's weights are multiplied with fresh noise at every answer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        last = self.net.net[-1]
        noisy = last.weight * (1 + 0.3 * torch.randn_like(last.weight))
        return nn.functional.linear(self.net.net[:-1](self.net.normalize(x)), noisy, last.bias)


BROKEN = {
    "rounded logits": lambda: Then(natural(), torch.round),
    "quantised input": lambda: First(natural(), lambda x: (x * 4).round() / 4),
    "logits times 10,000": lambda: Then(natural(), lambda z: 1e4 * z),
    "noise on the input": lambda: First(natural(), lambda x: x + 0.05 * torch.randn_like(x)),
    "noise on the weights": lambda: WeightNoise(natural()),
    "softmax": lambda: Then(natural(), lambda z: z.softmax(-1)),
    "train-mode batch norm": lambda: StaysInTraining(natural()),
    # Trained on images in 0..1, wrapped as if it had been trained on bytes.
    "wrong normalisation": lambda: First(natural(), lambda x: 255 * x),
    "label in the margin": lambda: ReadsTheMark(natural()),
}

SOUND = {
    "linear": lambda: Mixture([small_network("linear", epochs=30)]),
    "natural": lambda: Mixture([natural()]),
    "adversarially trained": lambda: Mixture([robust()]),
    "mixture of three": lambda: Mixture([natural(), robust(), natural(1)], [0.25, 0.45, 0.3]),
    "very sure": lambda: Mixture([Then(natural(), lambda z: 10 * z)]),
}


def images_for(name):
    """Test images and labels as a defence of that name meets them."""
    x, y = measured_on()
    return (marked(x, y), y) if name == "label in the margin" else (x, y)


def evaluated_defence(mixture, images=None, attacks=None, seed=0):
    """What the attacks (the careful ones) find on the images (the test set's)."""
    images = measured_on() if images is None else images
    return evaluate(mixture, [images], SUITE if attacks is None else attacks, BALL, seed=seed)
