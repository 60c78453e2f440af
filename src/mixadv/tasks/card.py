"""The model card, README.md of an exported mixture, from the template `card.md.j2`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mixadv.members.recipe import factories_of, member_recipes
from mixadv.results import Results


def model_card(results: Results, config: dict[str, Any]) -> str:
    """The model card of a trained mixture."""
    names = dict.fromkeys(recipe.name for recipe in member_recipes(config))
    return _rendered(results, config, model=", ".join(names))


def solved_card(results: Results, config: dict[str, Any], exported: Sequence[int]) -> str:
    """The model card of a mixture of existing classifiers, from task=solve; `exported`: the members that it has."""
    assert results.solve is not None
    known = results.solve.certificate
    assert known.value_lp is not None
    assert known.value_at_weights is not None
    # Rounded in the safe direction: the upper bound up, the reached accuracy down.
    limit = math.ceil(1e4 * (1 - known.value_lp) - 1e-6) / 1e4
    reached = math.floor(1e4 * (1 - known.value_at_weights) + 1e-6) / 1e4
    members = [(results.members[k], results.weights[k]) for k in exported]
    return _rendered(results, config, solve=results.solve, limit=limit, reached=reached, members=members)


def _rendered(results: Results, config: dict[str, Any], **more: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    ball = f"{config['threat_model']['norm']} ball of radius {config['eps']}"
    # `load_mixture` needs the import paths of factories.
    factories = sorted(factories_of(member_recipes(config)))
    template = environment.get_template("card.md.j2")
    return template.render(results=results, config=config, ball=ball, factories=factories, **more)
