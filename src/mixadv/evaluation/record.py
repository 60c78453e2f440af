"""Exact, per-example measurement of a mixture under attacks."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixadv.attacks.search import Attack
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

NORMAL_QUANTILE_975 = 1.959963984540054


def confidence_interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for the mean of `count` values in [0, 1].

    Exact binomial variance is the largest that values in [0, 1] with this mean can have, so for the fractional
    accuracies of a mixture the interval is conservative; unlike the normal one it does not collapse at 0 and 1.
    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    if count < 1:
        raise ValueError("an interval needs at least one example")
    z2 = NORMAL_QUANTILE_975**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_QUANTILE_975 * sqrt(mean * (1 - mean) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # At 0 and 1 the two terms cancel exactly in real numbers, not in floating point.
    low = 0.0 if mean == 0 else max(0.0, centre - half)
    high = 1.0 if mean == 1 else min(1.0, centre + half)
    return low, high


@dataclass
class EvaluationRecord:
    """What was found, per example, so that every number can be computed again.

    Attributes:
        labels: [N]. weights: lambda [L], float64.
        clean: per-member correctness [L, N] on the clean images.
        ensemble_clean: [N], correctness of the argmax of the averaged probabilities.
        attacked: attack name -> per-member correctness [L, N] at the points found against the mixture.
        ensemble_attacked: attack name -> [N], the averaged prediction at the same points.
        alone: attack name -> [L, L, N]: entry [j, k] is the correctness of member k at the points found against member
            j alone.
        seconds: attack name -> wall seconds against the mixture, over all examples.
    """

    weights: np.ndarray
    labels: np.ndarray
    clean: np.ndarray
    ensemble_clean: np.ndarray
    attacked: dict[str, np.ndarray] = field(default_factory=dict)
    ensemble_attacked: dict[str, np.ndarray] = field(default_factory=dict)
    alone: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def expected(self, correct: np.ndarray) -> np.ndarray:
        """sum_k lambda_k correct_k: [L, N] -> float64 [N]."""
        return self.weights @ correct.astype(np.float64)

    def _points(self) -> np.ndarray:
        """Correctness of every member at every point found by anyone, the clean image included: [P, L, N]."""
        found = [self.clean[None], *(correct[None] for correct in self.attacked.values()), *self.alone.values()]
        return np.concatenate(found).astype(bool)

    def worst_case(self) -> np.ndarray:
        """Per example, the lowest exact expected accuracy over all points found by anyone: [N].

        Points found against a single member are replayed on the mixture: an attack on the mixture misses some of
        them, and leaving them out would overstate it.
        """
        return np.min([self.expected(correct) for correct in self._points()], axis=0)

    def members_worst_case(self) -> np.ndarray:
        """Per example, whether each member survives all points found by anyone: [L, N] bool."""
        return np.all(self._points(), axis=0, keepdims=False)

    def arrays(self) -> dict[str, np.ndarray]:
        """The content of records.npz."""
        arrays = {
            "labels": self.labels,
            "weights": self.weights,
            "clean": self.expected(self.clean),
            "robust": self.worst_case(),
            "members_robust": self.members_worst_case().astype(np.uint8),
            "member_correct/clean": self.clean,
        }
        for name, correct in self.attacked.items():
            arrays[f"attack/{name}"] = self.expected(correct)
            arrays[f"member_correct/{name}"] = correct
        for name, correct in self.alone.items():
            arrays[f"member_correct/{name} on each member"] = correct
        return arrays

    def summary(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The measured part of results.json; `settings` maps attack names to what they were called with."""
        clean, robust = self.expected(self.clean), self.worst_case()
        count = len(self.labels)
        alone = self.members_worst_case()
        return {
            "L": len(self.weights),
            "weights": self.weights.tolist(),
            "num_examples": count,
            "clean": {
                "expected_accuracy": float(clean.mean()),
                "ensemble_accuracy": float(self.ensemble_clean.mean()),
                "ci95": confidence_interval(float(clean.mean()), count),
            },
            "attacks": {
                name: {
                    "expected_accuracy": float(self.expected(correct).mean()),
                    "ensemble_accuracy": float(self.ensemble_attacked[name].mean()),
                    "replayed_from_members": float(
                        np.min([self.expected(each) for each in self.alone[name]], axis=0).mean()
                    ),
                    "settings": settings[name],
                    "seconds": round(self.seconds[name], 3),
                }
                for name, correct in self.attacked.items()
            },
            "robust": {
                "expected_accuracy": float(robust.mean()),
                "ci95": confidence_interval(float(robust.mean()), count),
            },
            "members": [
                {
                    "clean": float(self.clean[k].mean()),
                    "robust": float(alone[k].mean()),
                    "ci95": confidence_interval(float(alone[k].mean()), count),
                    "weight": float(self.weights[k]),
                }
                for k in range(len(self.weights))
            ],
        }


