"""Recipes: what builds the members of a mixture again, and the checks of recipes that come from a file."""

import importlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mixadv.errors import UserError
from mixadv.mixture import Mixture
from mixadv.models import MODELS, build_member
from mixadv.seeding import seeded

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


def build_mixture(config: Mapping[str, Any], factories: Sequence[str] = (), *, seed: int = 0) -> Mixture:
    """A freshly initialised mixture as a recipe says.

    Args:
        config: ``L`` and ``model`` or ``models``, see `member_recipes`.
        factories: the import paths that a recipe may name; no other code is imported.
        seed: of the initial parameters. Member k of one seed is the same whatever L is.

    Raises:
        ValueError: unknown model or arguments that it does not take.
        UserError: a recipe names code that is not in `factories`, or that fails.
    """
    recipes = member_recipes(config)
    check_factories("the recipe", recipes, factories)
    members = []
    for k, recipe in enumerate(recipes):
        with seeded(seed, "member", k):
            members.append(build_recipe(recipe))
    return Mixture(members)


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


def checked_recipe(path: Path, config: Any) -> dict[str, Any]:
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


def check_factories(where: object, recipes: Sequence[dict[str, Any]], factories: Sequence[str]) -> None:
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


def check_size(recipes: Sequence[dict[str, Any]], state: Mapping[str, Any]) -> None:
    """The recipes ask for about as many numbers as there are; where exactly they differ, loading tells."""
    held = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, torch.Tensor))
    texts = [json.dumps(recipe) for recipe in recipes if "factory" not in recipe]
    with torch.device("meta"):
        built = {text: build_recipe(json.loads(text)).state_dict().values() for text in set(texts)}
    wanted = sum(tensor.numel() for text in texts for tensor in built[text])
    if wanted > MAX_EXCESS * (held + 1000):
        raise ValueError(f"the recipe describes {wanted:,} numbers, the file holds {held:,}")
