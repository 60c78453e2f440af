"""The finished passes of an evaluation on disk, so that a killed evaluation continues with the pass that it was in."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixadv.checkpoint_files import digest_of
from mixadv.errors import UserError
from mixadv.files import read_arrays, write_arrays
from mixadv.mixture import Mixture
from mixadv.tensor_files import read_tensors, write_tensors


@dataclass(frozen=True)
class Worst:
    """For each example, the point of lowest exact expected accuracy in the passes so far; of equal ones the first.

    Attributes:
        points: [N, ...], in the precision of the images.
        accuracy: [N] float64, the expected accuracy there.
    """

    points: Tensor
    accuracy: Tensor

    @classmethod
    def before(cls, batches: Sequence[tuple[Tensor, Tensor]]) -> "Worst":
        """The images themselves, with accuracy infinity: nothing has been measured."""
        points = torch.cat([x.detach().cpu() for x, _ in batches])
        return cls(points, torch.full((len(points),), torch.inf, dtype=torch.float64))


class EvaluationState:
    """Arrays of finished passes, and the worst points: in memory or, if a directory is given, in its files.

    Passes have a fixed order. A pass may begin at the worst points of all earlier ones, so an evaluation continues
    after the last pass before which all are finished. A file is written whole or not at all. It holds the fingerprint
    of the evaluation; a file of another mixture, data set, protocol or seed is refused.

    Args:
        directory: made when the first pass is finished; None keeps everything in memory.
        fingerprint: see `fingerprint`.
    """

    def __init__(self, directory: Path | None = None, fingerprint: str = "") -> None:
        self.directory, self.fingerprint = directory, fingerprint
        self._memory: dict[str, dict[str, np.ndarray]] = {}
        self._worst: tuple[int, Worst] | None = None

    def finished(self, keys: Sequence[str]) -> int:
        """How many of the passes `keys`, from the first on, need not be repeated.

        Raises:
            UserError: a file is damaged, or belongs to another evaluation.
        """
        count = next((i for i, key in enumerate(keys) if self.load(key) is None), len(keys))
        return count if self.worst(count) is not None else 0

    def load(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of a finished pass; None while it is not finished; raises as `finished` does."""
        if key in self._memory or self.directory is None:
            return self._memory.get(key)
        path = self._path(key)
        try:
            arrays = read_arrays(path)
        except ValueError as error:
            raise self._damaged(error) from error
        if arrays is None:
            return None
        self._check(path, str(arrays.pop("fingerprint", "")))
        self._memory[key] = arrays
        return arrays

    def worst(self, count: int) -> Worst | None:
        """The worst points of the first `count` passes; None if they are not kept; raises as `finished` does."""
        if self._worst is not None and self._worst[0] == count:
            return self._worst[1]
        if self.directory is None or not self._path_after(count).exists():
            return None
        path = self._path_after(count)
        try:
            tensors, metadata = read_tensors(path)
            self._check(path, metadata.get("fingerprint", ""))
            worst = Worst(tensors["points"], tensors["accuracy"])
        except (ValueError, KeyError) as error:
            raise self._damaged(error) from error
        self._worst = count, worst
        return worst

    def save(self, number: int, key: str, arrays: dict[str, np.ndarray], worst: Worst, *, write: bool = True) -> None:
        """Keep the arrays of a finished pass, and the worst points up to it.

        The points of the pass before are removed last. So a process that is killed at any moment leaves those from
        which the first unfinished pass has to begin.

        Args:
            number: of the pass, from 0.
            write: False keeps everything in memory only (of several ranks one writes).
        """
        self._memory[key] = arrays
        self._worst = number + 1, worst
        if self.directory is None or not write:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = {"points": worst.points, "accuracy": worst.accuracy}
        write_tensors(self._path_after(number + 1), tensors, {"fingerprint": self.fingerprint}, durable=True)
        write_arrays(self._path(key), {"fingerprint": np.asarray(self.fingerprint), **arrays}, durable=True)
        self._path_after(number).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the files, when the results hold everything."""
        if self.directory is not None and self.directory.is_dir():
            for path in [*self.directory.glob("*.npz*"), *self.directory.glob("*.safetensors*")]:
                path.unlink()
            self.directory.rmdir()

    def _check(self, path: Path, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{path} belongs to another evaluation (mixture, images, protocol or seed differ): choose another "
                f"name=..., resume=never, or remove {self.directory}"
            )

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{error}: remove {self.directory}, and the attacks are run again")

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', key)}.npz"

    def _path_after(self, count: int) -> Path:
        assert self.directory is not None
        return self.directory / f"worst-{count}.safetensors"


def fingerprint(mixture: Mixture, batches: Sequence[tuple[Tensor, Tensor]], settings: Iterable[object]) -> str:
    """A digest of the mixture's tensors, the images and labels, and the text of the settings."""
    return digest_of({"mixture": mixture.state_dict(), "batches": list(batches), "settings": list(map(repr, settings))})
