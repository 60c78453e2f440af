"""The measured part of a run, the same for training and for evaluation."""

import json
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mixadv import __version__, records
from mixadv.attacks.search import Attack
from mixadv.attacks.suite import passes_of
from mixadv.config import parse_eps
from mixadv.console import Console
from mixadv.evaluation import (
    FLAGS,
    EvaluationRecord,
    EvaluationState,
    curves,
    distrust,
    equilibrium_of,
    evaluate,
    fingerprint,
    pool_of,
)
from mixadv.files import write_arrays
from mixadv.mixture import Mixture
from mixadv.results import Curve, Curves, Flag, Game, Results
from mixadv.runs import processes
from mixadv.seeding import generator_for
from mixadv.shipped import protocols, shipped_protocol
from mixadv.tasks.build import as_dict, build_protocol, trainer_settings
from mixadv.threat_model import ThreatModel

# Attacked images that a run keeps to look at.
EXAMPLES = 8
STATE = "evaluation"


def device_name(device: torch.device) -> str:
    """What the numbers were computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def measure(
    cfg: DictConfig,
    mixture: Mixture,
    batches: Iterable[tuple[Tensor, Tensor]],
    threat_model: ThreatModel,
    device: torch.device,
    run_dir: Path,
    class_names: Sequence[str],
) -> tuple[Results, dict[str, np.ndarray]] | None:
    """Run the protocol's attacks: the results without the training's part, and the arrays of records.npz.

    Of several processes the first returns them; the others have helped, and return None.

    Finished attacks are kept in ``run_dir/evaluation``, so that a killed measurement continues with the attack it was
    in; examples.npz, a few attacked images, is written.

    Raises:
        UserError: the directory holds the state of another measurement.
    """
    started = time.perf_counter()
    batches = list(batches)
    attacks = build_protocol(cfg)
    mark = fingerprint(mixture, batches, [json.dumps(settings_of(cfg), sort_keys=True), threat_model, cfg.seed])
    console = Console()
    total = sum(1 for _ in passes_of(attacks, mixture)) * sum(len(y) for _, y in batches)
    first = processes.rank(cfg) == 0
    with _bar(total, cfg.trainer.enable_progress_bar and first, console) as advance:
        record = evaluate(
            mixture,
            batches,
            attacks,
            threat_model,
            seed=cfg.seed,
            keep_images=EXAMPLES,
            state=EvaluationState(run_dir / STATE, mark),
            on_progress=advance,
            processes=trainer_settings(cfg, device),
        )
    if not first:
        return None
    flags: list[Flag] = []
    checks: tuple[str, ...] = ()
    drawn = None
    count = cfg.protocol.get("diagnosed", 0)
    if count:
        x, y = (torch.cat(parts)[:count] for parts in zip(*batches, strict=True))
        flags, checks = distrust(mixture, x, y, threat_model, record, seed=cfg.seed), tuple(FLAGS)
        found = curves(mixture, x, y, threat_model, seed=cfg.seed)
        drawn = Curves(found["num_examples"], Curve(**found["eps"]), Curve(**found["steps"]))
    results = replace(
        with_header(record.results(settings_of(cfg)), cfg, threat_model, device),
        game=Game(**equilibrium_of(pool_of(record), torch.from_numpy(record.weights))),
        checks=checks,
        curves=drawn,
        flags=tuple(flags),
        seconds={"evaluate": round(time.perf_counter() - started, 3)},
    )
    _keep_examples(run_dir / records.EXAMPLES, record, class_names)
    return results, record.arrays()


def _bar(total: int, wanted: bool, console: Console) -> Any:
    """A live bar in a terminal, else nothing."""
    if not wanted or not console.is_terminal:
        return nullcontext(None)
    return _Bar(total, console)


class _Bar:
    def __init__(self, total: int, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> Any:
        self.progress.start()
        return lambda key, count: self.progress.update(self.task, advance=count, description=key)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def _keep_examples(path: Path, record: EvaluationRecord, class_names: Sequence[str]) -> None:
    """The first images, their worst points, who is still right there, and which attack found them."""
    count = len(record.images["clean"])
    found_by = record.found_by()[:count]
    everything = {"clean": record.clean, **record.found}
    arrays = {
        records.X: record.images["clean"],
        records.X_ADV: np.stack([record.images[key][i] for i, key in enumerate(found_by)]),
        records.LABELS: np.asarray([class_names[int(label)] for label in record.labels[:count]]),
        records.CORRECT: np.stack([everything[key][:, i] for i, key in enumerate(found_by)], axis=1),
        records.FOUND_BY: np.asarray(found_by),
    }
    write_arrays(path, arrays)


def with_header(results: Results, cfg: DictConfig, threat_model: ThreatModel, device: torch.device) -> Results:
    """`results` with the settings of the run, and what computed it."""
    return replace(
        results,
        task=cfg.task,
        seed=cfg.seed,
        device=device_name(device),
        **provenance(),
        config=as_dict(cfg),
        norm=threat_model.norm,
        eps=parse_eps(threat_model.eps),
        protocol=protocol_name(cfg),
    )


def protocol_name(cfg: DictConfig) -> str:
    """The protocol's name, with "(changed)" behind it where its attacks are not the shipped ones."""
    name = str(cfg.protocol.name)
    known = name in protocols()
    return name if known and settings_of(cfg) == shipped_protocol(name)["attacks"] else f"{name} (changed)"


def settings_of(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The protocol's attacks by name, as configured."""
    return {str(name): as_dict(node) for name, node in cfg.protocol.attacks.items()}


def example_images(
    mixture: Mixture,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat_model: ThreatModel,
    class_names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], float]:
    """Clean and attacked images [N, C, H, W], their labels, which members the attack fooled, and eps."""
    x_adv = attack(mixture, x, y, threat_model, generator_for(0, "examples", device=x.device))
    with torch.no_grad(), mixture.attack_mode(plain=True):
        wrong = mixture.member_logits(x_adv).argmax(-1) != y
    fooled = [", ".join(str(int(k)) for k in column.nonzero().flatten()) or "none" for column in wrong.T]
    labels = [class_names[int(label)] for label in y]
    return x.cpu().numpy(), x_adv.cpu().numpy(), labels, fooled, threat_model.eps


def provenance() -> dict[str, Any]:
    """Versions of what computed, and the commit of the checkout (None for an installed package)."""
    packages = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics")
    versions = {
        "python": platform.python_version(),
        "mixadv": __version__,
        **{package: version(package) for package in packages},
    }
    root = Path(__file__).resolve().parents[3]
    git = None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        git = answer.stdout.strip() or None
    return {"versions": versions, "git": git}
