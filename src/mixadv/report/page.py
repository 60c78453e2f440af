"""`report.html`: one page with everything that a reader of an evaluation asks for, from the files of its run.

The page is whole by itself: figures and style are inside it, it runs no script, and a content policy forbids it to
load anything. Its words stand in `page.html.j2`, which escapes all that comes from files; here is what they are about.
Every cell that shows an accuracy, a risk or a time carries the number in full precision.
"""

from __future__ import annotations

import base64
import json
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mixadv import records
from mixadv.redaction import printable
from mixadv.report.attacks import TWIN, attack_rows, attacks_table, classifiers, is_single
from mixadv.report.cells import Column, Table
from mixadv.report.citations import papers_of
from mixadv.report.compare import baseline_sentence, member_sentence
from mixadv.report.figures.evaluation import eps_lines, evaluation_figures, steps_lines
from mixadv.report.figures.examples import MOST, Examples, read_examples, wrong_members
from mixadv.report.figures.style import save
from mixadv.report.files import Run, opened, writing
from mixadv.report.names import format_ball, format_eps
from mixadv.report.records import measured
from mixadv.report.tables import results_table
from mixadv.results import Game

CHECKS = {
    "zero-gradients": "gradients that vanish at the clean images",
    "probabilities": "members that return probabilities where logits are expected",
    "random-outputs": "outputs that differ from call to call",
    "batch-dependent": "outputs that depend on the other images of the batch",
    "black-box-beats-white-box": "an attack without gradients that finds more than those with them",
    "noise-beats-pgd": "random noise that finds more than PGD",
    "more-steps-do-not-hurt": "a loss that does not grow with the number of steps",
    "larger-eps-does-not-hurt": "an accuracy that does not fall as the ball grows",
    "ce-and-dlr-disagree": "two losses of the same attack that lead to very different accuracies",
    "robust-above-clean": "an accuracy under attack above the clean one",
    "survives-grey": "accuracy that is left where the ball holds a grey image",
}
_HERE = Path(__file__).parent


def write_report(run: Run | str | Path) -> Path:
    """Draw the figures of an evaluation anew and write `report.html` with them inside, whole or not at all.

    Works on any run directory: what its files do not say is named as missing, and so is what cannot be read.

    Raises:
        UserError: there is no such directory, or it cannot be written.
    """
    run = opened(run)
    damage: list[str] = []
    examples = None
    with _noting(damage):
        examples = read_examples(run)
    drawn = {name: save(build, run.path / name) for name, build in evaluation_figures(run, examples).items()}
    if (run.path / "curves.png").is_file():
        drawn["curves.png"] = run.path / "curves.png"
    found, pictures = None, {}
    with _noting(damage):
        found = _found(run)
    for name, path in drawn.items():
        with _noting(damage):
            pictures[name] = _picture(path)
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_shown,
    )
    environment.filters["exact"] = repr
    page = environment.get_template("page.html.j2").render(
        **_about(run),
        **_doubts(run),
        run=run,
        results=run.results,
        damage=[*run.notes, *damage],
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        comparisons=[sentence for sentence in (member_sentence(run), baseline_sentence(run)) if sentence],
        classifiers=_classifiers(run),
        rows=attack_rows(run),
        tables=[attacks_table(run, view) for view in ("page", "cost")],
        found=found,
        game=run.results.game or Game(),
        needed=_needed(run),
        drawn=list(drawn),
        pictures=pictures,
        curves={"eps": eps_lines(run), "steps": steps_lines(run)},
        examples=_in_examples(examples) if "examples.png" in drawn else [],
        radius=format_eps,
        config=json.dumps(run.config, indent=2, ensure_ascii=False, default=str),
        papers=papers_of(run.results.attacks),
    )
    path = run.path / "report.html"
    with writing(path) as temporary:
        temporary.write_text(page + "\n", encoding="utf-8")
    return path


@contextmanager
def _noting(damage: list[str]) -> Iterator[None]:
    """Turn a ValueError into a line of `damage`."""
    try:
        yield
    except ValueError as error:
        damage.append(" ".join(str(error).split()))


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value, keep="\n")


