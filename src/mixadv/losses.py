"""Losses per example: larger is worse for the classifier and better for the attacker.

Logits are `[..., B, C]`, usually `[members, batch, classes]`; labels `y` are `[B]` and shared by the members.
Results are `[..., B]`. Logits in half precision are converted to float32 first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mixadv.correctness import check_classes, correct


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in half precision as float32, others unchanged."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _labels(logits: Tensor, y: Tensor) -> Tensor:
    """Labels [B] -> [..., B, 1], for `gather` along the classes.

    ValueError for other shapes and, on the CPU, for labels that are no classes; reading them from a GPU would make the
    training wait.
    """
    if logits.ndim < 2 or y.shape != logits.shape[-2:-1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(y.shape)} differ: expected [..., B, C] and [B]"
        )
    if y.device.type == "cpu":
        check_classes(y, logits.shape[-1])
    return y.expand(logits.shape[:-1]).unsqueeze(-1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    log_p = at_least_float32(logits).log_softmax(-1)
    return -log_p.gather(-1, _labels(logits, y)).squeeze(-1)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c), with p and q the softmax of the logits; natural logarithm."""
    log_p = at_least_float32(p_logits).log_softmax(-1)
    log_q = at_least_float32(q_logits).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: positive exactly where the classifier errs."""
    z = at_least_float32(logits)
    index = _labels(z, y)
    if z.shape[-1] < 2:
        raise ValueError("the margin needs at least 2 classes")
    return z.scatter(-1, index, float("-inf")).amax(-1) - z.gather(-1, index).squeeze(-1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio: (max_{j != y} z_j - z_y) / (z_(1) - z_(3) + 1e-12), z_(i) the i-th largest.

    Invariant to shifting and scaling the logits (Croce & Hein, ICML 2020, equation 6). ValueError with fewer than 3
    classes.
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"DLR needs at least 3 classes, got {logits.shape[-1]}: use the margin instead")
    top = at_least_float32(logits).topk(3, dim=-1).values
    return margin(logits, y) / (top[..., 0] - top[..., 2] + 1e-12)


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y for the classes t of `target` [B]: positive only where t beats y."""
    z = at_least_float32(logits)
    return (z.gather(-1, _labels(z, target)) - z.gather(-1, _labels(z, y))).squeeze(-1)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted DLR: (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12), t the classes of `target` [B].

    Invariant to shifting and scaling the logits (Croce & Hein, ICML 2020, section 4). ValueError with fewer than 4
    classes.
    """
    if logits.shape[-1] < 4:
        raise ValueError(
            f"targeted DLR needs at least 4 classes, got {logits.shape[-1]}: use the targeted margin instead"
        )
    top = at_least_float32(logits).topk(4, dim=-1).values
    return margin_targeted(logits, y, target) / (top[..., 0] - (top[..., 2] + top[..., 3]) / 2 + 1e-12)


def zero_one(logits: Tensor, y: Tensor) -> Tensor:
    """1 where the answer is wrong, else 0, in float32; see `mixadv.correctness.correct`."""
    return 1 - correct(logits, _labels(logits, y).squeeze(-1)).float()


ATTACK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
}

TARGETED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "margin": margin_targeted,
    "dlr": dlr_targeted,
}


class RobustLoss(ABC):
    """A pair of losses for adversarial training: the attacker maximises `inner`, the member minimises `outer`.

    Both take logits at the attacked input, logits at the clean input (None unless `needs_clean`) and labels,
    and return one number per example.

    needs_clean: whether the caller must compute the clean logits.
    start: where the inner attack begins, "uniform" in the ball or "gaussian" (a little noise around x).
    """

    needs_clean: ClassVar[bool]
    start: ClassVar[str]

    @abstractmethod
    def inner(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """The loss that the attacker maximises, [..., B]. Clean logits are constants here: pass them detached."""

    @abstractmethod
    def outer(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """The loss that the member minimises, [..., B]. Clean logits carry their gradient."""

    def at(self, share_done: float) -> RobustLoss:
        """The loss when this share of the training is done, 0 to 1; itself unless a loss changes on the way."""
        return self


@dataclass(frozen=True)
class AT(RobustLoss):
    """Adversarial training (Madry et al., ICLR 2018): both losses are the cross-entropy at the attacked input."""

    needs_clean: ClassVar[bool] = False
    start: ClassVar[str] = "uniform"

    def inner(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        return cross_entropy(adv_logits, y)

    def outer(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        return cross_entropy(adv_logits, y)


@dataclass(frozen=True)
class TRADES(RobustLoss):
    """TRADES (Zhang et al., ICML 2019, equation 5).

    inner: KL(p(x) || p(x')). outer: CE(f(x), y) + beta KL(p(x) || p(x')), with the gradient through both arguments of
    the divergence. At x' = x the inner loss is 0 and its gradient is rounding noise, so the attack starts from
    Gaussian noise around x. ValueError for a negative beta, or if clean logits are missing.
    """

    beta: float = 6.0

    needs_clean: ClassVar[bool] = True
    start: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta is {self.beta}: it must be finite and at least 0")

    def inner(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        return kl_divergence(_required(clean_logits), adv_logits)

    def outer(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        clean = _required(clean_logits)
        return cross_entropy(clean, y) + self.beta * kl_divergence(clean, adv_logits)


@dataclass(frozen=True)
class ZeroOne(RobustLoss):
    """The reported loss: `outer` is 1 if the member errs at the attacked input, else 0.

    The attacker maximises the cross-entropy instead. `outer` has no gradient, so no member can be trained on it.
    """

    needs_clean: ClassVar[bool] = False
    start: ClassVar[str] = "uniform"

    def inner(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        return cross_entropy(adv_logits, y)

    def outer(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        return zero_one(adv_logits, y)


@dataclass(frozen=True)
class SmoothedZeroOne(RobustLoss):
    """A smoothed 0/1 loss: outer = scale (1 - sigmoid(-m / T)), with the margin m = max_{j != y} z_j - z_y.

    For T -> 0 it becomes scale times the 0/1 loss, the payoff of the game. Other than the cross-entropy it gives up
    examples that are far on the wrong side, where its gradient vanishes. So T falls geometrically over the training,
    T(s) = temperature (final_temperature / temperature)^s when a share s is done; see `at`. The attacker climbs the
    cross-entropy, which has a gradient everywhere.

    temperature: T, in units of the logits.
    final_temperature: T at the end of a training.
    scale: the slope in m at the boundary is scale / (4 T); with the defaults it is 1/2 at the start, that of the
        cross-entropy of two classes.

    Raises ValueError for arguments that are not positive and finite.
    """

    temperature: float = 2.0
    final_temperature: float = 0.5
    scale: float = 4.0

    needs_clean: ClassVar[bool] = False
    start: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        for name in ("temperature", "final_temperature", "scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive and finite")

    def at(self, share_done: float) -> SmoothedZeroOne:
        """The loss with the temperature T(share_done)."""
        share = min(1.0, max(0.0, share_done))
        now = self.temperature * (self.final_temperature / self.temperature) ** share
        return replace(self, temperature=now)

    def inner(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        return cross_entropy(adv_logits, y)

    def outer(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(margin(adv_logits, y) / self.temperature)


def _required(clean_logits: Tensor | None) -> Tensor:
    if clean_logits is None:
        raise ValueError("TRADES needs the logits at the clean input: pass the clean logits")
    return clean_logits
