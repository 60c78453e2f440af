"""The classifiers of ``members=[...]``, and the settings that their records decide."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mixadv.biased import listed, network_of, preferences
from mixadv.config import parse_eps
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.members.checks import check_members
from mixadv.members.recipe import factories_of, member_recipes
from mixadv.members.source import LoadedMember, Source, with_unique_names
from mixadv.results import Classifier, Flag
from mixadv.tasks import build, models
from mixadv.tasks.session import Session

# Keys in which members must agree to be compared: the game, and its images.
DECIDES = (
    *("eps", "threat_model.norm", "data._target_", "data.root"),
    *("data.val_fraction", "data.num_val", "data.num_train", "data.num_test", "data.image_size"),
)
# Keys that decide which images are for training and which for validation.
SPLITS = ("data._target_", "data.val_fraction", "data.num_val", "data.num_train")


def as_recorded_by_members(cfg: DictConfig, sources: Sequence[Source], overrides: list[str]) -> DictConfig:
    """`cfg` with data, eps and norm as the members record them, except the keys that the command line sets.

    Raises:
        UserError: the records disagree, and the command line does not decide; or it sets L.
    """
    given = build.keys_of(overrides)
    if "L" in given:
        raise UserError(f"L={cfg.L}: task={cfg.task} counts the members that are named; leave it out")
    first: tuple[str, DictConfig] | None = None
    for source in sources:
        if source.record is None:
            continue
        own = build.as_recorded(cfg, source.record, given, source.name)
        if first is None:
            first = source.name, own
        for key in DECIDES:
            ours, theirs = (OmegaConf.select(node, key) for node in (own, first[1]))
            if ours != theirs and not (key == "eps" and parse_eps(ours) == parse_eps(theirs)):
                raise UserError(f"{source.name} was trained with {key}={ours}, {first[0]} with {theirs}: say {key}=...")
    return cfg if first is None else first[1]


def as_named(cfg: DictConfig, sources: Sequence[Source], overrides: list[str]) -> DictConfig:
    """`cfg` with data, eps and norm as for `as_recorded_by_members`, and L = the number of members named.

    Raises:
        UserError: the records disagree, or the command line sets L.
    """
    merged = as_recorded_by_members(cfg, sources, overrides).copy()
    counts = [1 if source.record is None else source.record.get("L") for source in sources]
    # A record without L is refused when the members are loaded.
    if all(isinstance(count, int) for count in counts):
        merged.L = sum(counts)
    return merged


def load_members(session: Session, sources: Sequence[Source], x: Tensor) -> list[LoadedMember]:
    """The classifiers of all sources, on the device, tried on the images x `[B, C, H, W]`, B >= 2.

    A source that is a mixture gives all its members.

    Raises:
        UserError: a member cannot be loaded or used, or does not fit the others or the data.
    """
    data = session.data
    # A foreign network may have been trained with other statistics than those of these images: mean and std are used
    # only if the command gives them.
    recipe = models.model_recipe(session.cfg.model, data, statistics=False)
    # A factory in members=[...] gets no arguments; a factory that needs some is named as the model.
    factories = [*(source.name for source in sources), *factories_of([recipe])]
    loaded = [member for source in sources for member in source.members(recipe, session.device, factories)]
    members = with_unique_names(loaded)
    num_classes = check_members(members, x)
    if num_classes != data.num_classes:
        raise UserError(
            f"the members tell {num_classes} classes apart, but {data.name} has {data.num_classes}: "
            "choose the data they were trained for with data=..."
        )
    return members


def biases_of(cfg: DictConfig, data: ImageDataModule) -> dict[str, tuple[float, ...]]:
    """The biases [C] of ``cfg.biases`` by name; {} if it is empty.

    Raises:
        UserError: a table with another number of columns than the data have classes.
    """
    given: Any = OmegaConf.to_container(cfg.biases)
    if not given:
        return {}
    if not isinstance(given[0], list):
        return preferences(given, data.num_classes)
    if len(given[0]) != data.num_classes:
        raise UserError(
            f"biases=[...] has {len(given[0])} columns, but {data.name} has {data.num_classes} classes: give every row "
            "a number for each class, or scales, as biases=[0.1,0.3,1]"
        )
    return listed(given)


def with_copies(members: Sequence[LoadedMember], biases: Mapping[str, Sequence[float]]) -> list[LoadedMember]:
    """Every member, followed by its copies with these biases (by name), which share its network."""
    pool = [one for member in members for one in (member, *(member.biased(name, b) for name, b in biases.items()))]
    return with_unique_names(pool)


def apart(members: Sequence[LoadedMember]) -> list[LoadedMember]:
    """The members, each with a network of its own: a training updates them one at a time."""
    taken: set[int] = set()
    found = []
    for member in members:
        network = id(network_of(member.module))
        found.append(replace(member, module=copy.deepcopy(member.module)) if network in taken else member)
        taken.add(network)
    return found


def weights_of(cfg: DictConfig, members: Sequence[LoadedMember]) -> list[float] | None:
    """``cfg.weights``; None stands for 1/L each.

    Raises:
        UserError: there is another number of weights than of members.
    """
    if cfg.weights is None:
        return None
    given: list[float] = list(cfg.weights)
    if len(given) != len(members):
        found = ", ".join(member.name for member in members)
        raise UserError(
            f"weights=[...] has {len(given)} numbers, but members=[...] holds {len(members)}: {found}; give one for "
            "each in this order, or leave it out for 1/L each"
        )
    return given


def named_results(
    results: Sequence[Classifier], members: Sequence[LoadedMember | Classifier]
) -> tuple[Classifier, ...]:
    """The members' results with their names, sources, notes and biases; unchanged if `members` is empty."""
    if not members:
        return tuple(results)
    pairs = zip(results, members, strict=True)
    return tuple(replace(found, name=own.name, source=own.source, note=own.note, bias=own.bias) for found, own in pairs)


def recorded_members(config: Mapping[str, Any], num_members: int) -> list[Classifier]:
    """Names, sources and biases of the members that a mixture of task=solve records; [] for other mixtures."""
    sources: Any = config.get("members")
    names: Any = config.get("member_names", sources)
    for texts in (sources, names):
        if not isinstance(texts, list) or len(texts) != num_members or not all(isinstance(t, str) for t in texts):
            return []
    biases = [recipe.bias for recipe in member_recipes(config)]
    return [
        Classifier(name=name, source=source, bias=bias)
        for name, source, bias in zip(names, sources, biases, strict=True)
    ]


def flags_of_other_splits(
    cfg: DictConfig, sources: Sequence[Source], name: str, evidence: str, remedy: str
) -> list[Flag]:
    """A flag for every source that records another split of the same data than `cfg` has.

    Args:
        cfg: the configuration. sources: of the members.
        name: of the flag.
        evidence: what follows from the other split.
        remedy: what to do, besides leaving the keys of the split out.
    """
    flags = []
    for source in sources:
        if source.record is None or "data" not in source.record:
            continue
        own = OmegaConf.create({"data": source.record["data"]})
        there, here = ({key: OmegaConf.select(node, key) for key in SPLITS} for node in (own, cfg))
        changed = ", ".join(f"{key}={there[key]} there, {here[key]} here" for key in SPLITS if there[key] != here[key])
        if changed and there["data._target_"] == here["data._target_"]:
            flags.append(
                Flag(
                    name,
                    f"{source.name} was trained with another split ({changed}){evidence}",
                    f"Leave the keys of the split out, so that they are the members' own{remedy}.",
                )
            )
    return flags
