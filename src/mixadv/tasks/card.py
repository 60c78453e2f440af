"""README.md of an exported mixture."""

from typing import Any


def model_card(results: dict[str, Any], config: dict[str, Any]) -> str:
    """What the mixture is, what was measured, and how to load it."""
    ball = f"{config['threat_model']['norm']} ball of radius {config['eps']}"
    weights = ", ".join(f"{weight:.4f}" for weight in results["weights"])
    robust, clean = results["robust"], results["clean"]
    low, high = robust["ci95"]
    attacks = ", ".join(results["attacks"])
    measured = f"{robust['expected_accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    return f"""# A mixture of {config["L"]} classifiers

Draws member k with probability lambda_k for every image; lambda = ({weights}). Members: `{config["model"]["name"]}`,
trained on {config["data_name"]} ({results["data"]["num_train"]} images) against attacks in the {ball}, images in
[0, 1], seed {config["seed"]}.

| on {results["num_examples"]} test images | accuracy |
|---|---|
| clean, exact expectation over the draw | {clean["expected_accuracy"]:.4f} |
| robust, worst of clean and {attacks} per image | {measured} |
| clean, argmax of the averaged probabilities | {clean["ensemble_accuracy"]:.4f} |

Robust accuracy is an upper bound: stronger attacks may find more.

```python
from mixadv import load_mixture

mixture = load_mixture("mixture")   # this folder
labels = mixture.predict(images)    # one member drawn per image, images float [B, C, H, W] in [0, 1]
```
"""
