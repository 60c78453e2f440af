"""Defences that do not defend, and sound models to tell them from: digits, 8x8, one small network for all."""

from functools import cache

import torch
from torch import nn

from mixadv.attacks import APGD, PGD, Square, UniformNoise
from mixadv.data.digits import Digits
from mixadv.evaluation import evaluate
from mixadv.mixture import Mixture
from mixadv.models import build_member
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


@cache
def digits():
    """Training images and labels, test images and labels."""
    corpus = Digits().load()

    def scaled(images):
        return images.float() / 255

    x, y = scaled(corpus.test_images[:NUM_IMAGES]), corpus.test_labels[:NUM_IMAGES]
    return scaled(corpus.train_images), corpus.train_labels, x, y


def trained(name="small_cnn", seed=0, epochs=12, attack=None, **build):
    """A network after a few passes over the training images, in eval mode; `attack` moves them first."""
    build = build or ({"width": 6, "hidden": 32} if name == "small_cnn" else {})
    images, labels, _, _ = digits()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        member = build_member(name, num_classes=10, image_shape=(1, 8, 8), **build)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(member.parameters(), lr=5e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(96):
            x, y = images[rows], labels[rows]
            if attack is not None:
                x = attack(member, x, y, BALL, generator)
            loss = nn.functional.cross_entropy(member(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return member.eval()


@cache
def natural(seed=0):
    """A small network trained as usual."""
    return trained(seed=seed)


@cache
def robust():
    """A small network trained against PGD."""
    return trained(attack=PGD(num_steps=2, step_size=0.7, keep="last"), epochs=8)


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
        images = digits()[0]
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
    "linear": lambda: Mixture([trained("linear", epochs=30)]),
    "natural": lambda: Mixture([natural()]),
    "adversarially trained": lambda: Mixture([robust()]),
    "mixture of three": lambda: Mixture([natural(), robust(), natural(1)], [0.25, 0.45, 0.3]),
    "very sure": lambda: Mixture([Then(natural(), lambda z: 10 * z)]),
}


def images_for(name):
    """Test images and labels as a defence of that name meets them."""
    _, _, x, y = digits()
    return (marked(x, y), y) if name == "label in the margin" else (x, y)


def evaluated(mixture, images=None, attacks=None, seed=0):
    """What the attacks (the careful ones) find on the images (the test set's)."""
    images = digits()[2:] if images is None else images
    return evaluate(mixture, [images], SUITE if attacks is None else attacks, BALL, seed=seed)
