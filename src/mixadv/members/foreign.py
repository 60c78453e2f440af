"""Loads parameters that other programs saved, without running code, into a model of mixadv or a factory's."""

from __future__ import annotations

import errno
import inspect
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixadv.checkpoint_files import load_tensors
from mixadv.errors import UserError
from mixadv.members.recipe import Recipe
from mixadv.members.state_dicts import UNUSED, Fit, StateDict, fit, parts_of, state_dicts
from mixadv.models import MODELS

IN_A_FACTORY = "load it in a factory members=[module:callable]"


def read_file(path: Path) -> Mapping[Any, Any]:
    """The mapping in a file of safetensors or PyTorch: tensors on the CPU and plain containers. No code is run.

    Raises:
        UserError: the file is empty, damaged, changed, of another kind, or holds other objects.
    """
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(512)
        if not head.strip():
            raise UserError(f"{path} is empty: save or download it again")
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a pointer of git-lfs, not the file itself: fetch it with `git lfs pull`")
        if re.match(rb"\s*<(!doctype|html|head|body|\?xml)", head, re.IGNORECASE):
            raise UserError(f"{path} is a web page, not a file of tensors: download the file itself")
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # If torch.load warns about the content, it is refused below.
            warnings.simplefilter("ignore")
            content = load_tensors(path)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, head, error) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict: save module.state_dict()")
    return content


def _unreadable(path: Path, head: bytes, error: Exception) -> UserError:
    refused = re.search(r"GLOBAL ([\w.]+)(?= was not an allowed| whose module)", str(error))
    program = "TorchScript" in str(error)
    # Pickles of protocol 2 and later begin with the byte 0x80.
    whole = head[:1] == b"\x80" or zipfile.is_zipfile(path)
    if refused or program or (isinstance(error, pickle.UnpicklingError) and whole):
        kind = f" ({refused[1]})" if refused else " (a TorchScript program)" if program else ""
        return UserError(
            f"{path} holds objects other than tensors{kind}, and reading those could run code: convert it to "
            f"safetensors, or {IN_A_FACTORY}"
        )
    kind = "safetensors" if isinstance(error, SafetensorError) else "PyTorch"
    # For a truncated file torch.load raises EINVAL, because it seeks beyond the end.
    reason = isinstance(error, OSError) and error.errno != errno.EINVAL and error.strerror
    reason = reason or "it is truncated or of another kind"
    return UserError(f"{path} is not a readable {kind} file ({reason}): save or download it again")


def to_member(
    path: Path, content: Mapping[Any, Any], default_recipe: Recipe | None, chosen: str = ""
) -> tuple[nn.Module, Recipe, str]:
    """The member that `default_recipe` builds, with the parameters in `content`; its recipe; and a note for tables.

    The parameters are those of a network, with its names or those of other programs for the same network, see
    `mixadv.members.state_dicts.fit`. A normalisation beside the network, ``(x - mean) / std``, is taken from the file,
    else mean and std of the recipe; without either the images are not normalised. The note names the case, and every
    other state dict in the file that fits.

    Args:
        path: for messages.
        content: see `read_file`.
        default_recipe: builds the network.
        chosen: the place of the state dict in the file, as ``state_dict_ema``; "" for the first that fits.

    Raises:
        UserError: `content` has no state dict, or its parameters do not fit.
    """
    if default_recipe is None:
        raise UserError(f"{path} holds only parameters: name their architecture with model=... and data=...")
    arguments = {
        key: list(value) if isinstance(value, (list, tuple)) else value
        for key, value in default_recipe.arguments.items()
        if value is not None
    }
    recipe = Recipe(default_recipe.name, arguments)
    found = _found(path, content, recipe, chosen)
    state, fitted = found[0]
    if _lacks_only_norm(fitted, recipe):
        recipe = Recipe(recipe.name, recipe.arguments | {"final_norm": False})
        found = _found(path, content, recipe, chosen)
        state, fitted = found[0]
    place = f"{path} (its {state.where})" if state.where else str(path)
    _check_fit(place, recipe, fitted, state.tensors, _network(recipe))
    if fitted.mean:
        recipe = _with_statistics(place, recipe, state.tensors[fitted.mean], state.tensors[fitted.std])
    member = _build(recipe)
    own = "" if recipe.is_factory else "net."
    loaded = {f"{own}{key}": state.tensors[name] for key, name in fitted.keys.items()}
    member.load_state_dict({**member.state_dict(), **loaded})
    others = [
        other.where or "the top of the file"
        for other, fits in found[1:]
        if fits.fits and other.where != state.where and _differ(other, fits, state, fitted)
    ]
    return member, recipe, _note(recipe, state.where, others, fitted)


