"""Loggers for Lightning's Trainer: the local metrics.csv, and Weights & Biases.

Importing this package imports neither Lightning nor wandb: a name loads its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixadv.loggers.csv import CSVLogger
    from mixadv.loggers.hyperparameters import flat_config
    from mixadv.loggers.metrics_file import MetricsFile, read_rows
    from mixadv.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "MetricsFile", "WandbLogger", "flat_config", "read_rows"]

_HOMES = {
    "CSVLogger": "csv",
    "MetricsFile": "metrics_file",
    "WandbLogger": "wandb",
    "flat_config": "hyperparameters",
    "read_rows": "metrics_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
