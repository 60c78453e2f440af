"""The forward passes, gradients and small attacks that `mixadv.evaluation.distrust` uses."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod, sqrt

import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import gradient
from mixadv.attacks.suite import Pass
from mixadv.correctness import correct
from mixadv.intervals import confidence_interval, paired_interval
from mixadv.mixture import Mixture
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel

# A gradient counts as 0 if it changes the objective by at most this many rounding errors of the numbers behind it.
NOISE = 8
# Tolerance on the sum of probabilities in float32 or float16; logits do not sum to 1 on all images.
PROBABILITY_TOLERANCE = 1e-3
# Relative to the range of an image's logits: ten times the effect of TF32 and of other orders of summation.
ANSWER_TOLERANCE = 1e-2
# Passes of the same batch, and its number of images. A member that chooses at random between two answers gives the
# same one in all passes with probability 2^-7.
REPEATS, NUM_REPEATED = 8, 32
# Steps of PGD, each a quarter of the radius long, so that they can cross the ball twice.
NUM_STEPS, RESTARTS = 20, 2
# Runner-up classes whose gradients are compared, and the ratio of gradients from which logits count as saturated.
NUM_RUNNER_UPS, SATURATED_RATIO = 9, 10.0
# Under PGD the loss of a sound model rises on almost all images; if the attack fails it rises on half of them.
SOUND_SHARE = 0.75


def answers(mixture: Mixture, x: Tensor) -> dict[str, str]:
    """Symptoms in the outputs of members: probabilities, and changes from pass to pass or from batch to batch."""
    found: dict[str, str] = {}
    x = x[:NUM_REPEATED]
    with torch.no_grad():
        first = mixture.member_logits(x)
        again = torch.stack([mixture.member_logits(x) for _ in range(REPEATS - 1)])
        order = torch.arange(len(x) - 1, -1, -1, device=x.device)
        regrouped = [mixture.member_logits(x[order])[:, order]]
        for size in {2, max(2, len(x) // 2)}:
            # In train mode batch norm refuses a batch of one image.
            parts = [mixture.member_logits(part) for part in x.split(size) if len(part) > 1]
            regrouped += [torch.cat(parts, dim=1)] if parts else []
    total = first.double().sum(-1)
    sums_to_one = ((total - 1).abs() <= PROBABILITY_TOLERANCE).all(1) & (first >= 0).all(-1).all(-1)
    members = _indices(sums_to_one)
    if members:
        found["probabilities"] = f"{named(members)}: all outputs are at least 0 and sum to 1"
    moved = torch.stack([_difference(first, other) for other in again]).amax(0)
    random = moved > ANSWER_TOLERANCE
    if random.any():
        found["random-outputs"] = (
            f"{named(_indices(random))}: in {REPEATS} passes of the same batch the logits differ by up to "
            f"{float(moved.max()):.1%} of their range{_training(mixture, random)}"
        )
    moved = torch.stack([_difference(first[:, : other.shape[1]], other) for other in regrouped]).amax(0)
    # A member with random outputs differs between all batches, so it gets no second flag.
    dependent = (moved > ANSWER_TOLERANCE) & ~random
    if dependent.any():
        found["batch-dependent"] = (
            f"{named(_indices(dependent))}: in another batch the logits of the same image differ by up to "
            f"{float(moved[dependent].max()):.1%} of their range{_training(mixture, dependent)}"
        )
    return found


def nothing_to_climb(gradient: Tensor, scale: Tensor, width: float = 1.0) -> Tensor:
    """Whether a gradient [B, ...] vanishes or is NaN, [B].

    It vanishes if its linear model, over the whole `width` of the box, changes the objective by at most NOISE rounding
    errors of a number of size `scale` [B].
    """
    change = gradient.nan_to_num(nan=0.0).abs().flatten(1).sum(1) * width
    return change <= NOISE * torch.finfo(scale.dtype).eps * scale


def gradients(
    mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, seed: int, batch_size: int
) -> tuple[dict[str, list[float]], set[int]]:
    """How often the gradients of members vanish at random points of the ball, see `nothing_to_climb`.

    The scale is the largest logit for the margin, and max(1, CE) for the cross-entropy. Its p_y may be a float close to
    1; then 1 - p_y, which gives the direction of the gradient, has the rounding error of 1.

    Returns:
        For "margin" and "ce" each member's share of images whose gradient vanishes or is NaN; the members whose
        logits are not differentiable at all.
    """
    width = 1.0 if threat_model.bounds is None else threat_model.bounds[1] - threat_model.bounds[0]
    generator = generator_for(seed, "gradients", device=x.device)
    vanishing: dict[str, list[list[Tensor]]] = {loss: [[] for _ in mixture.members] for loss in ("margin", "ce")}
    blind: set[int] = set()
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        points = threat_model.sample(images, generator)
        for k, member in enumerate(mixture.members):
            alone = Mixture([member])
            at = points.clone().requires_grad_()
            with torch.enable_grad():
                logits = alone.member_logits(at)
                values = {loss: ExpectedLoss(loss)(logits, labels, alone.weights) for loss in vanishing}
            scale = {"margin": logits.detach().abs().amax((0, 2)), "ce": values["ce"].detach().clamp_min(1)}
            for loss, value in values.items():
                if value.requires_grad:
                    found = gradient(value, at, retain_graph=True)
                    vanishing[loss][k].append(nothing_to_climb(found, scale[loss], width))
                else:
                    blind.add(k)
                    vanishing[loss][k].append(torch.ones_like(labels, dtype=torch.bool))
    return {loss: [int(torch.cat(each).sum()) / len(x) for each in vanishing[loss]] for loss in vanishing}, blind


def saturated(
    mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, seed: int, batch_size: int
) -> list[float]:
    """Each member's share of images on which a squashing function hides some of its logits from the gradient.

    At a random point of the ball let g_c = ||grad(f_c - f_y)||_2, for the 9 highest classes c beside the label. An
    image counts if max_c g_c > 10 min_c g_c. A function such as 20 tanh(z), applied to each logit, scales the gradient
    of each class by a slope of its own, which is almost 0 for a class that is sure. Adding the same number to all
    logits, as log-softmax does, changes no g_c. With two classes there is one g_c, so no image counts.
    """
    generator = generator_for(seed, "saturated", device=x.device)
    counts = [0] * mixture.num_members
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        points = threat_model.sample(images, generator)
        for k in range(mixture.num_members):
            at = points.clone().requires_grad_()
            with torch.enable_grad():
                logits = mixture.logits_of(k, at)
                if not logits.requires_grad:
                    continue
                label = labels[:, None]
                others = logits.detach().scatter(1, label, float("-inf"))
                runner_ups = others.topk(min(NUM_RUNNER_UPS, others.shape[1] - 1), dim=1).indices
                leads = logits.gather(1, runner_ups) - logits.gather(1, label)
                slopes = [gradient(lead, at, retain_graph=True).flatten(1) for lead in leads.unbind(1)]
            # Scaled first, because the squares of tiny gradients underflow.
            joint = torch.stack(slopes, dim=1)
            largest = joint.abs().amax((1, 2), keepdim=True)
            size = torch.linalg.vector_norm(joint / largest.clamp_min(torch.finfo(joint.dtype).tiny), dim=2)
            counts[k] += int((size.amax(1) > SATURATED_RATIO * size.amin(1)).sum())
    return [count / len(x) for count in counts]


class OwnAttacks:
    """Small attacks on one target after the other; see `distrust` for the arguments."""

    def __init__(self, x: Tensor, y: Tensor, threat_model: ThreatModel, seed: int, batch_size: int) -> None:
        self.x, self.y, self.threat_model, self.seed = x, y, threat_model, seed
        self.batches = list(zip(x.split(batch_size), y.split(batch_size), strict=True))

    def symptoms(self, one: Pass) -> dict[str, str]:
        """Flag -> evidence, from attacks on the target of a pass that a stronger attack or radius should beat."""
        found: dict[str, str] = {}
        ball = self.threat_model
        if ball.eps > 0:
            near = self._last(one, ball, NUM_STEPS)
            sentence = _not_worse(self._last(one, ball, 0), near)
            if sentence:
                found["more-steps-do-not-hurt"] = f"{one.against}: {NUM_STEPS} steps of PGD against none, {sentence}"
            width = float("inf") if ball.bounds is None else ball.bounds[1] - ball.bounds[0]
            radius = width if ball.norm == "linf" else width * sqrt(prod(self.x.shape[1:]))
            if 2 * ball.eps <= radius:
                far = self._last(one, ThreatModel(ball.norm, 2 * ball.eps, ball.bounds), NUM_STEPS)
                sentence = _not_worse(near, far)
                if sentence:
                    found["larger-eps-does-not-hurt"] = f"{one.against}: PGD with twice the eps, {sentence}"
        return found | self._grey(one)

    def _grey(self, one: Pass) -> dict[str, str]:
        """The grey image is within half the box of every image, so at most one class can be robust there."""
        if self.threat_model.bounds is None:
            return {}
        low, high = self.threat_model.bounds
        ball = ThreatModel("linf", (high - low) / 2, (low, high))
        attack = PGD(num_steps=NUM_STEPS, restarts=RESTARTS, objective=ExpectedLoss("margin"))
        attacked = float(self._attacked(one, attack, ball)[0].mean())
        grey = float(self._at(one, [torch.full_like(x, (low + high) / 2) for x, _ in self.batches])[0].mean())
        share = int(self.y.bincount().max()) / len(self.y)
        if max(attacked, grey) <= confidence_interval(share, len(self.y))[1]:
            return {}
        return {
            "survives-grey": f"{one.against}: {attacked:.1%} accuracy is left by PGD at linf eps {ball.eps:g} and "
            f"{grey:.1%} at constant grey, which lies in that ball around every image, so that at most {share:.1%}, "
            "the share of the largest class, can be robust"
        }

    def _last(self, one: Pass, ball: ThreatModel, steps: int) -> tuple[Tensor, Tensor]:
        attack = PGD(num_steps=steps, objective=ExpectedLoss("margin"), keep="last")
        return self._attacked(one, attack, ball)

    def _attacked(self, one: Pass, attack: PGD, ball: ThreatModel) -> tuple[Tensor, Tensor]:
        one = one._replace(attack=attack)
        return self._at(one, (one.points(x, y, ball, self.seed, i) for i, (x, y) in enumerate(self.batches)))

    def _at(self, one: Pass, points: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Expected accuracy and expected margin of the target at one point of each image: [N], [N]."""
        accuracy, margin = [], []
        for part, (_, labels) in zip(points, self.batches, strict=True):
            with torch.no_grad():
                logits = one.target.member_logits(part)
            accuracy.append(one.target.expectation(correct(logits, labels)))
            margin.append(ExpectedLoss("margin")(logits, labels, one.target.weights))
        return torch.cat(accuracy), torch.cat(margin)


