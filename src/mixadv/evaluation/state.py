"""What an evaluation has found so far, on disk, so that a killed one continues with the pass it was in."""

import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mixadv.checkpoint_files import digest_of
from mixadv.errors import UserError
from mixadv.mixture import Mixture


class EvaluationState:
    """Arrays of finished passes: in memory or, where a directory is given, one file for each pass.

    A file is written beside its place and renamed. It carries the fingerprint of what was measured; a file of
    another mixture, data set, protocol or seed is refused.

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
            UserError: the file is torn, or belongs to another evaluation.
        """
        if key in self._memory or self.directory is None:
            return self._memory.get(key)
        path = self._path(key)
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it, and that attack is run again") from error
        if str(arrays.pop("fingerprint", "")) != self.fingerprint:
            raise UserError(
                f"{path} belongs to another evaluation (mixture, images, protocol or seed differ): choose another "
                f"name=..., resume=never, or remove {self.directory}"
            )
        self._memory[key] = arrays
        return arrays

    def save(self, key: str, arrays: dict[str, np.ndarray], *, write: bool = True) -> None:
        """Keep the arrays of a finished pass; without `write`, in memory alone (of several processes one writes)."""
        self._memory[key] = arrays
        if self.directory is None or not write:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as raw:
            np.savez(raw, fingerprint=np.asarray(self.fingerprint), **arrays)  # type: ignore[arg-type]
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)

    def clear(self) -> None:
        """Remove the files: the results hold all of it."""
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
