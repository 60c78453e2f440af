"""Mixtures on disk: a folder of safetensors, config.json and a card, from which nothing can run code."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mixadv.checkpoint_files import read_checkpoint
from mixadv.errors import UserError
from mixadv.files import replacing
from mixadv.members.recipe import Recipe, check_factories, check_size, checked_config, member_recipes
from mixadv.mixture import Mixture

# What config.json holds: schema 1 one recipe `model` for all members, schema 2 a list `models` with one for each.
EXPORT_SCHEMAS = {"model": 1, "models": 2}
WEIGHTS_FILE = "mixture.safetensors"
CONFIG_FILE = "config.json"


def save_mixture(mixture: Mixture, directory: Path, config: Mapping[str, Any], card: str) -> None:
    """Write `directory` with the parameters, the recipe `config` (plain JSON) and README.md = `card`.

    Each file is written beside its place and renamed. Where all members have one recipe, config.json holds it
    once, as ``model``. Tensors that members share (tied parameters) are stored once for each name.

    Raises:
        ValueError: `config` is not the recipe of so many members.
        UserError: a member keeps something that safetensors cannot hold.
    """
    recipes = member_recipes(config)
    if len(recipes) != mixture.num_members:
        raise ValueError(f"the mixture has {mixture.num_members} members, its recipe says L={len(recipes)}")
    form = "model" if all(recipe == recipes[0] for recipe in recipes) else "models"
    own = {"model": recipes[0].record()} if form == "model" else {"models": [recipe.record() for recipe in recipes]}
    rest = {key: value for key, value in config.items() if key not in ("schema", "L", "model", "models", "weights")}
    record = {"schema": EXPORT_SCHEMAS[form], "L": len(recipes), **own, **rest, "weights": mixture.weights.tolist()}
    text = json.dumps(record, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (WEIGHTS_FILE, partial(_save_tensors, mixture.state_dict())),
        (CONFIG_FILE, lambda path: path.write_text(text)),
        ("README.md", lambda path: path.write_text(card)),
    ):
        with replacing(directory / name) as temporary:
            write(temporary)


def _save_tensors(state: Mapping[str, Any], path: Path) -> None:
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name} is a {type(value).__name__}: only tensors can be exported; make it a buffer")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{name} is no dense tensor with values: only those can be exported; make it one")
    # A copy each: safetensors refuses tensors that share memory.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    try:
        save_file(tensors, path)
    except KeyError as error:
        raise UserError(f"safetensors cannot hold tensors of {error}: convert them before the export") from error


def read_mixture(path: str | Path, factories: Sequence[str] = ()) -> tuple[Mixture, dict[str, Any]]:
    """The mixture at `path` in eval mode, and the recipe stored with it.

    Args:
        path: an exported ``mixture/`` folder, a run directory that holds one, or a training checkpoint (.ckpt).
        factories: import paths ``package.module:callable`` that may build members, see `build_factory`. A
            recipe that names any other code is refused; the parameters come from the file all the same.

    Raises:
        UserError: nothing usable there: missing, torn, of another schema, naming an unknown model or code that
            is not in `factories`.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        return mixture_of_checkpoint(path, read_checkpoint(path), factories)
    folder, config = _folder(path)
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the mixture in {folder} cannot be read ({error}): export it again") from error
    return _assemble(folder, config, state, factories), config


def read_config(path: str | Path, checkpoint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The recipe alone of the mixture at `path`, checked but not built: no parameters, no code.

    Args:
        path: see `read_mixture`.
        checkpoint: what was loaded of it, where it is a training checkpoint and read already.

    Raises:
        UserError: as for `read_mixture`, as far as the recipe tells.
    """
    path = Path(path)
    if checkpoint is None and path.suffix != ".ckpt":
        return _folder(path)[1]
    config = (checkpoint or read_checkpoint(path)).get("mixture_config")
    if config is None:
        raise UserError(f"{path} does not say how to build its mixture: it was not written by mixadv")
    return checked_config(path, config)


def _folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """The exported folder at `path` or in it, and its recipe."""
    folder = path if (path / CONFIG_FILE).is_file() else path / "mixture"
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"no mixture at {path}: expected a folder with {CONFIG_FILE}, a run directory or a .ckpt file")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"the mixture in {folder} cannot be read ({error}): export it again") from error
    found, wanted = None, 1
    if isinstance(config, dict):
        found, wanted = config.get("schema"), EXPORT_SCHEMAS["models" if "models" in config else "model"]
    if found != wanted:
        raise UserError(
            f"{folder / CONFIG_FILE} has schema {found}; this version reads schema 1 (all members of one model) and "
            "schema 2 (models): export it again, or update mixadv"
        )
    return folder, checked_config(folder, config)


def mixture_of_checkpoint(
    path: Path, checkpoint: Mapping[str, Any], factories: Sequence[str] = ()
) -> tuple[Mixture, dict[str, Any]]:
    """The mixture in a loaded training checkpoint, in eval mode, and its recipe; `path` is for messages.

    Raises:
        UserError: the checkpoint is not ours, or as for `read_mixture`.
    """
    config = read_config(path, checkpoint)
    stored = checkpoint.get("state_dict")
    if not isinstance(stored, Mapping):
        raise UserError(f"{path} holds no state_dict: it is not a training checkpoint")
    prefix = "mixture."
    state = {str(k).removeprefix(prefix): v for k, v in stored.items() if str(k).startswith(prefix)}
    return _assemble(path, config, state, factories), config


def _assemble(path: Path, config: dict[str, Any], state: Mapping[str, Any], factories: Sequence[str]) -> Mixture:
    num_members = config.get("L")
    try:
        # Before they are built: a tampered recipe may ask for more than memory holds.
        if isinstance(num_members, int) and num_members > (held := torch.as_tensor(state.get("weights", [])).numel()):
            raise ValueError(f"there are weights for {held} members")
        recipes = member_recipes(config)
        check_factories(path, recipes, factories)
        check_size(recipes, state)
        mixture = Mixture([recipe.build() for recipe in recipes])
        mixture.load_state_dict(state)
        # The file's lambda has to be one: set_weights refuses anything else.
        mixture.set_weights(mixture.weights.clone())
        _check_content(config, recipes, mixture)
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        # load_state_dict puts its reasons below a heading.
        reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
        reason = reason[:200] + "..." * (len(reason) > 200)
        raise UserError(
            f"the parameters in {path} do not fit its recipe (L={num_members}): {reason}; export it again"
        ) from error
    return mixture.eval()


def _check_content(config: Mapping[str, Any], recipes: Sequence[Recipe], mixture: Mixture) -> None:
    """Numbers are numbers, and the weights that the recipe repeats for its readers are those that count."""
    for k, (recipe, member) in enumerate(zip(recipes, mixture.members, strict=True)):
        # Code of others may keep infinities in its buffers.
        for name, tensor in member.named_parameters() if recipe.is_factory else member.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"members.{k}.{name} holds numbers that are not finite")
    held = mixture.weights.tolist()
    said = config.get("weights", held)
    numbers = isinstance(said, list) and [type(weight) in (int, float) for weight in said] == [True] * len(held)
    if not numbers or any(not abs(a - b) <= 1e-6 for a, b in zip(said, held, strict=True)):
        shown = ",".join(f"{weight:.6g}" for weight in held)
        raise ValueError(
            f"weights={said} there, [{shown}] in the file; task=evaluate members=[...] tries other weights"
        )


def load_mixture(path: str | Path, factories: Sequence[str] = ()) -> Mixture:
    """The mixture at `path` in eval mode; see `read_mixture`."""
    return read_mixture(path, factories)[0]
