"""Sweeps: what runs, what is passed over, what is told at the end; one after the other, in parallel, on a cluster."""

import copy
import csv
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper
from PIL import Image

from conftest import OUTSIDE
from mixadv.main import AGAIN
from mixadv.report import read_run
from mixadv.run_names import run_name
from mixadv.runs.locks import DirectoryLock
from mixadv.runs.sweep import Sweep
from mixadv.tasks import train

ROOT = Path(__file__).resolve().parents[1]
# Less than a second for each job.
MICRO = (
    "data.num_train=60",
    "data.num_test=20",
    "data.batch_size=20",
    "model=linear",
    "trainer.max_epochs=1",
    "schedule.T_theta=2",
    "lambda_solver.num_steps=1",
    "attack.num_steps=1",
    "protocol.validation.num_steps=1",
    "protocol.attacks.pgd-20.restarts=1",
    "protocol.attacks.pgd-20.num_steps=1",
    "protocol.attacks.arc.num_steps=1",
    "protocol.attacks.subsets.num_steps=1",
    "protocol.diagnosed=0",
    "eps=0.05",
    "trainer.accelerator=cpu",
    "logger=csv",
)
DIGITS = ("data=digits", *MICRO)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Two thirds of the time of a job this small; tests/test_commands.py sees to it that runs and sweeps have them."""
    monkeypatch.setattr("mixadv.report.draw_curves", lambda path: path)


def folders(sweep):
    """What comes before the first comma in a job's name -> its directory."""
    found = {path.name.split(",")[0]: path for path in sweep.iterdir() if path.is_dir()}
    assert len(found) == sum(path.is_dir() for path in sweep.iterdir())
    return found


def states(sweep):
    return {name: "".join(sorted({"DONE", "FAILED"} & set(os.listdir(path)))) for name, path in folders(sweep).items()}


def started(finished):
    """The first overrides of the jobs that began or went on to work."""
    return re.findall(r"^(?:Writing to|Continuing) .*/([^/,]+)[^/]*$", finished.out, re.MULTILINE)


def passed_over(finished):
    return re.findall(r"^([^,]+).* is done$", finished.out, re.MULTILINE)


def concluded(finished):
    """The line of counts, without the sweep's name."""
    return re.search(r"^Sweep \S+: (.*)$", finished.out, re.MULTILINE)[1]


def complaints(finished):
    """What standard error says at the end: first override -> reason."""
    _, text = re.split(r"jobs? failed; the same command runs these again:\n", finished.err)
    lines = [line.strip().partition(": ") for line in text.splitlines()]
    return {name.split(",")[0]: reason for name, _, reason in lines}


def times_in(path):
    return {entry: entry.stat().st_mtime_ns for entry in path.rglob("*")}


# --- one after the other -----------------------------------------------------------------------------------


def test_failures_do_not_stop_the_others_and_only_they_are_run_again(command, tmp_path, monkeypatch):
    argv = ["-m", "seed=0,1,2", *DIGITS, "name=s"]
    real = train.measure

    def broken(session, *args):
        if session.cfg.seed == 1:
            raise ZeroDivisionError("inside")
        return real(session, *args)

    monkeypatch.setattr(train, "measure", broken)
    first = command(*argv)
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    assert first.rc == 1
    assert started(first) == ["seed=0", "seed=1", "seed=2"]
    assert states(sweep) == {"seed=0": "DONE", "seed=1": "FAILED", "seed=2": "DONE"}
    assert concluded(first) == "3 jobs, 2 done, 1 failed"
    assert complaints(first) == {"seed=1": "ZeroDivisionError: inside"}
    # Our defect, so where it happened is told, and once.
    assert first.err.count("Traceback") == 1
    assert "Error executing job" not in first.err

    before = {name: times_in(path) for name, path in folders(sweep).items()}
    monkeypatch.setattr(train, "measure", real)
    # How jobs are launched does not name them.
    second = command(*argv, "launch=serial")
    assert second.rc == 0, second.err
    assert second.err == ""
    assert started(second) == ["seed=1"]
    assert passed_over(second) == ["seed=0", "seed=2"]
    assert concluded(second) == "3 jobs, 3 done (2 before)"
    assert set(states(sweep).values()) == {"DONE"}
    for name in ("seed=0", "seed=2"):
        assert times_in(folders(sweep)[name]) == before[name]
    assert not [path for path in sweep.rglob(".*") if path.name.startswith((".jobs", ".lock"))]


