"""Weights & Biases as a logger: what its files and a service on this machine hold, and that it may fail."""

import contextlib
import csv
import dataclasses
import fnmatch
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
import pytorch_lightning as pl
import torch
import wandb
import yaml
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from torch.utils.data import DataLoader

from builders.runs import read_metrics
from conftest import OUTSIDE, QUIET, TINY
from mixadv.errors import UserError
from mixadv.loggers import wandb_link
from mixadv.loggers.csv import CSVLogger
from mixadv.loggers.wandb import WandbLogger
from mixadv.loggers.wandb_link import ID_FILE, SUPERSEDED
from mixadv.metrics_file import MetricsFile
from mixadv.results import Accuracy, AttackResult, Classifier, Results
from mixadv.training import MixtureTraining
from wandb_service import BLOCK, Offline, Service

SECRET = "0123456789abcdef" * 2 + "01234567"
ROOT = Path(__file__).resolve().parents[1]
IMAGE = np.zeros((1, 1, 4, 4), np.float32)
RESULTS = Results(clean=Accuracy(0.5), ensemble_accuracy=0.5, robust=Accuracy(0.5))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """mirror(name, **arguments): a connected logger in its own run directory; closed at the end if the test forgot."""
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    started, consoles = [], []

    def start(name="a", config=None, **arguments):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        consoles.append(Console(file=io.StringIO(), width=200))
        made = WandbLogger(folder, **{"project": "p", "name": name, **arguments}, console=consoles[-1])
        started.append(made)
        made.log_hyperparams(config or {})
        return made

    yield start
    for made in started:
        # Of some the process is gone.
        with contextlib.suppress(Exception):
            made.run.finish(exit_code=0)


@pytest.fixture
def service(monkeypatch):
    """A service that answers, and whose key the environment has."""
    running = Service()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", running.url)
    # Of an earlier service.
    wandb.teardown()
    yield running
    wandb.teardown()
    running.close()


def said(made):
    return made._link.console.file.getvalue()


def warnings_of(made):
    return [
        line for line in said(made).splitlines() if "local files are complete" in line or "continuing offline" in line
    ]


def play(made, folder, rows):
    """What the Trainer does with two loggers: each row goes to metrics.csv, then to Weights & Biases."""
    file = MetricsFile(folder / "metrics.csv", ["step", "train/loss", "val/robust_accuracy"])
    for row in rows:
        file.append(row)
        made.log_metrics({name: value for name, value in row.items() if name != "step"}, row["step"])


def truncate(folder, count):
    """What the first logger does when a run goes on: keep the rows up to the checkpoint."""
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[: count + 1]))


def losses(start, stop, session=0):
    """Rows whose loss tells the session that wrote them."""
    return [{"step": t, "train/loss": t + session / 4} for t in range(start, stop)]


# --- through the command line ------------------------------------------------------------------------------


def test_offline_files_hold_the_curves_of_mixture_and_baseline_and_no_secret(command, tmp_path):
    argv = [*(text for text in TINY if text != "logger=csv"), "L=3", "baseline=true", "name=mirrored"]
    finished = command(*argv, WANDB_MODE="offline", WANDB_API_KEY=SECRET, WANDB_PROJECT="curves")
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / "train" / "mirrored"
    offline = Offline(path)
    for folder, prefix, members in ((path, "", 3), (path / "baseline", "baseline/", 1)):
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        columns = ["step", "epoch", "val/clean_accuracy", "val/robust_accuracy", "train/loss"]
        columns += [f"lambda/{k}" for k in range(members)]
        columns += ["weights/value"] if members > 1 else []
        for column in columns:
            kept = [float(row[column]) for row in rows if row[column]]
            assert kept, column
            assert offline.column(prefix + column) == pytest.approx(kept, rel=1e-6), prefix + column
    assert len(offline.column("lambda/2")) > 5

    results = json.loads((path / "results.json").read_text())
    assert offline.summary["test/robust_accuracy"] == results["robust"]["expected_accuracy"]
    assert offline.summary["test/clean_accuracy"] == results["clean"]["expected_accuracy"]
    assert offline.config["L"] == 3
    assert offline.config["eps"] == 0.05
    assert (offline.config["loss"], offline.config["data"], offline.config["model"]) == ("at", "digits", "linear")
    assert offline.config["settings"]["data"] == yaml.safe_load((path / "config.yaml").read_text())["data"]
    table = next(row for row in offline.history if "examples/nrows" in row)
    assert (table["examples/_type"], table["examples/nrows"], table["examples/ncols"]) == ("table-file", 8, 5)
    assert (offline.run.project, offline.run.display_name, offline.run.run_group) == ("curves", "mirrored", "")
    assert offline.exit_code == 0

    run_id = (path / ID_FILE).read_text().strip()
    assert offline.run.run_id == run_id
    assert "wandb sync outputs/train/mirrored/wandb/offline-run-" in finished.out
    assert finished.out.count("wandb sync") == 1
    for file in path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert not (tmp_path / "wandb").exists()


