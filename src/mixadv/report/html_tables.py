"""The tables of `report.html`: classifiers, attacks, who found the worst cases, and the game."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mixadv.report.attack_figures import noting
from mixadv.report.attacks import (
    TWIN,
    WHOLE,
    attack_rows,
    classifiers,
    entries,
    is_single,
    settings_text,
    wilson,
    worst_cases,
)
from mixadv.report.files import Run, read_arrays
from mixadv.report.markup import Markup, note, percent, percent_interval, plain, section, table, tag
from mixadv.report.names import number

_ON_PARTS = (
    "Every classifier is attacked itself; – where an attack is made for mixtures or not repeated on their parts. From "
    "parts: the mixture at the worst of the points that the attack found against members and averaged twin."
)

_ON_MIXTURES = (
    "The mixture's accuracies are exact expectations over the draw of a member. The averaged twin predicts the argmax "
    "of the members' averaged probabilities: another classifier, deterministic, whose accuracy says nothing about the "
    "mixture's."
)


def classifiers_section(run: Run) -> Markup:
    """Every member, the mixture, the averaged twin and the baseline: clean and robust accuracy."""
    worst, rows, single = worst_cases(run), [], is_single(run)
    for k, member in enumerate([] if single else run.members):
        name, weight = f"member {k}", plain(number(member.get("weight")), ".3f")
        who = ": ".join(str(part) for part in (name, member.get("name")) if part)
        rows.append([who, percent(number(member.get("clean"))), percent_interval(worst[name]), weight])
    rows.append([classifiers(run)[0], percent_interval(run.clean), percent_interval(run.robust), ""])
    if not single:
        clean = percent(number(run.get("averaged_twin", "clean")))
        rows.append([TWIN, clean, percent_interval(worst[TWIN]), ""])
    emphasis = [i for i, row in enumerate(rows) if row[0] in WHOLE]
    if (base := run.baseline) is not None:
        name = "baseline (one model)" if base.state == "done" else f"baseline ({base.state})"
        rows.append([name, percent_interval(base.clean), percent_interval(base.robust), ""])
    head = ["", "clean % [95 %]", "robust % [95 %]", "weight λ"]
    notes = [note("Robust: right at every point that was found against anyone.")]
    if not single:
        notes.append(note(_ON_MIXTURES))
    return section(
        "Classifiers",
        table("Accuracy of everybody, clean and attacked", head, rows, emphasis=emphasis),
        *notes,
    )


def attacks_section(run: Run, found: Counter[tuple[str, str]] | None) -> Markup:
    """Every attack against everybody, its cost and settings, and who found the worst cases."""
    rows, calls, everybody = [], [], classifiers(run)
    for name, values in attack_rows(run):
        entry = entries(run)[name]
        first, *others = values.values()
        cells = [name, percent_interval(wilson(first, run.num_examples)), *map(percent, others)]
        if not is_single(run):
            cells.append(percent(number(entry.get("replayed_from_parts"))))
        cells += [plain(number(entry.get("worst_found")), ".0f")]
        rows.append(cells)
        seconds = [plain(number(entry.get(key)), ".1f") for key in ("seconds", "seconds_on_parts")]
        calls.append([name, *seconds, settings_text(entry.get("settings")) or "not recorded"])
    if not rows:
        return section("Attacks", tag("p", "No attack is recorded."))
    head = ["attack", f"{everybody[0]} % [95 %]", *(f"{who} %" for who in everybody[1:])]
    head += [] if is_single(run) else ["from parts %"]
    head += ["worst found"]
    notes = [] if is_single(run) else [_ON_PARTS]
    notes.append("Worst found: images whose worst point this attack, whoever it was aimed at, was the first to find.")
    return section(
        "Attacks",
        table("Accuracy per attack", head, rows),
        note(" ".join(notes)),
        table("Cost and settings", ["attack", "seconds", "seconds on parts", "settings"], calls, words=[3]),
        *_who_found(run, found),
    )


def _who_found(run: Run, found: Counter[tuple[str, str]] | None) -> list[Markup]:
    if found is None:
        return [note("records.npz does not say which attack found each worst case.")]
    stayed = plain(found["clean", ""], "d")
    about = note("Images for which no attack found a worse point than the clean image itself: ", stayed, ".")
    attacked = [key for key in sorted(found) if key != ("clean", "")]
    if is_single(run) or not attacked:
        return [about]
    targets = list(dict.fromkeys(["mixture", "members", TWIN, *(whom for _, whom in attacked)]))
    names = list(dict.fromkeys([*entries(run), *(name for name, _ in attacked)]))
    rows = [[name, *(plain(found[name, whom], "d") for whom in targets)] for name in names]
    head = ["attack", *(f"aimed at {whom}" for whom in targets)]
    return [table("Who was first to find the worst cases, in images", head, rows), about]


def found_by(run: Run, damage: list[str]) -> Counter[tuple[str, str]] | None:
    """How often each (attack, whom it was aimed at) was the first to find the worst case; ("clean", "") for none."""
    with noting(damage):
        arrays = read_arrays(run.path / "records.npz") or {}
        found, robust = arrays.get("found_by"), arrays.get("robust")
        if found is None or robust is None:
            return None
        stale = robust.dtype.kind != "f" or len(found) != len(robust) or run.robust.value is None
        if stale or abs(float(robust.mean()) - (run.robust.value or 0.0)) > 1e-4:
            raise ValueError(f"{run.path / 'records.npz'} does not belong to its results.json")
        return Counter(_attack_and_target(str(name)) for name in found)
    return None


def _attack_and_target(key: str) -> tuple[str, str]:
    name, _, whom = key.partition(" on ")
    if key == "clean":
        return key, ""
    known = {"member": "members", "averaged": TWIN, "other": "other weights"}
    return name, known.get(whom.partition(" ")[0], whom or "mixture")


def game_section(run: Run) -> Markup:
    """Value, regret and matching-penny gap in words."""
    value, least, regret, penny = (
        number(run.get("game", key)) for key in ("value_at_weights", "value_lp", "gap", "matching_penny_gap")
    )
    if is_single(run):
        return section("The game", tag("p", "One member has no weights to choose: there is no game to solve."))
    said = []
    if value is not None:
        said.append(tag("li", "Risk of these weights on all points found: ", plain(value), "."))
    if least is not None:
        said.append(
            tag(
                "li",
                *("Least risk that any weights over these members have on these points: ", plain(least), ". "),
                "No mixture of these members has a lower risk on these images, whatever its weights.",
            )
        )
    if regret is not None:
        said.append(
            tag(
                "li",
                *("Regret of these weights on these points: ", plain(regret), ". Other weights would gain at most "),
                *(percent(regret), " points here; an attacker who knows them would take some of that back."),
            )
        )
    if penny is not None:
        said.append(
            tag(
                "li",
                *("Matching-penny gap: ", plain(penny), ". What the attacker loses, on average over images, because "),
                "one point must fool all members at once instead of each member having a point of its own. ",
                *_advantage(run),
            )
        )
    if not said:
        said.append(tag("li", "Not computed in this run."))
    return section("The game", tag("ul", *said))


def _advantage(run: Run) -> list[Any]:
    weights = [number(member.get("weight")) for member in run.members]
    risks = [None if (r := number(member.get("robust"))) is None else 1 - r for member in run.members]
    if len(risks) < 2 or None in risks or None in weights:
        return []
    average = sum((w or 0.0) * (r or 0.0) for w, r in zip(weights, risks, strict=True))
    needed = average - min(r for r in risks if r is not None)
    return [
        "The mixture is better than its best member exactly if the gap exceeds ",
        plain(needed),
        ", the mean risk of the members less the least.",
    ]
