"""The scripts of the studies, with a stand-in for Python that writes down what it is asked to run."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixadv import config

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """#!/bin/sh
if [ "$1" = -c ]; then shift; exec {python} -c "$@"; fi
shift
echo "$*" >>calls
case "$*" in
    *"$FAIL"*) exit "$CODE" ;;
    *"$WAIT"*) exec sleep 60 ;;
esac
"""


@pytest.fixture
def study(tmp_path):
    """Start a script in a folder of its own, whose name has a blank."""
    root = tmp_path / "a folder"
    shutil.copytree(ROOT / "studies", root / "studies")
    stand_in = root / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)

    def start(*overrides, script="small.sh", workers="1", fail="no such call", code=1, wait="no such call"):
        environment = {"FAIL": fail, "CODE": str(code), "WAIT": wait, "WORKERS": workers, "PYTHON": str(stand_in)}
        return subprocess.Popen(
            [root / "studies" / script, *overrides],
            cwd=tmp_path,
            env=os.environ | environment | {"PYTHONPATH": str(ROOT / "src")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell cannot trap what was ignored when it began, as SIGINT is where tests run in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    start.root = root
    start.calls = lambda: (root / "calls").read_text().splitlines() if (root / "calls").exists() else []
    return start


def ended(process):
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def job(study, name, *files):
    folder = study.root / "outputs" / "sweeps" / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    return folder


def test_the_small_study_asks_for_all_that_its_text_compares(study):
    assert ended(study("data=digits", "trainer.limit_train_batches=2")) == (0, "")
    calls = study.calls()
    sweeps = [call.removeprefix("-m name=study-small ").split() for call in calls if call.startswith("-m ")]
    at, with_all = "experiment=cifar10_small_at", ["data=digits", "trainer.limit_train_batches=2"]
    assert [sweep[:-2] for sweep in sweeps] == [
        [at, "L=1,3", "seed=0,1"],
        [at, "L=3", "lambda_solver=uniform", "seed=0,1"],
        [at, "L=2", "seed=0,1"],
        [at, "L=1", "trainer.max_epochs=18", "seed=0,1"],
        ["experiment=cifar10_small_trades", "L=3,1", "seed=0"],
        [at, "L=1", "seed=2"],
        [at, "L=2", "schedule=sampled", "seed=0"],
        [at, "L=2", "lambda_solver=uniform", "seed=0,1"],
    ]
    assert all(sweep[-2:] == with_all for sweep in sweeps)
    solve, evaluate = calls[len(sweeps) :]
    names = [f"{at},L=1,seed={seed},data=digits,trainer.limit_train_batches=2" for seed in (0, 1, 2)]
    assert "members=[" + ",".join(f"'outputs/sweeps/study-small/{name}'" for name in names) + "]" in solve
    assert solve.startswith("task=solve name=study-small-apart ")
    assert evaluate.startswith("task=evaluate mixture=outputs/solve/study-small-apart protocol=study ")
    # The data are the members' own; how much of them is looked at is the command's.
    for call in (solve, evaluate):
        assert "data=digits" not in call.split()
        assert call.split()[-1] == "trainer.limit_train_batches=2"


def test_what_the_scripts_ask_for_composes(study, compose):
    for script in ("small.sh", "gpu.sh"):
        assert ended(study(script=script))[0] == 0
    sweeps = [call.split()[2:] for call in study.calls() if call.startswith("-m ")]
    assert len(sweeps) == 16
    for sweep in sweeps:
        choices = [[f"{key}={value}" for value in values.split(",")] for key, values in (p.split("=") for p in sweep)]
        for said in itertools.product(*choices):
            config.check(compose(*said))


def test_runs_are_named_as_hydra_names_them(study):
    assert ended(study("compile=false", "data=digits"))[0] == 0
    assert "L=1,seed=2,compile=false,data=digits" in study.calls()[-2]


def test_what_failed_stops_nothing_and_is_the_exit_code(study):
    code, _ = ended(study(fail="L=3 lambda_solver=uniform"))
    assert code == 1
    assert len(study.calls()) == 10


def test_what_a_signal_ended_ends_the_study(study):
    code, _ = ended(study(fail="L=3 lambda_solver=uniform", code=143))
    assert code == 143
    assert len(study.calls()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_study_reaches_its_jobs(study, number):
    job(study, "study-small/a", "DONE")
    process = study(wait="L=3 lambda_solver=uniform")
    deadline = time.monotonic() + 30
    while len(study.calls()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(number)
    code, _ = ended(process)
    assert code == 130
    # The stand-in would have slept for a minute.
    assert time.monotonic() - started < 30
    assert len(study.calls()) == 2
    assert not (study.root / "results").exists()


def test_results_hold_the_small_files_of_the_last_time_alone(study):
    small = ("results.json", "metrics.csv", "records.npz", "config.yaml", "DONE")
    job(study, "study-small/a", *small, "mixture/member0.safetensors", "checkpoints/last.ckpt", "curves.png")
    job(study, "study-small/.jobs-1", "results.json")
    old = study.root / "results" / "small"
    (old / "b").mkdir(parents=True)
    (old / "b" / "FAILED").write_text("before")
    (old / "report.png").write_text("before")
    assert ended(study())[0] == 0
    found = {str(path.relative_to(old)) for path in old.rglob("*") if path.is_file()}
    assert found == {f"a/{name}" for name in small}
    assert study.calls()[-2:] == ["task=report runs=results/small", "results/small"]


@pytest.mark.parametrize("workers", ["abc", "0", "-1", "1.5"])
def test_workers_are_a_number(study, workers):
    code, said = ended(study(workers=workers))
    assert code == 2
    assert f"WORKERS={workers} must be a whole number of at least 1" in said
    assert study.calls() == []


def test_two_workers_go_through_the_same_list(study):
    assert ended(study(workers="2", wait="no such call"))[0] == 0
    calls = study.calls()
    assert sum(call.startswith("-m ") for call in calls) == 16
    assert [call.split()[0] for call in calls[16:]] == ["task=solve", "task=evaluate"]