def test_a_sweep_makes_one_run_each_in_one_group_and_a_crash_shows(command, tmp_path):
    argv = [text for text in TINY if text not in ("logger=csv", "eps=0.05")]
    argv += ["logger.wandb.images=0", "trainer.max_epochs=1", "name=swept"]
    finished = command("-m", "optimizer.lr=0.1,1e30", "eps=0.05", *argv)
    assert finished.rc == 1
    assert "Traceback" not in finished.out + finished.err
    folders = sorted(path.parent for path in (tmp_path / "outputs" / "sweeps" / "swept").glob("*/config.yaml"))
    runs = [Offline(folder) for folder in folders]
    assert [offline.run.run_group for offline in runs] == ["swept", "swept"]
    assert len({offline.run.run_id for offline in runs}) == 2
    assert [offline.run.run_id for offline in runs] == [(folder / ID_FILE).read_text().strip() for folder in folders]
    by_rate = {offline.config["settings"]["optimizer"]["lr"]: offline for offline in runs}
    assert by_rate[0.1].exit_code == 0
    assert by_rate[1e30].exit_code == 1
    assert by_rate[0.1].column("val/robust_accuracy")
    # A run holds its own curves, not those of the one before it.
    for offline in runs:
        steps = offline.column("step")
        assert steps == sorted(steps)
        assert steps.count(0) == 1


def test_a_disabled_service_leaves_no_files(command, tmp_path):
    argv = [*(text for text in TINY if text != "logger=csv"), "trainer.max_epochs=1", "name=silent"]
    finished = command(*argv, WANDB_MODE="disabled")
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / "train" / "silent"
    assert (path / "DONE").exists()
    assert not list(path.rglob("*.wandb"))
    assert "wandb sync" not in finished.out


