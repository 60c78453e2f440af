"""How the members of a mixture that grew changed the game."""

from __future__ import annotations

from mixadv.report.files import Run
from mixadv.results import GrowthStage


def growth_sentence(run: Run) -> str:
    """The value of the game after each stage, and without the new member on the same points; "" if it did not grow."""
    stages = run.results.stages
    if not stages or stages[0].num_images is None:
        return ""
    values = ", ".join(_value(stage) for stage in stages)
    return f"Value of the game on {stages[0].num_images:,} validation images after each member: {values}."


def _value(stage: GrowthStage) -> str:
    value = "?" if stage.value is None else f"{stage.value:.3f}"
    if stage.value_without is None:
        return value
    return f"{value} ({stage.value_without:.3f} without it{'; left out' if stage.kept is False else ''})"
