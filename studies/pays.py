#!/usr/bin/env python3
"""Tables and figure of the study `pays.sh`: where does a mixture pay?

    python studies/pays.py outputs/sweeps/study-pays results/pays
    python studies/pays.py results/pays

The first command gathers the runs into two files: `runs.csv` has a line for each run, `images.npz` a number for each of
its test images and classifiers. Both commands then make everything else from these two: `differences.csv`, `eps.png`
(accuracy under attack against the radius) and the tables in `README.md` between the two lines `BEGIN` and `END`.
"""

from __future__ import annotations

import csv
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from mixadv.files import read_arrays, write_arrays, write_text
from mixadv.intervals import paired_interval
from mixadv.report import find_runs
from mixadv.report.figures.style import DASHES, LINE_COLOURS, MARKERS, footnote, new_figure, save
from mixadv.report.files import Run
from mixadv.report.names import format_ball
from mixadv.report.records import ALL, CLEAN, CONSTANT, MEMBERS, TWIN, VOTE, measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- made by studies/pays.py: -->", "<!-- end -->"
RECIPE, BIASES, GROWN = "recipe", "one network, biases", "grown"
# With updates of one member for each attack, as published, and with each attack shared by all members.
SAMPLED, SHARED = "Algorithm 2", "Algorithm 2, shared attacks"
MIXTURES = (RECIPE, BIASES, SAMPLED, SHARED, GROWN)
MIXTURE, BEST = "mixture", "best member"
# The rows of an entry of images.npz. Those that a run lacks are nan.
ROWS = (MIXTURE, CLEAN, MEMBERS, BEST, VOTE, TWIN, CONSTANT)
OWN = (BEST, VOTE, TWIN, CONSTANT)
# The flag of numbers that attacks have not reached.
IMPOSSIBLE = "above-the-ceiling"
# The claim of the study: so many points, and an interval over the seeds above 0.
LEAST = 0.05


@dataclass(frozen=True)
class Line:
    """A line of runs.csv: one measured run.

    Attributes:
        run: the name of its directory. data: without the number of the draw. norm, eps: the ball.
        method: one of `MIXTURES`, or "one model" with what was changed.
        seed: of the training; also the draw of the data.
        images: number of test images. epochs: per model; nan if the run trained nothing.
        hidden: the layers of each network. weights: lambda.
        any_mixture, any_classifier: upper bounds of the accuracy on these test images; nan if unknown.
        seconds: wall seconds of the training; nan if the run trained nothing.
        commit: that the run came from.
    """

    run: str
    data: str
    norm: str
    eps: float
    method: str
    seed: int
    images: int
    epochs: float
    hidden: str
    weights: str
    any_mixture: float
    any_classifier: float
    seconds: float
    commit: str

    @property
    def family(self) -> tuple[str, str]:
        return self.data, self.norm


class Study(NamedTuple):
    """The content of both files: line i belongs to accuracies[i], [len(ROWS), images]."""

    lines: list[Line]
    accuracies: list[np.ndarray]

    def of(self, family: tuple[str, str], eps: float, method: str) -> dict[int, np.ndarray]:
        """Seed -> accuracies of the runs of one method."""
        return {
            line.seed: found
            for line, found in zip(self.lines, self.accuracies, strict=True)
            if (line.family, line.eps, line.method) == (family, eps, method)
        }


# --- gathering ---------------------------------------------------------------------------------------------


def gather(sweep: Path) -> tuple[Study, list[str]]:
    """All measured runs of a sweep, and one line for each that cannot be used."""
    runs = find_runs(sweep)
    bounds = _bounds(runs)
    lines, accuracies, notes = [], [], []
    for run in runs:
        if run.task == "ceiling":
            continue
        if run.state != "done":
            notes.append(f"{run.path.name} is {run.state} {run.reason}".strip())
            continue
        notes += [f"{run.path.name}: {flag.name}" for flag in run.results.flags or () if flag.name == IMPOSSIBLE]
        found = measured(run)
        mixture, classifier = bounds.get(_images_of(run), (np.nan, np.nan))
        lines.append(
            Line(
                run=run.path.name,
                data=re.sub(r", draw \d+$", "", run.data),
                norm=run.norm,
                eps=_known(run.eps),
                method=_method(run),
                seed=int(_known(run.seed)),
                images=len(found.labels),
                epochs=np.nan if run.was_only_measured else float(run.config["trainer"]["max_epochs"]),
                hidden=_hidden(run),
                weights=" ".join(f"{weight:.4f}" for weight in run.results.weights),
                any_mixture=mixture,
                any_classifier=classifier,
                seconds=np.nan if run.training_seconds is None else run.training_seconds,
                commit=run.results.git or "",
            )
        )
        accuracies.append(_rows(run))
    lines = _named(lines)
    for key, count in Counter((line.family, line.eps, line.method, line.seed) for line in lines).items():
        if count > 1:
            raise ValueError(f"{count} runs have one name: {key}")
    return Study(lines, accuracies), notes


