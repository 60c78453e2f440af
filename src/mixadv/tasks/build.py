"""From configuration to objects, with refusals that name the key."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.callbacks import ProgressBar as ProgressBarBase
from pytorch_lightning.loggers import Logger

from mixadv import instantiate as building
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import Attack
from mixadv.callbacks import Checkpoints
from mixadv.config import parse_eps
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.games.base import Playable
from mixadv.lambda_solvers import LambdaSolver
from mixadv.losses import RobustLoss, ZeroOne
from mixadv.members.checks import check_members
from mixadv.members.recipe import Recipe, are_plain, build_mixture
from mixadv.members.source import LoadedMember
from mixadv.mixture import Mixture
from mixadv.models import MODELS
from mixadv.runs import processes
from mixadv.threat_model import ThreatModel

CHECKPOINTS = "mixadv.callbacks.Checkpoints"
BYTES_PER_PARAMETER = 12  # float32 parameter, gradient and momentum
# What the classes that are named below a key derive from.
KINDS: dict[str, type] = {
    "data": ImageDataModule,
    "loss": RobustLoss,
    "lambda_solver": LambdaSolver,
    "attack": Attack,
    "game": Playable,
    "protocol.": Attack,
    "callbacks.": Callback,
    "logger.": Logger,
}


def instantiate(node: Any, key: str) -> Any:
    """Build the object that ``_target_`` names, of mixadv or of the user's own; see `mixadv.instantiate.instantiate`.

    Raises:
        UserError: not such a class as `key` is for, or arguments that it does not take.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{key}={node} must be the settings of a class, with its _target_")
    settings = as_dict(node)
    if key in ("optimizer", "scheduler"):
        # Every member has its own; the training calls what is built here for each of them.
        settings["_partial_"] = True
    kind = next((kind for start, kind in KINDS.items() if key.startswith(start)), None)
    built = building.instantiate(settings, key, kind)
    if isinstance(built, ZeroOne):
        raise UserError(f"{key}._target_={settings['_target_']} has no gradient: choose loss=at or loss=trades")
    return built


def resolve_device(cfg: DictConfig, place: int = 0) -> torch.device:
    """The device of this process: ``trainer.accelerator`` auto is a CUDA GPU if there is one, else the CPU.

    Args:
        place: number of this process among those on its machine; it takes the GPU of that place in ``trainer.devices``.

    Raises:
        UserError: no such device here.
    """
    accelerator, listed = cfg.trainer.accelerator, cfg.trainer.devices
    cuda = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not cuda:
        raise UserError(f"trainer.accelerator={accelerator}, but PyTorch sees no CUDA GPU: use trainer.accelerator=cpu")
    if accelerator == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("trainer.accelerator=mps, but PyTorch sees no Apple GPU: use trainer.accelerator=cpu")
        return torch.device("mps")
    if not cuda or accelerator == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", listed[place] if isinstance(listed, ListConfig) else place)


def as_dict(node: Any) -> dict[str, Any]:
    """A mapping of the configuration as a plain, resolved dict."""
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {str(key): value for key, value in plain.items()}


def keys_of(overrides: Sequence[str]) -> list[str]:
    """The keys that a command line sets."""
    return [text.lstrip("+~").split("=", 1)[0] for text in overrides]


def as_recorded(cfg: DictConfig, config: dict[str, Any], said: Sequence[str], where: str = "the mixture") -> DictConfig:
    """`cfg` with data, eps and norm from the recipe of a mixture, except the keys that the command line `said`.

    Args:
        cfg: as composed.
        config: the recipe, see `mixadv.members.store.read_mixture`.
        said: keys, see `keys_of`.
        where: whose recipe it is, for messages.

    Raises:
        UserError: the recipe names data that are not of mixadv, and the command line does not say which to take.
    """
    merged = cfg.copy()
    OmegaConf.set_struct(merged, False)
    if "data" not in said and "data" in config:
        # Whom to ask for a download is not for a file to say that may come from anywhere.
        kept = {k: value for k, value in config["data"].items() if k != "mirrors" and f"data.{k}" not in said}
        building.held_to_mixadv(kept, where)
        own = OmegaConf.create(kept)
        for key in said:
            if key.startswith("data."):
                OmegaConf.update(own, key.removeprefix("data."), OmegaConf.select(cfg, key))
        merged.data = own
    if "eps" not in said and "eps" in config:
        merged.eps = config["eps"]
    if not any(key == "threat_model" or key.startswith("threat_model.") for key in said) and "threat_model" in config:
        merged.threat_model.norm = config["threat_model"].get("norm")
    return merged


def build_data(node: Any) -> ImageDataModule:
    """The data module, loaded and split.

    Raises:
        UserError: data missing or damaged, or settings out of range.
    """
    data: ImageDataModule = instantiate(node, "data")
    try:
        data.prepare_data()
        data.setup("fit")
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"data: {error}") from error
    return data


def build_threat_model(norm: str, eps: Any, image_shape: tuple[int, int, int]) -> ThreatModel:
    """The ball in the unit box.

    Raises:
        UserError: an l2 radius larger than the box's diagonal.
    """
    radius = parse_eps(eps)
    diagonal = math.sqrt(math.prod(image_shape))
    if norm == "l2" and radius > diagonal:
        raise UserError(f"eps={eps} exceeds the diagonal {diagonal:.2f} of the box [0, 1]^d: choose a smaller radius")
    return ThreatModel(norm, radius)


