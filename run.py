"""Run mixadv from a checkout, without installing it: ``python run.py loss=trades lambda_solver=entropic L=3``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from mixadv.__main__ import start

if __name__ == "__main__":
    start()
