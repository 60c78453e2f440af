"""What every attack found: the rows of its table, and the names of who is attacked.

Three classifiers are kept apart. The *mixture* draws a member with its weights; its accuracies are exact
expectations over the draw. A *member* stands alone. The *averaged twin* predicts the argmax of the members'
averaged probabilities: a deterministic classifier, never called the mixture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mixadv.redaction import printable
from mixadv.report.cells import Column, Table, seen
from mixadv.report.files import Run
from mixadv.report.names import group_name
from mixadv.results import UNKNOWN, Accuracy, Attack, Curve

TWIN = "averaged twin"
WHOLE = ("mixture", "model")  # the latter where there is one member


def classifiers(run: Run) -> list[str]:
    """Names of who is attacked: "mixture", "member 0", ..., "averaged twin"; with one member it is all there is."""
    count = len(run.results.members) or run.num_members or 0
    return ["model"] if count == 1 else ["mixture", *(f"member {k}" for k in range(count)), TWIN]


def is_single(run: Run) -> bool:
    """Whether there is one member, so that model, mixture and averaged twin are one."""
    return classifiers(run)[0] == "model"


def worst_cases(run: Run) -> dict[str, Accuracy]:
    """Per classifier the accuracy on the worst of all points found by anyone, with its interval."""
    twin = run.results.averaged_twin
    known = dict.fromkeys(WHOLE, run.robust) | {TWIN: twin.robust if twin else UNKNOWN}
    known |= {f"member {k}": member.robust for k, member in enumerate(run.results.members)}
    return {who: known.get(who, UNKNOWN) for who in classifiers(run)}


class Lines(NamedTuple):
    """Values [n] per classifier over ascending x [n], nan where the files have a gap."""

    x: np.ndarray
    of: dict[str, np.ndarray]


def lines_of(run: Run, curve: Curve | None) -> Lines | None:
    """The lines of a curve of the results; None where there is none."""
    if curve is None:
        return None
    given = {**dict.fromkeys(WHOLE, curve.mixture), TWIN: curve.averaged_twin}
    given |= {f"member {k}": values for k, values in enumerate(curve.members)}
    order = np.argsort(curve.x, kind="stable")
    lines = {who: np.array(given[who], dtype=np.float64)[order] for who in classifiers(run) if given.get(who)}
    return Lines(np.array(curve.x)[order], lines) if lines else None


class AttackRow(NamedTuple):
    """What an evaluation found with one attack, or at all points.

    values: accuracy of every classifier when it is attacked itself, by name, the mixture first, that with its interval.
    attack: the entry of the results.
    """

    name: str
    values: dict[str, Accuracy]
    attack: Attack | None

    @property
    def parts(self) -> tuple[float | None, ...]:
        """The members' accuracies; () where none is known."""
        members = tuple(at.value for who, at in self.values.items() if who.startswith("member "))
        return members if any(value is not None for value in members) else ()

    @property
    def seconds(self) -> float | None:
        """Wall seconds of the attack on the mixture and on its parts."""
        spent = (self.attack.seconds, self.attack.seconds_on_parts) if self.attack else ()
        known = [seconds for seconds in spent if seconds is not None]
        return sum(known) if known else None

    def get(self, name: str) -> Any:
        """An entry of the attack; "" where the row is not of one attack."""
        return "" if self.attack is None else getattr(self.attack, name)


def attack_rows(run: Run) -> list[AttackRow]:
    """One row for each attack, in the order of the protocol."""
    rows = []
    for name, attack in run.results.attacks.items():
        known = {f"member {k}": Accuracy(value) for k, value in enumerate(attack.members)}
        known |= dict.fromkeys(WHOLE, Accuracy.of(attack.mixture, run.num_examples))
        known[TWIN] = Accuracy(attack.averaged_twin)
        rows.append(AttackRow(name, {who: known.get(who, UNKNOWN) for who in classifiers(run)}, attack))
    return rows


# Views: `accuracy` on a console, `page` and `cost` on a page; `parts` where there are several members.
ATTACKS: tuple[Column[AttackRow], ...] = (
    Column("attack", "attack", lambda row: printable(row.name), views="accuracy page cost", words=True, fold=1),
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


def attacks_table(run: Run, view: str = "accuracy") -> Table[AttackRow]:
    """Per attack: accuracies of everybody when attacked themselves, worst cases it was first to find, what it cost.

    "from parts" is the mixture's expected accuracy at the points that the attack found against its parts;
    "seconds" counts those passes as well.
    """
    columns = seen(ATTACKS, view)
    if is_single(run):
        columns = [column for column in columns if "parts" not in column.views.split()]
        columns = [replace(c, heading="model % [95 %]") if c.key == "mixture" else c for c in columns]
    if view != "accuracy":
        return Table("Accuracy per attack" if view == "page" else "Cost and settings", columns, attack_rows(run))
    rows = [*attack_rows(run), AttackRow("all points found", worst_cases(run), None)]
    last = len(rows) - 1
    return Table(
        "Accuracy per attack",
        columns,
        rows,
        caption="Each classifier is attacked itself. From parts: the mixture at the points found against its parts. "
        "Worst found: images whose worst point this attack, on whomever, was the first to find.",
        bold=(last,),
        sections=(last - 1,),
    )


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
