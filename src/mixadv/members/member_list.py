"""A YAML file that lists members, each with its model and its normalisation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mixadv.errors import UserError
from mixadv.members.source import Source

ENDINGS = (".yaml", ".yml")
_EXAMPLE = "- {source: a.pt, model: resnet18, mean: [0.49, 0.48, 0.45], std: [0.25, 0.24, 0.26]}"


def sources_of(names: Sequence[str]) -> list[Source]:
    """The sources of ``members=[...]``: one for each name, and all that a YAML file lists.

    Such a file is a list of mappings with the key `source`, a path from the folder of the file (see `Source`), and for
    a state dict what builds its network: `model`, a name in `mixadv.models.MODELS`, and the arguments of that, as mean,
    std and width. num_classes and image_shape follow from the data. A list names no code.

    Raises:
        UserError: a file is no such list, or as `Source`.
    """
    found = []
    for name in names:
        path = Path(os.path.expanduser(name))
        if path.suffix.lower() in ENDINGS and path.is_file():
            found += [_source(path, entry) for entry in _entries(path)]
        else:
            found.append(Source(name))
    return found


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as a list of members ({reason}): write lines as {_EXAMPLE}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is no list of members: write lines as {_EXAMPLE}")
    return entries


def _source(path: Path, entry: dict[str, Any]) -> Source:
    settings = dict(entry)
    named = settings.pop("source", None)
    if not isinstance(named, str) or not named or not all(isinstance(key, str) for key in settings):
        raise UserError(f"{path}: {entry} has no source: write lines as {_EXAMPLE}")
    for key in ("num_classes", "image_shape"):
        if key in settings:
            raise UserError(f"{path}: {key} of {named} follows from the data: leave it out")
    source = Source(str(path.parent / os.path.expanduser(named)), settings)
    if source.is_code:
        raise UserError(f"{path}: {named} is code, which runs only if the command names it: members=[{path},{named}]")
    return source
