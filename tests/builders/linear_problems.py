"""Many small linear mixtures in one batch, with the exact minimum of their expected accuracy."""

import numpy as np
import torch
from torch import nn

from builders.networks import WEIGHTS
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from oracles_linear import exact_worst_case, linear_mixture, signs, worst_case_with_depth, worst_cases_in_the_plane


class LinearByRow(nn.Module):
    """A linear member of its own for each instance: inputs [B, 3] are two coordinates and the instance's number.

    So that instances stay themselves where an attack drops some of them. No gradient leads to the number.
    """

    def __init__(self, W, b):
        super().__init__()
        self.register_buffer("W", torch.as_tensor(W))
        self.register_buffer("b", torch.as_tensor(b))

    def forward(self, x):
        row = x[:, 2].detach().round().long()
        score = (x[:, :2] * self.W[row]).sum(1) + self.b[row]
        return torch.stack([torch.zeros_like(score), score], dim=1)


class Plane(ThreatModel):
    """Random points leave the instance's number alone."""

    def sample(self, x, generator=None):
        return torch.cat([super().sample(x[:, :2], generator), x[:, 2:]], dim=1)

    def random_start(self, x, generator=None):
        return torch.cat([super().random_start(x[:, :2], generator), x[:, 2:]], dim=1)


class LinearProblem:
    """N mixtures of L linear members in the plane, all with the same lambda, attacked around x = 0 with eps = 1.

    Unit normals in random directions, boundaries at distances uniform in `distances` from 0 (negative: the member errs
    there), in the norm of the attack; the sizes of the logits spread over two decades.

    Attributes: W [N, L, 2], b [N, L], x [N, 3], y [N], threat_model, lam [L], best [N]: the exact minimum of the
    expected accuracy.
    """

    def __init__(self, count, lam, norm, seed, distances=(-0.2, 1.2)):
        random = np.random.default_rng(seed)
        L = len(lam)
        angle = random.uniform(0, 2 * np.pi, (count, L))
        W = np.stack([np.cos(angle), np.sin(angle)], axis=2)
        dual = np.abs(W).sum(2) if norm == "linf" else np.ones((count, L))
        labels = random.integers(0, 2, count)
        b = signs(labels)[:, None] * random.uniform(*distances, (count, L)) * dual
        scale = 10 ** random.uniform(-1, 1, (count, L))
        self.lam = Mixture([nn.Identity()] * L, lam).weights.double().numpy()
        self.norm, self.threat_model = norm, Plane(norm, 1.0, None)
        self._select(W * scale[..., None], b * scale, labels)

    def _select(self, W, b, labels):
        self.W, self.b = W, b
        self.x = torch.zeros(len(W), 3, dtype=torch.float64)
        self.x[:, 2] = torch.arange(len(W))
        self.y = torch.as_tensor(labels)
        loss, _ = worst_cases_in_the_plane(W, b, labels, np.zeros((len(W), 2)), 1.0, self.norm, self.lam)
        self.best = self.lam.sum() - loss

    def keep(self, mask):
        """The instances where mask [N] holds, renumbered."""
        self._select(self.W[mask], self.b[mask], self.y.numpy()[mask])
        return self

    @property
    def mixture(self):
        return Mixture([LinearByRow(self.W[:, k], self.b[:, k]) for k in range(len(self.lam))], self.lam)

    def attacked(self, attack, seed=0):
        """The expected accuracy [N] at the points found; nobody finds less than the exact minimum."""
        mixture = self.mixture
        found = attack(mixture, self.x, self.y, self.threat_model, torch.Generator().manual_seed(seed))
        assert self.threat_model.contains(found, self.x).all()
        assert torch.equal(found[:, 2], self.x[:, 2])
        accuracy = mixture.expected_accuracy(found, self.y).numpy()
        assert (accuracy >= self.best - 1e-6).all()
        return accuracy

    def solved(self, *accuracies):
        """Where the exact minimum was reached by one of several attacks, [N]."""
        return np.minimum.reduce(accuracies) <= self.best + 1e-6


def linear_problems(count, seeds):
    """Pairs and triples, l2 and linf, with random weights: `count` instances for each seed, size and norm."""
    for seed in seeds:
        for L in (2, 3):
            lam = np.random.default_rng(1000 + seed).dirichlet(2 * np.ones(L))
            for norm in ("l2", "linf"):
                yield LinearProblem(count, lam, norm, seed)


def linear_examples(norm):
    """Three linear members on 25 points in six dimensions, without a box, and the exact optimum of each point.

    The optimum comes from all sets of members, each by a convex problem of its own.

    Returns:
        The mixture, the points [25, 6], the labels [25], the ball, and the least expected accuracy in it [25].
    """
    random = np.random.default_rng(3)
    W, b = random.normal(size=(3, 6)), random.normal(size=3) / 2
    x, y = random.uniform(size=(25, 6)), random.integers(2, size=25)
    eps = 0.25 if norm == "linf" else 0.5
    best = np.array([1 - exact_worst_case(W, b, y[i], x[i], eps, norm, np.array(WEIGHTS))[0] for i in range(25)])
    mixture = linear_mixture(W, b, WEIGHTS)
    return mixture, torch.as_tensor(x), torch.as_tensor(y), ThreatModel(norm, eps, None), best


class ManyLinearMembers:
    """A mixture of L linear members with several classes on N points of the unit box, and the optimum of each point.

    Classes are clouds around random means. Each member sees half of the coordinates and knows the means up to noise.
    The sizes of the logits spread over three decades; the weights are drawn from a Dirichlet distribution.

    Attributes: W [L, C, d], b [L, C], lam [L], mixture, x [N, d] and y [N] in float64, threat_model,
        best [N]: the least expected accuracy where members count as wrong only 1 % of eps beyond their boundary.
    """

    def __init__(self, L, d, norm, eps, count, seed=0, num_classes=4):
        random = np.random.default_rng([seed, L, d])
        means = random.uniform(0.3, 0.7, (num_classes, d))
        labels = random.integers(0, num_classes, count)
        points = np.clip(means[labels] + 0.15 * random.normal(size=(count, d)), 0, 1)
        seen = random.random((L, 1, d)) < 0.5
        centres = (means + 0.05 * random.normal(size=(L, num_classes, d))) * seen
        scale = 10 ** random.uniform(-1.5, 1.5, (L, 1))
        self.W, self.b = scale[..., None] * centres, -scale * np.square(centres).sum(2) / 2
        self.lam = random.dirichlet(np.ones(L))
        self.x, self.y = torch.as_tensor(points), torch.as_tensor(labels)
        self.threat_model = ThreatModel(norm, eps)
        self.mixture = Mixture([linear_layer(*member) for member in zip(self.W, self.b, strict=True)], self.lam)
        worst = [self.worst_case(i)[0] for i in range(count)]
        self.best = 1.0 - np.array(worst)

    def worst_case(self, i, depth=0.01):
        """The largest expected loss at point number i, and where; members are wrong by `depth` eps."""
        ball = self.threat_model
        return worst_case_with_depth(
            self.W, self.b, int(self.y[i]), self.x[i].numpy(), ball.eps, ball.norm, self.lam, ball.bounds, depth
        )


def linear_layer(weight, bias):
    """The member with logits W x + b, in the dtype of W [C, d] and b [C]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.as_tensor(weight).dtype)
    layer.load_state_dict({"weight": torch.as_tensor(weight), "bias": torch.as_tensor(bias)})
    return layer
