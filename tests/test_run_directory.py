"""The life of a run directory: claimed, continued, finished, and never overwritten."""

import json
import os

import numpy as np
import pytest

from conftest import TINY
from mixadv.errors import UserError
from mixadv.tasks import build
from mixadv.tasks import run_directory as rd
from mixadv.tasks.run_directory import State, claim, mark_done, read_results, write_config, write_results


def snapshot(root):
    """Path -> (modification time, size) of every file below `root`."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.fixture
def cfg(compose):
    return compose(*TINY)


# --- claim -------------------------------------------------------------------------------------------------


def test_a_directory_goes_from_new_over_unfinished_to_done(tmp_path, cfg):
    path = tmp_path / "a" / "b"
    assert claim(path, cfg) == (path, State.NEW)
    assert list(path.iterdir()) == []
    write_config(path, cfg)
    assert claim(path, cfg) == (path, State.UNFINISHED)
    (path / "FAILED").write_text("why\n")
    assert claim(path, cfg) == (path, State.UNFINISHED)
    mark_done(path)
    assert claim(path, cfg) == (path, State.DONE)
    assert not (path / "FAILED").exists()


@pytest.mark.parametrize(
    "override", ["resume=never", "name=other", "runs=x", "logger=wandb", "trainer.progress=false", "data=digits"]
)
def test_settings_that_change_nothing_may_differ(tmp_path, compose, cfg, override):
    write_config(tmp_path, cfg)
    other = compose(*TINY, override)
    other.resume = "auto"
    assert claim(tmp_path, other) == (tmp_path, State.UNFINISHED)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("L=3", "L: 2 there, 3 here"),
        ("seed=1", "seed: 0 there, 1 here"),
        ("eps=0.1", "eps: 0.05 there, 0.1 here"),
        ("loss.beta=5", "loss.beta: 6.0 there, 5 here"),
        ("optimizer.milestones=[0.5]", "optimizer.milestones: [0.5, 0.75] there, [0.5] here"),
        ("data.num_test=49", "data.num_test: 50 there, 49 here"),
        ("+protocol.attacks.other={_target_:mixadv.attacks.pgd.PGD}", "protocol.attacks.other._target_: None there"),
    ],
)
def test_settings_that_change_the_numbers_are_refused(tmp_path, compose, override, said):
    write_config(tmp_path, compose(*TINY, "loss=trades"))
    with pytest.raises(UserError) as refused:
        claim(tmp_path, compose(*TINY, "loss=trades", override))
    message = str(refused.value)
    assert said in message
    assert "resume=never" in message
    assert "\n" not in message


def test_many_differences_are_counted_not_listed(tmp_path, compose, cfg):
    write_config(tmp_path, cfg)
    # The seed is the data's seed too.
    other = compose(*TINY, "L=3", "seed=1", "precision=bf16", "baseline=true", "schedule.epochs=9")
    with pytest.raises(UserError, match="and 3 more"):
        claim(tmp_path, other)


def test_resume_never_numbers_the_directories(tmp_path, cfg):
    cfg.resume = "never"
    path = tmp_path / "run"
    for expected in ("run", "run.2", "run.3"):
        found, state = claim(path, cfg)
        assert (found, state) == (tmp_path / expected, State.NEW)
        write_config(found, cfg)
    cfg.resume = "auto"
    assert claim(path, cfg) == (path, State.UNFINISHED)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, cfg):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file/run: Not a directory.*hydra\.run\.dir=DIR"):
        claim(tmp_path / "file" / "run", cfg)


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
    write_results(tmp_path, {"L": 3, "flags": []}, arrays)
    assert read_results(tmp_path) == {"L": 3, "flags": []}
    with np.load(tmp_path / "records.npz", allow_pickle=False) as records:
        assert {*arrays} <= {*records.files}
        for name, array in arrays.items():
            np.testing.assert_array_equal(records[name], array)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records.npz", "results.json"]


def test_records_hold_the_arrays_and_nothing_else(tmp_path):
    write_results(tmp_path, {}, {"labels": np.arange(5)})
    with np.load(tmp_path / "records.npz", allow_pickle=False) as records:
        assert records.files == ["labels"]


def test_a_crash_while_writing_keeps_the_old_file_whole(tmp_path, cfg, monkeypatch):
    write_config(tmp_path, cfg)
    write_results(tmp_path, {"L": 1}, {"labels": np.arange(2)})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    for write in (
        lambda: write_config(tmp_path, cfg),
        lambda: write_results(tmp_path, {"L": 2}, {"labels": np.ones(9)}),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content


def test_provenance_names_versions_and_the_commit(monkeypatch):
    import torch

    found = rd.provenance()
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
    before = snapshot(cwd)
    again = run_command(cwd, *TINY, "L=3", "seed=5", "name=tiny")
    assert again.rc == 0
    assert again.err == ""
    assert "outputs/train/tiny is done" in again.out
    assert "mixture" in again.out
    after = snapshot(cwd)
    # The figure is drawn from the same files again.
    curves = os.path.join("outputs", "train", "tiny", "curves.png")
    assert {k: v for k, v in after.items() if k != curves} == {k: v for k, v in before.items() if k != curves}

    other = run_command(cwd, *TINY, "L=3", "seed=6", "name=tiny")
    assert "holds a run with other settings (" in other.refusal()
    assert "seed: 5 there, 6 here" in other.err
    kept = snapshot(cwd)
    assert {k: v for k, v in kept.items() if k != curves} == {k: v for k, v in before.items() if k != curves}

    beside = run_command(cwd, *TINY, "L=1", "seed=6", "name=tiny", "resume=never", "schedule.epochs=1")
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
    monkeypatch.setattr(build, "available_memory", lambda device: 3 * 650 * 12 + 100)
    refusal = command(*TINY, "L=4", "name=big").refusal()
    assert refusal.startswith("L=4 members of model=linear need")
    assert "at most L=3" in refusal
    assert not (tmp_path / "outputs" / "train" / "big").exists()
    monkeypatch.setattr(build, "available_memory", lambda device: 4 * 650 * 12)
    fits = command(*TINY, "L=4", "name=big", "schedule.epochs=1")
    assert fits.rc == 0, fits.err


def test_available_memory_is_asked_of_the_system():
    import torch

    free = build.available_memory(torch.device("cpu"))
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
