"""The life of a run directory: claimed, continued, finished, and never overwritten."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import TINY
from mixadv.errors import UserError
from mixadv.results import Results
from mixadv.runs import directory as rd
from mixadv.runs import locks
from mixadv.runs.directory import State, claimed, mark_done, read_results, write_config, write_results
from mixadv.runs.locks import LOCK, DirectoryLock, Held, holder
from mixadv.tasks import models


def times_and_sizes(root):
    """Path -> (modification time, size) of every file below `root`."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.fixture
def cfg(compose):
    return compose(*TINY)


# --- claimed -----------------------------------------------------------------------------------------------


def look(path, cfg):
    """What `claimed` says, and nothing done."""
    with claimed(path, cfg) as found:
        return found


def work_until(error, path, cfg):
    """A run that begins to write and then raises."""
    with claimed(path, cfg):
        write_config(path, cfg)
        raise error


def test_a_directory_goes_from_new_over_unfinished_to_done(tmp_path, cfg):
    path = tmp_path / "a" / "b"
    with claimed(path, cfg) as found:
        assert found == (path, State.NEW)
        assert [entry.name for entry in path.iterdir()] == [LOCK]
        write_config(path, cfg)
    assert [entry.name for entry in path.iterdir()] == ["config.yaml"]
    assert look(path, cfg) == (path, State.UNFINISHED)
    (path / "FAILED").write_text("why\n")
    assert look(path, cfg) == (path, State.UNFINISHED)
    mark_done(path)
    assert look(path, cfg) == (path, State.DONE)
    assert not (path / "FAILED").exists()


def test_where_nothing_was_written_no_directory_is_left(tmp_path, cfg):
    look(tmp_path / "idle", cfg)
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "refused", cfg):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "stopped", cfg):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("no data:\nfetch them"), "no data: fetch them"),
        (ZeroDivisionError("inside"), "ZeroDivisionError: inside"),
        (MemoryError(), "MemoryError:"),
    ],
)
def test_a_failure_leaves_its_reason_in_one_line(tmp_path, cfg, error, reason):
    path = tmp_path / "run"
    with pytest.raises(type(error)):
        work_until(error, path, cfg)
    assert (path / "FAILED").read_text() == reason + "\n"
    assert sorted(entry.name for entry in path.iterdir()) == ["FAILED", "config.yaml"]


def test_a_disk_that_is_full_does_not_hide_what_failed(tmp_path, cfg, monkeypatch):
    (tmp_path / "run").mkdir()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_config(tmp_path / "run", cfg)
    monkeypatch.setattr(rd, "write_text", full)
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "run", cfg):
        raise ZeroDivisionError
    rd.leave_reason(tmp_path / "other", ZeroDivisionError())
    assert not (tmp_path / "other" / "FAILED").exists()
    assert holder(tmp_path / "other") is None


def test_a_lock_that_cannot_say_whose_it_is_is_given_back(tmp_path, cfg, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        with pytest.raises(UserError, match=r"cannot write to .*run: No space left on device"):
            look(tmp_path / "run", cfg)
    assert look(tmp_path / "run", cfg) == (tmp_path / "run", State.NEW)


def test_the_working_directory_itself_is_not_removed(tmp_path, cfg, monkeypatch):
    monkeypatch.chdir(tmp_path)
    look(tmp_path, cfg)
    assert tmp_path.is_dir()


def test_being_told_to_stop_is_no_failure(tmp_path, cfg):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        work_until(KeyboardInterrupt(), path, cfg)
    assert [entry.name for entry in path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "override",
    ["resume=never", "name=other", "runs=x", "logger=wandb", "trainer.enable_progress_bar=false", "data=digits"],
)
def test_settings_that_change_nothing_may_differ(tmp_path, compose, cfg, override):
    write_config(tmp_path, cfg)
    other = compose(*TINY, override)
    assert rd.digest(other) == rd.digest(cfg)
    other.resume = "auto"
    assert look(tmp_path, other) == (tmp_path, State.UNFINISHED)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("L=3", "L: 2 there, 3 here"),
        ("seed=1", "seed: 0 there, 1 here"),
        ("eps=0.1", "eps: 0.05 there, 0.1 here"),
        ("loss.beta=5", "loss.beta: 6.0 there, 5 here"),
        ("scheduler.milestones=[0.5]", "scheduler.milestones: [0.5, 0.75] there, [0.5] here"),
        ("data.num_test=49", "data.num_test: 50 there, 49 here"),
        ("+protocol.attacks.other={_target_:mixadv.attacks.pgd.PGD}", "protocol.attacks.other._target_: None there"),
    ],
)
def test_settings_that_change_the_numbers_are_refused(tmp_path, compose, override, said):
    cfg, other = compose(*TINY, "loss=trades"), compose(*TINY, "loss=trades", override)
    write_config(tmp_path, cfg)
    with pytest.raises(UserError) as refused:
        look(tmp_path, other)
    message = str(refused.value)
    assert said in message
    assert "resume=never" in message
    assert "\n" not in message
    assert rd.digest(other) != rd.digest(cfg)
    # Whoever the run belongs to, it has not failed.
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_many_differences_are_counted_not_listed(tmp_path, compose, cfg):
    write_config(tmp_path, cfg)
    # The seed is the data's seed too.
    other = compose(*TINY, "L=3", "seed=1", "trainer.precision=bf16-mixed", "baseline=true", "trainer.max_epochs=9")
    with pytest.raises(UserError, match="and 3 more"):
        look(tmp_path, other)


