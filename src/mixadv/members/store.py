"""Mixtures on disk: a folder with safetensors, config.json and a model card. Reading it runs no code from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mixadv.biased import Biased, network_of
from mixadv.checkpoint_files import read_checkpoint
from mixadv.errors import UserError
from mixadv.files import replacing
from mixadv.members.recipe import Recipe, check_factories, check_size, checked_config, member_recipes
from mixadv.mixture import Mixture
from mixadv.wording import counted

# Key of the recipes in config.json -> its schema: one recipe for all members, or a list with one for each.
EXPORT_SCHEMAS = {"model": 1, "models": 2}
WEIGHTS_FILE = "mixture.safetensors"
CONFIG_FILE = "config.json"


def save_mixture(mixture: Mixture, directory: Path, config: Mapping[str, Any], card: str) -> None:
    """Write the parameters, the recipe `config` (plain JSON) and README.md = `card` into `directory`, each atomically.

    If all members have the same recipe, config.json holds it once, as ``model``. Tensors that members share (tied
    parameters) are stored once for each name.

    Raises:
        ValueError: `config` has another number of members.
        UserError: the state of a member has values that safetensors cannot store.
    """
    recipes = member_recipes(config)
    if len(recipes) != mixture.num_members:
        raise ValueError(f"the mixture has {mixture.num_members} members, its recipe has L={len(recipes)}")
    form = "model" if all(recipe == recipes[0] for recipe in recipes) else "models"
    own = {"model": recipes[0].record()} if form == "model" else {"models": [recipe.record() for recipe in recipes]}
    rest = {key: value for key, value in config.items() if key not in ("schema", "L", "model", "models", "weights")}
    record = {"schema": EXPORT_SCHEMAS[form], "L": len(recipes), **own, **rest, "weights": mixture.weights.tolist()}
    text = json.dumps(record, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (WEIGHTS_FILE, partial(_save_tensors, mixture.state_dict())),
        (CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8")),
        ("README.md", lambda path: path.write_text(card, encoding="utf-8")),
    ):
        with replacing(directory / name) as temporary:
            write(temporary)


def _save_tensors(state: Mapping[str, Any], path: Path) -> None:
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name} is a {type(value).__name__}: only tensors can be exported; make it a buffer")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{name} is not a dense tensor with values: only those can be exported; convert it")
    # Copied, because safetensors refuses tensors that share memory.
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    try:
        save_file(tensors, path)
    except KeyError as error:
        raise UserError(f"safetensors cannot store tensors of {error}: convert them before the export") from error


def read_mixture(path: str | Path, factories: Sequence[str] = ()) -> tuple[Mixture, dict[str, Any]]:
    """The mixture at `path` in eval mode, and the recipe stored with it.

    Args:
        path: an exported ``mixture/`` folder, a run directory that holds one, or a training checkpoint (.ckpt).
        factories: import paths ``package.module:callable`` that may build members, see `build_factory`. A recipe
            that names other code is refused. The parameters come from the file in any case.

    Raises:
        UserError: the mixture is missing or damaged, has another schema, or names an unknown model or code that is not
            in `factories`.
    """
    path = Path(path)
    if path.suffix == ".ckpt":
        return mixture_of_checkpoint(path, read_checkpoint(path), factories)
    config = _folder_config(path)
    return mixture_of_folder(path, config, factories), config


def mixture_of_folder(path: Path, config: dict[str, Any], factories: Sequence[str] = ()) -> Mixture:
    """The exported mixture at `path` in eval mode, with its config as `read_config` gives it.

    Biased members whose networks are equal share one (those of a checkpoint do not: a training updates them apart).

    Raises:
        UserError: as `read_mixture`.
    """
    folder = _folder(path)
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the mixture in {folder} cannot be read ({error}): export it again") from error
    mixture = _assemble(folder, config, state, factories)
    _share_networks(member_recipes(config), mixture)
    return mixture


def read_config(path: str | Path, checkpoint: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The checked recipe of the mixture at `path`; no parameters are read from a folder, and no code is imported.

    Args:
        path: see `read_mixture`.
        checkpoint: the content of a training checkpoint that is already loaded.

    Raises:
        UserError: as `read_mixture`, for errors in the recipe.
    """
    path = Path(path)
    if checkpoint is None and path.suffix != ".ckpt":
        return _folder_config(path)
    config = (checkpoint or read_checkpoint(path)).get("mixture_config")
    if config is None:
        raise UserError(f"{path} has no recipe of its mixture: it was not written by mixadv")
    return checked_config(path, config)


def files_of(path: Path) -> list[Path]:
    """The files of the mixture or the one classifier at `path`, from which it is built; UserError if there is none."""
    if path.is_file():
        return [path]
    folder = _folder(path)
    # A missing file is refused where the mixture is built.
    return [path for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE) if path.is_file()]


def _folder(path: Path) -> Path:
    """The exported folder: `path` or its subfolder mixture/."""
    folder = path if (path / CONFIG_FILE).is_file() else path / "mixture"
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(_no_mixture(path))
    return folder


