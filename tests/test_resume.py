"""A training that was stopped and continued ends where the uninterrupted one ends, bit for bit."""

import csv
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mixadv import config
from mixadv.attacks import pgd, search
from mixadv.callbacks import Checkpoints
from mixadv.checkpoint_files import digest_of, newest, read_checkpoint
from mixadv.errors import UserError
from mixadv.members.store import load_mixture
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.runs.directory import State
from mixadv.signals import Stopped as ToldToStop
from mixadv.tasks import train as task
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining

# 3 batches in a pass and T_theta=3. sampled: epochs of 9 member batches, then a phase: they end at t = 10, 20.
# shared: epochs of 3 member batches, then a phase: they end at t = 4, 8, 12.
COMMON = (
    "logger=csv",
    "data=digits",
    "data.num_train=100",
    "data.num_test=30",
    "data.val_fraction=0.15",
    "data.batch_size=32",
    "data.padding=1",
    "L=3",
    "seed=3",
    "schedule.T_theta=3",
    "attack.num_steps=2",
    "protocol.validation.num_steps=2",
    "protocol.attacks.pgd-20.num_steps=2",
    "protocol.attacks.pgd-20.restarts=1",
    "protocol.attacks.arc.num_steps=1",
    "protocol.attacks.subsets.num_steps=1",
    "protocol.diagnosed=0",
    "scheduler=one_cycle",
    "eps=0.1",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
)
SETTINGS = {
    "trades-entropic-sampled": (
        "model=small_resnet",
        "model.width=2",
        "loss=trades",
        "lambda_solver=entropic",
        "lambda_solver.num_steps=3",
        "lambda_solver.num_samples=2",
        "schedule=sampled",
        "trainer.max_epochs=2",
    ),
    "at-oracle-shared": (
        "model=small_cnn",
        "model.width=2",
        "loss=at",
        "lambda_solver=oracle",
        "lambda_solver.num_steps=3",
        "schedule=shared",
        "trainer.max_epochs=3",
    ),
    # Its weights phases remember batches, across the end of an epoch.
    "at-lp-shared": (
        "model=linear",
        "lambda_solver=lp",
        "lambda_solver.num_rounds=1",
        "lambda_solver.recent_batches=3",
        "schedule=shared",
        "trainer.max_epochs=3",
    ),
    # Stages end at t = 3, 6, 9, in the middle of the one epoch; later ones begin with a game on training images.
    "at-grow": (
        "model=linear",
        "schedule=grow",
        "schedule.response=equilibrium",
        "schedule.min_gain=0",
        "schedule.num_images=30",
        "lambda_solver=held_out",
        "lambda_solver.num_rounds=2",
        "trainer.max_epochs=1",
    ),
    # Averages of the weights, and an end before the last epoch: no validation is better by a whole point.
    "callbacks-of-lightning": (
        "model=small_cnn",
        "model.width=2",
        "schedule=shared",
        "trainer.max_epochs=5",
        "callbacks=[default,ema,early_stopping,lr_monitor]",
        "callbacks.ema.decay=0.8",
        "callbacks.early_stopping.patience=2",
        "callbacks.early_stopping.min_delta=1",
    ),
}


class Stopped(Exception):
    """The power goes."""


def stop():
    raise Stopped


@pytest.fixture(scope="module")
def configured(compose):
    configurations = {}
    for name, overrides in SETTINGS.items():
        configurations[name] = compose(*overrides, *COMMON)
        config.check(configurations[name])
    return configurations


