"""What runs were made with: those of one setting are repetitions that differ in the seed alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixadv.report.files import Run
from mixadv.report.names import number
from mixadv.setting_keys import flat_settings, is_indifferent
from mixadv.unknown_keys import RENAMED

UNIFORM, SHARED, SAMPLED = "uniform", "shared", "sampled"
# What else changes no number, or stands elsewhere in the results.
_ASIDE = (
    "seed",
    "data.seed",
    "baseline",
    "mixture",
    "members",
    "weights",
    "paths",
    "hydra",
    "trainer.log_every_n_steps",
)
# What is run on the test set is compared by itself.
_MEASUREMENT = ("protocol.name", "protocol.attacks", "protocol.diagnosed")


@dataclass(frozen=True)
class Setting:
    """What the repetitions of one training have in common.

    Attributes:
        loss: "AT" or "TRADES".
        num_members: L.
        solver: "oracle", "entropic", "lp" or "uniform"; "" for a single model, which has no weights to learn.
        schedule: "sampled" or "shared"; "" for a single model, for which both are the same.
        epochs: per model.
        weighing: the other settings of solver and schedule; empty where no weights are learned.
        rest: all other settings but the seed and what is run on the test set. Only runs that share them are compared.
        origin: the name of a run that was not trained but measured (task=evaluate, task=solve), which does not say
            how its members came about: loss, solver and schedule are then "", epochs None. Else "".
    """

    loss: str
    num_members: int
    solver: str = ""
    schedule: str = ""
    epochs: float | None = None
    weighing: frozenset[tuple[str, str]] = frozenset()
    rest: frozenset[tuple[str, str]] = frozenset()
    origin: str = ""

    @property
    def is_single(self) -> bool:
        return self.num_members == 1 and not self.origin

    @property
    def order(self) -> tuple[Any, ...]:
        """By which settings are sorted: loss, L, then the rest; those that were only measured last."""
        few = sorted(map(str, self.weighing | self.rest))
        sampled = self.schedule == SAMPLED
        return bool(self.origin), self.loss, self.num_members, self.epochs or 0, sampled, self.solver, self.origin, few


def described(config: Mapping[str, Any]) -> dict[str, str]:
    """Flat settings without paths and without what changes no number."""
    flat = flat_settings(dict(config))
    # Runs of version 0.1 have other names for some settings.
    flat = {RENAMED.get(key, key): value for key, value in flat.items()}
    for key in ("model", "scheduler"):
        if isinstance(target := flat.pop(f"{key}._target_", None), str):
            flat[key] = target.rpartition(".")[2]
    return {
        key: str(value)
        for key, value in flat.items()
        if not is_indifferent(key)
        and not _within(key, _ASIDE)
        and not (isinstance(value, str) and ("/" in value or "\\" in value) and number(value) is None)
    }


def _within(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def setting_of(run: Run) -> Setting | None:
    """The setting that a run's files record; None where they do not say even L."""
    size = run.num_members
    if size is None or size < 1:
        return None
    if run.was_only_measured:
        return Setting("", size, origin=run.path.name)
    schedule = run.config.get("schedule")
    schedule = schedule if isinstance(schedule, dict) else {}
    solver, single = run.solver, size == 1
    weighing, rest, epochs = set(), set(), None
    for key, value in described(run.config).items():
        if _within(key, ("lambda_solver", "schedule")):
            if key != "schedule.kind":
                weighing.add((key, value))
        elif key == "trainer.max_epochs":
            epochs = number(value)
        elif not _within(key, ("L", "loss._target_", "task", *_MEASUREMENT)):
            rest.add((key, value))
    return Setting(
        loss=run.loss,
        num_members=size,
        solver="" if single else solver,
        schedule="" if single else str(schedule.get("kind") or ""),
        epochs=epochs,
        weighing=frozenset() if single or solver == UNIFORM else frozenset(weighing),
        rest=frozenset({*rest, ("data", run.data), ("norm", run.norm), ("eps", str(run.eps))}),
    )


Groups = Mapping[Setting, Sequence[Run]]


def grouped(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """Runs by setting, in the settings' order; baselines are runs too. Those that do not say L are left out."""
    groups: dict[Setting, list[Run]] = defaultdict(list)
    for run in [*runs, *(run.baseline for run in runs if run.baseline is not None)]:
        if (setting := setting_of(run)) is not None:
            groups[setting].append(run)
    return {setting: groups[setting] for setting in sorted(groups, key=lambda setting: setting.order)}
