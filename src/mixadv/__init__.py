"""Mixtures of classifiers that are optimal against adversarial examples.

The names below are imported at their first use, so that ``import mixadv`` itself is fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixadv.members.store import load_mixture
    from mixadv.mixture import Mixture
    from mixadv.threat_model import ThreatModel

__version__ = "0.1.0"
__all__ = ["Mixture", "ThreatModel", "load_mixture"]

_HOMES = {"Mixture": "mixadv.mixture", "ThreatModel": "mixadv.threat_model", "load_mixture": "mixadv.members.store"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
