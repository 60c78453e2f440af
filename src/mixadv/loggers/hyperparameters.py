"""The settings of a run as hyperparameters that loggers can filter, sort and plot by."""

from collections.abc import Mapping
from typing import Any


def flat_config(cfg: Mapping[str, Any], choices: Mapping[str, Any], eps: float) -> dict[str, Any]:
    """Plain numbers and names at the top, the full settings of the groups below ``settings``.

    ``{"eps": "8/255", "L": 2, "loss": {"_target_": "mixadv.losses.AT"}}`` with the choice ``loss: at`` becomes
    ``{"eps": 0.0313..., "L": 2, "loss": "at", "settings": {"loss": {"_target_": ...}, "eps": "8/255"}}``.
    Every value of `cfg` is kept: a group's settings move to ``settings``, and so does eps as it was written.

    Args:
        cfg: the configuration in plain containers.
        choices: group -> its chosen file, as Hydra's ``runtime.choices``; groups of Hydra (``hydra/...``) and
            groups without a choice (None or "null") are left out.
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
