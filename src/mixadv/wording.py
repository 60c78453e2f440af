"""Counts in English."""


def counted(count: int, noun: str) -> str:
    """The count with its noun, whose plural ends in s: `1 epoch`, `3 epochs`, `1,000 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
