"""What any classifier and any mixture can reach on the images of a run: table, csv, figure, and a sentence to quote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mixadv.errors import UserError
from mixadv.report.cells import Column, Table, of_view, write_csv
from mixadv.report.figures.ceiling import ceiling_figure, read_pictures
from mixadv.report.figures.style import save
from mixadv.report.files import Run
from mixadv.report.names import format_ball, format_eps, norm_symbol, short_names
from mixadv.results import CeilingRow

_ALL = "csv one several"


class _Line(NamedTuple):
    run: str
    norm: str
    row: CeilingRow


# The views: csv, the radii of one run, and those of several runs.
COLUMNS: list[Column[_Line]] = [
    Column("run", "run", lambda line: line.run, words=True, fold=8, views="several"),
    Column("norm", "norm", lambda line: line.norm, words=True, views="csv several"),
    Column("eps", "ε", lambda line: line.row.eps, format_eps, views=_ALL),
    Column("num_examples", "images", lambda line: line.row.num_examples, ",d", views="csv several"),
    Column("in_conflict", "conflict, %", lambda line: line.row.in_conflict, ".2%", views=_ALL, fold=9),
    Column("pairs", "pairs", lambda line: line.row.pairs, ",d", views=_ALL),
    Column("", "best mixture, %", lambda line: _bounds(line.row, "randomised"), views="one several", fold=10),
    Column("", "best classifier, %", lambda line: _bounds(line.row, "deterministic"), views="one several", fold=11),
    Column("randomised", "", lambda line: line.row.randomised, views="csv"),
    Column("randomised_upper", "", lambda line: line.row.randomised_upper, views="csv"),
    Column("deterministic", "", lambda line: line.row.deterministic, views="csv"),
    Column("deterministic_upper", "", lambda line: line.row.deterministic_upper, views="csv"),
    Column("gain_at_most", "gain ≤", lambda line: line.row.gain_at_most, ".2%", views=_ALL),
    Column("status", "status", lambda line: line.row.status, words=True, views="csv"),
    Column("seconds", "s", lambda line: line.row.seconds, ".1f", views="csv"),
]


def _bounds(row: CeilingRow, name: str) -> str | None:
    """A value that is known exactly, or its bounds, as percentages."""
    low, high = getattr(row, name), getattr(row, f"{name}_upper")
    if low is None or high is None:
        return None
    return f"{100 * high:.2f}" if high - low < 5e-5 else f"{100 * low:.2f} to {100 * high:.2f}"


def is_ceiling(run: Run) -> bool:
    """Whether this is a run of ``task=ceiling``, finished or not."""
    return run.task == "ceiling"


def ceiling_table(run: Run, view: str = "one") -> Table[_Line]:
    """One row for each radius of a run."""
    return _table([run], view, f"The best of all classifiers under attack: {_about(run)}")


def ceilings_table(runs: Sequence[Run]) -> Table[_Line]:
    """One row for each radius of each run."""
    return _table(runs, "several", "The best of all classifiers under attack")


def _table(runs: Sequence[Run], view: str, title: str) -> Table[_Line]:
    names = short_names([run.path for run in runs])
    lines = [_Line(name, run.norm, row) for name, run in zip(names, runs, strict=True) for row in run.results.ceiling]
    return Table(title, of_view(COLUMNS, view), lines)


def _about(run: Run) -> str:
    count = "" if run.num_examples is None else f"{run.num_examples:,} "
    return ", ".join(part for part in (run.data, f"{count}{_kind(run)} images", norm_symbol(run.norm)) if part)


def _kind(run: Run) -> str:
    """The splits of the images in words."""
    if not is_ceiling(run):
        return "test"
    settings = run.config.get("ceiling")
    split = settings.get("split") if isinstance(settings, dict) else None
    names = [str(name) for name in (split if isinstance(split, list) else [split] if split else [])]
    if "all" in names:
        names = ["train", "validation", "test"]
    words = ["training" if name == "train" else name for name in names]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def ceiling_sentences(run: Run) -> list[str]:
    """One sentence for each radius, for a person to quote; none without results."""
    sentences = [_sentence(run, row) for row in run.results.ceiling if row.eps is not None]
    first = run.results.first_conflict_eps
    if is_ceiling(run) and first is not None:
        sentences.append(f"The first two images of different classes conflict at ε = {_radius(first)}.")
    return sentences


def _sentence(run: Run, row: CeilingRow) -> str:
    count = f"{row.num_examples:,} " if row.num_examples is not None else ""
    images, ball = f"{count}{_kind(run)} images", format_ball(run.norm, row.eps)
    if row.in_conflict == 0:
        first = run.results.first_conflict_eps
        from_on = "" if first is None else f" (two of them do from ε = {_radius(first)} on)"
        return (
            f"Ceiling at {ball}: none of the {images} conflict{from_on}. Some classifier is right on all of them under "
            "attack: over all classifiers randomising adds nothing."
        )
    conflict = "" if row.in_conflict is None else f"{percent(row.in_conflict)} % of the {images} conflict. "
    if row.randomised_upper is None or row.deterministic_upper is None or row.gain_at_most is None:
        return f"Ceiling at {ball}: {conflict}The optima were not computed in this run; task=ceiling bounds them."
    left_out = "" if row.status in ("exact", None) else f" These are bounds: {row.status}."
    return (
        f"Ceiling at {ball}: {conflict}Under attack no classifier is right on more than "
        f"{percent(row.deterministic_upper)} % of them, and no mixture on more than "
        f"{percent(row.randomised_upper)} %; over all classifiers randomising adds at most "
        f"{percent(row.gain_at_most)} points.{left_out}"
    )


def percent(value: float) -> str:
    """A percentage with two decimals at most; what is not 0 does not become 0."""
    text = f"{100 * value:.2f}".rstrip("0").rstrip(".")
    return text if value == 0 or float(text) else f"{100 * value:.1g}"


def _radius(eps: float) -> str:
    return f"{eps:.4g} ({255 * eps:.4g}/255)" if eps < 1 else f"{eps:.4g}"


def write_ceiling(run: Run) -> list[Path]:
    """Write `ceiling.csv` and draw `ceiling.png` of a run of ``task=ceiling``.

    Raises:
        UserError: ceiling.npz is damaged, or the directory cannot be written.
    """
    try:
        pictures = read_pictures(run)
    except ValueError as error:
        raise UserError(f"{error}: run task=ceiling again with resume=never") from error
    table = write_csv(run.path / "ceiling.csv", ceiling_table(run, "csv"))
    return [table, save(lambda: ceiling_figure(run, _about(run), pictures), run.path / "ceiling.png")]