def test_a_refused_job_leaves_its_reason_for_the_table(command, tmp_path):
    first = command("-m", "L=0,2", "optimizer.lr=-1,0.1", *DIGITS, "name=s")
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    assert first.rc == 1
    assert concluded(first) == "4 jobs, 1 done, 3 failed"
    assert "Traceback" not in first.err
    refused = [path for path in sweep.iterdir() if path.is_dir() and not (path / "DONE").exists()]
    assert [os.listdir(path) for path in refused] == [["FAILED"]] * 3

    report = command("task=report", "runs=outputs/sweeps/s")
    assert report.rc == 0, report.err
    for reason in ("L=0 must be at least 1", "optimizer: Invalid learning rate: -1"):
        assert reason in report.out
    with (sweep / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted({(row["run"], row["state"]) for row in rows}, key=str)
    assert [row["state"] for row in rows if row["who"] == "mixture"].count("failed") == 3


def test_a_single_run_that_is_refused_leaves_nothing(command, tmp_path):
    command("L=0", *DIGITS, "name=alone").refusal()
    assert not (tmp_path / "outputs" / "train" / "alone").exists()


def test_a_refused_job_does_not_mark_the_run_of_another(command, tmp_path):
    argv = ["-m", "seed=0", *DIGITS, "name=s"]
    assert command(*argv).rc == 0
    (path,) = folders(tmp_path / "outputs" / "sweeps" / "s").values()
    # As if it had been made with another version, whose defaults differed.
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("momentum: 0.9", "momentum: 0.8"))
    (path / "DONE").write_text("")
    before = times_in(path)
    finished = command(*argv)
    assert finished.rc == 1
    assert "optimizer.momentum: 0.8 there, 0.9 here" in complaints(finished)["seed=0"]
    assert times_in(path) == before


def test_what_another_process_works_on_is_passed_over_and_is_no_failure(command, tmp_path):
    argv = ["-m", "seed=0", *DIGITS, "hydra.sweep.dir=elsewhere"]
    busy = tmp_path / "elsewhere" / run_name(argv[1:-1])
    with DirectoryLock(busy):
        finished = command(*argv)
        assert os.listdir(busy) == [".lock"]
    assert finished.rc == 0
    assert concluded(finished) == "1 job, 0 done, 1 running elsewhere"
    (line,) = [line for line in finished.out.splitlines() if "running elsewhere, pid" in line]
    assert line.startswith("  seed=0,")
    assert f"pid {os.getpid()} on " in line
    assert "skipped: another process is working in" in finished.err
    again = command(*argv)
    assert started(again) == ["seed=0"]
    assert concluded(again) == "1 job, 1 done"


def test_ctrl_c_stops_the_sweep_and_the_same_command_goes_on(command, tmp_path, monkeypatch):
    argv = ["-m", "seed=1,2", *DIGITS, "name=s"]
    real = train.measure

    def interrupted(session, *args):
        if session.cfg.seed == 1:
            raise KeyboardInterrupt
        return real(session, *args)

    monkeypatch.setattr(train, "measure", interrupted)
    first = command(*argv)
    assert first.rc == 130
    assert first.err.splitlines() == [f"mixadv: interrupted; {AGAIN}"]
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    assert states(sweep) == {"seed=1": ""}
    monkeypatch.setattr(train, "measure", real)
    second = command(*argv)
    assert second.rc == 0, second.err
    assert started(second) == ["seed=1", "seed=2"]
    assert "Continuing " in second.out
    assert set(states(sweep).values()) == {"DONE"}
    assert not list(sweep.glob(".jobs*"))


def test_jobs_of_a_sweep_that_starts_anew_are_numbered(command, tmp_path):
    argv = ["-m", "seed=0", *DIGITS, "name=s"]
    assert command(*argv).rc == 0
    again = command(*argv, "resume=never")
    assert again.rc == 0
    assert concluded(again) == "1 job, 1 done"
    old, new = sorted(path.name for path in (tmp_path / "outputs" / "sweeps" / "s").iterdir() if path.is_dir())
    assert new == f"{old}.2"


