"""One process at a time in a directory, whichever machine it runs on.

The lock is the kernel's (`flock`) on the file `.lock` in the directory. The kernel releases it when the process ends,
even if the process is killed. The file names the holder and is removed on release, so that a finished run holds no
lock file; filelock leaves it behind, and on file systems without locks it knows only one of their error codes.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from pathlib import Path

from mixadv.errors import UserError

LOCK = ".lock"
# Seconds to retry: `holder` takes a shared lock for a moment.
PATIENCE = 0.3
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


class Held(UserError):
    """Another process works in `folder`: `who`, as `holder` gives it."""

    def __init__(self, folder: Path, who: str) -> None:
        super().__init__(f"another process is working in {folder} ({who}): wait for it, or stop it there")
        self.who = who


class DirectoryLock:
    """A context manager that locks `folder`, which is made if it does not exist.

    On a file system without locks it prints one line to standard error and locks nothing.

    Raises (on entering):
        Held: another process has it.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> DirectoryLock:
        return self.acquired()

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquired(self) -> DirectoryLock:
        """Take the lock; raises as the class does."""
        path = self.folder / LOCK
        deadline = time.monotonic() + PATIENCE
        while self._descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                # The last holder has just removed the folder.
                continue
            try:
                _flock(descriptor, exclusive=True)
                # If not, the last holder has removed the file, and there may be a new one.
                if _is_same_file(descriptor, path):
                    self._descriptor = descriptor
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Held(self.folder, _said(path)) from None
                time.sleep(PATIENCE / 10)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                path.unlink(missing_ok=True)
                print(
                    f"mixadv: the file system of {self.folder} has no locks ({error.strerror}): "
                    "make sure that no other process works there",
                    file=sys.stderr,
                    flush=True,
                )
                return self
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        since = time.strftime("%Y-%m-%d %H:%M")
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        except OSError:
            self.release()
            raise
        return self

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._descriptor is None:
            return
        # Removed before it is unlocked: `acquired` checks that the file it locked is still there.
        (self.folder / LOCK).unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


def holder(folder: Path) -> str | None:
    """Who holds the lock of `folder`, as "pid 12 on host since 2024-05-01 12:00"; None if it is free or unreadable."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        _flock(descriptor, exclusive=False)
    except BlockingIOError:
        return _said(path)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _flock(descriptor: int, exclusive: bool) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _said(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "unknown"
    except OSError:
        return "it has just ended"
