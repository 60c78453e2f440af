"""What runs were made with: those of one setting are repetitions that differ in the seed alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixadv.report.files import Run
from mixadv.report.names import format_ball, number

UNIFORM, SHARED, SAMPLED = "uniform", "shared", "sampled"
# Where a run lives, what it is called and how fast it computes does not change what it measures.
_NOT_SETTINGS = {"seed", "name", "runs", "resume", "logger", "hydra", "paths", "mixture", "compile"}
_OF_THE_MIXTURE = ("lambda_solver", "schedule")


@dataclass(frozen=True)
class Setting:
    """What the repetitions of one training have in common.

    Attributes:
        loss: "AT" or "TRADES".
        num_members: L.
        solver: "oracle", "entropic", "lp" or "uniform"; "" for a single model, which has no weights to learn.
        schedule: "sampled" or "shared"; "" for a single model, for which both are the same.
        epochs: per model.
        weighing: the solver's and the schedule's other settings; empty for a single model.
        rest: all other settings but the seed. Only runs that share them can be compared.
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
        """By which settings are sorted: loss, then the single model, then L, those that were only measured last."""
        few = sorted(map(str, self.weighing | self.rest))
        return (
            bool(self.origin),
            self.loss,
            self.num_members,
            self.epochs or 0,
            self.schedule == SAMPLED,
            self.solver,
            few,
        )


def setting_of(run: Run) -> Setting:
    """The setting that a run's files record."""
    size = run.num_members or 0
    if run.get("task") in ("evaluate", "solve"):
        return Setting("", size, origin=run.path.name)
    flat = {key: str(value) for key, value in flatten(run.config)}
    schedule = run.config.get("schedule")
    schedule = schedule if isinstance(schedule, dict) else {}
    weighing, rest = set(), set()
    for key, value in flat.items():
        group = key.partition(".")[0]
        if group in _OF_THE_MIXTURE and key not in ("schedule.epochs", "schedule.kind"):
            weighing.add((key, value))
        elif group not in (*_OF_THE_MIXTURE, "L") and key != "loss._target_":
            rest.add((key, value))
    single = size == 1
    return Setting(
        loss=run.loss,
        num_members=size,
        solver="" if single else run.solver,
        schedule="" if single else str(schedule.get("kind") or ""),
        epochs=number(schedule.get("epochs")),
        weighing=frozenset() if single else frozenset(weighing),
        rest=frozenset({*rest, ("data", run.data), ("norm", run.norm), ("eps", str(run.eps))}),
    )


Groups = Mapping[Setting, Sequence[Run]]


def grouped(runs: Sequence[Run]) -> dict[Setting, list[Run]]:
    """Runs by setting, in the settings' order."""
    groups: dict[Setting, list[Run]] = defaultdict(list)
    for run in runs:
        groups[setting_of(run)].append(run)
    return {setting: groups[setting] for setting in sorted(groups, key=lambda setting: setting.order)}


def headline(groups: Groups) -> str:
    """Data, norm and eps of all the runs."""
    runs = [run for of_setting in groups.values() for run in of_setting]
    data = sorted({run.data for run in runs if run.data})
    balls = sorted({format_ball(run.norm, run.eps) for run in runs if run.eps is not None})
    return " · ".join([", ".join(data), *balls])


def names_of(settings: Sequence[Setting], with_size: bool = True) -> dict[Setting, str]:
    """A name for each setting that tells it from the others and says no more than that; `with_size` says L as well."""
    trained = [setting for setting in settings if not setting.origin]
    usual = Counter(setting.epochs for setting in trained).most_common(1)[0][0] if trained else None
    losses, schedules = {s.loss for s in trained}, {s.schedule for s in trained if s.schedule}
    # A loss and a solver have settings that others do not have: those are told where they differ within one.
    varied = set()
    for loss in losses:
        varied |= {key for key, _ in _differing([s.rest for s in trained if s.loss == loss])}
    for solver in {s.solver for s in trained}:
        varied |= {key for key, _ in _differing([s.weighing for s in trained if s.solver == solver])}
    names = {}
    for s in settings:
        parts = [s.loss if len(losses) > 1 else "", f"L = {s.num_members}" if with_size else "", s.solver]
        parts.append(s.schedule if len(schedules) > 1 and s.schedule == SAMPLED else "")
        parts.append(f"{s.epochs:g} epochs" if s.epochs is not None and s.epochs != usual else "")
        parts += [f"{key}={value}" for key, value in sorted(s.weighing | s.rest) if key in varied]
        names[s] = s.origin or ", ".join(part for part in parts if part) or s.loss
    return names


def _differing(sets: Sequence[frozenset[tuple[str, str]]]) -> set[tuple[str, str]]:
    return set().union(*sets) - set(sets[0]).intersection(*sets[1:]) if sets else set()


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a configuration as dotted keys, without paths and without what does not change what is measured."""
    for key, value in config.items():
        if key in _NOT_SETTINGS:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif not (isinstance(value, str) and ("/" in value or "\\" in value) and number(value) is None):
            yield f"{prefix}{key}", value
