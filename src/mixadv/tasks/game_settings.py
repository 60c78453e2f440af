"""The settings of the built-in games, checked before anything is computed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mixadv.config import Config, parse_eps
from mixadv.errors import UserError


@dataclass(frozen=True)
class MotivatingSettings:
    """``game=motivating``; eps is exactly what was written."""

    name: str
    eps: Fraction
    alpha: float
    num_steps: int


@dataclass(frozen=True)
class GaussianSettings:
    """``game=gaussians``; eps has its radii in increasing order, each once, show_eps that of the first two panels."""

    name: str
    eps: list[float]
    show_eps: float
    seeds: int
    num_points: int
    num_samples: int
    num_classifiers: int
    max_risk: float
    alphas: list[float]
    num_steps: int
    convergence_samples: int

    def __post_init__(self) -> None:
        if self.convergence_samples > self.num_samples:
            raise UserError(
                f"game.convergence_samples={self.convergence_samples} exceeds "
                f"game.num_samples={self.num_samples}, of which they are the first: lower it"
            )


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
    readers = _READERS[kind]
    return kind(**{key: readers[key](f"game.{key}", value) if key in readers else value for key, value in node.items()})


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


def _held(fits: Callable[[Any], bool], words: str) -> Callable[[str, Any], Any]:
    """A reader of finite numbers that fit; any other value is refused with these words."""

    def read(key: str, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not fits(value):
            raise UserError(f"{key}={value} must be {words}")
        return value

    return read


def _whole(least: int) -> Callable[[str, Any], Any]:
    return _held(lambda value: isinstance(value, int) and value >= least, f"a whole number of at least {least}")


def _each(read: Callable[[str, Any], Any], example: str) -> Callable[[str, Any], list[float]]:
    """A reader of one value or a list of them."""

    def read_all(key: str, value: Any) -> list[float]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise UserError(f"{key}={value} is empty: give at least one number, as {key}={example}")
        return [float(read(key, one)) for one in values]

    return read_all


_TEMPERATURE = _held(lambda value: value > 0, "positive and finite: a temperature in units of the 0/1 loss")
_READERS: dict[type, dict[str, Callable[[str, Any], Any]]] = {
    MotivatingSettings: {"eps": exact_radius, "alpha": _TEMPERATURE, "num_steps": _whole(1)},
    GaussianSettings: {
        "eps": lambda key, value: sorted(set(_each(exact_radius, "[0,1,2]")(key, value))),
        "show_eps": lambda key, value: float(exact_radius(key, value)),
        "alphas": _each(_TEMPERATURE, "[0.1,0.01]"),
        "max_risk": _held(lambda value: 0 < value <= 1, "a risk in (0, 1], as 0.4"),
        **dict.fromkeys(("seeds", "num_points", "num_classifiers", "num_steps"), _whole(1)),
        **dict.fromkeys(("num_samples", "convergence_samples"), _whole(0)),
    },
}
