"""The measured part of a run, the same for training and for evaluation."""

import platform
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from mixadv.attacks.search import Attack
from mixadv.config import parse_eps
from mixadv.evaluation import evaluate
from mixadv.mixture import Mixture
from mixadv.tasks.build import as_dict, build_protocol
from mixadv.tasks.run_directory import RESULTS_SCHEMA, provenance
from mixadv.threat_model import ThreatModel


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
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run the protocol's attacks: results.json without the training's part, and the arrays of records.npz."""
    started = time.perf_counter()
    record = evaluate(mixture, batches, build_protocol(cfg), threat_model, seed=cfg.seed)
    settings = {name: as_dict(node) for name, node in cfg.protocol.attacks.items()}
    results = {
        "schema": RESULTS_SCHEMA,
        "task": cfg.task,
        "seed": cfg.seed,
        "device": device_name(device),
        **provenance(),
        "config": as_dict(cfg),
        "threat_model": {"norm": threat_model.norm, "eps": parse_eps(threat_model.eps)},
        "protocol": cfg.protocol.name,
        **record.summary(settings),
        "game": {"value_at_weights": None, "value_lp": None, "gap": None, "matching_penny_gap": None},
        "flags": [],
        "seconds": {"evaluate": round(time.perf_counter() - started, 3)},
    }
    return results, record.arrays()


def example_images(
    mixture: Mixture,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    threat_model: ThreatModel,
    class_names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], float]:
    """Clean and attacked images [N, C, H, W], their labels, which members the attack fooled, and eps."""
    x_adv = attack(mixture, x, y, threat_model, torch.Generator(x.device).manual_seed(0))
    with torch.no_grad(), mixture.attack_mode():
        wrong = mixture.member_logits(x_adv).argmax(-1) != y
    fooled = [", ".join(str(int(k)) for k in column.nonzero().flatten()) or "none" for column in wrong.T]
    labels = [class_names[int(label)] for label in y]
    return x.cpu().numpy(), x_adv.cpu().numpy(), labels, fooled, threat_model.eps
