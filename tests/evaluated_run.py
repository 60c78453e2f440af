"""A run directory as task=evaluate leaves it, computed from points that are drawn here (asymmetric, any L)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mixadv.results import from_json, write

ATTACKS = {
    "pgd-20": {"_target_": "mixadv.attacks.pgd.PGD", "num_steps": 20, "step_size": 0.25, "restarts": 5},
    "apgd-ce": {"_target_": "mixadv.attacks.apgd.APGD", "loss": "ce"},
    "arc": {"_target_": "mixadv.attacks.arc.ARC", "num_steps": 40, "variant": "published"},
    "square": {"_target_": "mixadv.attacks.square.Square", "num_queries": 500},
}
MIXTURE_ONLY = ("arc", "square")  # attacks that do not transfer
FLAGS = [
    {
        "name": "black-box-beats-white-box",
        "evidence": "square reached 0.41, below apgd-ce with 0.44.",
        "remedy": "Look for masked gradients: run apgd-ce with more steps and restarts.",
    }
]


def interval(mean: float, count: int) -> list[float]:
    """Wilson's interval, which scipy computes for a number of successes: exact where mean · count is whole."""
    ci = stats.binomtest(round(mean * count), count).proportion_ci(method="wilson")
    return [float(ci.low), float(ci.high)]


def results_of(weights: list[float], count: int, seed: int, rng: np.random.Generator) -> tuple[dict, dict]:
    """results.json and the arrays of records.npz of a made-up mixture on `count` images."""
    size = len(weights)
    lam = np.array(weights)
    strength = rng.random(count) * 0.7 + rng.random((size, count)) * 0.3  # how hard each member is to fool
    clean = strength > 0.12
    found = {}
    for i, name in enumerate(ATTACKS):
        level = 0.44 + 0.02 * i
        found[name] = strength + 0.25 * rng.random((size, count)) > level
        if size > 1 and name not in MIXTURE_ONLY:
            for k in range(size):
                at = strength + 0.35 * rng.random((size, count))
                at[k] = strength[k]
                found[f"{name} on member {k}"] = at > level
            found[f"{name} on averaged twin"] = strength + 0.2 * rng.random((size, count)) > level
    found = {key: correct & clean for key, correct in found.items()}

    def averaged(correct: np.ndarray) -> np.ndarray:
        return lam @ correct > 0.45

    points = np.stack([clean, *found.values()])
    expected = np.tensordot(points, lam, axes=([1], [0]))
    first = np.array(["clean", *found])[expected.argmin(axis=0)]
    robust, members = expected.min(axis=0), points.all(axis=0)
    twin = np.all([averaged(correct) for correct in points], axis=0)
    attacks = {}
    for i, (name, settings) in enumerate(ATTACKS.items()):
        parts = [key for key in found if key.startswith(f"{name} on ")]
        alone = [name if size == 1 else f"{name} on member {k}" for k in range(size)]
        on_twin = f"{name} on averaged twin"
        attacks[name] = {
            "expected_accuracy": float((lam @ found[name]).mean()),
            "ensemble_accuracy": float(averaged(found[name]).mean()),
            "replayed_from_parts": float(np.min([lam @ found[key] for key in parts], axis=0).mean()) if parts else None,
            "members": [float(found[key][k].mean()) if key in found else None for k, key in enumerate(alone)],
            "averaged_twin": float(averaged(found[on_twin]).mean()) if on_twin in found else None,
            "worst_found": int(sum(key in (name, *parts) for key in first)),
            "seconds": 3.25 + 4 * i,
            "seconds_on_parts": 7.5 * (len(parts) > 0),
            "settings": settings,
        }
    risk = 1 - float(robust.mean())
    results = {
        "schema": 2,
        "task": "evaluate",
        "seed": seed,
        "device": "cpu (x86_64, 2 threads)",
        "versions": {"python": "3.11.9", "mixadv": "0.2.0", "torch": "2.8.0"},
        "git": "0123456789abcdef0123456789abcdef01234567-dirty",
        "date": "2026-03-04T05:06:07+00:00",
        "command": "python run.py task=evaluate mixture=outputs/train/quickstart 'name=a b'",
        "config": {"task": "evaluate", "mixture": "outputs/train/quickstart", "eps": "8/255", "L": size, "seed": seed},
        "threat_model": {"norm": "linf", "eps": 8 / 255},
        "protocol": "strict",
        "L": size,
        "weights": weights,
        "num_examples": count,
        "data": {"name": "CIFAR-10", "num_test": 10_000},
        "clean": {
            "expected_accuracy": float((lam @ clean).mean()),
            "ensemble_accuracy": float(averaged(clean).mean()),
            "ci95": interval(float((lam @ clean).mean()), count),
        },
        "robust": {"expected_accuracy": float(robust.mean()), "ci95": interval(float(robust.mean()), count)},
        "averaged_twin": {
            "clean": float(averaged(clean).mean()),
            "robust": float(twin.mean()),
            "ci95": interval(float(twin.mean()), count),
        },
        "members": [
            {
                "clean": float(clean[k].mean()),
                "robust": float(members[k].mean()),
                "ci95": interval(float(members[k].mean()), count),
            }
            for k in range(size)
        ],
        "attacks": attacks,
        "game": {
            "value_at_weights": risk,
            "value_lp": risk - 0.0125,
            "gap": 0.0125,
            "matching_penny_gap": 0.0875 if size > 1 else 0.0,
        },
        "flags": [],
        "curves": curves(size),
        "seconds": {"evaluate": 61.5, "total": 63.75},
    }
    records = {
        "labels": np.arange(count) % 10,
        "weights": lam,
        "clean": lam @ clean,
        "robust": robust,
        "found_by": first,
        "members_robust": members.astype(np.uint8),
        "averaged_twin_robust": twin.astype(np.uint8),
        **{f"attack/{name}": lam @ found[name] for name in ATTACKS},
    }
    return results, records