def model_recipe(model: Any, data: ImageDataModule, statistics: bool = True) -> Recipe:
    """What builds one member: the model's own settings, and what the data fixes.

    A factory of the user's own gets what the data fixes where it has an argument of that name, and the settings do not
    say otherwise: num_classes, image_shape (C, H, W), in_channels, mean and std (one number for each channel).

    Args:
        model: the settings, with the factory as ``_target_``.
        data: loaded.
        statistics: whether mean and std belong to what the data fixes; without them, a factory of the user's own may
            lack arguments.

    Raises:
        UserError: no such factory, or arguments that it does not take.
    """
    settings = as_dict(model)
    factory = building.named(settings.get("_target_"), "model")
    fixed: dict[str, Any] = {"num_classes": data.num_classes, "image_shape": list(data.image_shape)}
    if statistics:
        fixed |= {"mean": list(data.mean), "std": list(data.std)}
    target = settings.pop("_target_")
    if factory in MODELS.values():
        name = next(name for name, ours in MODELS.items() if ours is factory)
        return Recipe(name, {**fixed, **settings})
    for key, value in settings.items():
        if key.startswith("_") or not are_plain({key: value}):
            raise UserError(f"model.{key}={value}: models of your own take plain values (text, numbers, lists) alone")
    taken, _ = building.arguments_of(factory)
    fixed["in_channels"] = data.image_shape[0]
    arguments = {key: value for key, value in fixed.items() if key in taken} | settings
    building.check_arguments(factory, arguments, "model", given_later=not statistics)
    parts = target.split(".")
    depth = next(n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in sys.modules)
    return Recipe(f"{'.'.join(parts[:depth])}:{'.'.join(parts[depth:])}", arguments)


def check_own_model(recipe: Recipe, data: ImageDataModule) -> None:
    """Try a model of the user's own out on two images, each twice, before it is trained; mixadv's are known to work.

    Raises:
        UserError: it cannot be built, or is no classifier of these images; see `mixadv.members.checks.check_members`.
    """
    if not recipe.is_factory:
        return
    name = recipe.name
    # Pairs of the same image are another batch than all four.
    images = data.train_images[[0, 0, -1, -1]] / 255
    count = check_members([LoadedMember(recipe.build(), name, name, recipe, "")], images)
    if count != data.num_classes:
        raise UserError(f"model: {name} tells {count} classes apart, but {data.name} has {data.num_classes}")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be used on `device`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def build_members(recipe: Recipe, num_members: int, seed: int, device: torch.device) -> Mixture:
    """A mixture of `num_members` fresh members, each initialised differently, as `seed` says.

    Raises:
        UserError: unknown model, settings it does not take, or more members than memory holds.
    """
    try:
        # Code of others need not work without numbers.
        with nullcontext() if recipe.is_factory else torch.device("meta"):
            member = recipe.build()
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    needed = num_members * BYTES_PER_PARAMETER * sum(p.numel() for p in member.parameters())
    free = available_memory(device)
    if free is not None and needed > free:
        fit = num_members * free // needed
        raise UserError(
            f"L={num_members} members of model={recipe.name} need {needed / 2**30:.1f} GiB to train, but only "
            f"{free / 2**30:.1f} GiB are free on the {device.type}: choose "
            + (f"at most L={fit}, or a smaller model=..." if fit else "a smaller model=... or model.width=...")
        )
    # The user's own command has named the factory.
    return build_mixture({"L": num_members, "model": recipe.record()}, [recipe.name], seed=seed).train()


def build_attack(node: Any, key: str) -> PGD:
    """An attack whose iterates the caller may adapt (training and validation take PGD).

    Raises:
        UserError: it is another attack.
    """
    attack = instantiate(node, key)
    if not isinstance(attack, PGD):
        raise UserError(f"{key} must be PGD for training, not {type(attack).__name__}")
    return attack


def build_protocol(cfg: DictConfig) -> dict[str, Attack]:
    """The protocol's attacks by name.

    Raises:
        UserError: one of them cannot be built.
    """
    nodes = cfg.protocol.attacks
    return {str(name): instantiate(node, f"protocol.attacks.{name}") for name, node in nodes.items()}


def build_callbacks(cfg: DictConfig, run_dir: Path) -> list[Callback]:
    """What ``callbacks`` names, checkpoints always among them: a run is continued and measured from those.

    Raises:
        UserError: one of them cannot be built.
    """
    nodes = {str(name): as_dict(node) for name, node in cfg.callbacks.items()}
    built = []
    for name, node in nodes.items():
        if node["_target_"] == CHECKPOINTS:
            node["dirpath"] = str(run_dir / "checkpoints")
        built.append(instantiate(node, f"callbacks.{name}"))
    if not cfg.trainer.enable_progress_bar:
        built = [callback for callback in built if not isinstance(callback, ProgressBarBase)]
    if not any(isinstance(callback, Checkpoints) for callback in built):
        built.append(Checkpoints(run_dir / "checkpoints"))
    return built


def trainer_settings(cfg: DictConfig, device: "torch.device") -> dict[str, Any]:
    """What Lightning's Trainer has to know of devices and processes.

    Raises:
        UserError: a strategy that cannot train a mixture.
    """
    wanted = cfg.trainer.strategy
    if wanted not in ("auto", "ddp"):
        raise UserError(
            f"trainer.strategy={wanted} cannot train a mixture, whose members are updated one at a time and attacked "
            "whole: leave it at auto; several processes average the gradients of each member"
        )
    # A list names GPUs; on the CPU it says how many processes.
    named = isinstance(cfg.trainer.devices, ListConfig) and device.type != "cpu"
    settings: dict[str, Any] = {
        "accelerator": {"cpu": "cpu", "mps": "mps"}.get(device.type, "gpu"),
        "devices": list(cfg.trainer.devices) if named else processes.devices(cfg),
        "num_nodes": cfg.trainer.num_nodes,
    }
    if processes.number(cfg) > 1:
        from mixadv.training import Replicas

        settings["strategy"] = Replicas()
    return settings
