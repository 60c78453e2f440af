"""What libraries and servers say, fit to be shown and kept."""

import os
import re

SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH")
LONGEST_REASON = 300


def shown(reason: object) -> str:
    """`reason` in one printable line, without passwords of addresses, W&B keys, or secrets of the environment."""
    words = re.sub(r"^wandb: (WARNING |ERROR )?", "", " ".join(str(reason).split())).rstrip(".")
    for name, value in os.environ.items():
        if len(value) >= 8 and any(part in name.upper() for part in SECRET_NAMES):
            words = words.replace(value, "***")
    words = re.sub(r"(\w+://)[^\s/@]+@", r"\1***@", words)
    words = re.sub(r"\b[0-9a-f]{40}\b|\bwandb_v\d_\w+", "***", words)
    printable = "".join(c if c.isprintable() else " " for c in words)
    return printable if len(printable) <= LONGEST_REASON else f"{printable[:LONGEST_REASON]}..."
