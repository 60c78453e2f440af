"""What a Lightning user adds to a command: flags of the Trainer, callbacks, loggers; what cannot be, and why."""

import csv

import pytest
import pytorch_lightning as pl
from omegaconf import OmegaConf

from builders.runs import read_results
from conftest import TINY
from mixadv.config import TrainerConfig
from mixadv.unknown_keys import REFUSED

SWA = "pytorch_lightning.callbacks.StochasticWeightAveraging"
MINE = '''
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger


class Counter(pl.Callback):
    """Writes the number of batches that it saw."""

    def __init__(self, path):
        self.path, self.seen = path, 0

    def on_train_batch_end(self, *_):
        self.seen += 1

    def on_train_end(self, *_):
        with open(self.path, "w") as file:
            file.write(str(self.seen))


class Lines(Logger):
    """Writes the names of what is logged."""

    def __init__(self, save_dir):
        super().__init__()
        self.path = save_dir + "/lines.txt"

    name = version = "mine"

    def log_hyperparams(self, params):
        self._add("settings", params)

    def log_metrics(self, metrics, step=None):
        self._add(step, metrics)

    def _add(self, what, names):
        with open(self.path, "a") as file:
            file.write(f"{what} {' '.join(sorted(names))}\\n")
'''


@pytest.fixture
def run(command, own_modules):
    """run(words): the directory of a small training with these words; what it must have written is there."""
    (own_modules / "mine.py").write_text(MINE)

    def train(words):
        argv = [text for text in TINY if not text.startswith("logger=") or "logger=" not in words]
        finished = command(*argv, "L=2", "seed=1", "name=flags", *words.split())
        assert finished.rc == 0, finished.err
        return own_modules / "outputs" / "train" / "flags", finished

    return train


def rows(path):
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_argument_of_lightnings_trainer_is_taken_or_refused_with_a_reason():
    import inspect

    arguments = set(inspect.signature(pl.Trainer).parameters)
    taken = set(OmegaConf.structured(TrainerConfig))
    refused = {key.removeprefix("trainer.") for key in REFUSED}
    assert taken | refused == arguments
    assert not taken & refused


@pytest.mark.parametrize("key", REFUSED)
def test_an_argument_that_would_break_a_run_is_refused_with_the_reason(command, key):
    assert command(*TINY, f"+{key}=true").refusal() == f"{key}: {REFUSED[key]}"


def test_fast_dev_run_tries_everything_and_keeps_nothing(run, tmp_path):
    path, finished = run("trainer.fast_dev_run=2")
    assert "nothing is kept" in finished.out
    assert not path.exists()
    # The same command without it is not "done".
    assert "mixture of 2" in run("trainer.max_epochs=1")[1].out


def test_a_training_ends_after_so_many_steps_of_the_members(run):
    path, _ = run("trainer.max_steps=7 trainer.max_time=00:01:00:00 trainer.detect_anomaly=true trainer.benchmark=true")
    assert sum(read_results(path)["member_updates"]) == 7


def test_validation_inside_an_epoch_and_before_it(run):
    path, finished = run(
        "trainer.val_check_interval=0.5 trainer.num_sanity_val_steps=1 trainer.profiler=simple "
        "trainer.enable_model_summary=true trainer.log_every_n_steps=1"
    )
    validated = [int(row["step"]) for row in rows(path) if row["val/robust_accuracy"]]
    # An epoch has 22 batches: 20 for the members, a weights phase for every 8 of them.
    assert validated == [11, 22, 33, 44]
    assert "run_training_batch" in (path / "mixadv.log").read_text() + finished.out


def test_the_same_batches_again_with_clipped_gradients(run):
    path, _ = run("trainer.overfit_batches=3 trainer.gradient_clip_val=0.5 trainer.gradient_clip_algorithm=norm")
    assert int(rows(path)[-1]["step"]) == 6


def test_other_optimizers_rates_and_precisions(run):
    path, _ = run("optimizer=adamw scheduler=cosine scheduler.warmup=0.5 trainer.precision=bf16-mixed")
    rates = [float(row["train/lr"]) for row in rows(path) if row["train/lr"]]
    assert max(rates) == pytest.approx(1e-3, rel=0.2)
    assert read_results(path)["config"]["optimizer"]["_target_"] == "torch.optim.AdamW"


def test_callbacks_and_loggers_of_lightning_and_of_ones_own(run, tmp_path):
    pytest.importorskip("tensorboard")
    path, _ = run(
        "callbacks=[default,ema,early_stopping,lr_monitor] callbacks.checkpoint.save_top_k=2 "
        "+callbacks.mine._target_=mine.Counter +callbacks.mine.path=seen.txt "
        "logger=[csv,tensorboard] +logger.mine._target_=mine.Lines "
        "+logger.stock._target_=pytorch_lightning.loggers.CSVLogger"
    )
    last = rows(path)[-1]
    assert int((tmp_path / "seen.txt").read_text()) == int(last["step"]) == 44
    assert any(row["lr-SGD"] for row in rows(path))
    said = (path / "lines.txt").read_text()
    assert said.startswith("settings ")
    assert "44 epoch lambda/0 lambda/1 member_updates val/clean_accuracy" in said
    assert "test/robust_accuracy" in said.splitlines()[-1]
    assert list((path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(list((path / "checkpoints").glob("best*.ckpt"))) == 2
    (stock,) = path.glob("flags/version_0/metrics.csv")
    with stock.open(newline="") as file:
        theirs = [row["val/robust_accuracy"] for row in csv.DictReader(file) if row["val/robust_accuracy"]]
    ours = [row["val/robust_accuracy"] for row in rows(path) if row["val/robust_accuracy"]]
    assert [float(a) for a in theirs] == pytest.approx([float(b) for b in ours], rel=1e-6)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("trainer.strategy=fsdp", "updated one at a time"),
        ("trainer.strategy=deepspeed", "updated one at a time"),
        ("trainer.accelerator=tpu", "choose one of auto, cpu, gpu, cuda, mps"),
        ("trainer.limit_train_batches=0", "a number of batches"),
        ("trainer.max_steps=0", "before its first batch"),
        (
            "+callbacks.swa._target_=pytorch_lightning.callbacks.StochasticWeightAveraging +callbacks.swa.swa_lrs=0.1",
            "1 `",
        ),
        ("+callbacks.mine._target_=mine.Nobody", "mine.Nobody"),
        ("+logger.mine._target_=mixadv.losses.AT", "is no Logger"),
    ],
)
def test_what_cannot_be_is_one_line(command, words, reason):
    assert reason in command(*TINY, "name=bad", *words.split()).refusal()
