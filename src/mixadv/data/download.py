"""One file from the first of several addresses that delivers it with the right checksum."""

import tempfile
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, wait
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError

from torchvision.datasets.utils import calculate_md5

CONNECTION_TIMEOUT = 15.0
TOTAL_CONNECTION_TIME = 45.0
_CHUNK = 1 << 18


class DownloadFailed(Exception):
    """No address delivered the file; the text has the reason of each."""


def mismatch(path: Path, expected: str) -> str:
    """'has md5 A instead of B (N bytes)', and whether it is a web page, the usual reason; '' where the md5 is right."""
    actual = calculate_md5(path)
    if actual == expected:
        return ""
    with open(path, "rb") as file:
        is_page = file.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<head"))
    page = "; it is a web page, not an archive" if is_page else ""
    return f"has md5 {actual} instead of {expected} ({path.stat().st_size:,} bytes{page})"


def fetch(urls: Sequence[str], target: Path, md5: str) -> None:
    """Download to a temporary file beside `target`, check the md5, rename: `target` is never half a file.

    The addresses are tried in order. Each has 15 s to answer (less if there are more than three: all of them
    together have 45 s), name look-up included, and its data may pause no longer than that.

    Raises:
        DownloadFailed: every address failed.
        OSError: `target`'s folder cannot be made or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    timeout = min(CONNECTION_TIMEOUT, TOTAL_CONNECTION_TIME / max(1, len(urls)))
    reasons = []
    for url in urls:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            with open(temporary, "wb") as file:
                reason = _copy(url, file, timeout)
            reason = reason or mismatch(temporary, md5)
            if not reason:
                temporary.replace(target)
                return
            reasons.append(f"{url}: {reason}")
    raise DownloadFailed("; ".join(reasons))


def _copy(url: str, file: IO[bytes], timeout: float) -> str | None:
    """Write what the address delivers; the reason if it does not."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    try:
        response = _open(url, timeout)
    except (OSError, HTTPException, ValueError) as error:
        # URLError wraps the reason in "<urlopen error ...>"; an HTTPError's own words begin with its number.
        if isinstance(error, URLError) and not isinstance(error, HTTPError):
            return str(error.reason)
        return str(error) or type(error).__name__
    expected = int(response.headers.get("Content-Length") or 0) or None
    columns = ("downloading {task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with response, Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(url, total=expected)
        try:
            while chunk := response.read(_CHUNK):
                progress.advance(task, file.write(chunk))
        except (OSError, HTTPException) as error:
            return f"broke off after {file.tell():,} bytes ({error})"
    if expected is not None and file.tell() != expected:
        return f"broke off after {file.tell():,} of {expected:,} bytes"
    return None


def _open(url: str, timeout: float) -> HTTPResponse:
    """urlopen within `timeout` in all: its own timeout spares name look-up and starts anew for each IP."""
    answer: Future[HTTPResponse] = Future()

    def connect() -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "mixadv"})
            answer.set_result(urllib.request.urlopen(request, timeout=timeout))
        except Exception as error:
            if isinstance(error, HTTPError):
                error.close()
            answer.set_exception(error)

    # The threads of an executor would be waited for at the end of the program.
    threading.Thread(target=connect, daemon=True).start()
    if not wait([answer], timeout).done:
        answer.add_done_callback(lambda late: None if late.exception() else late.result().close())
        raise TimeoutError(f"no answer within {timeout:.0f} s")
    return answer.result()
