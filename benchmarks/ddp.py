"""Two processes against one: the same training with the same global batch, on the CPU (gloo).

Three ways to use two cores: one process with one thread, one process with two threads, two processes with one thread
each (trainer=ddp_cpu). All serve the same batches and, without batch norm, compute the same. Efficiency is the speed
over one thread's, divided by two. Times are those of training steps, weights phases apart, read from the run's own
history; start-up and the final evaluation are not in them.

    python benchmarks/ddp.py [--models small_resnet small_cnn] [--batch 128] [--repeats 3] [--quick]
"""

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, describe, save, table

WAYS = {"1 process, 1 thread": ("cpu", 1), "1 process, 2 threads": ("cpu", 2), "2 processes": ("ddp_cpu", 1)}
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


def arguments(args: argparse.Namespace, model: str, trainer: str, name: str) -> list[str]:
    """The command line of one training."""
    data = ("data=cifar10", f"data.root={args.data}") if args.data else ("data=digits", "data.padding=1")
    return [
        *(sys.executable, str(ROOT / "run.py"), "logger=csv", f"trainer={trainer}", f"name={name}", "seed=1"),
        *data,
        *(f"data.batch_size={args.batch}", f"data.num_train={args.steps * args.batch}", "data.num_val=20"),
        *("data.num_test=20", f"model={model}", f"L={args.members}", "eps=0.1", "schedule=shared"),
        *("lambda_solver=uniform", "trainer.max_epochs=1", f"attack.num_steps={args.attack_steps}"),
        *("scheduler=constant", "optimizer.lr=0.01", "trainer.log_every_n_steps=1"),
        *("trainer.enable_progress_bar=false", "protocol.validation.num_steps=0", "protocol.diagnosed=0"),
        *("~protocol.attacks.arc", "~protocol.attacks.subsets", "protocol.attacks.pgd-20.num_steps=1"),
        "protocol.attacks.pgd-20.restarts=1",
    ]


def seconds_per_step(args: argparse.Namespace, model: str, way: str, cwd: Path, name: str) -> tuple[float, float]:
    """Median seconds between logged training steps, the first left out, and the last step's loss."""
    trainer, threads = WAYS[way]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    environment |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "src")}
    command = arguments(args, model, trainer, name)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=cwd, env=environment, **both)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stdout}")
    with (cwd / "outputs" / "train" / name / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    ends = [float(row["seconds"]) for row in rows]
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:])), float(rows[-1]["train/loss"])


def measure(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """The three ways, in turn."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.repeats):
            for j, way in enumerate(WAYS):
                took, losses[way] = seconds_per_step(args, model, way, Path(folder), f"run{i}-{j}")
                times[way].append(took)
    base = statistics.median(times["1 process, 1 thread"])
    rows = []
    for way, values in times.items():
        middle = statistics.median(values)
        row = {"model": model, "way": way, "ms per step": 1e3 * middle, "spread": max(values) / min(values)}
        row |= {"speed-up": base / middle, "last loss": losses[way]}
        rows.append(row | {"efficiency %": None if way == "1 process, 1 thread" else 50 * base / middle})
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small_resnet", "small_cnn"])
    parser.add_argument("--data", metavar="FOLDER", help="with CIFAR-10 in it; else digits, 8x8")
    parser.add_argument("--batch", type=int, default=128, help="global")
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of five small steps")
    args = parser.parse_args()
    if args.quick:
        args.models, args.batch, args.attack_steps, args.steps, args.repeats = args.models[-1:], 32, 2, 5, 1
    print(describe())
    rows = [row for model in args.models for row in measure(args, model)]
    table(rows)
    save("ddp", rows, vars(args))


if __name__ == "__main__":
    main()
