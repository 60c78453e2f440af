"""Mixtures on disk: a folder of safetensors, config.json and a card, from which nothing can run code."""

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parameter import is_lazy

from mixadv.checkpoint_files import read_checkpoint
from mixadv.errors import UserError
from mixadv.mixture import Mixture
from mixadv.models import MODELS, build_member

# What config.json holds: schema 1 one recipe `model` for all members, schema 2 a list `models` with one for each.
EXPORT_SCHEMAS = {"model": 1, "models": 2}
WEIGHTS_FILE = "mixture.safetensors"
CONFIG_FILE = "config.json"
# How many times as many numbers as a file holds its recipe may ask for, before anything is built.
MAX_EXCESS = 4
_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
FACTORY = re.compile(rf"{_DOTTED}:{_DOTTED}")


def build_factory(source: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The module that the callable `source` = ``package.module:callable`` returns, in eval mode on the CPU.

    This imports and runs code: `source` must come from who runs the program, never from a file. The working
    directory comes first on `sys.path` while the callable is imported and called, and no longer.

    Args:
        source: its import path.
        arguments: by name, what it is called with; plain values, which may come from a file. None for none.

    Raises:
        UserError: it cannot be imported, raises, or returns anything but a `torch.nn.Module` with all shapes known.
    """
    name, _, attribute = source.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        # A module written a moment ago may hide behind a cached listing of its folder.
        importlib.invalidate_caches()
        factory: Any = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        # Two members that are the same object would be one set of parameters.
        if isinstance(factory, nn.Module):
            raise UserError(f"{source} is a module, not a function: name a function that builds and returns one")
        if not callable(factory):
            raise UserError(f"{source} is a {type(factory).__name__}, not a function that returns a torch.nn.Module")
        module = factory(**(arguments or {}))
        if not isinstance(module, nn.Module):
            raise UserError(f"{source} returned a {type(module).__name__}: it must return a torch.nn.Module")
        if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
            raise UserError(f"{source} returned a module without shapes: run one batch through it in the factory")
        return module.cpu().eval()
    except UserError:
        raise
    # A script without a main guard may end the process on import.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{source}: no module {error.name} in {here} or among the installed packages") from error
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(f"{source} cannot be used ({type(error).__name__}: {reason}): mend the factory") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def member_recipes(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The recipe of each of the L members: ``config["models"]``, or L times ``config["model"]``.

    A recipe is {name, num_classes, image_shape, mean, std, further arguments of the factory} of a model of
    ours, or {"factory": "package.module:callable", "arguments": {...}}; the arguments may be left out.

    Raises:
        ValueError: L is no whole number >= 1, or not the number of recipes; neither or both keys are there.
    """
    num_members = config["L"]
    if not isinstance(num_members, int) or isinstance(num_members, bool):
        raise ValueError(f"L is {num_members!r}, not a whole number")
    if num_members < 1:
        raise ValueError("a mixture needs at least one member")
    if ("model" in config) == ("models" in config):
        raise ValueError("a recipe has either model, for all members, or models, one for each")
    recipes = config["models"] if "models" in config else [config["model"]] * num_members
    if len(recipes) != num_members:
        raise ValueError(f"L is {num_members}, but there are recipes for {len(recipes)} members")
    return [dict(recipe) for recipe in recipes]


def build_mixture(config: Mapping[str, Any], factories: Sequence[str] = ()) -> Mixture:
    """A freshly initialised mixture as a recipe says.

    Args:
        config: ``L`` and ``model`` or ``models``, see `member_recipes`.
        factories: the import paths that a recipe may name; no other code is imported.

    Raises:
        ValueError: unknown model or arguments that it does not take.
        UserError: a recipe names code that is not in `factories`, or that fails.
    """
    recipes = member_recipes(config)
    _check_factories("the recipe", recipes, factories)
    return Mixture([build_recipe(recipe) for recipe in recipes])


def build_recipe(recipe: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised member as its recipe says, see `member_recipes`. A recipe with a factory runs its code.

    Raises:
        ValueError: unknown model or arguments that it does not take.
        UserError: the factory fails.
    """
    if "factory" in recipe:
        return build_factory(recipe["factory"], recipe.get("arguments"))
    settings = dict(recipe)
    name = settings.pop("name")
    try:
        return build_member(name, **settings)
    except TypeError as error:
        raise ValueError(f"model={name} does not take these settings: {error}") from None


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
    own = {"model": recipes[0]} if form == "model" else {"models": recipes}
    rest = {key: value for key, value in config.items() if key not in ("schema", "L", "model", "models", "weights")}
    record = {"schema": EXPORT_SCHEMAS[form], "L": len(recipes), **own, **rest, "weights": mixture.weights.tolist()}
    text = json.dumps(record, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (WEIGHTS_FILE, partial(_save_tensors, mixture.state_dict())),
        (CONFIG_FILE, lambda path: path.write_text(text)),
        ("README.md", lambda path: path.write_text(card)),
    ):
        temporary = directory / f"{name}.tmp"
        write(temporary)
        os.replace(temporary, directory / name)


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
    return _checked(path, config)


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
    return folder, _checked(folder, config)


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


def factories_of(config: Mapping[str, Any]) -> list[str]:
    """The import paths of the code that builds members, each once; see `member_recipes` for the recipes."""
    recipes = config.get("models") or [config["model"]]
    return list(dict.fromkeys(recipe["factory"] for recipe in recipes if "factory" in recipe))


def recipe_name(recipe: Mapping[str, Any]) -> str:
    """What readers know a member's architecture by: the name of a model of ours, or ``package.module:callable``."""
    return str(recipe.get("name") or recipe.get("factory"))


def are_plain(arguments: Any) -> bool:
    """Whether a recipe may hold these arguments: by name, values of JSON, nothing that gets built or resolved."""
    try:
        text = json.dumps(arguments)
    except (TypeError, ValueError, RecursionError):
        return False
    named = isinstance(arguments, dict) and all(isinstance(name, str) for name in arguments)
    return named and '"_target_"' not in text and "${" not in text


def _checked(path: Path, config: Any) -> dict[str, Any]:
    """A recipe may come from anywhere: only plain settings of the right kinds, and nothing that gets resolved."""
    try:
        text = json.dumps(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the recipe in {path} holds more than plain settings ({error}): export it again") from error
    if not isinstance(config, dict):
        raise UserError(f"the recipe in {path} is a {type(config).__name__}, not a mapping: export it again")
    for key in ("model", "threat_model", "data"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"the recipe in {path} has {key}={config[key]!r}, which is not a mapping")
    recipes = config.get("models", [config.get("model", {})])
    if not isinstance(recipes, list) or not all(isinstance(recipe, dict) for recipe in recipes):
        raise UserError(f"the recipe in {path} has models={recipes!r}, which is not a list of mappings")
    for recipe in recipes:
        if "factory" in recipe:
            factory, unknown = recipe["factory"], set(recipe) - {"factory", "arguments"}
            if not isinstance(factory, str) or not FACTORY.fullmatch(factory) or unknown:
                raise UserError(
                    f"the recipe in {path} has {recipe!r}: expected only factory=package.module:callable and arguments"
                )
            if not are_plain(recipe.get("arguments", {})):
                raise UserError(f"the recipe in {path} has arguments={recipe['arguments']!r}: expected plain values")
            continue
        name = recipe.get("name")
        if not isinstance(name, str) or name not in MODELS:
            raise UserError(f"the recipe in {path} wants the model {name!r}: known are {', '.join(MODELS)}")
    if "${" in text:
        raise UserError(f"the recipe in {path} holds an interpolation ${{...}}: those are not resolved for a mixture")
    return config


def _check_factories(where: object, recipes: Sequence[dict[str, Any]], factories: Sequence[str]) -> None:
    """Code runs only where whoever runs the program named it, letter for letter."""
    if isinstance(factories, str):
        raise ValueError(f"factories is the text {factories!r}: give a list of import paths")
    unnamed = [(k, r["factory"]) for k, r in enumerate(recipes) if "factory" in r and r["factory"] not in factories]
    if unnamed:
        k, first = unnamed[0]
        every = ",".join(dict.fromkeys([*factories, *(factory for _, factory in unnamed)]))
        remedy = f"members=[{every}]"
        if "arguments" in recipes[k]:
            remedy += f" beside mixture=..., or model._target_={first.replace(':', '.')} beside members=[...]"
        raise UserError(f"{where}: member {k} is built by {first} (code that is not in this file): name it, {remedy}")


def _assemble(path: Path, config: dict[str, Any], state: Mapping[str, Any], factories: Sequence[str]) -> Mixture:
    num_members = config.get("L")
    try:
        # Before they are built: a tampered recipe may ask for more than memory holds.
        if isinstance(num_members, int) and num_members > (held := torch.as_tensor(state.get("weights", [])).numel()):
            raise ValueError(f"there are weights for {held} members")
        recipes = member_recipes(config)
        _check_factories(path, recipes, factories)
        _check_size(recipes, state)
        mixture = Mixture([build_recipe(recipe) for recipe in recipes])
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


def _check_size(recipes: Sequence[dict[str, Any]], state: Mapping[str, Any]) -> None:
    """The recipes ask for about as many numbers as there are; where exactly they differ, loading tells."""
    held = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, torch.Tensor))
    texts = [json.dumps(recipe) for recipe in recipes if "factory" not in recipe]
    with torch.device("meta"):
        built = {text: build_recipe(json.loads(text)).state_dict().values() for text in set(texts)}
    wanted = sum(tensor.numel() for text in texts for tensor in built[text])
    if wanted > MAX_EXCESS * (held + 1000):
        raise ValueError(f"the recipe describes {wanted:,} numbers, the file holds {held:,}")


def _check_content(config: Mapping[str, Any], recipes: Sequence[dict[str, Any]], mixture: Mixture) -> None:
    """Numbers are numbers, and the weights that the recipe repeats for its readers are those that count."""
    for k, (recipe, member) in enumerate(zip(recipes, mixture.members, strict=True)):
        # Code of others may keep infinities in its buffers.
        for name, tensor in member.named_parameters() if "factory" in recipe else member.state_dict().items():
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