def test_a_batched_sweep_goes_on_after_a_batch_with_a_failure(command, tmp_path):
    finished = command("-m", "L=0,1", *DIGITS, "name=s", "hydra.sweeper.max_batch_size=1")
    assert finished.rc == 1
    assert states(tmp_path / "outputs" / "sweeps" / "s") == {"L=0": "FAILED", "L=1": "DONE"}
    assert concluded(finished) == "2 jobs, 1 done, 1 failed"


def test_finished_jobs_cost_a_line_each_whatever_they_did(trained, command, tmp_path):
    """They read their inputs, whose content they compare with what was measured, and nothing is measured again."""
    shutil.copytree(trained.path / "mixture", tmp_path / "mixture")
    argv = ["-m", "eps=0.02,0.05", "task=evaluate", "mixture=mixture", "data.num_test=10", "protocol.diagnosed=0"]
    assert command(*argv).rc == 0
    again = command(*argv)
    assert (again.rc, again.err) == (0, "")
    *lines, count = again.out.splitlines()
    assert [line.endswith(" is done") for line in lines] == [True, True]
    assert count.endswith(": 2 jobs, 2 done (2 before)")


# --- the table of a sweep ----------------------------------------------------------------------------------


def test_the_report_tells_running_failed_unfinished_and_done_apart(command, tmp_path):
    assert command("-m", "seed=0", "L=1", *DIGITS, "name=s").rc == 0
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    (done,) = folders(sweep).values()
    for name in ("failed", "running", "unfinished", "beginning"):
        (sweep / name).mkdir()
    for name in ("failed", "running", "unfinished"):
        shutil.copy(done / "config.yaml", sweep / name)
    # A reason from an earlier try does not hide that somebody tries again.
    for name in ("failed", "running"):
        (sweep / name / "FAILED").write_text("no data\n")
    # Nobody holds this one: its process was killed.
    (sweep / "unfinished" / ".lock").write_text("pid 1 on nowhere since never\n")
    with DirectoryLock(sweep / "running"), DirectoryLock(sweep / "beginning"):
        report = command("task=report", "runs=outputs/sweeps/s")
        assert read_run(sweep / "running").reason.startswith(f"pid {os.getpid()} on ")
    assert report.rc == 0, report.err
    with (sweep / "report.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["who"] == "mixture"]
    found = {row["run"]: (row["state"], row["reason"].split()[:2]) for row in rows if "=" not in row["run"]}
    assert found == {
        "failed": ("failed", ["no", "data"]),
        "running": ("running", ["pid", str(os.getpid())]),
        "beginning": ("running", ["pid", str(os.getpid())]),
        "unfinished": ("unfinished", []),
    }
    assert [row["state"] for row in rows if "=" in row["run"]] == ["done"]
    assert "failed: no data" in report.out
    assert f"running: pid {os.getpid()} on " in report.out


# --- sweepers that search ----------------------------------------------------------------------------------


class BestOfThree(Sweeper):
    """Runs three jobs one after the other, and takes the one with the largest number."""

    # Hydra takes plugins from there alone.
    __module__ = "hydra_plugins.best"
    told: ClassVar[list] = []

    def __init__(self, key, values):
        self.key, self.values = key, values

    def setup(self, *, hydra_context, task_function, config):
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        scores = {}
        for number, value in enumerate(self.values):
            (job,) = self.launcher.launch([[f"{self.key}={value}", *arguments]], initial_job_idx=number)
            if job.status is JobStatus.COMPLETED:
                assert type(job.return_value) is float
                scores[value] = job.return_value
        self.told.append((max(scores, key=scores.get), scores))


@pytest.fixture
def best(command, monkeypatch):
    """best(values): `-m hydra/sweeper=best` over them; the command's end, the best one and all numbers."""
    command("--cfg", "job")
    if importlib.util.find_spec("hydra_plugins") is None:
        monkeypatch.setitem(sys.modules, "hydra_plugins", ModuleType("hydra_plugins"))
    home = ModuleType("hydra_plugins.best")
    home.BestOfThree = BestOfThree
    monkeypatch.setitem(sys.modules, home.__name__, home)
    monkeypatch.setitem(Plugins.instance().class_name_to_class, "hydra_plugins.best.BestOfThree", BestOfThree)
    node = {"_target_": "hydra_plugins.best.BestOfThree", "key": "optimizer.lr", "values": [0.1, 0.2, 0.3]}
    monkeypatch.setattr(ConfigStore.instance(), "repo", copy.deepcopy(ConfigStore.instance().repo))
    ConfigStore.instance().store(group="hydra/sweeper", name="best", node=node, provider="tests")

    def run(values, *argv):
        BestOfThree.told.clear()
        finished = command("-m", "hydra/sweeper=best", f"hydra.sweeper.values={values}", *argv)
        assert BestOfThree.told, finished.err
        return finished, *BestOfThree.told[0]

    return run


def test_a_sweeper_that_searches_gets_the_robust_accuracy_as_a_number(best, tmp_path):
    argv = [*(text for text in DIGITS if not text.startswith("eps=")), "eps=0.02", "name=s"]
    finished, winner, scores = best("[1e-6,0.02,0.3]", *argv)
    assert finished.rc == 0, finished.err
    assert concluded(finished) == "3 jobs, 3 done"
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    measured = {
        float(name.removeprefix("optimizer.lr=")): json.loads((path / "results.json").read_text())
        for name, path in folders(sweep).items()
    }
    assert scores == {lr: results["robust"]["expected_accuracy"] for lr, results in measured.items()}
    assert len(set(scores.values())) == 3
    assert scores[winner] == max(scores.values())
    # Those that are done already give the numbers of their files.
    again = best("[1e-6,0.02,0.3]", *argv)
    assert concluded(again[0]) == "3 jobs, 3 done (3 before)"
    assert again[1:] == (winner, scores)


def test_a_sweeper_that_searches_is_told_of_failures_and_they_are_run_again(best, tmp_path):
    finished, winner, scores = best("[-1,0.1]", *DIGITS, "name=s")
    assert finished.rc == 1
    assert list(scores) == [0.1] == [winner]
    assert concluded(finished) == "2 jobs, 1 done, 1 failed"
    assert complaints(finished) == {"optimizer.lr=-1": "optimizer: Invalid learning rate: -1"}
    assert "Traceback" not in finished.err


def test_jobs_without_a_robust_accuracy_return_nan(command, monkeypatch):
    returned = []
    real = Sweep.on_job_end

    def on_job_end(self, config, job_return, **rest):
        returned.append(job_return.return_value)
        real(self, config, job_return, **rest)

    monkeypatch.setattr(Sweep, "on_job_end", on_job_end)
    assert command("task=game", "game=motivating", "name=g").rc == 0
    assert command("task=report", "runs=outputs").rc == 0
    # For Hydra's own sweeper a job that failed has not raised.
    assert command("-m", "L=0", *DIGITS).rc == 1
    assert [type(value) for value in returned] == [float] * 3
    assert all(math.isnan(value) for value in returned)
    returned.clear()
    assert command(*DIGITS, "name=one").rc == 0
    assert command(*DIGITS, "name=one").rc == 0
    assert returned[0] == returned[1]
    assert 0 <= returned[0] <= 1


def test_the_shipped_search_needs_a_sweeper_and_names_it(command, monkeypatch):
    """What the file says beyond its sweeper is Hydra's and Optuna's own."""
    command("--cfg", "job")
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["sweeper"], "optuna.yaml", raising=False)
    refusal = command("-m", "hparams_search=optuna", *DIGITS).refusal()
    assert refusal == "hydra/sweeper=optuna is not installed: pip install hydra-optuna-sweeper 'optuna<3'"
    keys = yaml.safe_load((ROOT / "conf" / "hparams_search" / "optuna.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert command("--cfg", "job", *(f"{key}=1" for key in keys)).rc == 0


# --- launchers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launch", ["parallel", "slurm"])
def test_a_launcher_of_sweeps_is_refused_for_a_single_run(command, tmp_path, launch):
    refusal = command(f"launch={launch}", *DIGITS).refusal()
    assert refusal == f"launch={launch} is for sweeps: add -m, which also takes a single job"
    assert not list((tmp_path / "outputs").rglob("*.yaml"))


@pytest.mark.parametrize(("launch", "node"), [("parallel", "joblib.yaml"), ("slurm", "submitit_slurm.yaml")])
def test_an_extra_that_is_missing_is_named(command, monkeypatch, launch, node):
    command("--cfg", "job")
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], node)
    refusal = command("-m", f"launch={launch}", "seed=0,1", *DIGITS).refusal()
    assert refusal == f"launch={launch} needs a launcher that is not installed: pip install -e '.[{launch}]'"


