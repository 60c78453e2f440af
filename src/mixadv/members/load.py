"""From what the command line names to classifiers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixadv.errors import UserError
from mixadv.export import (
    CONFIG_FILE,
    FACTORY,
    WEIGHTS_FILE,
    build_factory,
    config_of_checkpoint,
    member_recipes,
    mixture_of_checkpoint,
    read_config,
    read_mixture,
)
from mixadv.members.loaded import LoadedMember
from mixadv.members.state_dicts import read_file, to_member
from mixadv.mixture import Mixture

KINDS = "an exported mixture, a run directory, a state dict (.pt, .pth, .bin, .ckpt, .safetensors) or module:callable"


def load_members(
    source: str,
    *,
    default_recipe: Mapping[str, Any] | None,
    device: torch.device | str = "cpu",
    factories: Sequence[str] = (),
) -> list[LoadedMember]:
    """The classifiers at `source`: every member of a mixture, or one.

    Args:
        source: an exported mixture, a run directory or a checkpoint of ours; a state dict, which may lie under
            one of `NESTS` and whose keys may share a prefix such as ``module.``; or ``module:callable``, see
            `mixadv.export.build_factory`. What exists as a path is a path.
        default_recipe: what builds a state dict's member: {name, num_classes, image_shape, further settings}.
            `mean` and `std` are for networks saved without normalisation of ours; without them, such a network
            sees the images as they are.
        device: where the members go.
        factories: import paths that a mixture's recipe may name, see `mixadv.export.read_mixture`.

    Raises:
        UserError: nothing there, unreadable, objects other than tensors, parameters that do not fit the recipe,
            a factory that fails.
    """
    path = _path(source)
    content = read_file(path) if path is not None and path.is_file() else None
    if path is None:
        found = [LoadedMember(build_factory(source), source, source, {"factory": source}, "as the factory built it")]
    elif content is None:
        found = _of_mixture(source, path, *read_mixture(path, factories))
    elif "mixture_config" in content:
        found = _of_mixture(source, path, *mixture_of_checkpoint(path, content, factories))
    else:
        module, recipe, note = to_member(path, content, default_recipe)
        found = [LoadedMember(module, path.stem, source, recipe, note)]
    return [replace(member, module=member.module.to(device).eval()) for member in found]


def recorded_config(source: str) -> dict[str, Any] | None:
    """What the mixture at `source` records of itself: its recipe, and eps, norm and data if it was trained here.

    None for a state dict and for ``module:callable``. Nothing is built, and no code is imported.

    Raises:
        UserError: as for `load_members`, as far as reading goes.
    """
    path = _path(source)
    if path is None:
        return None
    if path.is_dir():
        return read_config(path)
    content = read_file(path)
    return config_of_checkpoint(path, content) if "mixture_config" in content else None


def _path(source: str) -> Path | None:
    """The file or folder that `source` names; None where it is the import path of a factory."""
    # "~" is the shell's to expand, but not inside members=[...].
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        if FACTORY.fullmatch(source):
            return None
        raise UserError(f"there is nothing at {source}: name {KINDS}")
    if path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file():
        return path.parent
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{source} is neither a file nor a folder: name {KINDS}")
    return path


def _of_mixture(source: str, path: Path, mixture: Mixture, config: dict[str, Any]) -> list[LoadedMember]:
    # Folders and files that every run has say nothing: the run's own name does.
    place = Path(os.path.abspath(path))
    name = place.stem if place.is_file() else place.name
    if place.parent.name == "checkpoints":
        name = f"{place.parent.parent.name}/{name}"
    elif name == "mixture":
        name = place.parent.name
    return [
        LoadedMember(module, name if mixture.num_members == 1 else f"{name}#{k}", source, recipe, "as exported")
        for k, (module, recipe) in enumerate(zip(mixture.members, member_recipes(config), strict=True))
    ]
