"""The accuracies of each classifier under each attack, and their table.

There are three kinds of classifiers. The *mixture* draws a member with its weights; its accuracies are exact
expectations over the draw. A *member* is used alone. The *averaged twin* predicts the argmax of the members' averaged
probabilities; it is deterministic, and it is not the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mixadv.redaction import printable
from mixadv.report.cells import Column, Table, of_view
from mixadv.report.files import Run
from mixadv.report.names import group_name
from mixadv.results import UNKNOWN, Accuracy, AttackResult, Curve

TWIN = "averaged twin"
WHOLE = ("mixture", "model")  # "model" if L = 1
T = TypeVar("T")


def classifiers(run: Run) -> list[str]:
    """The names of the classifiers: "mixture", "member 0", ..., "averaged twin"; only "model" if L = 1."""
    count = len(run.results.members) or run.num_members or 0
    return ["model"] if count == 1 else ["mixture", *(f"member {k}" for k in range(count)), TWIN]


def is_single(run: Run) -> bool:
    """Whether L = 1: the mixture, its member and the averaged twin are the same classifier."""
    return classifiers(run)[0] == "model"


def shown_as(run: Run, who: str, most: int = 17) -> str:
    """The name of a classifier in figures: of a member its number and what is known of its name, in `most` letters."""
    k = int(who.removeprefix("member ")) if who.startswith("member ") else -1
    name = run.results.members[k].name if 0 <= k < len(run.results.members) else None
    if not name:
        return who
    name, room = printable(name), most - len(f"{k}: ")
    return f"{k}: {name if len(name) <= room else '…' + name[1 - room :]}"


def _by_classifier(run: Run, mixture: T, members: Sequence[T], twin: T, unknown: T) -> dict[str, T]:
    """Classifier -> its value; `unknown` for members without one."""
    known = {**dict.fromkeys(WHOLE, mixture), TWIN: twin, **{f"member {k}": one for k, one in enumerate(members)}}
    return {name: known.get(name, unknown) for name in classifiers(run)}


def worst_cases(run: Run) -> dict[str, Accuracy]:
    """Classifier -> its accuracy at the worst of all points found in all passes."""
    twin, members = run.results.averaged_twin, [member.robust for member in run.results.members]
    return _by_classifier(run, run.robust, members, twin.robust if twin else UNKNOWN, UNKNOWN)


class Lines(NamedTuple):
    """Classifier -> values [n] over ascending x [n]; nan if a value is unknown."""

    x: np.ndarray
    of: dict[str, np.ndarray]


def lines_of(run: Run, curve: Curve | None) -> Lines | None:
    """The lines of a curve of the results; None without values."""
    if curve is None:
        return None
    given = _by_classifier(run, curve.mixture, curve.members, curve.averaged_twin, ())
    order = np.argsort(curve.x, kind="stable")
    lines = {name: np.array(values, dtype=np.float64)[order] for name, values in given.items() if values}
    return Lines(np.array(curve.x)[order], lines) if lines else None


class AttackRow(NamedTuple):
    """One attack of an evaluation, or all of them together.

    Attributes:
        name: of the attack.
        values: classifier -> its accuracy when it is attacked itself. The mixture is first and has an interval.
        attack: the entry of the results; None for all attacks together.
    """

    name: str
    values: dict[str, Accuracy]
    attack: AttackResult | None

    @property
    def parts(self) -> tuple[float | None, ...]:
        """The members' accuracies [L]; () if all are unknown."""
        members = tuple(at.value for name, at in self.values.items() if name.startswith("member "))
        return members if any(value is not None for value in members) else ()

    @property
    def seconds(self) -> float | None:
        """Wall seconds of the attack on the mixture and on its parts."""
        spent = (self.attack.seconds, self.attack.seconds_on_parts) if self.attack else ()
        known = [seconds for seconds in spent if seconds is not None]
        return sum(known) if known else None

    def get(self, name: str) -> Any:
        """An attribute of the attack; "" for all attacks together."""
        return "" if self.attack is None else getattr(self.attack, name)


def attack_rows(run: Run) -> list[AttackRow]:
    """One row per attack, in the order of the protocol."""
    rows = []
    for name, attack in run.results.attacks.items():
        mixture, members = Accuracy.of(attack.mixture, run.num_examples), [Accuracy(value) for value in attack.members]
        values = _by_classifier(run, mixture, members, Accuracy(attack.averaged_twin), UNKNOWN)
        rows.append(AttackRow(name, values, attack))
    return rows


# Views: `accuracy` on the console, `page` and `cost` on the page; `parts`: left out if L = 1.
ATTACKS: tuple[Column[AttackRow], ...] = (
    Column("attack", "attack", lambda row: printable(row.name), views="accuracy page cost", words=True, fold=17),
    Column("mixture", "mixture % [95 %]", lambda row: next(iter(row.values.values())), ".1%", views="accuracy page"),
    Column(
        "from_parts",
        "from parts %",
        lambda row: row.get("replayed_from_parts"),
        ".1%",
        views="accuracy page parts",
        fold=7,
    ),
    Column("members", "members %", lambda row: row.parts, ".1%", views="accuracy page parts", fold=7),
    Column(TWIN, f"{TWIN} %", lambda row: row.values[TWIN].value, ".1%", views="accuracy page parts", fold=8),
    Column("worst_found", "worst found", lambda row: row.get("worst_found"), views="accuracy page", fold=5),
    Column("total", "seconds", lambda row: row.seconds if row.attack else "", ".1f", views="accuracy"),
    Column("seconds", "seconds", lambda row: row.get("seconds"), ".1f", views="cost"),
    Column("on_parts", "seconds on parts", lambda row: row.get("seconds_on_parts"), ".1f", views="cost"),
    Column(
        "settings",
        "settings",
        lambda row: settings_text(row.get("settings")) or "not recorded",
        views="cost",
        words=True,
    ),
)


_OF_PARTS = "Each classifier is attacked itself. From parts: the mixture at the points found against its parts. "


def attacks_table(run: Run, view: str = "accuracy") -> Table[AttackRow]:
    """Per attack: the accuracies of the attacked classifiers, the number of worst cases found, seconds, settings.

    "from parts" is the mixture's expected accuracy at the points that the attack found against its parts. "seconds"
    includes the attacks on the parts.
    """
    columns = of_view(ATTACKS, view)
    if is_single(run):
        columns = [column for column in columns if "parts" not in column.views.split()]
        columns = [replace(c, heading="model % [95 %]") if c.key == "mixture" else c for c in columns]
    if view != "accuracy":
        return Table("Accuracy per attack" if view == "page" else "Cost and settings", columns, attack_rows(run))
    on_any = "" if is_single(run) else ", on any classifier"
    rows = [*attack_rows(run), AttackRow("all points found", worst_cases(run), None)]
    last = len(rows) - 1
    return Table(
        "Accuracy per attack",
        columns,
        rows,
        caption=("" if is_single(run) else _OF_PARTS)
        + f"Worst found: number of images whose worst point was first found by this attack{on_any}.",
        bold=(last,),
        sections=(last - 1,),
    )


def settings_text(settings: Any, with_class: bool = True) -> str:
    """The settings of an attack as "PGD(num_steps=20, restarts=5)", or only its arguments; "" if unknown."""
    if not isinstance(settings, dict):
        return ""
    rest = ", ".join(
        f"{key}={group_name(value) if isinstance(value, dict) else value}"
        for key, value in settings.items()
        if key != "_target_"
    )
    built = str(settings.get("_target_") or "").rpartition(".")[2] if with_class else ""
    return f"{built}({rest})" if built else rest
