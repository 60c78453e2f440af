"""The runs of a directory as panels: runs that can be compared, and the settings in which they differ."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from mixadv.report.files import Run
from mixadv.report.names import format_eps, norm_symbol, number
from mixadv.report.settings import is_within, relevant_settings
from mixadv.setting_keys import settings_read

# More differing keys, or a longer text, become a number that a table explains.
MOST_KEYS, MOST_LETTERS = 4, 60
# What a panel, the axes and the first words of a label already say.
_SAID = (
    *("task", "eps", "L", "loss", "lambda_solver", "threat_model.norm", "resolved_from"),
    *("protocol.name", "protocol.attacks", "protocol.diagnosed", "protocol.save_points"),
)


class Panel(NamedTuple):
    """Runs with results on the same data, under the same norm and the same attacks of one protocol.

    Attributes:
        title: data, norm and protocol.
        runs: in the order in which they were given.
        differing: for each run, the settings in which runs with equal eps, L, loss and solver differ, except for the
            seed: "key=value, ..." or "settings 3"; "" if there are none.
        numbered: "settings 3" -> "key=value, ...".
    """

    title: str
    runs: list[Run]
    differing: list[str]
    numbered: dict[str, str]

    @property
    def over_eps(self) -> bool:
        """Whether the runs have several radii."""
        return len({run.eps for run in self.runs}) > 1


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The runs that have a robust accuracy and a radius, in panels sorted by title."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.robust.value is not None and run.eps is not None:
            attacks = {name: attack.settings for name, attack in run.results.attacks.items()}
            groups[_title(run), json.dumps(attacks, sort_keys=True, default=str)].append(run)
    panels: list[Panel] = []
    many, used = Counter(title for title, _ in groups), Counter[str]()
    for (title, _), members in sorted(groups.items()):
        used[title] += 1
        name = f"{title} · attacks {used[title]}" if many[title] > 1 else title
        differing, numbered = _differing(members, sum(len(panel.numbered) for panel in panels))
        panels.append(Panel(name, members, differing, numbered))
    return panels


def _title(run: Run) -> str:
    protocol = run.results.protocol or ""
    parts = [run.data, norm_symbol(run.norm), f"protocol {protocol}" if protocol else ""]
    return " · ".join(part for part in parts if part) or "unknown data"


def _differing(runs: Sequence[Run], numbers: int) -> tuple[list[str], dict[str, str]]:
    """`Panel.differing` and `Panel.numbered`; the numbers begin after `numbers`."""
    flat = [_settings(run) for run in runs]
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        groups[run.eps, run.num_members, run.task, run.loss, run.solver].append(i)
    varied = {
        key
        for members in groups.values()
        for key in {key for i in members for key in flat[i]}
        if len({flat[i].get(key) for i in members}) > 1
    }
    texts = [", ".join(f"{key}={own[key]}" for key in sorted(varied) if key in own) for own in flat]
    if len(varied) <= MOST_KEYS and max(map(len, texts), default=0) <= MOST_LETTERS:
        return texts, {}
    names = {text: f"settings {numbers + i}" for i, text in enumerate(dict.fromkeys(texts), start=1)}
    return [names[text] for text in texts], {name: text or "none of these keys" for text, name in names.items()}


def _settings(run: Run) -> dict[str, str]:
    """The settings that can change results and that the panel does not say.

    For a measured mixture they are those of its training, as it records them, and the radius that it was trained
    with; where these are unknown, its source.
    """
    own = relevant_settings(settings_read({**run.config, "task": run.task}))
    training = run.results.training if run.was_only_measured else {}
    if training:
        own = {**relevant_settings(training), **own, "trained at ε": format_eps(number(training.get("eps")))}
    elif source := run.config.get("members") or run.config.get("mixture"):
        own["of"] = "+".join(map(str, source)) if isinstance(source, list) else str(source)
    return {key: value for key, value in own.items() if not is_within(key, _SAID)}
