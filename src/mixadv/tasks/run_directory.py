"""The life of a run directory: claimed, continued, finished, and never overwritten."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf

import mixadv
from mixadv.errors import UserError

RESULTS_SCHEMA = 1
# Settings that do not change what is computed: they may differ when a run is continued or shown.
INDIFFERENT = ("resume", "name", "runs", "logger", "trainer.progress", "data.mirrors", "data.download")


class State(Enum):
    """What a directory holds."""

    NEW = "new"
    UNFINISHED = "unfinished"
    DONE = "done"


def claim(run_dir: Path, cfg: DictConfig) -> tuple[Path, State]:
    """The directory to work in, and what it holds already.

    With ``resume=never`` a directory in use is left alone, and a new one is made beside it: NAME.2, NAME.3, ...

    Raises:
        UserError: the directory holds a run with other settings, or cannot be written.
    """
    if cfg.resume == "never" and (run_dir / "config.yaml").exists():
        number = 2
        while (fresh := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        run_dir = fresh
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {run_dir}: {error.strerror}. Choose another place with hydra.run.dir=DIR"
        ) from None
    saved = run_dir / "config.yaml"
    if not saved.exists():
        return run_dir, State.NEW
    difference = _difference(OmegaConf.load(saved), cfg)
    if difference:
        raise UserError(
            f"{run_dir} holds a run with other settings ({difference}): choose another name=..., "
            "or resume=never to start anew beside it"
        )
    return run_dir, State.DONE if (run_dir / "DONE").exists() else State.UNFINISHED


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _difference(saved: Any, cfg: DictConfig) -> str:
    old, new = (_flat(OmegaConf.to_container(node, resolve=True)) for node in (saved, cfg))
    keys = [key for key in {**old, **new} if not any(key == skip or key.startswith(f"{skip}.") for skip in INDIFFERENT)]
    changed = [f"{key}: {old.get(key)} there, {new.get(key)} here" for key in keys if old.get(key) != new.get(key)]
    return "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")


@contextmanager
def working_in(run_dir: Path) -> Iterator[None]:
    """Work in a claimed directory: a failure leaves FAILED there with its reason, or nothing if it wrote nothing."""
    try:
        yield
    except Exception as error:
        if not any(run_dir.iterdir()):
            run_dir.rmdir()
        else:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            (run_dir / "FAILED").write_text(reason + "\n")
        raise


def write_config(run_dir: Path, cfg: DictConfig) -> None:
    """config.yaml, resolved; a FAILED from an earlier try is withdrawn."""
    _replace(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    (run_dir / "FAILED").unlink(missing_ok=True)


def write_results(run_dir: Path, results: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """records.npz, then results.json, each whole or not at all."""
    temporary = run_dir / "records.tmp.npz"
    np.savez_compressed(temporary, **cast(dict[str, Any], arrays))
    os.replace(temporary, run_dir / "records.npz")
    _replace(run_dir / "results.json", json.dumps(results, indent=2) + "\n")


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """results.json, or None where the run has not come so far."""
    path = run_dir / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def mark_done(run_dir: Path) -> None:
    """From here on the run is shown, not continued."""
    (run_dir / "FAILED").unlink(missing_ok=True)
    (run_dir / "DONE").touch()


def show(run_dir: Path, *, done_before: bool = False) -> None:
    """Print the tables of a finished run, and draw its curves where it has a history."""
    from rich.console import Console

    from mixadv.report import draw_curves, read_run, show_run

    console = Console()
    if done_before:
        where = os.path.relpath(run_dir)
        console.print(f"{where} is done; its results (resume=never starts anew beside it):", soft_wrap=True)
    run = read_run(run_dir)
    if run.has_history and not (done_before and (run_dir / "curves.png").exists()):
        draw_curves(run_dir)
    show_run(run, console)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def provenance() -> dict[str, Any]:
    """Versions of what computed, and the commit of the checkout (None for an installed package)."""
    packages = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics")
    versions = {
        "python": platform.python_version(),
        "mixadv": mixadv.__version__,
        **{package: version(package) for package in packages},
    }
    root = Path(__file__).resolve().parents[3]
    git = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        git = answer.stdout.strip() or None
    return {"versions": versions, "git": git}
