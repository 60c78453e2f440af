"""The finished passes of an evaluation on disk, so that a killed evaluation continues with the pass that it was in."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mixadv.checkpoint_files import digest_of
from mixadv.errors import UserError
from mixadv.files import read_arrays, write_arrays
from mixadv.mixture import Mixture


class EvaluationState:
    """Arrays of finished passes: in memory or, if a directory is given, one file for each pass.

    A file is written whole or not at all. It holds the fingerprint of the evaluation; a file of another mixture, data
    set, protocol or seed is refused.

    Args:
        directory: made when the first pass is finished; None keeps everything in memory.
        fingerprint: see `fingerprint`.
    """

    def __init__(self, directory: Path | None = None, fingerprint: str = "") -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self._memory: dict[str, dict[str, np.ndarray]] = {}

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished pass; None while it is not finished.

        Raises:
            UserError: the file is damaged, or belongs to another evaluation.
        """
        if key in self._memory or self.directory is None:
            return self._memory.get(key)
        path = self._path(key)
        try:
            arrays = read_arrays(path)
        except ValueError as error:
            raise UserError(f"{error}: remove it, and that attack is run again") from error
        if arrays is None:
            return None
        if str(arrays.pop("fingerprint", "")) != self.fingerprint:
            raise UserError(
                f"{path} belongs to another evaluation (mixture, images, protocol or seed differ): choose another "
                f"name=..., resume=never, or remove {self.directory}"
            )
        self._memory[key] = arrays
        return arrays

    def save(self, key: str, arrays: dict[str, np.ndarray], *, write: bool = True) -> None:
        """Keep the arrays of a finished pass; write=False keeps them in memory only (of several ranks one writes)."""
        self._memory[key] = arrays
        if self.directory is None or not write:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_arrays(self._path(key), {"fingerprint": np.asarray(self.fingerprint), **arrays}, durable=True)

    def clear(self) -> None:
        """Remove the files, when the results hold everything."""
        if self.directory is not None and self.directory.is_dir():
            for path in self.directory.glob("*.npz*"):
                path.unlink()
            self.directory.rmdir()

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', key)}.npz"


def fingerprint(mixture: Mixture, batches: Sequence[tuple[Tensor, Tensor]], settings: Iterable[object]) -> str:
    """A digest of the mixture's tensors, the images and labels, and the text of the settings."""
    return digest_of({"mixture": mixture.state_dict(), "batches": list(batches), "settings": list(map(repr, settings))})
