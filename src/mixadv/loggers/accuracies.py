"""The measured accuracies of a run under the names of logged metrics."""

from collections.abc import Mapping
from typing import Any


def accuracies_of(results: Mapping[str, Any]) -> dict[str, float]:
    """``test/clean_accuracy``, ``test/ensemble_accuracy`` and ``test/robust_accuracy`` in [0, 1], from results.json."""
    return {
        "test/clean_accuracy": results["clean"]["expected_accuracy"],
        "test/ensemble_accuracy": results["clean"]["ensemble_accuracy"],
        "test/robust_accuracy": results["robust"]["expected_accuracy"],
    }
