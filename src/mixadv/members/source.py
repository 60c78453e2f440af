"""Loads the classifiers that ``members=[...]`` names; every file is opened once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixadv.biased import Biased, network_of
from mixadv.checkpoint_files import digest_of
from mixadv.errors import UserError
from mixadv.files import digest_of_files
from mixadv.members.factory import FACTORY
from mixadv.members.foreign import read_file, to_member
from mixadv.members.recipe import Recipe, member_recipes
from mixadv.members.store import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    files_of,
    mixture_of_checkpoint,
    mixture_of_folder,
    read_config,
)
from mixadv.models import MODELS
from mixadv.seeding import seeded

KINDS = (
    "an exported mixture, a run directory, a state dict (.pt, .pth, .bin, .ckpt, .safetensors; FILE:KEY for one of "
    "several in a file), module:callable or FILE.py:callable"
)


@dataclass(frozen=True, eq=False)
class LoadedMember:
    """One classifier, x `[B, C, H, W]` in [0, 1] -> logits `[B, num_classes]`.

    Attributes:
        module: in eval mode.
        name: short, for tables; see `with_unique_names`.
        source: the name of its `Source`.
        recipe: builds the module again.
        note: the normalisation of its inputs, and the part of the file that holds its parameters.
    """

    module: nn.Module
    name: str
    source: str
    recipe: Recipe
    note: str

    @property
    def bias(self) -> tuple[float, ...]:
        """Of the logits [C], see `mixadv.biased.Biased`; () for none."""
        return self.recipe.bias

    def biased(self, name: str, bias: Sequence[float]) -> LoadedMember:
        """A member with the same network object and `bias` [C] added to its logits; `name` goes behind its own."""
        before = self.bias or [0.0] * len(bias)
        total = tuple(old + new for old, new in zip(before, bias, strict=True))
        module = Biased(network_of(self.module), total)
        return replace(
            self, module=module.eval(), name=f"{self.name} + {name}", recipe=replace(self.recipe, bias=total)
        )


class Source:
    """One entry of ``members=[...]``. Opening a source builds no module and imports no code.

    Attributes:
        name: an exported mixture, a run directory or a checkpoint of mixadv; a file with state dicts, or ``FILE:KEY``
            for the one at KEY in the file, see `mixadv.members.foreign.to_member`; or ``module:callable`` or
            ``FILE.py:callable``, see `mixadv.members.factory.build_factory`. An existing path is never read as
            ``module:callable``.
        settings: the model of a state dict and its arguments, instead of those of a default recipe.
        record: the recipe of a mixture, with its eps, norm and data if mixadv trained it; None for a state dict and
            for ``module:callable``.

    Raises:
        UserError: the file is missing, unreadable, changed, or holds objects other than tensors; or there are settings
            for what needs none.
    """

    def __init__(self, name: str, settings: Mapping[str, Any] | None = None) -> None:
        self.name, self.settings = name, dict(settings or {})
        self._path, self._state_dict = _path(name)
        self.record: dict[str, Any] | None = None
        self._content: Mapping[Any, Any] | None = None
        if self._path is None:
            return
        if self._path.is_dir():
            self.record = read_config(self._path)
        else:
            self._content = read_file(self._path)
            if "mixture_config" in self._content and not self._state_dict:
                self.record = read_config(self._path, self._content)
        if self.record is not None and self.settings:
            raise UserError(f"{name} records how it is built: leave {', '.join(self.settings)} out")

    @property
    def is_code(self) -> bool:
        """Whether a function builds the member."""
        return self._path is None

    def digest(self) -> str:
        """Of the bytes of its files, or of the tensors of the module that the factory builds.

        Raises:
            UserError: the factory fails.
        """
        if self._path is not None:
            files = digest_of_files(files_of(self._path))
            return digest_of({"files": files, "settings": self.settings}) if self.settings else files
        with seeded(0, "digest"):
            return digest_of(Recipe(self.name).build().state_dict())

    def members(
        self,
        default_recipe: Recipe | None,
        device: torch.device | str = "cpu",
        factories: Sequence[str] = (),
    ) -> list[LoadedMember]:
        """All members of a mixture, or the one classifier. Call it once: it releases the content of the file.

        Args:
            default_recipe: builds the member of a state dict. Its `mean` and `std` are used if the state dict has no
                normalisation of mixadv's; without them the images are not normalised.
            device: the device of the members.
            factories: import paths that a mixture's recipe may name, see `mixadv.members.store.read_mixture`.

        Raises:
            UserError: the parameters do not fit the recipe, or a factory fails.
        """
        path, content, self._content = self._path, self._content, None
        if path is None:
            recipe = Recipe(self.name)
            name = os.path.basename(self.name)
            found = [LoadedMember(recipe.build(), name, self.name, recipe, "as the factory built it")]
        elif self.record is not None:
            if content is None:
                mixture = mixture_of_folder(path, self.record, factories)
            else:
                mixture = mixture_of_checkpoint(path, content, factories)[0]
            pairs = list(zip(mixture.members, member_recipes(self.record), strict=True))
            names = [_place(path)] if len(pairs) == 1 else [f"{_place(path)}#{k}" for k in range(len(pairs))]
            found = [
                LoadedMember(module, name, self.name, recipe, "as exported")
                for name, (module, recipe) in zip(names, pairs, strict=True)
            ]
        else:
            assert content is not None, "members() was called before"
            module, recipe, note = to_member(path, content, self._recipe(default_recipe), self._state_dict)
            name = f"{path.stem}:{self._state_dict}".rstrip(":")
            found = [LoadedMember(module, name, self.name, recipe, note)]
        return [replace(member, module=member.module.to(device).eval()) for member in found]

    def _recipe(self, default: Recipe | None) -> Recipe | None:
        """What builds the network of a state dict: the settings of this source before those of the default."""
        if not self.settings or default is None:
            return default
        own = dict(self.settings)
        if (name := own.pop("model", None)) is None:
            return Recipe(default.name, default.arguments | own)
        if name not in MODELS:
            raise UserError(f"{self.name}: model={name} is unknown: choose one of {', '.join(MODELS)}")
        of_data = {key: default.arguments[key] for key in ("num_classes", "image_shape") if key in default.arguments}
        return Recipe(name, of_data | own)


def with_unique_names(members: Sequence[LoadedMember]) -> list[LoadedMember]:
    """The members with unique names: repeated names are numbered, as in ``best (2)``."""
    taken: set[str] = set()
    renamed = []
    for member in members:
        name, count = member.name, 1
        while name in taken:
            count += 1
            name = f"{member.name} ({count})"
        taken.add(name)
        renamed.append(replace(member, name=name))
    return renamed


def _path(source: str) -> tuple[Path | None, str]:
    """The file or folder that `source` names and the chosen state dict in it; (None, "") for a factory."""
    # Shells do not expand "~" inside members=[...].
    path, chosen = Path(os.path.expanduser(source)), ""
    if not os.path.exists(path):
        place, _, last = source.rpartition(":")
        file = Path(os.path.expanduser(place))
        if last and os.path.isfile(file) and file.suffix != ".py":
            path, chosen = file, last
        elif FACTORY.fullmatch(source):
            return None, ""
        else:
            raise UserError(f"there is nothing at {source}: name {KINDS}")
    if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file():
        return path.parent, ""
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{source} is neither a file nor a folder: name {KINDS}")
    if path.suffix == ".py" and path.is_file():
        raise UserError(f"{source} is Python code: name a function in it, as {source}:first")
    return path, chosen


def _place(path: Path) -> str:
    """The name of a mixture: that of its run instead of names that all runs share, such as mixture/."""
    place = Path(os.path.abspath(path))
    name = place.stem if place.is_file() else place.name
    if place.parent.name == "checkpoints":
        return f"{place.parent.parent.name}/{name}"
    return place.parent.name if name == "mixture" else name
