"""From configuration to objects, with refusals that name the key."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.callbacks import ProgressBar as ProgressBarBase
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment

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
from mixadv.ranks import OneProcess
from mixadv.runs import processes
from mixadv.threat_model import ThreatModel
from mixadv.training.class_weights import ClassWeights
from mixadv.training.members_phase import MembersPhase
from mixadv.training.phase import WeightsPhase

CHECKPOINTS = "mixadv.callbacks.Checkpoints"
Part = TypeVar("Part")
# The base class of what a key may name.
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
        # Each member has its own: the training calls the partial for each of them.
        settings["_partial_"] = True
    kind = next((kind for start, kind in KINDS.items() if key.startswith(start)), None)
    built = building.instantiate(settings, key, kind)
    if isinstance(built, ZeroOne):
        raise UserError(f"{key}._target_={settings['_target_']} has no gradient: choose loss=at or loss=trades")
    return built


def resolve_device(cfg: DictConfig, place: int = 0) -> torch.device:
    """The device of this process: for ``trainer.accelerator=auto`` a CUDA GPU if there is one, else the CPU.

    Args:
        place: local rank of this process; it takes the GPU at that place in ``trainer.devices``.

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


def as_recorded(
    cfg: DictConfig, config: dict[str, Any], given: Sequence[str], where: str = "the mixture"
) -> DictConfig:
    """`cfg` with data, eps and norm as a mixture records them, except the keys that the command line sets.

    Args:
        cfg: as composed.
        config: of the mixture, see `mixadv.members.store.read_mixture`.
        given: the keys that the command line sets, see `keys_of`.
        where: the mixture's name, for messages.

    Raises:
        UserError: the mixture names a data set that is not of mixadv, and the command line names none.
    """
    merged = cfg.copy()
    OmegaConf.set_struct(merged, False)
    if "data" not in given and "data" in config:
        # Never take download mirrors from a mixture's file: it may come from an untrusted source.
        kept = {k: value for k, value in config["data"].items() if k != "mirrors" and f"data.{k}" not in given}
        building.held_to_mixadv(kept, where)
        own = OmegaConf.create(kept)
        for key in given:
            if key.startswith("data."):
                OmegaConf.update(own, key.removeprefix("data."), OmegaConf.select(cfg, key))
        merged.data = own
    if "eps" not in given and "eps" in config:
        merged.eps = config["eps"]
    if not any(key == "threat_model" or key.startswith("threat_model.") for key in given) and "threat_model" in config:
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


def build_attack(node: Any, key: str) -> PGD:
    """The PGD attack of training or validation.

    Raises:
        UserError: it is another attack.
    """
    attack = instantiate(node, key)
    if not isinstance(attack, PGD):
        raise UserError(f"{key} must be PGD for training, not {type(attack).__name__}")
    return attack


# Keys of groups that are not arguments of the class that the group names.
PHASE = ("payoff", "attacks", "num_images")
MEMBERS_PHASE = ("targets", "eps_scale", "eps_ramp", "worst_of")
CLASS_WEIGHTS = ("class_weights", "ratio", "orders")