# --- the logger itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", wandb_link.LOCAL_SETTINGS)
def test_wandb_disabled_in_the_working_directory_is_honoured(mirror, tmp_path, monkeypatch, place):
    """`wandb disabled` writes this file; WANDB_MODE goes before it."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    place.parent.mkdir(exist_ok=True)
    place.write_text("[default]\nmode = disabled\nbase_url = http://elsewhere\n", encoding="utf-8")
    made = mirror("off")
    made.log_hyperparams({"L": 2})
    assert (made.mode, made.run, warnings_of(made)) == ("disabled", None, [])
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = mirror("on")
    made.log_hyperparams({"L": 2})
    assert made.mode == "offline"
    made.finish(0)


def test_an_agents_run_has_the_agents_id(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agentrun1")
    made = mirror("agent")
    made.log_hyperparams({"L": 2})
    assert made.run.id == "agentrun1"
    made.finish(0)
    (kept,) = tmp_path.rglob(ID_FILE)
    assert kept.read_text(encoding="utf-8").strip() == "agentrun1"


def test_an_agent_with_a_sweep_of_ours_is_refused_before_any_work(command, tmp_path):
    refused = command("-m", *TINY, "logger=wandb", "seed=1,2", WANDB_SWEEP_ID="sweep1", WANDB_RUN_ID="agentrun1")
    assert refused.rc == 1
    assert refused.err.count("leave -m out") >= 2
    assert not list(tmp_path.rglob("config.yaml"))


def test_the_id_is_kept_and_reused_and_other_runs_get_others(mirror, tmp_path):
    first, second = mirror("a", group="g"), None
    first.finish(0)
    kept = (tmp_path / "a" / ID_FILE).read_text()
    assert kept.strip() == first.run.id
    second = mirror("b")
    second.finish(0)
    assert second.run.id != first.run.id
    again = mirror("a")
    assert again.run.id == first.run.id
    assert (tmp_path / "a" / ID_FILE).read_text() == kept
    assert again.mode == "offline"


def test_values_of_every_kind_arrive_across_many_blocks(mirror, tmp_path):
    made = mirror("long", config={"eps": "8/255", "nested": {"list": [1, 2]}})
    rows = [
        {"step": step, "train/loss": 1 / (step + 1), "lambda/0": 0.25, "val/robust_accuracy": step / 7}
        for step in range(2000)
    ]
    play(made, tmp_path / "long", rows)
    made.finish(3)
    offline = Offline(tmp_path / "long")
    (path,) = (tmp_path / "long").glob("wandb/offline-run-*/run-*.wandb")
    assert path.stat().st_size > 2 * BLOCK
    assert offline.column("step") == list(range(2000))
    assert offline.column("train/loss") == [1 / (step + 1) for step in range(2000)]
    assert offline.column("val/robust_accuracy")[-1] == 1999 / 7
    assert offline.config["nested"] == {"list": [1, 2]}
    assert offline.exit_code == 3


def test_a_baseline_logs_into_the_same_run_under_its_own_names(mirror, tmp_path):
    made = mirror("both")
    play(made, tmp_path / "both", [{"step": 1, "train/loss": 0.5}])
    play(made.baseline(), tmp_path / "both" / "baseline", [{"step": 1, "train/loss": 0.75}])
    made.finish(0)
    offline = Offline(tmp_path / "both")
    assert offline.column("train/loss") == [0.5]
    assert offline.column("baseline/train/loss") == [0.75]
    assert offline.column("baseline/step") == [1]


def test_every_curve_has_one_axis(mirror, monkeypatch, tmp_path):
    defined = []
    columns = ("train/loss", "val/robust_accuracy", "weights/value", "lambda/2", "epoch", "mine")

    class Run:
        id = "x"
        starting_step = 0
        config = property(lambda self: {})

        def define_metric(self, name, step_metric=None, hidden=None):
            defined.append((name, step_metric, hidden))

        def log(self, values, step=None, commit=None):
            pass

        def finish(self, exit_code):
            pass

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    made = mirror("axes")
    row = dict.fromkeys(("step", *columns), 1)
    play(made, tmp_path / "axes", [row, row])
    play(made.baseline(), tmp_path / "axes" / "baseline", [row])
    for column in columns:
        for prefix in ("", "baseline/"):
            axes = {axis for name, axis, hidden in defined if not hidden and fnmatch.fnmatch(prefix + column, name)}
            assert axes == {f"{prefix}step"}, prefix + column


def test_a_failing_service_warns_once_and_never_stops_the_run(mirror, monkeypatch, tmp_path):
    made = mirror("lost")

    def gone(*_, **__):
        raise ConnectionResetError("the service went away")

    monkeypatch.setattr(made.run, "log", gone)
    play(made, tmp_path / "lost", losses(0, 3))
    assert said(made).count("stopped accepting values") == 1
    assert "ConnectionResetError: the service went away" in said(made)
    assert "local files are complete" in said(made)


def test_a_service_lost_for_the_mixture_is_lost_for_its_baseline_too(mirror, monkeypatch, tmp_path):
    made = mirror("lost")
    view = made.baseline()

    def gone(*_, **__):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(made.run, "log", gone)
    play(made, tmp_path / "lost", losses(0, 1))
    play(view, tmp_path / "lost" / "baseline", losses(0, 1))
    assert said(made).count("stopped accepting values") == 1


@pytest.mark.parametrize("call", ["summary", "images", "finish"])
def test_a_failing_service_stops_nothing_at_the_end_either(mirror, monkeypatch, call):
    made = mirror("end")

    def gone(*_, **__):
        raise OSError("no space left on device")

    images = np.zeros((2, 1, 8, 8), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(type(made.run.summary), "update", gone)
        patch.setattr(wandb, "Image", gone)
        patch.setattr(made.run, "finish", gone)
        if call == "summary":
            made.summary(RESULTS)
        elif call == "images":
            made.images(images, images, ["a", "b"], ["none", "0"], 0.1)
        else:
            made.finish(0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_pictures_show_clean_attacked_and_the_scaled_difference(mirror, monkeypatch, channels, eps):
    made = mirror("pictures")
    sent = {}
    monkeypatch.setattr(made.run, "log", lambda values, **_: sent.update(values))
    clean = np.full((2, channels, 4, 4), 0.5, np.float32)
    attacked = clean.copy()
    attacked[0, :, 0, 0], attacked[1, :, 0, 0] = 0.5 + eps, 0.5 - eps
    made.images(clean, attacked, ["cat", "dog"], ["none", "0, 2"], eps)
    table = sent["examples"]
    assert table.columns == ["clean", "adversarial", "difference", "label", "fooled members"]
    for row, (corner, label, fooled) in zip(table.data, ((255, "cat", "none"), (0, "dog", "0, 2")), strict=True):
        assert row[3:] == [label, fooled]
        difference = np.asarray(row[2].image)
        assert difference.shape[:2] == (4, 4)
        assert (difference[0, 0] == (corner if eps else 128)).all()
        assert (difference[1:, 1:] == 128).all()
        assert (np.asarray(row[0].image) == 128).all()


def test_the_baselines_pictures_have_their_own_name(mirror, monkeypatch):
    made = mirror("pictures")
    sent = {}
    monkeypatch.setattr(made.run, "log", lambda values, **_: sent.update(values))
    image = np.zeros((1, 1, 4, 4), np.float32)
    made.baseline().images(image, image, ["cat"], ["none"], 0.1)
    assert list(sent) == ["baseline/examples"]


def test_a_key_is_found_where_wandb_keeps_it(tmp_path, monkeypatch):
    for name in (*OUTSIDE, "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    host = urlsplit(wandb.Settings().base_url).hostname
    assert not wandb_link._has_key()
    (tmp_path / ".netrc").write_text("machine example.org login user password x\n")
    assert not wandb_link._has_key()
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {SECRET}\n")
    assert wandb_link._has_key()
    (tmp_path / ".netrc").write_text("this is no netrc {")
    assert not wandb_link._has_key()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert wandb_link._has_key()


def test_an_unknown_mode_is_refused_in_one_line(mirror, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match="WANDB_MODE=sideways"):
        mirror("mode")


def kill_the_background_process():
    """Of wandb, whatever it is doing."""
    popened = [thing for thing in gc.get_objects() if type(thing) is subprocess.Popen]
    (process,) = [one for one in popened if str(one.args[0]).endswith("wandb-core") and one.poll() is None]
    process.kill()
    process.wait()


# --- faults ------------------------------------------------------------------------------------------------


def failing(status, text="no", path="/graphql"):
    return lambda asked, body: (status, text) if asked.endswith(path) else None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (failing(500), "HTTP 500"),
        (failing(429), "HTTP 429"),
        (failing(401, '{"errors": [{"message": "user [/] is not logged in"}]}'), "401"),
        (failing(403, '{"errors": [{"message": "storage quota exceeded"}]}'), "quota exceeded"),
        (failing(200, "<html>a proxy's page</html>"), "invalid character"),
        (None, "connection refused"),
    ],
    ids=["server error", "too many requests", "refused", "quota", "proxy", "nobody there"],
)
def test_a_service_that_cannot_be_had_goes_on_offline_with_one_line(mirror, service, tmp_path, capfd, fault, reason):
    if fault is None:
        service.close()
    else:
        service.fail = fault
    made = mirror("cut", init_timeout=1)
    assert made.mode == "offline"
    (line,) = said(made).splitlines()
    assert line.startswith("Weights & Biases cannot be reached (")
    assert line.endswith("); continuing offline")
    assert reason in line
    play(made, tmp_path / "cut", losses(0, 3))
    made.finish(0)
    assert len(warnings_of(made)) == 1
    assert "wandb sync" in said(made).splitlines()[-1]
    assert Offline(tmp_path / "cut").column("train/loss") == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_without_a_key_there_is_no_warning(mirror, tmp_path, capfd):
    made = mirror("keyless")
    assert made.mode == "offline"
    made.finish(0)
    (line,) = said(made).splitlines()
    assert line.startswith("Weights & Biases is offline; to upload: wandb sync ")
    assert capfd.readouterr() == ("", "")


def test_rows_arrive_and_nothing_is_said_but_where(mirror, service, tmp_path, capfd):
    made = mirror("well", group="g")
    assert made.mode == "online"
    play(made, tmp_path / "well", losses(0, 5))
    made.finish(0)
    assert service.column("step") == service.column("_step") == list(range(5))
    assert service.column("train/loss") == [0, 1, 2, 3, 4]
    (end,) = service.ended
    assert end["exitcode"] == 0
    (line,) = said(made).splitlines()
    assert line.startswith("Weights & Biases: http")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_service_that_takes_no_more_is_told_once_and_the_disk_has_everything(
    mirror, service, tmp_path, capfd, status
):
    made = mirror("quota")
    service.fail = failing(status, '{"error": "storage quota exceeded"}', "/file_stream")
    play(made, tmp_path / "quota", losses(0, 50))
    made.finish(0)
    assert len(warnings_of(made)) == 1, said(made)
    assert "is not complete; to upload: wandb sync " in said(made).splitlines()[-1]
    assert Offline(tmp_path / "quota", "wandb/run-*").column("step") == list(range(50))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", ["server error", "nobody there"])
def test_a_service_that_goes_away_is_waited_for_no_longer_than_asked(mirror, service, tmp_path, capfd, fault):
    made = mirror("gone", finish_timeout=1)
    if fault == "server error":
        service.fail = failing(500, path="/file_stream")
    else:
        service.close()
    play(made, tmp_path / "gone", losses(0, 50))
    started = time.monotonic()
    made.finish(0)
    assert time.monotonic() - started < 8
    assert len(warnings_of(made)) == 1, said(made)
    assert "wandb sync" in said(made).splitlines()[-1]
    assert Offline(tmp_path / "gone", "wandb/run-*").column("step") == list(range(50))
    assert capfd.readouterr() == ("", "")
    # The next run of a sweep is one of its own.
    after = mirror("after", init_timeout=1, finish_timeout=1)
    play(after, tmp_path / "after", losses(0, 2, session=1))
    after.finish(0)
    assert after.run.id != made.run.id
    pattern = f"wandb/{'run' if after.mode == 'online' else 'offline-run'}-*"
    assert Offline(tmp_path / "after", pattern).column("train/loss") == [0.25, 1.25]


def test_a_background_process_that_dies_is_told_once_and_the_next_run_has_another(mirror, tmp_path, capfd):
    made = mirror("dead")
    play(made, tmp_path / "dead", losses(0, 3))
    kill_the_background_process()
    play(made, tmp_path / "dead", losses(3, 300))
    made.images(IMAGE, IMAGE, ["cat"], ["none"], 0.1)
    made.summary(RESULTS)
    made.finish(0)
    assert len(warnings_of(made)) == 1, said(made)
    after = mirror("after")
    play(after, tmp_path / "after", losses(0, 2))
    after.finish(0)
    assert warnings_of(after) == []
    assert Offline(tmp_path / "after").column("step") == [0, 1]
    assert capfd.readouterr() == ("", "")
    again = mirror("dead")
    play(again, tmp_path / "dead", losses(300, 301))
    again.finish(0)
    assert Offline(tmp_path / "dead").column("step") == list(range(301))


def test_a_run_that_was_lost_is_closed_before_the_next(mirror, monkeypatch, tmp_path):
    first = mirror("first", group="g")
    with monkeypatch.context() as patch:
        patch.setattr(first.run, "log", lambda *_, **__: 1 / 0)
        play(first, tmp_path / "first", losses(0, 2))
    second = mirror("second", group="g")
    play(second, tmp_path / "second", losses(0, 2))
    first.finish(1)
    second.finish(0)
    assert "ZeroDivisionError" in warnings_of(first)[0]
    runs = [Offline(tmp_path / name) for name in ("first", "second")]
    assert [run.exit_code for run in runs] == [1, 0]
    assert [run.run.run_group for run in runs] == ["g", "g"]
    assert [run.column("step") for run in runs] == [[], [0, 1]]


@pytest.mark.parametrize("key", ["", SECRET])
def test_where_wandb_cannot_even_write_it_goes_on_without(mirror, monkeypatch, tmp_path, key):
    def broken(**_):
        raise OSError(28, "No space left on [/]device\x1b[2J\nand more")

    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr(wandb, "init", broken)
    made = mirror("full")
    for view in (made, made.baseline()):
        play(view, tmp_path / "full", losses(0, 2))
        view.images(IMAGE, IMAGE, ["cat"], ["none"], 0.1)
        view.summary(RESULTS)
    made.finish(0)
    (line,) = said(made).splitlines()
    reason = "[Errno 28] No space left on [/]device [2J and more"
    assert line == f"Weights & Biases cannot be used ({reason}); the local files are complete"


# --- stopped and continued ---------------------------------------------------------------------------------


def test_offline_the_last_session_holds_the_whole_run_once(mirror, tmp_path):
    folder = tmp_path / "a"
    first = mirror("a")
    play(first, folder, losses(0, 8))
    first.finish(128 + signal.SIGTERM)
    before = Offline(folder)
    assert before.exit_code == 143
    assert before.preempting
    # The checkpoint was written after step 4: what followed is made again.
    truncate(folder, 5)
    second = mirror("a")
    assert warnings_of(second) == []
    play(second, folder, losses(5, 11, session=1))
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    second.finish(0)
    after = Offline(folder)
    assert after.run.run_id == before.run.run_id
    assert after.numbers == after.column("step") == list(range(11))
    assert after.column("train/loss") == [*range(5), *(t + 0.25 for t in range(5, 11))]
    assert after.exit_code == 0
    assert not after.preempting
    assert after.folder != before.folder
    # Uploading the older one would replace the whole run by its beginning.
    assert Offline(folder, f"wandb/{SUPERSEDED}/offline-run-*").column("step") == list(range(8))


KILLED = """
import csv, io, os, signal, sys
from pathlib import Path
from rich.console import Console
from mixadv.loggers.wandb import WandbLogger
folder = Path(sys.argv[1])
mirror = WandbLogger(folder, project="p", name="a", init_timeout=30, console=Console(file=io.StringIO()))
mirror.log_hyperparams({})
assert mirror.mode == sys.argv[2], mirror.mode
with (folder / "metrics.csv").open("w") as file:
    file.write("step,train/loss,val/robust_accuracy\\n")
    for step in range(8):
        file.write(f"{step},{step},\\n")
        file.flush()
        mirror.log_metrics({"train/loss": step}, step)
    file.write("8,0.1")
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder, mode):
    folder.mkdir()
    # A program of its own has a background process of its own.
    environment = {name: value for name, value in os.environ.items() if "WANDB_SERVICE" not in name}
    environment["PYTHONPATH"] = str(ROOT / "src")
    answer = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), mode], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == -signal.SIGKILL, answer.stderr


