"""Weights & Biases as a mirror: what its offline files hold, read back byte by byte, and that it may fail.

An offline file is a 7-byte header and a LevelDB log: 32 KiB blocks of chunks (crc, length, type), whose payloads
are protobuf records.
"""

import csv
import fnmatch
import io
import json
import struct
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import wandb
import yaml
from rich.console import Console
from wandb.proto import wandb_internal_pb2 as pb

from conftest import OUTSIDE, TINY
from mixadv.errors import UserError
from mixadv.monitor import wandb_mirror
from mixadv.monitor.wandb_mirror import ID_FILE, WandbMirror

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
SECRET = "0123456789abcdef" * 2 + "01234567"


def read_records(path):
    """All protobuf records of an offline file; the checksum of every chunk is checked."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, partial, position = [], b"", HEADER
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        payload = data[position + 7 : position + 7 + length]
        if len(payload) < length:
            break
        assert checksum == zlib.crc32(bytes([kind]) + payload), f"damaged chunk at {position}"
        position += 7 + length
        partial = payload if kind in (FULL, FIRST) else partial + payload
        if kind in (FULL, LAST):
            record = pb.Record()
            record.ParseFromString(partial)
            records.append(record)
    return records


def items_of(items):
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


class Offline:
    """The run that an offline file describes."""

    def __init__(self, run_dir):
        (path,) = sorted(Path(run_dir).glob("wandb/offline-run-*/run-*.wandb"))
        # The service closes the file in its own time.
        deadline, records = time.monotonic() + 20, read_records(path)
        while not any(r.WhichOneof("record_type") == "exit" for r in records):
            assert time.monotonic() < deadline, f"{path} was never finished"
            time.sleep(0.02)
            records = read_records(path)
        of_kind = {
            kind: [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]
            for kind in ("history", "run", "summary", "exit", "metric")
        }
        self.history = [items_of(entry.item) for entry in of_kind["history"]]
        self.run = of_kind["run"][0]
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        self.summary = {}
        for entry in of_kind["summary"]:
            self.summary.update(items_of(entry.update))
        self.exit_code = of_kind["exit"][-1].exit_code

    def column(self, name):
        """The values of `name` in the rows of mixture or baseline; the service adds `step` to others."""
        wanted = name.startswith("baseline/")
        rows = [row for row in self.history if any(key.startswith("baseline/") for key in row) == wanted]
        tables = ("examples", "baseline/examples")
        return [row[name] for row in rows if name in row and not any(key.startswith(tables) for key in row)]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """mirror(name, **arguments): a started mirror in its own run directory; closed at the end if the test forgot."""
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    started = []

    def start(name="a", **arguments):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        console = Console(file=io.StringIO(), width=200)
        settings = {"project": "p", "entity": None, "name": name, "group": None, "config": {}, "init_timeout": 10}
        made = WandbMirror(folder, **{**settings, **arguments}, console=console)
        started.append(made)
        return made

    yield start
    for made in started:
        made.run.finish(exit_code=0)


def said(made):
    return made.console.file.getvalue()


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
    assert offline.config["data"] == yaml.safe_load((path / "config.yaml").read_text())["data"]
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
    argv += ["logger.images=0", "schedule.epochs=1", "name=swept"]
    finished = command("-m", "optimizer.lr=0.1,1e30", "eps=0.05", *argv)
    assert finished.rc == 1
    assert "Traceback" not in finished.out + finished.err
    folders = sorted(path.parent for path in (tmp_path / "outputs" / "sweeps" / "swept").glob("*/config.yaml"))
    runs = [Offline(folder) for folder in folders]
    assert [offline.run.run_group for offline in runs] == ["swept", "swept"]
    assert len({offline.run.run_id for offline in runs}) == 2
    assert [offline.run.run_id for offline in runs] == [(folder / ID_FILE).read_text().strip() for folder in folders]
    by_rate = {offline.config["optimizer"]["lr"]: offline for offline in runs}
    assert by_rate[0.1].exit_code == 0
    assert by_rate[1e30].exit_code == 1
    assert by_rate[0.1].column("val/robust_accuracy")
    # A run holds its own curves, not those of the one before it.
    for offline in runs:
        steps = offline.column("step")
        assert steps == sorted(steps)
        assert steps.count(0) == 1


def test_a_disabled_service_leaves_no_files(command, tmp_path):
    argv = [*(text for text in TINY if text != "logger=csv"), "schedule.epochs=1", "name=silent"]
    finished = command(*argv, WANDB_MODE="disabled")
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / "train" / "silent"
    assert (path / "DONE").exists()
    assert not list(path.rglob("*.wandb"))
    assert "wandb sync" not in finished.out


# --- the mirror itself -------------------------------------------------------------------------------------


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
    for step in range(2000):
        made.log({"step": step, "train/loss": 1 / (step + 1), "lambda/0": 0.25, "val/robust_accuracy": step / 7})
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
    made.log({"step": 1, "train/loss": 0.5})
    made.baseline().log({"step": 1, "train/loss": 0.75})
    made.finish(0)
    offline = Offline(tmp_path / "both")
    assert offline.column("train/loss") == [0.5]
    assert offline.column("baseline/train/loss") == [0.75]
    assert offline.column("baseline/step") == [1]


def test_every_curve_has_one_axis(mirror, monkeypatch):
    defined = []

    class Run:
        id = "x"

        def define_metric(self, name, step_metric=None, hidden=None):
            defined.append((name, step_metric, hidden))

        def finish(self, exit_code):
            pass

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    mirror("axes")
    for column in ("train/loss", "val/robust_accuracy", "weights/value", "lambda/2", "epoch"):
        for prefix in ("", "baseline/"):
            axes = {axis for name, axis, hidden in defined if not hidden and fnmatch.fnmatch(prefix + column, name)}
            assert axes == {f"{prefix}step"}, prefix + column


def test_a_failing_service_warns_once_and_never_stops_the_run(mirror, monkeypatch):
    made = mirror("lost")

    def gone(*_, **__):
        raise ConnectionResetError("the service went away")

    monkeypatch.setattr(made.run, "log", gone)
    for step in range(3):
        made.log({"step": step})
    assert said(made).count("stopped taking values") == 1
    assert "ConnectionResetError: the service went away" in said(made)
    assert "local files are complete" in said(made)


def test_a_service_lost_for_the_mixture_is_lost_for_its_baseline_too(mirror, monkeypatch):
    made = mirror("lost")
    view = made.baseline()

    def gone(*_, **__):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(made.run, "log", gone)
    made.log({"step": 0})
    view.log({"step": 0})
    assert said(made).count("stopped taking values") == 1


@pytest.mark.parametrize("call", ["summary", "images", "finish"])
def test_a_failing_service_stops_nothing_at_the_end_either(mirror, monkeypatch, call):
    made = mirror("end")

    def gone(*_, **__):
        raise OSError("no space left on device")

    results = {part: {"expected_accuracy": 0.5, "ensemble_accuracy": 0.5} for part in ("clean", "robust")}
    images = np.zeros((2, 1, 8, 8), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(type(made.run.summary), "update", gone)
        patch.setattr(wandb, "Image", gone)
        patch.setattr(made.run, "finish", gone)
        if call == "summary":
            made.summary(results)
        elif call == "images":
            made.images(images, images, ["a", "b"], ["none", "0"], 0.1)
        else:
            made.finish(0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_pictures_show_clean_attacked_and_the_scaled_difference(mirror, monkeypatch, channels, eps):
    made = mirror("pictures")
    sent = {}
    monkeypatch.setattr(made.run, "log", sent.update)
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
    monkeypatch.setattr(made.run, "log", sent.update)
    image = np.zeros((1, 1, 4, 4), np.float32)
    made.baseline().images(image, image, ["cat"], ["none"], 0.1)
    assert list(sent) == ["baseline/examples"]


def test_a_key_is_found_where_wandb_keeps_it(tmp_path, monkeypatch):
    for name in (*OUTSIDE, "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    host = urlsplit(wandb.Settings().base_url).hostname
    assert not wandb_mirror._has_key()
    (tmp_path / ".netrc").write_text("machine example.org login user password x\n")
    assert not wandb_mirror._has_key()
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {SECRET}\n")
    assert wandb_mirror._has_key()
    (tmp_path / ".netrc").write_text("this is no netrc {")
    assert not wandb_mirror._has_key()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert wandb_mirror._has_key()


def test_an_unreachable_service_goes_on_offline_with_one_line(mirror, monkeypatch, tmp_path):
    real, modes = wandb.init, []

    def init(mode=None, **arguments):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("Run initialization has timed out after 10.0 sec.\nand more")
        return real(mode=mode, **arguments)

    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(wandb, "init", init)
    made = mirror("cut")
    assert modes == ["online", "offline"]
    assert made.mode == "offline"
    assert said(made) == "Weights & Biases: Run initialization has timed out after 10.0 sec.; going on offline\n"
    made.log({"step": 1, "train/loss": 2.0})
    made.finish(0)
    assert "wandb sync" in said(made)
    assert Offline(tmp_path / "cut").column("train/loss") == [2.0]


def test_an_unknown_mode_is_refused_in_one_line(mirror, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match="WANDB_MODE=sideways"):
        mirror("mode")