def _correct(mixture: Mixture, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per-member and averaged correctness from one plain forward: uint8 [L, B], [B]."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), mixture.attack_mode():
        logits = mixture.member_logits(x)
        averaged = mixture.log_average(logits)
    members = logits.argmax(-1) == y
    ensemble = averaged.argmax(-1) == y
    return members.to(torch.uint8).cpu().numpy(), ensemble.to(torch.uint8).cpu().numpy()


def _checked_attack(
    attack: Attack,
    name: str,
    mixture: Mixture,
    x: Tensor,
    y: Tensor,
    tm: ThreatModel,
    generator: torch.Generator,
) -> Tensor:
    x_adv = attack(mixture, x, y, tm, generator)
    inside = tm.check(x_adv, x)
    if not bool(inside.all()):
        index = int((~inside).nonzero()[0])
        raise RuntimeError(f"attack {name} left the threat model at example {index} of a batch: this is a defect")
    return x_adv


def evaluate(
    mixture: Mixture,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Mapping[str, Attack],
    threat_model: ThreatModel,
    *,
    seed: int = 0,
    on_progress: Callable[[str, int], None] | None = None,
) -> EvaluationRecord:
    """Attack the mixture, and every member alone, on all batches; every point is replayed on everybody.

    Every point is checked against norm, box and NaN by code that the attacks do not share. Correctness comes
    from a plain forward pass in the parameters' own precision, members in evaluation mode. Each attack and
    batch draws from a generator seeded by `seed` and the batch's number, so attacks do not disturb one another.

    Args:
        mixture: on the device of the batches.
        batches: (x, y) pairs, x in [0, 1].
        attacks: name -> attack; names begin with their algorithm.
        threat_model: the ball.
        seed: of the attacks' random starts.
        on_progress: called with (attack name, examples done).

    Raises:
        ValueError: no batches. RuntimeError: an attack left the threat model (a defect, never corrected silently).
    """
    parts: dict[str, list[np.ndarray]] = {}
    seconds = dict.fromkeys(attacks, 0.0)
    singles = [Mixture([member]) for member in mixture.members]

    def keep(key: str, value: np.ndarray) -> None:
        parts.setdefault(key, []).append(value)

    for number, (x, y) in enumerate(batches):
        keep("labels", y.cpu().numpy())
        members, ensemble = _correct(mixture, x, y)
        keep("clean", members)
        keep("ensemble", ensemble)
        for name, attack in attacks.items():
            generator = torch.Generator(x.device).manual_seed(seed + number)
            started = time.perf_counter()
            x_adv = _checked_attack(attack, name, mixture, x, y, threat_model, generator)
            members, ensemble = _correct(mixture, x_adv, y)
            seconds[name] += time.perf_counter() - started
            keep(f"attacked/{name}", members)
            keep(f"ensemble/{name}", ensemble)
            if len(singles) == 1:
                keep(f"alone/{name}", members[None])
            else:
                alone = []
                for single in singles:
                    generator = torch.Generator(x.device).manual_seed(seed + number)
                    x_alone = _checked_attack(attack, name, single, x, y, threat_model, generator)
                    alone.append(_correct(mixture, x_alone, y)[0])
                keep(f"alone/{name}", np.stack(alone))
            if on_progress is not None:
                on_progress(name, len(y))
    if not parts:
        raise ValueError("nothing to evaluate: there are no batches")
    whole = {key: np.concatenate(values, axis=-1) for key, values in parts.items()}
    weights = mixture.weights.double().cpu().numpy()
    return EvaluationRecord(
        weights=weights / weights.sum(),
        labels=whole["labels"],
        clean=whole["clean"],
        ensemble_clean=whole["ensemble"],
        attacked={name: whole[f"attacked/{name}"] for name in attacks},
        ensemble_attacked={name: whole[f"ensemble/{name}"] for name in attacks},
        alone={name: whole[f"alone/{name}"] for name in attacks},
        seconds=seconds,
    )
