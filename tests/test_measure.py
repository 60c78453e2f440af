"""What a measurement leaves beside its numbers: examples, date and command."""

import json
import shlex
from datetime import datetime, timedelta, timezone

import numpy as np


def test_examples_are_images_that_an_attack_made_worse(trained):
    with np.load(trained.path / "records.npz") as file:
        clean, robust, labels = file["clean"], file["robust"], file["labels"]
    with np.load(trained.path / "examples.npz") as file:
        examples = dict(file)
    worse = np.flatnonzero(robust < clean)
    expected = [*worse, *np.flatnonzero(robust >= clean)][:8]
    assert [int(name) for name in examples["labels"]] == labels[expected].tolist()
    moved = (examples["x"] != examples["x_adv"]).any(axis=(1, 2, 3))
    assert moved.tolist() == [i in worse for i in expected]
    assert moved.tolist() == [name != "clean" for name in examples["found_by"]]
    with np.load(trained.path / "records.npz") as file:
        weights = file["weights"]
    np.testing.assert_allclose(weights @ examples["correct"], robust[expected])


def test_results_have_the_date_and_a_command_that_a_shell_reads(trained):
    results = json.loads((trained.path / "results.json").read_text())
    age = datetime.now(timezone.utc) - datetime.fromisoformat(results["date"])
    assert timedelta(0) <= age < timedelta(days=1)
    words = shlex.split(results["command"])
    assert words[:2] == ["python", "run.py"]
    assert f"seed={results['seed']}" in words or results["seed"] == 0
