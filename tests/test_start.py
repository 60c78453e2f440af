"""The start of the program, as a process: environments, consoles and allocations that were not planned for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from builders.runs import read_results
from conftest import OUTSIDE, TINY
from mixadv.errors import UserError
from mixadv.tasks.build import trainer_settings

ROOT = Path(__file__).resolve().parents[1]
SHORT = [text for text in TINY if not text.startswith("trainer.max_epochs")]
SHORT += ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "data.num_test=10", "compile=false"]
GAME = ["task=game", "game=motivating", "name=g"]


def environment(**changes):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "SLURM", *OUTSIDE))}
    return {**kept, "PYTHONPATH": str(ROOT / "src"), "WANDB_MODE": "disabled", **changes}


def run_py(cwd, *argv, stdout=subprocess.PIPE, python=(sys.executable,), **changes):
    return subprocess.run(
        [*python, str(ROOT / "run.py"), *argv], cwd=cwd, env=environment(**changes), stdout=stdout,
        stderr=subprocess.PIPE, timeout=300, check=False,
    )  # fmt: skip


def test_a_finished_run_is_told_on_a_console_of_windows(trained):
    """The bars of the table and the letters of the mathematics are not in its encoding."""
    finished = run_py(trained.cwd, *TINY, "L=3", "seed=5", "name=tiny", PYTHONIOENCODING="cp1252")
    assert (finished.returncode, finished.stderr) == (0, b"")
    assert b"is done" in finished.stdout
    assert b"robust" in finished.stdout


def test_a_system_whose_files_are_ascii(tmp_path):
    finished = run_py(tmp_path, *GAME, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (finished.returncode, finished.stderr) == (0, b"")


def test_a_system_without_the_signals_of_posix(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        'import signal\nfor name in ("SIGUSR1", "SIGUSR2", "SIGPIPE"):\n    delattr(signal, name)\n', encoding="utf-8"
    )
    finished = run_py(tmp_path, *GAME, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'src'}")
    assert (finished.returncode, finished.stderr) == (0, b"")


ALLOCATION = {
    **{"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
    **{"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_PROCID": "1"},
}


def test_one_process_runs_in_any_allocation_of_slurm(tmp_path):
    finished = run_py(tmp_path, *SHORT, "name=run", **ALLOCATION)
    assert (finished.returncode, finished.stderr) == (0, b"")
    # Lightning silences the loggers of every task but the first.
    assert (tmp_path / "outputs/train/run/metrics.csv").read_text(encoding="utf-8").count("\n") > 1
    assert read_results(tmp_path / "outputs/train/run")["num_examples"] == 10


def test_several_processes_in_an_allocation_that_does_not_fit_are_refused(compose, monkeypatch):
    for key, value in (ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(key, value)
    cfg = compose("trainer=ddp_cpu")
    with pytest.raises(UserError, match=r"^Slurm: .*ntasks-per-node=2.* One process \(trainer.devices=1\)"):
        trainer_settings(cfg, torch.device("cpu"))


@pytest.mark.parametrize("argv", [["--help"], ["--version"], GAME])
def test_a_reader_that_ends_early_causes_no_traceback(tmp_path, argv):
    read, write = os.pipe()
    os.close(read)
    finished = run_py(tmp_path, *argv, stdout=write)
    os.close(write)
    assert b"Traceback" not in finished.stderr
    assert b"Error" not in finished.stderr
    assert finished.returncode in (0, 128 + signal.SIGPIPE)


def test_ctrl_c_at_any_moment_ends_in_one_line(tmp_path):
    for delay in (0.05, 0.2, 0.6):
        # Python itself takes a moment before it reads the program.
        # Where the tests run in the background, they ignore SIGINT, and their children would too.
        code = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "print(flush=True); sys.argv[0] = 'run.py'; "
        code += f"runpy.run_path({str(ROOT / 'run.py')!r}, run_name='__main__')"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *SHORT, "name=run"], cwd=tmp_path, env=environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130, (delay, err)
        assert err.startswith("mixadv: interrupted"), (delay, err)
        assert err.count("\n") == 1, (delay, err)


def test_a_python_without_the_requirements_names_the_environment(tmp_path):
    finished = run_py(tmp_path, "--help", python=(sys.executable, "-S"))
    message = finished.stderr.decode()
    assert finished.returncode == 1
    assert message.startswith(f"mixadv: mixadv is not installed for this Python ({sys.executable} has no ")
    assert ". .venv/bin/activate" in message
    assert message.count("\n") == 1


def test_a_module_of_the_users_own_that_is_missing_is_not_a_missing_environment(tmp_path):
    (tmp_path / "nets.py").write_text("import nothing_here\n", encoding="utf-8")
    finished = run_py(tmp_path, "task=evaluate", "members=[nets:build]", "data=digits", "eps=0.1")
    assert b"not installed for this Python" not in finished.stderr
    assert b"nothing_here" in finished.stderr
