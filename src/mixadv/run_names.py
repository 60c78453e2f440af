"""The names of run directories, as a function of the command alone: the same command finds the same directory."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Longest name of a run directory in bytes, without its digest; longer names are cut.
MAX_NAME = 120
# Overrides that are not part of a run's name: they choose what is done or where it is written, not how.
UNNAMED = ("task", "name", "resume", "runs", "launch", "logger", "optimized_metric", "hparams_search")

# Not in a name: separators of paths, control characters, what shells expand, and what Windows reserves.
_UNSAFE = re.compile(r"[^\w ._=,+&#~@!()-]+")
# One value, or several with commas between them: no nested lists, and no quoted commas.
_WORD = r"""(?:'[^'"\\,=\[\]{}()]*'|"[^'"\\,=\[\]{}()]*"|[^'"\\,=\[\]{}()]+)"""
_WORDS = re.compile(rf"{_WORD}(?:,{_WORD})*")
_LIST = re.compile(rf"\[({_WORD}(?:,{_WORD})+)\]")
_DIGEST = re.compile(r"-[0-9a-f]{8}$")
_NUMBER = r"[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?"
_FRACTION = re.compile(rf"^({_NUMBER})/({_NUMBER})$")


def path_safe(text: str) -> str:
    """A name for one directory: `text` itself if it can be one, with letters of any language.

    If a character had to be replaced or the name had to be cut, a digest of `text` follows, so that different texts
    have different names.

    Returns:
        The name; "" if `text` has no usable character.
    """
    return _marked(text, is_exact=True, exact=text)


def _marked(shown: str, is_exact: bool, exact: str) -> str:
    """`shown` as the name of a directory; if it cannot be kept, or is not exact, with a digest of `exact`."""
    safe = _UNSAFE.sub("-", shown).strip("-. ~").encode()[:MAX_NAME].decode(errors="ignore")
    if not safe or (is_exact and safe == shown):
        return safe
    return f"{safe}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def run_name(overrides: Iterable[str], name: Any = None) -> str:
    """Directory name of a run: ``name=...`` if given, else its overrides as typed, else ``default``.

    Fractions are written with a dash and lists without brackets: ``eps=8-255,members=a,b``. What else a name cannot
    hold is replaced, and a digest follows, see `path_safe`. Of several values of one key the last counts, as for Hydra.
    """
    if name is not None:
        return path_safe(str(name)) or "default"
    given: dict[str, str] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        key = key.lstrip("+")
        if key.lstrip("~") not in UNNAMED:
            given[key] = value
    read = {key: _readable(value) for key, value in given.items()}
    shown = ",".join(f"{key}={text}" if text else key for key, (text, _) in read.items())
    # The digest knows no order, see `name_in`.
    exact = ",".join(f"{key}={text if clear else given[key]}" for key, (text, clear) in sorted(read.items()))
    return _marked(shown, all(clear for _, clear in read.values()), exact) or "default"


def name_in(folder: Path, name: str) -> str:
    """`name`, or the name of the directory in `folder` that the same settings in another order have made."""
    if (folder / name).exists() or not folder.is_dir():
        return name
    words = _words(name)
    return next((other for other in sorted(os.listdir(folder)) if _words(other) == words), name)


def _words(name: str) -> list[str]:
    """The settings in the name of a directory, sorted; of a name with a digest the digest, which knows no order."""
    if found := _DIGEST.search(name):
        return [found[0]]
    # A part without "=" goes on with the list of its setting.
    return sorted(re.split(r",(?=[^,=]+=)", name))


def _readable(value: str) -> tuple[str, bool]:
    """A value of the command line as part of a name, and whether no other value reads the same."""
    value = re.sub(r"\s*,\s*", ",", value.strip())
    if value.lower() in ("true", "false", "null"):
        value = value.lower()
    listed = _LIST.fullmatch(value)
    text = listed[1] if listed else value
    if not value or not _WORDS.fullmatch(text):
        return re.sub(r"""[\[\]'"]""", "", value), not value
    return ",".join(_FRACTION.sub(r"\1-\2", word).strip("'\"") for word in text.split(",")), True