@pytest.fixture(scope="module")
def train(configured):
    """train(setting, directory): the task, without the tables at its end; a checkpoint every so many batches."""

    def run(setting, directory, every=None):
        started = (directory / "config.yaml").exists()
        directory.mkdir(exist_ok=True)
        cfg = configured[setting].copy()
        cfg.callbacks.checkpoint.every_n_train_steps = every
        task.train(cfg, directory, State.UNFINISHED if started else State.NEW, None)
        return directory

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The uninterrupted runs, made when asked for."""
    done = {}

    def run(setting):
        if setting not in done:
            done[setting] = train(setting, tmp_path_factory.mktemp("whole") / "run")
        return done[setting]

    return run


def stop_at(patch, where):
    """Raise at a point of the training, in the middle of what the program does there."""
    kind, count = where
    if kind == "batch":
        original = Checkpoints.on_train_batch_end

        def after_batch(self, trainer, pl_module, *arguments):
            if pl_module.t == count:
                with (Path(self.dirpath).parent / "metrics.csv").open("a") as file:
                    file.write("0.77,12,3")  # a line that was being written
                raise Stopped
            original(self, trainer, pl_module, *arguments)

        patch.setattr(Checkpoints, "on_train_batch_end", after_batch)
    else:
        original = Checkpoints.on_train_epoch_end

        def end_of_epoch(self, trainer, pl_module):
            last = trainer.current_epoch == count
            if last and kind == "before last.ckpt":
                raise Stopped
            original(self, trainer, pl_module)
            if last:
                raise Stopped

        patch.setattr(Checkpoints, "on_train_epoch_end", end_of_epoch)


def train_until(where, train, setting, directory):
    """A training that stops at a point, see `stop_at`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, where)
        with pytest.raises(Stopped):
            train(setting, directory)


