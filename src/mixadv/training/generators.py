"""The global generators: Python's, NumPy's, PyTorch's on the CPU and on every GPU."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """Their states, as tensors and plain containers."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - members may draw from it
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "python_generator": [version, torch.tensor(numbers), gauss],
        "numpy_generator": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), cached],
        "torch_generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(saved: dict[str, Any]) -> None:
    """Restore the states `saved`; those of GPUs only if the machine has as many GPUs."""
    version, numbers, gauss = saved["python_generator"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, position, has_gauss, cached = saved["numpy_generator"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(saved["torch_generator"])
    if len(saved["cuda_generators"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda_generators"])


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Inside, members may draw (dropout); afterwards torch's generators are as they were before."""
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        yield
