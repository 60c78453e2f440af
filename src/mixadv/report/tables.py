"""Tables and sentences about runs; accuracies are printed in per cent, files keep fractions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mixadv.report.attacks import everybody, settings_text
from mixadv.report.cells import NONE, add_row, new_table, percent, percent_with, plain, write_csv
from mixadv.report.files import Run
from mixadv.report.names import format_ball, format_eps, norm_symbol, short_names
from mixadv.report.records import APGD, GAP, PGD, measured
from mixadv.report.settings import setting_of

_STATE_STYLES = {"done": "green", "running": "cyan", "failed": "red", "unfinished": "yellow"}
CSV_HEADER = [
    *("run", "state", "reason", "data", "norm", "eps", "L", "loss", "solver", "schedule", "epochs", "seed"),
    *("train_seconds", "num_examples", "who", "weight", "clean", "clean_low", "clean_high"),
    *("robust", "robust_low", "robust_high", "pgd_20", "apgd", "matching_penny_gap"),
]


def results_table(run: Run) -> Table:
    """Each member alone, the mixture, its ensemble and its baseline: clean, robust [95 % interval], lambda.

    "mixture" is the randomized classifier, its accuracies exact expectations over the draw of a member;
    "ensemble accuracy" is argmax of the averaged probabilities, a different and deterministic classifier,
    given on clean images only. All intervals are those that the evaluation stored.
    """
    headings = ("", "clean %", "robust % [95 % interval]", "λ")
    table = new_table(_headline(run), headings, words=[""], folds={"": 1}, caption=_caption(run))
    found = everybody(run)
    for k in range(len(run.members)):
        member = found[f"member {k}"]
        cells = [member.label, percent(member.clean.value), percent_with(member.robust), plain(member.weight, ".3f")]
        add_row(table, cells)
    table.add_section()
    for who in ("mixture", "ensemble", "baseline"):
        if who in found:
            label = who if who == "mixture" else found[who].label
            cells = [label, percent(found[who].clean.value), percent_with(found[who].robust), ""]
            add_row(table, cells, style="bold" if who == "mixture" else "")
    return table


def sweep_table(runs: Sequence[Run]) -> Table:
    """One row per run, in the order given; loss and solver move to the caption where all runs share them."""
    common = len(runs) > 1 and len({(run.loss, run.solver) for run in runs}) == 1
    shared = {"loss", "solver"} if common else set()
    columns: dict[str, list[str | Text]] = {
        "run": [*short_names([run.path for run in runs])],
        "state": [_state(run) for run in runs],
        "ε": [format_eps(run.eps) for run in runs],
        "L": [plain(run.num_members) for run in runs],
        "loss": [run.loss or NONE for run in runs],
        "solver": [run.solver or NONE for run in runs],
        "seed": [plain(run.seed) for run in runs],
        "clean %": [percent(run.clean.value) for run in runs],
        "robust % [95 %]": [percent_with(run.robust) for run in runs],
        "baseline robust %": [percent(run.baseline.robust.value if run.baseline else None) for run in runs],
        "λ": [" ".join(f"{w:.2f}" for w in run.weights) or NONE for run in runs],
    }
    columns = {heading: cells for heading, cells in columns.items() if heading not in shared}
    table = new_table(
        f"{len(runs)} runs",
        [*columns],
        words=("run", "state", "loss", "solver"),
        folds={"run": 12, "state": 10, "baseline robust %": 8, "λ": 9},
        caption=_sweep_caption(runs, common),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for cells in zip(*columns.values(), strict=True):
        add_row(table, cells)
    return table


def write_table_csv(runs: Sequence[Run], path: str | Path) -> Path:
    """Write a tidy csv, fractions in full precision: one row per run and classifier.

    Column `who` is "mixture", "ensemble" (clean only), "member 0", ..., "baseline". Column `robust` is at all points
    found, `pgd_20` under PGD-20 and `apgd` under all APGD attacks on the mixture, each alone; `matching_penny_gap` is
    the mixture's robust accuracy minus sum_k lambda_k of its members'. A run without results has one row, `who` =
    "mixture", its numbers empty.

    Raises:
        UserError: `path` cannot be written.
    """
    rows = []
    for name, run in zip(short_names([run.path for run in runs]), runs, strict=True):
        setting = setting_of(run)
        about = {
            "run": name,
            **{key: getattr(run, key) for key in ("state", "reason", "data", "norm", "eps", "loss", "solver", "seed")},
            "L": run.num_members,
            "schedule": setting.schedule if setting else "",
            "epochs": setting.epochs if setting else None,
            "train_seconds": run.training_seconds,
            "num_examples": run.num_examples,
        }
        rows += [about | row for row in _csv_rows(run)]
    return write_csv(path, CSV_HEADER, rows)


def _csv_rows(run: Run) -> list[dict[str, Any]]:
    rows = []
    found = everybody(run)
    for who in ("mixture", "ensemble", *(f"member {k}" for k in range(len(run.members))), "baseline"):
        if who not in found or (who == "ensemble" and found[who].clean.value is None):
            continue
        if who == "baseline" and (run.baseline is None or run.baseline.results is None):
            continue
        row = {"who": who, "weight": found[who].weight}
        for measure, at in (("clean", found[who].clean), ("robust", found[who].robust)):
            row[measure] = at.value
            if not who.startswith("member "):
                row |= {f"{measure}_low": at.low, f"{measure}_high": at.high}
        rows.append(row | (_under_attack(run) if who == "mixture" else {}))
    return rows


def _under_attack(run: Run) -> dict[str, Any]:
    """Robust accuracy under single families of attacks, and what the mixture has above the mean of its members."""
    try:
        means = {measure: float(each.mean()) for measure, each in measured(run).accuracies.items()}
    except ValueError:
        return {}
    return {"pgd_20": means.get(PGD), "apgd": means.get(APGD), "matching_penny_gap": means.get(GAP)}


def headline_parts(run: Run) -> list[str]:
    """Data, L, loss, solver and threat model, those that are known."""
    parts = [run.data, f"L = {run.num_members}" if run.num_members is not None else "", run.loss, run.solver]
    parts.append(format_ball(run.norm, run.eps) if run.eps is not None else "")
    return [part for part in parts if part]


def _headline(run: Run) -> str:
    seed = [] if run.seed is None else [f"seed {run.seed}"]
    return " · ".join([*headline_parts(run), *seed])


def _caption(run: Run) -> str:
    lines = [f"{run.images}, {format_ball(run.norm, run.eps)}"] if run.images else []
    if run.attacks:
        lines.append("robust: per image the worst case over " + "; ".join(map(_attack, run.attacks.items())))
    return "\n".join(lines)


def _attack(item: tuple[str, Any]) -> str:
    name, entry = item
    said = settings_text(entry.get("settings"), with_class=False) if isinstance(entry, dict) else ""
    return f"{name} ({said})" if said else name


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
    epochs, robust = run.last("epoch"), run.last("val/robust_accuracy")
    if epochs is None:
        return ""
    accuracy = "" if robust is None else f", validation robust accuracy {100 * robust:.1f} %"
    return f" after {epochs:.3g} epochs per model{accuracy}"
