"""The members that ``model=...`` describes: their recipe, a trial, and fresh members."""

import sys
from contextlib import nullcontext
from typing import Any

import torch

from mixadv import instantiate as building
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.members.checks import check_members
from mixadv.members.recipe import Recipe, are_plain, build_mixture
from mixadv.members.source import LoadedMember
from mixadv.memory import free_memory, in_gib
from mixadv.mixture import Mixture
from mixadv.models import MODELS
from mixadv.tasks.build import as_dict

BYTES_PER_PARAMETER = 12  # float32 parameter, gradient and momentum


def model_recipe(model: Any, data: ImageDataModule, statistics: bool = True) -> Recipe:
    """The recipe of one member: the settings of the model, and what follows from the data.

    The data give num_classes, image_shape (C, H, W), in_channels, mean and std (one number for each channel). A factory
    of the user's own gets those that it has an argument for, unless the settings give the argument.

    Args:
        model: the settings, with the factory as ``_target_``.
        data: loaded.
        statistics: whether the data give mean and std too; without them, a factory of the user's own may lack
            arguments.

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
    """Try a model of the user's own on two images, each twice, before it is trained; models of mixadv need no trial.

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
    """Bytes that are free on `device`; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory()


def build_members(recipe: Recipe, num_members: int, seed: int, device: torch.device) -> Mixture:
    """A mixture of `num_members` fresh members; `seed` decides their initial parameters.

    Raises:
        UserError: unknown model, settings it does not take, or more members than memory holds.
    """
    try:
        # Models of mixadv are counted without memory; code of the user may not work on the meta device.
        with nullcontext() if recipe.is_factory else torch.device("meta"):
            member = recipe.build()
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    needed = num_members * BYTES_PER_PARAMETER * sum(p.numel() for p in member.parameters())
    free = available_memory(device)
    if free is not None and needed > free:
        fit = num_members * free // needed
        raise UserError(
            f"L={num_members} members of model={recipe.name} need {in_gib(needed)} to train, but only "
            f"{in_gib(free)} are free on the {device.type}: choose "
            + (f"at most L={fit}, or a smaller model=..." if fit else "a smaller model=... or model.width=...")
        )
    # The user's own command has named the factory.
    return build_mixture({"L": num_members, "model": recipe.record()}, [recipe.name], seed=seed).train()