def test_offline_a_killed_run_goes_on_as_one(mirror, tmp_path):
    folder = tmp_path / "a"
    killed(folder, "offline")
    truncate(folder, 5)
    second = mirror("a")
    assert warnings_of(second) == []
    play(second, folder, losses(5, 11, session=1))
    second.finish(0)
    after = Offline(folder)
    assert after.column("step") == after.numbers == list(range(11))
    assert after.column("train/loss") == [*range(5), *(t + 0.25 for t in range(5, 11))]
    assert len(list(folder.glob(f"wandb/{SUPERSEDED}/offline-run-*"))) == 1


def test_online_a_killed_run_goes_on_as_one(mirror, service, tmp_path):
    folder = tmp_path / "a"
    killed(folder, "online")
    arrived = len(service.history)
    truncate(folder, 5)
    second = mirror("a")
    assert warnings_of(second) == []
    assert second.mode == "online"
    play(second, folder, losses(5, 11, session=1))
    second.finish(0)
    assert service.column("_step") == service.column("step") == list(range(11))
    kept = max(5, arrived)
    assert service.column("train/loss") == [*range(kept), *(t + 0.25 for t in range(kept, 11))]


@pytest.mark.parametrize("arrived", [8, 6, 5, 3, 0])
def test_online_the_service_gets_what_it_has_not_got(mirror, service, tmp_path, arrived):
    folder = tmp_path / "a"
    first = mirror("a")
    play(first, folder, losses(0, 8))
    first.finish(128 + signal.SIGUSR1)
    assert service.preempting
    assert service.ended[-1]["exitcode"] == 138
    # The last uploads were lost on the way.
    service.forget(arrived)
    truncate(folder, 5)
    second = mirror("a")
    assert warnings_of(second) == []
    play(second, folder, losses(5, 11, session=1))
    second.finish(0)
    # Steps that had arrived keep the values of the first session.
    assert service.column("_step") == service.column("step") == list(range(11))
    old = max(5, arrived)
    assert service.column("train/loss") == [*range(old), *(t + 0.25 for t in range(old, 11))]
    assert len(second.run.id) == 8
    assert said(second).count("\n") == 1


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_stopped_in_the_baseline_the_mixture_is_there_once(mirror, request, tmp_path, mode, images):
    service = request.getfixturevalue("service") if mode == "online" else None
    folder = tmp_path / "a"

    def finished_mixture(made):
        made.summary(RESULTS)
        if images:
            made.images(IMAGE, IMAGE, ["cat"], ["none"], 0.1)

    first = mirror("a")
    play(first, folder, losses(0, 4))
    finished_mixture(first)
    play(first.baseline(), folder / "baseline", losses(0, 6))
    first.finish(130)
    truncate(folder / "baseline", 3)
    second = mirror("a")
    assert warnings_of(second) == []
    finished_mixture(second)
    single = second.baseline()
    play(single, folder / "baseline", losses(3, 7, session=1))
    if images:
        single.images(IMAGE, IMAGE, ["cat"], ["none"], 0.1)
    second.finish(0)
    rows = service.history if service else Offline(folder).history
    assert [row["_step"] for row in rows] == [*range(4), *([4] if images else []), *range(5, 12), *([12] * images)]
    names = ("examples", "baseline/examples")
    tables = [(row["_step"], name) for row in rows for name in names if any(key.startswith(name) for key in row)]
    assert tables == ([(4, "examples"), (12, "baseline/examples")] if images else [])
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [0, 1, 2, 3]
    steps = [(row["baseline/step"], row["baseline/train/loss"]) for row in rows if "baseline/train/loss" in row]
    kept = 6 if service else 3
    assert steps == [(t, t + (t >= kept) / 4) for t in range(7)]


