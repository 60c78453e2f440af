"""Names and numbers in the notation of readers: "8/255", "oracle", "eps=0.1"."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from mixadv.redaction import printable

_GROUP_NAMES = {
    "OracleSubgradient": "oracle",
    "AcceleratedEntropic": "entropic",
    "LinearProgram": "lp",
    "Uniform": "uniform",
    "at": "AT",
    "trades": "TRADES",
}


def number(value: Any) -> float | None:
    """A finite float from a number or from text such as "0.031" or "8/255", else None."""
    if value is None or isinstance(value, bool):
        return None
    try:
        result = float(Fraction(value.strip())) if isinstance(value, str) else float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def group_name(value: Any) -> str:
    """The name of an entry of a configuration group: its `name`, else the class it builds; "" if it has neither."""
    if isinstance(value, dict):
        value = value.get("name") or str(value.get("_target_", "")).rpartition(".")[2]
    name = str(value or "")
    return _GROUP_NAMES.get(name, name)


def trained_with(settings: Mapping[str, Any]) -> str:
    """The loss, solver, schedule, epochs and learning rate of a training in one line; "" without settings."""
    schedule, trainer, optimizer = (settings.get(key) for key in ("schedule", "trainer", "optimizer"))
    parts = [group_name(settings.get("loss")), group_name(settings.get("lambda_solver"))]
    parts += [f"{schedule['kind']} schedule"] if isinstance(schedule, dict) and "kind" in schedule else []
    if isinstance(trainer, dict) and "max_epochs" in trainer:
        parts.append(f"trainer.max_epochs={trainer['max_epochs']}")
    parts += [f"optimizer.lr={optimizer['lr']}"] if isinstance(optimizer, dict) and "lr" in optimizer else []
    return ", ".join(part for part in parts if part)


def format_eps(eps: float | None) -> str:
    """The radius as text: "8/255" for quarters of grey levels, else a decimal."""
    if eps is None:
        return "–"
    levels = eps * 255
    if eps > 0 and abs(eps - round(eps, 3)) > 1e-9 and abs(4 * levels - round(4 * levels)) < 1e-3:
        return f"{round(4 * levels) / 4:g}/255"
    return f"{eps:.4g}"


def norm_symbol(norm: str) -> str:
    """The symbol of a norm: "ℓ∞" or "ℓ2"."""
    return {"linf": "ℓ∞", "l2": "ℓ2"}.get(norm, norm)


def format_ball(norm: str, eps: float | None) -> str:
    """The threat model as text, for example "ℓ∞, ε = 8/255"."""
    return ", ".join(part for part in (norm_symbol(norm), f"ε = {format_eps(eps)}") if part)


def natural_key(path: str | Path) -> tuple[tuple[tuple[int, float, str], ...], ...]:
    """Sort key that compares numbers in names by value: eps=0.05 < eps=0.1, run2 < run10."""
    pieces = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
    return tuple(
        tuple((0, float(t), "") if i % 2 else (1, 0.0, t) for i, t in enumerate(pieces.split(part)) if t)
        for part in Path(path).parts
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths relative to their deepest common folder."""
    if not paths:
        return []
    common = os.path.commonpath([path.resolve().parent for path in paths])
    return [printable(path.resolve().relative_to(common).as_posix()) for path in paths]
