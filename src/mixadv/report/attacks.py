"""What every attack found: its numbers as the results of an evaluation hold them, and the table for the console.

Three classifiers are kept apart. The *mixture* draws a member with its weights; its accuracies are exact
expectations over the draw. A *member* stands alone. The *averaged twin* predicts the argmax of the members'
averaged probabilities: a deterministic classifier, never called the mixture.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from mixadv.intervals import confidence_interval
from mixadv.redaction import printable
from mixadv.report.cells import NONE, add_row, new_table, percent, percent_with, plain
from mixadv.report.files import Interval, Run, stored_interval
from mixadv.report.names import group_name, number

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


def wilson(mean: float | None, count: int | None) -> Interval:
    """Wilson's 95 % score interval of the mean of `count` values in [0, 1], as the evaluation's own intervals are.

    Without `count` there is no interval.
    """
    if mean is None or count is None or count < 1 or not 0 <= mean <= 1:
        return Interval(mean)
    return Interval(mean, *confidence_interval(mean, count))


def classifiers(run: Run) -> list[str]:
    """Names of who is attacked: "mixture", "member 0", ..., "averaged twin"; with one member it is all there is."""
    count = len(run.members) or run.num_members or 0
    return ["model"] if count == 1 else ["mixture", *(f"member {k}" for k in range(count)), TWIN]


def is_single(run: Run) -> bool:
    """Whether there is one member, so that model, mixture and averaged twin are one."""
    return classifiers(run)[0] == "model"


class Classifier(NamedTuple):
    """A line of the tables of classifiers.

    label: what a table calls it. clean, robust: accuracies with their intervals, where they are known. weight: of a
    member.
    """

    label: str
    clean: Interval
    robust: Interval = Interval(None)
    weight: float | None = None


def everybody(run: Run) -> dict[str, Classifier]:
    """All that were measured: "member 0", ..., "mixture", "ensemble", "averaged twin" and, if there is one, "baseline".

    Robust is the accuracy on the worst of all points found by anyone. The ensemble is the averaged twin as a training's
    evaluation has it, on clean images only.
    """
    found = {}
    for k, member in enumerate(run.members):
        label = ": ".join(str(part) for part in (f"member {k}", member.get("name")) if part)
        robust = stored_interval(member, "robust")
        found[f"member {k}"] = Classifier(
            label, Interval(number(member.get("clean"))), robust, number(member.get("weight"))
        )
    found["mixture"] = Classifier(classifiers(run)[0], run.clean, run.robust)
    found["ensemble"] = Classifier("ensemble accuracy", Interval(number(run.get("clean", "ensemble_accuracy"))))
    twin = run.get("averaged_twin")
    found[TWIN] = Classifier(TWIN, Interval(number(run.get("averaged_twin", "clean"))), stored_interval(twin, "robust"))
    if (base := run.baseline) is not None:
        label = f"baseline ({'one model' if base.state == 'done' else base.state})"
        found["baseline"] = Classifier(label, base.clean, base.robust)
    return found


def worst_cases(run: Run) -> dict[str, Interval]:
    """Per classifier the accuracy on the worst of all points found by anyone, with its interval."""
    found = everybody(run)
    nobody = Classifier("", Interval(None))
    return {who: found.get("mixture" if who in WHOLE else who, nobody).robust for who in classifiers(run)}


class AttackRow(NamedTuple):
    """What an evaluation says of one attack.

    values: accuracy of every classifier when it is attacked itself, by name, the mixture first. mixture: the first of
    them with its interval. parts: the others. from_parts: the mixture's accuracy at the points found against its parts.
    worst_found: images whose worst point it was the first to find. seconds: wall time; seconds_on_parts: of the passes
    against members and twin. settings: how it was called.
    """

    name: str
    values: dict[str, float | None]
    mixture: Interval
    parts: list[float | None]
    from_parts: float | None
    worst_found: float | None
    seconds: float | None
    seconds_on_parts: float | None
    settings: str


def attack_rows(run: Run) -> list[AttackRow]:
    """One row for each attack, in the order of the protocol."""
    rows = []
    for name, entry in entries(run).items():
        alone = entry.get("members")
        parts = [number(value) for value in alone] if isinstance(alone, list) else []
        known = {f"member {k}": value for k, value in enumerate(parts)} | {TWIN: number(entry.get("averaged_twin"))}
        known |= dict.fromkeys(WHOLE, number(entry.get("expected_accuracy")))
        values = {who: known.get(who) for who in classifiers(run)}
        first, *others = values.values()
        rows.append(
            AttackRow(
                name,
                values,
                wilson(first, run.num_examples),
                others,
                number(entry.get("replayed_from_parts")),
                number(entry.get("worst_found")),
                number(entry.get("seconds")),
                number(entry.get("seconds_on_parts")),
                settings_text(entry.get("settings")),
            )
        )
    return rows


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


def settings_text(settings: Any, with_class: bool = True) -> str:
    """How an attack was called, "PGD(num_steps=20, restarts=5)", or its arguments alone; "" where files do not say."""
    if not isinstance(settings, dict):
        return ""
    rest = ", ".join(
        f"{key}={group_name(value) if isinstance(value, dict) else value}"
        for key, value in settings.items()
        if key != "_target_"
    )
    built = str(settings.get("_target_") or "").rpartition(".")[2] if with_class else ""
    return f"{built}({rest})" if built else rest


# --- the table ---------------------------------------------------------------------------------------------


def attacks_table(run: Run) -> Table:
    """Per attack: accuracies of everybody when attacked themselves, worst cases it was first to find, seconds.

    "from parts" is the mixture's expected accuracy at the points that the attack found against its parts;
    "seconds" counts those passes as well.
    """
    single = is_single(run)
    parts = [] if single else ["from parts %", "members %", f"{TWIN} %"]
    folds = {"attack": 1, "from parts %": 7, "members %": 7, f"{TWIN} %": 8, "worst found": 5}
    table = new_table(
        "Accuracy per attack",
        ["attack", "model %" if single else "mixture % [95 %]", *parts, "worst found", "seconds"],
        words=["attack"],
        folds=folds,
        caption="Each classifier is attacked itself. From parts: the mixture at the points found against its parts. "
        "Worst found: images whose worst point this attack, on whomever, was the first to find.",
    )
    for row in attack_rows(run):
        cells = [printable(row.name), percent_with(row.mixture)]
        if not single:
            *members, twin = row.parts
            alone = " ".join(map(percent, members)) if any(v is not None for v in members) else NONE
            cells += [percent(row.from_parts), alone, percent(twin)]
        add_row(table, [*cells, plain(row.worst_found, ".0f"), plain(total_seconds(row), ".1f")])
    table.add_section()
    worst, *others = worst_cases(run).values()
    cells = ["all points found", percent_with(worst)]
    if not single:
        cells += ["", " ".join(percent(m.value) for m in others[:-1]), percent(others[-1].value)]
    add_row(table, [*cells, "", ""], style="bold")
    return table


def total_seconds(row: AttackRow) -> float | None:
    """Wall seconds of an attack on the mixture and on its parts."""
    known = [seconds for seconds in (row.seconds, row.seconds_on_parts) if seconds is not None]
    return sum(known) if known else None
