"""Two processes compute what one computes: real commands, processes started by Lightning on the CPU (gloo)."""

import signal
import time

import numpy as np
import pytest
import torch

from builders.processes import started_process
from builders.runs import read_metrics
from mixadv.checkpoint_files import read_checkpoint

# No batch norm: each process would see the statistics of its own half. 30 test images in batches of 8: two rounds,
# and a last batch of another size.
COMMON = (
    "logger=csv",
    "data=digits",
    "data.num_train=96",
    "data.num_test=30",
    "data.batch_size=16",
    "data.eval_batch_size=8",
    "data.padding=1",
    "model=small_cnn",
    "model.width=3",
    "L=3",
    "eps=0.1",
    "seed=7",
    "optimizer.lr=0.02",
    "scheduler=constant",
    "trainer.max_epochs=2",
    "schedule.T_theta=2",
    "attack.num_steps=2",
    "protocol.validation.num_steps=3",
    "protocol.attacks.pgd-20.num_steps=3",
    "protocol.attacks.pgd-20.restarts=2",
    "protocol.attacks.arc.num_steps=1",
    "protocol.attacks.subsets.num_steps=1",
    "protocol.diagnosed=0",
    "trainer.log_every_n_steps=1",
)
SAMPLED = ("schedule=sampled", "loss=trades", "lambda_solver=oracle", "lambda_solver.num_steps=4")
REMEMBERING = ("schedule=shared", "lambda_solver=lp", "lambda_solver.num_rounds=2", "lambda_solver.recent_batches=2")
ENTROPIC = ("schedule=shared", "lambda_solver=entropic", "lambda_solver.num_steps=3", "lambda_solver.num_samples=2")


def assert_same_numbers(one, two, tolerance=2e-5):
    for name in ("last.ckpt", "best.ckpt"):
        states = [read_checkpoint(run / "checkpoints" / name) for run in (one, two)]
        for key, tensor in states[0]["state_dict"].items():
            torch.testing.assert_close(
                states[1]["state_dict"][key], tensor, atol=tolerance, rtol=0, msg=lambda said, key=key: f"{key}: {said}"
            )
        for key in ("t", "member_updates"):
            assert states[0]["mixadv"][key] == states[1]["mixadv"][key]
        assert torch.equal(*(state["mixadv"]["attack_generator"] for state in states))
    histories = [read_metrics(run) for run in (one, two)]
    assert len(histories[0]) == len(histories[1]) > 10
    for ours, theirs in zip(*histories, strict=True):
        del ours["seconds"], theirs["seconds"]
        assert theirs == pytest.approx(ours, abs=1e-5)
    records = [np.load(run / "records.npz") for run in (one, two)]
    assert sorted(records[0]) == sorted(records[1])
    for key in records[0]:
        if records[0][key].dtype.kind == "f":
            np.testing.assert_allclose(records[1][key], records[0][key], atol=1e-6)
        else:
            np.testing.assert_array_equal(records[1][key], records[0][key])
    examples = [np.load(run / "examples.npz") for run in (one, two)]
    np.testing.assert_allclose(examples[1]["x_adv"], examples[0]["x_adv"], atol=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(SAMPLED, id="sampled"),
        pytest.param(REMEMBERING, id="remembering", marks=pytest.mark.slow),
        pytest.param(ENTROPIC, id="entropic", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_and_measure_what_one_does(tmp_path, setting):
    runs = [
        started_process(tmp_path, *COMMON, *setting, "trainer=cpu", "name=one"),
        started_process(tmp_path, *COMMON, *setting, "trainer=ddp_cpu", "name=two"),
    ]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    place = tmp_path / "outputs" / "train"
    assert_same_numbers(place / "one", place / "two")
    # One process speaks and one writes.
    assert said[1].count("Measuring on 30 test images") == 1
    assert sorted(path.name for path in place.iterdir()) == ["one", "two"]
    weights = [row["lambda/0"] for row in read_metrics(place / "two")]
    assert len(set(weights)) > 2


@pytest.mark.slow
def test_told_to_stop_all_processes_stop_together_and_go_on_together(tmp_path):
    reference = started_process(tmp_path, *COMMON, *SAMPLED, "trainer=ddp_cpu", "name=whole")
    reference.communicate(timeout=300)
    run = started_process(tmp_path, *COMMON, *SAMPLED, "trainer=ddp_cpu", "name=stopped")
    history = tmp_path / "outputs" / "train" / "stopped" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not history.exists() or len(history.read_text().splitlines()) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 143, said
    assert not (history.parent / "results.json").exists()
    again = started_process(tmp_path, *COMMON, *SAMPLED, "trainer=ddp_cpu", "name=stopped")
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert "Continuing" in said
    assert_same_numbers(tmp_path / "outputs" / "train" / "whole", history.parent, tolerance=0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-m", "eps=0.1,0.2", "trainer=ddp_cpu"), "without -m"),
        (("trainer=ddp_cpu", "data.batch_size=15"), "use data.batch_size=14"),
        (("trainer=ddp_cpu", "trainer.num_nodes=0"), "trainer.num_nodes=0 must be at least 1"),
        (("trainer=cpu", "trainer.devices=-1"), "trainer=ddp_cpu"),
        (("task=game", "trainer=ddp_cpu"), "task=game runs in one process"),
        (("task=ceiling", "trainer=ddp_cpu"), "task=ceiling runs in one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_with_what_works(command, argv, message):
    flags = [word for word in argv if word.startswith("-")]
    assert message in command(*flags, *COMMON, *argv[len(flags) :]).err
