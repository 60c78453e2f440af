"""Square Attack: a random search that needs the outputs of the mixture and no gradients."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixadv.attacks.objectives import ExpectedLoss, Objective
from mixadv.attacks.search import Climb, SearchAttack, WorstPoints
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel

# The queries, of 10,000, after which the windows' area is halved (section 4.1 of the paper).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square(SearchAttack):
    """Square Attack (Andriushchenko, Croce, Flammarion & Hein, ECCV 2020) on a mixture, without gradients.

    A random search that maximises an objective, by default the exact expected margin
    sum_k lambda_k (max_{j != y} z_kj - z_ky). Each query changes the perturbation inside a random square window and is
    accepted if the objective rises. The windows cover a share p of the pixels, which starts at p_init and is halved
    after the queries 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 of 10,000, rescaled to num_queries. Returns the
    worst points of all queries, see `SearchAttack`.

    linf (algorithm 2 of the paper): starts at x + eps s, s a random sign for each channel and column; a query sets
        the perturbation in the window to +eps or -eps, one sign per channel. A query that would change nothing takes
        the opposite signs.
    l2 (algorithm 3): starts with bumps on a grid, scaled to norm eps; a query takes the norm of two windows, and the
        norm that the box left unused, and spends it in the first window, on the old direction plus a new bump.

    num_queries: queries of each restart, the start included. A query is one forward pass of every member; the pass at
        x, before all restarts, is not counted.
    p_init: share of the pixels in the first windows; 0.8 is AutoAttack's choice.
    restarts: independent searches, each with the whole schedule of p.
    objective: what the attack maximises, see `mixadv.attacks.objectives`.

    x is [B, C, H, W], or [B, H, W] with one channel, or [B, d], which is one row of d pixels with intervals for
    windows. In images that are not square, windows wider than the shorter side become rectangles. The windows are
    drawn for each example separately.

    Members need not be differentiable. Raises ValueError for num_queries or restarts below 1, p_init outside (0, 1], x
    of another shape.
    """

    num_queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    objective: Objective = field(default_factory=lambda: ExpectedLoss("margin"))

    def __post_init__(self) -> None:
        self.require({"num_queries": 1, "restarts": 1})
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init is {self.p_init}: it is a share of the pixels, above 0 and at most 1")

    def search(
        self, mixture: Mixture, x: Tensor, y: Tensor, threat_model: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        if x.ndim > 4:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected [B, C, H, W], [B, H, W] or [B, d]")
        climb = Climb.begin(mixture, self.objective, x, y)
        dice = _Dice(generator, x.device)
        for _ in range(self.restarts):
            self._walk(climb, threat_model, dice)
        return climb.worst.x

    def _walk(self, climb: Climb, threat_model: ThreatModel, dice: _Dice) -> None:
        """One restart; its points are offered to `climb.worst`."""
        x = climb.x
        images = x.reshape(len(x), *[1] * (4 - x.ndim), *x.shape[1:])
        moves: _Linf | _L2 = (_Linf if threat_model.norm == "linf" else _L2)(threat_model, dice)
        # A walk that put the accuracy first would never give up one fooled member to fool two others.
        walk = WorstPoints(climb.mixture, x, climb.y, by_accuracy=False)
        for query in range(self.num_queries):
            rows = climb.worst.unfinished()
            if not len(rows):
                return
            if query == 0:
                points = moves.start(images[rows])
            else:
                height, width = _window(self._share(query), images.shape[-2:], moves.least)
                points = moves.propose(walk.x[rows].reshape(images[rows].shape), images[rows], height, width)
            points = points.reshape(x[rows].shape)
            walk.offer(points, *climb.score(points, rows), rows)

    def _share(self, query: int) -> float:
        """The share p of query number `query`."""
        return self.p_init / 2 ** bisect_left(HALVINGS, int(10_000 * query / self.num_queries))


class _Dice:
    """Random numbers, drawn on the device of the generator."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def integers(self, high: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform on {0, ..., high - 1}."""
        drawn_on = self.device if self.generator is None else self.generator.device
        return torch.randint(high, shape, generator=self.generator, device=drawn_on).to(self.device)

    def signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """-1 or +1 in the dtype of `like`."""
        return (2 * self.integers(2, shape) - 1).to(like)


class _Linf:
    """Algorithm 2: windows of +eps or -eps."""

    least = 1

    def __init__(self, threat_model: ThreatModel, dice: _Dice) -> None:
        self.threat_model, self.dice = threat_model, dice

    def start(self, x: Tensor) -> Tensor:
        stripes = self.dice.signs((*x.shape[:2], 1, x.shape[3]), x)
        return self.threat_model.project(x + self.threat_model.eps * stripes, x)

    def propose(self, current: Tensor, x: Tensor, height: int, width: int) -> Tensor:
        window = _place(x, height, width, self.dice)[0]
        signs = self.dice.signs((*x.shape[:2], 1, 1), x)
        low, high = (self.threat_model.project(x + sign * self.threat_model.eps, x) for sign in (-1, 1))
        proposal = torch.where(window, torch.where(signs > 0, high, low), current)
        # Small windows often draw the values that they have: one pixel of a grey image every other time.
        idle = (proposal == current).flatten(1).all(1).reshape(-1, 1, 1, 1)
        return torch.where(idle & window, torch.where(signs > 0, low, high), proposal)


