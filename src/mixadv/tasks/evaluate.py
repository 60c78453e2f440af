"""``task=evaluate``: attack an exported mixture or a checkpoint on the test set."""

import itertools
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mixadv.errors import UserError
from mixadv.export import read_mixture
from mixadv.mixture import Mixture
from mixadv.tasks import build
from mixadv.tasks.measure import measure
from mixadv.tasks.run_directory import State, claim, mark_done, show, working_in, write_config, write_results


def evaluate_mixture(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> None:
    """Measure ``cfg.mixture`` under ``cfg.protocol``; data, norm and eps are those it was trained with unless said.

    Raises:
        UserError: no usable mixture, data that do not fit it, or a directory with other settings.
    """
    mixture, config = read_mixture(cfg.mixture)
    cfg = as_trained(cfg, config, overrides)
    run_dir, state = claim(run_dir, cfg)
    if state is State.DONE:
        show(run_dir, done_before=True)
        return
    with working_in(run_dir):
        _measure_in(run_dir, cfg, mixture, config)
    show(run_dir)


def _measure_in(run_dir: Path, cfg: DictConfig, mixture: Mixture, config: dict[str, Any]) -> None:
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
    results, arrays = measure(cfg, mixture, batches, threat_model, device)
    results["data"] = {"name": data.name, "num_test": data.num_test}
    results["seconds"]["total"] = round(time.perf_counter() - started, 3)
    write_results(run_dir, results, arrays)
    mark_done(run_dir)


def as_trained(cfg: DictConfig, config: dict[str, Any], overrides: list[str]) -> DictConfig:
    """`cfg` with data, eps and norm from the mixture's recipe, except what the command line says itself.

    Raises:
        UserError: the command line says what only the mixture can.
    """
    said = [text.lstrip("+").split("=", 1)[0] for text in overrides]
    for key in said:
        if key in ("experiment", "L", "model") or key.startswith("model."):
            raise UserError(f"{key}=...: task=evaluate takes it from the mixture; leave it out")
    merged = cfg.copy()
    OmegaConf.set_struct(merged, False)
    if "data" not in said and "data" in config:
        own = OmegaConf.create(config["data"])
        for key in said:
            if key.startswith("data."):
                OmegaConf.update(own, key.removeprefix("data."), OmegaConf.select(cfg, key))
        merged.data = own
    if "eps" not in said and "eps" in config:
        merged.eps = config["eps"]
    if not any(key == "threat_model" or key.startswith("threat_model.") for key in said) and "threat_model" in config:
        merged.threat_model.norm = config["threat_model"]["norm"]
    merged.L = int(config["L"])
    merged.model = {"name": config["model"]["name"]}
    return merged


def _check_fit(config: dict[str, Any], data: Any) -> None:
    wanted = (config["model"]["num_classes"], tuple(config["model"]["image_shape"]))
    found = (data.num_classes, tuple(data.image_shape))
    if wanted != found:
        raise UserError(
            f"the mixture takes images {wanted[1]} in {wanted[0]} classes, but {data.name} has {found[1]} in "
            f"{found[0]}: choose the data it was trained for with data=..."
        )
