"""The configuration: what it accepts, what it refuses, and how."""

import copy
import math
import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict

from mixadv import config
from mixadv.config import parse_eps
from mixadv.errors import UserError
from mixadv.shipped import protocols, shipped_protocol

ROOT = Path(__file__).resolve().parents[1]
# hydra/ holds choices for groups of Hydra's own, and the searches need sweepers that nothing of ours installs.
GROUPS = sorted({path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra", "hparams_search"})


# --- eps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("8/255", Fraction(8, 255)),
        (" 8 / 255 ", Fraction(8, 255)),
        ("8.0/255.0", Fraction(8, 255)),
        ("0.031", Fraction(31, 1000)),
        (0.031, Fraction(31, 1000)),
        ("1e-2", Fraction(1, 100)),
        ("+.5", Fraction(1, 2)),
        ("3.", Fraction(3)),
        ("0", Fraction(0)),
        (0, Fraction(0)),
        ("0/255", Fraction(0)),
        ("-0", Fraction(0)),
    ],
)
def test_eps_reads_fractions_and_decimals(text, exact):
    assert parse_eps(text) == float(exact)


@pytest.mark.parametrize(
    "text",
    [
        *("8px", "8/255px", "-1", "-1/255", "1/0", "0/0", "nan", "inf", "-inf", "1e999", True, False, "", None),
        *("1/2/3", "/255", "8/", "0x10", "1_000", "8 255", "eps", "__import__('os')", [8, 255]),
    ],
)
def test_eps_refuses_what_is_no_radius(text):
    with pytest.raises(UserError) as refused:
        parse_eps(text)
    assert str(refused.value).startswith("eps=")
    assert "\n" not in str(refused.value)


# --- what the shipped configuration says -------------------------------------------------------------------


def test_the_flagship_command_is_the_papers_setting(command):
    shown = command("--cfg", "job", "loss=trades", "lambda_solver=entropic", "L=3")
    assert (shown.rc, shown.err) == (0, "")
    cfg = OmegaConf.create(shown.out)
    assert (cfg.task, cfg.L, cfg.eps, cfg.seed) == ("train", 3, "8/255", 0)
    assert cfg.threat_model.norm == "linf"
    assert config.parse_eps(cfg.eps) == 8 / 255
    assert cfg.model._target_ == "mixadv.models.resnet18"
    assert cfg.data._target_ == "mixadv.data.cifar10.CIFAR10"
    loss = OmegaConf.to_container(cfg.loss)
    assert (loss.pop("class_weights"), loss.pop("ratio"), loss.pop("orders")) == (None, 1.4, None)
    assert loss == {"_target_": "mixadv.losses.TRADES", "beta": 6.0}
    assert cfg.lambda_solver._target_ == "mixadv.lambda_solvers.AcceleratedEntropic"
    assert cfg.lambda_solver.include_attack_points is True
    assert (cfg.attack._target_, cfg.attack.num_steps) == ("mixadv.attacks.pgd.PGD", 10)
    assert math.isclose(cfg.attack.step_size * config.parse_eps(cfg.eps), 2 / 255)
    assert (cfg.schedule.kind, cfg.trainer.max_epochs) == ("sampled", 200)
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    assert (cfg.trainer.precision, cfg.compile) == ("auto", "auto")
    config.check(cfg)


