"""metrics.csv as a logger of Lightning's Trainer, and the settings as hyperparameters."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from conftest import QUIET
from mixadv.loggers.csv import CSVLogger
from mixadv.loggers.hyperparameters import flat_config
from mixadv.metrics_file import MetricsFile, RowReader, as_numbers, read_rows, standard_columns

ROOT = Path(__file__).resolve().parents[1]


class Module(pl.LightningModule):
    """Logs as a user's module does: per step, per epoch, in validation, and a new name late."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        self.log("count", float(self.global_step), on_step=True, on_epoch=True)
        if self.current_epoch == 1:
            self.log("late", loss.detach() * 3)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/robust_accuracy", self.layer(batch).sigmoid().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(loggers, epochs=3, **arguments):
    torch.manual_seed(0)
    module = Module()
    data = torch.arange(16.0).reshape(8, 2) / 16
    trainer = pl.Trainer(**{**QUIET, "logger": loggers}, max_epochs=epochs, log_every_n_steps=1, **arguments)
    trainer.fit(module, DataLoader(data, 2), DataLoader(data, 4))
    return trainer


def cells(path):
    """The rows of a file, without empty cells and the clock."""
    with Path(path).open(newline="") as file:
        return [{k: c for k, c in row.items() if c and k != "seconds"} for row in csv.DictReader(file)]


# --- the file ----------------------------------------------------------------------------------------------


def test_new_columns_come_behind_the_standard_ones_and_rewrite_the_file_once(tmp_path, monkeypatch):
    file = MetricsFile(tmp_path / "metrics.csv", ["epoch", "step"])
    assert not file.path.exists()
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (replaced.append(paths), replace(*paths)))
    file.append({"step": 0, "b": 1})
    file.append({"step": 1, "epoch": 0})
    file.append({"step": 2, "a": 2})
    file.append({"step": 3, "a": 3, "b": 4})
    assert file.path.read_text().splitlines() == ["epoch,step,b,a", ",0,1,", "0,1,,", ",2,,2", ",3,4,3"]
    assert len(replaced) == 2
    # Another session: its standard columns first, those of the file behind them.
    again = MetricsFile(file.path, ["step", "c"])
    again.append({"step": 4})
    assert file.path.read_text().splitlines()[0] == "step,c,epoch,b,a"
    assert again.rows()[3] == {"step": "3", "c": "", "epoch": "", "b": "4", "a": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("torn", ["5,0.1", "5", '5,"', "5,0.12345"])
def test_a_torn_last_line_is_no_row_and_goes_with_the_next_one(tmp_path, torn):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n4,1\n" + torn)
    assert read_rows(path) == [{"step": "4", "a": "1"}]
    MetricsFile(path, ["step", "a"]).append({"step": 5, "a": 2})
    assert path.read_text() == "step,a\n4,1\n5,2\n"


def test_what_is_not_there_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "metrics.csv") == []
    (tmp_path / "metrics.csv").write_text("step,a")
    assert read_rows(tmp_path / "metrics.csv") == []


