"""What randomising gains over several data sets: the mixture of each run beside its counterparts and both ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mixadv.report.attacks import TWIN
from mixadv.report.ceiling import percent
from mixadv.report.cells import Column, Table, text_of
from mixadv.report.compare import Comparison, compare_with_baseline, compare_with_best_member, compare_with_counterparts
from mixadv.report.files import Run
from mixadv.report.names import format_ball, short_names
from mixadv.report.records import CONSTANT, VOTE
from mixadv.results import UNKNOWN, Accuracy, CeilingRow, Counterparts

MIXTURE, SINGLE, BEST = "mixture", "single model", "best member"
# In the order of tables, figures and sentences.
COUNTERPARTS = (SINGLE, BEST, VOTE, TWIN, CONSTANT)


class Standing(NamedTuple):
    """The mixture of a run beside the deterministic classifiers that are compared with it.

    Attributes:
        name: the short name of the run.
        robust: "mixture" and each of `COUNTERPARTS` -> its accuracy under attack; unknown ones are left out.
        margins: counterpart -> mixture minus it; without those that the files do not allow to compare.
        ceiling: what any classifier and any mixture can reach on the measured images; None if unknown.
    """

    run: Run
    name: str
    robust: Mapping[str, Accuracy]
    margins: Mapping[str, Comparison]
    ceiling: CeilingRow | None


def standings(runs: Sequence[Run]) -> list[Standing]:
    """One for each mixture with results, the largest possible gain first; [] unless they are of several data sets."""
    mixtures = [run for run in runs if run.robust.value is not None and len(run.results.members) > 1]
    if len({run.data for run in mixtures}) < 2:
        return []
    found = [_standing(run, name) for run, name in zip(mixtures, _names(mixtures), strict=True)]
    return sorted(found, key=lambda one: -(one.ceiling.gain_at_most or 0.0) if one.ceiling is not None else 0.0)


def _names(runs: Sequence[Run]) -> list[str]:
    """The short names of the runs, without a key that all begin with: those of a sweep over one key are its values."""
    names = short_names([run.path for run in runs])
    keys = {name.partition("=")[0] for name in names if "=" in name}
    shared = f"{keys.pop()}=" if len(keys) == 1 else ""
    return [name.removeprefix(shared) for name in names] if all(name.startswith(shared) for name in names) else names


def _standing(run: Run, name: str) -> Standing:
    known = run.results.counterparts or Counterparts()
    parts = {BEST: known.best_member, VOTE: known.vote, TWIN: known.averaged_twin, CONSTANT: known.constant}
    robust = {who: one.robust for who, one in parts.items() if one is not None}
    robust |= {MIXTURE: run.robust, SINGLE: run.baseline.robust if run.baseline else UNKNOWN}
    margins = compare_with_counterparts(run)
    if (member := compare_with_best_member(run)) is not None:
        margins[BEST] = member[2]
    if (single := compare_with_baseline(run)) is not None:
        margins[SINGLE] = single
    row = next(iter(run.results.ceiling), None)
    return Standing(run, name, {who: at for who, at in robust.items() if at.value is not None}, margins, row)


def _of(who: str) -> Column[Standing]:
    return Column(who, who, lambda standing: standing.robust.get(who, UNKNOWN).value, ".1%", fold=len(who.split()[0]))


COLUMNS: tuple[Column[Standing], ...] = (
    Column("run", "run", lambda standing: standing.name, words=True, fold=15),
    Column("", "any classifier ≤", lambda standing: _upper(standing, "deterministic"), ".1%", fold=10),
    Column("", "any mixture ≤", lambda standing: _upper(standing, "randomised"), ".1%", fold=7),
    *map(_of, (MIXTURE, *COUNTERPARTS)),
)


def _upper(standing: Standing, which: str) -> float | None:
    return None if standing.ceiling is None else getattr(standing.ceiling, f"{which}_upper")


def gains_table(found: Sequence[Standing]) -> Table[Standing]:
    """One row for each mixture: both ceilings, and the accuracies under attack of the mixture and its counterparts."""
    caption = (
        "Accuracy under attack, %. Any classifier, any mixture: no model of any size can exceed this on these images.\n"
        "Single model: trained alone for the same epochs. Best member and constant answer: chosen on validation images."
    )
    return Table("What randomising gains", COLUMNS, found, caption)


def gains_sentences(found: Sequence[Standing]) -> list[str]:
    """What each run shows, in plain words, and how far these numbers reach."""
    reach = (
        "Differences are paired by image. Their intervals take the test images as independent draws and do not cover "
        "the training seed. The single model has as many epochs as each member. A stronger attack can only lower the "
        "accuracies under attack."
    )
    return [*map(_sentences, found), reach]


def _sentences(standing: Standing) -> str:
    run = standing.run
    about = ", ".join(part for part in (run.data, format_ball(run.norm, run.eps), run.images) if part)
    return f"{standing.name} ({about}): {_allowed(standing.ceiling)} {_reached(standing)} {_compared(standing)}".strip()


def _allowed(row: CeilingRow | None) -> str:
    if row is None or row.in_conflict is None:
        return "What any classifier can reach here is not known."
    if row.in_conflict == 0:
        return (
            "No two of these images of different classes conflict, so some classifier is right on all of them under "
            "attack: over all classifiers randomising has nothing to add."
        )
    if row.deterministic_upper is None or row.randomised_upper is None or row.gain_at_most is None:
        return "What any classifier can reach here was not computed; task=ceiling bounds it."
    if row.gain_at_most <= 0:
        return (
            f"No classifier and no mixture can be right on more than {percent(row.randomised_upper)} % under attack: "
            "over all classifiers randomising has nothing to add."
        )
    return (
        f"No classifier can be right on more than {percent(row.deterministic_upper)} % of these images under attack, "
        f"and no mixture on more than {percent(row.randomised_upper)} %."
    )


def _reached(standing: Standing) -> str:
    value, row = standing.run.robust.value, standing.ceiling
    assert value is not None
    words = f"The mixture reaches {text_of(value)} %"
    gain = row.gain_at_most if row is not None else None
    if row is None or not gain or not row.randomised_upper:
        return f"{words}."
    words += f", {100 * value / row.randomised_upper:.0f} % of its ceiling"
    same_images = row.num_examples == standing.run.num_examples
    if same_images and row.deterministic_upper is not None and value > row.deterministic_upper:
        return f"{words}: at the points that were found, more than any classifier can have."
    return f"{words}."


def _compared(standing: Standing) -> str:
    groups: dict[str, list[str]] = {"ahead": [], "open": [], "behind": []}
    for who in COUNTERPARTS:
        margin = standing.margins.get(who)
        if margin is None:
            continue
        points, low, high = margin.in_points()
        words = f"the {who} ({points} points [{low}, {high}])"
        groups[margin.verdict("ahead", "behind", "open")].append(words)
    parts: list[str] = []
    if groups["ahead"]:
        parts.append(f"It is more robust than {_listed(groups['ahead'])}.")
    if groups["open"]:
        parts.append(f"No difference is shown from {_listed(groups['open'])}.")
    if groups["behind"]:
        parts.append(f"It is less robust than {_listed(groups['behind'])}.")
    row = standing.ceiling
    if parts and not groups["ahead"]:
        parts.append("Nothing shows that mixing helps here.")
    elif len(parts) == 1 and row is not None and row.gain_at_most == 0:
        parts.append("But some classifier could do as well alone.")
    return " ".join(parts)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