def test_every_choice_of_every_group_composes_and_passes(compose):
    choices = {group: sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")) for group in GROUPS}
    assert all(choices.values())
    # The n-th choices of all groups at once: every choice is taken, in few compositions.
    for number in range(max(map(len, choices.values()))):
        said = [f"{group}={names[number % len(names)]}" for group, names in choices.items()]
        if "data=image_folder" in said:
            said.append("data.root=somewhere")
        if {"game=table", "game=points"} & set(said):
            said.append("game.file=mine.csv")
        if "game=points" in said:
            said.append("game.classifiers=[[1,0,0]]")
        if "task=solve" in said:
            said.append("members=[here,there]")
        if {"task=evaluate", "task=predict"} & set(said):
            said.append(f"mixture={ROOT}")
        if "task=predict" in said:
            said.append(f"predict.images={ROOT}")
        cfg = compose(*said)
        config.check(cfg)
        losses = {"loss=at": "AT", "loss=trades": "TRADES", "loss=zero_one_smoothed": "SmoothedZeroOne"}
        assert cfg.loss._target_.rpartition(".")[2] == losses[said[GROUPS.index("loss")]]


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
@pytest.mark.parametrize("solver", sorted(path.stem for path in (ROOT / "conf" / "lambda_solver").glob("*.yaml")))
def test_every_solver_goes_with_every_experiment(compose, experiment, solver):
    from mixadv.tasks.build import build_solver

    cfg = compose(f"experiment={experiment}", f"lambda_solver={solver}")
    assert build_solver(cfg).attack_cost() >= 0


def test_the_weights_of_the_theory_can_be_asked_for_on_the_command_line(compose):
    """The paper's last iterate, the minimiser of the relaxation, and temperatures for each example."""
    from mixadv.lambda_solvers import AcceleratedEntropic, OracleSubgradient
    from mixadv.tasks.build import build_solver

    cfg = compose("lambda_solver.select=last", "lambda_solver.num_steps=1", "lambda_solver.centred=true")
    assert build_solver(cfg) == OracleSubgradient(1, select="last", centred=True)
    cfg = compose("lambda_solver=entropic", "lambda_solver.alpha=[0.1,1,0.5]", "lambda_solver.select=relaxed")
    wanted = AcceleratedEntropic((0.1, 1.0, 0.5), num_steps=50, num_samples=8, select="relaxed")
    assert build_solver(cfg) == wanted


@pytest.mark.parametrize("name", protocols())
def test_protocols_that_build_on_others_are_what_hydra_makes_of_them(compose, name):
    assert compose(f"protocol={name}").protocol == shipped_protocol(name)


def test_larger_protocols_hold_the_smaller_ones_unchanged():
    strict, study, whole, paper = (
        shipped_protocol(name)["attacks"] for name in ("strict", "study", "study_paper", "paper")
    )
    assert strict.items() < study.items() < whole.items()
    assert set(study) - set(strict) == {"pgd-20"}
    # Beside strict's APGD of one start, the paper's of five goes by another name.
    assert {f"{name}-5": attack for name, attack in paper.items()} == {k: whole[k] for k in set(whole) - set(study)}
    # What selects the epoch is what the test set sees first.
    assert study["pgd-20"] == shipped_protocol("study")["validation"]


@pytest.mark.parametrize(("experiment", "loss"), [("cifar10_at", "AT"), ("cifar10_trades", "TRADES")])
def test_the_presets_of_the_paper_are_its_setting(compose, experiment, loss):
    cfg = compose(f"experiment={experiment}")
    assert cfg.loss._target_ == f"mixadv.losses.{loss}"
    assert (cfg.model._target_, cfg.data._target_) == ("mixadv.models.resnet18", "mixadv.data.cifar10.CIFAR10")
    assert (cfg.schedule.kind, cfg.trainer.max_epochs) == ("sampled", 200)
    assert cfg.trainer.check_val_every_n_epoch == 1
    assert (cfg.attack.num_steps, cfg.protocol.validation.num_steps) == (10, 20)
    assert config.parse_eps(cfg.eps) == pytest.approx(8 / 255)
    assert cfg.protocol.name == "study_paper"


def test_presets_of_the_study_differ_in_the_loss_alone(compose):
    for at, trades in (("cifar10_at", "cifar10_trades"), ("cifar10_small_at", "cifar10_small_trades")):
        first, second = compose(f"experiment={at}"), compose(f"experiment={trades}")
        assert first.loss != second.loss
        first.loss = second.loss
        assert first == second
    short = compose("experiment=cifar10_gpu_short", "data=cifar10_jpeg", "loss=trades")
    assert short.data.name == "CIFAR-10 (JPEG)"
    assert (short.trainer.precision, short.compile, short.schedule.kind) == ("bf16-mixed", True, "shared")


def test_types_and_defaults_of_the_schema_agree_with_the_files(compose):
    cfg = compose()
    for key in ("L", "seed"):
        assert type(cfg[key]) is int
    assert type(cfg.baseline) is bool
    assert [compose(f"compile={text}").compile for text in ("auto", "true", "false")] == ["auto", True, False]
    assert (cfg.name, cfg.mixture, list(cfg.members), cfg.weights, cfg.runs) == (None, None, [], None, "outputs")
    assert list(compose("weights=[1,0]").weights) == [1.0, 0.0]
    assert all(type(weight) is float for weight in compose("weights=[1,0]").weights)


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=0"],
        ["seed=4294967295"],
        ["eps=0"],
        ["eps=0.031"],
        ["eps=1"],
        ["eps=1e-2"],
        ["eps=1.5", "threat_model=l2"],
        ["eps=128/255", "threat_model=l2"],
        ["L=1"],
        ["trainer.limit_train_batches=2", "trainer.limit_val_batches=0.5"],
        ["scheduler.milestones=[]", "optimizer.weight_decay=0"],
        ["name=7"],
    ],
    ids=" ".join,
)
def test_what_works_is_accepted(compose, overrides):
    config.check(compose(*overrides))


