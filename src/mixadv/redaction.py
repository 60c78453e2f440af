"""Makes text from outside (files, services, the environment) safe to print and to store."""

import os
import re
from typing import Any

SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH")
LONGEST_REASON = 300


def printable(value: Any, keep: str = "") -> str:
    """`value` as text, with a space for every character that is neither printable nor one of `keep`."""
    words = str(value)
    # The common case is fast: an image inside a page has half a million characters.
    return words if words.isprintable() else "".join(c if c.isprintable() or c in keep else " " for c in words)


def all_printable(value: Any) -> Any:
    """Nested plain containers with every text in them, keys too, `printable`."""
    if isinstance(value, dict):
        return {all_printable(key): all_printable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [all_printable(part) for part in value]
    return printable(value) if isinstance(value, str) else value


def shown(reason: object) -> str:
    """`reason` as one printable line of at most about 300 characters, without secrets.

    Removed are passwords in URLs, keys of W&B, and values of environment variables whose names contain KEY, TOKEN, etc.
    """
    words = re.sub(r"^wandb: (WARNING |ERROR )?", "", " ".join(str(reason).split())).rstrip(".")
    for name, value in os.environ.items():
        if len(value) >= 8 and any(part in name.upper() for part in SECRET_NAMES):
            words = words.replace(value, "***")
    words = re.sub(r"(\w+://)[^\s/@]+@", r"\1***@", words)
    words = re.sub(r"\b[0-9a-f]{40}\b|\bwandb_v\d_\w+", "***", words)
    words = printable(words)
    return words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]}..."
