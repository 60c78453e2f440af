"""What a training run shows on Weights & Biases, where that is chosen."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from mixadv.data.base import ImageDataModule
from mixadv.mixture import Mixture
from mixadv.signals import Stopped
from mixadv.tasks import build, processes
from mixadv.tasks.measure import example_images
from mixadv.threat_model import ThreatModel


@contextmanager
def mirrored(cfg: DictConfig, run_dir: Path, sweep: str | None, console: Console) -> Iterator[Any]:
    """The mirror, or None with ``logger=csv``; closed with the run's exit code whatever happens."""
    if cfg.logger.kind == "csv" or processes.rank(cfg) > 0:
        yield None
        return
    from mixadv.monitor.wandb_mirror import WandbMirror

    mirror = WandbMirror(
        run_dir,
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        name=run_dir.name,
        group=sweep,
        config=build.as_dict(cfg),
        init_timeout=cfg.logger.init_timeout,
        finish_timeout=cfg.logger.finish_timeout,
        console=console,
    )
    code = 1
    try:
        yield mirror
        code = 0
    except Stopped as stop:
        code = stop.exit_code
        raise
    finally:
        mirror.finish(code)


def mirror_results(
    mirror: Any,
    cfg: DictConfig,
    results: dict[str, Any],
    mixture: Mixture,
    data: ImageDataModule,
    threat_model: ThreatModel,
    device: torch.device,
) -> None:
    """The final numbers, and the first test images as the validation's attack leaves them."""
    mirror.summary(results)
    count = int(cfg.logger.images)
    if count < 1:
        return
    x, y = (part[:count].to(device) for part in next(iter(data.test_dataloader())))
    attack = build.build_attack(cfg.protocol.validation, "protocol.validation")
    mirror.images(*example_images(mixture.to(device), x, y, attack, threat_model, data.class_names))
