"""Classifiers that exist already, as members of a mixture: read from files that run no code, or built by a
function that whoever runs the program names.

Every member takes images in [0, 1] and returns logits; `check_members` holds them to it.
"""

from mixadv.members.checks import check_members
from mixadv.members.source import LoadedMember, Source, with_unique_names

__all__ = ["LoadedMember", "Source", "check_members", "with_unique_names"]