def _note(recipe: Recipe, where: str, others: Sequence[str], fitted: Fit) -> str:
    if recipe.is_factory:
        note = "with the normalisation of its factory"
    elif fitted.mean:
        note = "normalised as in the file"
    elif "mean" in recipe.arguments:
        note = "normalised with the given mean and std"
    else:
        note = "no normalisation"
        if re.search(r"(^|\.)[1-9]\.$", fitted.prefix):
            note += f" (names begin with {fitted.prefix}: if layer 0 normalised, give model.mean and model.std)"
    if fitted.leaves_out_unused:
        note += f"; without {UNUSED[:-1]}, which the network does not use"
    if "final_norm" in recipe.arguments:
        note += "; without a batch norm before the linear layer"
    if where:
        note += f"; from {where}"
    return note + (f" (not {', '.join(others)})" if others else "")


def _build(recipe: Recipe) -> nn.Module:
    try:
        return recipe.build()
    except ValueError as error:
        raise UserError(f"model={recipe.name}: {error}") from error


def _network(recipe: Recipe) -> dict[str, Tensor]:
    """What a file must hold: the state dict of the network, or of all that a factory builds; ours without memory."""
    if recipe.is_factory:
        return dict(_build(recipe).state_dict())
    with torch.device("meta"):
        whole = _build(recipe).state_dict()
    return {key.removeprefix("net."): value for key, value in whole.items() if key.startswith("net.")}


def _found(path: Path, content: Mapping[Any, Any], recipe: Recipe, chosen: str) -> list[tuple[StateDict, Fit]]:
    """State dicts with their fits: first the one to load, or to complain about.

    A state dict that does not fit as a whole is taken apart, as the file of a module that holds a network and its
    average. A part is taken if all parts fit; else it has to be chosen.

    Raises:
        UserError: there are no state dicts, or not the chosen one.
    """
    network, model = _network(recipe), None if recipe.is_factory else recipe.name

    def fits_of(states: Sequence[StateDict]) -> list[tuple[StateDict, Fit]]:
        try:
            return [(state, fit(state.tensors, network, model)) for state in states]
        except UserError as error:
            raise UserError(f"{path}: {error}, or {IN_A_FACTORY}") from error

    states = state_dicts(content)
    if not states:
        has = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise UserError(f"{path} holds no mapping of names to tensors (it has {has}): save module.state_dict()")
    wholes, parts = fits_of(states), []
    for state, fitted in wholes:
        # Mappings with fewer tensors, as those of optimizers, cannot hold the network in a part.
        if not fitted.fits and len(state.tensors) > len(fitted.missing) and len(state.tensors) >= len(network) // 2:
            parts.append(fits_of(parts_of(state)))
    if chosen:
        everything = [*wholes, *(pair for group in parts for pair in group)]
        taken = [pair for pair in everything if pair[0].where == chosen]
        if not taken:
            places = ", ".join(state.where for state, _ in everything if state.where) or "none"
            raise UserError(f"{path} has no state dict {chosen}: choose one of its own ({places})")
        return [*taken, *(pair for pair in everything if pair[0].where != chosen)]
    complete = [pair for group in parts for pair in group if all(fitted.fits for _, fitted in group)]
    fitting = [pair for pair in wholes if pair[1].fits]
    first = fitting or complete
    if first:
        return [*first, *(complete if fitting else ())]
    incomplete = [(state, fitted) for group in parts for state, fitted in group if fitted.fits]
    if incomplete:
        state = incomplete[0][0]
        group = next(group for group in parts if any(pair[0] is state for pair in group))
        left = ", ".join(other.where for other, fitted in group if not fitted.fits)
        raise UserError(
            f"{path} holds model={recipe.name} in {state.where}, and other parameters in {left}: if the network works "
            f"without those, choose {path}:{state.where}, else {IN_A_FACTORY}"
        )
    return [min(wholes, key=lambda pair: pair[1].cost), *wholes]


