"""studies/fifteen.py: what a lent GPU is used for, tried on the CPU."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from mixadv import config
from mixadv.instantiate import instantiate
from mixadv.models import build_member
from mixadv.results import read

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module", autouse=True)
def studies():
    """Modules of studies/ and benchmarks/ can be imported."""
    before = list(sys.path)
    sys.path[:0] = [str(ROOT / "studies"), str(ROOT / "benchmarks")]
    yield
    sys.path[:] = before


def archive(folder):
    """cifar10-jpeg.tar.gz with ten training and four test images of each class."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "cifar10-jpeg.tar.gz", "w:gz") as tar:
        for split, count in (("train", 10), ("test", 4)):
            for label, name in enumerate(CLASSES):
                for number in range(count):
                    pixels = rng.normal(25 * label, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                    file = io.BytesIO()
                    Image.fromarray(pixels).save(file, "JPEG")
                    member = tarfile.TarInfo(f"{split}/{name}/{number:04}.jpg")
                    member.size = file.tell()
                    file.seek(0)
                    tar.addfile(member, file)
    return folder


# --- what is planned ---------------------------------------------------------------------------------------


def test_the_largest_number_of_epochs_that_fits_is_chosen():
    """The cost is added up pass by pass here, on sizes whose epochs, phases and validations all count."""
    from gpu_plan import MARGIN, REPLAYS, TINY, Rates, measurement_passes, plan

    steps = {"batch": 10, "steps": 4, "num_train": 205, "num_val": 30, "validation_steps": 6, "T_theta": 8}
    size = replace(TINY, **steps, solver_steps=3, members=3, most_epochs=50)
    rates = Rates({1: 0.2, 3: 0.5}, 1e-4)

    def seconds(members, epochs):
        step = rates.steps[members]
        attacked = step / (members * (4 + 4 + 1 + 2)) / 10  # K + 1 passes forward, K and two backward, 10 images
        batches = 20 * step
        validation = 30 * members * (6 + 5 + 6) * attacked
        phases = 20 / 8 * 3 * step if members > 1 else 0
        return size.start + epochs * (batches + validation + phases) + 1e-4 * measurement_passes(size, members)

    def all_three(epochs):
        return seconds(1, epochs) + seconds(3, epochs) + seconds(1, 3 * epochs) + REPLAYS

    for left in (10.0, 900.0, 2000.0):
        found = plan(size, left, rates)
        epochs = found[0].epochs
        assert [(one.num_members, one.epochs) for one in found] == [(1, epochs), (3, epochs), (1, 3 * epochs)]
        assert [one.planned for one in found] == pytest.approx(
            [seconds(1, epochs), seconds(3, epochs), seconds(1, 3 * epochs)]
        )
        assert epochs == 1 or all_three(epochs) <= (1 - MARGIN) * left
        assert all_three(epochs + 1) > (1 - MARGIN) * left
    assert found[0].epochs > 10
    assert plan(size, 1e9, rates)[0].epochs == 50


def test_a_pass_of_resnet18_has_the_operations_from_which_seconds_are_projected():
    from gpu_plan import FULL

    member = build_member("resnet18", num_classes=10, image_shape=(3, 32, 32)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        member(torch.zeros(1, 3, 32, 32))
    assert FULL.pass_seconds * 150e12 == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_what_is_asked_for_composes_with_the_attacks_whose_cost_is_counted(compose):
    from gpu_plan import FULL, TINY

    for size in (FULL, TINY):
        cfg = compose(*size.training(Path("/images"), 3, 5, Path("runs/a"))[:-1])
        config.check(cfg)
        found = {name: instantiate(node, name) for name, node in cfg.protocol.attacks.items()}
        assert found == size.attacks()


def test_jobs_of_the_benchmarks_train_on_the_batches_of_their_stream_in_order():
    from training_job import PLAIN, Job, Patterns, mark

    args = Namespace(model="linear", steps=1, images=64, cpu=True)
    seen = []
    job = Job(args, 2, 16, PLAIN)
    step = job.module.training_step
    job.module.training_step = lambda batch, batch_idx: (seen.append(batch[1]), step(batch, batch_idx))[1]
    job.steps(2)
    job.steps(3)
    data = Patterns(64, 16)
    data.setup()
    wanted = iter(mark(data.endless(torch.device("cpu"))))
    assert len(job.losses) == 5
    for labels in seen:
        assert torch.equal(labels, next(wanted)[1])


def test_curves_of_trainings_of_all_lengths_are_drawn_against_epochs_and_against_cost(tmp_path):
    from gpu_question import curves

    histories = {"L1-E2": (1, 2, [0.3, 0.4]), "L3-E2": (3, 2, [0.35, 0.45]), "L1-E6": (1, 6, [0.3, 0.4, 0.5])}
    for name, (size, epochs, values) in histories.items():
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(f"L: {size}\neps: 8/255\ntrainer:\n  max_epochs: {epochs}\n")
        rows = "".join(f"{i + 1},{i},{value}\n" for i, value in enumerate(values))
        (run / "metrics.csv").write_text(f"epoch,step,val/robust_accuracy\n{rows}")
    figure = curves([tmp_path / name for name in histories])
    drawn = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figure.axes
    ]
    assert drawn == [
        {
            "L = 1, 2 epochs": ([1, 2], [0.3, 0.4]),
            "L = 3, 2 epochs": ([factor, 2 * factor], [0.35, 0.45]),
            "L = 1, 6 epochs": ([1, 2, 3], [0.3, 0.4, 0.5]),
        }
        for factor in (1, 3)
    ]


# --- the clock ---------------------------------------------------------------------------------------------


def is_running(pid):
    """Whether a process lives; one that ended and whose parent has not asked is dead."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def awaited(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Ignores SIGTERM, and starts a process that does too.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""


def test_what_takes_too_long_ends_in_time_with_all_that_it_started(tmp_path):
    from gpu_processes import start, wait

    begun = time.monotonic()
    process = start("-c", STUBBORN, tmp_path / "pid")
    awaited(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    assert wait(process, 2.0) is None
    assert time.monotonic() - begun < 20
    assert process.returncode == -signal.SIGKILL
    awaited(lambda: not is_running(int((tmp_path / "pid").read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_processes_of_a_killed_program_end_with_it(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "studies")!r})
from gpu_processes import start
print(start("-c", "import time; time.sleep(60)").pid, flush=True)
input()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    awaited(lambda: not is_running(pid))
    parent.stdin.close()
    parent.stdout.close()


def test_steps_that_are_over_are_not_run_again_and_those_that_time_stopped_are(tmp_path, monkeypatch):
    import gpu_processes
    from fifteen import Fifteen
    from gpu_plan import TINY

    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def begun(seconds):
        monkeypatch.setattr(gpu_processes, "BEGUN", time.monotonic())
        return Fifteen(replace(TINY, wrap_up=1), seconds, 540, tmp_path, tmp_path / "work")

    def note(name, then="pass"):
        return ["-c", f"open({str(tmp_path / 'calls')!r}, 'a').write({name!r} + ' '); {then}"]

    work = begun(60)
    work.step("quick", note("quick"), 30, 1)
    work.step("wrong", note("wrong", "raise SystemExit(2)"), 30, 1)
    work.step("limited", note("limited", "import time; time.sleep(60)"), 1.5, 1)
    work = begun(6)
    work.step("long", note("long", "import time; time.sleep(60)"), 30, 1)
    # Some of the seconds in which it could have ended are left.
    work.step("next", note("next"), 30, 1)
    assert {name: row["status"] for name, row in work.state["steps"].items()} == {
        "quick": "done",
        "wrong": "failed",
        "limited": "cut",
        "long": "stopped",
    }
    work = begun(60)
    for name in ("quick", "wrong", "limited", "long"):
        work.step(name, note(name), 30, 1)
    assert (tmp_path / "calls").read_text().split() == ["quick", "wrong", "limited", "long", "wrong", "long"]
    kept = json.loads((tmp_path / "out" / "fifteen.json").read_text())
    assert kept["steps"]["long"]["status"] == "done"
    # What is left when the clock has run out is not begun.
    work = begun(1)
    work.step("late", note("late"), 30, 1)
    assert "late" not in work.state["steps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["500"], "there is no GPU here; --cpu goes"),
        (["20", "--cpu"], "20 seconds are too few"),
        (["500", "--cpu", "--carried", "nowhere"], "make it with studies/carry.sh"),
    ],
)
def test_what_cannot_begin_is_refused_in_one_line(monkeypatch, arguments, message):
    from fifteen import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        main(arguments)


def test_what_is_carried_is_made_from_the_archive_or_from_the_folder(tmp_path):
    """A stand-in for Python makes no wheels."""
    root = tmp_path / "a folder"
    shutil.copytree(ROOT / "studies", root / "studies")
    (root / "python").write_text('#!/bin/sh\nif [ "$1" = -c ]; then echo antlr4-x==1; else echo "$*" >>calls; fi\n')
    (root / "python").chmod(0o755)

    def carry(data):
        environment = os.environ | {"PYTHON": str(root / "python"), "DATA_DIR": str(data)}
        script = [root / "studies" / "carry.sh"]
        return subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path)

    refused = carry(tmp_path / "nowhere")
    assert refused.returncode == 1
    assert refused.stderr.endswith("set DATA_DIR to the folder of one\n")
    packed = archive(tmp_path / "packed")
    assert carry(packed).returncode == 0
    wanted = (packed / "cifar10-jpeg.tar.gz").read_bytes()
    assert (root / ".carry" / "cifar10-jpeg.tar.gz").read_bytes() == wanted
    unpacked = tmp_path / "unpacked" / "cifar10-jpeg"
    with tarfile.open(packed / "cifar10-jpeg.tar.gz") as tar:
        tar.extractall(unpacked, filter="data")
    assert carry(unpacked.parent).returncode == 0
    with tarfile.open(root / ".carry" / "cifar10-jpeg.tar.gz") as tar:
        names = {name for name in tar.getnames() if name.endswith(".jpg")}
    assert names == {str(path.relative_to(unpacked)) for path in unpacked.rglob("*.jpg")}
    assert len(names) == 140
    assert "wheel" in (root / "calls").read_text()


# --- all of it ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_script_ends_in_time_and_goes_on_after_a_kill(tmp_path):
    root, out, carried = tmp_path / "bare", tmp_path / "out", archive(tmp_path / "carried")
    root.mkdir()
    for name in ("src", "conf", "studies", "benchmarks"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "run.py", root)
    work = root / "outputs" / "fifteen-cpu"

    def begin(seconds, *more):
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, root / "studies" / "fifteen.py", str(seconds), "--cpu", "--carried", carried, *more]
        with (tmp_path / "said").open("a") as said:
            return subprocess.Popen(
                command, cwd=tmp_path, env=environment | {"OUT": str(out)}, stdout=said, stderr=subprocess.STDOUT
            )

    def state():
        file = work / "state.json"
        return json.loads(file.read_text()) if file.exists() else {"steps": {}}

    # The clock ends the first command, a kill the second one in its second training.
    began = time.monotonic()
    assert begin(100).wait(timeout=200) == 3, (tmp_path / "said").read_text()
    assert time.monotonic() - began < 100
    second = begin(1200)
    awaited(lambda: list(work.glob("runs/L3-*/checkpoints/last.ckpt")) or second.poll() is not None, seconds=1000)
    assert second.poll() is None, (tmp_path / "said").read_text()
    second.kill()
    second.wait()
    steps = state()["steps"]
    before = {name: row["seconds"] for name, row in steps.items() if row["status"] == "done"}
    assert {"checks", "speed", "seconds of a step"} < set(before)
    assert begin(900).wait(timeout=1000) == 0, (tmp_path / "said").read_text()
    found = state()
    assert {row["status"] for row in found["steps"].values()} == {"done"}
    assert {name: found["steps"][name]["seconds"] for name in before} == before
    assert [row["ok"] for row in found["checks"]] == 8 * [True]
    # Points replayed on the mixture for which they were found give what was measured.
    for row in found["replays"]:
        results, _ = read(work / "runs" / row["mixture"] / "results.json")
        assert row[f"points of {row['mixture']}"] == pytest.approx(100 * results.robust.value)
        assert row["worst of all"] <= min(value for key, value in row.items() if key.startswith("points of "))
    files = sorted(file.name for file in out.iterdir())
    assert {"fifteen.json", "runs.tar.gz", "curves.png", "weights.png"} < set(files)
    assert len(files) <= 8
    assert sum(file.stat().st_size for file in out.iterdir()) < 5e6
    with tarfile.open(out / "runs.tar.gz") as tar:
        names = tar.getnames()
    assert sum(name.endswith("/DONE") for name in names) == 3
    assert not any("safetensors" in name for name in names)
    # Done is done.
    assert begin(100).wait(timeout=200) == 0
