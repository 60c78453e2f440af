"""The threat model: a norm ball around each input, cut with the box of valid inputs.

S_eps(x) = {x' : ||x' - x||_p <= eps} intersected with [low, high]^d, for p in {inf, 2}. Every operation works
on a batch, example by example: `x` is `[B, ...]`, and d is the number of entries of one example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class ThreatModel:
    """The ball and the box.

    norm: "linf" or "l2".
    eps: radius in the units of the input (8/255 for eight grey levels of an image in [0, 1]); 0 allows x only.
    bounds: (low, high), the box that every input and every perturbed input lies in; None for no box.

    The inputs must lie in the box: then clamping a point of the ball to the box moves every coordinate towards x, so
    the point stays in the ball.

    Raises ValueError for an unknown norm, for eps negative or not finite, for an empty box.
    """

    norm: str
    eps: float
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: choose one of {', '.join(NORMS)}")
        eps = float(self.eps)
        if not math.isfinite(eps) or eps < 0:
            raise ValueError(f"eps is {self.eps}: it must be finite and at least 0")
        object.__setattr__(self, "eps", eps)
        if self.bounds is not None:
            bounds = tuple(float(b) for b in self.bounds)
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise ValueError(f"bounds are {bounds}: give (low, high) with low < high, or None for no box")
            object.__setattr__(self, "bounds", bounds)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """||a - b|| per example, [B]."""
        _same_shape(a, b)
        return self._norm(a - b)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A point of S_eps(x) for each example.

        linf: the Euclidean projection onto ball and box. l2: the projection onto the ball, then onto the box:
        a feasible point, and the nearest one unless the box cuts the segment. Feasible points are not changed.
        """
        _same_shape(x_adv, x)
        if self.norm == "linf":
            nearest = torch.clamp(x_adv, x - self.eps, x + self.eps)
            return nearest if self.bounds is None else nearest.clamp_(*self.bounds)
        delta = x_adv - x
        norm = per_example(self._norm(delta), x)
        # The norm of a point on the sphere is rounded; the slack keeps such a point unchanged.
        inside = norm <= self.eps * (1 + 1e-6)
        scale = self.eps / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return self._clamp(torch.where(inside, x_adv, x + delta * scale))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random point of S_eps(x) for each example.

        linf: exactly uniform on the ball cut with the box (the set is a product of intervals). l2: uniform on
        the ball (a Gaussian direction, radius eps u^(1/d)), then clamped to the box. If the box cuts the ball, points
        beyond the box move to its faces, and the distribution is no longer uniform.

        The numbers are drawn on the device of the generator, or of `x` if there is none.
        """
        if self.norm == "linf":
            low, high = self._clamp(x - self.eps), self._clamp(x + self.eps)
            u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=_device(x, generator)).to(x.device)
            return torch.minimum(low + u * (high - low), high)
        device = _device(x, generator)
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        u = torch.rand(x.shape[:1], generator=generator, dtype=x.dtype, device=device).to(x.device)
        radius = self.eps * u ** (1.0 / max(1, math.prod(x.shape[1:])))
        norm = per_example(self._norm(direction), x).clamp_min(torch.finfo(x.dtype).tiny)
        return self._clamp(x + direction * (per_example(radius, x) / norm))

    def ascent_step(self, x_adv: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """x_adv moved by `step_size` (in input units, one number or [B]) in the direction of steepest ascent.

        linf: sign(grad); l2: grad / ||grad||_2, computed so that no gradient under- or overflows. A zero gradient
        moves nothing; NaN entries count as zero. The result is not projected.
        """
        _same_shape(grad, x_adv)
        step = per_example(step_size, x_adv) if isinstance(step_size, Tensor) else step_size
        grad = grad.nan_to_num(nan=0.0)
        if self.norm == "linf":
            # In place: on CPUs a further copy costs as much as the arithmetic.
            move = grad.sign_().mul_(step)
            return move.add_(x_adv) if move.dtype == x_adv.dtype else x_adv + move
        tiny = torch.finfo(grad.dtype).tiny
        largest = per_example(grad.abs().flatten(1).amax(1), grad)
        grad = grad / largest.clamp_min(tiny)
        return x_adv + step * (grad / per_example(self._norm(grad), grad).clamp_min(tiny))

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each x_adv is finite and lies in ball and box, [B] bool.

        Computed in float64 from the definition; it shares no code with the operations above. Tolerances: the norm may
        exceed eps by 1e-5 eps + 1e-6 + u max|x|, where u max|x| is the rounding error of adding eps to x (u is the
        rounding unit of float32, for float64 inputs of float64); the box may be exceeded by 1e-6.
        """
        if x_adv.shape != x.shape:
            raise ValueError(f"x_adv has shape {tuple(x_adv.shape)}, x has {tuple(x.shape)}")
        points, centres = x_adv.detach().double().flatten(1), x.detach().double().flatten(1)
        unit = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        difference = (points - centres).abs()
        size = difference.amax(1) if self.norm == "linf" else difference.square().sum(1).sqrt()
        allowed = self.eps * (1 + 1e-5) + 1e-6 + unit * centres.abs().amax(1)
        good = (size <= allowed) & points.isfinite().all(1)
        if self.bounds is not None:
            low, high = self.bounds
            good &= (points >= low - 1e-6).all(1) & (points <= high + 1e-6).all(1)
        return good

    def _norm(self, delta: Tensor) -> Tensor:
        flat = delta.flatten(1)
        return flat.abs().amax(1) if self.norm == "linf" else torch.linalg.vector_norm(flat, dim=1)

    def _clamp(self, x: Tensor) -> Tensor:
        return x if self.bounds is None else x.clamp(*self.bounds)


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}; give one point per example")
    if a.ndim < 2:
        raise ValueError(f"expected a batch [B, ...] of inputs, got shape {tuple(a.shape)}")


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to broadcast over the entries of each example; a single number stays as it is."""
    return values if values.ndim == 0 else values.reshape(-1, *[1] * (like.ndim - 1))


def _device(x: Tensor, generator: torch.Generator | None) -> torch.device:
    return x.device if generator is None else generator.device
