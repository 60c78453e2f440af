"""Groups the runs of a study by setting: the runs of one setting are repetitions that differ in the seed alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixadv.report.files import Run
from mixadv.report.names import number
from mixadv.report.settings import is_within, relevant_settings

UNIFORM, SHARED, SAMPLED = "uniform", "shared", "sampled"
# Settings with an attribute of their own, and those of the measurement, which is compared separately.
_NOT_IN_REST = ("L", "loss._target_", "task", "protocol.name", "protocol.attacks", "protocol.diagnosed")


@dataclass(frozen=True)
class Setting:
    """The common settings of the repetitions of one training.

    Attributes:
        loss: "AT" or "TRADES".
        num_members: L.
        solver: "oracle", "entropic", "lp" or "uniform"; "" for a single model, which has no weights to learn.
        schedule: "sampled" or "shared"; "" for a single model, for which both are the same.
        epochs: per model.
        weighing: the other settings of solver and schedule; empty if no weights are learned.
        rest: all other settings except for the seed and the protocol of the test set. Only runs with equal `rest`
            are compared.
        origin: the name of a run of task=evaluate or task=solve, whose files do not describe how its members were
            trained: loss, solver and schedule are then "", epochs None. Else "".
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
        """Sort key: trainings first, then loss, L, epochs and the rest."""
        few = sorted(map(str, self.weighing | self.rest))
        sampled = self.schedule == SAMPLED
        return bool(self.origin), self.loss, self.num_members, self.epochs or 0, sampled, self.solver, self.origin, few


def setting_of(run: Run) -> Setting | None:
    """The setting of a run; None if its files do not even contain L."""
    size = run.num_members
    if size is None or size < 1:
        return None
    if run.was_only_measured:
        return Setting("", size, origin=run.path.name)
    solver, single = run.solver, size == 1
    weighing, rest = set(), set()
    settings = relevant_settings(run.config)
    schedule, epochs = settings.pop("schedule.kind", ""), settings.pop("trainer.max_epochs", None)
    for item in settings.items():
        if is_within(item[0], ("lambda_solver", "schedule")):
            weighing.add(item)
        elif not is_within(item[0], _NOT_IN_REST):
            rest.add(item)
    return Setting(
        loss=run.loss,
        num_members=size,
        solver="" if single else solver,
        schedule="" if single else schedule,
        epochs=number(epochs),
        weighing=frozenset() if single or solver == UNIFORM else frozenset(weighing),
        rest=frozenset({*rest, ("data", run.data), ("norm", run.norm), ("eps", str(run.eps))}),
    )


Groups = Mapping[Setting, Sequence[Run]]


def grouped(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """Setting -> its runs, in the order of the settings. Baselines are included, runs with unknown L left out."""
    groups: dict[Setting, list[Run]] = defaultdict(list)
    for run in [*runs, *(run.baseline for run in runs if run.baseline is not None)]:
        if (setting := setting_of(run)) is not None:
            groups[setting].append(run)
    return {setting: groups[setting] for setting in sorted(groups, key=lambda setting: setting.order)}
