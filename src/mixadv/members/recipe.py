"""Recipes: what builds the members of a mixture again, and the checks of recipes that come from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixadv.biased import Biased
from mixadv.errors import UserError
from mixadv.members.factory import FACTORY, build_factory
from mixadv.mixture import Mixture
from mixadv.models import MODELS, build_member
from mixadv.seeding import seeded

# A recipe may ask for this many times the numbers that its file holds; more is refused before anything is built.
MAX_EXCESS = 4


@dataclass(frozen=True)
class Recipe:
    """What builds one member.

    Attributes:
        name: of a model of mixadv (`mixadv.models.MODELS`), or the import path ``package.module:callable`` of a
            factory, or its path ``FILE.py:callable``.
        arguments: what it is called with, by name; values of JSON. Models of mixadv take num_classes, image_shape
            (C, H, W), mean, std and settings of their own.
        bias: is added to the logits [C], see `mixadv.biased.Biased`; none if it is empty.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    bias: tuple[float, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Recipe:
        """The recipe that a file holds as {name, arguments...} or {"factory": path, "arguments": {...}}, with a `bias`.

        Raises:
            KeyError: `record` has neither a name nor a factory.
        """
        arguments = dict(record)
        bias = tuple(arguments.pop("bias", ()))
        if "factory" in record:
            return cls(record["factory"], dict(record.get("arguments", {})), bias)
        return cls(arguments.pop("name"), arguments, bias)

    def record(self) -> dict[str, Any]:
        """The recipe as a file holds it, see `of`."""
        bias = {"bias": list(self.bias)} if self.bias else {}
        if not self.is_factory:
            return {"name": self.name, **self.arguments, **bias}
        return {"factory": self.name} | ({"arguments": self.arguments} if self.arguments else {}) | bias

    @property
    def is_factory(self) -> bool:
        """Whether code that is not part of mixadv builds the member."""
        return ":" in self.name

    @property
    def target(self) -> str:
        """The import path as the configuration writes it, ``package.module.callable``; a path stays as it is."""
        if self.is_factory:
            return self.name if ".py:" in self.name else self.name.replace(":", ".")
        factory = MODELS[self.name]
        return f"{factory.__module__}.{factory.__name__}"

    def build(self) -> nn.Module:
        """A freshly initialised member. A factory runs its code.

        Raises:
            ValueError: unknown model, or arguments that it does not take.
            UserError: the factory fails.
        """
        network = self._network()
        return Biased(network, self.bias) if self.bias else network

    def _network(self) -> nn.Module:
        if self.is_factory:
            return build_factory(self.name, self.arguments)
        try:
            return build_member(self.name, **self.arguments)
        except TypeError as error:
            raise ValueError(f"model={self.name} does not take these settings: {error}") from None


def member_recipes(config: Mapping[str, Any]) -> list[Recipe]:
    """The recipe of each of the L members: ``config["models"]``, or L times ``config["model"]``.

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
    records = config["models"] if "models" in config else [config["model"]] * num_members
    if len(records) != num_members:
        raise ValueError(f"L is {num_members}, but there are recipes for {len(records)} members")
    return [Recipe.of(record) for record in records]


def factories_of(recipes: Sequence[Recipe]) -> list[str]:
    """The import paths of the code that builds members, each once."""
    return list(dict.fromkeys(recipe.name for recipe in recipes if recipe.is_factory))


def build_mixture(config: Mapping[str, Any], factories: Sequence[str] = (), *, seed: int = 0) -> Mixture:
    """A freshly initialised mixture.

    Args:
        config: ``L`` and ``model`` or ``models``, see `member_recipes`.
        factories: the import paths that recipes may name; no other code is imported.
        seed: of the initial parameters. Member k of one seed is the same whatever L is.

    Raises:
        ValueError: unknown model, or arguments that it does not take.
        UserError: a recipe names code that is not in `factories`, or that fails.
    """
    recipes = member_recipes(config)
    check_factories("the recipe", recipes, factories)
    members = []
    for k, recipe in enumerate(recipes):
        with seeded(seed, "member", k):
            members.append(recipe.build())
    return Mixture(members)


def are_plain(arguments: Any) -> bool:
    """Whether a recipe may hold these arguments: by name, values of JSON, nothing that gets built or resolved."""
    try:
        text = json.dumps(arguments)
    except (TypeError, ValueError, RecursionError):
        return False
    named = isinstance(arguments, dict) and all(isinstance(name, str) for name in arguments)
    return named and '"_target_"' not in text and "${" not in text


def checked_config(path: Path, config: Any) -> dict[str, Any]:
    """The config of a mixture from the file at `path`, which may come from anywhere.

    Raises:
        UserError: it holds more than plain settings of the right kinds, or something that gets resolved.
    """
    try:
        text = json.dumps(config)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the recipe in {path} holds more than plain settings ({error}): export it again") from error
    if not isinstance(config, dict):
        raise UserError(f"the recipe in {path} is a {type(config).__name__}, not a mapping: export it again")
    for key in ("model", "threat_model", "data"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"the recipe in {path} has {key}={config[key]!r}, which is not a mapping")
    records = config.get("models", [config.get("model", {})])
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"the recipe in {path} has models={records!r}, which is not a list of mappings")
    for record in records:
        _check_record(path, record)
    if "${" in text:
        raise UserError(f"the recipe in {path} holds an interpolation ${{...}}: those are not resolved for a mixture")
    return config


def _check_record(path: Path, record: dict[str, Any]) -> None:
    bias = record.get("bias", [0.0, 0.0])
    if not isinstance(bias, list) or len(bias) < 2 or not all(map(_is_finite, bias)):
        raise UserError(f"the recipe in {path} has bias={bias!r}: expected a finite number for each class")
    if "factory" not in record:
        name = record.get("name")
        if not isinstance(name, str) or name not in MODELS:
            raise UserError(f"the recipe in {path} wants the model {name!r}: known are {', '.join(MODELS)}")
        return
    factory, unknown = record["factory"], set(record) - {"factory", "arguments", "bias"}
    if not isinstance(factory, str) or not FACTORY.fullmatch(factory) or unknown:
        raise UserError(
            f"the recipe in {path} has {record!r}: expected only factory=package.module:callable, arguments and bias"
        )
    if not are_plain(record.get("arguments", {})):
        raise UserError(f"the recipe in {path} has arguments={record['arguments']!r}: expected plain values")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def check_factories(where: object, recipes: Sequence[Recipe], factories: Sequence[str]) -> None:
    """Refuse code that the person who runs the program has not named, letter for letter.

    Args:
        where: whose recipes they are, for messages.
        recipes: of the members. factories: the import paths that were named.

    Raises:
        UserError: a recipe names other code.
        ValueError: `factories` is one text.
    """
    if isinstance(factories, str):
        raise ValueError(f"factories is the text {factories!r}: give a list of import paths")
    unnamed = [(k, r) for k, r in enumerate(recipes) if r.is_factory and r.name not in factories]
    if unnamed:
        k, first = unnamed[0]
        every = ",".join(dict.fromkeys([*factories, *(recipe.name for _, recipe in unnamed)]))
        remedy = f"members=[{every}]"
        if first.arguments:
            remedy += f" beside mixture=..., or model._target_={first.target} beside members=[...]"
        raise UserError(
            f"{where}: member {k} is built by {first.name} (code that is not in this file): name it, {remedy}"
        )


def check_size(recipes: Sequence[Recipe], state: Mapping[str, Any]) -> None:
    """Refuse recipes that ask for far more numbers than `state` holds, before they take the memory.

    Raises:
        ValueError: they do.
    """
    held = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, torch.Tensor))
    ours = [recipe for recipe in recipes if not recipe.is_factory]
    sizes: dict[str, int] = {}
    with torch.device("meta"):
        for recipe in ours:
            text = json.dumps(recipe.record())
            if text not in sizes:
                sizes[text] = sum(tensor.numel() for tensor in recipe.build().state_dict().values())
    wanted = sum(sizes[json.dumps(recipe.record())] for recipe in ours)
    if wanted > MAX_EXCESS * (held + 1000):
        raise ValueError(f"the recipe describes {wanted:,} numbers, the file holds {held:,}")
