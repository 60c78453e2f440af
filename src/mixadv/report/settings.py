"""The settings that distinguish two trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixadv.report.names import number
from mixadv.setting_keys import flat_settings, is_indifferent
from mixadv.unknown_keys import RENAMED

# Beside `setting_keys.INDIFFERENT`: keys that change no number, and keys that `Run` has an attribute for.
_LEFT_OUT = (
    "seed",
    "data.seed",
    "baseline",
    "mixture",
    "members",
    "weights",
    "paths",
    "hydra",
    "trainer.log_every_n_steps",
)


def relevant_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> value as text, for the settings that can change results; seeds and paths are left out."""
    # Version 0.1 had other names for some keys.
    flat = {RENAMED.get(key, key): value for key, value in flat_settings(dict(config)).items()}
    for key in ("model", "scheduler"):
        if isinstance(target := flat.pop(f"{key}._target_", None), str):
            flat[key] = target.rpartition(".")[2]
    return {
        key: str(value)
        for key, value in flat.items()
        if not is_indifferent(key) and not is_within(key, _LEFT_OUT) and not _is_path(value)
    }


def is_within(key: str, groups: Sequence[str]) -> bool:
    """Whether a dotted key or one of its parents is in `groups`."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _is_path(value: Any) -> bool:
    """Whether a setting looks like a path; "8/255" is a number."""
    return isinstance(value, str) and ("/" in value or "\\" in value) and number(value) is None
