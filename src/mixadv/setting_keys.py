"""Configurations as flat, dotted keys, and the keys that do not change results."""

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