def _known(value: Any) -> float:
    if value is None:
        raise ValueError("a run without eps or seed")
    return float(value)


def _hidden(run: Run) -> str:
    layers = None if run.was_only_measured else run.config["model"].get("hidden")
    return " ".join(map(str, layers)) if isinstance(layers, list) else ""


def _images_of(run: Run) -> tuple[Any, ...]:
    return run.data, run.norm, run.eps, run.num_examples


def _bounds(runs: Iterable[Run]) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Test images and ball -> the least upper bounds of any mixture and any classifier that a run has found."""
    found: dict[tuple[Any, ...], tuple[float, float]] = {}
    for run in runs:
        for row in run.results.ceiling:
            if row.randomised_upper is None or row.deterministic_upper is None:
                continue
            # Rounding: ceilings are exact only up to 1e-9.
            images = (run.data, run.norm, row.eps, row.num_examples)
            known = found.get(images, (np.inf, np.inf))
            found[images] = min(known[0], row.randomised_upper), min(known[1], row.deterministic_upper)
    return found


def _method(run: Run) -> str:
    if run.was_only_measured:
        return BIASES
    weighted = run.config["loss"].get("class_weights") is not None
    targeted = run.config["attack"].get("targets", "none") != "none"
    if run.num_members == 1 and run.config["schedule"]["kind"] != "grow":
        smoothed = str(run.config["loss"].get("_target_")).endswith("SmoothedZeroOne")
        parts = ("smoothed 0/1 loss", smoothed), ("class weights", weighted), ("random targets", targeted)
        words = [word for word, on in parts if on]
        return ", ".join(["one model", *words])
    if run.config["schedule"]["kind"] == "grow":
        return GROWN
    if weighted:
        return RECIPE
    return SAMPLED if run.config["schedule"]["kind"] == "sampled" else SHARED


def _named(lines: Sequence[Line]) -> list[Line]:
    """The lines; names of single models tell epochs and layers where they differ from the recipe's."""
    recipes = {(line.family, line.eps): line for line in lines if line.method == RECIPE}
    named = []
    for line in lines:
        recipe = recipes.get((line.family, line.eps))
        if recipe is not None and line.method.startswith("one model"):
            if line.epochs != recipe.epochs:
                line = replace(line, method=f"{line.method}, {line.epochs / recipe.epochs:g} x epochs")
            if line.hidden != recipe.hidden:
                line = replace(line, method=f"{line.method}, layers of {line.hidden.split()[0]}")
        named.append(line)
    return named


def _rows(run: Run) -> np.ndarray:
    found = measured(run)
    empty = np.full(len(found.labels), np.nan)
    known = run.results.counterparts
    best = known.best_member if known is not None else None
    rows = {MIXTURE: found.accuracies[ALL], CLEAN: found.accuracies[CLEAN], **found.counterparts}
    if found.members is not None and len(found.members) > 1:
        rows[MEMBERS] = found.accuracies[MEMBERS]
        if best is not None and best.which is not None:
            rows[BEST] = found.members[best.which]
    elif run.num_members == 1:
        # A mixture that did not grow is its own best member.
        rows |= dict.fromkeys((MEMBERS, BEST, VOTE, TWIN), rows[MIXTURE])
    return np.array([rows.get(name, empty) for name in ROWS], dtype=np.float32)


# --- the two files -----------------------------------------------------------------------------------------


def write_study(study: Study, folder: Path) -> None:
    """Write runs.csv and images.npz."""
    names = [one.name for one in fields(Line)]
    rows = [[str(getattr(line, name)) for name in names] for line in study.lines]
    _write_csv(folder / "runs.csv", [names, *rows])
    write_arrays(folder / "images.npz", {str(i): found for i, found in enumerate(study.accuracies)})


def read_study(folder: Path) -> Study:
    """Read what `write_study` wrote."""
    kinds = {one.name: {"str": str, "float": float, "int": int}[str(one.type)] for one in fields(Line)}
    with (folder / "runs.csv").open(newline="", encoding="utf-8") as file:
        lines = [Line(**{name: kinds[name](cell) for name, cell in row.items()}) for row in csv.DictReader(file)]
    arrays = read_arrays(folder / "images.npz")
    if arrays is None:
        raise FileNotFoundError(f"{folder / 'images.npz'} is missing")
    return Study(lines, [arrays[str(i)].astype(np.float64) for i in range(len(lines))])


