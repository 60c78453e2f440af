"""Automatic choices of a run, kept in its directory: continued on another machine, it makes the same choices."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixadv.errors import UserError
from mixadv.files import write_text

# The value of a setting that asks for an automatic choice.
AUTO = "auto"
FILE = "choices.json"
# Seconds that other ranks wait for the choice of rank 0.
PATIENCE = 600.0


class Choices:
    """Choices by name, in ``run_dir/choices.json`` once the directory holds a run (its config.yaml).

    Before that they are in memory alone, so that a command that is refused leaves no files: `keep` writes them.

    Args:
        run_dir: the run's directory.
        rank: of this process; rank 0 decides, the others read what it wrote.

    Raises:
        UserError: choices.json is damaged, or rank 0 has not decided in ten minutes.
    """

    def __init__(self, run_dir: Path, rank: int = 0) -> None:
        self._folder, self._path, self._rank = run_dir, run_dir / FILE, rank
        self._made = self._read()

    def settle(self, name: str, decide: Callable[[], Any]) -> Any:
        """The kept choice for `name`; if there is none, `decide()`, a JSON value, which is kept."""
        if self._rank > 0:
            self._await(name)
        elif name not in self._made:
            self._made[name] = decide()
            if self._is_a_run():
                self.keep()
        return self._made[name]

    def keep(self) -> None:
        """Write the choices made so far (rank 0 only); choices of an earlier command are replaced."""
        if self._rank == 0 and not self._made:
            self._path.unlink(missing_ok=True)
        elif self._rank == 0:
            write_text(self._path, json.dumps(self._made, indent=2) + "\n")

    def _await(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while name not in self._made:
            self._made = self._read()
            if name not in self._made:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"process {self._rank} finds no choice of {name} in {self._path}: all processes need the same "
                        "run directory, on a disk that they share"
                    )
                time.sleep(0.05)

    def _is_a_run(self) -> bool:
        return (self._folder / "config.yaml").exists()

    def _read(self) -> dict[str, Any]:
        # Without a run in the directory, the file is from an earlier command.
        if not self._path.exists() or not self._is_a_run():
            return {}
        try:
            made = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{self._path} cannot be read ({error}): restore it, or start anew with resume=never"
            raise UserError(message) from None
        if not isinstance(made, dict):
            raise UserError(f"{self._path} holds no choices: restore it, or start anew with resume=never")
        return made