def differences(one, two, path=""):
    """Paths of the leaves in which two nested structures differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        return [d for k in one.keys() | two.keys() for d in differences(one.get(k), two.get(k), f"{path}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [path]
    return [] if type(one) is type(two) and one == two else [path]


def history(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = [float(row.pop("seconds")) for row in rows]
    assert seconds == sorted(seconds)
    return rows


def results(directory):
    found = json.loads((directory / "results.json").read_text())
    # The run that was stopped was another command, at another time.
    for name in ("seconds", "date", "command"):
        found.pop(name, None)
    del found["config"]["callbacks"]["checkpoint"]["every_n_train_steps"]
    for attack in found["attacks"].values():
        del attack["seconds"], attack["seconds_on_parts"]
    for row in found["ceiling"]:
        del row["seconds"]
    return found


def assert_same_run(one, two):
    # A mixture that grows has no best epoch.
    best = [(directory / "checkpoints" / "best.ckpt").exists() for directory in (one, two)]
    assert best[0] == best[1]
    for name in ("last.ckpt", "best.ckpt")[: 1 + best[0]]:
        old, new = (read_checkpoint(directory / "checkpoints" / name) for directory in (one, two))
        assert {"state_dict", "optimizer_states", "lr_schedulers", "mixadv", "mixture_config"} <= old.keys()
        assert differences(old, new) == []
    assert history(one) == history(two)
    assert results(one) == results(two)
    arrays = [np.load(directory / "records.npz") for directory in (one, two)]
    assert sorted(arrays[0]) == sorted(arrays[1])
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    exports = [(directory / "mixture" / "mixture.safetensors").read_bytes() for directory in (one, two)]
    assert exports[0] == exports[1]
    assert (two / "DONE").exists()


def test_the_uninterrupted_run_is_worth_comparing(whole):
    """Weights moved, members differ, every counter and generator is in the checkpoint."""
    directory = whole("trades-entropic-sampled")
    last = read_checkpoint(directory / "checkpoints" / "last.ckpt")
    assert last["mixadv"]["t"] == 20
    assert sum(last["mixadv"]["member_updates"]) == 18
    assert len(last["optimizer_states"]) == len(last["lr_schedulers"]) == 3
    done = [scheduler["last_epoch"] for scheduler in last["lr_schedulers"]]
    # A schedule ends with the share of the member, 6 of 18 updates.
    assert done == [min(updates, 5) for updates in last["mixadv"]["member_updates"]]
    rows = history(directory)
    assert len({row["lambda/0"] for row in rows}) > 1
    assert [int(row["step"]) for row in rows if row["weights/value"]] == [10, 20]
    assert [int(row["step"]) for row in rows if row["val/robust_accuracy"]] == [10, 20]


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("trades-entropic-sampled", ("batch", 17)),
        ("trades-entropic-sampled", ("before last.ckpt", 1)),
        ("at-oracle-shared", ("after last.ckpt", 1)),
        ("at-oracle-shared", ("batch", 5)),
        ("at-lp-shared", ("after last.ckpt", 1)),
        ("at-lp-shared", ("batch", 12)),
    ],
    ids=lambda value: "-".join(map(str, value)).replace(" ", "-") if isinstance(value, tuple) else value,
)
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(train, whole, tmp_path, setting, where):
    train_until(where, train, setting, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    train(setting, tmp_path / "run")
    assert_same_run(whole(setting), tmp_path / "run")


@pytest.mark.parametrize("interval", [0.5, 3])
def test_a_run_that_validates_inside_its_epochs_goes_on_with_the_same_members(configured, tmp_path, interval):
    """At which batches it validates may differ until the epoch ends."""
    cfg = configured["at-oracle-shared"].copy()
    cfg.trainer.val_check_interval = interval

    def run(name):
        directory = tmp_path / name
        started = directory.exists()
        directory.mkdir(exist_ok=True)
        task.train(cfg, directory, State.UNFINISHED if started else State.NEW, None)
        return read_checkpoint(directory / "checkpoints" / "last.ckpt")

    def and_a_signal(self, trainer, pl_module, *arguments):
        if pl_module.t == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        batch_end(self, trainer, pl_module, *arguments)

    batch_end = Checkpoints.on_train_batch_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_batch_end", and_a_signal)
        with pytest.raises(ToldToStop):
            run("stopped")
    one, two = run("whole"), run("stopped")
    assert differences(one["state_dict"], two["state_dict"]) == []
    assert differences(one["optimizer_states"], two["optimizer_states"]) == []
    # The epoch after it is validated as without the stop.
    steps = [[int(r["step"]) for r in history(tmp_path / n) if r["val/robust_accuracy"]] for n in ("whole", "stopped")]
    assert [step for step in steps[0] if step > 8] == [step for step in steps[1] if step > 8] != []


def test_a_run_stopped_twice(train, whole, tmp_path):
    for where in (("batch", 6), ("after last.ckpt", 1)):
        train_until(where, train, "at-oracle-shared", tmp_path / "run")
    train("at-oracle-shared", tmp_path / "run")
    assert_same_run(whole("at-oracle-shared"), tmp_path / "run")


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_stopped_inside_its_epochs(train, whole, tmp_path, monkeypatch, setting, every):
    """Stopped again and again, wherever there is a new checkpoint."""
    saved = Checkpoints._save_last
    stops = []

    def save_and_stop(self, trainer, module):
        saved(self, trainer, module)
        # The last state of all is the end of the training, not of an epoch.
        if module.t not in stops and trainer.datamodule.train_dataloader().batches_left != module.batches_per_epoch:
            stops.append(module.t)
            raise Stopped

    monkeypatch.setattr(Checkpoints, "_save_last", save_and_stop)
    for _ in range(40):
        try:
            train(setting, tmp_path / "run", every)
        except Stopped:
            continue
        break
    assert len(stops) >= (5 if every == 1 else 2)
    assert_same_run(whole(setting), tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "nth"),
    [
        *(("trades-entropic-sampled", nth) for nth in (1, 2, 20, 31, 41, 55)),
        *(("at-oracle-shared", nth) for nth in (1, 8, 15, 30, 41)),
        *(("callbacks-of-lightning", nth) for nth in (7, 26, 27, 60)),
        *(("at-grow", nth) for nth in (3, 6, 10, 14)),
    ],
)
def test_a_signal_ends_attacks_phases_and_validations_at_once(train, whole, tmp_path, monkeypatch, setting, nth):
    """A gradient of an attack is being computed, for members, for weights or in validation, when the signal comes."""
    gradient, calls = search.value_and_gradient, []

    def and_a_signal(*arguments):
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradient(*arguments)

    for module in (search, pgd):
        monkeypatch.setattr(module, "value_and_gradient", and_a_signal)
    # Its trial step attacks too, before there is anything to keep.
    monkeypatch.setattr(task, "announce", lambda *_: None)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(ToldToStop) as stop:
        train(setting, tmp_path / "run")
    assert stop.value.exit_code == 143
    assert len(calls) == nth
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    # Nothing is lost but the batch under way.
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert state["mixadv"]["t"] == max([int(row["step"]) for row in history(tmp_path / "run")], default=0)
    train(setting, tmp_path / "run")
    assert_same_run(whole(setting), tmp_path / "run")


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_a_signal_in_an_update_waits_for_the_end_of_the_batch(train, whole, tmp_path, monkeypatch, name):
    step, calls = torch.optim.SGD.step, []

    def and_a_signal(self, *arguments, **settings):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.Signals[name])
        return step(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.SGD, "step", and_a_signal)
    with pytest.raises(ToldToStop, match=name):
        train("at-oracle-shared", tmp_path / "run")
    # L=3: the fifth update is in the middle of the second batch.
    assert len(calls) == 6
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["mixadv"]["t"] == 2
    train("at-oracle-shared", tmp_path / "run")
    assert_same_run(whole("at-oracle-shared"), tmp_path / "run")


def test_a_second_interrupt_inside_an_update_keeps_the_last_checkpoint(train, whole, tmp_path, monkeypatch):
    """Half of a batch is no state to go on from."""
    step, calls = torch.optim.SGD.step, []

    def and_two_signals(self, *arguments, **settings):
        calls.append(None)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.SGD, "step", and_two_signals)
    with pytest.raises(ToldToStop):
        train("at-oracle-shared", tmp_path / "run", 1)
    # L=3: the eighth update is in the middle of the third batch; every batch has left a checkpoint.
    assert len(calls) == 8
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["mixadv"]["t"] == 2
    train("at-oracle-shared", tmp_path / "run")
    assert_same_run(whole("at-oracle-shared"), tmp_path / "run")


def test_a_second_interrupt_while_a_checkpoint_is_loaded_keeps_it(train, whole, unmeasured, monkeypatch):
    load = MixtureTraining.on_load_checkpoint

    def and_two_signals(self, checkpoint):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        load(self, checkpoint)

    kept = {path.name: path.read_bytes() for path in (unmeasured / "checkpoints").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(MixtureTraining, "on_load_checkpoint", and_two_signals)
        with pytest.raises(ToldToStop):
            train("at-oracle-shared", unmeasured)
    assert {path.name: path.read_bytes() for path in (unmeasured / "checkpoints").iterdir()} == kept
    train("at-oracle-shared", unmeasured)
    assert_same_run(whole("at-oracle-shared"), unmeasured)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(train, whole, tmp_path, monkeypatch, nth):
    save, calls = torch.save, []

    def and_a_signal(*arguments, **settings):
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(*arguments, **settings)

    monkeypatch.setattr(torch, "save", and_a_signal)
    with pytest.raises(ToldToStop):
        train("at-oracle-shared", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    train("at-oracle-shared", tmp_path / "run")
    assert_same_run(whole("at-oracle-shared"), tmp_path / "run")


@pytest.fixture
def unmeasured(whole, tmp_path):
    """A copy of a finished training that was stopped before it was measured."""
    directory = tmp_path / "run"
    shutil.copytree(whole("at-oracle-shared"), directory)
    (directory / "DONE").unlink()
    (directory / "results.json").unlink()
    return directory


def test_a_finished_training_is_measured_without_training_again(train, whole, unmeasured):
    before = (unmeasured / "metrics.csv").read_bytes()
    checkpoint = (unmeasured / "checkpoints" / "last.ckpt").read_bytes()
    train("at-oracle-shared", unmeasured)
    assert (unmeasured / "metrics.csv").read_bytes() == before
    assert (unmeasured / "checkpoints" / "last.ckpt").read_bytes() == checkpoint
    assert_same_run(whole("at-oracle-shared"), unmeasured)


def test_an_early_stopped_training_does_not_train_on(train, whole, tmp_path, monkeypatch):
    """It is killed while it is measured."""
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(task, "measure", lambda *_: stop())
        with pytest.raises(Stopped):
            train("callbacks-of-lightning", directory)
    last = (directory / "checkpoints" / "last.ckpt").read_bytes()
    assert int(history(directory)[-1]["step"]) == 12 < 20
    train("callbacks-of-lightning", directory)
    assert (directory / "checkpoints" / "last.ckpt").read_bytes() == last
    assert_same_run(whole("callbacks-of-lightning"), directory)


def test_averaged_members_are_those_that_are_measured(whole):
    directory = whole("callbacks-of-lightning")
    best = read_checkpoint(directory / "checkpoints" / "best.ckpt")
    name = next(key for key in best["state_dict"] if key.endswith("weight"))
    assert not torch.equal(best["state_dict"][name], best["current_model_state"][name])
    exported = load_mixture(directory / "mixture").state_dict()
    assert torch.equal(exported[name.removeprefix("mixture.")], best["state_dict"][name])


def test_measured_members_are_those_of_the_best_epoch(whole):
    directory = whole("at-oracle-shared")
    state = read_checkpoint(directory / "checkpoints" / "best.ckpt")
    exported = load_mixture(directory / "mixture").state_dict()
    assert differences({f"mixture.{name}": t for name, t in exported.items()}, state["state_dict"]) == []
    rows = [row for row in history(directory) if row["val/robust_accuracy"]]
    scores = [float(row["val/robust_accuracy"]) for row in rows]
    assert results(directory)["best_epoch"] == pytest.approx(float(rows[scores.index(max(scores))]["epoch"]))


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_torn_checkpoint_is_named(train, unmeasured, name):
    path = unmeasured / "checkpoints" / name
    (unmeasured / "checkpoints" / "previous.ckpt").unlink()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="resume=never") as caught:
        train("at-oracle-shared", unmeasured)
    assert str(path) in str(caught.value)
    assert (unmeasured / "metrics.csv").exists()


def test_from_a_torn_checkpoint_the_run_goes_on_with_the_one_before(train, whole, unmeasured, capsys):
    path = unmeasured / "checkpoints" / "last.ckpt"
    torn = path.read_bytes()[:-100]
    path.write_bytes(torn)
    train("at-oracle-shared", unmeasured)
    said = " ".join(capsys.readouterr().out.split())
    assert "last.ckpt" in said
    assert "going on from previous.ckpt" in said
    assert_same_run(whole("at-oracle-shared"), unmeasured)
    assert path.with_name("last.ckpt.torn").read_bytes() == torn


def test_a_resumed_training_reads_its_checkpoint_once(train, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    train_until(("batch", 5), train, "at-oracle-shared", directory)
    opened = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda path, **settings: opened.append(Path(path).name) or load(path, **settings)
    )
    train("at-oracle-shared", directory)
    assert Counter(opened) == {"last.ckpt": 1, "best.ckpt": 1}


def test_what_a_killed_writer_left_is_removed(train, whole, tmp_path):
    directory = tmp_path / "run"
    train_until(("batch", 5), train, "at-oracle-shared", directory)
    for name in (".best.ckpt.0123abcd.tmp", ".last.ckpt.00000000.tmp"):
        (directory / "checkpoints" / name).write_bytes(b"half")
    train("at-oracle-shared", directory)
    assert not list(directory.rglob("*.tmp"))
    assert_same_run(whole("at-oracle-shared"), directory)


def test_a_changed_bit_is_found(unmeasured):
    path = unmeasured / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["digest"] == digest_of(content)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name].view(-1)[0] += 1e-6
    torch.save(content, path)
    with pytest.raises(UserError, match="changed since it was written"):
        read_checkpoint(path)


def test_a_run_goes_on_only_from_what_can_be_checked(unmeasured):
    path = unmeasured / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["digest"]
    torch.save(content, path)
    (unmeasured / "checkpoints" / "previous.ckpt").unlink()
    with pytest.raises(UserError, match="digest"):
        newest(unmeasured / "checkpoints", print)


def test_of_several_processes_the_first_alone_sets_a_torn_checkpoint_aside(unmeasured):
    directory = unmeasured / "checkpoints"
    (directory / "last.ckpt").write_bytes(b"torn")
    said = []
    assert newest(directory, said.append, first=False) == directory / "previous.ckpt"
    assert (directory / "last.ckpt").read_bytes() == b"torn"
    assert newest(directory, said.append) == newest(directory, said.append, first=False) == directory / "previous.ckpt"
    assert len(said) == 1


def test_every_kind_of_content_is_in_the_digest():
    content = {"a": torch.arange(4.0), "b": [1, (2.5, None)], "c": {"d": "text", "e": True}}
    seen = {digest_of(content)}
    for other in (
        {**content, "a": torch.arange(4)},
        {**content, "a": torch.arange(4.0).view(2, 2)},
        {**content, "a": torch.tensor([0.0, 1.0, 3.0, 2.0])},
        {**content, "b": [1, (2.5, 0)]},
        {**content, "b": [1, [2.5, None]]},
        {**content, "b": [[1], (2.5, None)]},
        {**content, "c": {"d": "text", "e": 1}},
        {**content, "c": {"f": "text", "e": True}},
        {**content, "f": 0},
    ):
        seen.add(digest_of(other))
    assert len(seen) == 10
    assert digest_of({**content, "digest": "itself is left out"}) in seen


def test_without_any_checkpoint_that_can_be_read_the_last_is_named(unmeasured):
    for name in ("last.ckpt", "previous.ckpt"):
        (unmeasured / "checkpoints" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"previous\.ckpt"):
        newest(unmeasured / "checkpoints", print)
    (unmeasured / "checkpoints" / "previous.ckpt").unlink()
    with pytest.raises(UserError, match=r"last\.ckpt"):
        newest(unmeasured / "checkpoints", print)
    (unmeasured / "checkpoints" / "last.ckpt").unlink()
    assert newest(unmeasured / "checkpoints", print) is None


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_checkpoint_cannot_run_code(train, unmeasured, tmp_path, name):
    path, mark = unmeasured / "checkpoints" / name, tmp_path / "executed"
    (unmeasured / "checkpoints" / "previous.ckpt").unlink()
    content = torch.load(path, weights_only=True)
    torch.save({**content, "callbacks": {"x": Malice(mark)}}, path)
    for read in (read_checkpoint, load_mixture, lambda _: train("at-oracle-shared", unmeasured)):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert not mark.exists()
    # The trap works: without the guard the file would be there.
    torch.load(path, weights_only=False)["callbacks"]["x"].close()
    assert mark.exists()


def test_other_files_are_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save({"epoch": 3}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="no state_dict"):
        read_checkpoint(tmp_path / "foreign.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    with pytest.raises(UserError, match="no state_dict"):
        read_checkpoint(tmp_path / "tensor.ckpt")


def test_checkpoints_of_another_mixture_or_program_are_refused(whole):
    checkpoint = read_checkpoint(whole("at-lp-shared") / "checkpoints" / "last.ckpt")

    def module(count):
        members = [build_member("linear", num_classes=10, image_shape=(1, 8, 8)) for _ in range(count)]
        return MixtureTraining(Mixture(members), ThreatModel("linf", 0.1))

    module(3).on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="holds 3 members, not L=2"):
        module(2).on_load_checkpoint(checkpoint)
    for foreign in ({}, {"mixadv": {**checkpoint["mixadv"], "schema": 99}}):
        with pytest.raises(UserError, match="resume=never"):
            module(3).on_load_checkpoint(foreign)
