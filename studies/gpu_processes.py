"""Processes that end with the one that started them, and not later than they may.

It puts the package and the benchmarks of this checkout on the path.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# When this program began; torch takes seconds to import.
BEGUN = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]
# Seconds from SIGTERM, on which mixadv saves a checkpoint, to SIGKILL.
GRACE = 8.0
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
# Loaded here: between fork and exec a program with threads must not load anything.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _dies_with_its_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL)


def start(*command: str | Path, **more: Any) -> subprocess.Popen[Any]:
    """Start `python COMMAND` in the repository with the package of this checkout, as a group of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | more.pop("env", {})
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        # A process that was killed cannot stop others, and these would go on holding the GPU and their directories.
        preexec_fn=_dies_with_its_parent,
        **more,
    )


def stop(process: subprocess.Popen[Any], grace: float = GRACE) -> None:
    """End a process and those that it started: SIGTERM, then SIGKILL after `grace` seconds."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
        # After its end too: what it has started may outlive it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def wait(process: subprocess.Popen[Any], seconds: float, grace: float = GRACE) -> int | None:
    """Its exit code; None if it did not end in time: then it was stopped, within `seconds` in all."""
    grace = min(grace, max(0.0, seconds / 2))
    try:
        return process.wait(max(0.0, seconds - grace))
    except subprocess.TimeoutExpired:
        stop(process, grace)
        return None


def answer(command: Sequence[str | Path]) -> None:
    """Run `python COMMAND` to its end; RuntimeError with its last lines if it fails."""
    process = start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(" / ".join(said.strip().splitlines()[-3:])[-600:])
