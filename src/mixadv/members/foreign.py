"""Loads parameters that other programs saved, without running code, into a model of mixadv or a factory's."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixadv.checkpoint_files import load_tensors
from mixadv.errors import UserError
from mixadv.members.recipe import Recipe
from mixadv.models import MODELS

# The keys under which programs save a state dict, by priority.
NESTS = ("state_dict", "model_state_dict", "model", "net", "ema")
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


def _state_dicts(content: Mapping[Any, Any], depth: int = 4) -> list[tuple[str, dict[str, Tensor]]]:
    """(path of keys, state dict) for every state dict under `NESTS`; else `content`, if it holds tensors."""
    found = []
    # The depth is limited because a pickled mapping can contain itself.
    for nest in NESTS if depth else ():
        inner = content.get(nest)
        if isinstance(inner, Mapping):
            found += [(f"{nest}.{below}".rstrip("."), state) for below, state in _state_dicts(inner, depth - 1)]
    own = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return found or ([("", own)] if own else [])


def to_member(path: Path, content: Mapping[Any, Any], default_recipe: Recipe | None) -> tuple[nn.Module, Recipe, str]:
    """The member that `default_recipe` builds, with the parameters in `content`; its recipe; and a note for tables.

    The parameters are those of a member (``normalize.*``, ``net.*``) or of its net alone (``conv1.weight``, ...). Mean
    and standard deviation come from the file, else from the recipe; without either the images are not normalised. The
    note names the case. `path` is for messages.

    Raises:
        UserError: `content` has no state dict, or its parameters do not fit.
    """
    if default_recipe is None:
        raise UserError(f"{path} holds only parameters: name their architecture with model=... and data=...")
    states = _state_dicts(content)
    if not states:
        has = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise UserError(
            f"{path} has no tensors at its top or under {', '.join(NESTS)} (it has {has}): save module.state_dict()"
        )
    arguments = {
        key: list(value) if isinstance(value, (list, tuple)) else value
        for key, value in default_recipe.arguments.items()
        if value is not None
    }
    recipe = Recipe(default_recipe.name, arguments)
    try:
        member = recipe.build()
    except ValueError as error:
        raise UserError(f"model={recipe.name}: {error}") from error
    where, state = states[0]
    normalised = _load(f"{path} (its {where})" if where else str(path), recipe, member, state)
    if recipe.is_factory:
        note = "with the normalisation of its factory"
    elif normalised:
        note, recipe = "normalised as in the file", _with_statistics(path, recipe, member)
    else:
        note = "normalised with the given mean and std" if "mean" in arguments else "no normalisation"
    if where:
        others = ", ".join(other for other, _ in states[1:])
        note += f"; from {where}" + (f" (not {others})" if others else "")
    return member, recipe, note


def _with_statistics(path: Path, recipe: Recipe, member: nn.Module) -> Recipe:
    """The recipe with the mean and standard deviation that were loaded from the file."""
    found = {key: member.get_buffer(f"normalize.{key}").flatten().tolist() for key in ("mean", "std")}
    if not all(s > 0 for s in found["std"]):
        raise UserError(f"{path} has normalize.std={found['std']}: every entry must be positive; correct the file")
    return Recipe(recipe.name, recipe.arguments | found)


class _Fit(NamedTuple):
    """One way to map the names in a file to those of a target, the member or its net.

    Attributes:
        missing: names of the target that the file lacks.
        unexpected: names in the file that the target lacks.
        is_whole: whether the target is the member.
        keys: name in the target -> name in the file.
    """

    missing: list[str]
    unexpected: list[str]
    is_whole: bool
    keys: dict[str, str]


def _fits(keys: dict[str, str], targets: Sequence[Mapping[str, Tensor]]) -> list[_Fit]:
    """The fits for each target, with the full names and then without each common prefix."""
    fits = []
    while True:
        for target in targets:
            # num_batches_tracked is only used in training, and old files lack it.
            missing = [key for key in target if key not in keys and not key.endswith(".num_batches_tracked")]
            unexpected = [key for key in keys if key not in target]
            fits.append(_Fit(missing, unexpected, target is targets[0], keys))
        if len({key.partition(".")[0] for key in keys}) != 1 or not all("." in key for key in keys):
            return fits
        keys = {key.partition(".")[2]: own for key, own in keys.items()}


def _load(place: str, recipe: Recipe, member: nn.Module, state: dict[str, Tensor]) -> bool:
    """Load `state` into `member` or its net, by the best of `_fits`; True if `state` includes the normalisation.

    Names that torch.compile and AveragedModel add are dropped.
    """
    keys = {".".join(part for part in key.split(".") if part != "_orig_mod"): key for key in state}
    if len(keys) < len(state):
        raise UserError(
            f"{place} holds parameters twice, compiled and not compiled: remove one copy, or {IN_A_FACTORY}"
        )
    keys = {key: own for key, own in keys.items() if key.rpartition(".")[2] != "n_averaged"}
    whole = member.state_dict()
    net = {key.removeprefix("net."): value for key, value in whole.items() if key.startswith("net.")}
    fits = _fits(keys, (whole,) if recipe.is_factory else (whole, net))
    best = min(fits, key=lambda fit: len(fit.missing) + len(fit.unexpected))
    _check_fit(place, recipe, best, state, whole if best.is_whole else net)
    prefix = "" if best.is_whole else "net."
    member.load_state_dict({**whole, **{f"{prefix}{key}": state[own] for key, own in best.keys.items()}})
    return best.is_whole


def _check_fit(
    place: str, recipe: Recipe, fit: _Fit, state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> None:
    known = ", ".join(MODELS)
    remedy = f"choose the model=... ({known}), model.width=... and data=... it was trained with, or {IN_A_FACTORY}"
    if fit.missing or fit.unexpected:
        sides = ((fit.missing, "missing"), (fit.unexpected, "unexpected"))
        wrong = [f"{names[0]!r} is {what}" for names, what in sides if names]
        more = len(fit.missing) + len(fit.unexpected) - len(wrong)
        named = " and ".join(wrong) + (f" ({more} more)" if more else "")
        raise UserError(f"{place} does not fit model={recipe.name}: {named}; {remedy}")
    for key, own in fit.keys.items():
        new, old = state[own], target[key]
        if new.shape != old.shape:
            shapes = f"has the shape {tuple(new.shape)}, the model {tuple(old.shape)}"
            raise UserError(f"{place} does not fit model={recipe.name}: {own!r} {shapes}; {remedy}")
        if new.layout != torch.strided or new.is_quantized or new.is_meta or new.is_complex():
            raise UserError(f"{place}: {own!r} is not a dense tensor of real numbers; convert it, or {IN_A_FACTORY}")