def _no_mixture(path: Path) -> str:
    """What is at `path` instead of a mixture, and what to do."""
    if path.is_file():
        return (
            f"{path} is no mixture: checkpoints of mixadv end in .ckpt; parameters of another program are named in "
            "members=[...], with model=NAME"
        )
    if (path / "config.yaml").is_file():
        kept = [path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        found = next((file for file in kept if file.is_file()), None)
        remedy = f"or take {found}" if found else "it has no checkpoint yet"
        return f"{path} is an unfinished run, its mixture is exported at its end: repeat its command, {remedy}"
    runs = sorted(file.parent.parent.name for file in path.glob(f"*/mixture/{CONFIG_FILE}"))
    if runs:
        return f"{path} holds {counted(len(runs), 'finished run')}: name one, as {path / runs[0]}"
    return f"no mixture at {path}: expected a folder with {CONFIG_FILE}, a run directory or a .ckpt file"


def _folder_config(path: Path) -> dict[str, Any]:
    """The checked config of the exported folder at `path` or in it."""
    folder = _folder(path)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"the mixture in {folder} cannot be read ({error}): export it again") from error
    found, wanted = None, 1
    if isinstance(config, dict):
        found, wanted = config.get("schema"), EXPORT_SCHEMAS["models" if "models" in config else "model"]
    if found != wanted:
        raise UserError(
            f"{folder / CONFIG_FILE} has schema {found}; this version reads schema 1 (all members of one model) and "
            "schema 2 (models): export it again, or update mixadv"
        )
    return checked_config(folder, config)


def mixture_of_checkpoint(
    path: Path, checkpoint: Mapping[str, Any], factories: Sequence[str] = ()
) -> tuple[Mixture, dict[str, Any]]:
    """The mixture in a loaded training checkpoint, in eval mode, and its recipe; `path` is for messages.

    Raises:
        UserError: the checkpoint was not written by mixadv, or as `read_mixture`.
    """
    config = read_config(path, checkpoint)
    stored = checkpoint.get("state_dict")
    if not isinstance(stored, Mapping):
        raise UserError(f"{path} holds no state_dict: it is not a training checkpoint")
    prefix = "mixture."
    state = {str(k).removeprefix(prefix): v for k, v in stored.items() if str(k).startswith(prefix)}
    return _assemble(path, config, state, factories), config


def _assemble(path: Path, config: dict[str, Any], state: Mapping[str, Any], factories: Sequence[str]) -> Mixture:
    num_members = config.get("L")
    try:
        # Checked before building: a manipulated recipe may need more memory than there is.
        if isinstance(num_members, int) and num_members > (held := torch.as_tensor(state.get("weights", [])).numel()):
            raise ValueError(f"there are weights for {held} members")
        recipes = member_recipes(config)
        check_factories(path, recipes, factories)
        check_size(recipes, state)
        mixture = Mixture([recipe.build() for recipe in recipes])
        mixture.load_state_dict(state)
        # set_weights refuses weights that are not in the simplex.
        mixture.set_weights(mixture.weights.clone())
        _check_content(config, recipes, mixture)
        mixture.class_names = _class_names(config, recipes)
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
        # The first line of load_state_dict is only a heading.
        reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
        reason = reason[:200] + "..." * (len(reason) > 200)
        raise UserError(
            f"the parameters in {path} do not fit its recipe (L={num_members}): {reason}; export it again"
        ) from error
    return mixture.eval()


def _share_networks(recipes: Sequence[Recipe], mixture: Mixture) -> None:
    """Give biased members whose networks have the same recipe and equal tensors one network, which a pass runs once.

    Members without a bias lend their network, but keep it.
    """
    known: list[tuple[Recipe, nn.Module]] = []
    for recipe, member in zip(recipes, mixture.members, strict=True):
        plain, own = replace(recipe, bias=()), network_of(member)
        twins = (net for other, net in known if other == plain and _are_equal(net, own))
        if isinstance(member, Biased) and (twin := next(twins, None)) is not None:
            member.net = twin
        else:
            known.append((plain, own))


def _are_equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _class_names(config: Mapping[str, Any], recipes: Sequence[Recipe]) -> tuple[str, ...] | None:
    """The names of the classes that the config records, one for each; None for a mixture without that record."""
    names = config.get("class_names")
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names is {names!r}, not a list of names")
    for record in (config, *(recipe.arguments for recipe in recipes)):
        if (count := record.get("num_classes", len(names))) != len(names):
            raise ValueError(f"class_names has {len(names)} names for {count} classes")
    return tuple(names)


def _check_content(config: Mapping[str, Any], recipes: Sequence[Recipe], mixture: Mixture) -> None:
    """Check that all parameters are finite, and that weights and biases in the recipe equal those of the mixture."""
    for k, (recipe, member) in enumerate(zip(recipes, mixture.members, strict=True)):
        # Factories may use infinities in buffers, for example as masks.
        for name, tensor in member.named_parameters() if recipe.is_factory else member.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"members.{k}.{name} holds numbers that are not finite")
        _check_bias(k, recipe, member)
    held = mixture.weights.tolist()
    stated = config.get("weights", held)
    numbers = isinstance(stated, list) and [type(weight) in (int, float) for weight in stated] == [True] * len(held)
    if not numbers or any(not abs(a - b) <= 1e-6 for a, b in zip(stated, held, strict=True)):
        shown = ",".join(f"{weight:.6g}" for weight in held)
        raise ValueError(
            f"the recipe has weights={stated}, the file [{shown}]; task=evaluate members=[...] takes other weights"
        )


def _check_bias(k: int, recipe: Recipe, member: nn.Module) -> None:
    if not isinstance(member, Biased):
        return
    count = recipe.arguments.get("num_classes", len(recipe.bias))
    if len(recipe.bias) != count:
        raise ValueError(f"the bias of member {k} has {len(recipe.bias)} numbers for {count} classes")
    if not torch.equal(member.bias, torch.tensor(recipe.bias, dtype=member.bias.dtype)):
        raise ValueError(f"the recipe has bias={list(recipe.bias)} for member {k}, the file {member.bias.tolist()}")


def load_mixture(path: str | Path, factories: Sequence[str] = ()) -> Mixture:
    """The mixture at `path` in eval mode; see `read_mixture`."""
    return read_mixture(path, factories)[0]