def test_offline_first_and_online_later_is_one_whole_run(mirror, service, monkeypatch, tmp_path):
    folder = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        first = mirror("a")
        play(first, folder, losses(0, 4))
        first.finish(1)
    assert service.history == []
    truncate(folder, 3)
    second = mirror("a")
    assert warnings_of(second) == []
    play(second, folder, losses(3, 6, session=1))
    second.finish(0)
    assert service.column("step") == list(range(6))
    assert list(folder.glob("wandb/offline-run-*")) == []


def test_a_session_that_sends_no_row_still_holds_the_run(mirror, tmp_path):
    folder = tmp_path / "a"
    first = mirror("a")
    play(first, folder, losses(0, 4))
    play(first.baseline(), folder / "baseline", losses(0, 3))
    first.finish(143)
    second = mirror("a")
    assert warnings_of(second) == []
    second.baseline()
    second.finish(143)
    after = Offline(folder)
    assert after.column("step") == [0, 1, 2, 3]
    assert after.column("baseline/step") == [0, 1, 2]


# --- in a stock Trainer ------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    """Two layers; logs each step under the training's names."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 2, "callable": max})
        self.layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Chatty(pl.Callback):
    """Logs by itself, with a step of its own and without, as callbacks of others do."""

    def on_train_start(self, trainer, pl_module):
        for logger in trainer.loggers[-1:]:
            logger.experiment.log({"early": 1})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logger = trainer.loggers[-1]
        logger.experiment.log({"theirs": batch_idx}, step=1000 + batch_idx)
        if batch_idx == 1:
            logger.log_image("picture", [np.zeros((4, 4, 3), np.uint8)])
            logger.experiment.log({"other": 5})