def _lacks_only_norm(fitted: Fit, recipe: Recipe) -> bool:
    """Whether the file is kuangliu's pre-activation ResNet-18, which has no batch norm before its linear layer."""
    lacks = {name.partition(".")[0] for name in fitted.missing} == {"bn"} and not fitted.unexpected
    return recipe.name == "preact_resnet18" and lacks


def _differ(other: StateDict, fits: Fit, state: StateDict, fitted: Fit) -> bool:
    """Whether two state dicts that fit hold different parameters."""
    shared = [key for key in fitted.keys if key in fits.keys]
    return not all(torch.equal(other.tensors[fits.keys[key]], state.tensors[fitted.keys[key]]) for key in shared)


def _with_statistics(place: str, recipe: Recipe, mean: Tensor, std: Tensor) -> Recipe:
    """The recipe with the mean and standard deviation in the file, [C] or one number, of images in [0, 1]."""
    channels = recipe.arguments.get("image_shape", [3])[0]
    values = {}
    for key, tensor in (("mean", mean), ("std", std)):
        if tensor.numel() not in (1, channels):
            raise UserError(
                f"{place} normalises with a {key} of shape {tuple(tensor.shape)}, the images have {channels} channels: "
                f"choose the data=... it was trained with, or {IN_A_FACTORY}"
            )
        values[key] = tensor.flatten().float().expand(channels).tolist()
    if not all(s > 0 for s in values["std"]):
        raise UserError(f"{place} has normalize.std={values['std']}: every entry must be positive; correct the file")
    if max(map(abs, values["mean"])) > 4:
        raise UserError(
            f"{place} normalises with mean={values['mean']}, for pixels in 0..255: members take images in [0, 1]; "
            f"{IN_A_FACTORY} and divide mean and std by 255"
        )
    return Recipe(recipe.name, recipe.arguments | values)


def _own_settings(recipe: Recipe) -> list[str]:
    """The settings of a model that shape its parameters and that the data do not fix."""
    names = recipe.arguments if recipe.is_factory else inspect.signature(MODELS[recipe.name]).parameters
    return [name for name in names if name not in ("num_classes", "image_shape", "mean", "std")]


def _check_fit(
    place: str, recipe: Recipe, fitted: Fit, tensors: Mapping[str, Tensor], network: Mapping[str, Tensor]
) -> None:
    known = ", ".join(MODELS)
    settings = "".join(f", model.{name}=..." for name in _own_settings(recipe))
    remedy = f"choose the model=... ({known}){settings} and data=... it was trained with, or {IN_A_FACTORY}"
    if fitted.cost:
        sides = ((fitted.missing, "missing"), (fitted.unexpected, "unexpected"))
        wrong = [f"{names[0]!r} is {what}" for names, what in sides if names]
        more = fitted.cost - len(wrong)
        named = " and ".join(wrong) + (f" ({more} more)" if more else "")
        fine, other = fitted.parts
        share = f" (what fits: {', '.join(fine)}; what does not: {', '.join(other)})" if fine and other else ""
        raise UserError(f"{place} does not fit model={recipe.name}{share}: {named}; {remedy}")
    for key, own in fitted.keys.items():
        new, old = tensors[own], network[key]
        if new.shape != old.shape:
            shapes = f"has the shape {tuple(new.shape)}, the model {tuple(old.shape)}"
            raise UserError(f"{place} does not fit model={recipe.name}: {own!r} {shapes}; {remedy}")
        if new.layout != torch.strided or new.is_quantized or new.is_meta or new.is_complex():
            raise UserError(f"{place}: {own!r} is not a dense tensor of real numbers; convert it, or {IN_A_FACTORY}")