def test_without_slurm_the_launcher_says_so(command, tmp_path):
    finished = command("-m", "launch=slurm", "seed=0,1", *DIGITS, "name=s", PATH="/nowhere")
    assert finished.rc == 1
    assert "Traceback" not in finished.err
    assert finished.err.startswith('mixadv: the launcher failed, RuntimeError: Could not detect "srun"')
    assert concluded(finished) == "2 jobs, 0 done, 2 unfinished"
    assert set(complaints(finished)) == {"seed=0", "seed=1"}


def run_py(cwd, *argv, **environment):
    """`python run.py ARGV` as a process of its own."""
    outer = {name: value for name, value in os.environ.items() if name not in OUTSIDE and "NUM_THREADS" not in name}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *argv],
        cwd=cwd,
        env={**outer, "COLUMNS": "200", "PYTHONPATH": str(ROOT / "src"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Ended:
    """A process's end, to be read like a command's."""

    def __init__(self, process, timeout=300):
        self.out, self.err = process.communicate(timeout=timeout)
        self.rc = process.returncode


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def worker(sweep, name):
    """The process that works on a job whose name begins so, once it has begun to train."""

    def pid():
        for path in sweep.glob(f"{name},*/.lock"):
            if (path.parent / "metrics.csv").exists() and (said := path.read_text()):
                return int(said.split()[1])
        return None

    return wait_for(pid)


@pytest.mark.slow
def test_in_parallel_failures_and_a_killed_process_are_told_and_the_rest_is_run_again(tmp_path):
    argv = ["-m", "seed=0,1,2,3", "L=0,2", *DIGITS, "name=s"]
    first = Ended(run_py(tmp_path, *argv, "launch=parallel"))
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    assert first.rc == 1
    assert concluded(first) == "8 jobs, 4 done, 4 failed"
    assert "Traceback" not in first.err
    assert list(complaints(first).values()) == ["L=0 must be at least 1"] * 4
    # Two at a time share the cores.
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert set(re.findall(r"on (\d+) CPU core", first.out)) == {str(threads)}

    logs = {path.parent.name.split(",")[0]: path.read_text() for path in sweep.glob("*/mixadv.log")}
    assert sorted(logs) == [f"seed={seed}" for seed in range(4)]
    assert all(log.count("Files: ") == 1 for log in logs.values())

    argv = ["-m", "seed=10,11,12", *DIGITS, "trainer.max_epochs=60", "name=k"]
    sweep = tmp_path / "outputs" / "sweeps" / "k"
    process = run_py(tmp_path, *argv, "launch=parallel")
    os.kill(worker(sweep, "seed=10"), signal.SIGKILL)
    killed = Ended(process)
    assert killed.rc == 1
    assert "mixadv: the launcher failed, TerminatedWorkerError" in killed.err
    assert "Traceback" not in killed.err
    assert "seed=10" in complaints(killed)
    assert not list(sweep.glob(".jobs*"))

    last = Ended(run_py(tmp_path, *argv, "launch=parallel"), timeout=600)
    assert last.rc == 0, last.err
    assert "Continuing " in last.out
    assert set(states(sweep).values()) == {"DONE"}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_parallel_jobs_do_not_outlive_the_command_and_keep_what_they_have(tmp_path, how):
    argv = ["-m", "seed=0,1,2", *DIGITS, "trainer.max_epochs=2000", "trainer.check_val_every_n_epoch=20", "name=s"]
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    process = run_py(tmp_path, *argv, "launch=parallel", OMP_NUM_THREADS="1")
    jobs = [worker(sweep, f"seed={seed}") for seed in (0, 1)]
    process.send_signal(how)
    assert Ended(process).rc == -how
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in jobs), 60)
    assert not list(sweep.glob("*/.lock"))
    assert len(list(sweep.glob("*/checkpoints/last.ckpt"))) == 2
    assert set(states(sweep).values()) == {""}


