"""Uniform points of a Euclidean ball that is cut by a box."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Rounds of the Markov chain, in fewer than 1,024 dimensions and in more. After them its distribution functions of
# entries, sums and lengths are off by less than about 1 % (tests/test_threat_model.py).
ROUNDS, ROUNDS_OF_IMAGES = 64, 32


def into_the_box(
    delta: Tensor, below: Tensor, above: Tensor, radius: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Random points of {v : ||v||_2 <= r, -below <= v <= above}, uniform up to the error of a Markov chain.

    A uniform point of the ball in d dimensions is the first d entries of a uniform point of the sphere of radius r in
    d + 2 dimensions (Archimedes). So the chain walks on that sphere, with the box for the first d entries. A round
    forms random pairs of entries and turns each pair by a random angle, unless it would leave the box. Turning keeps
    the length, so the pairs do not interact, and the uniform law on the sphere within the box is the invariant law of
    every round (Kac's walk, with the acceptance of Metropolis). Entries that are outside the box at the start change
    their sign, which is exact where x lies on a face; if that does not help they are cut.

    Args:
        delta: [R, d], the start: uniform points of the ball.
        below, above: [R, d], >= 0, the distances of the ball's centre from the faces of the box.
        radius: [R, 1], r.
        generator: the source of all draws; they are made on its device, or on that of `delta` if it is None.

    Returns:
        [R, d].
    """
    device = delta.device if generator is None else generator.device
    rows, d = delta.shape

    def angles(count: int) -> Tensor:
        turns = torch.rand(rows, count, generator=generator, dtype=delta.dtype, device=device)
        return turns.to(delta.device) * (2 * math.pi)

    outside = (delta > above) | (delta < -below)
    delta = torch.where(outside, -delta, delta).clamp(-below, above)
    slack = (radius.square() - delta.square().sum(1, keepdim=True)).clamp_min(0).sqrt()
    angle = angles(1)
    free = torch.full_like(delta[:, :1], math.inf).expand(rows, 2)
    state = torch.stack(
        [
            torch.cat([delta, slack * angle.cos(), slack * angle.sin()], dim=1),
            torch.cat([-below, -free], dim=1),
            torch.cat([above, free], dim=1),
        ]
    )
    order = torch.randperm(d + 2, generator=generator, device=device).to(delta.device)
    half = (d + 2) // 2
    # Entry i of the first part meets entry i of the second, which rolls on by a random number of places.
    first, second = state[..., order[:half]], state[..., order[half:]]
    rounds = ROUNDS if d < 1024 else ROUNDS_OF_IMAGES
    places = torch.randint(second.shape[-1], (rounds,), generator=generator, device=device).tolist()
    for place in places:
        second = second.roll(place, dims=-1)
        (a, low_a, high_a), (b, low_b, high_b) = first, second[..., :half]
        angle = angles(half)
        cos, sin = angle.cos(), angle.sin()
        new_a, new_b = cos * a - sin * b, sin * a + cos * b
        inside = (new_a >= low_a) & (new_a <= high_a) & (new_b >= low_b) & (new_b <= high_b)
        first[0] = torch.where(inside, new_a, a)
        second[0, :, :half] = torch.where(inside, new_b, b)
    second = second.roll(-sum(places), dims=-1)
    found = torch.empty_like(state[0])
    found[:, order] = torch.cat([first[0], second[0]], dim=1)
    return found[:, :d]
