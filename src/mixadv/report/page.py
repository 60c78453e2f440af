"""`report.html`: an evaluation on one page, from the files of its run.

The page is self-contained: figures and style are embedded, it has no scripts, and its content policy forbids loading
anything. This module prepares the values; the text is in `page.html.j2`, which escapes all strings from files.
Numbers in cells also have their full precision, as the value of a `data` element.
"""

from __future__ import annotations

import base64
import json
import re
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
from mixadv.report.ceiling import ceiling_sentences
from mixadv.report.cells import Column, Table
from mixadv.report.citations import papers_of
from mixadv.report.classes import classes_table, write_images
from mixadv.report.compare import baseline_sentence, counterpart_sentences
from mixadv.report.figures.evaluation import eps_lines, evaluation_figures, steps_lines
from mixadv.report.figures.examples import MOST, Examples, read_examples, wrong_members
from mixadv.report.figures.regions import read_regions
from mixadv.report.figures.style import save
from mixadv.report.files import Run, opened, writing
from mixadv.report.growth import growth_sentence
from mixadv.report.names import format_ball, format_eps, trained_with
from mixadv.report.records import CONSTANT, VOTE, measured
from mixadv.report.tables import results_table
from mixadv.results import Flag, GameValue

CHECKS = {
    "non-finite-logits": "logits are NaN or infinite",
    "zero-gradients": "gradients vanish at random points of the ball",
    "saturated-logits": "a squashing function hides some classes from the gradient",
    "probabilities": "members return probabilities instead of logits",
    "random-outputs": "outputs differ from call to call",
    "batch-dependent": "outputs depend on the other images of the batch",
    "black-box-beats-white-box": "an attack without gradients finds more than those with gradients",
    "noise-beats-pgd": "random noise finds more than PGD",
    "more-steps-do-not-hurt": "the loss does not grow with the number of steps",
    "larger-eps-does-not-hurt": "the accuracy does not fall as eps grows",
    "ce-and-dlr-disagree": "two losses of the same attack lead to very different accuracies",
    "white-box-attacks-disagree": "two attacks with gradients on one member find very different numbers of errors",
    "robust-above-clean": "the accuracy under attack is above the clean accuracy",
    "survives-grey": "images are classified correctly although the ball contains a grey image",
    "above-the-ceiling": "more images survive than any classifier can be right on",
    "search-not-exhaustive": "the attacks did not try every set of members, so a longer search may find more",
}
_HERE = Path(__file__).parent


def write_report(run: Run | str | Path) -> Path:
    """Draw the figures of an evaluation and write `report.html`, which embeds them, and `images.csv`; atomically.

    Works on any run directory: the page names missing data and unreadable files.

    Raises:
        UserError: the directory does not exist or cannot be written.
    """
    run = opened(run)
    damage: list[str] = []
    examples, regions = None, None
    with _noting(damage):
        examples = read_examples(run)
    with _noting(damage):
        regions = read_regions(run)
    figures = evaluation_figures(run, examples, regions)
    drawn = {name: save(build, run.path / name) for name, build in figures.items()}
    if (run.path / "curves.png").is_file():
        drawn["curves.png"] = run.path / "curves.png"
    found, pictures, ran = None, {}, run.results.checks
    with _noting(damage):
        found = _found(run)
        if (run.path / records.RECORDS).exists():
            write_images(run)
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
        checks=CHECKS,
        ran=ran,
        unchecked=[name for name in CHECKS if ran is not None and name not in ran],
        run=run,
        results=run.results,
        damage=[*run.notes, *damage],
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        ceilings=ceiling_sentences(run),
        growth=growth_sentence(run),
        comparisons=[sentence for sentence in (*counterpart_sentences(run), baseline_sentence(run)) if sentence],
        counterparts=run.results.counterparts,
        classifiers=_classifiers(run),
        by_class=classes_table(run, None),
        rows=attack_rows(run),
        tables=[attacks_table(run, view) for view in ("page", "cost")],
        found=found,
        game=run.results.game or GameValue(),
        needed=_needed(run),
        drawn=list(drawn),
        pictures=pictures,
        curves={"eps": eps_lines(run), "steps": steps_lines(run)},
        examples=_in_examples(examples) if "examples.png" in drawn else [],
        radius=format_eps,
        flags=sorted(run.results.flags or (), key=lambda flag: is_about_weightless(run, flag)),
        weightless=lambda flag: is_about_weightless(run, flag),
        sources=_sources(run),
        config=_as_json(run.config),
        training=_as_json(run.results.training) if run.results.training else "",
        trained_with=trained_with(run.results.training if run.was_only_measured else run.config),
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