@pytest.mark.slow
def test_two_sweeps_at_once_share_the_work(tmp_path):
    argv = ["-m", "seed=0,1,2,3", *DIGITS, "trainer.max_epochs=5", "name=s"]
    ends = [Ended(process) for process in [run_py(tmp_path, *argv) for _ in range(2)]]
    assert [end.rc for end in ends] == [0, 0]
    names = [f"seed={seed}" for seed in range(4)]
    assert sorted(started(ends[0]) + started(ends[1])) == names
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    assert states(sweep) == dict.fromkeys(names, "DONE")
    last = Ended(run_py(tmp_path, *argv))
    assert concluded(last) == "4 jobs, 4 done (4 before)"


# --- a cluster ---------------------------------------------------------------------------------------------

# Stand-ins for Slurm's commands that run every task of an array at once, and again when it is requeued.
SLURM = {
    "sbatch": """
        script = Path(sys.argv[1]).read_text()
        (cluster / "script").write_text(script)
        for task in range(int(re.search(r"--array=0-(\\d+)", script)[1]) + 1):
            start(task)
        print("Submitted batch job 77")
    """,
    "srun": """
        words = sys.argv[1:]
        while words[0].startswith("--"):
            option, words = words[0], words[1:]
            if option in ("--output", "--error"):
                name, words = words[0], words[1:]
                for pattern, key in (("%A", "ARRAY_JOB_ID"), ("%a", "ARRAY_TASK_ID"), ("%t", "PROCID")):
                    name = name.replace(pattern, os.environ["SLURM_" + key])
                file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, 1 if option == "--output" else 2)
        os.execvp(words[0], words)
    """,
    "scontrol": """
        verb, job = sys.argv[1:]
        with (cluster / "requeued").open("a") as file:
            file.write(job + "\\n")
        start(job.split("_")[1], after=os.getppid())
    """,
    "sacct": """
        print("JobID|State|NodeList")
        for task in cluster.glob("task*"):
            print(f"77_{task.name[4:]}|RUNNING|here")
    """,
}
PREAMBLE = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
cluster = Path("{cluster}")

