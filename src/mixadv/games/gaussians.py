"""Random linear classifiers on three Gaussians in the plane: when does a mixture beat its best member?

P(Y = -1) = P(Y = +1) = 1/2; X | Y = -1 ~ N((0, 0), I); X | Y = +1 ~ (N((-3, 0), I) + N((3, 0), I)) / 2. No line
separates the classes: one that cuts off the left half of class +1 leaves the right half to its mirror image. The
attacker moves each point within a Euclidean ball of radius eps, without a box. The lines cut a ball into cells on which
no classifier changes, so the game on whole balls is finite, and the linear program solves it exactly. After the
synthetic experiment of Meunier et al., "Mixed Nash Equilibria in the Adversarial Examples Game", ICML 2021, whose
attacker has m random points of each ball: `num_samples`. Values on samples are lower estimates of those on whole balls.

There are two classes, so some deterministic classifier is at least as robust as the best mixture, such as a vote of its
members with the right threshold (Gnecco-Heredia et al., NeurIPS 2023), or a constant. Both are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from mixadv.game import FiniteGame
from mixadv.games.base import TOLERANCE, Playable, Played, best_constant, best_vote, exact_radius, solve_values
from mixadv.games.cells import cell_points, game_on_points
from mixadv.lambda_solvers import AcceleratedEntropic, OracleSubgradient
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel

CENTRE = 3.0
MAX_TRIES = 20_000
_TRIES_AT_ONCE = 1_000


@dataclass(frozen=True, eq=False)
class GaussianProblem:
    """N labelled points and L half planes; and m random directions of attack per point, if the attacker has only these.

    Attributes:
        x: [N, 2] float64.
        y: [N] long, -1 or +1.
        normals: [L, 2], of length 1.
        offsets: [L]; classifier k predicts +1 iff normals[k]·x + offsets[k] >= 0, so |offsets[k]| is its distance
            to the origin.
        steps: [N, 1 + m, 2], points of the unit ball, the first of them 0; the rest are uniform. One set serves
            every radius, so that curves over eps are not blurred by new draws. None: the attacker has the whole ball.
    """

    x: Tensor
    y: Tensor
    normals: Tensor
    offsets: Tensor
    steps: Tensor | None = None

    def candidates(self, eps: float) -> tuple[Tensor, Tensor]:
        """The points that the attacker chooses among, and whose they are.

        Returns:
            owner [P], ascending; points [P, 2]: x itself first, then its m uniform points within eps, or points of
            every cell of its ball.

        Raises:
            ValueError: eps is negative or not finite.
        """
        radius = ThreatModel("l2", eps, bounds=None).eps
        if self.steps is not None:
            owner = torch.arange(len(self.x)).repeat_interleave(self.steps.shape[1])
            return owner, (self.x[:, None] + radius * self.steps).flatten(0, 1)
        found = cell_points(self.normals.numpy(), self.offsets.numpy(), self.x.numpy(), radius)
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    def game(self, eps: float) -> FiniteGame:
        """The 0/1 losses [N, m', L] uint8 of the classifiers at the candidates, each loss vector once; masses 1/N."""
        owner, points = self.candidates(eps)
        wrong = (points @ self.normals.T + self.offsets >= 0) != (self.y > 0)[owner, None]
        return game_on_points(wrong.to(torch.uint8).numpy(), owner.numpy())[0]

    def risks(self, eps: float = 0.0) -> Tensor:
        """[L], the adversarial 0/1 risk of each classifier alone on whole balls: its share of margins below eps.

        The margin of half plane k at (x, y) is y (w_k·x + b_k), because w_k has length 1. At 0 and eps = 0 a point of
        class +1 is right, and one of class -1 is wrong.
        """
        return _risks(self.x, self.y, self.normals, self.offsets, eps)


@dataclass(frozen=True, eq=False)
class Gaussians(Playable):
    """D, V_rand and V_det for several random draws and radii, and how close the iterative solvers come to V_rand.

    A classifier is sign(w·x + b) with (w, b) ~ N(0, I_3), drawn anew until its 0/1 risk on the points is below
    `max_risk`; w and b are then divided by ||w||.

    Args:
        eps: one radius or several, numbers or fractions such as "1/2"; solved in increasing order, each once.
        show_eps: the radius of the first two panels of the figure, which show the first draw.
        seed: of all draws.
        draws: the number of problems that are drawn, >= 1.
        num_points: N >= 1.
        num_samples: None, the attacker has whole balls; or m >= 0, it has m uniform points per ball and the point.
        num_classifiers: L >= 1.
        max_risk: in (0, 1].
        alphas: one temperature of the entropic solver or several, in units of the 0/1 loss.
        num_steps: of Algorithm 1 and of the entropic solver.

    Raises:
        ValueError: an argument is outside its range, or in some draw fewer than L of 20,000 random classifiers are
            good enough; the message says how good the best one was.
    """

    eps: Sequence[float | str] | float | str = tuple(quarters / 4 for quarters in range(13))
    show_eps: float | str = 2
    seed: int = 0
    draws: int = 3
    num_points: int = 1000
    num_samples: int | None = None
    num_classifiers: int = 10
    max_risk: float = 0.4
    alphas: Sequence[float] | float = (0.1, 0.01, 0.001)
    num_steps: int = 1000

    def __post_init__(self) -> None:
        for key, low in {"draws": 1, "num_points": 1, "num_samples": 0, "num_classifiers": 1}.items():
            if getattr(self, key) is not None and getattr(self, key) < low:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {low}")
        for key, example in (("eps", "[0,1,2]"), ("alphas", "[0.1,0.01]")):
            if not _as_list(getattr(self, key)):
                raise ValueError(f"{key}=[] is empty: give at least one number, as {key}={example}")
        exact_radius("show_eps", self.show_eps)
        if not 0 < self.max_risk <= 1:
            raise ValueError(f"max_risk={self.max_risk} must be a risk in (0, 1], as 0.4")
        # The solvers and the radii check their own numbers.
        _ = self._radii, self._entropic, OracleSubgradient(num_steps=self.num_steps)
        # A draw that fails must not fail after others have been solved.
        for number in range(self.draws):
            self._draw_classifiers(number, self._generator(number))

    @cached_property
    def _radii(self) -> list[float]:
        return sorted({float(exact_radius("eps", eps)) for eps in _as_list(self.eps)})

    @cached_property
    def _entropic(self) -> list[AcceleratedEntropic]:
        return [AcceleratedEntropic(alpha=alpha, num_steps=self.num_steps) for alpha in _as_list(self.alphas)]

    def _generator(self, number: int) -> Generator:
        return generator_for(self.seed, "gaussians", number)

    def draw(self, number: int = 0) -> GaussianProblem:
        """Draw problem `number`: the points, then the classifiers, then the directions of attack."""
        generator = self._generator(number)
        x, y, normals, offsets = self._draw_classifiers(number, generator)
        if self.num_samples is None:
            return GaussianProblem(x, y, normals, offsets)
        steps = torch.zeros(self.num_points, 1 + self.num_samples, 2, dtype=torch.float64)
        flat = torch.zeros(self.num_points * self.num_samples, 2, dtype=torch.float64)
        unit = ThreatModel("l2", 1.0, bounds=None)
        steps[:, 1:] = unit.sample(flat, generator).reshape(self.num_points, self.num_samples, 2)
        return GaussianProblem(x, y, normals, offsets, steps)

    def _draw_classifiers(self, number: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points [N, 2], labels [N], and by rejection normals [L, 2] and offsets [L]."""
        y = 2 * torch.randint(2, (self.num_points,), generator=generator) - 1
        side = 2 * torch.randint(2, (self.num_points,), generator=generator) - 1
        x = torch.randn(self.num_points, 2, generator=generator, dtype=torch.float64)
        x[:, 0] += CENTRE * side * (y > 0)
        kept: list[Tensor] = []
        found, best = 0, 1.0
        for _ in range(MAX_TRIES // _TRIES_AT_ONCE):
            drawn = torch.randn(_TRIES_AT_ONCE, 3, generator=generator, dtype=torch.float64)
            drawn = drawn / drawn[:, :2].norm(dim=1, keepdim=True)
            risks = _risks(x, y, drawn[:, :2], drawn[:, 2])
            kept.append(drawn[risks < self.max_risk])
            found, best = found + len(kept[-1]), min(best, risks.min().item())
            if found >= self.num_classifiers:
                chosen = torch.cat(kept)[: self.num_classifiers]
                return x, y, chosen[:, :2].contiguous(), chosen[:, 2].contiguous()
        raise ValueError(
            f"max_risk={self.max_risk}: in draw {number} of seed {self.seed} only {found} of {MAX_TRIES:,} random "
            f"classifiers have a smaller risk, {self.num_classifiers} are wanted; the best has {best:.3g}, choose a "
            "larger max_risk"
        )

    def play(self, log: Callable[[str], None]) -> Played:
        """See `Playable.play`."""
        first = self.draw(0)
        runs: list[dict[str, Any]] = []
        for number in range(self.draws):
            problem = first if number == 0 else self.draw(number)
            runs += [self._solve(problem, number, eps) for eps in self._radii]
            log(f"draw {number}: {len(self._radii)} radii solved")
        show_eps = float(exact_radius("show_eps", self.show_eps))
        shown = first.game(show_eps)
        values = solve_values(shown)
        convergence, arrays = self._converge(shown, values.v_rand, log)
        summary = {
            "draws": self.draws,
            "eps": self._radii,
            "show_eps": show_eps,
            "num_points": self.num_points,
            "num_samples": self.num_samples,
            "num_classifiers": self.num_classifiers,
            "risks": first.risks().tolist(),
            "runs": runs,
            "order": {"games": len(runs), "largest_violation": max(run["violation"] for run in runs)},
            "convergence": {"eps": show_eps, **convergence},
        }
        plane = {"points": first.x, "labels": first.y, "normals": first.normals, "offsets": first.offsets}
        plane["weights"] = values.weights
        return Played("gaussians", summary, arrays | {name: tensor.numpy() for name, tensor in plane.items()})

    def _solve(self, problem: GaussianProblem, number: int, eps: float) -> dict[str, Any]:
        """The values of one problem at one radius, checked against what is known of them."""
        game = problem.game(eps)
        values = solve_values(game)
        if eps == 0 and abs(values.v_rand - values.v_det) > TOLERANCE:
            raise RuntimeError(f"at eps = 0, V_rand = {values.v_rand!r} differs from V_det = {values.v_det!r}")
        whole = problem.risks(eps).min().item()
        if values.v_det > whole + TOLERANCE or (self.num_samples is None and values.v_det < whole - TOLERANCE):
            raise RuntimeError(f"V_det = {values.v_det!r} on the points of the game, {whole!r} by the margins")
        vote, threshold = best_vote(game, problem.y > 0, values.weights)
        constant = best_constant(problem.y)
        return {**values.row(number, eps), "best_constant": constant, "best_vote": vote, "vote_above": threshold}

    def _converge(
        self, game: FiniteGame, value: float, log: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Algorithm 1 and the entropic solver against the value of the linear program."""
        steps = np.unique(np.geomspace(1, self.num_steps, 13).round().astype(int))
        oracle = oracle_errors(game, value, steps.tolist())
        solvers = [{"solver": "Algorithm 1", "alpha": None, "steps": self.num_steps, "error": oracle[-1]}]
        log(f"Algorithm 1 up to {self.num_steps:,} steps")
        entropic = []
        for solver in self._entropic:
            entropic.append(entropic_errors(game, value, solver))
            end: dict[str, Any] = {"alpha": solver.alpha, "steps": self.num_steps, "error": entropic[-1][-1]}
            solvers.append({"solver": "entropic", **end})
            log(f"entropic solver, α = {solver.alpha:g}, {self.num_steps:,} steps")
        alphas = [solver.alpha for solver in self._entropic]
        arrays = {"oracle_steps": steps, "oracle_errors": oracle, "alphas": alphas, "value_errors": entropic}
        return {"v_lp": value, "solvers": solvers}, {name: np.array(values) for name, values in arrays.items()}


def _as_list(value: Any) -> list[Any]:
    """One number or several."""
    return [value] if isinstance(value, (int, float, str)) else list(value)


def _risks(x: Tensor, y: Tensor, normals: Tensor, offsets: Tensor, eps: float = 0.0) -> Tensor:
    scores, positive = x @ normals.T + offsets, (y > 0)[:, None]
    # A half plane is closed, and its complement is open; so is what the closed ball must reach.
    wrong = torch.where(positive, scores < eps, scores >= -eps)
    return wrong.to(torch.float64).mean(0)


def oracle_errors(game: FiniteGame, value: float, steps: Sequence[int]) -> list[float]:
    """R(best iterate) - value after Algorithm 1 with each number of steps; its step size is set for that number."""
    return [OracleSubgradient(num_steps=count).solve(game).value - value for count in steps]


def entropic_errors(game: FiniteGame, value: float, solver: AcceleratedEntropic) -> list[float]:
    """R(best iterate so far) - value after 0, 1, ..., T steps; it need not fall to 0, the solver minimises F."""
    return [best - value for best in solver.solve(game).history["best_value"]]
