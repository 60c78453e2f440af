"""What every attack found: its numbers as the results of an evaluation hold them, and the table for the console.

Three classifiers are kept apart. The *mixture* draws a member with its weights; its accuracies are exact
expectations over the draw. A *member* stands alone. The *averaged twin* predicts the argmax of the members'
averaged probabilities: a deterministic classifier, never called the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from mixadv.redaction import printable
from mixadv.report.comparison import Z95
from mixadv.report.files import Interval, Run
from mixadv.report.names import group_name, number
from mixadv.report.tables import NONE

TWIN = "averaged twin"
WHOLE = ("mixture", "model")  # the latter where there is one member


class Curve(NamedTuple):
    """A line of values [n] per classifier over ascending x [n], nan where the files say nothing."""

    x: np.ndarray
    lines: dict[str, np.ndarray]


class Flag(NamedTuple):
    """A reason to doubt the numbers: its name, the numbers it rests on, and what to do."""

    name: str
    evidence: str
    remedy: str


def entries(run: Run) -> dict[str, dict[str, Any]]:
    """Name of each attack -> its entry."""
    return {str(name): entry for name, entry in run.attacks.items() if isinstance(entry, dict)}


def stored_interval(entry: Any, key: str) -> Interval:
    """`entry[key]` and `entry["ci95"]`, as far as they are there and numbers."""
    if not isinstance(entry, Mapping):
        return Interval(None)
    ends = entry.get("ci95")
    low, high = map(number, ends) if isinstance(ends, (list, tuple)) and len(ends) == 2 else (None, None)
    return Interval(number(entry.get(key)), low, high)


def wilson(mean: float | None, count: int | None) -> Interval:
    """Wilson's 95 % score interval of the mean of `count` values in [0, 1], as the evaluation's own intervals are.

    (m + z²/2n ± z sqrt(m(1-m)/n + z²/4n²)) / (1 + z²/n); without `count` there is no interval.
    """
    if mean is None or not count or not 0 <= mean <= 1:
        return Interval(mean)
    z2 = Z95**2 / count
    half = Z95 * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count))
    low, high = ((mean + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))
    # The ends are exact at 0 and 1 in real numbers, not in floating point.
    return Interval(mean, max(0.0, low) if mean > 0 else 0.0, min(1.0, high) if mean < 1 else 1.0)


def classifiers(run: Run) -> list[str]:
    """Names of who is attacked: "mixture", "member 0", ..., "averaged twin"; with one member it is all there is."""
    count = len(run.members) or run.num_members or 0
    return ["model"] if count == 1 else ["mixture", *(f"member {k}" for k in range(count)), TWIN]


def is_single(run: Run) -> bool:
    """Whether there is one member, so that model, mixture and averaged twin are one."""
    return classifiers(run)[0] == "model"


def attack_rows(run: Run) -> list[tuple[str, dict[str, float | None]]]:
    """(attack, accuracy of every classifier when it is attacked itself), in the order of the protocol."""
    rows = []
    for name, entry in entries(run).items():
        alone = entry.get("members")
        values: dict[str, float | None] = {}
        for who in classifiers(run):
            if who == TWIN:
                values[who] = number(entry.get("averaged_twin"))
            elif who in WHOLE:
                values[who] = number(entry.get("expected_accuracy"))
            else:
                k = int(who.removeprefix("member "))
                values[who] = number(alone[k]) if isinstance(alone, list) and k < len(alone) else None
        rows.append((name, values))
    return rows


def worst_cases(run: Run) -> dict[str, Interval]:
    """Per classifier the accuracy on the worst of all points found by anyone, with its interval."""
    found = {}
    for who in classifiers(run):
        if who == TWIN:
            found[who] = stored_interval(run.get("averaged_twin"), "robust")
        elif who in WHOLE:
            found[who] = stored_interval(run.get("robust"), "expected_accuracy")
        else:
            k = int(who.removeprefix("member "))
            found[who] = stored_interval(run.members[k] if k < len(run.members) else None, "robust")
    return found


def read_curve(run: Run, name: str) -> Curve | None:
    """`curves.eps` or `curves.steps` of the results; None where there is none.

    Raises:
        ValueError: its lists are not numbers, or differ in length.
    """
    entry = run.get("curves", name)
    if entry is None:
        return None
    where = f"{run.path / 'results.json'}: curves.{name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not an object")
    x = _series(entry.get(name), where, name)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"{where}.{name} must be a list of finite numbers")
    members = entry.get("members") or []
    if not isinstance(members, list):
        raise ValueError(f"{where}.members must be a list of lists")
    given = {"mixture": entry.get("mixture"), TWIN: entry.get("averaged_twin")}
    given |= {f"member {k}": values for k, values in enumerate(members)}
    # A single model is its own only member and its own twin.
    sources = {who: "mixture" if who == "model" else who for who in classifiers(run)}
    lines = {who: _series(given[key], where, key) for who, key in sources.items() if given.get(key) is not None}
    for who, values in lines.items():
        if len(values) != len(x):
            raise ValueError(f"{where}: {len(values)} values of {who} at {len(x)} points")
    order = np.argsort(x, kind="stable")
    return Curve(x[order], {who: values[order] for who, values in lines.items()}) if lines else None


def _series(values: Any, where: str, name: str) -> np.ndarray:
    if not isinstance(values, list):
        raise ValueError(f"{where}: {name} must be a list of numbers")
    return np.array([math.nan if (v := number(value)) is None else v for value in values], dtype=np.float64)


def flags_of(run: Run) -> list[Flag]:
    """The flags of the results; one that is mere text becomes the evidence of a flag without a name."""
    flags = run.get("flags")
    found = []
    for flag in flags if isinstance(flags, list) else []:
        if isinstance(flag, dict):
            found.append(Flag(*(str(flag.get(key) or "") for key in Flag._fields)))
        else:
            found.append(Flag("", str(flag), ""))
    return found


def settings_text(settings: Any) -> str:
    """How an attack was called, "PGD(num_steps=20, restarts=5)"; "" where the files do not say."""
    if not isinstance(settings, dict):
        return ""
    rest = ", ".join(
        f"{key}={group_name(value) if isinstance(value, dict) else value}"
        for key, value in settings.items()
        if key != "_target_"
    )
    built = str(settings.get("_target_") or "").rpartition(".")[2]
    return f"{built}({rest})" if built else rest


# --- the table ---------------------------------------------------------------------------------------------


def attacks_table(run: Run) -> Table:
    """Per attack: accuracies of everybody when attacked themselves, worst cases it was first to find, seconds.

    "from parts" is the mixture's expected accuracy at the points that the attack found against its parts;
    "seconds" counts those passes as well.
    """
    caption = (
        "Each classifier is attacked itself. From parts: the mixture at the points found against its parts. "
        "Worst found: images whose worst point this attack, on whomever, was the first to find."
    )
    table = Table(title="Accuracy per attack", title_justify="left", caption=caption, caption_justify="left")
    single = is_single(run)
    table.add_column("attack", overflow="fold")
    table.add_column("model %" if single else "mixture % [95 %]", justify="right", no_wrap=True)
    if not single:
        table.add_column("from parts %", justify="right")
        table.add_column("members %", justify="right", overflow="fold")
        table.add_column(f"{TWIN} %", justify="right")
    table.add_column("worst found", justify="right")
    table.add_column("seconds", justify="right")
    for name, values in attack_rows(run):
        entry = entries(run)[name]
        mean, *parts = values.values()
        cells: list[str | Text] = [Text(printable(name)), _percent_with(wilson(mean, run.num_examples))]
        if not single:
            *members, twin = parts
            alone = " ".join(map(_percent, members)) if any(v is not None for v in members) else NONE
            cells += [_percent(number(entry.get("replayed_from_parts"))), alone]
            cells.append(_percent(twin))
        found, seconds = number(entry.get("worst_found")), total_seconds(entry)
        cells += [NONE if found is None else f"{found:.0f}", NONE if seconds is None else f"{seconds:.1f}"]
        table.add_row(*cells)
    table.add_section()
    worst, *others = worst_cases(run).values()
    cells = ["all points found", _percent_with(worst)]
    if not single:
        cells += ["", " ".join(_percent(m.value) for m in others[:-1]), _percent(others[-1].value)]
    table.add_row(*cells, "", "", style="bold")
    return table


def total_seconds(entry: Mapping[str, Any]) -> float | None:
    """Wall seconds of an attack on the mixture and on its parts."""
    known = [s for key in ("seconds", "seconds_on_parts") if (s := number(entry.get(key))) is not None]
    return sum(known) if known else None


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _percent_with(at: Interval) -> str:
    ends = "" if at.low is None or at.high is None else f" [{_percent(at.low)}, {_percent(at.high)}]"
    return _percent(at.value) + ends
