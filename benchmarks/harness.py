"""What the benchmarks share: the machine they ran on, interleaved timing, tables, and JSON files.

Runs that are compared are timed in turn, round after round, so that whatever slows the machine down for a while slows
all of them. What is reported is the median over the rounds, and the spread: the slowest over the fastest.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# The package of this checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch

ROOT = Path(__file__).resolve().parents[1]


def results_folder() -> Path:
    """Where results go: $OUT if set, else outputs/benchmarks of the repository. Made if missing."""
    folder = Path(os.environ.get("OUT") or ROOT / "outputs" / "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cpu_model() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """The machine and its state now: processor, cores, threads of torch, versions, GPU, load average, date (UTC)."""
    affinity = getattr(os, "sched_getaffinity", None)
    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe() -> str:
    """The environment in one line."""
    found = environment()
    load = f", load {found['load'][0]:.1f}" if found["load"] else ""
    gpu = f", {found['gpu']}" if found["gpu"] else ""
    return f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads{gpu}, torch {found['torch']}{load}"


def seconds(run: Callable[[], object], synchronize: torch.device | str | None = None) -> float:
    """Wall time of one call; on a CUDA device, until its work is done.

    Args:
        run: what to time.
        synchronize: the device that does the work; None and the CPU need no waiting.
    """
    cuda = synchronize is not None and torch.device(synchronize).type == "cuda"
    if cuda:
        torch.cuda.synchronize(synchronize)
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(synchronize)
    return time.perf_counter() - started


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    synchronize: torch.device | str | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call: each round calls every run once, in order, every second round in reverse.

    Args:
        runs: what to time, by name.
        repeats: rounds that count, at least 1.
        warmup: calls of each run before the first round, not counted.
        synchronize: the device that does the work.
    """
    for run in runs.values():
        for _ in range(warmup):
            seconds(run, synchronize)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            times[name].append(seconds(runs[name], synchronize))
    return times


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """For each name its median in seconds and its spread (slowest over fastest)."""
    return {
        name: {"median": statistics.median(values), "spread": max(values) / min(values)}
        for name, values in times.items()
    }


def paired_ratio(times: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """Median over the rounds of `name`'s seconds over `other`'s: less disturbed than the ratio of medians."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str] | None = None) -> None:
    """Print rows as an aligned table: floats with three significant digits, `-` for what is missing.

    Args:
        rows: dictionaries; keys that are not among the columns are left out.
        columns: the keys to show, or {key: heading}; None shows the keys of the first row.
    """
    if not rows:
        return
    columns = list(rows[0]) if columns is None else columns
    headings = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    cells = [list(headings.values()), *([_cell(row.get(key)) for key in headings] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    left = [all(isinstance(row.get(key), str | None) for row in rows) for key in headings]
    for line in cells:
        aligned = (
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, left, strict=True)
        )
        print("  ".join(aligned).rstrip(), flush=True)


def save(name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """Write rows, settings and the environment to NAME.json in the results folder; returns the path and prints it."""
    path = results_folder() / f"{name}.json"
    record = {"benchmark": name, "environment": environment(), "settings": dict(settings), "rows": list(rows)}
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    print(f"written to {path}", flush=True)
    return path