def test_resume_never_numbers_the_directories(tmp_path, cfg):
    cfg.resume = "never"
    path = tmp_path / "run"
    for expected in ("run", "run.2", "run.3"):
        with claimed(path, cfg) as (found, state):
            assert (found, state) == (tmp_path / expected, State.NEW)
            write_config(found, cfg)
    cfg.resume = "auto"
    assert look(path, cfg) == (path, State.UNFINISHED)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, cfg):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file/run: Not a directory.*hydra\.run\.dir=DIR"):
        look(tmp_path / "file" / "run", cfg)


def test_a_seal_is_for_its_settings_alone(tmp_path, cfg):
    settings = rd.digest(cfg)
    assert not rd.is_sealed(tmp_path, settings)
    mark_done(tmp_path)
    # Finished, but nobody knows for which settings.
    assert not rd.is_sealed(tmp_path, settings)
    rd.seal(tmp_path, settings)
    assert rd.is_sealed(tmp_path, settings)
    cfg.seed = 1
    assert not rd.is_sealed(tmp_path, rd.digest(cfg))


# --- one process at a time ---------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from mixadv.runs.locks import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """hold(folder): a process that has its lock; killed, if it still lives, at the end."""
    started = []

    def start(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(hold, command, tmp_path):
    path = tmp_path / "outputs" / "train" / "busy"
    process = hold(path)
    assert holder(path).startswith(f"pid {process.pid} on {socket.gethostname()} since ")
    refusal = command(*TINY, "name=busy").refusal()
    assert refusal.startswith(f"another process is working in {path} (pid {process.pid} on {socket.gethostname()}")
    assert [entry.name for entry in path.iterdir()] == [LOCK]

    process.kill()
    process.wait()
    assert (path / LOCK).exists()
    assert holder(path) is None
    finished = command(*TINY, "name=busy", "trainer.max_epochs=1")
    assert finished.rc == 0, finished.err
    assert (path / "DONE").exists()
    assert not (path / LOCK).exists()


def test_the_lock_is_held_while_there_is_something_to_write(command, tmp_path, monkeypatch):
    from mixadv.tasks import train

    path = tmp_path / "outputs" / "train" / "watched"
    seen = {}

    def watched(name):
        real = getattr(train, name)

        def call(*args, **kwargs):
            seen[name] = holder(path)
            return real(*args, **kwargs)

        monkeypatch.setattr(train, name, call)

    for name in ("write_config", "measure", "write_results", "mark_done"):
        watched(name)
    assert command(*TINY, "name=watched", "trainer.max_epochs=1").rc == 0
    assert len(seen) == 4
    assert all(who.startswith(f"pid {os.getpid()} ") for who in seen.values())
    assert holder(path) is None


def test_a_finished_run_can_be_shown_by_many_and_where_nothing_can_be_written(tmp_path, cfg, monkeypatch):
    write_config(tmp_path, cfg)
    mark_done(tmp_path)
    monkeypatch.setattr(rd.DirectoryLock, "acquired", lambda self: pytest.fail("locked"))
    assert look(tmp_path, cfg) == (tmp_path, State.DONE)


def in_threads(count, work):
    """work(index) in `count` threads that start together; what they raise is raised here."""
    barrier = threading.Barrier(count)

    def run(index):
        barrier.wait(30)
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_directories_that_are_numbered_at_the_same_time_differ(tmp_path, compose):
    cfg = compose(*TINY, "resume=never")
    everybody = threading.Barrier(6)

    def work(index):
        with claimed(tmp_path / "run", cfg) as (path, state):
            everybody.wait(30)
            (path / "config.yaml").write_text("mine: true\n")
            return path.name, state

    found = in_threads(6, work)
    assert sorted(name for name, _ in found) == ["run", "run.2", "run.3", "run.4", "run.5", "run.6"]
    assert {state for _, state in found} == {State.NEW}


def test_numbering_passes_over_what_another_has_just_taken_and_what_is_not_ours(tmp_path, compose, monkeypatch):
    cfg = compose(*TINY, "resume=never")
    real = DirectoryLock.acquired

    def late(self):
        if self.folder.name == "run":
            # Another run began and ended after the look at this directory.
            self.folder.mkdir()
            (self.folder / "config.yaml").touch()
        return real(self)

    monkeypatch.setattr(DirectoryLock, "acquired", late)
    (tmp_path / "run.2").mkdir()
    with claimed(tmp_path / "run", cfg) as (path, state):
        assert (path.name, state) == ("run.3", State.NEW)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run", "run.2"]
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_one_at_a_time_though_the_file_comes_and_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.002)
    inside, most, entered = [], [], []

    def work(index):
        while len(entered) < 400:
            with contextlib.suppress(Held), DirectoryLock(tmp_path / "run"):
                inside.append(index)
                most.append(len(inside))
                time.sleep(0.0002)
                inside.remove(index)
                entered.append(index)

    in_threads(8, work)
    assert max(most) == 1
    assert len(set(entered)) > 1
    assert list((tmp_path / "run").iterdir()) == []


