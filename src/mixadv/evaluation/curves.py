"""Curves: the loss against the steps of an attack, and the accuracy against its radius."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import check_batch
from mixadv.attacks.suite import MIXTURE, TWIN, Pass, passes_of
from mixadv.correctness import correct
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

# In units of eps.
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
STEPS = (0, 1, 2, 5, 10, 20, 50)
# At each radius one start is the result of the smaller radius, the other is random.
STEPS_PER_RADIUS, STARTS_PER_RADIUS = 10, 2


def curves(
    mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, *, seed: int = 0, batch_size: int = 128
) -> dict[str, Any]:
    """Two curves for the mixture, for each member and for the averaged twin, each under attacks on itself.

    eps: the robust (expected) accuracy at `RADII` times eps under PGD on the margin; for linf, eps is at most the width
        of the box. Each search starts at the worst point of the smaller radius and keeps it unless it finds a worse
        one, and every point is replayed on all classifiers. So the accuracy of no example rises with eps.
    steps: the mean attack loss after `STEPS` steps of PGD from one random start. The loss is the expected
        cross-entropy, for the twin -log sum_k lambda_k p_k; the values are those of the iterates, not the best so far.

    Args:
        mixture: on the device of x, attacked in eval mode and left unchanged.
        x: [N, ...], y: [N], part of the test set.
        seed: of the random starts. With deterministic members the result depends only on it and on batch_size.

    Returns:
        num_examples; "eps" and "steps", each with its abscissae under its own name and, of the same length, the lists
        "mixture", "members" (one list per member) and "averaged_twin". Numbers are plain floats; None is a loss that is
        not finite, because a logit is not.

    Raises:
        ValueError: no images, a batch that cannot be attacked (see `check_batch`), a member without gradient.
    """
    y = check_batch(x, y, threat_model)
    if not len(x):
        raise ValueError("a curve needs at least one image")
    low, high = threat_model.bounds or (-np.inf, np.inf)
    most = high - low if threat_model.norm == "linf" else np.inf
    radii = [min(factor * threat_model.eps, most) for factor in RADII]
    accuracies: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    batches = list(zip(x.detach().split(batch_size), y.split(batch_size), strict=True))
    passes = passes_of({"curves": PGD()}, mixture)
    with mixture.attack_mode():
        for i, (images, labels) in enumerate(batches):
            accuracies.append(_against_eps(mixture, passes, images, labels, threat_model, radii, seeds=(seed, i)))
            losses.append(np.stack([_against_steps(one, images, labels, threat_model, (seed, i)) for one in passes]))
    names = [one.against for one in passes]
    return {
        "num_examples": len(x),
        "eps": {"eps": radii} | _named(names, np.concatenate(accuracies, axis=-1).mean(-1)),
        "steps": {"steps": list(STEPS)} | _named(names, np.concatenate(losses, axis=-1).mean(-1)),
    }


def _against_eps(
    mixture: Mixture,
    passes: list[Pass],
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    radii: list[float],
    seeds: tuple[int, int],
) -> np.ndarray:
    """Expected accuracies [targets, radii, B], see `curves`."""
    attack = PGD(STEPS_PER_RADIUS, restarts=STARTS_PER_RADIUS, objective=ExpectedLoss("margin"))
    worst = torch.stack(_accuracies(mixture, passes, x, y))
    points = [x.clone() for _ in passes]
    curve = []
    for j, eps in enumerate(radii):
        if eps > 0:
            ball = ThreatModel(threat_model.norm, eps, threat_model.bounds)
            for t, one in enumerate(passes):
                from_here = one._replace(name=f"eps {j}", attack=partial(attack, start_at=points[t]))
                found = from_here.points(x, y, ball, *seeds)
                for who, accuracy in enumerate(_accuracies(mixture, passes, found, y)):
                    # On ties the target keeps the point of its own attack, which has the larger margin.
                    worse = (accuracy < worst[who]) | ((accuracy == worst[who]) & (who == t))
                    worst[who] = torch.where(worse, accuracy, worst[who])
                    points[who][worse] = found[worse]
        curve.append(worst.clone())
    return torch.stack(curve, dim=1).cpu().numpy()


def _against_steps(one: Pass, x: Tensor, y: Tensor, threat_model: ThreatModel, seeds: tuple[int, int]) -> np.ndarray:
    """Attack losses [steps, B] of one target: one run of PGD, continued from one of `STEPS` to the next."""
    one = one._replace(name="steps")
    at: Tensor | None = None
    curve = []
    for done, steps in zip((0, *STEPS), STEPS, strict=False):
        attack = PGD(steps - done, keep="last")
        at = one._replace(attack=partial(attack, start_at=at)).points(x, y, threat_model, *seeds)
        with torch.no_grad(), one.target.attack_mode(plain=True):
            curve.append(ExpectedLoss()(one.target.member_logits(at), y, one.target.weights))
    return torch.stack(curve).double().cpu().numpy()


def _accuracies(mixture: Mixture, passes: list[Pass], x: Tensor, y: Tensor) -> list[Tensor]:
    """Expected accuracy [B] of every target, with one forward pass of each member."""
    with torch.no_grad(), mixture.attack_mode(plain=True):
        logits = mixture.member_logits(x)
    members = correct(logits, y)
    answers = {MIXTURE: mixture.expectation(members), TWIN: correct(mixture.log_average(logits), y)}
    answers |= {f"member {k}": right for k, right in enumerate(members)}
    expected = answers[MIXTURE]
    return [answers[one.against].to(expected) for one in passes]


def _named(names: list[str], values: np.ndarray) -> dict[str, Any]:
    """The curves [targets, points] under their names; a single model is its own only member and its twin."""
    finite: list[list[float | None]] = [[v if math.isfinite(v) else None for v in row] for row in values.tolist()]
    rows = dict(zip(names, finite, strict=True))
    alone = rows[MIXTURE]
    return {
        "mixture": alone,
        "members": [row for name, row in rows.items() if name.startswith("member ")] or [list(alone)],
        "averaged_twin": rows.get(TWIN, list(alone)),
    }
