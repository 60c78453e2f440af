"""The configuration files of the package: their directory, and the content of the protocols."""

from pathlib import Path
from typing import Any

from mixadv.errors import UserError


def config_dir() -> str:
    """The directory of the shipped configuration: in the installed package, else in the checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "conf"
    return str(installed if installed.is_dir() else here.parents[1] / "conf")


def protocols() -> list[str]:
    """The names that `protocol=NAME` takes."""
    return sorted(file.stem for file in (Path(config_dir()) / "protocol").glob("*.yaml"))


def shipped_protocol(name: str) -> dict[str, Any]:
    """The settings of ``protocol=NAME`` without changes by a command, with those of the protocols it builds on.

    Raises:
        UserError: there is no such protocol.
    """
    import yaml

    if name not in protocols():
        raise UserError(f"protocol={name} is unknown: choose one of {', '.join(protocols())}")
    own = yaml.safe_load((Path(config_dir()) / "protocol" / f"{name}.yaml").read_text(encoding="utf-8"))
    whole: dict[str, Any] = {}
    for base in own.pop("defaults", ["_self_"]):
        layer = own if base == "_self_" else shipped_protocol(base)
        whole |= layer | {"attacks": whole.get("attacks", {}) | layer.get("attacks", {})}
    return whole


def refuse_aliases(path: Path) -> None:
    """Refuse a YAML file with aliases: a few nested ones expand to more than memory holds, and mixadv writes none.

    Raises:
        ValueError: the file has an alias.
    """
    import yaml

    with path.open(encoding="utf-8") as file:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(file, Loader=yaml.SafeLoader)):
            raise ValueError("it has aliases (*name)")
