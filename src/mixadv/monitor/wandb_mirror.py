"""Weights & Biases as a mirror of the local files: it may fail, the run goes on.

Online with a key, offline without; the run's id is kept in the run directory, so that a resumed run goes on with
its curves.
"""

import netrc
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console

from mixadv.errors import UserError

ID_FILE = "wandb-run-id.txt"
MODES = ("online", "offline", "disabled")


def _has_key() -> bool:
    """Whether `wandb login` or the environment left a key."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = urlsplit(wandb.Settings().base_url).hostname
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Link:
    """The connection that a mirror and its views share: the first failure is told, and is the last attempt."""

    def __init__(self, console: Console) -> None:
        self.console, self.lost = console, False

    def attempt(self, action: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            action()
        except Exception as error:  # whatever the mirror does, the training and its local files go on
            self.lost = True
            self.console.print(
                f"[yellow]Weights & Biases stopped taking values ({type(error).__name__}: {error}); "
                "the local files are complete[/]",
                soft_wrap=True,
            )


class WandbMirror:
    """One Weights & Biases run for one run directory.

    Args:
        run_dir: its files go to run_dir/wandb; its id to run_dir/wandb-run-id.txt.
        project, entity: where it is shown.
        name: of the run; group: of the sweep, None outside one.
        config: plain containers, stored with the run.
        init_timeout: seconds to wait for the service before going on offline.
        console: for the one line that says how to see the curves.

    Raises:
        UserError: WANDB_MODE is none of online, offline and disabled.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        entity: str | None,
        name: str,
        group: str | None,
        config: dict[str, Any],
        init_timeout: float,
        console: Console,
    ) -> None:
        import wandb

        id_file = run_dir / ID_FILE
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        self.console = console
        self._prefix = ""
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode not in MODES:
            raise UserError(f"WANDB_MODE={mode} is unknown: choose one of {', '.join(MODES)}, or leave it unset")
        arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "id": id_file.read_text().strip(),
            "dir": str(run_dir),
            "config": config,
            "resume": "allow" if mode == "online" else None,
        }
        settings = wandb.Settings(init_timeout=init_timeout, silent=True, console="off")
        try:
            self.run = wandb.init(mode=mode, settings=settings, **arguments)
        except (wandb.errors.Error, OSError, TimeoutError, ValueError) as error:
            if mode != "online":
                raise
            reason = str(error).strip().splitlines()[0]
            console.print(f"[yellow]Weights & Biases: {reason}; going on offline[/]", highlight=False)
            # The service still holds the id of the run that did not start.
            wandb.teardown()
            arguments["resume"] = None
            self.run = wandb.init(mode="offline", settings=settings, **arguments)
            mode = "offline"
        self.mode = mode
        self._link = _Link(console)
        self._link.attempt(self._define_axes)
        if self.mode == "online":
            console.print(f"Weights & Biases: {self.run.url}", highlight=False)

    def _define_axes(self) -> None:
        # A bare "*" would also claim the baseline's curves.
        for pattern in ("train/*", "val/*", "weights/*", "lambda/*", "epoch", "member_updates", "seconds"):
            self.run.define_metric(pattern, step_metric="step")
        self.run.define_metric("baseline/*", step_metric="baseline/step")

    def baseline(self) -> "WandbMirror":
        """A view on the same run that logs under ``baseline/``."""
        view = object.__new__(WandbMirror)
        view.__dict__ = {**self.__dict__, "_prefix": "baseline/"}
        return view

    def log(self, row: dict[str, float]) -> None:
        """Send one row of the history."""
        values = {f"{self._prefix}{name}": value for name, value in row.items()}
        self._link.attempt(lambda: self.run.log(values))

    def summary(self, results: dict[str, Any]) -> None:
        """The final numbers."""
        numbers = {
            "test/clean_accuracy": results["clean"]["expected_accuracy"],
            "test/ensemble_accuracy": results["clean"]["ensemble_accuracy"],
            "test/robust_accuracy": results["robust"]["expected_accuracy"],
        }
        values = {f"{self._prefix}{name}": value for name, value in numbers.items()}
        self._link.attempt(lambda: self.run.summary.update(values))

    def images(
        self,
        clean: np.ndarray,
        adversarial: np.ndarray,
        labels: Sequence[str],
        wrong: Sequence[str],
        eps: float,
    ) -> None:
        """A table of clean, adversarial and difference images, [N, C, H, W] in [0, 1].

        The difference is scaled so that -eps is black and +eps is white.
        """
        import wandb

        def picture(image: np.ndarray) -> Any:
            pixels = np.clip(np.round(image * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
            return wandb.Image(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)

        def send() -> None:
            difference = 0.5 + (adversarial - clean) / (2 * eps) if eps > 0 else np.full_like(clean, 0.5)
            rows = [
                [picture(a), picture(b), picture(d), label, members]
                for a, b, d, label, members in zip(clean, adversarial, difference, labels, wrong, strict=True)
            ]
            columns: list[str | int] = ["clean", "adversarial", "difference", "label", "fooled members"]
            self.run.log({f"{self._prefix}examples": wandb.Table(columns=columns, data=rows)})

        self._link.attempt(send)

    def finish(self, exit_code: int) -> None:
        """Close the run; a crash shows as one. Offline, say how to upload."""
        self._link.attempt(lambda: self.run.finish(exit_code=exit_code))
        if self.mode == "offline":
            folder = Path(self.run.settings.sync_dir)
            self.console.print(
                f"Weights & Biases is offline; to upload: wandb sync {os.path.relpath(folder)}",
                highlight=False,
                soft_wrap=True,
            )