def fit(loggers, *callbacks, epochs=2, **arguments):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        **{**QUIET, "logger": loggers, **arguments}, max_epochs=epochs, log_every_n_steps=1, callbacks=list(callbacks)
    )
    trainer.fit(Module(), DataLoader(torch.arange(16.0).reshape(8, 2) / 16, 2))
    return trainer


def test_behind_the_csv_logger_a_stock_trainer_sends_each_row_once_whatever_others_log(mirror, tmp_path):
    folder = tmp_path / "stock"
    made = mirror("stock", config={"eps": 0.5})
    fit([CSVLogger(folder), made], Chatty(), LearningRateMonitor("step"))
    # A fit is not the end of the run.
    made.summary(RESULTS)
    made.finish(0)
    offline = Offline(folder)
    same_rows(offline, folder)
    count = len(read_metrics(folder))
    assert offline.numbers == list(range(count))
    assert offline.column("theirs") == [0, 1, 2, 3] * 2
    assert (offline.column("early"), offline.column("other")) == ([1], [5, 5])
    assert [row["_step"] for row in offline.history if "picture/_type" in row] == [
        row["_step"] for row in offline.history if "other" in row
    ]
    assert offline.summary["test/robust_accuracy"] == 0.5
    assert offline.config["eps"] == 0.5
    assert offline.config["width"] == 2
    assert offline.exit_code == 0
    assert warnings_of(made) == []
    # Behind the end there is nobody.
    made.experiment.log({"late": 1})
    made.log_metrics({"late": 1}, 3)
    made.finish(1)


def test_alone_it_sends_what_a_stock_trainer_gives_it(mirror, tmp_path):
    made = mirror("alone")
    fit(made)
    made.experiment.log({"theirs": 1})
    made.images(IMAGE, IMAGE, ["cat"], ["none"], 0.1)
    made.finish(0)
    offline = Offline(tmp_path / "alone")
    assert offline.column("trainer/global_step") == list(range(8))
    assert len(offline.column("train/loss")) == 8
    assert offline.column("theirs") == [1]
    assert any("examples/nrows" in row for row in offline.history)
    assert warnings_of(made) == []


