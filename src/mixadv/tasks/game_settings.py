"""The settings of the built-in games, checked before anything is computed."""

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mixadv.config import Config, parse_eps
from mixadv.errors import UserError


@dataclass(frozen=True)
class MotivatingSettings:
    """``game=motivating``."""

    name: str
    eps: Any
    alpha: float
    num_steps: int

    def __post_init__(self) -> None:
        _count("num_steps", self.num_steps, 1)
        _temperature("alpha", self.alpha)
        self.radius()

    def radius(self) -> Fraction:
        """eps as it was written, exactly."""
        return exact_radius("game.eps", self.eps)


@dataclass(frozen=True)
class GaussianSettings:
    """``game=gaussians``."""

    name: str
    eps: Any
    show_eps: Any
    seeds: int
    num_points: int
    num_samples: int
    num_classifiers: int
    max_risk: float
    alphas: Any
    num_steps: int
    convergence_samples: int

    def __post_init__(self) -> None:
        for key in ("seeds", "num_points", "num_classifiers", "num_steps"):
            _count(key, getattr(self, key), 1)
        for key in ("num_samples", "convergence_samples"):
            _count(key, getattr(self, key), 0)
        if self.convergence_samples > self.num_samples:
            raise UserError(
                f"game.convergence_samples={self.convergence_samples} exceeds "
                f"game.num_samples={self.num_samples}, of which they are the first: lower it"
            )
        if not _is_number(self.max_risk) or not 0 < self.max_risk <= 1:
            raise UserError(f"game.max_risk={self.max_risk} must be a risk in (0, 1], as game.max_risk=0.4")
        self.radii()
        self.show_radius()
        self.temperatures()

    def radii(self) -> list[float]:
        """The list eps in increasing order, each radius once."""
        wanted = _list("eps", self.eps, "[0,1,2]")
        return sorted({float(exact_radius("game.eps", value)) for value in wanted})

    def show_radius(self) -> float:
        """The radius of the first two panels."""
        return float(exact_radius("game.show_eps", self.show_eps))

    def temperatures(self) -> list[float]:
        """The list alphas."""
        wanted = _list("alphas", self.alphas, "[0.1,0.01]")
        for alpha in wanted:
            _temperature("alphas", alpha)
        return [float(alpha) for alpha in wanted]


def game_settings(cfg: DictConfig) -> MotivatingSettings | GaussianSettings:
    """The settings of ``cfg.game``, checked.

    Raises:
        UserError: an unknown game or key, a value out of its range, or a key that only other tasks read.
    """
    for key, instead in (("eps", "game.eps=..."), ("L", "game.num_classifiers=... of game=gaussians")):
        if cfg[key] != getattr(Config, key):
            raise UserError(f"{key}={cfg[key]}: task=game has a key of its own, {instead}; leave {key} out")
    plain: Any = OmegaConf.to_container(cfg.game, resolve=True)
    node = {str(key): value for key, value in plain.items()}
    kinds: dict[str, Any] = {"motivating": MotivatingSettings, "gaussians": GaussianSettings}
    kind = kinds.get(str(node.get("name")))
    if kind is None:
        raise UserError(f"game.name={node.get('name')} is unknown: choose game=motivating or game=gaussians")
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(node) - known):
        raise UserError(f"game.{unknown[0]}: game={node['name']} has no such key; it has {', '.join(sorted(known))}")
    if missing := sorted(known - set(node)):
        raise UserError(f"game.{missing[0]} has no value: add game.{missing[0]}=... to the command")
    return kind(**node)


def exact_radius(key: str, value: Any) -> Fraction:
    """A radius as the fraction that was written: "21/40", 0.525 or 0.

    Raises:
        UserError: not a finite non-negative number or fraction.
    """
    try:
        rounded = parse_eps(value)
    except UserError:
        raise UserError(
            f"{key}={value} is no radius: give a finite number or fraction of at least 0, as {key}=1/2 or {key}=0.5"
        ) from None
    text = str(value)
    if "e" in text.lower():
        # Powers of ten may be too large to be written out.
        return Fraction(rounded)
    numerator, _, denominator = text.partition("/")
    return Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(key: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"game.{key}={value} must be a whole number of at least {least}")


def _temperature(key: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise UserError(f"game.{key}={value} must be positive and finite: a temperature in units of the 0/1 loss")


def _list(key: str, value: Any, example: str) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"game.{key}={value} is empty: give at least one number, as game.{key}={example}")
    return values