def _write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


# --- differences -------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Accuracy under attack of a mixture minus that of another classifier, as fractions.

    Attributes:
        each: for each seed the mean over its test images.
        over_seeds: Student's 95 % interval over the seeds (n - 1 degrees of freedom), nan for one seed. It covers
            training and draw of the data.
        over_images: `paired_interval` of the images of all seeds together: it takes them as independent draws.
    """

    mixture: str
    other: str
    each: dict[int, float]
    over_seeds: tuple[float, float]
    over_images: tuple[float, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.each.values())))

    @property
    def holds(self) -> bool:
        """Whether the mixture is ahead by `LEAST`, and both intervals are above 0."""
        return self.mean >= LEAST and self.over_seeds[0] > 0 and self.over_images[0] > 0


Images = Mapping[int, np.ndarray]


def difference(mixture: str, other: str, mine: Images, theirs: Images) -> Difference:
    """Compare accuracies [N] per image, seed by seed; only seeds that both have.

    Raises:
        ValueError: they have no seed in common.
    """
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"{mixture} and {other} have no seed in common")
    each = {seed: mine[seed] - theirs[seed] for seed in seeds}
    means = np.array([one.mean() for one in each.values()])
    ends = float("nan"), float("nan")
    if len(means) > 1:
        half = float(stats.t.ppf(0.975, len(means) - 1)) * means.std(ddof=1) / np.sqrt(len(means))
        ends = float(means.mean() - half), float(means.mean() + half)
    low, _, high = paired_interval(np.concatenate(list(each.values())))
    return Difference(mixture, other, dict(zip(seeds, map(float, means), strict=True)), ends, (low, high))


def differences(study: Study, family: tuple[str, str], eps: float) -> list[Difference]:
    """Every mixture minus its own counterparts, and minus every single model, at one radius."""
    at = _methods(study, family, eps)
    found = []
    for mixture in (method for method in at if method in MIXTURES):
        runs = study.of(family, eps, mixture)
        mine = {seed: one[0] for seed, one in runs.items()}
        others = {name: {seed: one[ROWS.index(name)] for seed, one in runs.items()} for name in OWN}
        for single in (method for method in at if method not in MIXTURES):
            others[single] = {seed: one[0] for seed, one in study.of(family, eps, single).items()}
        for name, theirs in others.items():
            known = {seed: one for seed, one in theirs.items() if np.isfinite(one).all()}
            if mine.keys() & known.keys():
                found.append(difference(mixture, name, mine, known))
    return found


def _methods(study: Study, family: tuple[str, str], eps: float) -> list[str]:
    """Mixtures first, then single models."""
    names = {line.method for line in study.lines if (line.family, line.eps) == (family, eps)}
    return [name for name in MIXTURES if name in names] + sorted(names - set(MIXTURES))


def _settings(study: Study) -> dict[tuple[str, str], list[float]]:
    """Data and norm -> the radii, the one with the most runs first: it is the setting, the others vary it."""
    runs: dict[tuple[str, str], dict[float, int]] = defaultdict(lambda: defaultdict(int))
    for line in study.lines:
        runs[line.family][line.eps] += 1
    return {family: sorted(radii, key=lambda eps: (-radii[eps], eps)) for family, radii in runs.items()}


# --- tables ------------------------------------------------------------------------------------------------


def tables(study: Study) -> str:
    """All tables in Markdown."""
    parts = []
    for family, radii in _settings(study).items():
        data, norm = family
        parts.append(f"### {data}, {format_ball(norm, radii[0])}")
        parts += [_about(study, family, radii[0]), _accuracies(study, family, radii[0])]
        parts.append(_differences(differences(study, family, radii[0])))
        if len(radii) > 2 and _shared_seeds(study, family, radii):
            parts.append(_over_radii(study, family, sorted(radii)))
    return "\n\n".join(filter(None, parts))


def _about(study: Study, family: tuple[str, str], eps: float) -> str:
    lines = {line.seed: line for line in study.lines if (line.family, line.eps) == (family, eps)}
    seeds = sorted(lines)
    classifier, mixture = (
        " ".join(_percent(getattr(lines[seed], name)) for seed in seeds) for name in ("any_classifier", "any_mixture")
    )
    return (
        f"Seeds and draws {', '.join(map(str, seeds))}; {lines[seeds[0]].images} test images each. On these images no "
        f"classifier of any kind has more than {classifier} %, and no mixture more than {mixture} % (draw by draw)."
    )


def _accuracies(study: Study, family: tuple[str, str], eps: float) -> str:
    head = ["", "under attack, %", "each seed", "of the ceiling, %"]
    head += ["clean", "best member", "vote", "averaged twin", "training, s"]
    methods = _methods(study, family, eps)
    rows = []
    for method in methods:
        runs = study.of(family, eps, method)
        lines = [line for line in study.lines if (line.family, line.eps, line.method) == (family, eps, method)]
        each = _means(runs, MIXTURE)
        ceiling = np.mean([line.any_mixture for line in lines])
        # A single model is its own best member, vote and twin.
        own = (BEST, VOTE, TWIN) if method in MIXTURES else ()
        rows.append(
            [
                f"**{method}**" if method in MIXTURES else method,
                _percent(np.mean(each)),
                " ".join(map(_percent, each)),
                _percent(np.mean(each) / ceiling, 0),
                _percent(np.mean(_means(runs, CLEAN))),
                *([_percent(np.mean(_means(runs, name))) for name in own] or ["–"] * 3),
                _percent(np.mean([line.seconds for line in lines]) / 100, 0),
            ]
        )
    constant = _means(study.of(family, eps, methods[0]), CONSTANT)
    rows.append([CONSTANT, _percent(np.mean(constant)), " ".join(map(_percent, constant)), *["–"] * 6])
    return _markdown(head, rows)


def _means(runs: Images, row: str) -> list[float]:
    """The mean over the images, for each seed in order."""
    return [float(runs[seed][ROWS.index(row)].mean()) for seed in sorted(runs)]


def _differences(found: Sequence[Difference]) -> str:
    head = ["minus", "points", "over seeds", "over images", "each seed", "5 points and above 0"]
    shown = [one for one in found if one.mixture in (RECIPE, BIASES)] or found
    rows = [
        [
            f"{one.mixture} – {one.other}",
            _points(one.mean),
            _interval(one.over_seeds),
            _interval(one.over_images),
            " ".join(map(_points, one.each.values())),
            "yes" if one.holds else "no",
        ]
        for one in shown
    ]
    verdicts = [_verdict(mixture, [one for one in found if one.mixture == mixture]) for mixture in MIXTURES]
    return "\n\n".join([_markdown(head, rows), *filter(None, verdicts)]) if rows else ""


def _verdict(mixture: str, found: Sequence[Difference]) -> str:
    if not found:
        return ""
    failed = [one.other for one in found if not one.holds]
    if not failed:
        return f"{mixture}: ahead of every counterpart by {100 * LEAST:g} points or more, with both intervals above 0."
    return f"{mixture}: not ahead by {100 * LEAST:g} points with both intervals above 0 of {'; '.join(failed)}."


def _over_radii(study: Study, family: tuple[str, str], radii: Sequence[float]) -> str:
    """Accuracy under attack against the radius, for the seeds that all radii have."""
    seeds = _shared_seeds(study, family, radii)
    rows = []
    for method in _methods(study, family, _settings(study)[family][0]):
        values = [_mean(study, family, eps, method, seeds) for eps in radii]
        if np.isfinite(values).sum() > 1:
            rows.append([method, *map(_percent, values)])
    for name, words in (("any_classifier", "any classifier ≤"), ("any_mixture", "any mixture ≤")):
        rows.append([words, *(_percent(_bound(study, family, eps, name, seeds)) for eps in radii)])
    head = [f"under attack, %, seeds {', '.join(map(str, seeds))}", *(f"{family[1]} {eps:g}" for eps in radii)]
    return _markdown(head, rows)


def _shared_seeds(study: Study, family: tuple[str, str], radii: Sequence[float]) -> list[int]:
    return sorted(
        set.intersection(
            *({line.seed for line in study.lines if (line.family, line.eps) == (family, eps)} for eps in radii)
        )
    )


def _mean(study: Study, family: tuple[str, str], eps: float, method: str, seeds: Sequence[int]) -> float:
    """The mean over these seeds; nan if one of them is missing."""
    runs = study.of(family, eps, method)
    return float(np.mean([runs[seed][0].mean() for seed in seeds])) if set(seeds) <= runs.keys() else float("nan")


def _bound(study: Study, family: tuple[str, str], eps: float, name: str, seeds: Sequence[int]) -> float:
    bounds = {line.seed: getattr(line, name) for line in study.lines if (line.family, line.eps) == (family, eps)}
    return float(np.mean([bounds[seed] for seed in seeds]))


def _percent(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}" if np.isfinite(value) else "–"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _interval(ends: tuple[float, float]) -> str:
    return f"[{_points(ends[0])}, {_points(ends[1])}]" if np.isfinite(ends[0]) else "–"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


# --- figure ------------------------------------------------------------------------------------------------


def draw_radii(study: Study, path: Path) -> None:
    """Draw accuracy under attack against the radius, for every setting with three radii or more; raises as `save`."""
    several = {family: sorted(radii) for family, radii in _settings(study).items() if len(radii) > 2}
    families = {family: radii for family, radii in several.items() if _shared_seeds(study, family, radii)}
    if families:
        save(lambda: _radii_figure(study, families), path)


def _radii_figure(study: Study, families: Mapping[tuple[str, str], Sequence[float]]) -> Figure:
    height = 0.6 + 5.6 * len(families)
    figure = new_figure(height, "Accuracy under attack against the radius")
    for i, (family, radii) in enumerate(families.items()):
        bottom = (height - 0.5 - 5.6 * (i + 1) + 1.0) / height
        axes = figure.add_axes((0.06, bottom, 0.62, 4.2 / height))
        seeds = _shared_seeds(study, family, radii)
        methods = _methods(study, family, _settings(study)[family][0])
        for k, method in enumerate(methods):
            means = [_mean(study, family, eps, method, seeds) for eps in radii]
            if np.isfinite(means).sum() < 2:
                continue
            line = DASHES[0] if method in MIXTURES else DASHES[2]
            look: Any = {
                "color": LINE_COLOURS[k % len(LINE_COLOURS)],
                "marker": MARKERS[k % len(MARKERS)],
                "linestyle": line,
            }
            axes.plot(
                radii, means, label=textwrap.fill(method, 30), linewidth=2.4 if method in MIXTURES else 1.6, **look
            )
            for eps in radii:
                each = [one[0].mean() for seed, one in study.of(family, eps, method).items() if seed in seeds]
                axes.plot([eps] * len(each), each, linestyle="", marker="_", markersize=9, color=look["color"])
        for name, words, colour in (
            ("any_classifier", "no classifier can exceed this", "#000000"),
            ("any_mixture", "no mixture can exceed this", "#882255"),
        ):
            bounds = [_bound(study, family, eps, name, seeds) for eps in radii]
            axes.plot(radii, bounds, color=colour, linewidth=3, alpha=0.4, label=words)
        axes.set(ylim=(0, 0.75), xlabel=f"{family[1]} eps")
        axes.set_yticks([0, 0.2, 0.4, 0.6], ["0", "20", "40", "60 %"])
        axes.set_title(f"{family[0]}, seeds {', '.join(map(str, seeds))}", fontsize=13, parse_math=False)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    footnote(
        figure,
        "Lines: means over the seeds; marks: each seed. Bounds hold for models of any size on these test images.",
    )
    return figure


# --- command -----------------------------------------------------------------------------------------------


def with_tables(page: str, text: str) -> str:
    """The page with `text` between the lines BEGIN and END, which are added at its end if it has none."""
    if BEGIN not in page:
        page = f"{page.rstrip()}\n\n{BEGIN}\n{END}\n".lstrip()
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def write_differences(study: Study, path: Path) -> None:
    """Write all differences at all radii, in points."""
    head = ["data", "norm", "eps", "mixture", "other", "seeds", "mean"]
    head += ["seeds_low", "seeds_high", "images_low", "images_high", "each"]
    rows = []
    for (data, norm), radii in _settings(study).items():
        for eps in radii:
            for one in differences(study, (data, norm), eps):
                numbers = [one.mean, *one.over_seeds, *one.over_images]
                seeds, each = " ".join(map(str, one.each)), " ".join(map(_points, one.each.values()))
                cells = ["" if np.isnan(number) else f"{100 * number:.2f}" for number in numbers]
                rows.append([data, norm, f"{eps:g}", one.mixture, one.other, seeds, *cells, each])
    _write_csv(path, [head, *rows])


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[-1])
    if len(arguments) == 2:
        study, notes = gather(Path(arguments[0]))
        for note in notes:
            print(note, file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        write_study(study, folder)
    study = read_study(folder)
    write_differences(study, folder / "differences.csv")
    draw_radii(study, folder / "eps.png")
    page = folder / "README.md"
    text = tables(study)
    write_text(page, with_tables(page.read_text(encoding="utf-8") if page.exists() else "", text))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
