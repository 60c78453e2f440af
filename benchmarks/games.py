"""Finite games: the linear program by constraint generation, in full by scipy, Algorithm 1 and the entropic solver.

Every measurement runs in a process of its own, so that its peak memory is its own; times are the least of the repeats,
imports excluded. Gaps and errors are in units of the largest |loss|: the gap is certified (value less lower bound),
the error is the value less the equilibrium's, which the linear program gives. Four kinds of games [N, m, L]:

    uniform    every loss uniform in [0, 1]: the optimum mixes all members
    coins      every loss 0 or 1, with a frequency of its own for each member
    logistic   logistic losses of random linear classifiers at random points of a ball
    errors     the 0/1 losses of the same classifiers there

    python benchmarks/games.py [--repeats 3] [--threads 2] [--full-limit 120] [--json games.json]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mixadv.game import FiniteGame
from mixadv.lambda_solvers import AcceleratedEntropic, LinearProgram, OracleSubgradient

SMALL, MEDIUM, LARGE = (200, 200, 10), (1000, 1000, 10), (50_000, 20, 8)
KINDS = ("uniform", "coins", "logistic", "errors")
TARGETS = {MEDIUM: 0.5, LARGE: 5.0}
GROWTH = ((200, 200, 10), (300, 300, 10), (400, 400, 10), (600, 600, 10), (800, 800, 10), (1000, 1000, 10))
ORACLE_STEPS, ENTROPIC_STEPS, ALPHA = 4000, 1000, 1e-4


def game_losses(kind: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Losses [N, m, L]: float32, or bool."""
    generator = torch.Generator().manual_seed(seed)
    n, m, members = shape
    if kind == "uniform":
        return torch.rand(shape, generator=generator)
    if kind == "coins":
        return torch.rand(shape, generator=generator) < 0.15 + 0.3 * torch.rand(members, generator=generator)
    dimensions, eps = 6, 1.2
    w = torch.randn(members, dimensions, generator=generator)
    w /= w.norm(dim=1, keepdim=True)
    w[:, 0] = w[:, 0].abs() + 0.5
    labels = torch.randint(2, (n,), generator=generator) * 2 - 1
    x = torch.randn(n, dimensions, generator=generator)
    x[:, 0] += 1.5 * labels
    losses = torch.empty(shape, dtype=torch.float32 if kind == "logistic" else torch.bool)
    for j in range(m):
        step = torch.randn(n, dimensions, generator=generator)
        radius = eps * torch.rand(n, 1, generator=generator) ** (1 / dimensions) if j else 0.0
        margins = (x + step * (radius / step.norm(dim=1, keepdim=True))) @ w.T * labels[:, None]
        losses[:, j] = torch.nn.functional.softplus(-2 * margins) if kind == "logistic" else margins <= 0
    return losses


