"""`report.html`: one page with everything that a reader of an evaluation asks for, from the files of its run.

The page is whole by itself: figures and style are inside it, it runs no script, and a content policy forbids it to
load anything. What it says stands in `page.html.j2`, which escapes all that comes from files; here is what it says it
about. Every cell that shows an accuracy, a risk or a time carries the number in full precision.
"""

from __future__ import annotations

import base64
import json
import struct
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mixadv.files import read_arrays
from mixadv.redaction import printable
from mixadv.report.attacks import (
    TWIN,
    WHOLE,
    attack_rows,
    classifiers,
    entries,
    everybody,
    flags_of,
    is_single,
    read_curve,
)
from mixadv.report.citations import papers_of
from mixadv.report.comparison import comparison_sentence, member_sentence
from mixadv.report.figures.evaluation import evaluation_figures, noting
from mixadv.report.figures.examples import MOST, read_examples, wrong_members
from mixadv.report.figures.style import save
from mixadv.report.files import Run, read_run, writing
from mixadv.report.names import format_ball, format_eps, number
from mixadv.report.records import measured

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
    found, pictures = _found(run, damage), _pictures(run, drawn, damage)
    first, *others = classifiers(run)
    others += [] if is_single(run) else ["from parts"]
    # Of one classifier alone there are neither members nor an averaged twin.
    shown = {"mixture" if is_single(run) else who for who in classifiers(run)} | {"baseline"}
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
        damage=[*run.notes, *damage],
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        comparisons=[said for said in (member_sentence(run), comparison_sentence(run)) if said],
        classifiers=[row for who, row in everybody(run).items() if who in shown],
        attacks=attack_rows(run),
        attack_head=["attack", f"{first} % [95 %]", *(f"{who} %" for who in others), "worst found"],
        whole=WHOLE,
        found=found,
        game=_game(run),
        drawn=list(drawn),
        pictures=pictures,
        examples=_in_examples(run) if "examples.png" in drawn else [],
        first=first,
        radius=format_eps,
        config=json.dumps(run.config, indent=2, ensure_ascii=False, default=str),
        papers=papers_of(entries(run)),
    )
    path = run.path / "report.html"
    with writing(path) as temporary:
        temporary.write_text(page + "\n", encoding="utf-8")
    return path


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value, keep="\n")


def _about(run: Run) -> dict[str, Any]:
    """What was measured, and how."""
    ball = format_ball(run.norm, run.eps) if run.eps is not None else ""
    protocol, seconds = run.get("protocol"), run.get("seconds")
    times = seconds.items() if isinstance(seconds, dict) else ()
    count = len(run.members) or run.num_members
    return {
        "what": "one classifier" if count == 1 else f"a mixture of {count} classifiers" if count else "a mixture",
        "about": [part for part in (run.data, ball, f"protocol {protocol}" if protocol else "", run.images) if part],
        "ball": ball,
        "single": is_single(run),
        "seconds": [f"{name} {known:.1f}" for name, value in times if (known := number(value)) is not None],
    }


def _doubts(run: Run) -> dict[str, Any]:
    checked = run.get("checks")
    ran = [str(name) for name in checked] if isinstance(checked, list) else None
    return {
        "flags": flags_of(run),
        "flags_known": isinstance(run.get("flags"), list),
        "checks": CHECKS,
        "ran": ran,
        "unchecked": [name for name in CHECKS if ran is not None and name not in ran],
    }


def _found(run: Run, damage: list[str]) -> dict[str, Any] | None:
    """How often each attack, by whom it was aimed at, was the first to find the worst case."""
    with noting(damage):
        found = (read_arrays(run.path / "records.npz") or {}).get("found_by")
        if found is None:
            return None
        if found.shape != measured(run).labels.shape:
            raise ValueError(f"{run.path / 'records.npz'} does not name an attack for each image")
        counts = Counter(_attack_and_target(str(name)) for name in found)
        stayed = counts.pop(("clean", ""), 0)
        targets = list(dict.fromkeys(["mixture", "members", TWIN, *(whom for _, whom in sorted(counts))]))
        names = dict.fromkeys([*entries(run), *(name for name, _ in sorted(counts))])
        rows = [(name, [counts[name, whom] for whom in targets]) for name in names]
        shown = counts and not is_single(run)
        return {"heads": [f"aimed at {t}" for t in targets], "rows": rows if shown else [], "stayed": stayed}
    return None


def _attack_and_target(key: str) -> tuple[str, str]:
    name, _, whom = key.partition(" on ")
    if key == "clean":
        return key, ""
    known = {"member": "members", "averaged": TWIN, "other": "other weights"}
    return name, known.get(whom.partition(" ")[0], whom or "mixture")


def _game(run: Run) -> dict[str, Any]:
    """Value, regret and matching-penny gap, and by how much that has to exceed what."""
    names = {"value": "value_at_weights", "least": "value_lp", "regret": "gap", "penny": "matching_penny_gap"}
    game: dict[str, Any] = {short: number(run.get("game", key)) for short, key in names.items()}
    weights = [number(member.get("weight")) for member in run.members]
    risks = [None if (r := number(member.get("robust"))) is None else 1 - r for member in run.members]
    needed = None
    if len(risks) > 1 and None not in risks and None not in weights:
        average = sum((w or 0.0) * (r or 0.0) for w, r in zip(weights, risks, strict=True))
        needed = average - min(r for r in risks if r is not None)
    return {**game, "needed": needed, "said": any(value is not None for value in game.values())}


def _pictures(run: Run, drawn: dict[str, bytes], damage: list[str]) -> dict[str, dict[str, Any]]:
    """By the names of their files, the figures as the page holds them, each with what it shows."""
    readers = {"eps.png": partial(read_curve, name="eps"), "steps.png": partial(read_curve, name="steps")}
    shown = {}
    for name, png in drawn.items():
        with noting(damage):
            if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
                raise ValueError(f"{name} is not a png")
            # With its size, so that nothing moves while it is decoded.
            width, height = struct.unpack(">II", png[16:24])
            data = {"data": base64.b64encode(png).decode("ascii"), "width": width, "height": height}
            shown[name] = {**data, "curve": readers[name](run) if name in readers else None}
    return shown


def _in_examples(run: Run) -> list[tuple[str, str]]:
    """The label of each image of examples.png, and which members are wrong there."""
    examples = read_examples(run)
    assert examples is not None
    return [(label, wrong_members(examples.correct[:, i])) for i, label in enumerate(examples.labels[:MOST])]
