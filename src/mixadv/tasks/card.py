"""README.md of an exported mixture."""

import math
from typing import Any

from mixadv.export import factories_of, recipe_name

_USE = """
```python
from mixadv import load_mixture

mixture = load_mixture("mixture"%s)   # this folder
labels = mixture.predict(images)    # one member drawn per image, images float [B, C, H, W] in [0, 1]
```
"""


def _measured(results: dict[str, Any]) -> str:
    robust, clean = results["robust"], results["clean"]
    low, high = robust["ci95"]
    attacks = ", ".join(results["attacks"])
    measured = f"{robust['expected_accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    return f"""
| on {results["num_examples"]} test images | accuracy |
|---|---|
| clean, exact expectation over the draw | {clean["expected_accuracy"]:.4f} |
| robust, worst of clean and {attacks} per image | {measured} |
| clean, argmax of the averaged probabilities | {clean["ensemble_accuracy"]:.4f} |

Robust accuracy is an upper bound: stronger attacks may find more.
"""


def _ball(config: dict[str, Any]) -> str:
    return f"{config['threat_model']['norm']} ball of radius {config['eps']}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _factories(config: dict[str, Any]) -> str:
    """What `load_mixture` has to be told where code of others builds members."""
    factories = sorted(factories_of(config))
    return f", factories={factories!r}" if factories else ""


def model_card(results: dict[str, Any], config: dict[str, Any]) -> str:
    """What a trained mixture is, what was measured, and how to load it."""
    weights = ", ".join(f"{weight:.4f}" for weight in results["weights"])
    return f"""# A mixture of {config["L"]} classifiers

Draws member k with probability lambda_k for every image; lambda = ({weights}). Members:
`{recipe_name(config["model"])}`, trained on {config["data_name"]} ({results["data"]["num_train"]} images)
against attacks in the {_ball(config)}, images in [0, 1], seed {config["seed"]}.
{_measured(results)}{_USE % _factories(config)}"""


def solved_card(results: dict[str, Any], config: dict[str, Any]) -> str:
    """What a mixture of existing classifiers is, what was measured, and how to load it."""
    solved = results["solve"]
    rows = [
        f"| {_cell(member['name'])} | {weight:.4f} | `{_cell(member['source'])}` |"
        for member, weight in zip(solved["members"], results["weights"], strict=True)
    ]
    # Rounded so that the sentence stays true.
    limit = math.ceil(1e4 * (1 - solved["certificate"]["value_lp"]) - 1e-6) / 1e4
    reached = math.floor(1e4 * (1 - solved["certificate"]["value_at_weights"]) + 1e-6) / 1e4
    table = "\n".join(["| member | lambda | from |", "|---|---|---|", *rows])
    return f"""# Optimal weights over {config["L"]} classifiers

Draws member k with probability lambda_k for every image. The weights were chosen to minimise the adversarial risk on
{solved["fit"]["num_examples"]} validation images of {config["data_name"]} against attacks in the {_ball(config)},
images in [0, 1]. On all points found there they have a robust accuracy of {reached:.4f}, and no weights over these
members have more than {limit:.4f}.

{table}
{_measured(results)}{_USE % _factories(config)}"""
