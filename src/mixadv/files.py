"""How files are written: whole or not at all. Every file of a run is written through this module."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


# .NAME.01234567.tmp
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, which takes the place of `path` when the block ends without an error.

    The temporary file has a name of its own, so that two processes may write the same file. If the block fails, the
    temporary file is removed and `path` stays as it was. A process that is killed leaves it: see `remove_leftovers`.

    The file may be read by those whom the umask allows to, also where the block replaces the temporary file by one that
    only its owner may read, as safetensors does.

    Args:
        durable: wait until the disk has the content, so that it also survives a power failure.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8; raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, durable: bool = False) -> None:
    """Write an npz file with these arrays; raises as `replacing` does."""
    import numpy as np  # commands that write no arrays start without it

    with replacing(path, durable=durable) as temporary, temporary.open("wb") as file:
        contents: Mapping[str, Any] = arrays
        np.savez_compressed(file, **contents)


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an npz file; None if there is no file. No objects are unpickled.

    Raises:
        ValueError: the file cannot be read.
    """
    import numpy as np

    try:
        # Opened here, because np.load leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile, zlib and numpy raise half a dozen unrelated types here
        raise ValueError(f"{path} cannot be read: {error}") from error


def digest_of_files(paths: Iterable[Path]) -> str:
    """BLAKE2b of the contents of files, in this order; raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.stat().st_size};".encode())
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `replacing` that killed processes have left in `folder`, not in folders below it.

    Other files stay, also hidden ones that end in ``.tmp``.
    """
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
