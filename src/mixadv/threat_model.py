"""The threat model: a norm ball around each input, cut with the box of valid inputs.

S_eps(x) = {x' : ||x' - x||_p <= eps} intersected with [low, high]^d, for p in {inf, 2}. Every operation works
on a batch, example by example: `x` is `[B, ...]`, and d is the number of entries of one example.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixadv.ball_in_box import into_the_box

NORMS = ("linf", "l2")


@dataclass(frozen=True, eq=False)
class ThreatModel:
    """The ball and the box.

    norm: "linf" or "l2".
    eps: radius in the units of the input (8/255 for eight grey levels of an image in [0, 1]); 0 allows x only. A list,
        an array or a tensor [B] gives each example of a batch its own radius; it is kept as a float64 tensor. `rows`
        selects the radii of some examples.
    bounds: (low, high), the box that every input and every perturbed input lies in; None for no box.

    The inputs must lie in the box: then clamping a point of the ball to the box moves every coordinate towards x, so
    the point stays in the ball.

    Raises ValueError for an unknown norm, for eps negative or not finite, for an empty box; in operations, for another
    number of examples than of radii.
    """

    norm: str
    # A float or a tensor [B]; not declared as either, because nearly every user has the float.
    eps: Any
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}: choose one of {', '.join(NORMS)}")
        eps = torch.as_tensor(self.eps, dtype=torch.float64).detach()
        if eps.ndim > 1:
            raise ValueError(f"eps has shape {tuple(eps.shape)}: give one number, or one for each example")
        wrong = ~(eps.isfinite() & (eps >= 0))
        if bool(wrong.any()):
            raise ValueError(f"eps is {eps[wrong][0].item()}: it must be finite and at least 0")
        object.__setattr__(self, "eps", eps.item() if eps.ndim == 0 else eps)
        if self.bounds is not None:
            bounds = tuple(float(b) for b in self.bounds)
            if len(bounds) != 2 or not bounds[0] < bounds[1]:
                raise ValueError(f"bounds are {bounds}: give (low, high) with low < high, or None for no box")
            object.__setattr__(self, "bounds", bounds)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, ThreatModel) or (self.norm, self.bounds) != (other.norm, other.bounds):
            return False
        return torch.as_tensor(self.eps).tolist() == torch.as_tensor(other.eps).tolist()

    def __hash__(self) -> int:
        return hash((self.norm, self.bounds, str(torch.as_tensor(self.eps).tolist())))

    def rows(self, rows: Tensor | slice) -> ThreatModel:
        """The threat model of the examples `rows` of a batch: the same unless each example has its own radius."""
        if isinstance(self.eps, float):
            return self
        return replace(self, eps=self.eps[rows.to(self.eps.device) if isinstance(rows, Tensor) else rows])

    def by_radius(self, x: Tensor) -> Iterator[tuple[Tensor, ThreatModel]]:
        """The examples of x `[B, ...]` that have the same radius [R] long, and their threat model; its eps is a number.

        Raises:
            ValueError: x has another number of examples than there are radii.
        """
        radii = torch.as_tensor(self._radius(x), device=x.device).flatten().expand(len(x))
        for radius in radii.unique().tolist():
            yield (radii == radius).nonzero().flatten(), replace(self, eps=radius)

    def _radius(self, like: Tensor) -> Any:
        """eps, to broadcast over the entries of each example."""
        if isinstance(self.eps, float):
            return self.eps
        if len(self.eps) != len(like):
            raise ValueError(f"eps has {len(self.eps)} radii for a batch of {len(like)} examples")
        return per_example(self.eps.to(like.device), like).to(like.dtype)

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
        eps = self._radius(x)
        if self.norm == "linf":
            nearest = torch.clamp(x_adv, x - eps, x + eps)
            return nearest if self.bounds is None else nearest.clamp_(*self.bounds)
        delta = x_adv - x
        norm = per_example(self._norm(delta), x)
        # The norm of a point on the sphere is rounded; the slack keeps such a point unchanged.
        inside = norm <= eps * (1 + 1e-6)
        scale = eps / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return self._clamp(torch.where(inside, x_adv, x + delta * scale))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random point of S_eps(x) for each example, uniform on the ball cut with the box.

        linf: exact, because the set is a product of intervals. l2: a Gaussian direction and the radius eps u^(1/d) are
        exact where the point lies in the box. Where it does not, a Markov chain moves it in; its law is uniform up to
        an error of about 1 % at most, see `mixadv.ball_in_box`. In thousands of dimensions nearly every point of the
        ball leaves the box, and the chain makes nearly all samples.

        The numbers are drawn on the device of the generator, or of `x` if there is none.
        """
        if self.norm == "linf" or self.bounds is None:
            return self.random_start(x, generator)
        found = self._point_of_ball(x, generator)
        outside = (found != self._clamp(found)).flatten(1).any(1)
        rows = outside.nonzero().flatten()
        if len(rows):
            centre, start = x[rows].flatten(1), (found[rows] - x[rows]).flatten(1)
            radii = torch.as_tensor(self.eps).to(x).expand(len(x))[rows, None]
            least, most = self.bounds
            moved = centre + into_the_box(start, centre - least, most - centre, radii, generator)
            # Rounding may put a point on the other side of a face.
            found[rows] = self._clamp(moved).reshape(-1, *x.shape[1:])
        return found

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point of S_eps(x) for each example, for an attack to begin at.

        linf: as `sample`. l2: a uniform point of the ball whose entries are then cut to the box. Near a face of the
        box that is not uniform on the intersection, but an attack does not need that, and it costs next to nothing.
        """
        if self.norm == "l2":
            return self._clamp(self._point_of_ball(x, generator))
        eps = self._radius(x)
        low, high = self._clamp(x - eps), self._clamp(x + eps)
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=_device(x, generator)).to(x.device)
        return torch.minimum(low + u * (high - low), high)

    def _point_of_ball(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A uniform point of the l2 ball, without the box: a Gaussian direction, and the radius eps u^(1/d)."""
        device = _device(x, generator)
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        u = torch.rand(x.shape[:1], generator=generator, dtype=x.dtype, device=device).to(x.device)
        radius = self._radius(x) * per_example(u ** (1.0 / max(1, math.prod(x.shape[1:]))), x)
        norm = per_example(self._norm(direction), x).clamp_min(torch.finfo(x.dtype).tiny)
        return x + direction * (radius / norm)

    def ascent_step(self, x_adv: Tensor, grad: Tensor, step_size: float | Tensor) -> Tensor:
        """x_adv moved by `step_size` (in input units, one number or [B]) in the direction of steepest ascent.

        linf: sign(grad); l2: grad / ||grad||_2, computed so that no gradient under- or overflows. A zero gradient
        moves nothing; NaN entries count as zero. The result is not projected.
        """
        _same_shape(grad, x_adv)
        step = per_example(step_size.to(x_adv), x_adv) if isinstance(step_size, Tensor) else step_size
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
        eps = self.eps if isinstance(self.eps, float) else self._radius(points).flatten()
        allowed = eps * (1 + 1e-5) + 1e-6 + unit * centres.abs().amax(1)
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
