"""One seed for everything: every generator is made here, from the seed of the run and the purpose of its draws."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) for one purpose: SHA-256 of `parts`, the same on every machine.

    Args:
        parts: the run's seed, then the purpose and, where there are several of a kind, a number, as
            ``derive_seed(seed, "validation", batch)``. Other than seed + number, neighbouring seeds share no draws, and
            a purpose keeps its seed when others are added.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` with the seed of `parts`, see `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


def seed_all(*parts: int | str) -> None:
    """Seed the global generators of Python, NumPy and torch, which members of the user's own may draw from."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - members may draw from it
    torch.manual_seed(seed)


@contextmanager
def seeded(*parts: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, torch's own generators (of the CPU and of `device`) start from the seed of `parts`; then they go on as
    before. For code that draws without a generator: initialisation, dropout.
    """
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(*parts))
        yield