def test_zero_is_a_seed_for_everything_that_draws(compose):
    cfg = compose("seed=0")
    assert cfg.seed == 0
    assert cfg.data.seed == 0
    assert compose("seed=7").data.seed == 7


# --- refusals of the checks --------------------------------------------------------------------------------

BAD_VALUES = [
    # (what the command says, the key that the message begins with)
    ("L=0", "L"),
    ("L=-2", "L"),
    ("seed=-1", "seed"),
    ("seed=4294967296", "seed"),
    ("eps=8", "eps"),
    ("eps=255/8", "eps"),
    ("resume=yes", "resume"),
    ("name=///", "name"),
    ("name='..'", "name"),
    ("name=''", "name"),
    ("threat_model.norm=l1", "threat_model.norm"),
    ("threat_model.norm=null", "threat_model.norm"),
    ("schedule.kind=random", "schedule.kind"),
    ("trainer.max_epochs=0", "trainer.max_epochs"),
    ("trainer.max_epochs=-1", "trainer.max_epochs"),
    ("schedule.T_theta=0", "schedule.T_theta"),
    ("trainer.devices=0", "trainer.devices"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch"),
    ("trainer.log_every_n_steps=-1", "trainer.log_every_n_steps"),
    ("trainer.limit_train_batches=0", "trainer.limit_train_batches"),
    ("trainer.limit_val_batches=-1", "trainer.limit_val_batches"),
    ("trainer.limit_test_batches=1.5", "trainer.limit_test_batches"),
    ("trainer.limit_test_batches=true", "trainer.limit_test_batches"),
    ("trainer.limit_test_batches=some", "trainer.limit_test_batches"),
    ("task=evaluate", "task=evaluate needs mixture"),
    ("data=image_folder", "data.root"),
    ("+foo=1", "foo"),
    ("+schedule.foo=1", "schedule.foo"),
    ("+trainer.foo=1", "trainer.foo"),
    # What would be read, recorded, and then overruled.
    ("+threat_model.eps=0.9", "threat_model.eps"),
    ("+attack.restarts=7", "attack.restarts"),
    ("+attack.keep=last", "attack.keep"),
    ("weights=[0.5,0.3,0.2]", "weights=[0.5,0.3,0.2] has 3 numbers, but L=2"),
    ("trainer.check_val_every_n_epoch=3", "trainer.check_val_every_n_epoch"),
]


UNREADABLE_EPS = ["8px", "-1", "-1/255", "1/0", "nan", "inf", "true", "null", "", "[1,2]"]


@pytest.mark.parametrize("text", UNREADABLE_EPS)
def test_an_unreadable_eps_is_refused_by_its_own_message(changed, text):
    refusal = compose_text(changed, f"eps={text}")
    assert refusal.startswith("eps=")
    assert "\n" not in refusal


@pytest.mark.parametrize(("override", "key"), BAD_VALUES, ids=[text for text, _ in BAD_VALUES])
def test_bad_values_are_refused_in_one_line_that_begins_with_the_key(changed, override, key):
    text = compose_text(changed, override)
    assert text.startswith(key), text
    assert "\n" not in text
    assert len(text) > len(key) + 15, f"no remedy: {text}"


def compose_text(compose, *overrides):
    """The refusal of `overrides`, wherever the check finds it."""
    with pytest.raises(UserError) as refused:
        config.check(compose(*overrides))
    return str(refused.value)


@pytest.fixture(scope="module")
def changed(compose):
    """Like `compose` for one override, but a plain KEY=VALUE is set on a copy of the defaults: 100 times faster."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    defaults = compose()

    def change(text):
        override = OverridesParser.create().parse_override(text)
        if override.is_add() or override.key_or_group in GROUPS:
            return compose(text)
        cfg = copy.deepcopy(defaults)
        OmegaConf.update(cfg, override.key_or_group, override.value())
        return cfg

    return change


@pytest.mark.parametrize(
    "weights",
    ["null", "[0.5,0.3,0.2]", "[1]", "[0,1]", "[0.333333,0.333333,0.333334]", "[0.2,0.8000009]", "[1e-300,1]"],
)
def test_weights_that_sum_to_one_are_accepted(compose, weights):
    config.check(compose("task=evaluate", "members=[a]", f"weights={weights}"))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("[]", "weights=[] lets no member be drawn: give positive weights, or leave it out for 1/L each"),
        ("[0,0.0]", "weights=[0,0] lets no member be drawn"),
        ("[-0.5,1.5]", "weights=[-0.5,1.5]: -0.5 is no probability; give one number of at least 0 for each member"),
        ("[-1e-9,1]", "-1e-09 is no probability"),
        ("[nan,1]", "nan is no probability"),
        ("[1,inf]", "inf is no probability"),
        ("[0.5,0.3,0.3]", "sum to 1.1, not to 1: divide them by their sum, weights=[0.454545455,0.272727273,0.27272"),
        ("[0.2,0.800002]", "sum to 1.000002, not to 1"),
        ("[0.2,0.799998]", "sum to 0.999998, not to 1"),
        ("[2,1]", "weights=[2,1] sum to 3, not to 1: divide them by their sum, weights=[0.666666667,0.333333333]"),
        ("[1e308,1e308]", "weights=[0.5,0.5]"),
        ("[1e-320]", "weights=[1]"),
    ],
)
def test_weights_that_are_no_distribution_are_refused_with_one_that_is(compose, weights, said):
    refusal = compose_text(compose, "task=evaluate", "members=[a,b]", f"weights={weights}")
    assert refusal.startswith("weights=[")
    assert said in refusal
    assert "\n" not in refusal
    if "divide" in refusal:
        config.check(compose("task=evaluate", "members=[a,b]", refusal.rpartition(", ")[2]))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["task=solve", "members=[a,b]"], "task=solve finds the weights itself; task=evaluate measures those"),
        (["task=report"], "task=report does not read it; it belongs to task=evaluate members=[A,B,...]"),
        (["task=evaluate", "mixture=here"], "mixture=here has weights of its own; to give its members others, name it"),
        (["task=evaluate", "mixture=here", "members=[a,b]"], "name it in members=[...] and leave mixture=... out"),
        (["task=evaluate"], "task=evaluate needs mixture=PATH"),
    ],
)
def test_weights_that_nobody_reads_are_refused(compose, argv, said):
    assert said in compose_text(compose, *argv, "weights=[0.5,0.5]")


@pytest.mark.parametrize("biases", ["[0.1,2]", "[[0.3,0,-0.3],[-1,0,1]]", "[]"])
def test_scales_and_tables_of_biases_are_accepted(compose, biases):
    config.check(compose("task=solve", "members=[a]", f"biases={biases}"))


@pytest.mark.parametrize(
    ("biases", "said"),
    [
        ("[0.1,-0.2]", "-0.2 is no scale; scales are positive"),
        ("[0]", "0 is no scale"),
        ("[.nan]", "neither a list of scales"),
        ("[true]", "neither a list of scales"),
        ("[a]", "neither a list of scales"),
        ("[0.1,[0.1,0.2]]", "neither a list of scales"),
        ("[[0.1]]", "with a column for each class"),
        ("[[]]", "with a column for each class"),
        ("[[0.1,.inf]]", "a table of finite numbers"),
        ("[[0.1,0.2],[0.1,0.2,0.3]]", "rows of different lengths"),
    ],
)
def test_biases_that_cannot_be_added_are_refused(compose, biases, said):
    refusal = compose_text(compose, "task=solve", "members=[a]", f"biases={biases}")
    assert refusal.startswith("biases=[")
    assert said in refusal


@pytest.mark.parametrize("task", [["task=train"], ["task=evaluate", "members=[a,b]"], ["task=report"]])
def test_biases_that_nobody_reads_are_refused(compose, task):
    assert "it belongs to task=solve members=[RUN]" in compose_text(compose, *task, "biases=[0.1]")


def test_refusals_name_the_remedy(compose):
    assert "did you mean eps=8/255?" in compose_text(compose, "eps=8")
    missing = compose_text(compose, "task=evaluate", "mixture=/nowhere/at/all")
    assert missing.startswith("mixture=/nowhere/at/all does not exist")
    assert "at least 1" in compose_text(compose, "L=0")
    cfg = compose()
    cfg.task = "fly"
    with pytest.raises(
        UserError, match="task=fly is unknown: choose one of train, evaluate, solve, ceiling, game, predict, report"
    ):
        config.check(cfg)


def test_an_l2_radius_may_be_larger_than_one(compose):
    cfg = compose("eps=2", "threat_model=l2")
    config.check(cfg)
    with open_dict(cfg):
        cfg.threat_model.norm = "linf"
    with pytest.raises(UserError, match="larger than the whole input range"):
        config.check(cfg)


# --- refusals of the composition, through main() -----------------------------------------------------------

BAD_COMMANDS = [
    (["L=abc"], "L=abc: Value 'abc' of type 'str' could not be converted to Integer"),
    (["L=2.5"], "L=2.5"),
    (["L=null"], "L=null"),
    (["seed=x"], "seed=x"),
    (["compile=maybe"], "compile=maybe"),
    (["members=A"], "members"),
    (["weights=0.5"], "weights=0.5"),
    (["weights=[a,0.5]"], "weights=[a,0.5]"),
    (["weights=[0.5,null]"], "weights=[0.5,null]"),
    (["weights=[true,0]"], "weights=[true,0]"),
    (["trainer.max_epochs=ten"], "trainer.max_epochs=ten"),
    (["optimizer.lr=fast"], "optimizer.lr=fast"),
    (["modle=resnet18"], "modle"),
    (["data.rot=x"], "data.rot"),
    (["loss=foo"], "loss=foo is unknown: choose one of at, trades"),
    (["data=mnist"], "data=mnist is unknown: choose one of cifar10, cifar10_jpeg, digits, image_folder, triangle"),
    (["lambda_solver=magic"], "lambda_solver=magic is unknown: choose one of entropic, held_out, lp, oracle, uniform"),
    (
        ["experiment=nope"],
        "experiment=nope is unknown: choose one of averaged_digits, cifar10_at, ",
    ),
    (["L"], "cannot read 'L'"),
    (["members=[A,"], "cannot read 'members=[A,': a bracket is not closed; a list needs quotes for the shell"),
    (["clé=3"], "cannot read 'clé=3': the key has the character 'é'"),
    (["task=evaluate", "weights=0.5,0.5"], "Ambiguous value for argument 'weights=0.5,0.5': a list has brackets"),
    (["task=evaluate", "mixture=é,b"], "Ambiguous value for argument 'mixture=é,b': there is no such path"),
    (["eps=8"], "eps=8"),
    (["eps=8px"], "eps=8px"),
    (["task=fly"], "task=fly is unknown: choose one of ceiling, evaluate, game, predict, report, solve, train"),
    (["+foo=1"], "foo"),
    (["data=image_folder"], "data.root"),
]


@pytest.mark.parametrize(("argv", "start"), BAD_COMMANDS)
def test_bad_commands_say_one_line_and_write_nothing(command, tmp_path, argv, start):
    refusal = command(*argv).refusal()
    assert refusal.startswith(start), refusal
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_misspelt_value_in_a_sweep_runs_no_job(command, tmp_path):
    refusal = command("-m", "loss=at,foo", "data=digits").refusal()
    assert refusal.startswith("loss=foo is unknown")
    assert not list(tmp_path.rglob("config.yaml"))


# --- help --------------------------------------------------------------------------------------------------


def test_help_lists_the_groups_and_imports_nothing_heavy(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "WANDB"))}
    # Of the processor, not of the clock: other tests run beside this one.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "run.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for group in GROUPS:
        choices = ", ".join(sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")))
        assert f"{group}: {choices}" in answer.stdout, group
    for key in ("eps=8/255", "seed=0", "resume=auto", "mixture=PATH", "runs=DIR", "experiment=quickstart"):
        assert key in answer.stdout
    imported = {
        line.rpartition("|")[2].strip() for line in answer.stderr.splitlines() if line.startswith("import time")
    }
    assert "mixadv.config" in imported
    heavy = {"torch", "torchvision", "pytorch_lightning", "wandb", "matplotlib", "scipy", "sklearn", "numpy", "rich"}
    assert not imported & heavy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert list(tmp_path.iterdir()) == []