def test_it_connects_when_it_is_used_and_never_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("connected"))
    made = WandbLogger(tmp_path)
    assert (made.run, made.name, made.version, made.save_dir) == (None, "mixadv", None, str(tmp_path))
    made.finish(0)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    made.log_hyperparams({"eps": 1})
    made.log_metrics({"a": 1}, 1)
    made.experiment.log({"a": 1})
    made.log_graph(Module())
    made.finish(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("watch", ["all", {"log": "gradients", "log_freq": 2}])
def test_a_watched_module_shows_its_gradients_beside_the_rows(mirror, tmp_path, watch):
    folder = tmp_path / "watched"
    made = mirror("watched", watch={"log": watch, "log_freq": 2} if isinstance(watch, str) else watch)
    fit([CSVLogger(folder), made])
    made.finish(0)
    offline = Offline(folder)
    names = {key.split("/layer")[0].split("/graph")[0] for row in offline.history for key in row}
    assert ("gradients" in names, "parameters" in names) == (True, watch == "all")
    same_rows(offline, folder)
    assert warnings_of(made) == []
    assert wandb.run is None


def test_a_watched_module_trains_on_where_the_background_process_dies(mirror, tmp_path, capfd):
    folder = tmp_path / "watched"
    made = mirror("watched", watch={"log_freq": 1})

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                kill_the_background_process()

    trainer = fit([CSVLogger(folder), made], Kill(), Chatty(), epochs=40)
    made.finish(0)
    assert trainer.global_step == 160
    assert len(read_metrics(folder)) == 160
    assert len(warnings_of(made)) == 1, said(made)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("log_model", [True, "all"])
def test_models_go_to_the_service_by_lightnings_own_way(mirror, service, tmp_path, monkeypatch, log_model):
    made = mirror("models", log_model=log_model)
    sent = []
    monkeypatch.setattr(made.run, "log_artifact", lambda artifact, aliases: sent.append((artifact.name, aliases)))
    checkpoints = ModelCheckpoint(tmp_path / "kept", monitor="train/loss", every_n_epochs=1)
    fit([CSVLogger(tmp_path / "models"), made], checkpoints, enable_checkpointing=True)
    assert sent[-1] == (f"model-{made.version}", ["latest", "best"])
    assert len(sent) == (1 if log_model is True else 2)
    # The single model beside it is another artifact.
    again = ModelCheckpoint(tmp_path / "kept" / "baseline", monitor="train/loss")
    fit([CSVLogger(tmp_path / "models" / "baseline"), made.baseline()], again, enable_checkpointing=True)
    assert sent[-1][0] == f"baseline-{made.version}"
    made.finish(0)
    assert warnings_of(made) == []


def test_models_that_the_service_refuses_stop_nothing(mirror, service, tmp_path, capfd):
    made = mirror("models", log_model=True)
    checkpoints = ModelCheckpoint(tmp_path / "kept")
    trainer = fit([CSVLogger(tmp_path / "models"), made], checkpoints, enable_checkpointing=True)
    made.finish(0)
    assert trainer.global_step == 8
    assert any("CreateArtifact" in text for text in service.received)
    assert len(service.column("train/loss")) == 8
    assert capfd.readouterr().out == ""


def test_offline_no_model_is_kept(mirror, tmp_path, monkeypatch):
    made = mirror("models", log_model="all")
    monkeypatch.setattr(made.run, "log_artifact", lambda *_, **__: pytest.fail("kept"))
    fit([CSVLogger(tmp_path / "models"), made], ModelCheckpoint(tmp_path / "kept"), enable_checkpointing=True)
    made.finish(0)
    assert warnings_of(made) == []


def test_a_lost_service_leaves_a_dummy(mirror, monkeypatch, tmp_path):
    made = mirror("lost")
    monkeypatch.setattr(made.run, "log", lambda *_, **__: 1 / 0)
    play(made, tmp_path / "lost", losses(0, 1))
    assert made.experiment.anything("goes") is None
    fit([CSVLogger(tmp_path / "lost"), made], Chatty())
    assert len(warnings_of(made)) == 1


# --- results without a training ----------------------------------------------------------------------------


def test_results_are_tables_and_figures(mirror, tmp_path):
    made = mirror("results", config={"eps": 0.1})
    picture = tmp_path / "curves.png"
    PIL.Image.new("RGB", (4, 4)).save(picture)
    results = dataclasses.replace(
        RESULTS,
        members=(Classifier(0.75, Accuracy(0.25)), Classifier(0.5, Accuracy(0.125))),
        averaged_twin=Classifier(0.8, Accuracy(0.2)),
        attacks={"pgd-20": AttackResult(0.6)},
    )
    made.summary(results)
    made.log_results(results, [picture, tmp_path / "missing.png"])
    made.images(IMAGE, IMAGE, ["cat"], ["none"], 0.1)
    made.finish(0)
    offline = Offline(tmp_path / "results")
    (row,) = offline.history
    assert row["_step"] == 0
    assert (row["results/nrows"], row["attacks/nrows"], row["examples/nrows"]) == (4, 1, 1)
    assert row["figures/curves/_type"] == "image-file"
    assert not any("missing" in key for key in row)
    (path,) = offline.folder.glob("files/media/table/results_*.json")
    assert json.loads(path.read_text())["data"] == [
        ["mixture", 0.5, 0.5],
        ["member 0", 0.75, 0.25],
        ["member 1", 0.5, 0.125],
        ["averaged twin", 0.8, 0.2],
    ]
    assert offline.summary["test/robust_accuracy"] == 0.5
    assert warnings_of(made) == []


def test_results_that_cannot_be_sent_stop_nothing(mirror, monkeypatch):
    made = mirror("results")
    monkeypatch.setattr(wandb, "Table", lambda **_: 1 / 0)
    made.log_results(RESULTS)
    assert "did not accept the tables (ZeroDivisionError" in said(made)
    made.summary(RESULTS)
    made.finish(0)


# --- settings ----------------------------------------------------------------------------------------------


def test_names_of_the_constructor_and_of_the_environment_arrive(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NOTES", "from the shell")
    monkeypatch.setenv("WANDB_PROJECT", "shell")
    # It reads its environment once.
    wandb.teardown()
    arguments = {"project": None, "tags": ("a", "b"), "group": "g", "job_type": "train", "id": "abcd1234"}
    made = mirror("named", **arguments, settings={"x_stats_sampling_interval": 30.0})
    assert made.run.settings.x_stats_sampling_interval == 30
    made.finish(0)
    run = Offline(tmp_path / "named").run
    assert (list(run.tags), run.run_group, run.job_type, run.run_id) == (["a", "b"], "g", "train", "abcd1234")
    assert (run.notes, run.project) == ("from the shell", "shell")
    monkeypatch.setenv("WANDB_TAGS", "c,d")
    wandb.teardown()
    other = mirror("other")
    other.finish(0)
    assert list(Offline(tmp_path / "other").run.tags) == ["c", "d"]
    wandb.teardown()


def test_offline_may_be_said_by_the_constructor(mirror, service, tmp_path):
    made = mirror("said", offline=True)
    assert made.mode == "offline"
    assert service.received == []


# --- stopped and continued, through the command line ---------------------------------------------------------

# Weights phases, members' rows and validations; batches t = 1 to 8 or more, two epochs.
STOPPED = (
    "logger=wandb",
    "logger.wandb.images=2",
    "trainer.log_every_n_steps=2",
    "callbacks.checkpoint.every_n_train_steps=6",
    "L=3",
)


def same_rows(offline, folder, prefix=""):
    """The rows sent are those of metrics.csv, in their order."""
    rows = [row for row in offline.history if f"{prefix}step" in row and not any("examples" in key for key in row)]
    found = [{key.removeprefix(prefix): row[key] for key in row if key.startswith(prefix)} for row in rows]
    kept = read_metrics(folder)
    assert len(found) == len(kept)
    for one, other in zip(found, kept, strict=True):
        assert {key: one[key] for key in other} == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        pytest.param((7,), "SIGTERM", id="once"),
        pytest.param((3, 14), "SIGINT", id="twice", marks=pytest.mark.slow),
    ],
)
def test_a_command_that_is_stopped_and_given_again_makes_one_run(command, tmp_path, where, name):
    argv = [*(text for text in TINY if text != "logger=csv"), *STOPPED, "name=stopped"]
    folder = tmp_path / "outputs" / "train" / "stopped"
    original = MixtureTraining.on_train_batch_end
    for step in where:

        def stop_after(self, *arguments, step=step):
            original(self, *arguments)
            if self.t == step:
                os.kill(os.getpid(), getattr(signal, name))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MixtureTraining, "on_train_batch_end", stop_after)
            finished = command(*argv)
        assert finished.rc == 128 + getattr(signal, name)
        stopped = Offline(folder)
        assert (stopped.exit_code, stopped.preempting) == (finished.rc, True)
    finished = command(*argv)
    assert finished.rc == 0, finished.err
    whole = Offline(folder)
    assert whole.run.run_id == stopped.run.run_id
    assert (whole.exit_code, whole.preempting) == (0, False)
    same_rows(whole, folder)
    assert "test/robust_accuracy" in whole.summary
    assert finished.out.count("wandb sync") == 1
    assert len(list(folder.glob(f"wandb/{SUPERSEDED}/*"))) == len(where)


