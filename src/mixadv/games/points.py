"""A game of the user's own in the plane: labelled points from a file, and classifiers.

Linear classifiers alone are played on whole balls, exactly (see `mixadv.games.cells`). With any other classifier the
attacker has random points of each ball and the point itself, so the values are lower estimates.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixadv.files import read_arrays
from mixadv.game import FiniteGame
from mixadv.games.base import GameValues, Playable, Played, best_constant, best_vote, exact_radius, solve_values
from mixadv.games.cells import cell_points, game_on_points
from mixadv.games.table import is_header
from mixadv.seeding import generator_for
from mixadv.threat_model import NORMS, ThreatModel

# The attacker's moves that the picture shows, and the width of the picture's grid.
SHOWN, GRID = 60, 200


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of points in the plane.

    Attributes:
        name: for tables.
        predict: x [n, 2] float64 -> labels [n].
        line: (w1, w2, b) of a linear classifier, which predicts the larger label iff w·x + b >= 0; else None.
    """

    name: str
    predict: Callable[[np.ndarray], np.ndarray]
    line: tuple[float, float, float] | None = None


class Points(Playable):
    """The game on labelled points in the plane, at every radius.

    Args:
        file: ``.npz`` with x [N, 2], y [N] and optional masses [N]; or ``.csv`` with the columns x1, x2, y and, if
            wanted, a fourth of masses, with or without a header. Labels are whole numbers.
        classifiers: each one of [w1, w2, b], linear: of two labels the larger one iff w·x + b >= 0; or
            ``module:callable`` or ``file.py:callable``, a function x [n, 2] -> labels [n], such as the predict of a
            fitted model.
        eps: one radius or several, numbers or fractions such as "1/2".
        norm: "l2" or "linf".
        show_eps: the radius of the picture; None: the largest.
        num_samples: uniform points of each ball, if some classifier is not linear.
        seed: of these points.

    Raises:
        ValueError: the file or an argument is no such thing, or a classifier fails on the points.
    """

    def __init__(
        self,
        file: str,
        classifiers: Sequence[str | Sequence[float]],
        eps: Sequence[float | str] | float | str = (0, 0.25, 0.5, 0.75, 1),
        norm: str = "l2",
        show_eps: float | str | None = None,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> None:
        if norm not in NORMS:
            raise ValueError(f"norm={norm} is unknown: choose one of {', '.join(NORMS)}")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        if not classifiers:
            raise ValueError("classifiers=[] is empty: give linear ones as [w1,w2,b], others as module:callable")
        radii = [eps] if isinstance(eps, (int, float, str)) else list(eps)
        if not radii:
            raise ValueError("eps=[] is empty: give at least one number, as eps=[0,1/2]")
        self.file, self.norm, self.num_samples, self.seed = file, norm, num_samples, seed
        self.radii = sorted({float(exact_radius("eps", radius)) for radius in radii})
        self.show_eps = self.radii[-1] if show_eps is None else float(exact_radius("show_eps", show_eps))
        self.x, self.y, self.masses = read_points(Path(file).expanduser())
        labels = np.unique(self.y)
        self.classifiers = [_classifier(each, labels) for each in classifiers]
        wrong = np.stack([_predicted(each, self.x) != self.y for each in self.classifiers], axis=1)
        try:
            FiniteGame(wrong[:, None], masses=self.masses)
        except ValueError as error:
            raise ValueError(f"file={file}: {error}") from error

    @property
    def whole_balls(self) -> bool:
        """Whether the attacker has whole balls: all classifiers are linear."""
        return all(classifier.line for classifier in self.classifiers)

    def candidates(self, eps: float) -> tuple[np.ndarray, np.ndarray]:
        """The points that the attacker chooses among: owner [P], ascending, and points [P, 2]."""
        if self.whole_balls:
            lines = np.array([classifier.line for classifier in self.classifiers])
            return cell_points(lines[:, :2], lines[:, 2], self.x, eps, self.norm)
        count = len(self.x) * self.num_samples
        generator = generator_for(self.seed, "points")
        flat = ThreatModel(self.norm, 1.0, bounds=None).sample(torch.zeros(count, 2, dtype=torch.float64), generator)
        steps = np.concatenate([np.zeros((len(self.x), 1, 2)), flat.numpy().reshape(len(self.x), -1, 2)], axis=1)
        owner = np.arange(len(self.x)).repeat(steps.shape[1])
        return owner, (self.x[:, None] + eps * steps).reshape(-1, 2)

    def play(self, log: Callable[[str], None]) -> Played:
        """See `Playable.play`."""
        runs = []
        for eps in self.radii:
            game, values, _ = self._solve(eps)
            runs.append({**values.row(0, eps), **self._counterparts(game, values)})
            log(f"ε = {eps:g}: V_rand {values.v_rand:.4f}, V_det {values.v_det:.4f}")
        game, values, places = self._solve(self.show_eps)
        labels = np.unique(self.y)
        summary = {
            "file": self.file,
            "norm": self.norm,
            "num_points": len(self.x),
            "num_samples": None if self.whole_balls else self.num_samples,
            "members": [classifier.name for classifier in self.classifiers],
            "labels": labels.tolist(),
            "show_eps": self.show_eps,
            "weights": values.weights.tolist(),
            "deterministic_risks": game.deterministic_values().tolist(),
            "runs": runs,
        }
        arrays = {"points": self.x, "labels": self.y, "moves": self._moves(values, places)}
        return Played("points", summary, arrays | self._picture(values.weights.numpy(), labels))

    def _solve(self, eps: float) -> tuple[FiniteGame, GameValues, np.ndarray]:
        """The game at one radius, its values, and [N, m, 2] where its perturbations are."""
        owner, points = self.candidates(eps)
        wrong = np.stack([_predicted(each, points) != self.y[owner] for each in self.classifiers], axis=1)
        game, place = game_on_points(wrong.astype(np.uint8), owner, self.masses)
        return game, solve_values(game), points[place]

    def _counterparts(self, game: FiniteGame, values: GameValues) -> dict[str, float]:
        """The risks of the best constant and, with two classes, of the best vote."""
        found = {"best_constant": best_constant(torch.from_numpy(self.y), game.masses)}
        if len(np.unique(self.y)) == 2:
            found["best_vote"], found["vote_above"] = best_vote(
                game, torch.from_numpy(self.y == self.y.max()), values.weights
            )
        return found

    def _moves(self, values: GameValues, places: np.ndarray) -> np.ndarray:
        """[M, 4] the attacker's most probable moves, from and to, without those that stay."""
        chances = values.attack.numpy()
        moved = (chances > 1e-9) & (np.abs(places - self.x[:, None]).max(2) > 0)
        order = sorted(zip(*np.nonzero(moved), strict=True), key=lambda at: -chances[at])[:SHOWN]
        return np.array([[*self.x[i], *places[i, j]] for i, j in order]).reshape(-1, 4)

    def _picture(self, weights: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """The probability [GRID, GRID, C] of each label on a grid, and its extent (left, right, bottom, top)."""
        margin = self.show_eps + 0.05 * float(np.ptp(self.x, axis=0).max() or 1.0)
        low, high = self.x.min(0) - margin, self.x.max(0) + margin
        sides = [np.linspace(a, b, GRID) for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*sides), axis=-1).reshape(-1, 2)
        said = np.stack([_predicted(classifier, grid) for classifier in self.classifiers], axis=1)
        shares = np.stack([(said == label) @ weights for label in labels], axis=1)
        return {
            "shares": shares.reshape(GRID, GRID, -1).astype(np.float32),
            "extent": np.array([low[0], high[0], low[1], high[1]]),
        }


def _classifier(given: str | Sequence[float], labels: np.ndarray) -> Classifier:
    if isinstance(given, str):
        return Classifier(given, _imported(given))
    if len(given) != 3 or not all(np.isfinite(given)):
        raise ValueError(f"classifiers: {list(given)} are not the three finite numbers [w1,w2,b] of w·x + b >= 0")
    if len(labels) != 2:
        raise ValueError(f"classifiers: {list(given)} is linear and needs two labels, there are {len(labels)}")
    first, second, shift = map(float, given)
    smaller, larger = labels

    def predict(x: np.ndarray) -> np.ndarray:
        return np.where(x @ np.array([first, second]) + shift >= 0, larger, smaller)

    return Classifier(f"[{first:g},{second:g},{shift:g}]", predict, (first, second, shift))


def _imported(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function ``module:callable`` or ``file.py:callable``; modules are also found in the working directory."""
    place, colon, attribute = name.rpartition(":")
    if not (place and colon and attribute):
        raise ValueError(f"classifiers: {name!r} is neither module:callable nor file.py:callable nor [w1,w2,b]")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            if spec is None or spec.loader is None:
                raise ImportError(f"{place} is no module")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path:
                sys.path.append("")
            importlib.invalidate_caches()
            module = importlib.import_module(place)
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ValueError(f"classifiers: {name} cannot be imported ({type(error).__name__}: {reason})") from error
    if not callable(found):
        raise ValueError(f"classifiers: {name} is no function of x [n, 2] that returns labels [n]")
    return found


def _predicted(classifier: Classifier, x: np.ndarray) -> np.ndarray:
    try:
        labels = np.asarray(classifier.predict(x))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ValueError(
            f"classifiers: {classifier.name} failed on x of shape {list(x.shape)} ({type(error).__name__}: {reason})"
        ) from error
    if labels.shape != (len(x),):
        raise ValueError(
            f"classifiers: {classifier.name} returned shape {list(labels.shape)} for x of shape {list(x.shape)}: "
            "one label per point is needed"
        )
    return labels


def read_points(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x [N, 2] float64, y [N] int64 and masses [N] or None, see `Points`.

    Raises:
        ValueError: see `Points`.
    """
    try:
        if path.suffix == ".npz":
            arrays = read_arrays(path)
            if arrays is None:
                raise FileNotFoundError
            if not {"x", "y"} <= set(arrays):
                raise ValueError(f"file={path} has {', '.join(arrays) or 'no arrays'}: it needs x [N, 2] and y [N]")
            x, y, masses = arrays["x"], arrays["y"], arrays.get("masses")
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                x, y, masses = _of_rows([row for row in csv.reader(file) if any(cell.strip() for cell in row)], path)
        else:
            raise ValueError(f"file={path} must end in .npz or .csv")
    except FileNotFoundError as error:
        raise ValueError(f"file={path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file={path} cannot be read: {error}") from error
    if x.ndim != 2 or x.shape[1] != 2 or len(x) == 0 or y.shape != (len(x),):
        raise ValueError(f"file={path}: x must be [N, 2] and y [N], they are {list(x.shape)} and {list(y.shape)}")
    if x.dtype.kind not in "iuf" or not np.isfinite(x).all():
        raise ValueError(f"file={path}: x must hold finite numbers")
    if y.dtype.kind not in "iufb" or not (y == np.floor(y)).all():
        raise ValueError(f"file={path}: labels must be whole numbers")
    return x.astype(np.float64), y.astype(np.int64), masses


def _of_rows(rows: list[list[str]], path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rows = rows[1:] if rows and is_header(rows[0]) else rows
    numbers = [_numbers(row) for row in rows]
    if None in numbers:
        raise ValueError(f"file={path}: {','.join(rows[numbers.index(None)])} are not numbers")
    if {len(row) for row in rows} not in ({3}, {4}):
        raise ValueError(f"file={path} needs the columns x1, x2, y and may have a fourth, the masses")
    table = np.array(numbers)
    return table[:, :2], table[:, 2], table[:, 3] if table.shape[1] == 4 else None


def _numbers(row: list[str]) -> list[float] | None:
    try:
        return [float(cell) for cell in row]
    except ValueError:
        return None
