"""Classifiers that exist already, as members of a mixture: read from files that run no code, or built by a
function that whoever runs the program names.

Every member takes images in [0, 1] and returns logits; `check_members` holds them to it.
"""

from mixadv.members.checks import check_members
from mixadv.members.load import load_members, recorded_config
from mixadv.members.loaded import LoadedMember, with_unique_names

__all__ = ["LoadedMember", "check_members", "load_members", "recorded_config", "with_unique_names"]