def test_a_command_stopped_in_its_baseline_still_shows_the_mixture(command, tmp_path):
    argv = [*(text for text in TINY if text != "logger=csv"), *STOPPED, "baseline=true", "name=both"]
    folder = tmp_path / "outputs" / "train" / "both"
    original = MixtureTraining.on_train_batch_end

    def stop_in_the_baseline(self, *arguments):
        original(self, *arguments)
        if self.mixture.num_members == 1 and self.t == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureTraining, "on_train_batch_end", stop_in_the_baseline)
        assert command(*argv).rc == 143
    assert command(*argv).rc == 0
    whole = Offline(folder)
    same_rows(whole, folder)
    same_rows(whole, folder / "baseline", "baseline/")
    results = json.loads((folder / "results.json").read_text())
    assert whole.summary["test/robust_accuracy"] == results["robust"]["expected_accuracy"]
    tables = [name for row in whole.history for name in ("examples", "baseline/examples") if f"{name}/nrows" in row]
    assert tables == ["examples", "baseline/examples"]


def test_a_service_that_fails_all_the_time_leaves_a_whole_run_and_one_warning(command, service, tmp_path):
    service.fail = failing(500)
    argv = [*(text for text in TINY if text != "logger=csv"), "logger.wandb.init_timeout=1", "name=cut"]
    finished = command(*argv, WANDB_API_KEY=SECRET)
    assert finished.rc == 0, finished.err
    assert finished.err == ""
    assert finished.out.count("Weights & Biases cannot be reached (") == 1
    folder = tmp_path / "outputs" / "train" / "cut"
    assert {"DONE", "metrics.csv", "results.json", "records.npz", "mixture", "curves.png"} <= {
        path.name for path in folder.iterdir()
    }
    same_rows(Offline(folder), folder)


@pytest.mark.parametrize("task", ["evaluate", "solve"])
def test_evaluations_and_solutions_arrive_with_tables_and_figures(trained, command, tmp_path, task):
    mixture = trained.path
    argv = [f"task={task}", "logger=wandb", "name=shown", "data.num_test=20", "eps=0.05", "protocol.diagnosed=0"]
    if task == "evaluate":
        argv.append(f"mixture={mixture}")
    else:
        argv += [f"members=[{mixture}]", "lambda_solver=lp", "lambda_solver.num_rounds=1", "data.num_val=40"]
    finished = command(*argv, *(text for text in TINY if text.startswith("protocol.")), WANDB_MODE="offline")
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / task / "shown"
    offline = Offline(path)
    results = json.loads((path / "results.json").read_text())
    assert offline.summary["test/robust_accuracy"] == results["robust"]["expected_accuracy"]
    assert (offline.config["eps"], offline.config["task"]) == (0.05, task)
    shown = next(row for row in offline.history if "results/nrows" in row)
    # The mixture, its members and the averaged twin.
    assert shown["results/nrows"] >= 1 + len(results["members"])
    assert shown["attacks/nrows"] == len(results["attacks"])
    assert any(key.startswith("figures/") for key in shown)
    assert not (path / "metrics.csv").exists()
