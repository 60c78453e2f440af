"""Defences that do not defend, and sound models to tell them from: digits, 8x8, one small network for all."""

import math
from functools import cache

import torch
from torch import nn

from builders.data import digits_tensors
from builders.networks import trained_member, untrained_members
from mixadv.attacks import APGD, PGD, AttackSuite, Square, UniformNoise
from mixadv.evaluation import evaluate
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

BALL = ThreatModel("linf", 0.1)
NUM_IMAGES = 60

# A quick version of what protocol=strict runs, and what a careless evaluation does.
SUITE = {
    "noise": UniformNoise(num_samples=25),
    "pgd": PGD(num_steps=10),
    "apgd-ce": APGD(num_steps=10),
    "apgd-dlr": APGD(num_steps=10, loss="dlr"),
    "square": Square(num_queries=100),
}
CARELESS = {"pgd-20": PGD(num_steps=20)}


def measured_on():
    """The images that defences are measured on, and their labels."""
    return tuple(part[:NUM_IMAGES] for part in digits_tensors()[2:])


def small_network(name="small_cnn", seed=0, epochs=12, attack=None, **build):
    """A network after a few passes over the training images, in eval mode; `attack` moves them first."""
    build = build or ({"width": 6, "hidden": 32} if name == "small_cnn" else {})
    with torch.random.fork_rng([]):
        (member,) = untrained_members(1, name, seed=seed, **build)
    return after_training(member, epochs, seed=seed, attack=attack)


def after_training(network, epochs, seed=0, attack=None, lr=5e-3):
    """`network` after a few passes over the training images; `attack` moves them first."""
    x, y, _, _ = digits_tensors()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return trained_member(network, x, y, epochs, seed=seed, lr=lr, batch_size=96, attack=attack, ball=BALL)


def fresh(make):
    """make(), its random numbers from seed 0."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make()


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


class KWinners(nn.Module):
    """Keeps the largest tenth of the activations of an image and sets the others to 0 (k-winners-take-all)."""

    def forward(self, x):
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 12), dim=1).values[:, -1:]
        return (flat * (flat >= least)).reshape(x.shape)


class DetachedWhereSure(nn.Module):
    """Without gradient where the best class leads by more than 1, but for a tiny one that leads nowhere."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.decoy = nn.Parameter(1e-3 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        z = self.net(x)
        first, second = z.topk(2).values.unbind(1)
        z = torch.where((first - second > 1)[:, None], z.detach(), z)
        nowhere = x.flatten(1) @ self.decoy
        return z + nowhere - nowhere.detach()


class WrongSign(torch.autograd.Function):
    """The identity, with the negative gradient, cut to tiny numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad.clamp(-1e-3, 1e-3)


def rounded_frequencies(x):
    """As JPEG: the coefficients of the discrete cosine transform of the 8x8 image are rounded, high ones more."""
    place = torch.arange(8.0)
    waves = torch.cos(math.pi * (2 * place[None] + 1) * place[:, None] / 16) / 2
    waves[0] /= math.sqrt(2)
    step = 0.25 * (1 + (place[:, None] + place[None]) / 4)
    return (waves.T @ ((waves @ x @ waves.T / step).round() * step) @ waves).clamp(0, 1)


@cache
def winners():
    """A network with k-winners-take-all in every layer."""

    def make():
        first = nn.Conv2d(1, 12, 3, padding=1), KWinners(), nn.Conv2d(12, 16, 3, 2, padding=1), KWinners()
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(256, 48), KWinners(), nn.Linear(48, 10))

    return after_training(fresh(make), 20)


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
    "tanh of the logits": lambda: Then(robust(), lambda z: 20 * torch.tanh(z)),
    "mild tanh of the logits": lambda: Then(robust(), lambda z: 20 * torch.tanh(z / 2)),
    "tanh of the logits, tiny": lambda: Then(natural(), lambda z: 1e-3 * torch.tanh(z)),
    "detached where sure": lambda: DetachedWhereSure(natural()),
    "k winners take all": winners,
    "rounded frequencies": lambda: First(robust(), rounded_frequencies),
    "misleading gradient": lambda: First(robust(), WrongSign.apply),
}


class Attention(nn.Module):
    """A transformer of one layer on the 16 patches of 2x2 pixels."""

    def __init__(self, width=24):
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 10)
        self.place = nn.Parameter(torch.randn(16, width) / 10)
        settings = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layer = nn.TransformerEncoderLayer(width, 2, 48, **settings)

    def forward(self, x):
        patches = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        return self.head(self.layer(self.embed(patches) + self.place).mean(1))


def perceptron(*widths, activation):
    """A multilayer perceptron on the 64 pixels."""
    layers = [nn.Flatten()]
    for i, (inputs, outputs) in enumerate(zip((64, *widths), (*widths, 10), strict=True)):
        layers += [nn.Linear(inputs, outputs)] + ([activation()] if i < len(widths) else [])
    return nn.Sequential(*layers)


def without_batch_norm():
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, padding=1), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(256, 10))


def with_pooling_and_dropout():
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(256, 48), nn.ReLU(), nn.Linear(48, 10))


SOUND = {
    "linear": lambda: Mixture([small_network("linear", epochs=30)]),
    "natural": lambda: Mixture([natural()]),
    "adversarially trained": lambda: Mixture([robust()]),
    "mixture of three": lambda: Mixture([natural(), robust(), natural(1)], [0.25, 0.45, 0.3]),
    "very sure": lambda: Mixture([Then(natural(), lambda z: 10 * z)]),
    "log-softmax": lambda: Mixture([Then(natural(), lambda z: z.log_softmax(-1))]),
    "no batch norm": lambda: Mixture([after_training(fresh(without_batch_norm), 10)]),
    "transformer": lambda: Mixture([after_training(fresh(Attention), 15, lr=3e-3)]),
    "wide and linear": lambda: Mixture(
        [after_training(fresh(lambda: perceptron(4096, activation=nn.Identity)), 4, lr=1e-3)]
    ),
    "GELU": lambda: Mixture([after_training(fresh(lambda: perceptron(128, 64, activation=nn.GELU)), 15)]),
    "tanh inside": lambda: Mixture([after_training(fresh(lambda: perceptron(128, activation=nn.Tanh)), 12)]),
    "pooling and dropout": lambda: Mixture([after_training(fresh(with_pooling_and_dropout), 10)]),
    "adversarially trained perceptron": lambda: Mixture(
        [after_training(fresh(lambda: perceptron(128, activation=nn.ReLU)), 12, attack=PGD(5, 0.5, keep="last"))]
    ),
}


def images_for(name):
    """Test images and labels as a defence of that name meets them."""
    x, y = measured_on()
    return (marked(x, y), y) if name == "label in the margin" else (x, y)


def evaluated_defence(mixture, images=None, attacks=None, seed=0):
    """What the attacks (those of SUITE, or of a protocol by name) find on the images (the test set's)."""
    images = measured_on() if images is None else images
    attacks = AttackSuite.from_protocol(attacks).attacks if isinstance(attacks, str) else attacks or SUITE
    return evaluate(mixture, [images], attacks, BALL, seed=seed)
