"""The commands of the contract, in process, on data that train in a second."""

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from builders.cifar10_archive import small_archive
from builders.runs import read_results
from conftest import TINY, run_command
from mixadv.data.cifar10 import CIFAR10

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
PROTOCOL = [text for text in TINY if text.startswith("protocol.")]
FILES = {
    "DONE",
    "checkpoints",
    "config.yaml",
    "choices.json",
    "curves.png",
    "examples.npz",
    "metrics.csv",
    "mixadv.log",
    "mixture",
    "records.npz",
    "results.json",
}
RESULTS = {
    *("schema", "task", "seed", "device", "versions", "git", "config", "threat_model", "L", "weights"),
    *("num_examples", "clean", "attacks", "robust", "members", "game", "flags", "seconds"),
}
ONE_STEP = (
    "data.batch_size=2",
    "data.num_train=40",
    "data.num_val=10",
    "data.num_test=10",
    "data.eval_batch_size=5",
    "attack.num_steps=1",
    "protocol.validation.num_steps=1",
    "protocol.attacks.pgd-20.num_steps=1",
    "protocol.attacks.pgd-20.restarts=1",
    "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=1",
    "schedule.T_theta=1",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "trainer.log_every_n_steps=1",
    "logger=csv",
)


def rows_of(path):
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_contract(path, num_members, baseline=False, files=frozenset(FILES)):
    """The files and keys that scripts rely on."""
    names = {entry.name for entry in path.iterdir()}
    assert names >= files
    assert names <= files | FILES | ({"baseline"} if baseline else set())
    assert ("baseline" in names) == baseline
    kept = {entry.name for entry in (path / "checkpoints").iterdir()}
    assert kept - {"previous.ckpt"} == {"best.ckpt", "last.ckpt"}
    assert {entry.name for entry in (path / "mixture").iterdir()} == {"README.md", "config.json", "mixture.safetensors"}
    if "curves.png" in files:
        assert (path / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = read_results(path)
    assert set(results) >= RESULTS
    assert results["L"] == len(results["weights"]) == len(results["members"]) == num_members
    assert sum(results["weights"]) == pytest.approx(1, abs=1e-6)
    assert set(results["threat_model"]) == {"norm", "eps"}
    assert set(results["game"]) == {"value_at_weights", "value_lp", "gap", "matching_penny_gap"}
    assert set(results["clean"]) >= {"expected_accuracy", "ensemble_accuracy", "ci95"}
    assert set(results["robust"]) >= {"expected_accuracy", "ci95"}
    for member in results["members"]:
        assert {"clean", "robust"} <= set(member)
    for name, attack in results["attacks"].items():
        assert name.split("-")[0] in ("pgd", "apgd", "arc", "square", "subsets", "climber")
        assert {"expected_accuracy", "settings", "seconds"} <= set(attack)
    assert {"train", "evaluate", "total"} <= set(results["seconds"])
    for part in ("clean", "robust"):
        low, high = results[part]["ci95"]
        assert 0 <= low <= results[part]["expected_accuracy"] <= high <= 1
    with np.load(path / "records.npz", allow_pickle=False) as records:
        assert len(records["robust"]) == results["num_examples"]
        assert records["robust"].mean() == pytest.approx(results["robust"]["expected_accuracy"])
        assert records["clean"].mean() == pytest.approx(results["clean"]["expected_accuracy"])
    return results


# --- presets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_one_step_and_keeps_the_contract(command, tmp_path, monkeypatch, experiment):
    if experiment.startswith("cifar10"):
        official = small_archive()
        official.unpack(tmp_path / "data" / "cifar-10-batches-py")
        reader = official.module(tmp_path / "data").reader()
        monkeypatch.setattr(CIFAR10, "reader", classmethod(lambda cls: reader))
        # What takes long in them: large networks, many attacks, compilation.
        small = ("model=small_cnn", "protocol=fast", "compile=false", "trainer.precision=32-true")
    elif experiment == "averaged_digits":
        # A class has few originals here.
        small = ("data.average=2", "protocol=fast")
    else:
        small = ("protocol=fast",)
    # Fixed weights take no steps.
    weighed = yaml.safe_load((ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text())["defaults"]
    fixed = {"override /lambda_solver": "uniform"} in weighed
    small += () if fixed else ("lambda_solver.num_steps=1",)
    files = FILES | ({"regions.npz", "regions.png"} if experiment == "triangle" else set())
    finished = command(f"experiment={experiment}", *small, *ONE_STEP, "name=one")
    assert finished.rc == 0, finished.err
    assert finished.err == ""
    path = tmp_path / "outputs" / "train" / "one"
    config = yaml.safe_load((path / "config.yaml").read_text())
    # Nothing is left to choose where the command says precision and compile.
    results = assert_contract(path, config["L"], config["baseline"], files - {"choices.json"})
    assert results["num_examples"] == 5
    assert results["config"] == config
    rows = rows_of(path)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert max(steps) == 4
    # Four batches hold a weights phase, whichever the schedule.
    assert any(row.get("weights/value") for row in rows) != fixed
    if config["baseline"]:
        assert_contract(path / "baseline", 1, files=files - {"choices.json", "config.yaml", "curves.png", "mixadv.log"})
        assert not any(row.get("weights/value") for row in rows_of(path / "baseline"))


def test_a_baseline_has_the_same_files(command, tmp_path):
    assert command(*TINY, "baseline=true", "trainer.max_epochs=1", "name=both").rc == 0
    path = tmp_path / "outputs" / "train" / "both" / "baseline"
    # The log of the run and its choices are beside the mixture.
    assert_contract(path, 1, files=FILES - {"choices.json", "mixadv.log"})
    assert yaml.safe_load((path / "config.yaml").read_text())["L"] == 1


# --- a single run ------------------------------------------------------------------------------------------


def test_a_run_keeps_the_contract(trained):
    results = assert_contract(trained.path, 3)
    assert (results["task"], results["seed"]) == ("train", 5)
    assert results["threat_model"] == {"norm": "linf", "eps": 0.05}
    assert results["num_examples"] == 50
    assert list(results["attacks"]) == ["pgd-20", "arc", "subsets", "square", "climber"]
    assert results["robust"]["expected_accuracy"] <= results["attacks"]["pgd-20"]["expected_accuracy"]
    assert results["robust"]["expected_accuracy"] <= results["clean"]["expected_accuracy"]
    # Ten classes: a trained member knows more than chance, an untrained one does not.
    assert results["clean"]["expected_accuracy"] > 0.3
    assert trained.finished.err == ""


def test_a_run_says_what_came_out_and_where(trained):
    out = trained.finished.out
    assert out.startswith("Writing to outputs/train/tiny\n")
    assert "Training 3 members for 2 epochs each" in out
    for label in ("member 0", "member 1", "member 2", "mixture", "averaged twin", "vote", "constant answer"):
        assert label in out
    assert str(trained.path) in out
    assert "baseline" not in out


def test_the_members_intervals_are_those_of_the_results(trained):
    lines = trained.finished.out.splitlines()
    for k, member in enumerate(read_results(trained.path)["members"]):
        (line,) = [line for line in lines if line.startswith(f"│ member {k}")]
        low, high = (f"{100 * end:.1f}" for end in member["ci95"])
        assert f"[{low}, {high}]" in line


def test_the_history_counts_epochs_per_model_and_updates_lambda(trained):
    rows = rows_of(trained.path)
    # 200 images, 20 per batch, 3 members drawn in turn, 2 epochs; a weights phase every 4 * 3 + 1 batches.
    # An epoch has 30 batches of members and 2 phases, whether these fall into it or not: here the last has one less.
    assert int(rows[-1]["step"]) == 2 * (30 + 30 // 12)
    assert int(rows[-1]["member_updates"]) == 60
    assert float(rows[-1]["epoch"]) == pytest.approx(2)
    phases = [int(row["step"]) for row in rows if row["weights/value"]]
    assert phases == [13, 26, 39, 52]
    for row in rows:
        weights = [float(row[f"lambda/{k}"]) for k in range(3)]
        assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert [float(rows[0][f"lambda/{k}"]) for k in range(3)] == pytest.approx([1 / 3] * 3)
    validations = [row for row in rows if row["val/robust_accuracy"]]
    assert len(validations) == 2


def test_the_same_seed_gives_the_same_numbers_elsewhere(trained, command, tmp_path):
    assert command(*TINY, "L=3", "seed=5", "hydra.run.dir=here").rc == 0
    mine, theirs = read_results(tmp_path / "here"), read_results(trained.path)
    for key in ("weights", "clean", "robust", "members"):
        assert mine[key] == theirs[key]
    with np.load(tmp_path / "here" / "records.npz") as a, np.load(trained.path / "records.npz") as b:
        for name in b.files:
            np.testing.assert_array_equal(a[name], b[name])


def test_seed_zero_is_a_seed_of_its_own(command, tmp_path):
    results = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert command(*TINY, f"seed={seed}", f"name={name}", "trainer.max_epochs=1").rc == 0
        results[name] = read_results(tmp_path / "outputs" / "train" / name)
        assert results[name]["seed"] == seed
    assert results["a"]["weights"] == results["b"]["weights"]
    assert results["a"]["members"] == results["b"]["members"]
    assert results["a"]["members"] != results["c"]["members"]


def test_at_radius_zero_robust_is_clean(command, tmp_path):
    assert command(*TINY, "eps=0", "name=zero", "trainer.max_epochs=1").rc == 0
    results = read_results(tmp_path / "outputs" / "train" / "zero")
    assert results["threat_model"]["eps"] == 0
    assert results["robust"]["expected_accuracy"] == results["clean"]["expected_accuracy"]


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("model.width=3", "model"),
        ("data.batch_size=0", "data: batch_size"),
        ("data.num_train=100000", "data: "),
        ("attack.num_steps=-1", "attack: num_steps"),
        ("attack.foo=1", "attack.foo"),
        ("+protocol.attacks.pgd-20.keep=worst", "protocol.attacks.pgd-20: unknown keep"),
        ("loss.beta=1", "loss.beta"),
        ("lambda_solver.num_steps=0", "lambda_solver: "),
        ("eps=9", "eps=9"),
        ("trainer.accelerator=abacus", "trainer.accelerator=abacus is unknown"),
        ("logger.kind=paper", "logger.kind is called logger now: write logger=paper"),
        ("loss._target_=os.system", "loss._target_='os.system'"),
        ("data._target_=mixadv.data.nothing.Nothing", "data._target_='mixadv.data.nothing.Nothing' does not exist"),
        ("model._target_=mixadv.models.vgg", "model._target_='mixadv.models.vgg' does not exist"),
    ],
)
def test_settings_that_only_the_objects_know_are_refused_in_one_line(command, tmp_path, override, start):
    refusal = command(*TINY, override, "name=bad").refusal()
    assert refusal.startswith(start), refusal
    assert not (tmp_path / "outputs" / "train" / "bad").exists()


def test_an_l2_radius_beyond_the_box_is_refused(command):
    refusal = command(*TINY, "threat_model=l2", "eps=9").refusal()
    assert refusal.startswith("eps=9 exceeds the diagonal 8.00")


def test_data_that_cannot_be_had_name_the_remedy(command, tmp_path):
    refusal = command("data.download=false", "logger=csv", "model=linear", "name=nodata").refusal()
    for remedy in ("c58f30108f718f92721af3b95e74349a", "data.root=PATH", "make quickstart"):
        assert remedy in refusal
    assert not (tmp_path / "outputs" / "train" / "nodata").exists()


# --- sweeps and reports ------------------------------------------------------------------------------------


def test_a_sweep_keeps_runs_apart_survives_a_failure_and_is_reported(command, tmp_path):
    argv = ["-m", "eps=0.05,0.1", "L=2,0", *(text for text in TINY if not text.startswith("eps=")), "name=curve"]
    argv.append("trainer.max_epochs=1")
    first = command(*argv)
    assert first.rc == 1
    assert "Traceback" not in first.out + first.err
    summary = first.err.split("2 of 4 jobs failed; the same command runs these again:\n")[1].splitlines()
    assert len(summary) == 2
    for line, eps in zip(summary, ("0.05", "0.1"), strict=True):
        assert line.startswith(f"  eps={eps},L=0")
        assert line.endswith("L=0 must be at least 1")
    sweep = tmp_path / "outputs" / "sweeps" / "curve"
    done = sorted(path.parent for path in sweep.glob("*/results.json"))
    assert [path.name.split(",")[0:2] for path in done] == [["eps=0.05", "L=2"], ["eps=0.1", "L=2"]]
    assert [read_results(path)["threat_model"]["eps"] for path in done] == [0.05, 0.1]
    for path in done:
        assert_contract(path, 2)

    files = [path for path in sweep.glob("*/*") if path.is_file() and path.name != "curves.png"]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = command(*argv)
    assert again.rc == 1
    assert again.out.count(" is done\n") == 2
    assert "Training" not in again.out
    assert "mixture" not in again.out
    # The reasons of the failures are written anew, the rest is left alone.
    for path in files:
        assert path.name in ("multirun.yaml", "FAILED") or path.stat().st_mtime_ns == before[path]

    report = command("task=report", "runs=outputs/sweeps/curve")
    assert (report.rc, report.err) == (0, "")
    assert (sweep / "report.png").read_bytes().startswith(b"\x89PNG")
    with (sweep / "report.csv").open() as file:
        table = list(csv.DictReader(file))
    values = sorted(float(row["eps"]) for row in table if row.get("eps"))
    assert set(values) == {0.05, 0.1}
    assert not (tmp_path / "outputs" / "report").exists()


def test_a_report_needs_runs(command, tmp_path):
    refusal = command("task=report", "runs=nowhere").refusal()
    assert refusal.startswith("nowhere is not a directory")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_inside_a_sweep_job_keeps_its_reason(command, tmp_path):
    argv = [*TINY, "name=lr", "trainer.max_epochs=1"]
    finished = command("-m", "optimizer.lr=1e30,0.1", *argv)
    assert finished.rc == 1
    folders = sorted(path for path in (tmp_path / "outputs" / "sweeps" / "lr").iterdir() if path.is_dir())
    assert len(folders) == 2
    good, failed = folders
    assert (good / "DONE").exists()
    reason = (failed / "FAILED").read_text().strip()
    assert "\n" not in reason
    assert reason in finished.err
    assert not (failed / "DONE").exists()


# --- task=evaluate -----------------------------------------------------------------------------------------

MEASURED = ("L", "weights", "num_examples", "clean", "robust", "members", "threat_model")


@pytest.mark.parametrize("place", ["", "mixture", "checkpoints/best.ckpt"])
def test_an_exported_mixture_gives_the_numbers_of_its_training(trained, command, tmp_path, place):
    finished = command("task=evaluate", f"mixture={trained.path / place}", "seed=5", "name=again", *PROTOCOL)
    assert finished.rc == 0, finished.err
    path = tmp_path / "outputs" / "evaluate" / "again"
    found, trained_results = read_results(path), read_results(trained.path)
    assert found["task"] == "evaluate"
    for key in MEASURED:
        assert found[key] == trained_results[key], key
    for name, attack in trained_results["attacks"].items():
        for key in ("expected_accuracy", "ensemble_accuracy", "settings"):
            assert found["attacks"][name][key] == attack[key]
    with np.load(path / "records.npz") as a, np.load(trained.path / "records.npz") as b:
        for name in b.files:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert {entry.name for entry in path.iterdir()} == {
        *("DONE", "choices.json", "config.yaml", "records.npz", "results.json", "report.html"),
        *("examples.npz", "examples.png", "attacks.png", "images.csv", "mixadv.log"),
    }
    assert "unfinished" not in (path / "report.html").read_text()


def test_an_evaluation_is_continued_and_shown_like_a_run(trained, command, tmp_path):
    argv = ["task=evaluate", f"mixture={trained.path}", "name=shown", "data.num_test=10", "protocol.diagnosed=0"]
    assert command(*argv).rc == 0
    path = tmp_path / "outputs" / "evaluate" / "shown"
    before = {entry: entry.stat().st_mtime_ns for entry in path.iterdir()}
    again = command(*argv)
    assert again.rc == 0
    assert "is done; its results" in again.out
    assert {entry: entry.stat().st_mtime_ns for entry in path.iterdir()} == before


def test_an_evaluation_takes_what_the_command_says_over_what_was_trained(trained, command, tmp_path):
    argv = ["task=evaluate", f"mixture={trained.path}", "eps=0.2", "data.num_test=20", "name=wider"]
    finished = command(*argv, "protocol.attacks.pgd-20.num_steps=3")
    assert finished.rc == 0, finished.err
    found = read_results(tmp_path / "outputs" / "evaluate" / "wider")
    assert found["threat_model"] == {"norm": "linf", "eps": 0.2}
    assert found["num_examples"] == 20
    assert found["config"]["data"]["num_train"] == 200
    assert found["config"]["data"]["_target_"] == "mixadv.data.digits.Digits"
    assert found["config"]["model"] == {"_target_": "mixadv.models.linear"}
    assert found["attacks"]["pgd-20"]["settings"]["num_steps"] == 3
    assert found["config"]["eps"] == 0.2


def test_a_path_may_be_called_as_runs_are_called(trained, command, tmp_path):
    shutil.copytree(trained.path, tmp_path / "eps=0.05,L=3")
    shown = command("task=report", "runs=eps=0.05,L=3")
    assert shown.rc == 0, shown.err
    finished = command("task=evaluate", "mixture=eps=0.05,L=3/mixture", "data.num_test=20")
    assert finished.rc == 0, finished.err
    (run,) = (tmp_path / "outputs" / "evaluate").iterdir()
    assert run.name.startswith("mixture=eps=0.05,L=3-mixture,data.num_test=20-")


def test_an_evaluation_takes_another_norm(trained, command, tmp_path):
    argv = ["task=evaluate", f"mixture={trained.path}", "threat_model=l2", "eps=0.3", "data.num_test=20", "name=l2"]
    finished = command(*argv)
    assert finished.rc == 0, finished.err
    assert read_results(tmp_path / "outputs" / "evaluate" / "l2")["threat_model"] == {"norm": "l2", "eps": 0.3}


def test_a_mixture_for_other_images_is_refused(trained, command, tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (9, 9), (number * 20, 0, 0)).save(folder / f"{number}.png")
    argv = ["task=evaluate", f"mixture={trained.path}", "data=image_folder", "data.root=images", "name=other"]
    refusal = command(*argv).refusal()
    assert refusal.startswith("the mixture takes images (1, 8, 8) in 10 classes")
    assert "(3, 9, 9) in 2" in refusal
    assert not (tmp_path / "outputs" / "evaluate" / "other").exists()


@pytest.mark.parametrize("path", ["nowhere", "nowhere.ckpt"])
def test_a_mixture_that_is_missing_is_refused(command, tmp_path, path):
    refusal = command("task=evaluate", f"mixture={path}").refusal()
    assert refusal.startswith(f"mixture={path} does not exist")
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_folder_without_a_mixture_is_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    refusal = command("task=evaluate", "mixture=empty").refusal()
    assert refusal.startswith("no mixture at empty")


def test_a_torn_checkpoint_is_refused(trained, command, tmp_path):
    content = (trained.path / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(content[: len(content) // 2])
    refusal = command("task=evaluate", "mixture=torn.ckpt").refusal()
    assert refusal.startswith("torn.ckpt is not a readable checkpoint")


def test_a_torn_last_checkpoint_is_refused_with_the_remedy_and_kept(trained, tmp_path):
    shutil.copytree(trained.cwd, tmp_path / "copy")
    path = tmp_path / "copy" / "outputs" / "train" / "tiny"
    for name in ("DONE", "results.json"):
        (path / name).unlink()
    (path / "checkpoints" / "previous.ckpt").unlink()
    last = path / "checkpoints" / "last.ckpt"
    os.truncate(last, last.stat().st_size // 2)
    size = last.stat().st_size
    finished = run_command(tmp_path / "copy", *TINY, "L=3", "seed=5", "name=tiny")
    assert "resume=never" in finished.refusal()
    assert last.stat().st_size == size
    assert "not a readable checkpoint" in (path / "FAILED").read_text()


# --- what the pages tell of the command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (
            "lambda_solver=",
            " ".join(f"lambda_solver={name}" for name in ("entropic", "held_out", "lp", "oracle", "uniform")),
        ),
        ("predict.", "predict.images= predict.resize="),
    ],
)
def test_the_tab_key_completes_groups_and_keys(command, typed, offered):
    line = f"python run.py {typed}"
    assert command("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))).out.split() == offered.split()


def test_settings_of_ones_own_are_taken_and_listed(command, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    preset = next(
        text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "override /model: linear" in text
    )
    (tmp_path / "mine" / "experiment" / "small.yaml").write_text(preset)
    shown = command("--config-dir", "mine", "experiment=small", "L=2", "--cfg", "job").out.splitlines()
    assert {"L: 2", "eps: 0.1"} <= set(shown)
    assert "small" in next(
        line for line in command("--config-dir", "mine", "--help").out.splitlines() if line.startswith("experiment:")
    )
