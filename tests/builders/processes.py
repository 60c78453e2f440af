"""Commands in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parents[2] / "run.py"
# What a launcher of several processes sets, and would make a single one wait for others.
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


def started_process(cwd, *argv):
    """`python run.py ARGV` in `cwd`, on one thread; output and errors go to one pipe."""
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return subprocess.Popen(
        [sys.executable, str(RUN), *argv],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