def start(task, after=0):
    (cluster / f"task{{task}}").touch()
    wait = f"while kill -0 {{after}} 2>/dev/null; do sleep 0.1; done; " if after else ""
    subprocess.Popen(
        ["bash", "-c", wait + f"exec bash {{cluster}}/script"],
        env={{
            **os.environ, "SLURM_JOB_ID": str(78 + int(task)), "SLURM_ARRAY_JOB_ID": "77", "SLURM_NTASKS": "1",
            "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_NODELIST": "here", "SLURM_NODEID": "0",
            "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        }},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
"""


@pytest.fixture
def slurm(tmp_path):
    """The folder of a cluster's stand-in; put its bin/ into PATH."""
    cluster = tmp_path / "cluster"
    (cluster / "bin").mkdir(parents=True)
    for name, text in SLURM.items():
        body = "\n".join(line[8:] for line in text.splitlines())
        (cluster / "bin" / name).write_text(PREAMBLE.format(python=sys.executable, cluster=cluster) + body)
        (cluster / "bin" / name).chmod(0o755)
    return cluster


def asked_for(slurm):
    lines = re.findall(r"^#SBATCH --(\S+?)(?:=(.*))?$", (slurm / "script").read_text(), re.MULTILINE)
    return dict(lines)


@pytest.mark.slow
def test_on_slurm_a_preempted_job_goes_back_into_the_queue_and_continues(tmp_path, slurm):
    argv = ["-m", "launch=slurm", "seed=0,1", "L=0,2", *DIGITS, "trainer.max_epochs=60", "name=s"]
    argv += ["hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90", "hydra.launcher.array_parallelism=3"]
    path = f"{slurm / 'bin'}:{os.environ['PATH']}"
    process = run_py(tmp_path, *argv, PATH=path, OMP_NUM_THREADS="1")
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    os.kill(worker(sweep, "seed=1,L=2"), signal.SIGUSR2)
    finished = Ended(process, timeout=600)
    assert finished.rc == 1
    assert concluded(finished) == "4 jobs, 2 done, 2 failed"
    assert "Traceback" not in finished.err
    assert list(complaints(finished).values()) == ["L=0 must be at least 1"] * 2
    assert (slurm / "requeued").read_text() == "77_3\n"
    logs = "".join(log.read_text() for log in sweep.glob(".submitit/77_3*/*.out"))
    assert logs.count("Writing to ") == logs.count("Continuing ") == 1
    assert sum((path / "DONE").exists() for path in sweep.iterdir() if path.is_dir()) == 2

    asked = asked_for(slurm)
    assert asked["array"] == "0-3%3"
    assert (asked["partition"], asked["time"]) == ("gpu", "90")
    assert (asked["gpus-per-node"], asked["cpus-per-task"], asked["mem"]) == ("1", "4", "16GB")
    assert asked["signal"] == "USR2@120"
    assert "requeue" in asked

    report = Ended(run_py(tmp_path, "task=report", "runs=outputs/sweeps/s"))
    assert report.rc == 0, report.err
    again = Ended(run_py(tmp_path, *[text for text in argv if "launch" not in text]))
    assert concluded(again) == "4 jobs, 2 done (2 before), 2 failed"


@pytest.mark.slow
def test_submitit_runs_the_jobs_of_a_sweep_without_a_cluster(tmp_path):
    argv = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "L=0,1", *DIGITS, "name=s"]
    finished = Ended(run_py(tmp_path, *argv, OMP_NUM_THREADS="1"))
    assert finished.rc == 1
    assert concluded(finished) == "2 jobs, 1 done, 1 failed"
    assert complaints(finished) == {"L=0": "L=0 must be at least 1"}
    assert states(tmp_path / "outputs" / "sweeps" / "s")["L=1"] == "DONE"


# --- endurance ---------------------------------------------------------------------------------------------


def write_images(root, seed):
    """Two classes of grey 6x6 images that differ in brightness."""
    random = np.random.default_rng(seed)
    for split, count in (("train", 20), ("test", 8)):
        for name, low in (("dark", 0), ("light", 120)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(low, low + 120, (6, 6), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")


@pytest.mark.slow
def test_of_24_jobs_four_fail_at_run_time_and_exactly_these_are_run_again(command, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in range(24):
        write_images(tmp_path / "images" / str(seed), seed)
    torn = tmp_path / "images" / "5" / "train" / "light" / "07.png"
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    nan, memory, defect = 9, 14, 20
    real_parts, real_measure = train._parts, train.measure

    def parts(cfg):
        if cfg.seed == nan:
            cfg = cfg.copy()
            cfg.optimizer.lr = 1e30
        return real_parts(cfg)

    def measure(session, *args):
        if session.cfg.seed == memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if session.cfg.seed == defect:
            raise KeyError("weights")
        return real_measure(session, *args)

    images = ("data=image_folder", "data.root=images/${seed}", "data.channels=1", "data.num_val=8", "data.padding=0")
    size = [text for text in MICRO if not text.startswith("data.")]
    argv = ["-m", f"seed={','.join(map(str, range(24)))}", *images, "data.batch_size=10", *size, "name=s"]
    with monkeypatch.context() as injected:
        injected.setattr(train, "_parts", parts)
        injected.setattr(train, "measure", measure)
        first = command(*argv)
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    assert first.rc == 1
    assert concluded(first) == "24 jobs, 20 done, 4 failed"
    bad = [f"seed={seed}" for seed in (5, nan, memory, defect)]
    reasons = complaints(first)
    assert list(reasons) == bad
    for name, said in zip(bad, ("07.png", "not finite", "out of memory with L=2", "KeyError: 'weights'"), strict=True):
        assert said in reasons[name]
        assert (folders(sweep)[name] / "FAILED").read_text().strip() == reasons[name]
    assert {name for name, state in states(sweep).items() if state == "FAILED"} == set(bad)
    table = command("task=report", "runs=outputs/sweeps/s")
    assert all(reason in " ".join(table.out.split()) for reason in reasons.values())
    before = {name: times_in(path) for name, path in folders(sweep).items() if name not in bad}
    assert len(before) == 20

    torn.write_bytes(whole)
    second = command(*argv)
    assert second.rc == 0, second.err
    assert started(second) == bad
    assert len(passed_over(second)) == 20
    assert concluded(second) == "24 jobs, 24 done (20 before)"
    assert set(states(sweep).values()) == {"DONE"}
    assert {name: times_in(folders(sweep)[name]) for name in before} == before
    numbers = {name: json.loads((path / "results.json").read_text())["seed"] for name, path in folders(sweep).items()}
    assert numbers == {f"seed={seed}": seed for seed in range(24)}