def curves(size: int) -> dict[str, Any]:
    """Accuracy against eps and loss against steps, every line another one."""
    eps = np.array([0, 1, 2, 4, 8, 16, 32, 64]) / 255
    steps = np.array([0, 1, 2, 5, 10, 20, 50, 100])
    return {
        "num_examples": 250,
        "eps": {
            "eps": eps.tolist(),
            "mixture": (0.83 * np.exp(-20 * eps)).tolist(),
            "members": [(0.8 * np.exp(-(22 + 4 * k) * eps)).tolist() for k in range(size)],
            "averaged_twin": (0.85 * np.exp(-26 * eps)).tolist(),
        },
        "steps": {
            "steps": steps.tolist(),
            "mixture": (1.6 - 1.1 * np.exp(-steps / 4)).tolist(),
            "members": [(1.9 + 0.1 * k - 1.3 * np.exp(-steps / 3)).tolist() for k in range(size)],
            "averaged_twin": (1.5 - 1.1 * np.exp(-steps / 4)).tolist(),
        },
    }


def examples(size: int, count: int, channels: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Smooth images with a pattern of at most 8/255 added."""
    grid = np.linspace(0, 1, 16)
    phase = rng.random((count, channels, 1, 1)) * 6
    x = 0.5 + 0.4 * np.sin(5 * grid[:, None] + 4 * grid[None, :] ** 2 + phase)
    noise = 8 / 255 * np.sign(rng.standard_normal(x.shape))
    correct = rng.random((size, count)) > 0.6
    correct[:, 0], correct[:, 1] = True, False
    names = np.array(["airplane", "a rather long name of a class of things", "frog"])
    passes = np.array(["clean", "apgd-ce on member 2", "arc", "pgd-20 on averaged twin"])
    return {
        "x": x.astype(np.float32),
        "x_adv": np.clip(x + noise, 0, 1).astype(np.float32),
        "labels": names[np.arange(count) % 3],
        "correct": correct.astype(np.uint8),
        "found_by": passes[np.arange(count) % 4],
    }


def known(node: Any) -> Any:
    """Nested containers without what is null in them."""
    if isinstance(node, dict):
        return {key: known(value) for key, value in node.items() if value is not None}
    return [known(value) for value in node] if isinstance(node, list) else node


def write_results(path: Path, content: dict[str, Any]) -> None:
    """Write a results.json through the module that owns the format; nothing in `content` may be unknown to it."""
    content = json.loads(json.dumps(content, default=float))
    found, problems = from_json(content)
    assert problems == []
    write(path, found)
    assert known(json.loads(path.read_text())) == known(content)


def write_evaluation(
    path: Path,
    *,
    weights: tuple[float, ...] = (0.5, 0.2, 0.3),
    count: int = 400,
    seed: int = 0,
    pictures: int = 5,
    channels: int = 3,
) -> dict[str, Any]:
    """Write the directory; returns the content of its results.json."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    results, records = results_of(list(weights), count, seed, rng)
    write_results(path / "results.json", results)
    np.savez(path / "records.npz", **records)
    if pictures:
        np.savez(path / "examples.npz", **examples(len(weights), pictures, channels, rng))
    (path / "DONE").touch()
    return json.loads((path / "results.json").read_text())