def test_a_glance_does_not_refuse_the_one_who_comes_to_work(tmp_path):
    lock = DirectoryLock(tmp_path)
    (tmp_path / LOCK).touch()
    glancing = open(tmp_path / LOCK)  # noqa: SIM115
    fcntl.flock(glancing, fcntl.LOCK_SH)
    threading.Timer(0.1, glancing.close).start()
    with lock:
        assert holder(tmp_path) is not None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_in_the_file_system_it_says_so_once_and_goes_on(tmp_path, cfg, monkeypatch, capsys, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with claimed(tmp_path / "run", cfg) as (path, state):
        assert state is State.NEW
        assert list(path.iterdir()) == []
        write_config(path, cfg)
        assert holder(path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mixadv: the file system of {tmp_path / 'run'} has no locks ({os.strerror(number)})")
    assert [entry.name for entry in path.iterdir()] == ["config.yaml"]


def test_another_error_of_the_lock_is_not_taken_for_a_file_system_without(tmp_path, cfg, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(UserError, match="Input/output error"):
        look(tmp_path / "run", cfg)


# --- what is written ---------------------------------------------------------------------------------------


def test_the_saved_configuration_is_resolved(tmp_path, cfg):
    write_config(tmp_path, cfg)
    text = (tmp_path / "config.yaml").read_text()
    assert "${" not in text
    assert "eps: 0.05" in text


def test_writing_the_configuration_withdraws_an_old_failure(tmp_path, cfg):
    (tmp_path / "FAILED").write_text("an earlier try\n")
    write_config(tmp_path, cfg)
    assert not (tmp_path / "FAILED").exists()


def test_results_come_back_and_arrays_hold_no_objects(tmp_path):
    assert read_results(tmp_path) is None
    arrays = {"labels": np.arange(5), "attack/pgd-20": np.linspace(0, 1, 5)}
    write_results(tmp_path, Results(L=3, flags=()), arrays)
    assert read_results(tmp_path) == Results(L=3, flags=())
    with np.load(tmp_path / "records.npz", allow_pickle=False) as records:
        assert {*arrays} <= {*records.files}
        for name, array in arrays.items():
            np.testing.assert_array_equal(records[name], array)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.npz", "results.json"]


def test_records_hold_the_arrays_and_nothing_else(tmp_path):
    write_results(tmp_path, Results(), {"labels": np.arange(5)})
    with np.load(tmp_path / "records.npz", allow_pickle=False) as records:
        assert records.files == ["labels"]


def test_a_crash_while_writing_keeps_the_old_file_whole(tmp_path, cfg, monkeypatch):
    write_config(tmp_path, cfg)
    write_results(tmp_path, Results(L=1), {"labels": np.arange(2)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    for write in (
        lambda: write_config(tmp_path, cfg),
        lambda: write_results(tmp_path, Results(L=2), {"labels": np.ones(9)}),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content


def test_a_process_that_is_killed_while_it_draws_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    """The figure is drawn under the lock, before DONE: the same command removes the half file and draws it whole."""
    import conftest
    from mixadv.report.figures import style

    argv = (*TINY, "L=3", "name=killed")
    run = tmp_path / "outputs" / "train" / "killed"

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(style, "new_figure", killed)
        patch.setattr("mixadv.report.figures.curves.new_figure", killed)
        conftest.run_command(tmp_path, *argv)
    assert (run / "results.json").exists()
    assert not (run / "DONE").exists()
    (run / ".curves.png.0123abcd.tmp").write_text("half")
    assert conftest.run_command(tmp_path, *argv).rc == 0
    assert (run / "DONE").exists()
    assert (run / "curves.png").exists()
    assert not list(run.rglob("*.tmp"))


def test_the_lock_file_of_a_process_killed_after_done_goes(tmp_path, cfg):
    with claimed(tmp_path, cfg) as (path, _):
        write_config(path, cfg)
        mark_done(path)
    (tmp_path / ".lock").write_text("pid 1 on nowhere since 2024-05-01 12:00\n")
    with claimed(tmp_path, cfg) as (_, state):
        assert state is State.DONE
    assert not (tmp_path / ".lock").exists()


def test_only_what_killed_writers_have_left_is_removed(tmp_path, cfg):
    """A run may live in a folder with files of the user, and above other runs that are being written."""
    left = [
        ".results.json.0123abcd.tmp",
        "checkpoints/.last.ckpt.0123abcd.tmp",
        "baseline/mixture/.config.json.ffffffff.tmp",
    ]
    kept = [
        ".mine.tmp",
        ".notes.0123.tmp",
        "results.json.0123abcd.tmp",
        "other/.last.ckpt.0123abcd.tmp",
        "checkpoints/mine.npz",
    ]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with claimed(tmp_path, cfg):
        assert [name for name in left if (tmp_path / name).exists()] == []
    assert [name for name in kept if not (tmp_path / name).exists()] == []


def test_provenance_names_versions_and_the_commit(monkeypatch):
    import torch

    from mixadv.tasks.provenance import provenance

    found = provenance()
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert {"python", "mixadv", "torchvision", "pytorch-lightning", "hydra-core"} <= set(found["versions"])
    json.dumps(found)


# --- through the command line ------------------------------------------------------------------------------


def test_a_finished_run_is_shown_and_not_touched(trained, tmp_path):
    import shutil

    from conftest import run_command

    cwd = tmp_path / "copy"
    shutil.copytree(trained.cwd, cwd)
    before = times_and_sizes(cwd)
    again = run_command(cwd, *TINY, "L=3", "seed=5", "name=tiny")
    assert again.rc == 0
    assert again.err == ""
    assert "outputs/train/tiny is done" in again.out
    assert "mixture" in again.out
    after = times_and_sizes(cwd)
    # The figure is drawn from the same files again.
    curves = os.path.join("outputs", "train", "tiny", "curves.png")
    assert {k: v for k, v in after.items() if k != curves} == {k: v for k, v in before.items() if k != curves}

    other = run_command(cwd, *TINY, "L=3", "seed=6", "name=tiny")
    assert "holds a run with other settings (" in other.refusal()
    assert "seed: 5 there, 6 here" in other.err
    kept = times_and_sizes(cwd)
    assert {k: v for k, v in kept.items() if k != curves} == {k: v for k, v in before.items() if k != curves}

    beside = run_command(cwd, *TINY, "L=1", "seed=6", "name=tiny", "resume=never", "trainer.max_epochs=1")
    assert beside.rc == 0, beside.err
    folder = cwd / "outputs" / "train"
    assert sorted(path.name for path in folder.iterdir()) == ["tiny", "tiny.2"]
    assert json.loads((folder / "tiny.2" / "results.json").read_text())["seed"] == 6
    assert json.loads((folder / "tiny" / "results.json").read_text())["seed"] == 5


def test_a_refused_command_does_not_mark_the_run_of_another(command, tmp_path):
    """The run that the directory belongs to may still be training elsewhere."""
    folder = tmp_path / "outputs" / "train" / "taken"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("L: 99\n")
    assert "holds a run with other settings" in command(*TINY, "name=taken").refusal()
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml"]


def test_showing_a_finished_run_does_not_even_rewrite_its_figure(trained):
    from conftest import run_command

    before = (trained.path / "curves.png").stat().st_mtime_ns
    assert run_command(trained.cwd, *TINY, "L=3", "seed=5", "name=tiny").rc == 0
    assert (trained.path / "curves.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("blocked", "argv"),
    [("outputs", []), ("outputs", ["-m", "seed=0,1"]), ("elsewhere", ["hydra.run.dir=elsewhere/run"])],
    ids=["run", "sweep", "own directory"],
)
def test_unwritable_output_is_one_message_with_the_remedy(command, tmp_path, blocked, argv):
    (tmp_path / blocked).write_text("in the way")
    refusal = command(*argv, *TINY).refusal()
    assert refusal.startswith("cannot write ")
    assert blocked in refusal
    assert "hydra.run.dir=DIR" in refusal
    assert [path.name for path in tmp_path.iterdir()] == [blocked]


def test_more_members_than_memory_holds_are_refused_with_what_would_fit(command, tmp_path, monkeypatch):
    # A linear digit classifier has 650 parameters of 12 bytes in training.
    monkeypatch.setattr(models, "available_memory", lambda device: 3 * 650 * 12 + 100)
    whole = "micro_batch_size=null"  # auto would count what a step needs beside the members, and refuse too
    refusal = command(*TINY, "L=4", "name=big", whole).refusal()
    assert refusal.startswith("L=4 members of model=linear need")
    assert "at most L=3" in refusal
    assert not (tmp_path / "outputs" / "train" / "big").exists()
    monkeypatch.setattr(models, "available_memory", lambda device: 4 * 650 * 12)
    fits = command(*TINY, "L=4", "name=big", "trainer.max_epochs=1", whole)
    assert fits.rc == 0, fits.err


def test_available_memory_is_asked_of_the_system():
    import torch

    free = models.available_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_a_loss_that_is_not_finite_leaves_its_reason_and_the_same_command_goes_on(command, tmp_path):
    broken = command(*TINY, "name=nan", "optimizer.lr=1e30")
    refusal = broken.refusal()
    assert "step" in refusal
    path = tmp_path / "outputs" / "train" / "nan"
    assert (path / "FAILED").read_text() == refusal + "\n"
    assert not (path / "DONE").exists()
    assert not (path / "results.json").exists()
    assert (path / "config.yaml").exists()
    assert (path / "metrics.csv").exists()


def test_a_defect_of_ours_leaves_its_reason_too(command, tmp_path, monkeypatch):
    from mixadv.tasks import train

    def broken(*_, **__):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(train, "measure", broken)
    with pytest.raises(ZeroDivisionError):
        command(*TINY, "name=defect")
    path = tmp_path / "outputs" / "train" / "defect"
    assert (path / "FAILED").read_text() == "ZeroDivisionError: inside\n"
    assert (path / "checkpoints" / "best.ckpt").exists()

    monkeypatch.undo()
    again = command(*TINY, "name=defect")
    assert again.rc == 0, again.err
    assert "Continuing outputs/train/defect" in again.out
    assert (path / "DONE").exists()
    assert not (path / "FAILED").exists()


# --- finished means what it says ---------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [None, b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_finished_run_without_its_results_is_refused_with_a_remedy_that_works(command, tmp_path, damage):
    argv = ["task=game", "game=motivating", "name=g"]
    assert command(*argv).rc == 0
    path = tmp_path / "outputs" / "game" / "g"
    before = (path / "results.json").read_bytes()
    (path / "results.json").unlink()
    if damage is not None:
        (path / "results.json").write_bytes(damage)
    refusal = command(*argv).refusal()
    assert refusal.startswith(f"{path} is marked as done, but its results.json is missing or damaged")
    sweep = command("-m", *argv[:2], "hydra.sweep.dir=outputs/game", "hydra.sweep.subdir=g")
    assert sweep.rc == 1
    assert "is marked as done, but its results.json is missing or damaged" in sweep.err
    for name in ("DONE", "results.json"):
        (path / name).unlink(missing_ok=True)
    again = command(*argv)
    assert again.rc == 0
    assert again.out.startswith("Starting again in outputs/game/g\n")
    assert len((path / "results.json").read_bytes()) == pytest.approx(len(before), abs=20)


def test_what_is_no_mixture_yet_is_told_as_what_it_is(trained, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    sweep = command("task=evaluate", "mixture=.").refusal()
    assert sweep == ". holds 1 finished run: name one, as run"
    for name in ("DONE", "results.json"):
        (run / name).unlink()
    shutil.rmtree(run / "mixture")
    for key in ("mixture=run", "members=[run]"):
        refusal = command("task=evaluate", key).refusal()
        assert refusal.startswith("run is an unfinished run"), refusal
        assert refusal.endswith("or take run/checkpoints/best.ckpt")
    taken = command("task=evaluate", "mixture=run/checkpoints/best.ckpt", "data.num_test=10", "protocol.diagnosed=0")
    assert taken.rc == 0, taken.err
    shutil.rmtree(run / "checkpoints")
    assert command("task=evaluate", "mixture=run").refusal().endswith("it has no checkpoint yet")
    (tmp_path / "resnet.pth.tar").write_bytes(b"parameters")
    assert "members=[...], with model=NAME" in command("task=evaluate", "mixture=resnet.pth.tar").refusal()