def full_program(losses: Tensor, time_limit: float) -> float | None:
    """V by one linear program with a row per example and perturbation; None where the time is not enough."""
    n, m, members = losses.shape
    flat = losses.reshape(n * m, members).double().numpy()
    row = np.arange(n * m)
    rows = np.concatenate([np.repeat(row, members), row])
    columns = np.concatenate([np.tile(np.arange(members), n * m), members + row // m])
    entries = np.concatenate([flat.reshape(-1), np.full(n * m, -1.0)])
    found = linprog(
        np.concatenate([np.zeros(members), np.full(n, 1 / n)]),
        A_ub=coo_array((entries, (rows, columns)), shape=(n * m, members + n)).tocsc(),
        b_ub=np.zeros(n * m),
        A_eq=np.concatenate([np.ones(members), np.zeros(n)])[None],
        b_eq=[1.0],
        bounds=[(0, None)] * members + [(None, None)] * n,
        options={"time_limit": time_limit},
    )
    return found.fun if found.status == 0 else None


def resident() -> float:
    """The peak of this process's memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(job: dict) -> dict:
    """One measurement, in this process."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    method, shape = job["method"], tuple(job["shape"])
    LinearProgram().solve(FiniteGame(torch.rand(5, 4, 3)))  # Imports.
    losses = game_losses(job["kind"], shape, job["seed"])
    game = FiniteGame(losses)
    solvers = {
        "program": LinearProgram(tolerance=job.get("tolerance", 1e-9)),
        "oracle": OracleSubgradient(ORACLE_STEPS),
        "entropic": AcceleratedEntropic(ALPHA * game.max_loss, ENTROPIC_STEPS),
    }
    before, times, record = resident(), [], {}
    for _ in range(job["repeats"]):
        started = time.perf_counter()
        if method == "full":
            value = full_program(losses, job["limit"])
            record = {"value": value}
        else:
            found = solvers[method].solve(game)
            record = {
                "value": found.value,
                "gap": found.gap / game.max_loss,
                "status": found.status,
                "steps": len(found.history["value"]),
                "members": int((found.weights > 1e-3).sum()),
                "best_values": found.history["best_value"] if method in ("oracle", "entropic") else None,
            }
        times.append(time.perf_counter() - started)
    return record | {
        "seconds": min(times),
        "slowest": max(times),
        "max_loss": game.max_loss,
        "losses_mib": losses.numel() * losses.element_size() / 2**20,
        "before_mib": before,
        "peak_mib": resident(),
    }


def run(**job) -> dict:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    return job | result


def compare(kind: str, common: dict) -> list[dict]:
    """All methods on one small game, to a gap or error of 1e-6."""
    program = run(method="program", kind=kind, shape=SMALL, tolerance=1e-6, **common)
    exact = run(method="program", kind=kind, shape=SMALL, **common)
    results = [program, run(method="full", kind=kind, shape=SMALL, **common)]
    results += [
        run(method=method, kind=kind, shape=SMALL, **common | {"repeats": 1}) for method in ("oracle", "entropic")
    ]
    for result in results:
        result["error"] = (result["value"] - exact["value"]) / exact["max_loss"]
        values = result.pop("best_values", None)
        if values is not None:
            reached = [(value - exact["value"]) / exact["max_loss"] <= 1e-6 for value in values]
            # Steps cost the same, so the part of them that was needed is the part of the time.
            part = (reached.index(True) + 1) / len(values) if any(reached) else None
            result["seconds_to_1e-6"] = part and part * result["seconds"]
        else:
            result["seconds_to_1e-6"] = result["seconds"]
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-limit", type=float, default=120.0, help="seconds for scipy's full program")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    common = {"repeats": args.repeats, "threads": args.threads, "seed": args.seed, "limit": args.full_limit}
    threads = args.threads or torch.get_num_threads()
    versions = f"torch {torch.__version__}, scipy {scipy.__version__}"
    print(f"CPU, {threads} threads, {versions}, {args.repeats} repeats, load {os.getloadavg()[0]:.1f}\n")

    print("To 1e-6 of the largest loss: N = 200, m = 200, L = 10")
    print(f"{'game':<10}{'method':<12}{'s to 1e-6':>10}{'s':>9}{'steps':>7}{'error':>10}{'gap':>10}")
    names = {"program": "ours", "full": "full LP", "oracle": "Algorithm 1", "entropic": "entropic"}
    small = []
    for kind in KINDS:
        for result in compare(kind, common):
            small.append(result)
            reached = result["seconds_to_1e-6"]
            print(
                f"{kind:<10}{names[result['method']]:<12}{'not' if reached is None else f'{reached:.3f}':>10}"
                f"{result['seconds']:>9.3f}{result.get('steps', 1):>7}{result['error']:>10.1e}"
                + (f"{result['gap']:>10.1e}" if "gap" in result else f"{'-':>10}"),
                flush=True,
            )

    print(f"\nscipy's full program on growing games, uniform, at most {args.full_limit:g} s each")
    print(f"{'N':>6}{'m':>6}{'L':>4}{'full s':>10}{'MiB':>8}{'ours s':>9}{'MiB':>8}{'ratio':>8}")
    growth = []
    for shape in GROWTH:
        full = run(method="full", kind="uniform", shape=shape, **common | {"repeats": 1})
        ours = run(method="program", kind="uniform", shape=shape, **common)
        growth.append({"full": full, "ours": ours})
        done = full["value"] is not None
        cells = f"{full['seconds']:>10.2f}" if done else f"{'too long':>10}"
        ratio = f"{full['seconds'] / ours['seconds']:>8.0f}" if done else f"{'-':>8}"
        sizes = "".join(f"{size:>{width}}" for size, width in zip(shape, (6, 6, 4), strict=True))
        print(
            f"{sizes}{cells}{full['peak_mib']:>8.0f}{ours['seconds']:>9.3f}{ours['peak_mib']:>8.0f}{ratio}", flush=True
        )
        if not done:
            break

    print("\nOurs to 1e-9 of the largest loss; memory in MiB: the losses, the process before and at its peak")
    print(
        f"{'N':>6}{'m':>6}{'L':>4} {'game':<10}{'least s':>8}{'most s':>8}{'target':>7}{'steps':>6}"
        f"{'gap':>9}{'mixed':>6}{'losses':>8}{'before':>8}{'peak':>8}"
    )
    large = []
    for shape, target in TARGETS.items():
        for kind in KINDS:
            result = run(method="program", kind=kind, shape=shape, **common)
            large.append(result)
            sizes = "".join(f"{size:>{width}}" for size, width in zip(shape, (6, 6, 4), strict=True))
            print(
                f"{sizes} {kind:<10}{result['seconds']:>8.3f}{result['slowest']:>8.3f}{target:>7.1f}"
                f"{result['steps']:>6}{result['gap']:>9.1e}{result['members']:>6}{result['losses_mib']:>8.0f}"
                f"{result['before_mib']:>8.0f}{result['peak_mib']:>8.0f}",
                flush=True,
            )
    if args.json:
        report = {"threads": threads, "versions": versions, "small": small, "growth": growth, "large": large}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
