"""Configurations as flat, dotted keys, and the keys that do not change results."""

import math
from typing import Any

# Keys that do not change results. They may differ when a run is continued, and between runs that are compared.
INDIFFERENT = (
    "resume",
    "name",
    "runs",
    "compile",
    "logger",
    "micro_batch_size",
    "optimized_metric",
    "data.mirrors",
    "data.download",
    "callbacks.checkpoint.train_time_interval",
    "callbacks.checkpoint.every_n_train_steps",
    "callbacks.progress",
    "callbacks.lr_monitor",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.profiler",
    "trainer.detect_anomaly",
)


# Settings of a training. A run that trains nothing does not read them, so it does not record their defaults as facts.
TRAINING = (
    *("loss", "attack", "lambda_solver", "schedule", "optimizer", "scheduler", "callbacks", "baseline"),
    "micro_batch_size",
)
# What task=evaluate and task=solve read of `trainer`.
_TRAINER = (
    *("accelerator", "strategy", "devices", "num_nodes", "enable_progress_bar", "fast_dev_run"),
    *("limit_val_batches", "limit_test_batches"),
)


# What task=predict reads.
PREDICT = ("task", "mixture", "members", "predict", "seed", "name", "trainer")


def settings_read(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a resolved configuration that its task reads.

    task=evaluate and task=solve leave out those of a training (task=solve reads ``lambda_solver``), of games and of
    reports; task=predict all but `PREDICT`, which no other task reads. Only task=solve reads ``biases``.
    """
    task = config.get("task")
    unread = {"predict"} if task == "solve" else {"predict", "biases"}
    if task in ("evaluate", "solve"):
        unread |= {*TRAINING, "game", "runs"} - ({"lambda_solver"} if task == "solve" else set())
    if task == "predict":
        unread = {*config} - {*PREDICT}
    kept = {key: value for key, value in config.items() if key not in unread}
    if task not in ("evaluate", "solve", "predict"):
        return kept
    if isinstance(trainer := kept.get("trainer"), dict):
        kept["trainer"] = {key: value for key, value in trainer.items() if key in _TRAINER}
    return kept


def is_indifferent(key: str) -> bool:
    """Whether a dotted key or one of its parents is in `INDIFFERENT`."""
    return any(key == skip or key.startswith(f"{skip}.") for skip in INDIFFERENT)


def flat_settings(node: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by dotted key."""
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(flat_settings(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def comparable(value: Any) -> Any:
    """A setting as plain JSON by its meaning: numbers and fractions that are written as text are numbers."""
    if isinstance(value, (list, tuple)):
        return [comparable(part) for part in value]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    numerator, _, denominator = str(value).partition("/")
    try:
        number = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        return value
    return number if math.isfinite(number) else str(value)
