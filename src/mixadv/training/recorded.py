"""The parts of a training as plain containers, for checkpoints, and back.

A part is recorded as ``{"_target_": "module.Class", argument: value, ...}``. A checkpoint may come from anywhere.
Therefore only attacks, losses, solvers and threat models of mixadv, and optimizers and schedulers of ``torch.optim``,
are built again; the caller gives other parts.
"""

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import optim
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from mixadv.errors import UserError
from mixadv.training import learning_rate

PLAIN = (str, int, float, bool, type(None))
# Modules whose classes an argument of a training may be made of. Building them has no side effects.
HOMES = {
    "loss": ("mixadv.losses",),
    "class_weights": ("mixadv.training.class_weights",),
    "members_phase": ("mixadv.training.members_phase",),
    "threat_model": ("mixadv.threat_model",),
    "attack": ("mixadv.attacks", "mixadv.losses"),
    "validation_attack": ("mixadv.attacks", "mixadv.losses"),
    "protocol": ("mixadv.attacks", "mixadv.losses"),
    "solver": ("mixadv.lambda_solvers",),
    "phase": ("mixadv.training.phase", "mixadv.attacks", "mixadv.losses"),
    "growth": ("mixadv.training.growth",),
    "optimizer": ("torch.optim",),
    "scheduler": ("torch.optim.lr_scheduler", learning_rate.__name__),
}
# Types of the other arguments.
NUMBERS = {
    "kind": (str,),
    "T_theta": (int,),
    "seed": (int,),
    "gradient_clip_val": (int, float, type(None)),
    "gradient_clip_algorithm": (str, type(None)),
    "micro_batch_size": (int, type(None)),
}
SCHEDULES = ("constant", "piecewise", "cosine", "one_cycle")


def recorded(part: Any) -> Any:
    """`part` as plain containers.

    Dataclasses are recorded with their fields, ``functools.partial`` with its keywords; of any other object only the
    name of its class.
    """
    if isinstance(part, PLAIN):
        return part
    if isinstance(part, Path):
        return str(part)
    if isinstance(part, Mapping):
        return {str(key): recorded(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [recorded(value) for value in part]
    if isinstance(part, functools.partial):
        return {"_target_": _name(part.func), "_partial_": True, **recorded(part.keywords)}
    if callable(part) and hasattr(part, "__qualname__"):
        return {"_target_": _name(part), "_partial_": True}
    record = {"_target_": _name(type(part))}
    if dataclasses.is_dataclass(part):
        fields = [field for field in dataclasses.fields(part) if field.init]
        record |= {field.name: recorded(getattr(part, field.name)) for field in fields}
    return record


def rebuilt(record: Any, key: str) -> Any:
    """Rebuild an argument that `recorded` wrote; only parts of mixadv and of torch.optim are rebuilt.

    Args:
        record: plain containers, possibly from a file of somebody else.
        key: name of the argument, for messages.

    Raises:
        UserError: it names other code, is of another kind than the argument, or has arguments that do not fit.
    """
    needs_class = key in HOMES and key != "protocol"
    fits = isinstance(record, Mapping) and "_target_" in record if needs_class else isinstance(record, _kinds(key))
    if not fits:
        raise UserError(f"the checkpoint has {key}={record!r}, which is none: it was changed; give {key} yourself")
    return _built(record, key)


def _kinds(key: str) -> tuple[type, ...]:
    return NUMBERS.get(key, (Mapping, type(None)))


def _built(record: Any, key: str) -> Any:
    if isinstance(record, Mapping):
        settings = {str(name): _built(value, key) for name, value in record.items() if name != "_target_"}
        if "_target_" not in record:
            return settings
        target = str(record["_target_"])
        found = _shipped(target, key)
        if found is None:
            raise UserError(
                f"the checkpoint was trained with {key}={target}, which is no part of mixadv: give it yourself, "
                f"load_from_checkpoint(path, {key}=...)"
            )
        try:
            return functools.partial(found, **settings) if settings.pop("_partial_", False) else found(**settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"the checkpoint has settings of {key} that this version does not take: {error}") from error
    if isinstance(record, (list, tuple)):
        return [_built(value, key) for value in record]
    return record


def _name(part: Any) -> str:
    return f"{part.__module__}.{part.__qualname__}"


def _shipped(target: str, key: str) -> Any:
    """The class or function at `target` if it is one that a file may name for the argument `key`, else None."""
    module, _, name = target.rpartition(".")
    homes = HOMES.get(key, ())
    if not any(module == home or module.startswith(f"{home}.") for home in homes):
        return None
    if module == learning_rate.__name__:
        return getattr(learning_rate, name) if name in SCHEDULES else None
    # torch.optim's classes are defined one module deeper than they are offered.
    if module.startswith("torch.optim"):
        home, kind = (lr_scheduler, LRScheduler) if "lr_scheduler" in module else (optim, optim.Optimizer)
        found = getattr(home, name, None)
        return found if isinstance(found, type) and issubclass(found, kind) else None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and found.__module__ == module else None
