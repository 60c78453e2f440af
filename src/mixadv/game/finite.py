"""A game with finitely many perturbations, given by its losses: every quantity of it is exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from numpy.typing import ArrayLike
from torch import Generator, Tensor

from mixadv.game.protocol import BestResponse

# Number of losses that are converted to float64 at a time: 2 MiB fit into a CPU's cache, accelerators need more work.
_CHUNK_ENTRIES_CPU = 1 << 18
_CHUNK_ENTRIES_ACCELERATOR = 1 << 25
# Limit of multiply-adds for the exact diameters of `smoothness`: about a second.
_DIAMETER_BUDGET = 4e9


class FiniteGame:
    """N examples with m candidate perturbations each, against L members: losses A[i, j, k].

    The losses keep their dtype (bool and uint8 for 0/1 losses) and are held by reference. The methods convert them to
    float64 in chunks of examples, and accumulate in float64. Weights may be any finite vector of L numbers, because
    accelerated solvers also evaluate points outside the simplex.

    Args:
        losses: [N, m, L], real and, where allowed, finite: a tensor, an array of numpy or nested lists. A matrix [m, L]
            is a game with one example.
        mask: [N, m] bool (of a matrix also [m]), True where the perturbation is allowed (at least one per example);
            None allows all. Losses at masked entries are never read, and may be NaN.
        masses: [N], the probabilities of the examples; None means 1/N each.

    Attributes:
        num_examples, num_perturbations, num_members: N, m, L.
        max_loss: max |A[i, j, k]| over the allowed entries.
        exact: True, because a best response compares all perturbations.

    Raises:
        ValueError: a wrong shape or dtype, an empty dimension, a loss that is NaN or infinite, an example without an
            allowed perturbation, masses that are negative, not finite, or do not sum to 1.
    """

    exact = True

    def __init__(self, losses: ArrayLike, mask: ArrayLike | None = None, masses: ArrayLike | None = None) -> None:
        self.losses = _checked_losses(torch.as_tensor(losses).detach())
        self.num_examples, self.num_perturbations, self.num_members = self.losses.shape
        self.mask = None if mask is None else _checked_mask(torch.as_tensor(mask), self.losses)
        self.masses = _checked_masses(None if masses is None else torch.as_tensor(masses), self.losses)
        self.max_loss = 0.0
        for rows, chunk, _ in self._chunks():
            self.max_loss = max(self.max_loss, _largest_loss(chunk, rows.start))

    def pool(
        self, lam: Tensor, num_samples: int, include_attack_points: bool, generator: Generator | None = None
    ) -> FiniteGame:
        """The game itself, because it holds all its perturbations."""
        return self

    def known(self) -> FiniteGame:
        """The game itself."""
        return self

    def best_response(self, lam: Tensor) -> BestResponse:
        """For each example the first allowed perturbation with the largest sum_k lam_k A[i, j, k]."""
        lam = self._vector(lam)
        gradient = torch.zeros_like(lam)
        value = torch.zeros((), dtype=torch.float64, device=lam.device)
        # Filled in place, because a list of parts fragments the heap at 1e8 entries.
        choice = torch.empty(self.num_examples, dtype=torch.long, device=lam.device)
        for rows, losses, mask in self._chunks():
            scores = _forbid(losses @ lam, mask)
            chosen = scores.argmax(1)
            picked = torch.arange(len(chosen), device=lam.device)
            gradient += self.masses[rows] @ losses[picked, chosen]
            value += self.masses[rows] @ scores[picked, chosen]
            choice[rows] = chosen
        return BestResponse(gradient, value.item(), self.max_loss, choice)

    def value(self, lam: Tensor) -> float:
        """R(lam) = sum_i mass_i max_j sum_k lam_k A[i, j, k]."""
        return self.best_response(lam).value

    def deterministic_values(self) -> Tensor:
        """[L], the risk of each member alone, sum_i mass_i max_j A[i, j, k]. The least of them is V_det >= V."""
        values = torch.zeros(self.num_members, dtype=torch.float64, device=self.losses.device)
        for rows, losses, mask in self._chunks():
            allowed = None if mask is None else mask[..., None]
            values += self.masses[rows] @ _forbid(losses, allowed).amax(1)
        return values

    def response_value(self, attack: Tensor) -> float:
        """min_k sum_ij Q[i, j] A[i, j, k], the least risk against the attacker's strategy Q: <= V for every Q.

        Args:
            attack: [N, m], Q >= 0 with sum_j Q[i, j] = mass_i, zero on masked perturbations.

        Raises:
            ValueError: Q is no such strategy; the message names the example.
        """
        attack = _checked_attack(torch.as_tensor(attack), self.masses, self.mask, self.losses)
        values = torch.zeros(self.num_members, dtype=torch.float64, device=self.losses.device)
        for rows, losses, _ in self._chunks():
            values += attack[rows].to(torch.float64).reshape(-1) @ losses.reshape(-1, self.num_members)
        return values.min().item()

    def smoothed_value(self, lam: Tensor, alpha: float | Tensor) -> float:
        """F(lam) = sum_i mass_i alpha_i log( (1/m_i) sum_j exp( A[i, j, :]·lam / alpha_i ) ).

        The risk against an attacker who pays alpha_i KL(Q_i || uniform over the m_i allowed perturbations):
        0 <= R - F <= sum_i mass_i alpha_i log m_i. Convex in lam. Finite for every alpha > 0 and scale of losses.

        Args:
            lam: [L].
            alpha: the temperature, in units of the losses: one positive number, or [N].
        """
        return self.smoothed(self._vector(lam)[None], alpha)[1].item()

    def smoothed_gradient(self, lam: Tensor, alpha: float | Tensor) -> Tensor:
        """[L], the gradient of `smoothed_value`: sum_ij mass_i p_ij A[i, j, :].

        p_ij is the softmax over j of A[i, j, :]·lam / alpha_i.
        """
        return self.smoothed(self._vector(lam)[None], alpha)[2][0]

    def smoothed_response(self, lam: Tensor, alpha: float | Tensor) -> Tensor:
        """[N, m] float64, the attacker's strategy behind `smoothed_gradient`: Q[i, j] = mass_i p_ij."""
        lam, alpha = self._vector(lam), self._temperatures(alpha)
        attack = torch.empty(self.num_examples, self.num_perturbations, dtype=torch.float64, device=lam.device)
        for rows, losses, mask in self._chunks():
            scores = _forbid(losses @ lam, mask)
            scores = (scores - scores.amax(1, keepdim=True)) / alpha[rows, None]
            attack[rows] = self.masses[rows, None] * scores.softmax(1)
        return attack

    def smoothed(self, lams: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """R, F and the gradient of F at several weights, with one pass over the losses.

        Args:
            lams: [R, L].
            alpha: as in `smoothed_value`.

        Returns:
            R(lam) [R], F(lam) [R], gradient of F [R, L].
        """
        alpha = self._temperatures(alpha)
        lams = lams.to(self.losses.device, torch.float64)
        gradients = torch.zeros_like(lams)
        values, smooth = torch.zeros_like(lams[:, 0]), torch.zeros_like(lams[:, 0])
        for rows, losses, mask in self._chunks():
            flat = losses.reshape(-1, self.num_members)
            scores = _forbid((lams @ flat.T).reshape(len(lams), *losses.shape[:2]), mask)
            count = self.num_perturbations if mask is None else mask.sum(1)
            peak = scores.amax(2, keepdim=True)
            # exp(z) - 1 instead of exp(z): at large alpha the logarithm of the mean is far below the rounding of 1.
            shrunk = torch.expm1((scores - peak) / alpha[rows, None])
            expo = shrunk + 1.0
            total = expo.sum(2)
            if mask is not None:
                shrunk = shrunk.masked_fill(~mask, 0.0)
            mean = shrunk.sum(2) / count
            log_mean = torch.where(mean > -0.5, torch.log1p(mean), torch.log(total / count))
            values += peak[..., 0] @ self.masses[rows]
            smooth += (peak[..., 0] + alpha[rows] * log_mean) @ self.masses[rows]
            expo *= (self.masses[rows] / total)[..., None]
            gradients += expo.reshape(len(lams), -1) @ flat
        return values, smooth, gradients

    def smoothness(self, alpha: float | Tensor) -> float:
        """A Lipschitz constant of the gradient of F along the simplex (differences of weights sum to 0).

        The Hessian is sum_i mass_i Cov_{p_i}(a_ij) / alpha_i, where a_ij is A[i, j, :] minus its mean over members. For
        each example the covariance is at most max_j ||a_ij - c||^2 for every centre c (two are tried, the origin and
        the midrange), and at most max_jj' ||a_ij - a_ij'||^2 / 4. The constant sums the least of these bounds. The
        pairwise bound is left out if its N m^2 L multiply-adds exceed 4e9; it gains at most a factor of two over the
        best centre.
        """
        alpha = self._temperatures(alpha)
        n, m, members = self.losses.shape
        pairwise = float(n) * m * m * members <= _DIAMETER_BUDGET
        constant = 0.0
        for rows, losses, mask in self._chunks(entries_per_example=m * max(m, members) if pairwise else None):
            points = losses - losses.mean(2, keepdim=True)
            if mask is not None:
                # Masked points become copies of an allowed one, which changes neither radius nor diameter.
                stand_in = points[torch.arange(len(points), device=points.device), mask.int().argmax(1)]
                points = torch.where(mask[..., None], points, stand_in[:, None])
            around_origin = points.square().sum(2).amax(1)
            points = points - (points.amax(1, keepdim=True) + points.amin(1, keepdim=True)) / 2
            squares = points.square().sum(2)
            bound = torch.minimum(around_origin, squares.amax(1))
            if pairwise:
                distances = squares[:, :, None] + squares[:, None, :] - 2 * points @ points.mT
                bound = torch.minimum(bound, distances.amax((1, 2)).clamp(min=0) / 4)
            constant += (self.masses[rows] * bound / alpha[rows]).sum().item()
        return constant

    def _chunks(self, entries_per_example: int | None = None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """All examples in chunks: (rows, losses [n, m, L] in float64 with zeros where masked, mask [n, m] or None)."""
        limit = _CHUNK_ENTRIES_CPU if self.losses.device.type == "cpu" else _CHUNK_ENTRIES_ACCELERATOR
        length = max(1, limit // (entries_per_example or self.num_perturbations * self.num_members))
        for start in range(0, self.num_examples, length):
            rows = slice(start, min(start + length, self.num_examples))
            losses = self.losses[rows].to(torch.float64)
            mask = None
            if self.mask is not None:
                mask = self.mask[rows]
                losses = losses.masked_fill(~mask[..., None], 0.0)
            yield rows, losses, mask

    def _vector(self, lam: Tensor) -> Tensor:
        lam = torch.as_tensor(lam, dtype=torch.float64, device=self.losses.device).detach()
        if lam.shape != (self.num_members,):
            raise ValueError(f"weights must be [{self.num_members}], one per member, got shape {list(lam.shape)}")
        if not bool(torch.isfinite(lam).all()):
            raise ValueError(f"weights must be finite, got {lam.tolist()}")
        return lam

    def _temperatures(self, alpha: float | Tensor) -> Tensor:
        wide = torch.as_tensor(alpha, dtype=torch.float64, device=self.losses.device).detach()
        if wide.shape not in ((), (self.num_examples,)):
            raise ValueError(f"alpha must be one number or [{self.num_examples}], got shape {list(wide.shape)}")
        wide = wide.expand(self.num_examples)
        wrong = ~(torch.isfinite(wide) & (wide > 0))
        if bool(wrong.any()):
            raise ValueError(f"alpha must be positive and finite, got {wide[wrong][0].item()}")
        return wide


def _forbid(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _checked_losses(losses: Tensor) -> Tensor:
    """Losses as [N, m, L], of a matrix with N = 1; checks that they are real, without an empty dimension."""
    shape = list(losses.shape)
    if losses.ndim not in (2, 3):
        raise ValueError(
            f"losses must be [examples, perturbations, members], or [perturbations, members], got shape {shape}"
        )
    losses = losses if losses.ndim == 3 else losses[None]
    shape = list(losses.shape)
    for size, what in zip(shape, ("examples", "perturbations", "members"), strict=True):
        if size == 0:
            raise ValueError(f"losses of shape {shape} hold no {what}: each dimension needs one or more")
    if losses.is_complex():
        raise ValueError(f"losses must be real, got dtype {losses.dtype}")
    return losses


def _checked_mask(mask: Tensor, losses: Tensor) -> Tensor:
    """The mask on the device of the losses; checks that it is bool [N, m] and allows something for every example."""
    shape = losses.shape[:2]
    if len(losses) == 1 and mask.ndim == 1:
        mask = mask[None]
    if mask.shape != shape or mask.dtype != torch.bool:
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"mask must be torch.bool {list(shape)}, True where allowed, got {got}")
    mask = mask.to(losses.device)
    if empty := _first(~mask.any(1)):
        raise ValueError(f"example {empty[0]} is fully masked: allow a perturbation, such as none at all")
    return mask


def _checked_masses(masses: Tensor | None, losses: Tensor) -> Tensor:
    """Probabilities [N] in float64 on the device of the losses, divided by their sum; 1/N by default."""
    n, device = len(losses), losses.device
    if masses is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64, device=device)
    if masses.shape != (n,):
        raise ValueError(f"masses must be [{n}], one per example, got shape {list(masses.shape)}")
    masses = masses.detach().to(device, torch.float64)
    if bad := _first(~(torch.isfinite(masses) & (masses >= 0))):
        raise ValueError(f"masses must be finite and >= 0, but masses{bad} is {masses[bad[0]].item()}")
    total = masses.sum()
    if abs(total.item() - 1.0) > 1e-6:
        raise ValueError(f"masses must sum to 1, got {total.item()}: divide them by their sum")
    return masses / total


def _largest_loss(losses: Tensor, first_example: int) -> float:
    """max |l| of a chunk [n, m, L] that begins at `first_example` and is zero where masked; checks that l is finite."""
    # NaN and infinity survive the maximum, so one number tells whether the whole chunk is finite.
    largest = losses.abs().amax().item()
    if not math.isfinite(largest):
        i, j, k = _first(~torch.isfinite(losses))
        name = f"losses[{first_example + i}, {j}, {k}]"
        raise ValueError(f"{name} is {losses[i, j, k].item()}: losses must be finite, or masked")
    return largest


def _checked_attack(attack: Tensor, masses: Tensor, mask: Tensor | None, losses: Tensor) -> Tensor:
    """Check that a strategy is [N, m] and >= 0, that its rows sum to the masses, and masked entries are zero."""
    shape = losses.shape[:2]
    if attack.shape != shape:
        raise ValueError(f"attack must be {list(shape)}, got shape {list(attack.shape)}")
    attack = attack.detach().to(losses.device)
    if bad := _first(~(torch.isfinite(attack) & (attack >= 0))):
        raise ValueError(f"attack must be finite and >= 0, but attack{bad} is {attack[tuple(bad)].item()}")
    if mask is not None and (bad := _first(~mask & (attack > 0))):
        raise ValueError(f"attack{bad} is {attack[tuple(bad)].item()}, but that perturbation is masked")
    sums = attack.sum(1, dtype=torch.float64)
    if bad := _first((sums - masses).abs() > 1e-5 * masses + 1e-12):
        total, mass = sums[bad[0]].item(), masses[bad[0]].item()
        raise ValueError(f"attack{bad} sums to {total}, but the example has mass {mass}: scale the rows to it")
    return attack


def _first(wrong: Tensor) -> list[int]:
    """The index of the first True; an empty list if there is none."""
    return wrong.nonzero()[0].tolist() if bool(wrong.any()) else []
