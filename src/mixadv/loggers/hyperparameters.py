"""The settings of a run as flat hyperparameters, by which loggers can filter and sort runs."""

from collections.abc import Mapping
from typing import Any


def flat_config(cfg: Mapping[str, Any], choices: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """Numbers and names of choices at the top level; the full settings of groups below ``settings``.

    ``{"eps": "8/255", "L": 2, "loss": {"_target_": "mixadv.losses.AT"}}`` with the choice ``loss: at`` becomes
    ``{"eps": 0.0313..., "L": 2, "loss": "at", "settings": {"loss": {"_target_": ...}, "eps": "8/255"}}``.
    Every value of `cfg` is kept: the settings of groups, and eps as the user wrote it, move to ``settings``.

    Args:
        cfg: the configuration in plain containers.
        choices: group -> chosen file, as Hydra's ``runtime.choices``; Hydra's own groups (``hydra/...``) and groups
            without a choice (None or "null") are ignored.
        eps: the radius as a number, in input units.
    """
    named = {
        group: choice
        for group, choice in choices.items()
        if group.split("/")[0] != "hydra" and choice not in (None, "null")
    }
    groups = {key: value for key, value in cfg.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in cfg.items() if key not in groups}
    settings = {**groups, **({"eps": cfg["eps"]} if "eps" in cfg else {})}
    return {**named, **plain, "eps": eps, "settings": settings}
