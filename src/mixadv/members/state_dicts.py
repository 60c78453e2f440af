"""State dicts in the content of a file, and how their names fit those of a network of mixadv."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mixadv.errors import UserError

# The keys under which programs save the parameters that they mean, by priority. Every other mapping of tensors counts
# less than tensors at the top of a file.
NESTS = ("state_dict", "model_state_dict", "model", "net")
_TOP = len(NESTS)
_DEPTH = 6
# A layer that the wide networks of TRADES and of Carmon et al. hold and do not use.
UNUSED = "sub_block1."
# The names of mean and standard deviation in normalising layers (mixadv, RobustBench, the robustness library of
# MadryLab, others).
_STATISTICS = (("mean", "std"), ("mu", "sigma"), ("new_mean", "new_std"), ("means", "stds"), ("_mean", "_std"))
# Names of the linear layer on top that other programs use instead of fc.
_HEADS = r"(?:linear|classifier|head|last_linear|output)(?=\.(?:weight|bias)$)"
# Models whose blocks are numbered through -> blocks in a stage.
_PREACT_BLOCKS = {"preact_resnet18": 2, "preact_resnet20": 3, "small_resnet": 1}


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, and where they are in the file: its keys, joined by dots."""

    where: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """How the names of a state dict fit a network.

    Attributes:
        keys: name in the network -> name in the file.
        missing: names of the network that the file lacks.
        unexpected: names of the file that the network lacks.
        other_shapes: names of the network whose tensors have other shapes.
        parts: (layers of the network that fit, the other layers).
        mean, std: names in the file of the normalisation that is beside the network, or "".
        leaves_out_unused: whether the file has `UNUSED`.
        prefix: what all names of the file begin with and the network's do not.
    """

    keys: dict[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    other_shapes: Sequence[str] = ()
    parts: tuple[Sequence[str], Sequence[str]] = ((), ())
    mean: str = ""
    std: str = ""
    leaves_out_unused: bool = False
    prefix: str = ""

    @property
    def cost(self) -> int:
        """The number of names that do not fit."""
        return len(self.missing) + len(self.unexpected)

    @property
    def fits(self) -> bool:
        return not self.cost and not self.other_shapes


def state_dicts(content: Mapping[object, object]) -> list[StateDict]:
    """Every mapping in `content` that holds tensors, those under `NESTS` first, then the top, then the others."""
    found: list[StateDict] = []
    # A pickled mapping can contain itself.
    seen: set[int] = set()

    def walk(mapping: Mapping[object, object], where: tuple[str, ...]) -> None:
        if id(mapping) in seen or len(where) > _DEPTH:
            return
        seen.add(id(mapping))
        own = {key: value for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if own:
            found.append(StateDict(".".join(where), own))
        for key, inner in mapping.items():
            if isinstance(inner, Mapping):
                walk(inner, (*where, str(key)))

    walk(content, ())
    return sorted(found, key=lambda state: _rank(state.where))


def _rank(where: str) -> list[int]:
    if not where:
        return [_TOP]
    return [NESTS.index(key) if key in NESTS else _TOP + 1 for key in where.split(".")]


def parts_of(state: StateDict) -> list[StateDict]:
    """The state dicts of the modules in a module: {"net.a": 1, "ema.a": 2} has the parts net and ema.

    A part that is only a normalisation, and tensors without a module, belong to every other part.
    """
    names = _without_wrappers(state.tensors)
    prefix = ""
    while (first := _common(names)) is not None:
        prefix += f"{first}."
        names = {name.partition(".")[2]: own for name, own in names.items()}
    groups: dict[str, dict[str, str]] = {}
    for name, own in names.items():
        head, dot, _ = name.partition(".")
        groups.setdefault(head if dot else "", {})[name] = own
    shared: dict[str, str] = groups.pop("", {})
    for head in [head for head, group in groups.items() if _is_statistics(group)]:
        shared |= groups.pop(head)
    if len(groups) + bool(shared) < 2:
        return []
    place = f"{state.where}.{prefix}".lstrip(".")
    return [
        StateDict(f"{place}{head}", {name: state.tensors[own] for name, own in (shared | group).items()})
        for head, group in groups.items()
    ]


def fit(tensors: Mapping[str, Tensor], network: Mapping[str, Tensor], model: str | None) -> Fit:
    """The best fit of the names, over common prefixes and, for a model of mixadv, over the names of other programs.

    Args:
        tensors: from a file. network: the state dict to be filled.
        model: a name in `mixadv.models.MODELS`; a normalisation beside its network is looked for. None for the module
            of a factory, whose names must be the network's own.

    Raises:
        UserError: the file holds parameters twice, compiled and not compiled.
    """
    names = _without_wrappers(tensors)
    mean = std = ""
    if model is not None:
        names, mean, std = _without_statistics(names, tensors)
    best: Fit | None = None
    for prefix, stripped in _prefixes(names):
        for renamed in _renamings(stripped, model):
            found = _compare(renamed, tensors, network)
            if best is None or found.cost < best.cost:
                unused = len(renamed) < len(stripped)
                best = replace(found, mean=mean, std=std, prefix=prefix, leaves_out_unused=unused)
    assert best is not None, "_prefixes gives the names themselves"
    return best


def _without_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """name -> name in the file; the names that torch.compile and AveragedModel add are dropped."""
    names = {".".join(part for part in key.split(".") if part != "_orig_mod"): key for key in tensors}
    if len(names) < len(tensors):
        raise UserError("the file holds parameters twice, compiled and not compiled: remove one copy")
    return {key: own for key, own in names.items() if key.rpartition(".")[2] != "n_averaged"}


def _common(names: Mapping[str, str]) -> str | None:
    """The first component that all names share and that is not all of a name."""
    heads = {name.partition(".")[0] for name in names}
    return heads.pop() if len(heads) == 1 and all("." in name for name in names) else None


def _prefixes(names: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(prefix, names without it): none, then each common one."""
    prefix = ""
    yield prefix, names
    while (first := _common(names)) is not None:
        prefix += f"{first}."
        names = {name.partition(".")[2]: own for name, own in names.items()}
        yield prefix, names


def _is_statistics(names: Mapping[str, str]) -> bool:
    return any({name.rpartition(".")[2] for name in names} == set(pair) for pair in _STATISTICS) and len(names) == 2


def _without_statistics(names: dict[str, str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], str, str]:
    """The names without those of normalising layers, and the names in the file of the first layer's two tensors.

    Several layers with the same numbers are one layer that is saved several times. Others stay among the names, so that
    they do not fit.
    """
    found: list[tuple[str, str]] = []
    for name in names:
        parent, dot, last = name.rpartition(".")
        for mean, std in _STATISTICS:
            if last == mean and f"{parent}{dot}{std}" in names:
                found.append((name, f"{parent}{dot}{std}"))
    if not found:
        return names, "", ""
    mean, std = (names[name] for name in found[0])
    same = [
        (one, other)
        for one, other in found
        if torch.equal(tensors[names[one]], tensors[mean]) and torch.equal(tensors[names[other]], tensors[std])
    ]
    removed = {name for pair in same for name in pair}
    return {name: own for name, own in names.items() if name not in removed}, mean, std


def _renamings(names: dict[str, str], model: str | None) -> Iterator[dict[str, str]]:
    """The names as they are, as mixadv writes those of kuangliu's and Rice's networks, and without unused layers."""
    yield names
    if model == "wrn_28_10":
        yield {name: own for name, own in names.items() if not name.startswith(UNUSED)}
    if model not in ("resnet18", *_PREACT_BLOCKS):
        return
    renamed = {_ours(name, model): own for name, own in names.items()}
    if len(renamed) == len(names):
        yield renamed


def _ours(name: str, model: str) -> str:
    name = re.sub(rf"^{_HEADS}", "fc", name)
    if model == "resnet18":
        return re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)
    blocks = _PREACT_BLOCKS[model]
    found = re.match(r"layer(\d+)\.(\d+)\.(.*)", name)
    if found and int(found[2]) < blocks:
        name = f"blocks.{blocks * (int(found[1]) - 1) + int(found[2])}.{found[3]}"
    # Their shortcut is a Sequential that holds one convolution.
    return re.sub(r"^(blocks\.\d+)\.(?:shortcut|downsample)\.0\.", r"\1.shortcut.", name)


def _compare(names: dict[str, str], tensors: Mapping[str, Tensor], network: Mapping[str, Tensor]) -> Fit:
    # num_batches_tracked is only used in training, and old files lack it.
    missing = [name for name in network if name not in names and not name.endswith(".num_batches_tracked")]
    unexpected = [own for name, own in names.items() if name not in network]
    shapes = [name for name, own in names.items() if name in network and tensors[own].shape != network[name].shape]
    wrong = {_layer(name) for name in (*missing, *shapes)}
    layers = list(dict.fromkeys(map(_layer, network)))
    parts = [layer for layer in layers if layer not in wrong], [layer for layer in layers if layer in wrong]
    return Fit(names, missing, unexpected, shapes, parts)


def _layer(name: str) -> str:
    return name.partition(".")[0]
