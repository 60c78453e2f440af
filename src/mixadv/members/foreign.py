"""Parameters that were saved elsewhere, read without running code and fitted to a model of ours."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mixadv.checkpoint_files import load_tensors
from mixadv.errors import UserError
from mixadv.members.recipe import build_recipe, recipe_name
from mixadv.models import MODELS

# Where programs keep the state dict in what they save, the first one found first.
NESTS = ("state_dict", "model_state_dict", "model", "net", "ema")
IN_A_FACTORY = "load it in a factory members=[module:callable]"


def read_file(path: Path) -> Mapping[Any, Any]:
    """The mapping in a file of safetensors or PyTorch, as tensors on the CPU and plain containers; no code runs.

    Raises:
        UserError: it is empty, torn, changed, something else, or holds other objects.
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
            # What it warns of is refused below.
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
    # Pickles of protocol 2 and later begin with 0x80.
    whole = head[:1] == b"\x80" or zipfile.is_zipfile(path)
    if refused or program or (isinstance(error, pickle.UnpicklingError) and whole):
        kind = f" ({refused[1]})" if refused else " (a TorchScript program)" if program else ""
        return UserError(
            f"{path} holds objects other than tensors{kind}, and reading those could run code: convert it to "
            f"safetensors, or {IN_A_FACTORY}"
        )
    kind = "safetensors" if isinstance(error, SafetensorError) else "PyTorch"
    # Seeking to where a torn file says that it goes on is an invalid argument.
    told = isinstance(error, OSError) and error.errno != errno.EINVAL and error.strerror
    reason = told or "it is cut short or something else"
    return UserError(f"{path} is not a readable {kind} file ({reason}): save or download it again")


def _state_dicts(content: Mapping[Any, Any], depth: int = 4) -> list[tuple[str, dict[str, Tensor]]]:
    """Every state dict under `NESTS` and the keys that lead to it; else `content` itself, if it holds tensors."""
    found = []
    # A pickled mapping can contain itself.
    for nest in NESTS if depth else ():
        inner = content.get(nest)
        if isinstance(inner, Mapping):
            found += [(f"{nest}.{below}".rstrip("."), state) for below, state in _state_dicts(inner, depth - 1)]
    own = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return found or ([("", own)] if own else [])


def to_member(
    path: Path, content: Mapping[Any, Any], default_recipe: Mapping[str, Any] | None
) -> tuple[nn.Module, dict[str, Any], str]:
    """The member that `default_recipe` builds with the parameters in `content`, its own recipe, and a note.

    The parameters are those of a member (``normalize.*``, ``net.*``) or of its bare net (``conv1.weight``, ...).
    Mean and standard deviation come from the file where it has them, else from the recipe, else there are none;
    the note says which. `path` is for messages.

    Raises:
        UserError: no state dict in `content`, or parameters that do not fit.
    """
    if default_recipe is None:
        raise UserError(f"{path} holds parameters alone: say what they belong to with model=... and data=...")
    states = _state_dicts(content)
    if not states:
        has = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise UserError(
            f"{path} has no tensors at its top or under {', '.join(NESTS)} (it has {has}): save module.state_dict()"
        )
    recipe: dict[str, Any] = {
        key: list(value) if isinstance(value, (list, tuple)) else value
        for key, value in default_recipe.items()
        if value is not None
    }
    name, foreign, explicit = recipe_name(recipe), "factory" in recipe, "mean" in recipe
    try:
        member = build_recipe(recipe)
    except ValueError as error:
        raise UserError(f"model={name}: {error}") from error
    where, state = states[0]
    normalised = _fill(f"{path} (its {where})" if where else str(path), name, member, state, foreign)
    note = "normalised as in the file" if normalised else "normalised as asked" if explicit else "no normalisation"
    if foreign:
        note = "with the normalisation of its factory"
    elif normalised:
        buffers = {key: member.get_buffer(f"normalize.{key}").flatten().tolist() for key in ("mean", "std")}
        if not all(s > 0 for s in buffers["std"]):
            raise UserError(f"{path} has normalize.std={buffers['std']}: every entry must be positive; mend the file")
        recipe.update(buffers)
    if where:
        others = ", ".join(other for other, _ in states[1:])
        note += f"; from {where}" + (f" (not {others})" if others else "")
    return member, recipe, note


def _fill(place: str, name: str, member: nn.Module, state: dict[str, Tensor], foreign: bool) -> bool:
    """Load `state` into `member`, or into the bare net of one of ours; whether the state holds the normalisation too.

    torch.compile and AveragedModel leave names of their own among the keys. Of what remains, a first part that
    all keys share is dropped again and again; the form that fits best counts.
    """
    keys = {".".join(part for part in key.split(".") if part != "_orig_mod"): key for key in state}
    if len(keys) < len(state):
        raise UserError(f"{place} holds parameters twice, compiled and not: remove one of them, or {IN_A_FACTORY}")
    keys = {key: own for key, own in keys.items() if key.rpartition(".")[2] != "n_averaged"}
    whole = member.state_dict()
    net = {key.removeprefix("net."): value for key, value in whole.items() if key.startswith("net.")}
    candidates: list[tuple[list[str], list[str], bool, dict[str, str]]] = []
    while True:
        for target in (whole,) if foreign else (whole, net):
            # Only training reads the number of batches, and old files do not have it.
            missing = [key for key in target if key not in keys and not key.endswith(".num_batches_tracked")]
            candidates.append((missing, [key for key in keys if key not in target], target is whole, keys))
        if len({key.partition(".")[0] for key in keys}) != 1 or not all("." in key for key in keys):
            break
        keys = {key.partition(".")[2]: own for key, own in keys.items()}
    missing, unexpected, normalised, keys = min(candidates, key=lambda c: len(c[0]) + len(c[1]))
    known = ", ".join(MODELS)
    remedy = f"choose the model=... ({known}), model.width=... and data=... it was trained with, or {IN_A_FACTORY}"
    if missing or unexpected:
        wrong = [f"{some[0]!r} is {what}" for some, what in ((missing, "missing"), (unexpected, "unexpected")) if some]
        more = len(missing) + len(unexpected) - len(wrong)
        said = " and ".join(wrong) + (f" ({more} more)" if more else "")
        raise UserError(f"{place} does not fit model={name}: {said}; {remedy}")
    target = whole if normalised else net
    for key, own in keys.items():
        new, old = state[own], target[key]
        if new.shape != old.shape:
            shapes = f"has the shape {tuple(new.shape)}, the model {tuple(old.shape)}"
            raise UserError(f"{place} does not fit model={name}: {own!r} {shapes}; {remedy}")
        if new.layout != torch.strided or new.is_quantized or new.is_meta or new.is_complex():
            raise UserError(f"{place}: {own!r} is no dense tensor of real numbers; convert it, or {IN_A_FACTORY}")
    prefix = "" if normalised else "net."
    member.load_state_dict({**whole, **{f"{prefix}{key}": state[own] for key, own in keys.items()}})
    return normalised