class _L2:
    """Algorithm 3: norm moves from one window to another."""

    least = 3

    def __init__(self, threat_model: ThreatModel, dice: _Dice) -> None:
        self.threat_model, self.dice = threat_model, dice

    def start(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tile_height, tile_width = max(1, height // 5), max(1, width // 5)
        down, across = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        rows, columns = (down // tile_height)[:, None], (across // tile_width)[None]
        tiles = (-(-height // tile_height), -(-width // tile_width))
        bumps = _bumps(tile_height, tile_width, x)[:, (down % tile_height)[:, None], (across % tile_width)[None]]
        turned = self.dice.integers(2, (batch, 1, *tiles))[..., rows, columns] > 0
        signs = self.dice.signs((batch, channels, *tiles), x)[..., rows, columns]
        delta = _unit(signs * torch.where(turned, bumps[1], bumps[0]), (1, 2, 3))
        return self.threat_model.project(x + self.threat_model.eps * delta, x)

    def propose(self, current: Tensor, x: Tensor, height: int, width: int) -> Tensor:
        batch, channels = x.shape[:2]
        to, rows, columns = _place(x, height, width, self.dice)
        source = _place(x, height, width, self.dice)[0]
        turned = self.dice.integers(2, (batch, 1, 1))
        bump = _bumps(height, width, x)[turned, rows, columns].unsqueeze(1)
        signs = self.dice.signs((batch, channels, 1, 1), x)

        delta = current - x
        unused = (self.threat_model.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
        available = (unused / channels + (delta * (to | source)).square().sum((2, 3), keepdim=True)).sqrt()
        direction = _unit((signs * bump + _unit(delta * to, (2, 3))) * to, (2, 3))
        moved = torch.where(to, available * direction, torch.where(source, torch.zeros_like(delta), delta))
        return self.threat_model.project(x + moved, x)


def _window(share: float, size: torch.Size, least: int) -> tuple[int, int]:
    """Height and width of a window of about `share` of an image's pixels: a square if it fits into the image."""
    height, width = size
    area = share * height * width
    side = max(least, round(math.sqrt(area)))
    # Bumps are symmetric around a middle pixel, so their side is odd.
    side += least > 1 and side % 2 == 0
    if side > height:
        return height, min(width, max(side, round(area / height)))
    if side > width:
        return min(height, max(side, round(area / width))), width
    return side, side


def _place(x: Tensor, height: int, width: int, dice: _Dice) -> tuple[Tensor, Tensor, Tensor]:
    """One window at a uniformly random place in each image.

    Returns:
        [B, 1, H, W] bool, the window; [B, H, 1] and [B, 1, W], each pixel's row and column in the window (for a pixel
        outside, those of the nearest pixel inside).
    """
    inside, offsets = [], []
    for pixels, length in ((x.shape[2], height), (x.shape[3], width)):
        corner = dice.integers(pixels - length + 1, (len(x), 1))
        offset = torch.arange(pixels, device=x.device) - corner
        inside.append((offset >= 0) & (offset < length))
        offsets.append(offset.clamp(0, length - 1))
    window = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return window, offsets[0][:, :, None], offsets[1][:, None, :]


def _bumps(height: int, width: int, like: Tensor) -> Tensor:
    """Two patterns of norm 1, [2, height, width]: two halves of opposite sign, one above the other and side by side.

    Each half is a pyramid of concentric squares around its middle: sum_{i=r}^{R} 1 / (i + 1)^2 at the Chebyshev
    distance r, R the largest half side (the paper's eta).
    """

    def half(rows: int, columns: int) -> Tensor:
        reach = max(rows, columns) // 2
        # On the CPU, because cumsum has no deterministic kernel on GPUs.
        steps = 1.0 / torch.arange(1, reach + 2, dtype=like.dtype).square()
        profile = steps.flip(0).cumsum(0).flip(0).to(like.device)
        down = (torch.arange(rows, device=like.device) - rows // 2).abs()
        across = (torch.arange(columns, device=like.device) - columns // 2).abs()
        return profile[torch.maximum(down[:, None], across[None])]

    above = torch.cat([half(height // 2, width), -half(height - height // 2, width)], dim=0)
    beside = torch.cat([half(height, width // 2), -half(height, width - width // 2)], dim=1)
    return _unit(torch.stack([above, beside]), (1, 2))


def _unit(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    """`values` scaled to norm 1 over `dim`; zero stays zero."""
    norm = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return values / norm.clamp_min(torch.finfo(values.dtype).tiny)