def _as_json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False, default=str)


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value, keep="\n")


def _about(run: Run) -> dict[str, Any]:
    """The values of the title, the headline and the texts of the figures."""
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


def _classifiers(run: Run) -> Table[Any]:
    names = ["mixture"] if is_single(run) else classifiers(run)
    return results_table(run, "Clean and robust accuracy", [*names, VOTE, CONSTANT, "baseline"])


def is_about_weightless(run: Run, flag: Flag) -> bool:
    """Whether all members that the evidence of a flag names have weight 0, and it names no mixture of them."""
    weights = run.results.weights
    listed = re.findall(r"\bmembers? (\d+(?:, \d+)*)", flag.evidence)
    named = {int(k) for text in listed for k in text.split(", ")}
    whole = re.search(r"\b(the mixture|averaged twin|vote)\b", flag.evidence)
    return bool(named) and not whole and all(k < len(weights) and weights[k] == 0 for k in named)


def _sources(run: Run) -> list[str]:
    """A line per member with a known source: name, source, and how its file was read."""
    return [
        f"member {k}: " + ", ".join(dict.fromkeys(part for part in (one.name, one.source, one.note) if part))
        for k, one in enumerate(run.results.members)
        if one.source
    ]


class _Finder(NamedTuple):
    """An attack, and target -> number of images whose worst case it found first against this target."""

    attack: str
    counts: dict[str, int]


def _found(run: Run) -> dict[str, Any] | None:
    """The table of the passes that found the worst cases first; None without records of that.

    Raises:
        ValueError: the records are damaged.
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
    targets = list(dict.fromkeys(["mixture", "members", TWIN, *(target for _, target in sorted(counts))]))
    names = dict.fromkeys([*run.results.attacks, *(name for name, _ in sorted(counts))])
    rows = [_Finder(name, {target: counts[name, target] for target in targets}) for name in names]
    columns: list[Column[_Finder]] = [Column("attack", "attack", lambda row: row.attack, words=True)]
    columns += [Column(target, f"on {target}", partial(_count, target=target), "d") for target in targets]
    shown = rows if counts and not is_single(run) else []
    return {"table": Table("Images by the attack that found their worst case first", columns, shown), "stayed": stayed}


def _count(row: _Finder, target: str) -> int:
    return row.counts[target]


def _attack_and_target(key: str) -> tuple[str, str]:
    """The attack of a pass, and the kind of classifier that it is against."""
    name, _, target = key.partition(records.ON)
    if key == records.CLEAN:
        return key, ""
    known = {"member": "members", "averaged": TWIN, "other": "other weights"}
    return name, known.get(target.partition(" ")[0], target or "mixture")


def _needed(run: Run) -> float | None:
    """Mean risk of the members minus the least; the mixture beats its best member if its gap is larger."""
    known = [member.robust.value for member in run.results.members]
    accuracies = [value for value in known if value is not None]
    weights = run.results.weights
    if len(known) < 2 or len(accuracies) < len(known) or not weights:
        return None
    return max(accuracies) - sum(weight * value for weight, value in zip(weights, accuracies, strict=True))


def _picture(path: Path) -> dict[str, Any]:
    """A png in base64, with its size: the browser reserves the space before it decodes the image."""
    png = path.read_bytes()
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError(f"{path.name} is not a png")
    width, height = struct.unpack(">II", png[16:24])
    return {"data": base64.b64encode(png).decode("ascii"), "width": width, "height": height}


def _in_examples(examples: Examples | None) -> list[tuple[str, str]]:
    """For each image of examples.png its label, and which members are wrong."""
    assert examples is not None
    return [(label, wrong_members(examples.correct[:, i])) for i, label in enumerate(examples.labels[:MOST])]
