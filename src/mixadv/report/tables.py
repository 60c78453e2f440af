"""The table of results: the accuracies of the classifiers of one or several runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table as RichTable

from mixadv.report.attacks import TWIN, classifiers, is_single, settings_text
from mixadv.report.cells import NONE, Column, Table, of_view, on_console, text_of, write_csv
from mixadv.report.files import Run
from mixadv.report.names import format_ball, format_eps, number, short_names
from mixadv.report.panels import panels_of
from mixadv.report.records import APGD, CONSTANT, GAP, PGD, VOTE, measured
from mixadv.report.settings import relevant_settings
from mixadv.results import UNKNOWN, Accuracy, Counterparts
from mixadv.wording import counted

_STATE_STYLES = {"done": "green", "running": "cyan", "failed": "red", "unfinished": "yellow"}


class Line(NamedTuple):
    """A row of the table of results: one classifier of a run.

    Attributes:
        who: "mixture", "member 0", ..., "ensemble" (the averaged twin on clean images), "averaged twin", "vote",
            "constant answer" or "baseline".
        label: its name on the console and the page.
        clean, robust: on clean images, and at the worst of all points found in all passes.
        weight: lambda_k of a member; "" for other classifiers.
        name: the short name of the run in a table of several.
        differing: see `panels.Panel`.
    """

    run: Run
    who: str
    label: str
    clean: Accuracy
    robust: Accuracy = UNKNOWN
    weight: float | str | None = ""
    name: str = ""
    differing: str = ""

    @property
    def how(self) -> str | None:
        """Loss, solver and what else tells the training of a run from those beside it; None if unknown."""
        return " ".join(part for part in (self.run.loss or self.run.task, self.run.solver, self.differing) if part)

    @property
    def interval(self) -> str | None:
        """The interval of the robust accuracy, as percentages; None if unknown."""
        return "–".join(f"{100 * end:.1f}" for end in self.robust.ends) if self.robust.ends else None

    def under(self, measure: str) -> float | None:
        """The mixture's mean of a measure of `records.Measured`; None if unknown and for other classifiers."""
        try:
            each = measured(self.run).accuracies.get(measure) if self.who == "mixture" else None
        except ValueError:
            return None
        return None if each is None else float(each.mean())


def _of_training(run: Run, key: str) -> str | None:
    """A setting of the training; None if unknown."""
    return None if run.was_only_measured else relevant_settings(run.config).get(key)


def _schedule(line: Line) -> str | None:
    # For one member all schedules are the same.
    return None if line.run.num_members == 1 else _of_training(line.run, "schedule.kind")


def _epochs(line: Line) -> float | None:
    return number(_of_training(line.run, "trainer.max_epochs"))


def _state(line: Line) -> str:
    flags = line.run.results.flags
    flagged = f", {len(flags)} flagged" if flags else ""
    return line.run.state + flagged + (", damaged" if line.run.notes else "")


def _baseline(line: Line) -> float | None:
    return line.run.baseline.robust.value if line.run.baseline else None


# Views: `run`, the classifiers of one run on the console and the page; `sweep`, the mixtures of several runs on the
# console; `csv`, all classifiers of several runs in report.csv.
RESULTS: tuple[Column[Line], ...] = (
    Column("run", "run", lambda line: line.name, views="csv"),
    Column(
        "run",
        "run",
        lambda line: f"{line.name} {_state(line)}",
        views="sweep",
        words=True,
        fold=12,
        style=lambda line: _STATE_STYLES[line.run.state],
    ),
    Column("state", "state", lambda line: line.run.state, views="csv"),
    Column("reason", "reason", lambda line: line.run.reason, views="csv"),
    Column("data", "data", lambda line: line.run.data, views="csv"),
    Column("norm", "norm", lambda line: line.run.norm, views="csv"),
    Column("eps", "ε", lambda line: line.run.eps, format_eps, views="sweep csv"),
    Column("L", "L", lambda line: line.run.num_members, views="sweep csv"),
    Column("training", "training", lambda line: line.how, views="sweep", words=True, fold=8),
    Column("loss", "loss", lambda line: line.run.loss or None, views="csv", words=True),
    Column("solver", "solver", lambda line: line.run.solver or None, views="csv", words=True),
    Column("schedule", "schedule", _schedule, views="csv"),
    Column("epochs", "epochs", _epochs, views="csv"),
    Column("seed", "seed", lambda line: line.run.seed, views="sweep csv"),
    Column("differing", "settings", lambda line: line.differing or None, views="csv"),
    Column("train_seconds", "training, s", lambda line: line.run.training_seconds, ".0f", views="csv"),
    Column("num_examples", "images", lambda line: line.run.num_examples, views="csv"),
    Column("label", "", lambda line: line.label, views="run", words=True, fold=1),
    Column("who", "who", lambda line: line.who, views="csv"),
    Column("robust", "robust % [95 %]", lambda line: line.robust, ".1%", views="run"),
    Column("clean", "clean % [95 %]", lambda line: line.clean, ".1%", views="run"),
    Column("weight", "weight λ", lambda line: line.weight, ".3f", views="run csv"),
    Column("clean", "clean % [95 %]", lambda line: line.clean, ".1%", views="csv", ends=True),
    Column("clean", "clean %", lambda line: line.clean.value, ".1%", views="sweep", fold=5),
    Column("robust", "robust % [95 %]", lambda line: line.robust, ".1%", views="csv", ends=True),
    Column("robust", "robust %", lambda line: line.robust.value, ".1%", views="sweep", fold=6),
    Column("interval", "95 %", lambda line: line.interval, views="sweep"),
    Column("pgd_20", "PGD-20 %", lambda line: line.under(PGD), ".1%", views="csv"),
    Column("apgd", "APGD %", lambda line: line.under(APGD), ".1%", views="csv"),
    Column("matching_penny_gap", "gap", lambda line: line.under(GAP), ".1%", views="csv"),
    Column("baseline", "baseline robust %", _baseline, ".1%", views="sweep", fold=8),
    Column("weights", "λ", lambda line: line.run.results.weights, ".2f", views="sweep", fold=4),
)


