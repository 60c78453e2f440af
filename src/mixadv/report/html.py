"""`report.html`: one page with everything that a reader of an evaluation asks for, from the files of its run.

The page is whole by itself: figures and style are inside it, it runs no script, and a content policy forbids it to
load anything. Every cell of its tables that shows an accuracy, a risk or a time carries the number in full
precision as the value of a `data` element.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixadv.report.attack_figures import ALTS, evaluation_figures, noting
from mixadv.report.attacks import entries, flags_of, is_single
from mixadv.report.citations import BIBTEX, OURS, papers_of
from mixadv.report.comparison import comparison_sentence, member_sentence
from mixadv.report.figures import save
from mixadv.report.files import Run, read_run, replacing
from mixadv.report.html_tables import attacks_section, classifiers_section, found_by, game_section
from mixadv.report.markup import Markup, alone, joined, lines, note, percent, percent_interval, picture, section, tag
from mixadv.report.names import format_ball, number

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
    "left-the-ball": "points outside the ball or the box, or not finite",
}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_dir: str | Path) -> Path:
    """Draw the figures of an evaluation anew and write `report.html` with them inside, whole or not at all.

    Works on any run directory: what its files do not say is named as missing, and so is what cannot be read.

    Raises:
        UserError: there is no such directory, or it cannot be written.
    """
    run = read_run(run_dir)
    figures, damage = evaluation_figures(run)
    drawn = {name: save(build, run.path / name).read_bytes() for name, build in figures.items()}
    if (run.path / "curves.png").is_file():
        drawn["curves.png"] = (run.path / "curves.png").read_bytes()
    found = found_by(run, damage)
    pictures = _pictures(run, drawn, damage)
    parts = [_title(run), _state(run, damage), _headline(run), _flags(run), classifiers_section(run)]
    parts += [attacks_section(run, found), game_section(run), section("Figures", *pictures), _measured(run)]
    parts += [_citation(run)]
    style = Markup((Path(__file__).with_name("page.css")).read_text(encoding="utf-8"))
    head = tag(
        "head",
        alone("meta", charset="utf-8"),
        alone("meta", name="viewport", content="width=device-width, initial-scale=1"),
        alone("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", " · ".join(["mixadv", *_about(run)])),
        tag("style", style),
    )
    page = joined([Markup("<!DOCTYPE html>\n"), tag("html", head, tag("body", tag("main", *parts)), lang="en"), "\n"])
    path = run.path / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


# --- what was asked, and the answer ------------------------------------------------------------------------


def _about(run: Run) -> list[str]:
    protocol = run.get("protocol")
    parts = [run.data, format_ball(run.norm, run.eps) if run.eps is not None else ""]
    parts += [f"protocol {protocol}" if protocol else "", _images(run)]
    return [part for part in parts if part]


def _images(run: Run) -> str:
    if run.num_examples is None:
        return ""
    whole = number(run.get("data", "num_test"))
    return f"{run.num_examples:,}{f' of {whole:,.0f}' if whole and whole > run.num_examples else ''} test images"


def _title(run: Run) -> Markup:
    count = len(run.members) or run.num_members
    what = "one classifier" if count == 1 else f"a mixture of {count} classifiers" if count else "a mixture"
    about = " · ".join(_about(run)) or "the files do not say on which data and within which ball"
    return tag("header", tag("h1", f"Robustness of {what}"), tag("p", about, class_="about"))


def _state(run: Run, damage: Sequence[str]) -> Markup:
    said = []
    if run.state != "done":
        said.append(f"This run is {run.state}{f': {run.reason}' if run.reason else ''}.")
    said += [f"Damaged: {what}" for what in (*run.notes, *damage)]
    return tag("div", *[tag("p", tag("strong", words)) for words in said], class_="state") if said else joined([])


def _headline(run: Run) -> Markup:
    robust, clean = run.robust, run.clean
    if robust.value is None:
        return tag("div", tag("p", "Robust accuracy: not measured.", class_="number"), class_="headline")
    if robust.low is None or robust.high is None:
        interval = joined([" (no interval is recorded)"])
    else:
        interval = joined([", 95 % interval ", percent(robust.low), " to ", percent(robust.high), " %"])
    who = "the model is right" if is_single(run) else "a member drawn with the weights λ is right"
    size = _images(run) or "the test images"
    within = f" within {format_ball(run.norm, run.eps)}" if run.eps is not None else ""
    meaning = (
        f"This is the probability that {who} at the worst point that any attack below found{within}, the clean image "
        f"included, on average over {size}. Attacks search and prove nothing: on these images the true robust "
        "accuracy can be lower and not higher, so the number is an upper bound. The interval is for the draw of the "
        "test images; it says nothing about stronger attacks or another training seed."
    )
    return tag(
        "div",
        tag("p", "Robust accuracy at most ", percent(robust.value), " %", interval, class_="number"),
        tag("p", meaning),
        tag("p", "Clean accuracy: ", percent_interval(clean), " %."),
        *[tag("p", said) for said in (member_sentence(run), comparison_sentence(run)) if said],
        class_="headline",
    )


def _flags(run: Run) -> Markup:
    flags, checked = flags_of(run), run.get("checks")
    ran = [str(name) for name in checked] if isinstance(checked, list) else None
    boxes = [
        tag(
            "div",
            tag("p", tag("strong", flag.name or "flag"), *([f": {CHECKS[flag.name]}"] if flag.name in CHECKS else [])),
            tag("p", flag.evidence),
            *([tag("p", "Remedy: ", flag.remedy)] if flag.remedy else []),
            class_="flag",
        )
        for flag in flags
    ]
    if not isinstance(run.get("flags"), list):
        boxes.append(tag("p", "The results do not say whether anything was flagged."))
    elif not flags:
        boxes.append(tag("p", tag("strong", "No flag was raised.")))
    names = list(CHECKS) if ran is None else ran
    said = "Checked: " if ran is not None else "The results do not say which of these checks ran: "
    items = [tag("li", tag("code", name), f": {CHECKS[name]}") for name in names if name in CHECKS]
    left = [name for name in CHECKS if name not in names]
    return section(
        "Reasons for doubt",
        *boxes,
        note(said, ", ".join(names) or "nothing", "."),
        *([note("Not checked: ", ", ".join(left), ".")] if left else []),
        *([tag("details", tag("summary", "What a check looks for"), tag("ul", *items))] if items else []),
    )


_CAPTIONS = {
    "attacks.png": "Accuracy per attack, and the worst case over all points found.",
    "eps.png": "Accuracy against the radius of the ball.",
    "steps.png": "Loss at the points found against the steps of the attack.",
    "examples.png": "Test images, clean and attacked.",
    "curves.png": "Training: accuracy, weights and losses over epochs.",
}


def _pictures(run: Run, drawn: dict[str, bytes], damage: list[str]) -> list[Markup]:
    shown = []
    for name, caption in _CAPTIONS.items():
        with noting(damage):
            if name in drawn:
                shown.append(picture(drawn[name], ALTS[name](run) if name in ALTS else caption, caption))
    missing = [name for name in ALTS if name not in drawn]
    if missing:
        shown.append(note("The run has no data for: ", ", ".join(missing), "."))
    return shown


# --- how it was measured, and whom to cite -----------------------------------------------------------------


def _measured(run: Run) -> Markup:
    versions, seconds = run.get("versions"), run.get("seconds")
    times = seconds.items() if isinstance(seconds, dict) else ()
    ball = f"{format_ball(run.norm, run.eps)} ({run.eps!r} in input units)"
    facts: dict[str, Any] = {
        "Task": run.get("task"),
        "Mixture": run.config.get("mixture"),
        "Data": " · ".join(part for part in (run.data, _images(run)) if part),
        "Threat model": ball if run.eps is not None else None,
        "Protocol": run.get("protocol"),
        "Hardware": run.get("device"),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "Commit": run.get("git"),
        "Seed": run.seed,
        "Seconds": ", ".join(f"{k} {v:.1f}" for k, s in times if (v := number(s)) is not None),
    }
    rows = [
        part
        for name, fact in facts.items()
        for part in (tag("dt", name), tag("dd", "not recorded" if fact is None or fact == "" else fact))
    ]
    config = lines(json.dumps(run.config, indent=2, ensure_ascii=False, default=str))
    details = tag("details", tag("summary", "Configuration"), config) if run.config else note("No configuration.")
    return section("How it was measured", tag("dl", *rows), details)


def _citation(run: Run) -> Markup:
    def item(paper: tuple[str, str]) -> Markup:
        words, number_ = paper
        return tag("li", words, " ", tag("a", f"arXiv:{number_}", href=f"https://arxiv.org/abs/{number_}"), ".")

    papers = [OURS, *papers_of(entries(run))]
    return section("How to cite", tag("ul", *map(item, papers)), lines(BIBTEX))