def _about(run: Run) -> dict[str, Any]:
    """What was measured, and how."""
    ball = format_ball(run.norm, run.eps) if run.eps is not None else ""
    protocol = f"protocol {run.results.protocol}" if run.results.protocol else ""
    count = len(run.results.members) or run.num_members
    return {
        "what": "one classifier" if count == 1 else f"a mixture of {count} classifiers" if count else "a mixture",
        "about": [part for part in (run.data, ball, protocol, run.images) if part],
        "ball": ball,
        "single": is_single(run),
        "first": classifiers(run)[0],
    }


def _doubts(run: Run) -> dict[str, Any]:
    ran = run.results.checks
    return {
        "checks": CHECKS,
        "ran": ran,
        "unchecked": [name for name in CHECKS if ran is not None and name not in ran],
    }


def _classifiers(run: Run) -> Table[Any]:
    # Of one classifier alone there are neither members nor an averaged twin.
    who = ["mixture"] if is_single(run) else classifiers(run)
    return results_table(run, "Accuracy of everybody, clean and attacked", [*who, "baseline"])


class _Finder(NamedTuple):
    """An attack, and by whom it was aimed at, how often it was the first to find the worst case."""

    attack: str
    counts: dict[str, int]


def _found(run: Run) -> dict[str, Any] | None:
    """Who was first to find the worst cases; None where the records do not say.

    Raises:
        ValueError: they are damaged.
    """
    if not (run.path / records.RECORDS).exists():
        return None
    found = run.records.get(records.FOUND_BY)
    if found is None:
        return None
    if found.shape != measured(run).labels.shape:
        raise ValueError(f"{run.path / records.RECORDS} does not name an attack for each image")
    counts = Counter(_attack_and_target(str(name)) for name in found)
    stayed = counts.pop((records.CLEAN, ""), 0)
    targets = list(dict.fromkeys(["mixture", "members", TWIN, *(whom for _, whom in sorted(counts))]))
    names = dict.fromkeys([*run.results.attacks, *(name for name, _ in sorted(counts))])
    rows = [_Finder(name, {whom: counts[name, whom] for whom in targets}) for name in names]
    columns: list[Column[_Finder]] = [Column("attack", "attack", lambda row: row.attack, words=True)]
    columns += [Column(whom, f"aimed at {whom}", partial(_count, whom=whom), "d") for whom in targets]
    shown = rows if counts and not is_single(run) else []
    return {"table": Table("Who was first to find the worst cases, in images", columns, shown), "stayed": stayed}


def _count(row: _Finder, whom: str) -> int:
    return row.counts[whom]


def _attack_and_target(key: str) -> tuple[str, str]:
    name, _, whom = key.partition(records.ON)
    if key == records.CLEAN:
        return key, ""
    known = {"member": "members", "averaged": TWIN, "other": "other weights"}
    return name, known.get(whom.partition(" ")[0], whom or "mixture")


def _needed(run: Run) -> float | None:
    """What the matching-penny gap has to exceed: the mean risk of the members less the least; None if not known."""
    known = [member.robust.value for member in run.results.members]
    accuracies = [value for value in known if value is not None]
    weights = run.results.weights
    if len(known) < 2 or len(accuracies) < len(known) or not weights:
        return None
    return max(accuracies) - sum(weight * value for weight, value in zip(weights, accuracies, strict=True))


def _picture(path: Path) -> dict[str, Any]:
    """A figure as the page holds it, with its size, so that nothing moves while it is decoded."""
    png = path.read_bytes()
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError(f"{path.name} is not a png")
    width, height = struct.unpack(">II", png[16:24])
    return {"data": base64.b64encode(png).decode("ascii"), "width": width, "height": height}


def _in_examples(examples: Examples | None) -> list[tuple[str, str]]:
    """The label of each image of examples.png, and which members are wrong there."""
    assert examples is not None
    return [(label, wrong_members(examples.correct[:, i])) for i, label in enumerate(examples.labels[:MOST])]