def rows_of(run: Run, name: str = "") -> dict[str, Line]:
    """`Line.who` -> row: members, mixture, averaged twin (also as "ensemble"), other counterparts and baseline."""
    found, results = {}, run.results
    counterparts = results.counterparts or Counterparts()
    for k, member in enumerate(results.members):
        weight = results.weights[k] if results.weights else None
        label = ": ".join(part for part in (f"member {k}", member.name) if part)
        if counterparts.best_member and counterparts.best_member.which == k:
            # It need not be the best on the test images, which the columns beside it show.
            label += f" (best on {counterparts.chosen_on or 'unknown images'})"
        found[f"member {k}"] = Line(run, f"member {k}", label, Accuracy(member.clean), member.robust, weight, name)
    found["mixture"] = Line(run, "mixture", classifiers(run)[0], run.clean, run.robust, name=name)
    ensemble = Accuracy(results.ensemble_accuracy)
    found["ensemble"] = Line(run, "ensemble", "ensemble accuracy", ensemble, name=name)
    if (twin := results.averaged_twin) is not None:
        found[TWIN] = Line(run, TWIN, TWIN, Accuracy(twin.clean), twin.robust, name=name)
    for who, one in ((VOTE, counterparts.vote), (CONSTANT, counterparts.constant)):
        if one is not None:
            found[who] = Line(run, who, who, Accuracy(one.clean), one.robust, name=name)
    if (base := run.baseline) is not None:
        label = f"baseline ({'one model' if base.state == 'done' else base.state})"
        found["baseline"] = Line(run, "baseline", label, base.clean, base.robust, name=name)
    return found


def results_table(run: Run, title: str, who: Iterable[str], caption: str = "") -> Table[Line]:
    """The classifiers `who` of a run, members first, with the intervals that the evaluation stored.

    "mixture" is the randomized classifier; its accuracies are exact expectations over the draw of a member.
    """
    lines = [line for name, line in rows_of(run).items() if name in who]
    first = next((i for i, line in enumerate(lines) if line.who == "mixture"), 0)
    return Table(title, of_view(RESULTS, "run"), lines, caption, bold=(first,), sections=(first - 1,))


def run_table(run: Run) -> RichTable:
    """`results_table` for the console: the members, the mixture, its counterparts and the baseline."""
    title = headline(run, "" if run.seed is None else f"seed {run.seed}")
    twin = TWIN if run.results.averaged_twin is not None else "ensemble"
    who = [*(f"member {k}" for k in range(len(run.results.members))), "mixture", VOTE, CONSTANT, "baseline"]
    who += [] if is_single(run) else [twin]
    return on_console(results_table(run, title, who, _caption(run)))


def sweep_tables(runs: Sequence[Run]) -> list[Table[Any]]:
    """One table for each panel, with a row per run, and one for the runs without results; for one panel a single table.

    A last table lists the settings that have a number. On a console of 80 columns they are whole.
    """
    names = dict(_named(runs))
    panels = panels_of(runs)
    differing = {run: text for panel in panels for run, text in zip(panel.runs, panel.differing, strict=True)}
    groups = [(panel.title, panel.runs) for panel in panels]
    if len(panels) < 2:
        groups = [(panels[0].title if panels else "", list(runs))]
    elif rest := [run for run in runs if run not in differing]:
        groups.append(("without results", rest))
    tables: list[Table[Any]] = [_sweep_table(title, group, names, differing) for title, group in groups]
    numbered = [item for panel in panels for item in panel.numbered.items()]
    if numbered:
        tables.append(Table("Settings", NUMBERED, numbered))
    return tables


