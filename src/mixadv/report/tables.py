"""Tables and sentences about runs; accuracies are printed in per cent, files keep fractions."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixadv.report.differences import APGD, GAP, PGD, measured
from mixadv.report.files import Interval, Run, cell, replacing
from mixadv.report.names import format_ball, format_eps, group_name, norm_symbol, number, short_names
from mixadv.report.settings import setting_of

NONE = "–"
_STATE_STYLES = {"done": "green", "running": "cyan", "failed": "red", "unfinished": "yellow"}
CSV_HEADER = [
    "run",
    "state",
    "reason",
    "data",
    "norm",
    "eps",
    "L",
    "loss",
    "solver",
    "schedule",
    "epochs",
    "seed",
    "train_seconds",
    "num_examples",
    "who",
    "weight",
    "clean",
    "clean_low",
    "clean_high",
    "robust",
    "robust_low",
    "robust_high",
    "pgd_20",
    "apgd",
    "matching_penny_gap",
]


def results_table(run: Run) -> Table:
    """Each member alone, the mixture, its ensemble and its baseline: clean, robust [95 % interval], lambda.

    "mixture" is the randomized classifier, its accuracies exact expectations over the draw of a member;
    "ensemble accuracy" is argmax of the averaged probabilities, a different and deterministic classifier,
    given on clean images only. All intervals are those that the evaluation stored.
    """
    table = Table(title=Text(_headline(run)), caption=Text(_caption(run)), title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column("clean %", justify="right", no_wrap=True)
    table.add_column("robust % [95 % interval]", justify="right", no_wrap=True)
    table.add_column("λ", justify="right", no_wrap=True)
    for k, member in enumerate(run.members):
        weight = number(member.get("weight"))
        table.add_row(
            Text(": ".join(str(part) for part in (f"member {k}", member.get("name")) if part)),
            _percent(number(member.get("clean"))),
            _with_interval(_member_interval(member)),
            NONE if weight is None else f"{weight:.3f}",
        )
    table.add_section()
    table.add_row("mixture", _percent(run.clean.value), _with_interval(run.robust), "", style="bold")
    table.add_row("ensemble accuracy", _percent(number(run.get("clean", "ensemble_accuracy"))), NONE, "")
    if run.baseline is not None:
        base = run.baseline
        label = "baseline (one model)" if base.state == "done" else f"baseline ({base.state})"
        table.add_row(label, _percent(base.clean.value), _with_interval(base.robust), "")
    return table


def sweep_table(runs: Sequence[Run]) -> Table:
    """One row per run, in the order given; loss and solver move to the caption where all runs share them."""
    common = len(runs) > 1 and len({(run.loss, run.solver) for run in runs}) == 1
    shared = {"loss", "solver"} if common else set()
    table = Table(
        title=f"{len(runs)} runs",
        title_justify="left",
        caption=Text(_sweep_caption(runs, common)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    columns: list[tuple[str, list[str | Text]]] = [
        ("run", [Text(name) for name in short_names([run.path for run in runs])]),
        ("state", [_state(run) for run in runs]),
        ("ε", [format_eps(run.eps) for run in runs]),
        ("L", [_text(run.num_members) for run in runs]),
        ("loss", [Text(run.loss or NONE) for run in runs]),
        ("solver", [Text(run.solver or NONE) for run in runs]),
        ("seed", [_text(run.seed) for run in runs]),
        ("clean %", [_percent(run.clean.value) for run in runs]),
        ("robust % [95 %]", [_with_interval(run.robust) for run in runs]),
        ("baseline robust %", [_percent(r.baseline.robust.value if r.baseline else None) for r in runs]),
        ("λ", [" ".join(f"{w:.2f}" for w in run.weights) or NONE for run in runs]),
    ]
    # Narrower than this, words and numbers would break in the middle.
    narrowest = {"run": 12, "state": 10, "baseline robust %": 8, "λ": 9}
    for heading, _ in (columns := [column for column in columns if column[0] not in shared]):
        table.add_column(
            heading,
            justify="left" if heading in ("run", "state", "loss", "solver") else "right",
            overflow="fold",
            no_wrap=heading not in narrowest,
            min_width=narrowest.get(heading),
        )
    for cells in zip(*(column for _, column in columns), strict=True):
        table.add_row(*cells)
    return table


def print_whole(table: Table, console: Console) -> None:
    """Print a table; on a console that is too narrow for it, too wide rather than with columns lost."""
    needed = console.measure(table, options=console.options.update(width=10_000)).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def write_table_csv(runs: Sequence[Run], path: str | Path) -> Path:
    """Write a tidy csv, fractions in full precision: one row per run and classifier.

    Column `who` is "mixture", "ensemble" (clean only), "member 0", ..., "baseline". Column `robust` is at all points
    found, `pgd_20` under PGD-20 and `apgd` under all APGD attacks on the mixture, each alone; `matching_penny_gap` is
    the mixture's robust accuracy minus sum_k lambda_k of its members'. A run without results has one row, `who` =
    "mixture", its numbers empty.

    Raises:
        UserError: `path` cannot be written.
    """
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_HEADER, restval="", lineterminator="\n")
        writer.writeheader()
        for name, run in zip(short_names([run.path for run in runs]), runs, strict=True):
            setting = setting_of(run)
            about = {
                "run": name,
                "state": run.state,
                "reason": run.reason,
                "data": run.data,
                "norm": run.norm,
                "eps": run.eps,
                "L": run.num_members,
                "loss": run.loss,
                "solver": run.solver,
                "schedule": setting.schedule if setting else "",
                "epochs": setting.epochs if setting else None,
                "seed": run.seed,
                "train_seconds": run.training_seconds,
                "num_examples": run.num_examples,
            }
            for row in _csv_rows(run):
                writer.writerow({key: cell(value) for key, value in {**about, **row}.items()})
    return path


def _csv_rows(run: Run) -> list[dict[str, Any]]:
    def cells(measure: str, interval: Interval) -> dict[str, Any]:
        return dict(zip((measure, f"{measure}_low", f"{measure}_high"), interval, strict=True))

    rows = [{"who": "mixture", **cells("clean", run.clean), **cells("robust", run.robust)} | _under_attack(run)]
    if (ensemble := number(run.get("clean", "ensemble_accuracy"))) is not None:
        rows.append({"who": "ensemble", "clean": ensemble})
    for k, member in enumerate(run.members):
        rows.append(
            {
                "who": f"member {k}",
                "weight": number(member.get("weight")),
                "clean": number(member.get("clean")),
                "robust": number(member.get("robust")),
            }
        )
    if (base := run.baseline) is not None and base.results is not None:
        rows.append({"who": "baseline", **cells("clean", base.clean), **cells("robust", base.robust)})
    return rows


def _under_attack(run: Run) -> dict[str, Any]:
    """Robust accuracy under single families of attacks, and what the mixture has above the mean of its members."""
    try:
        means = {measure: float(each.mean()) for measure, each in measured(run).accuracies.items()}
    except ValueError:
        return {}
    return {"pgd_20": means.get(PGD), "apgd": means.get(APGD), "matching_penny_gap": means.get(GAP)}


def _member_interval(member: dict[str, Any]) -> Interval:
    """The interval that the evaluation stored; none is made up where it stored none."""
    low, high = (number(end) for end in (member.get("ci95") or (None, None)))
    return Interval(number(member.get("robust")), low, high)


def headline_parts(run: Run) -> list[str]:
    """Data, L, loss, solver and threat model, those that are known."""
    parts = [run.data, f"L = {run.num_members}" if run.num_members is not None else "", run.loss, run.solver]
    parts.append(format_ball(run.norm, run.eps) if run.eps is not None else "")
    return [part for part in parts if part]


def _headline(run: Run) -> str:
    seed = [] if run.seed is None else [f"seed {run.seed}"]
    return " · ".join([*headline_parts(run), *seed])


def _caption(run: Run) -> str:
    lines = []
    if run.num_examples is not None:
        whole = number(run.get("data", "num_test"))
        of = f" of {int(whole):,}" if whole is not None and whole > run.num_examples else ""
        lines.append(f"{run.num_examples:,}{of} test images, {format_ball(run.norm, run.eps)}")
    if run.attacks:
        lines.append("robust: per image the worst case over " + "; ".join(map(_attack, run.attacks.items())))
    return "\n".join(lines)


def _attack(item: tuple[str, Any]) -> str:
    name, entry = item
    settings = entry.get("settings") if isinstance(entry, dict) else None
    if not isinstance(settings, dict) or not settings:
        return name
    shown = ", ".join(
        f"{k}={group_name(v) if isinstance(v, dict) else v}" for k, v in settings.items() if k != "_target_"
    )
    return f"{name} ({shown})"


def _state(run: Run) -> Text:
    flags = run.get("flags")
    text = run.state + (f", {len(flags)} flagged" if isinstance(flags, list) and flags else "")
    return Text(text + (", damaged" if run.notes else ""), style=_STATE_STYLES[run.state])


def _sweep_caption(runs: Sequence[Run], common: bool) -> str:
    data = sorted({run.data for run in runs if run.data})
    norms = sorted({norm_symbol(run.norm) for run in runs if run.norm})
    attacks = sorted({", ".join(run.attacks) for run in runs if run.attacks})
    learned = [runs[0].loss, runs[0].solver] if common else []
    lines = [" · ".join(part for part in (", ".join(data), *learned, ", ".join(norms)) if part)]
    lines.append("robust: per image the worst case over " + " | ".join(attacks) if attacks else "")
    names = short_names([run.path for run in runs])
    lines += [f"{name}: {run.reason}" for name, run in zip(names, runs, strict=True) if run.reason]
    lines += [note for run in runs for note in run.notes]
    return "\n".join(line for line in lines if line)


def progress(run: Run) -> str:
    """How far an unfinished run came, from its history."""
    epochs = run.history.get("epoch", np.array([]))
    epochs = epochs[np.isfinite(epochs)]
    if not len(epochs):
        return ""
    robust = run.history.get("val/robust_accuracy", np.array([]))
    robust = robust[np.isfinite(robust)]
    last = f", validation robust accuracy {100 * robust[-1]:.1f} %" if len(robust) else ""
    return f" after {epochs[-1]:.3g} epochs per model{last}"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _with_interval(interval: Interval) -> Text:
    text = _percent(interval.value)
    if interval.low is not None and interval.high is not None:
        text += f" [{_percent(interval.low)}, {_percent(interval.high)}]"
    return Text(text)


def _text(value: Any) -> str:
    return NONE if value is None else str(value)
