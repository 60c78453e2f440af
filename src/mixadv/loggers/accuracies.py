"""The measured accuracies of a run under the names of logged metrics."""

from mixadv.results import Results


def accuracies_of(results: Results) -> dict[str, float]:
    """``test/clean_accuracy``, ``test/ensemble_accuracy``, ``test/robust_accuracy`` in [0, 1], as far as known."""
    named = {
        "test/clean_accuracy": results.clean.value,
        "test/ensemble_accuracy": results.ensemble_accuracy,
        "test/robust_accuracy": results.robust.value,
    }
    return {name: value for name, value in named.items() if value is not None}
