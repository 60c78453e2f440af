"""One-line messages for commands that Hydra cannot compose."""

import re
import sys
from contextlib import suppress

from omegaconf import DictConfig, OmegaConf

from mixadv.command_line import PATH_KEYS, quoted, unreadable
from mixadv.setting_keys import flat_settings
from mixadv.shipped import config_dir
from mixadv.unknown_keys import unknown_key

# Launcher -> the extra of mixadv that installs it; sweeper -> the arguments of `pip install`.
LAUNCHER_EXTRAS = {"joblib": "parallel", "submitit_slurm": "slurm", "submitit_local": "slurm"}
SWEEPER_PACKAGES = {"optuna": "hydra-optuna-sweeper 'optuna<3'"}


def composition_message(error: Exception) -> str:
    """One line for an error of Hydra or OmegaConf, whose own text spans several exceptions and lines.

    Args:
        error: raised by Hydra's application while it composed ``sys.argv``.
    """
    from hydra.core.override_parser.overrides_parser import OverrideParseException
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if group == "hydra/launcher" and choice in LAUNCHER_EXTRAS:
            extra = LAUNCHER_EXTRAS[choice]
            return f"launch={extra} needs a launcher that is not installed: pip install -e '.[{extra}]'"
        if group == "hydra/sweeper" and choice in SWEEPER_PACKAGES:
            return f"{group}={choice} is not installed: pip install {SWEEPER_PACKAGES[choice]}"
        return f"{group}={choice} is unknown: choose one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines[0].startswith("Ambiguous value"):
        return _one_value(lines[0])
    if lines[0].startswith("Could not override"):
        name = lines[0].split("'")[1]
        return unknown_key(name, _known_keys(), _value_of(name))
    # Only the first line is about the user's mistake; the others are OmegaConf's internals.
    cause = error.__cause__ or error.__context__
    reason = str(cause).splitlines()[0] if cause is not None else ""
    if "is not a ListConfig" in reason:
        setting = lines[0].removeprefix("Error merging override ")
        return f"{setting} is not a list: write '{setting.replace('=', '=[', 1)}]', with quotes for the shell"
    if found := re.fullmatch(r"In '(.+)': \w+ raised while composing config:", lines[0]):
        key = getattr(cause, "full_key", None)
        if isinstance(cause, KeyError | AttributeError) and key:
            reason = unknown_key(key, _known_keys())
        return f"{found[1]}.yaml: {reason if not key or key in reason else f'{key}: {reason}'}"
    return lines[0].removeprefix("Error merging override ") + (f": {reason}" if reason else "")


def _one_value(message: str) -> str:
    """The message on several values for one; Hydra's is "Ambiguous value for argument 'KEY=A,B'..."."""
    key, _, value = message.partition("'")[2].rpartition("'")[0].partition("=")
    if key in ("weights", "members"):
        remedy = f"a list has brackets, '{key}=[A,B]'"
    elif key in PATH_KEYS:
        # The quotes that `for_hydra` has set around the parts.
        value = value.replace("'", "")
        remedy = "there is no such path"
    else:
        remedy = f'give one value (a text with commas in quotes, "{key}={quoted(value)}")'
    return f"Ambiguous value for argument '{key}={value}': {remedy}, or add -m to sweep over all of them"


def _known_keys() -> set[str]:
    """The keys and groups of the configuration with the groups that the command chooses, if those can be composed."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    def composed(choices: list[str]) -> DictConfig:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(version_base="1.3", config_dir=config_dir()):
            return hydra.compose("config", overrides=choices, return_hydra_config=True)

    cfg = composed([])
    groups = set(cfg.hydra.runtime.choices)
    chosen = [word for word in sys.argv[1:] if word.partition("=")[0].lstrip("+") in groups]
    # The command may also choose a group that does not exist.
    with suppress(HydraException, OmegaConfBaseException):
        cfg = composed(chosen)
    return groups | set(flat_settings(OmegaConf.to_container(cfg, resolve=False)))


def _value_of(key: str) -> str | None:
    """The text that the command line gives as the value of `key`."""
    words = (word.partition("=") for word in sys.argv[1:])
    return next((value for name, equals, value in words if equals and name.lstrip("+") == key), None)
