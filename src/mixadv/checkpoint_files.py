"""Checkpoint files: how they are written whole, and the one reader of them. Imports no Lightning."""

import errno
import os
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from mixadv.errors import UserError
from mixadv.files import replacing

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
DIGEST = "digest"


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` with a digest of its content to `path`, whole or not at all, and wait until the disk has it.

    Raises:
        OSError: the disk is full or refuses; what was at `path` before is still there.
    """
    try:
        with replacing(path, durable=True) as temporary, temporary.open("wb") as file:
            torch.save({**checkpoint, DIGEST: digest_of(checkpoint)}, file)
    except RuntimeError as error:
        # PyTorch's writer reports a full disk as an internal error of its archive.
        if "inline_container" in str(error):
            raise OSError(errno.ENOSPC, "the checkpoint was not written whole", str(path)) from error
        raise


def digest_of(content: Any) -> str:
    """BLAKE2b of nested plain containers and tensors: of their types, keys, shapes and bytes."""
    digest = blake2b(digest_size=16)

    def take(value: Any) -> None:
        digest.update(type(value).__name__.encode())
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for key, part in value.items():
                take(key)
                take(part)
        elif isinstance(value, (list, tuple)):
            digest.update(str(len(value)).encode())
            for part in value:
                take(part)
        else:
            digest.update(repr(value).encode())

    take({key: value for key, value in content.items() if key != DIGEST})
    return digest.hexdigest()


def load_tensors(path: Path) -> Any:
    """What torch.save wrote, as tensors on the CPU and plain containers; nothing in it can run code.

    Raises:
        UserError: it is a checkpoint that has changed since it was written.
        Exception: whatever torch.load raises at other content.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    ours = isinstance(content, Mapping) and DIGEST in content and "state_dict" in content
    if ours and content[DIGEST] != digest_of(content):
        raise _changed(path)
    return content


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} has changed since it was written (its digest does not fit): remove it, or start anew with resume=never"
    )


def read_checkpoint(path: Path, *, with_digest: bool = False) -> dict[str, Any]:
    """Load a training checkpoint; see `load_tensors`.

    Args:
        path: the file.
        with_digest: refuse one that carries no digest of its content.

    Raises:
        UserError: the file is missing, torn, changed since it was written, or holds other kinds of objects.
    """
    try:
        checkpoint = load_tensors(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: put it back, or start anew with resume=never") from None
    except Exception as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}): "
            "it is torn or foreign; remove it, or start anew with resume=never"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} holds no state_dict: it is not a training checkpoint")
    if with_digest and DIGEST not in checkpoint:
        raise _changed(path)
    return checkpoint


def newest(
    directory: Path, say: Callable[[str], None], *, first: bool = True, read: Callable[..., Any] = read_checkpoint
) -> Path | None:
    """The checkpoint to resume from: last.ckpt, or previous.ckpt if that one cannot be read; None if there is none.

    An unreadable last.ckpt is renamed to last.ckpt.torn, and a message is printed; with several ranks, only rank 0 does
    this.

    Args:
        directory: of the checkpoints.
        say: prints the message.
        first: whether this process has rank 0.
        read: reads a checkpoint as `read_checkpoint` does.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    last, previous = directory / LAST, directory / PREVIOUS
    if last.exists():
        try:
            read(last, with_digest=True)
            return last
        except UserError as error:
            if not previous.exists():
                raise
            read(previous, with_digest=True)
            if first:
                aside = last.with_name(f"{LAST}.torn")
                say(f"{error}. Set aside as {aside.name}; going on from {PREVIOUS}")
                os.replace(last, aside)
    if previous.exists():
        read(previous, with_digest=True)
        return previous
    return None
