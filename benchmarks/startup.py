"""How long the program takes to start, in fresh processes: imports, --help, --cfg job, and the first training step.

Medians of the repeats after one that fills the caches, wall time and time of the processor. Targets: `import mixadv`
within 0.3 s of `import torch`, without what only parts of it need; `run.py --help` within 2 s.

    python benchmarks/startup.py [--repeats 7] [--skip-training]
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, describe, save, table

RUN = str(ROOT / "run.py")
HEAVY = (
    *("torch", "pytorch_lightning", "lightning", "torchvision", "torchmetrics", "wandb", "scipy", "sklearn"),
    *("matplotlib", "hydra", "omegaconf", "rich", "PIL", "numpy", "sympy"),
)
LAZY = ("pytorch_lightning", "lightning", "torchvision", "torchmetrics", "wandb", "scipy", "sklearn", "matplotlib")
USES = {
    "import mixadv": "import mixadv",
    "mixadv.Mixture": "from mixadv import Mixture, ThreatModel",
    "mixadv.attacks": "from mixadv.attacks import PGD, APGD, ARC, Square, AttackSuite",
    "mixadv.lambda_solvers": "from mixadv.lambda_solvers import LinearProgram, OracleSubgradient, AcceleratedEntropic",
}


def environment() -> dict[str, str]:
    """That of a user in a checkout, with nothing mirrored."""
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120", "WANDB_MODE": "disabled"}


def timed(command: list[str], cwd: Path, repeats: int) -> dict[str, float]:
    """Medians over fresh processes, after one that does not count."""
    walls, cpus = [], []
    for _ in range(repeats + 1):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, cwd=cwd, env=environment(), check=True, capture_output=True)
        walls.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    walls, cpus = walls[1:], cpus[1:]
    return {"s": statistics.median(walls), "spread": max(walls) / min(walls), "processor s": statistics.median(cpus)}


def heavy_modules(statement: str) -> list[str]:
    """Which of HEAVY are loaded after the statement, in a fresh process."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def first_step(cwd: Path, name: str) -> tuple[float, float]:
    """Seconds from the start of `experiment=quickstart` to its first logged step; what the steps took of them."""
    command = [
        sys.executable,
        RUN,
        "experiment=quickstart",
        "logger=csv",
        f"name={name}",
        "trainer.log_every_n_steps=1",
    ]
    history = cwd / "outputs" / "train" / name / "metrics.csv"
    started = time.perf_counter()
    run = subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (history.exists() and history.read_text().count("\n") > 1):
            if run.poll() is not None:
                raise RuntimeError(f"the training ended without a step: {run.stderr.read().decode()}")
            if time.perf_counter() - started > 120:
                raise RuntimeError("no training step after 120 s")
            time.sleep(0.01)
        took = time.perf_counter() - started
        row = next(csv.DictReader(history.read_text().splitlines()))
        return took, float(row["seconds"])
    finally:
        # Nothing of this run is wanted.
        run.kill()
        run.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-training", action="store_true")
    args = parser.parse_args()
    print(describe())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cwd = Path(folder)
        commands = {
            "python -c pass": ["-c", "pass"],
            "import torch": ["-c", "import torch"],
            "import mixadv": ["-c", "import mixadv"],
            "from mixadv import Mixture": ["-c", USES["mixadv.Mixture"]],
            "run.py --help": [RUN, "--help"],
            "run.py --cfg job": [RUN, "--cfg", "job"],
            "run.py (refused)": ["-c", f"import subprocess, sys; subprocess.run([sys.executable, {RUN!r}, 'L=0'])"],
        }
        for name, command in commands.items():
            rows.append({"what": name} | timed([sys.executable, *command], cwd, args.repeats))
        if not args.skip_training:
            found = [first_step(cwd, f"run{i}") for i in range(args.repeats)]
            walls = [wall for wall, _ in found]
            row = {"what": "quickstart's first step", "s": statistics.median(walls), "spread": max(walls) / min(walls)}
            rows.append(row | {"of it in training s": statistics.median(inside for _, inside in found)})
    table(rows, ["what", "s", "spread", "processor s"])
    seconds = {row["what"]: row["s"] for row in rows}
    modules = {name: heavy_modules(statement) for name, statement in USES.items()}
    print()
    for name, loaded in modules.items():
        print(f"{name}: loads {', '.join(loaded) or 'nothing heavy'}")
    targets = {
        "import mixadv - import torch <= 0.3 s": seconds["import mixadv"] - seconds["import torch"] <= 0.3,
        "Mixture - import torch <= 0.3 s": seconds["from mixadv import Mixture"] - seconds["import torch"] <= 0.3,
        "run.py --help <= 2 s": seconds["run.py --help"] <= 2,
        "import mixadv loads nothing that is lazy": not set(modules["import mixadv"]) & set(LAZY),
        "Mixture loads nothing that is lazy": not set(modules["mixadv.Mixture"]) & set(LAZY),
    }
    print()
    for name, met in targets.items():
        print(f"{'met   ' if met else 'MISSED'}  {name}")
    save("startup", rows, {"repeats": args.repeats, "modules": modules, "targets": targets})


if __name__ == "__main__":
    main()
