"""Seeds for the parts of a computation, from one seed."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) for the part of a computation that `parts` name.

    Unlike seed + number, neighbouring seeds and parts share nothing, and a part keeps its seed whatever others are
    added. The same on every machine (SHA-256 of the parts).
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
