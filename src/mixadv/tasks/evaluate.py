"""``task=evaluate``: attack an exported mixture or a checkpoint on the test set."""

import itertools
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationState
from mixadv.export import member_recipes
from mixadv.mixture import Mixture
from mixadv.report import write_report
from mixadv.tasks import build
from mixadv.tasks.measure import STATE, measure
from mixadv.tasks.run_directory import State, mark_done, write_config, write_results


def evaluate_mixture(cfg: DictConfig, run_dir: Path, state: State, *, mixture: Mixture, config: dict[str, Any]) -> None:
    """Measure a mixture and its recipe `config` under ``cfg.protocol``, in a claimed directory.

    Raises:
        UserError: data that do not fit it.
    """
    device = build.resolve_device(cfg.trainer.accelerator)
    data = build.build_data(cfg.data)
    _check_fit(config, data)
    threat_model = build.build_threat_model(cfg.threat_model.norm, cfg.eps, data.image_shape)
    write_config(run_dir, cfg)
    mixture.to(device)
    started = time.perf_counter()
    loader = data.test_dataloader()
    limit = build.limited(cfg.trainer.limit_test_batches, len(loader))
    batches = ((x.to(device), y.to(device)) for x, y in itertools.islice(loader, limit))
    results, arrays = measure(cfg, mixture, batches, threat_model, device, run_dir, data.class_names)
    results["data"] = {"name": data.name, "num_test": data.num_test}
    results["seconds"]["total"] = round(time.perf_counter() - started, 3)
    write_results(run_dir, results, arrays)
    EvaluationState(run_dir / STATE).clear()
    write_report(run_dir)
    mark_done(run_dir)


def as_trained(cfg: DictConfig, config: dict[str, Any], overrides: list[str]) -> DictConfig:
    """`cfg` with data, eps and norm from the mixture's recipe, except what the command line says itself.

    Raises:
        UserError: the command line says what only the mixture can.
    """
    said = build.keys_of(overrides)
    for key in said:
        if key in ("experiment", "L", "model") or key.startswith("model."):
            raise UserError(f"{key}=...: task=evaluate takes it from the mixture; leave it out")
    merged = build.as_recorded(cfg, config, said)
    merged.L = int(config["L"])
    recipes = config.get("models") or [config["model"]]
    merged.model = {"name": ", ".join(dict.fromkeys(recipe.get("name", recipe.get("factory")) for recipe in recipes))}
    return merged


def _check_fit(config: dict[str, Any], data: ImageDataModule) -> None:
    found = (data.num_classes, tuple(data.image_shape))
    # Members that are built by code say nothing of their own: then the mixture's recipe does.
    for said in (config, *member_recipes(config)):
        if not {"num_classes", "image_shape"} <= set(said):
            continue
        shape = said["image_shape"]
        wanted = (said["num_classes"], tuple(shape) if isinstance(shape, (list, tuple)) else shape)
        if wanted != found:
            raise UserError(
                f"the mixture takes images {wanted[1]} in {wanted[0]} classes, but {data.name} has {found[1]} in "
                f"{found[0]}: choose the data it was trained for with data=..."
            )
