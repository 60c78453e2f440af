"""Mixtures on disk: a folder of safetensors, config.json and a card, from which nothing can run code."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mixadv.errors import UserError
from mixadv.mixture import Mixture
from mixadv.models import MODELS, build_member

EXPORT_SCHEMA = 1
WEIGHTS_FILE = "mixture.safetensors"
CONFIG_FILE = "config.json"


def build_mixture(config: dict[str, Any]) -> Mixture:
    """A freshly initialised mixture as a recipe says.

    Args:
        config: ``L`` and ``model`` = {name, num_classes, image_shape, mean, std, further arguments of the factory}.

    Raises:
        ValueError: unknown model or arguments that it does not take.
    """
    model = dict(config["model"])
    name = model.pop("name")
    try:
        return Mixture([build_member(name, **model) for _ in range(int(config["L"]))])
    except TypeError as error:
        raise ValueError(f"model={name} does not take these settings: {error}") from None


def save_mixture(mixture: Mixture, directory: Path, config: dict[str, Any], card: str) -> None:
    """Write `directory` with the parameters, the recipe `config` (plain JSON) and README.md = `card`.

    Each file is written beside its place and renamed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in mixture.state_dict().items()}
    temporary = directory / f"{WEIGHTS_FILE}.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, directory / WEIGHTS_FILE)
    record = {"schema": EXPORT_SCHEMA, **config, "weights": mixture.weights.tolist()}
    for name, text in ((CONFIG_FILE, json.dumps(record, indent=2) + "\n"), ("README.md", card)):
        temporary = directory / f"{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, directory / name)


def read_mixture(path: str | Path) -> tuple[Mixture, dict[str, Any]]:
    """The mixture at `path` in eval mode, and the recipe stored with it.

    Args:
        path: an exported ``mixture/`` folder, a run directory that holds one, or a training checkpoint (.ckpt).

    Raises:
        UserError: nothing usable there: missing, torn, of another schema, or naming an unknown model.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        from mixadv.monitor.checkpoints import read_checkpoint

        checkpoint = read_checkpoint(path)
        config = checkpoint.get("mixture_config")
        if config is None:
            raise UserError(f"{path} does not say how to build its mixture: it was not written by mixadv")
        prefix = "mixture."
        state = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        return _assemble(path, config, state), config
    folder = path if (path / CONFIG_FILE).is_file() else path / "mixture"
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"no mixture at {path}: expected a folder with {CONFIG_FILE}, a run directory or a .ckpt file")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(folder / WEIGHTS_FILE)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        raise UserError(f"the mixture in {folder} cannot be read ({error}): export it again") from error
    if not isinstance(config, dict) or config.get("schema") != EXPORT_SCHEMA:
        found = config.get("schema") if isinstance(config, dict) else None
        raise UserError(f"{folder / CONFIG_FILE} has schema {found}; this version reads schema {EXPORT_SCHEMA}")
    return _assemble(folder, config, state), config


def _check_recipe(path: Path, config: dict[str, Any]) -> None:
    """A recipe may come from anywhere: only plain settings of the right kinds, and nothing that gets resolved."""
    for key in ("model", "threat_model", "data"):
        if key in config and not isinstance(config[key], dict):
            raise UserError(f"the recipe in {path} has {key}={config[key]!r}, which is not a mapping")
    name = config.get("model", {}).get("name")
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"the recipe in {path} wants the model {name!r}: known are {', '.join(MODELS)}")
    if "${" in json.dumps(config):
        raise UserError(f"the recipe in {path} holds an interpolation ${{...}}: those are not resolved for a mixture")


def _assemble(path: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Mixture:
    _check_recipe(path, config)
    try:
        mixture = build_mixture(config)
        mixture.load_state_dict(state)
        # The file's lambda has to be one: set_weights refuses anything else.
        mixture.set_weights(mixture.weights.clone())
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the parameters in {path} do not fit its recipe (L={config.get('L')}): {reason}") from error
    return mixture.eval()


def load_mixture(path: str | Path) -> Mixture:
    """The mixture at `path` in eval mode; see `read_mixture`."""
    return read_mixture(path)[0]
