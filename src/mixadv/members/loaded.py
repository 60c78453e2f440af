"""A classifier that exists already, with what it takes to build it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class LoadedMember:
    """One classifier, x `[B, C, H, W]` in [0, 1] -> logits `[B, num_classes]`.

    module: in eval mode.
    name: short, for tables; see `with_unique_names`.
    source: what `load_members` was given.
    recipe: what builds it again, plain JSON: the settings of a model of ours, or {"factory": "module:callable"}.
    note: how its inputs are normalised, and from which part of a file it comes.
    """

    module: nn.Module
    name: str
    source: str
    recipe: dict[str, Any]
    note: str


def with_unique_names(members: Sequence[LoadedMember]) -> list[LoadedMember]:
    """The same members; names that several have are numbered, as in ``best (2)``."""
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
