"""A run directory as task=train leaves it, with made-up numbers (asymmetric, any L)."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from evaluated_run import write_results

WEIGHTS = [0.5, 0.2, 0.3]
SOLVERS = {"oracle": "OracleSubgradient", "entropic": "AcceleratedEntropic"}


def trained_config(**keys: Any) -> dict[str, Any]:
    solver, loss = keys.pop("solver", "oracle"), keys.pop("loss", "TRADES")
    return {
        "task": "train",
        "name": None,
        "eps": "8/255",
        "L": 3,
        "seed": 0,
        "loss": {"_target_": f"mixadv.losses.{loss}"},
        "lambda_solver": {"_target_": f"mixadv.lambda_solvers.{SOLVERS[solver]}", "num_steps": 10},
        "threat_model": {"norm": "linf"},
        "data": {"_target_": "mixadv.data.digits.Digits", "batch_size": 64},
        **keys,
    }


def per_example(count: int, weights: list[float], accuracy: float, seed: int) -> np.ndarray:
    """Expected accuracies [count] of a mixture whose member k is right with probability near `accuracy`."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count)[:, None] * 0.6 + rng.random((count, len(weights))) * 0.4
    return (hard < accuracy) @ np.array(weights)


def write_run(
    path: Path,
    *,
    eps: float = 8 / 255,
    weights: list[float] | None = None,
    robust: float = 0.5,
    clean: float = 0.83,
    rows: int = 40,
    state: str = "DONE",
    count: int = 400,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    noise: int = 0,
) -> Path:
    """A run directory as training leaves it; `noise` seeds the numbers, `seed` is the one recorded."""
    weights = WEIGHTS if weights is None else weights
    size = len(weights)
    path.mkdir(parents=True)
    resolved = trained_config(**{"eps": eps, "L": size, "seed": seed, **(settings or {})})
    (path / "config.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in resolved.items()) + "\n")
    rng = np.random.default_rng(noise)
    if rows:
        header = ["epoch", "step", "member_updates", "seconds", "train/loss", "train/adversarial_accuracy"]
        header += ["train/lr", "val/clean_accuracy", "val/robust_accuracy", "val/ensemble_accuracy"]
        header += ["weights/value", "weights/lower_bound", *(f"lambda/{k}" for k in range(size))]
        with open(path / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
            writer.writeheader()
            for t in range(1, rows + 1):
                done = t / rows
                row: dict[str, Any] = {"epoch": 0.5 * t, "step": t, "seconds": 1.5 * t, "train/lr": 0.1}
                row["train/loss"] = 0.9 + 1.4 * math.exp(-4 * done) + 0.12 * rng.standard_normal()
                if t % 4 == 0:
                    row["val/clean_accuracy"] = clean - 0.5 * math.exp(-5 * done)
                    row["val/robust_accuracy"] = robust + 0.02 - 0.3 * math.exp(-4 * done)
                    row["val/ensemble_accuracy"] = clean + 0.01 - 0.5 * math.exp(-5 * done)
                if t % 3 == 0:
                    row["weights/value"] = 1.1 + 1.2 * math.exp(-4 * done) + 0.05 * rng.standard_normal()
                    row["weights/lower_bound"] = row["weights/value"] - 0.07
                    lam = 1 / size + (np.array(weights) - 1 / size) * done
                    row.update({f"lambda/{k}": repr(float(v)) for k, v in enumerate(lam)})
                writer.writerow(row)
    if state == "FAILED":
        (path / "FAILED").write_text("the loss became NaN\nin step 17\n")
        return path
    if state == "":
        return path
    robust_each = per_example(count, weights, robust, noise + 1)
    clean_each = per_example(count, weights, clean, noise + 2)

    def summary(values: np.ndarray) -> dict[str, Any]:
        half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
        return {"expected_accuracy": values.mean(), "ci95": [values.mean() - half, values.mean() + half]}

    flagged = settings is None and size == 3
    results = {
        "schema": 2,
        "task": "train",
        "seed": seed,
        "config": resolved,
        "threat_model": {"norm": "linf", "eps": eps},
        "L": size,
        "weights": weights,
        "num_examples": count,
        "data": {"name": "Digits", "num_test": 450},
        "clean": {**summary(clean_each), "ensemble_accuracy": 0.8575},
        "robust": summary(robust_each),
        "attacks": {
            "pgd-20": {
                "expected_accuracy": 0.6,
                "settings": {"num_steps": 20, "restarts": 5, "objective": {"_target_": "a.b.ExpectedLoss"}},
                "seconds": 3.0,
            },
            "square": {"expected_accuracy": 0.7, "settings": {"num_queries": 500}, "seconds": 9.0},
        },
        "members": [
            {
                "clean": clean - 0.03 * k,
                "robust": robust - 0.11 + 0.04 * k,
                "ci95": [robust - 0.16 + 0.04 * k, robust - 0.04 + 0.03 * k],
            }
            for k in range(size)
        ],
        "flags": [{"name": "black box", "evidence": "It beats white box.", "remedy": ""}] if flagged else [],
        "seconds": {"train": 131.4, "evaluate": 12.2, "total": 143.6},
    }
    write_results(path / "results.json", results)
    np.savez(
        path / "records.npz",
        labels=np.arange(count) % 10,
        clean=clean_each,
        robust=robust_each,
        weights=np.array(weights),
    )
    (path / state).touch()
    return path
