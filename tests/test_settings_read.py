"""A run records the settings that its task reads, and none that it does not."""

import json

import pytest
import yaml

from builders.runs import read_results
from conftest import run_command
from mixadv.setting_keys import flat_settings

QUICK = ("data.num_train=60", "data.num_val=20", "data.num_test=20", "protocol.diagnosed=0", "trainer.accelerator=cpu")
TRAINED = (
    *("data=digits", "model=linear", "eps=0.1", "loss=trades", "lambda_solver=entropic", "schedule=shared"),
    *("trainer.max_epochs=2", "optimizer.lr=0.03", "L=2", "name=one", *QUICK),
)
# Settings of a training whose defaults differ from those of the training above.
OF_TRAINING = ("loss", "attack", "schedule", "optimizer", "scheduler", "callbacks", "micro_batch_size", "baseline")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A training with settings that are no defaults; the mixture measured, and its members weighed."""
    cwd = tmp_path_factory.mktemp("settings")
    for argv in (
        TRAINED,
        ("task=evaluate", "mixture=outputs/train/one", "name=one", *QUICK),
        ("task=solve", "members=[outputs/train/one]", "name=one", *QUICK),
    ):
        finished = run_command(cwd, *argv)
        assert finished.rc == 0, finished.err
    return cwd


@pytest.mark.parametrize("task", ["evaluate", "solve"])
def test_defaults_of_a_training_are_no_facts_of_a_measurement(measured, task):
    path = measured / "outputs" / task / "one"
    config = yaml.safe_load((path / "config.yaml").read_text())
    assert read_results(path)["config"] == config
    assert not {*OF_TRAINING, "game", "runs"} & set(config)
    assert ("lambda_solver" in config) == ("biases" in config) == (task == "solve")
    flat = flat_settings(config)
    for key in ("trainer.max_epochs", "trainer.precision", "trainer.limit_train_batches"):
        assert key not in flat
    # What it does read is there.
    assert {"data", "model", "eps", "seed", "threat_model", "protocol", "trainer"} <= set(config)
    assert flat["trainer.accelerator"] == "cpu"


def test_the_report_shows_how_the_mixture_was_trained(measured):
    page = (measured / "outputs" / "evaluate" / "one" / "report.html").read_text()
    assert "TRADES, entropic, shared schedule, trainer.max_epochs=2, optimizer.lr=0.03" in page
    for default in ("OracleSubgradient", "sampled", "piecewise: 200", "max_epochs&#34;: 200"):
        assert default not in page
    found = read_results(measured / "outputs" / "evaluate" / "one")["training"]
    assert (
        found
        == json.loads((measured / "outputs" / "train" / "one" / "mixture" / "config.json").read_text())["training"]
    )
    assert found["loss"]["_target_"].endswith("TRADES")
    assert found["trainer"]["max_epochs"] == 2
    assert found["schedule"]["kind"] == "shared"


@pytest.mark.parametrize("task", ["evaluate", "solve"])
def test_the_same_command_finds_its_run(measured, task):
    named = {"evaluate": "mixture=outputs/train/one", "solve": "members=[outputs/train/one]"}[task]
    again = run_command(measured, f"task={task}", named, "name=one", *QUICK)
    assert (again.rc, "is done" in again.out) == (0, True)
    other = run_command(measured, f"task={task}", named, "name=one", "seed=3", *QUICK)
    assert "holds a run with other settings (seed: 0 there, 3 here)" in other.err
