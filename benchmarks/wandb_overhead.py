"""What the logger of Weights & Biases costs (offline): the same training with and without, interleaved.

Small steps (digits, a linear model) make its share as large as it gets. Each run is a process of its own, from
the start of Python to its end. Prints medians over the repeats and the spread (largest over smallest) of wall time and
of processor time (the program's, wandb's background process not included), and the seconds that the program spent
inside `WandbLogger`: what a busy machine disturbs least.

    python benchmarks/wandb_overhead.py [--epochs 60] [--repeats 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
SETTINGS = (
    *("data=digits", "model=linear", "lambda_solver.num_steps=5", "schedule.T_theta=50", "data.batch_size=32"),
    *("protocol.validation.num_steps=10", "protocol.attacks.pgd-20.restarts=1", "protocol.diagnosed=0", "eps=0.1"),
    *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "name=run"),
)
# Of the logger: what Lightning and the run call.
METHODS = (
    *("__init__", "log_hyperparams", "log_graph", "log_metrics", "summary", "images", "after_save_checkpoint"),
    *("finalize", "finish"),
)


def run(logger: str, epochs: int) -> None:
    """One run in this process; its times go to times.json."""
    sys.path.insert(0, str(SOURCE))
    from mixadv.loggers.wandb import WandbLogger
    from mixadv.main import main as program

    inside: dict[str, list[float]] = {}
    depth = 0

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            started, depth = time.perf_counter(), depth + 1
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1
                # What one method asks of another is in its own time already.
                if not depth:
                    inside.setdefault(name, []).append(time.perf_counter() - started)

        return call

    for name in METHODS:
        setattr(WandbLogger, name, timed(name, getattr(WandbLogger, name)))
    sys.argv = ["run.py", *SETTINGS, f"logger={logger}", f"trainer.max_epochs={epochs}"]
    program()
    parts = {name: [len(seconds), sum(seconds)] for name, seconds in inside.items()}
    Path("times.json").write_text(json.dumps({"cpu": time.process_time(), "inside": parts}))


def measure(logger: str, epochs: int) -> dict[str, Any]:
    """Start a run in a folder of its own; its wall time, processor time and seconds inside the logger."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--epochs", str(epochs), "--inside", logger]
        environment = {**os.environ, "WANDB_MODE": "offline", "HOME": folder}
        started = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
        wall = time.perf_counter() - started
        return {"wall": wall, **json.loads((Path(folder) / "times.json").read_text())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--inside", choices=["csv", "wandb"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run(args.inside, args.epochs)
        return
    runs: dict[str, list[dict[str, Any]]] = {"csv": [], "wandb": []}
    for _ in range(args.repeats):
        for logger, done in runs.items():
            done.append(measure(logger, args.epochs))
    load = os.getloadavg()[0]
    print(f"{args.epochs} epochs, {args.repeats} repeats, {os.cpu_count()} cores, load {load:.1f} at the end")
    medians = {}
    for kind in ("wall", "cpu"):
        for logger, done in runs.items():
            values = [one[kind] for one in done]
            medians[kind, logger] = statistics.median(values)
            spread = max(values) / min(values)
            print(f"{kind:>4} s, logger={logger:<5} {medians[kind, logger]:8.2f}   spread {spread:.2f}")
        print(f"{kind:>4}: with / without {medians[kind, 'wandb'] / medians[kind, 'csv']:.3f}")
    for part in runs["wandb"][0]["inside"]:
        seconds = statistics.median(one["inside"][part][1] for one in runs["wandb"])
        print(f"inside {part.strip('_'):<8} {seconds:7.3f} s in {runs['wandb'][0]['inside'][part][0]} calls")
    shares = [sum(s for _, s in one["inside"].values()) / one["wall"] for one in runs["wandb"]]
    print(
        f"share of wall time inside the logger: {100 * statistics.median(shares):.2f} %, up to {100 * max(shares):.2f}"
    )


if __name__ == "__main__":
    main()