def _divided(node: Any, key: str, own: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The group `key` in two parts: the arguments of the class that it names, and its other keys, listed in `own`.

    Raises:
        UserError: the class has an argument of such a name, which could not be set.
    """
    settings = as_dict(node)
    kept = {name: settings.pop(name) for name in own if name in settings}
    target = settings.get(building.TARGET)
    if target is not None:
        for name in building.arguments_of(building.named(target, key))[0]:
            if name in own:
                raise UserError(f"{key}._target_={target} has an argument {name}, a key of the group {key}: rename it")
    return settings, kept


def build_loss(cfg: DictConfig) -> RobustLoss:
    """The loss of ``loss``.

    Raises:
        UserError: it cannot be built.
    """
    loss: RobustLoss = instantiate(_divided(cfg.loss, "loss", CLASS_WEIGHTS)[0], "loss")
    return loss


def build_class_weights(cfg: DictConfig) -> ClassWeights:
    """The weights of the classes, from the other keys of ``loss``.

    Raises:
        UserError: settings out of their range.
    """
    return _built(ClassWeights, _divided(cfg.loss, "loss", CLASS_WEIGHTS)[1], "loss")


def build_training_attack(cfg: DictConfig) -> PGD:
    """The PGD of ``attack``.

    Raises:
        UserError: it is another attack.
    """
    return build_attack(_divided(cfg.attack, "attack", MEMBERS_PHASE)[0], "attack")


def build_members_phase(cfg: DictConfig) -> MembersPhase:
    """What the attacks of the members' phases try, from the other keys of ``attack``.

    Raises:
        UserError: settings out of their range.
    """
    return _built(MembersPhase, _divided(cfg.attack, "attack", MEMBERS_PHASE)[1], "attack")


def _built(part: type[Part], settings: dict[str, Any], key: str) -> Part:
    building.check_arguments(part, settings, key)
    try:
        return part(**settings)
    except ValueError as error:
        raise UserError(f"{key}.{error}") from error


def build_solver(cfg: DictConfig) -> LambdaSolver:
    """The solver of ``lambda_solver``.

    Raises:
        UserError: it cannot be built.
    """
    solver: LambdaSolver = instantiate(_divided(cfg.lambda_solver, "lambda_solver", PHASE)[0], "lambda_solver")
    return solver


def build_phase(cfg: DictConfig) -> WeightsPhase:
    """The game of the weights phases, from the other keys of ``lambda_solver``; attacks are named as in the protocol.

    Raises:
        UserError: an attack that the protocol does not have, or settings out of their range.
    """
    settings = _divided(cfg.lambda_solver, "lambda_solver", PHASE)[1]
    names = settings.pop("attacks", None) or []
    known = [str(name) for name in cfg.protocol.attacks]
    if not isinstance(names, list) or not set(map(str, names)) <= set(known):
        raise UserError(
            f"lambda_solver.attacks={names}: give a list of attacks of protocol={cfg.protocol.name}, which has "
            f"{', '.join(known)}"
        )
    attacks = {str(name): instantiate(cfg.protocol.attacks[name], f"protocol.attacks.{name}") for name in names}
    return _built(WeightsPhase, settings | {"attacks": attacks}, "lambda_solver")


def build_protocol(cfg: DictConfig) -> dict[str, Attack]:
    """The protocol's attacks by name.

    Raises:
        UserError: one of them cannot be built.
    """
    nodes = cfg.protocol.attacks
    return {str(name): instantiate(node, f"protocol.attacks.{name}") for name, node in nodes.items()}


def build_callbacks(cfg: DictConfig, run_dir: Path) -> list[Callback]:
    """The callbacks that ``callbacks`` names. `Checkpoints` is always among them, because runs resume from its files.

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
    """The arguments of Lightning's Trainer for devices and processes.

    Raises:
        UserError: a strategy that cannot train a mixture, or an allocation of Slurm that does not fit.
    """
    wanted = cfg.trainer.strategy
    if wanted not in ("auto", "ddp"):
        raise UserError(
            f"trainer.strategy={wanted} cannot train a mixture, whose members are updated one at a time and attacked "
            "whole: leave it at auto; several processes average the gradients of each member"
        )
    # A list names GPUs; on the CPU its length is the number of processes.
    named = isinstance(cfg.trainer.devices, ListConfig) and device.type != "cpu"
    settings: dict[str, Any] = {
        "accelerator": {"cpu": "cpu", "mps": "mps"}.get(device.type, "gpu"),
        "devices": list(cfg.trainer.devices) if named else processes.devices(cfg),
        "num_nodes": cfg.trainer.num_nodes,
    }
    if processes.number(cfg) == 1:
        return {**settings, "plugins": [OneProcess()]}
    from mixadv.training import Replicas

    try:
        if SLURMEnvironment.detect():
            SLURMEnvironment()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Slurm: {reason} One process (trainer.devices=1) runs in any allocation.") from error
    return {**settings, "strategy": Replicas()}