def _not_worse(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> str:
    """Evidence that a stronger attack does not lower the accuracy and raises the loss on too few images; else ""."""
    unfinished = before[0] > 0
    count = int(unfinished.sum())
    if not count:
        return ""
    hurt = int(((after[0] < before[0]) | (after[1] > before[1]))[unfinished].sum())
    falls = paired_interval((before[0] - after[0]).cpu().numpy())[0] > 0
    if falls or confidence_interval(hurt / count, count)[1] >= SOUND_SHARE:
        return ""
    return (
        f"accuracy {float(after[0].mean()):.1%} after {float(before[0].mean()):.1%}, and the loss rises on no more "
        f"than {hurt} of {count} images not yet lost"
    )


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Largest change of a logit, relative to the range of the image's logits: [L, B, C], [L, B, C] -> [L]."""
    spread = (a.amax(-1) - a.amin(-1)).clamp_min(torch.finfo(a.dtype).tiny)
    return ((a - b).abs().amax(-1) / spread).nan_to_num(nan=0.0).amax(1)


def _training(mixture: Mixture, members: Tensor) -> str:
    layers = [
        f"{k}.{name}" if name else f"{k}"
        for k in _indices(members)
        for name, module in mixture.members[k].named_modules()
        if module.training
    ]
    return f" (still in train mode: {', '.join(layers[:3])})" if layers else ""


def _indices(mask: Tensor) -> list[int]:
    return [int(k) for k in mask.nonzero().flatten()]


def named(members: list[int]) -> str:
    """The members for a message: `member 1`, `members 0, 2`."""
    return f"member{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"
