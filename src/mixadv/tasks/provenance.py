"""What results.json records of how it was made: settings, protocol, device, versions, commit."""

import platform
import shlex
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mixadv import __version__
from mixadv.command_line import as_typed
from mixadv.config import parse_eps
from mixadv.runs.directory import recorded
from mixadv.shipped import protocols, shipped_protocol
from mixadv.tasks.build import as_dict
from mixadv.tasks.session import Session

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics")


def header_of(session: Session) -> dict[str, Any]:
    """The fields of `mixadv.results.Results` that say how the run was made."""
    cfg, ball = session.cfg, session.threat_model
    return {
        "task": cfg.task,
        "seed": cfg.seed,
        "device": device_name(session.device),
        **provenance(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "config": recorded(cfg),
        "norm": ball.norm,
        "eps": parse_eps(ball.eps),
        "protocol": "replay" if cfg.points else protocol_name(cfg),
    }


def command() -> str | None:
    """The command line of this run as a shell reads it, in a sweep that of this job; None if Hydra was not used."""
    if not HydraConfig.initialized():
        return None
    given = HydraConfig.get().overrides
    # Hydra adds the mode itself.
    own = [word for word in given.hydra if not word.startswith("hydra.mode=")]
    return shlex.join(["python", "run.py", *map(as_typed, [*given.task, *own])])


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the CPU's architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def provenance() -> dict[str, Any]:
    """The versions of the packages, and the commit of the checkout (None for an installed package)."""
    versions = {
        "python": platform.python_version(),
        "mixadv": __version__,
        **{package: version(package) for package in PACKAGES},
    }
    root = Path(__file__).resolve().parents[3]
    git = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        git = answer.stdout.strip() or None
    return {"versions": versions, "git": git}


def protocol_name(cfg: DictConfig) -> str:
    """The name of the protocol, followed by "(changed)" if its attacks are not the shipped ones."""
    name = str(cfg.protocol.name)
    known = name in protocols()
    return name if known and settings_of(cfg) == shipped_protocol(name)["attacks"] else f"{name} (changed)"


def settings_of(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The settings of the protocol's attacks, by name."""
    return {str(name): as_dict(node) for name, node in cfg.protocol.attacks.items()}