def test_a_reader_gets_each_row_once_whatever_the_writer_does(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv", ["step"])
    reader = RowReader(file.path)
    assert reader.new() == []
    seen = []
    for step in range(20):
        # Every third row brings a column, which replaces the file; the reader looks every second time.
        file.append({"step": step, **({f"x{step}": 1} if step % 3 == 0 else {})})
        if step % 2:
            seen += reader.new()
    assert [int(row["step"]) for row in seen] == list(range(20))
    assert reader.count == 20
    assert reader.new() == []
    with file.path.open("a") as raw:
        raw.write("20,,")
        raw.flush()
        assert reader.new() == []
        raw.write(",,,,,\n")
    assert [row["step"] for row in reader.new()] == ["20"]
    # Rows that are made again were read before.
    file.truncate(17)
    assert reader.new() == []
    for step in range(18, 23):
        file.append({"step": step})
    assert [row["step"] for row in reader.new()] == ["21", "22"]


def test_numbers_of_a_row():
    assert as_numbers({"step": "7", "a": "", "b": "-0.5", "c": "1e+10", "d": "nan"}) == pytest.approx(
        {"step": 7, "b": -0.5, "c": 1e10, "d": float("nan")}, nan_ok=True
    )
    with pytest.raises(ValueError, match="could not convert"):
        as_numbers({"a": "b"})


@pytest.mark.parametrize(
    ("step", "validated", "kept"),
    [(2, True, 6), (2, False, 4), (1, True, 2), (1, False, 2), (0, True, 0), (9, True, 7)],
)
def test_a_resumed_run_drops_what_it_makes_again(tmp_path, step, validated, kept):
    file = MetricsFile(tmp_path / "metrics.csv", ["step", "train/loss", "val/robust_accuracy"])
    rows = [{"step": 0}, {"step": 1, "train/loss": 1}, {"step": 2, "train/loss": 2}, {"step": 2, "weights/value": 1}]
    rows += [{"step": 2, "val/robust_accuracy": 0.5}, {"step": 2, "train/epoch_loss": 1}, {"step": 3, "train/loss": 3}]
    for row in rows:
        file.append(row)
    logger = CSVLogger(tmp_path, ["step"])
    assert logger.truncate(step, validated=validated) == kept
    assert cells(file.path) == [{name: str(value) for name, value in row.items()} for row in rows[:kept]]


# --- the logger --------------------------------------------------------------------------------------------


def test_a_stock_trainer_writes_the_values_that_lightnings_own_logger_writes(tmp_path):
    """The oracle is Lightning's CSVLogger, in the same Trainer."""
    ours, oracle = CSVLogger(tmp_path / "run"), pl.loggers.CSVLogger(tmp_path, name="oracle", version="")
    fit([ours, oracle])
    found, wanted = cells(tmp_path / "run" / "metrics.csv"), cells(tmp_path / "oracle" / "metrics.csv")
    assert len(found) == len(wanted) == 18
    for one, other in zip(found, wanted, strict=True):
        assert {k: float(c) for k, c in one.items()} == pytest.approx({k: float(c) for k, c in other.items()}, rel=1e-7)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        header = file.readline().strip().split(",")
    assert header == [*standard_columns(), "count_step", "count_epoch", "late"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]
    assert ours.log_dir == ours.save_dir == str(tmp_path / "run")


def test_two_loggers_of_ours_write_the_same_into_their_own_directories(tmp_path):
    trainer = fit([CSVLogger(tmp_path / "a", standard_columns(2)), CSVLogger(tmp_path / "b", ["step"])], epochs=1)
    assert trainer.logger is trainer.loggers[0]
    assert cells(tmp_path / "a" / "metrics.csv") == cells(tmp_path / "b" / "metrics.csv") != []
    assert "lambda/1" in read_rows(tmp_path / "a" / "metrics.csv")[0]


def test_each_row_is_on_the_disk_when_the_call_returns_in_eight_digits(tmp_path):
    logger = CSVLogger(tmp_path, ["epoch", "step", "seconds"])
    logger.log_hyperparams({"eps": 0.1})
    assert list(tmp_path.iterdir()) == []
    logger.log_metrics({"loss": 1 / 3, "epoch": 2}, 7)
    assert cells(tmp_path / "metrics.csv") == [{"epoch": "2", "step": "7", "loss": "0.33333333"}]
    logger.log_metrics({"loss": torch.tensor(0.5)})
    assert cells(tmp_path / "metrics.csv")[1] == {"step": "1", "loss": "0.5"}
    assert logger.experiment is logger.file
    logger.finalize("success")


def test_the_clock_goes_on_over_sessions(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    seconds = lambda: [float(row["seconds"]) for row in read_rows(tmp_path / "metrics.csv")]  # noqa: E731
    logger = CSVLogger(tmp_path)
    now[0] = 150
    assert logger.truncate(0) == 0
    for step in range(4):
        now[0] += 10
        logger.log_metrics({"train/loss": 1.0, "member_updates": step}, step)
    assert seconds() == [10, 20, 30, 40]
    now[0] = 1000
    again = CSVLogger(tmp_path)
    now[0] = 1500
    assert again.truncate(1) == 2
    now[0] = 1501
    again.log_metrics({"train/loss": 1.0}, 2)
    assert seconds() == [10, 20, 21]
    # Nobody truncates where a stock Trainer goes on: the clock then runs from the logger's start.
    third = CSVLogger(tmp_path)
    now[0] = 1504
    third.log_metrics({"train/loss": 1.0}, 3)
    assert seconds() == [10, 20, 21, 24]


def test_a_new_logger_keeps_the_file_that_is_there(tmp_path):
    fit(CSVLogger(tmp_path), epochs=1)
    before = cells(tmp_path / "metrics.csv")
    CSVLogger(tmp_path)
    assert cells(tmp_path / "metrics.csv") == before
    fit(CSVLogger(tmp_path), epochs=1)
    assert cells(tmp_path / "metrics.csv") == before + before


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 1.0}, 1)
    logger.experiment.append({"step": 1})
    assert logger.truncate(3) == 0
    assert list(tmp_path.iterdir()) == []


# --- the settings ------------------------------------------------------------------------------------------


def test_settings_are_numbers_and_names_and_nothing_is_lost():
    cfg = {
        "eps": "8/255",
        "L": 2,
        "task": "train",
        "members": [],
        "loss": {"_target_": "mixadv.losses.AT"},
        "lambda_solver": {"_target_": "mixadv.lambda_solvers.AcceleratedEntropic", "alpha": 0.01},
        "threat_model": {"norm": "linf"},
        "trainer": {"max_epochs": 3},
    }
    choices = {
        "loss": "at",
        "lambda_solver": "entropic",
        "threat_model": "linf",
        "experiment": None,
        "launch": "serial",
    }
    flat = flat_config(cfg, {**choices, "hydra/launcher": "basic", "task": "train"}, 8 / 255)
    settings = flat.pop("settings")
    assert flat == {
        **{"eps": 8 / 255, "L": 2, "task": "train", "members": [], "launch": "serial"},
        **{"loss": "at", "lambda_solver": "entropic", "threat_model": "linf"},
    }
    assert {**flat, **settings} == {**cfg, "launch": "serial"}


PROBE = """
import sys
import mixadv.loggers
print([name for name in ("torch", "pytorch_lightning", "wandb") if name in sys.modules])
import mixadv.metrics_file, mixadv.loggers.hyperparameters
print([name for name in ("torch", "pytorch_lightning", "wandb") if name in sys.modules])
import mixadv.loggers.csv, mixadv.loggers.wandb
print([name for name in ("pytorch_lightning", "wandb") if name in sys.modules])
"""


def test_wandb_is_imported_only_where_it_is_used(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    answer = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert answer.stdout.splitlines() == ["[]", "[]", "['pytorch_lightning']"]


def test_the_epochs_of_callbacks_do_not_stand_beside_those_of_a_mixture(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"epoch": 0.5, "member_updates": 3}, 1)
    logger.log_metrics({"epoch": 0, "distance": 2.0}, 1)
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.csv")] == ["0.5", ""]