# Name and text of settings that have a number.
NUMBERED: tuple[Column[tuple[str, str]], ...] = (
    Column("name", "", lambda item: item[0], words=True),
    Column("text", "differing keys", lambda item: item[1], words=True, fold=20),
)


def _sweep_table(
    title: str, runs: Sequence[Run], names: Mapping[Run, str], differing: Mapping[Run, str]
) -> Table[Line]:
    """One row per run. Values that all runs share stand in the caption; columns without values are left out."""
    lines = [rows_of(run, names[run])["mixture"]._replace(differing=differing.get(run, "")) for run in runs]
    columns, shared = [], []
    for column in of_view(RESULTS, "sweep"):
        cells = {text_of(column.of(line), column.form) for line in lines}
        if column.key in ("eps", "L", "training", "seed") and len(cells) == 1 and len(runs) > 1 and cells != {NONE}:
            value = cells.pop()
            shared.append(value if column.key == "training" else f"{column.heading} = {value}")
        elif cells != {NONE} or column.key in ("run", "robust"):
            columns.append(column)
    about = ": ".join(part for part in (counted(len(runs), "run"), title) if part)
    return Table(about, columns, lines, _sweep_caption(runs, names, shared))


def write_table_csv(runs: Sequence[Run], path: str | Path) -> Path:
    """Write a tidy csv, one row per run and classifier; accuracies are fractions in full precision.

    Column `who` is "mixture", "ensemble" (the averaged twin on clean images), "vote", "averaged twin", "constant
    answer" (these three if the results have counterparts), "member 0", ..., "baseline". `robust` is the accuracy at all
    points found; `pgd_20`, `apgd` and `matching_penny_gap` are those of `records.Measured`. A run without results has
    one row with `who` = "mixture" and empty numbers.

    Raises:
        UserError: `path` cannot be written.
    """
    settings: dict[Run, str] = {}
    for panel in panels_of(runs):
        texts = [f"{text}: {panel.numbered[text]}" if text in panel.numbered else text for text in panel.differing]
        settings.update(zip(panel.runs, texts, strict=True))
    lines = [
        line._replace(differing=settings.get(run, "")) for run, name in _named(runs) for line in _written(run, name)
    ]
    return write_csv(path, Table("", of_view(RESULTS, "csv"), lines))


def _named(runs: Sequence[Run]) -> Iterable[tuple[Run, str]]:
    return zip(runs, short_names([run.path for run in runs]), strict=True)


def _written(run: Run, name: str) -> list[Line]:
    """The rows of report.csv for a run."""
    found = rows_of(run, name)
    order = ["mixture"]
    order += ["ensemble"] if run.results.ensemble_accuracy is not None else []
    if run.results.counterparts is not None:
        order += [who for who in (VOTE, TWIN, CONSTANT) if who in found]
    order += [f"member {k}" for k in range(len(run.results.members))]
    order += ["baseline"] if run.baseline is not None and run.baseline.has_results else []
    return [found[who] for who in order]


def headline(run: Run, *more: str) -> str:
    """The known ones of data, L, loss, solver and threat model, and `more`; the name of the run if there are none."""
    parts = [run.data, f"L = {run.num_members}" if run.num_members is not None else "", run.loss, run.solver]
    parts.append(format_ball(run.norm, run.eps) if run.eps is not None else "")
    return " · ".join(part for part in (*parts, *more) if part) or run.path.name


def _caption(run: Run) -> str:
    lines = [f"{run.images}, {format_ball(run.norm, run.eps)}"] if run.images else []
    known = run.results.counterparts
    if known is not None and known.chosen_on:
        lines.append(f"constant answer{'' if is_single(run) else ' and best member'}: chosen on {known.chosen_on}")
    called = {name: settings_text(attack.settings, with_class=False) for name, attack in run.results.attacks.items()}
    attacks = "; ".join(f"{name} ({how})" if how else name for name, how in called.items())
    return "\n".join([*lines, f"robust: per image the worst case over {attacks}"] if attacks else lines)


def _sweep_caption(runs: Sequence[Run], names: Mapping[Run, str], shared: Sequence[str]) -> str:
    attacks = sorted({", ".join(run.results.attacks) for run in runs if run.results.attacks})
    lines = [f"all: {', '.join(shared)}" if shared else ""]
    lines.append("robust: per image the worst case over " + " | ".join(attacks) if attacks else "")
    lines += [f"{names[run]}: {run.reason}" for run in runs if run.reason]
    lines += [note for run in runs for note in run.notes]
    return "\n".join(line for line in lines if line)
