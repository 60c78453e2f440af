"""The configuration that comes with the package: where it lies, and the objects that it names."""

import importlib
from pathlib import Path
from typing import Any

from mixadv.errors import UserError


def config_dir() -> str:
    """The directory of the shipped configuration: inside the package when installed, else the checkout's."""
    here = Path(__file__).resolve().parent
    installed = here / "conf"
    return str(installed if installed.is_dir() else here.parents[1] / "conf")


def protocols() -> list[str]:
    """The names that `protocol=NAME` takes."""
    return sorted(file.stem for file in (Path(config_dir()) / "protocol").glob("*.yaml"))


def shipped_protocol(name: str) -> dict[str, Any]:
    """What ``protocol=NAME`` holds before a command changes any of it, with what it builds on.

    Raises:
        UserError: there is no such protocol.
    """
    import yaml

    if name not in protocols():
        raise UserError(f"protocol={name} is unknown: choose one of {', '.join(protocols())}")
    own = yaml.safe_load((Path(config_dir()) / "protocol" / f"{name}.yaml").read_text())
    whole: dict[str, Any] = {}
    for base in own.pop("defaults", ["_self_"]):
        layer = own if base == "_self_" else shipped_protocol(base)
        whole |= layer | {"attacks": whole.get("attacks", {}) | layer.get("attacks", {})}
    return whole


def refuse_aliases(path: Path) -> None:
    """Look whether a YAML file has aliases: none of ours has, and a few of them grow to more than memory holds.

    Raises:
        ValueError: it has.
    """
    import yaml

    with path.open(encoding="utf-8") as file:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(file, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases (*name)")


def construct(settings: dict[str, Any], key: str) -> Any:
    """Build the object that ``_target_`` names, from this package alone; nested mappings with a ``_target_`` as well.

    Args:
        settings: ``_target_`` and the arguments of the class.
        key: what the settings are called, for messages.

    Raises:
        UserError: the target is not a class of this package, does not exist, or refuses its arguments.
    """
    arguments = dict(settings)
    target = str(arguments.pop("_target_", ""))
    module, _, name = target.rpartition(".")
    if not module.startswith("mixadv."):
        raise UserError(f"{key}._target_={target!r} is not a class of mixadv: nothing else is run from a configuration")
    nested = {
        k: construct(v, f"{key}.{k}") if isinstance(v, dict) and "_target_" in v else v for k, v in arguments.items()
    }
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(f"{key}._target_={target} does not exist") from None
    # A module also holds functions and what it imports: neither may be called by a configuration.
    if not isinstance(cls, type) or not cls.__module__.startswith("mixadv."):
        raise UserError(f"{key}._target_={target} is not a class of mixadv: nothing else is run from a configuration")
    try:
        return cls(**nested)
    except TypeError as error:
        raise UserError(f"{key}: {str(error).replace('.__init__()', '')}") from error
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
