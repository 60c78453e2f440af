"""What is said about keys and words that are not known, and what composition refuses."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

import mixadv
from mixadv import config
from mixadv.setting_keys import flat_settings
from mixadv.unknown_keys import RENAMED, misplaced_word, unknown_key

ROOT = Path(__file__).resolve().parents[1]
TAIL = "`--cfg job` shows all of them, --help the groups"
KNOWN = {
    "L",
    "eps",
    "optimizer",
    "optimizer.lr",
    "data",
    "data.batch_size",
    "trainer.max_epochs",
    "trainer.min_epochs",
    "attack.num_steps",
}
KNOWN |= {f"{part}.num_steps" for part in ("protocol.attacks.arc", "protocol.validation", "lambda_solver")}


# --- functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "likely"),
    [
        ("optimzer.lr", "optimizer.lr"),
        ("data.batchsize", "data.batch_size"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("optimzer", "optimizer"),
        ("batch_size", "data.batch_size"),
        ("esp", "eps"),
        ("l", "L"),
        ("epochs", "trainer.max_epochs"),
        ("trainer.epochs", "trainer.max_epochs"),
        ("trainer.num_epochs", "trainer.max_epochs"),
    ],
)
def test_a_slip_is_answered_with_the_key(key, likely):
    assert unknown_key(key, KNOWN) == f"{key}: there is no such key, did you mean {likely}? {TAIL}"


@pytest.mark.parametrize("key", ["foo.bar", "optimizer.betas", "num_steps", "data", "x"])
def test_what_is_like_nothing_or_like_too_much_gets_no_suggestion(key):
    assert unknown_key(key, KNOWN) == f"{key}: there is no such key; {TAIL}"


@pytest.mark.parametrize(
    ("key", "value", "new"),
    [
        ("schedule.epochs", "3", "trainer.max_epochs=3"),
        ("trainer.checkpoint_minutes", "5", "callbacks.checkpoint.train_time_interval.minutes=5"),
        ("precision", "fp32", "trainer.precision=32-true"),
        ("precision", "bf16", "trainer.precision=bf16-mixed"),
        ("precision", "auto", "trainer.precision=auto"),
        ("optimizer.lr_schedule", "cosine", "scheduler=cosine"),
        ("logger.kind", "csv", "logger=csv"),
        ("logger.entity", "null", "logger.wandb.entity=null"),
        ("model.name", None, "model=..."),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(key, value, new):
    message = unknown_key(key, KNOWN, value)
    assert message == f"{key} is called {new.partition('=')[0]} now: write {new}"


def test_new_names_are_no_old_ones():
    assert not set(RENAMED) & set(RENAMED.values())


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--eps 0.1", "write eps=0.1"),
        ("--eps=0.1", "write eps=0.1"),
        ("-L 3", "write L=3"),
        ("--max-epochs 3", "write max_epochs=3"),
        ("--baseline seed=3", "write baseline=VALUE"),
        ("-m seed=1,2 --baseline --eps", "write baseline=VALUE"),
        ("evaluate", "write task=evaluate"),
        ("train L=3", "write task=train"),
        ("L=3 -m report", "write task=report"),
        ("L=3 -m seed=1,2", "before or after all settings, not between them"),
    ],
)
def test_words_of_other_programs_are_answered_with_ours(words, remedy):
    assert misplaced_word(words.split(), get_args_parser(), config.TASKS).endswith(remedy)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "-m eps=1,2",
        "--multi L=1",
        "--cfg job",
        "--cfg=job L=3",
        "-cjob",
        "-c all --help",
        "-cd train",
        "L=3 seed=1,2 -m",
        "~protocol.attacks.arc +experiment=quickstart",
        "something",
        "-- --eps 0.1",
        "-",
    ],
)
def test_what_hydra_knows_is_left_to_it(words):
    assert misplaced_word(words.split(), get_args_parser(), config.TASKS) is None


# --- commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["optimzer.lr=0.1"], "optimzer.lr: there is no such key, did you mean optimizer.lr?"),
        (["data.batchsize=3"], "data.batchsize: there is no such key, did you mean data.batch_size?"),
        (["trainer.epochs=2"], "trainer.epochs: there is no such key, did you mean trainer.max_epochs?"),
        (["esp=0.1"], "esp: there is no such key, did you mean eps?"),
        (["optimzer=sgd"], "optimzer: there is no such key, did you mean optimizer?"),
        (["data=digits", "+optimizer.lrr=3"], "optimizer.lrr: SGD has no such setting, did you mean optimizer.lr?"),
        (["loss=trades", "loss.bet=3"], "loss.bet: there is no such key, did you mean loss.beta?"),
        (["hydra.verbos=true"], "hydra.verbos: there is no such key, did you mean hydra.verbose?"),
        (["hydra/job_loging=none"], "hydra/job_loging: there is no such key, did you mean hydra/job_logging?"),
        # What is wrong beside it does not hide it.
        (["optimzer.lr=0.1", "hydra/launcher=basic"], "optimzer.lr: there is no such key, did you mean optimizer.lr?"),
        (["--eps", "0.1"], "--eps: there is no such flag; settings have no dashes, write eps=0.1"),
        (["-m", "--cfg", "job"], "Only one of --run, --multirun, --cfg"),
        (["evaluate"], "evaluate is not KEY=VALUE: write task=evaluate"),
    ],
)
def test_a_command_with_a_slip_is_answered_with_the_remedy(command, tmp_path, argv, answer):
    assert command(*argv).refusal().startswith(answer)
    # Matplotlib keeps its list of fonts below HOME.
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and ".cache" not in path.parts]


def test_an_old_name_in_a_command_is_answered_with_the_new_one(command, monkeypatch, compose):
    """Whichever of them the schema has left already."""
    known = flat_settings(OmegaConf.to_container(compose()))
    monkeypatch.setitem(RENAMED, "old.name", "new.name")
    gone = ["old.name", *(key for key in RENAMED if key.count(".") == 1 and key not in known and key != "old.name")]
    for key in gone:
        value = "7" if key != "model.name" else "linear"
        assert command(f"{key}={value}").refusal() == unknown_key(key, (), value)


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("schedule/mine", "betas: 3", "schedule/mine.yaml: schedule.betas: there is no such key"),
        ("schedule/slow", "T_theta: x", "schedule/slow.yaml: schedule.T_theta: Value 'x' of type 'str' could not be"),
        ("optimizer/torn", "a: b: c", "a configuration file cannot be read: mapping values are not allowed here in "),
    ],
)
def test_a_file_that_does_not_compose_is_named_with_the_reason(command, tmp_path, name, text, answer):
    path = tmp_path / "myconf" / f"{name}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
    refusal = command(name.replace("/", "="), "--config-dir", "myconf").refusal()
    assert refusal.startswith(answer)


@pytest.mark.parametrize("call", [[str(ROOT / "run.py")], ["-m", "mixadv"]], ids=["run.py", "-m mixadv"])
def test_the_version_is_told_without_torch(call, tmp_path):
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", *call, "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    hydra, lightning, torch = map(version, ("hydra-core", "pytorch-lightning", "torch"))
    assert answer.stdout == f"mixadv {mixadv.__version__} (hydra {hydra}, lightning {lightning}, torch {torch})\n"
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "mixadv.main" in imported
    assert not imported & {"torch", "pytorch_lightning", "numpy", "rich"}


def test_the_package_runs_as_a_program(tmp_path):
    call = [sys.executable, "-m", "mixadv", "task=game", "name=g"]
    answer = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert (tmp_path / "outputs" / "game" / "g" / "results.json").exists()
