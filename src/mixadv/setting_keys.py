"""Configurations as flat keys, and which of them change no number."""

from typing import Any

# They may differ when a run is continued or shown, and between runs that are compared.
INDIFFERENT = (
    *("resume", "name", "runs", "compile", "logger", "data.mirrors", "data.download", "micro_batch_size"),
    "optimized_metric",
    *("callbacks.checkpoint.train_time_interval", "callbacks.checkpoint.every_n_train_steps"),
    *("callbacks.progress", "callbacks.lr_monitor"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler", "trainer.detect_anomaly"),
)


def is_indifferent(key: str) -> bool:
    """Whether a dotted key, or what it belongs to, is one of `INDIFFERENT`."""
    return any(key == skip or key.startswith(f"{skip}.") for skip in INDIFFERENT)


def flat_settings(node: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(flat_settings(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
