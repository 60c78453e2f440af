"""What a user may get wrong: settings, data, mixtures, checkpoints, a full disk.

Everything is refused in one line on standard error that names the remedy, without a traceback, before any training step
or attack; what lay there before is there afterwards, byte for byte.
"""

import copy
import gc
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from builders.cifar10_archive import BASE, small_archive
from builders.files import Bomb, contents
from conftest import TINY, run_command
from mixadv import config
from mixadv.attacks.pgd import PGD
from mixadv.checkpoint_files import digest_of, newest
from mixadv.data.base import ImageCorpus
from mixadv.errors import UserError
from mixadv.members.recipe import Recipe
from mixadv.members.source import Source
from mixadv.models import build_member
from mixadv.tasks import run_task

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra"}


@pytest.fixture
def idle(monkeypatch):
    """No training step and no attack may begin."""

    def begun(*_, **__):
        raise AssertionError("long work has begun")

    for owner, name in ((pl.Trainer, "fit"), (pl.Trainer, "test"), (PGD, "search")):
        monkeypatch.setattr(owner, name, begun)


@pytest.fixture
def place(tmp_path, monkeypatch, idle):
    """A working directory in which a run lies already."""
    run = tmp_path / "outputs" / "train" / "kept"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("L: 3\n")
    (run / "results.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    return tmp_path


def parsed(text):
    return OverridesParser.create().parse_override(text)


@pytest.fixture(scope="module")
def changed(compose):
    """changed("lambda_solver=lp lambda_solver.num_rounds=0"): what the command line would compose.

    Groups are composed, once; keys are set on a copy, which is a hundred times faster.
    """
    composed = {}

    def change(command, tiny=TINY):
        words = shlex.split(command)
        groups = tuple(word for word in words if parsed(word).key_or_group in GROUPS and "=" in word)
        chosen = {word.partition("=")[0] for word in groups}
        # Keys of a group that is not chosen are not there.
        kept = tuple(word for word in tiny if word.partition("=")[0].partition(".")[0] not in chosen)
        if (kept, groups) not in composed:
            composed[kept, groups] = compose(*kept, *groups)
        cfg = copy.deepcopy(composed[kept, groups])
        for word in words:
            if word in groups:
                continue
            override = parsed(word)
            if override.is_delete():
                above, _, key = override.key_or_group.rpartition(".")
                with open_dict(cfg):
                    del (OmegaConf.select(cfg, above) if above else cfg)[key]
            else:
                OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=override.is_add())
        return cfg

    return change


def refused_command(cfg, overrides=()):
    """The one line with which a composed command is refused; nothing of it is left on the disk."""
    here = Path.cwd()
    before = contents(here)
    try:
        config.check(cfg)
        run_task(cfg, run_dir=here / "outputs" / cfg.task / "bad", overrides=list(overrides), sweep=None)
    except UserError as error:
        message = str(error)
    else:
        pytest.fail("accepted")
    assert contents(here) == before
    assert "\n" not in message, message
    return message


# --- settings ----------------------------------------------------------------------------------------------

# Whole commands: (what is added to a command that works, how the refusal begins, a part of its remedy).
COMMANDS = [
    ("eps=8/255/2", "eps=8/255/2 is not a number", "as 8/255"),
    ("eps=", "eps= is not a number", "as 8/255"),
    ("L=two", "L=two: ", "Integer"),
    ("seed=1e3", "seed=1e3: ", "Integer"),
    ("scheduler.milestones=0.5", "scheduler.milestones=0.5 must be", "a list"),
    ("callbacks.checkpoint.train_time_interval.minutes=abc", "callbacks.checkpoint", "minutes"),
    ("loss=mse", "loss=mse is unknown", "choose one of at, trades"),
    ("threat_model=l3", "threat_model=l3 is unknown", "choose one of l2, linf"),
    ("logger=foo", "logger=foo is unknown", "choose one of csv, mlflow, none, tensorboard, wandb"),
    ("protocol=foo", "protocol=foo is unknown", "fast, paper, strict"),
    ("launch=foo", "launch=foo is unknown", "serial"),
    ("launch=parallel", "launch=parallel is for sweeps", "add -m"),
    ("foo.bar=1", "foo.bar: there is no such key", "--cfg job"),
    ("data/digits=x", "data/digits: there is no such key", "--help"),
    ("++task=fly", "force-add of config groups", "++task=fly"),
    ("resume=null", "resume=null", "Optional"),
    ("~L", "L is missing", "remove ~L from"),
    ("loss=null", "a group takes a name", "as loss=at"),
    ("L=1,2", "Ambiguous value for argument 'L=1,2'", "add -m"),
    ("name=/", "name='/' leaves no usable directory name", "use letters"),
    ("hydra.run.dir=/dev/null/x", "cannot write /dev/null/x", "hydra.run.dir=DIR"),
    ("data=image_folder data.root=nowhere", "there is no folder", "set data.root"),
    ("+protocol.attacks.x={_target_:os.system}", "protocol.attacks.x._target_='os.system'", "is refused"),
    ("model=small_resnet data.batch_size=1", "batch norm cannot train on a single image", "2 images or more"),
    ("model=small_resnet micro_batch_size=1", "batch norm cannot train on a single image", "2 images or more"),
]


@pytest.mark.parametrize(("words", "start", "remedy"), COMMANDS, ids=[words for words, _, _ in COMMANDS])
def test_a_mistyped_command_is_one_line_and_touches_nothing(place, words, start, remedy):
    before = contents(place)
    refusal = run_command(place, *TINY, "name=bad", *shlex.split(words)).refusal()
    assert refusal.startswith(start), refusal
    assert remedy in refusal
    assert contents(place) == before


# The same without Hydra's part of it: (what is added, how the refusal begins, a part of its remedy).
SETTINGS = [
    # Numbers of other kinds, and out of range.
    ("eps=1e999", "eps=inf is not a number", "as 8/255"),
    ("optimizer.lr=0", "optimizer: lr=0", "positive rate"),
    ("optimizer.lr=-0.1", "optimizer: Invalid learning rate", "-0.1"),
    ("optimizer.lr=nan", "optimizer: lr=nan", "finite"),
    ("optimizer.lr=fast", "optimizer.lr=fast", "must be a number"),
    ("optimizer.momentum=-1", "optimizer: Invalid momentum", "-1"),
    ("optimizer.weight_decay=nan", "optimizer: weight_decay=nan", "finite"),
    ("optimizer.momentum=0 optimizer.nesterov=true", "optimizer: Nesterov momentum requires", "momentum"),
    ("+optimizer.foo=1", "optimizer.foo: SGD has no such setting", "lr, momentum"),
    ("scheduler.milestones=[2]", "scheduler: milestones=[2]", "shares of the training"),
    ("scheduler.milestones=[nan]", "scheduler: milestones=[nan]", "shares of the training"),
    ("scheduler.gamma=-1", "scheduler: gamma=-1", "at least 0"),
    ("scheduler=one_cycle scheduler.warmup=1", "scheduler: warmup=1", "share of the training"),
    ("scheduler=cosine scheduler.warmup=-0.1", "scheduler: warmup=-0.1", "share of the training"),
    ("trainer.precision=fp16", "trainer.precision=fp16 is unknown", "bf16-mixed"),
    ("trainer.precision=fp32", "trainer.precision=fp32 is called 32-true now", "write trainer.precision=32-true"),
    ("trainer.precision=bf16-true", "trainer.precision=bf16-true is unknown", "bf16-mixed"),
    ("trainer.strategy=fsdp", "trainer.strategy=fsdp cannot train a mixture", "leave it at auto"),
    ("trainer.accelerator=tpu", "trainer.accelerator=tpu is unknown", "auto, cpu, gpu"),
    ("trainer.num_nodes=0", "trainer.num_nodes=0", "at least 1"),
    ("trainer.devices=-2", "trainer.devices=-2", "at least 1"),
    ("trainer.devices=3", "batches of 20 images cannot be divided", "use data.batch_size=18"),
    ("callbacks.checkpoint=3", "callbacks.checkpoint=3", "with its _target_"),
    ("+callbacks.mine._target_=mixadv.losses.AT", "callbacks.mine._target_=mixadv.losses.AT", "no Callback"),
    ("trainer.limit_train_batches=[1]", "trainer.limit_train_batches=[1]", "number of batches"),
    # Arguments of classes.
    ("loss=trades loss.beta=-1", "loss: beta is -1", "at least 0"),
    ("loss=trades loss.beta=nan", "loss: beta is nan", "finite"),
    ("loss=trades loss.beta=abc", "loss.beta=abc", "must be a number"),
    ("loss=trades loss.beta=true", "loss.beta=True", "must be a number"),
    ("loss=trades loss.beta=null", "loss.beta=null", "must be a number"),
    ("+loss.foo=1", "loss.foo: AT has no such setting", "it has none"),
    ("loss._target_=mixadv.losses.RobustLoss", "loss._target_=mixadv.losses.RobustLoss is a base class", "name one"),
    ("loss._target_=mixadv.losses.ZeroOne", "loss._target_=mixadv.losses.ZeroOne has no gradient", "loss=at"),
    (
        "loss._target_=mixadv.lambda_solvers.Uniform",
        "loss._target_=mixadv.lambda_solvers.Uniform",
        "derives from mixadv.losses.RobustLoss",
    ),
    ("loss._target_=builtins.eval", "loss._target_='builtins.eval'", "is refused"),
    ("lambda_solver.num_steps=1.5", "lambda_solver.num_steps=1.5", "a whole number"),
    ("lambda_solver.num_steps=true", "lambda_solver.num_steps=True", "a whole number"),
    ("lambda_solver.step_size=abc", "lambda_solver.step_size=abc", "a number or null"),
    ("+lambda_solver.foo=1", "lambda_solver.foo: OracleSubgradient has no such setting", "it has num_steps, step_size"),
    (
        "lambda_solver._target_=mixadv.losses.AT",
        "lambda_solver._target_=mixadv.losses.AT",
        "derives from mixadv.lambda_solvers",
    ),
    ("lambda_solver=entropic lambda_solver.alpha=0", "lambda_solver: alpha", "positive and finite"),
    ("lambda_solver=entropic lambda_solver.alpha=abc", "lambda_solver.alpha=abc", "must be a number"),
    (
        "lambda_solver=entropic lambda_solver.include_attack_points=maybe",
        "lambda_solver.include_attack_points=maybe",
        "true or false",
    ),
    ("lambda_solver=lp lambda_solver.num_rounds=0", "lambda_solver: num_rounds", ">= 1"),
    ("lambda_solver=lp lambda_solver.time_limit=abc", "lambda_solver.time_limit=abc", "a number or null"),
    ("attack.num_steps=2.5", "attack.num_steps=2.5", "a whole number"),
    ("attack.step_size=0", "attack: step_size is 0", "positive"),
    ("attack.step_size=nan", "attack: step_size is nan", "positive"),
    ("attack._target_=mixadv.losses.AT", "attack._target_=mixadv.losses.AT is no Attack", "called with (mixture, x, y"),
    # An objective is called as well, but with other arguments.
    (
        "attack._target_=mixadv.attacks.objectives.AveragedLoss",
        "attack._target_=mixadv.attacks.objectives",
        "called with (mixture",
    ),
    # Data.
    ("data.batch_size=null", "data.batch_size=null", "a whole number"),
    ("data.batch_size=1.5", "data.batch_size=1.5", "a whole number"),
    ("data.batch_size=true", "data.batch_size=True", "a whole number"),
    ("data.num_train=1.5", "data.num_train=1.5", "a whole number or null"),
    ("data.num_train=1000000000", "data: Digits (8x8) has 1437 training images", "lower num_train"),
    ("data.num_val=5000", "data: Digits (8x8) has 1437 training images", "lower num_train, num_val"),
    ("data.num_test=2.5", "data.num_test=2.5", "a whole number or null"),
    ("data.val_fraction=abc", "data.val_fraction=abc", "a number or null"),
    ("data.padding=100000", "data: padding=100000", "lower it"),
    ("data.flip=maybe", "data.flip=maybe", "true or false"),
    (
        "+data.foo=1",
        "data.foo: Digits has no such setting",
        "it has classes, average, copies, draw, val_fraction, padding",
    ),
    (
        "data._target_=mixadv.data.base.ImageDataModule ~data.classes ~data.average ~data.copies ~data.draw",
        "data: ImageDataModule has no load()",
        "choose a data set",
    ),
    ("data=image_folder data.root=null", "data.root=null", "must be text"),
    ("data=image_folder data.root=3", "data.root=3", "quote it, data.root=\"'3'\""),
    ("data=image_folder data.root=x data.name=[1]", "data.name=[1]", "text or null"),
    ("data=cifar10 data.download=maybe", "data.download=maybe", "true or false"),
    ("data=cifar10 data.mirrors=[3]", "data.mirrors=[3]", "a list or text"),
    # Models.
    ("model=small_cnn model.width=0", "model: width is 0", "at least 1"),
    ("model=small_cnn model.width=a", "model: width is 'a'", "a whole number"),
    ("model=small_cnn model.width=1.5", "model: width is 1.5", "a whole number"),
    ("model=small_cnn model.width=1000000", "L=2 members of model=small_cnn need", "choose a smaller model"),
    ("model=small_cnn model.width=1" + 20 * "0", "model: width is 1", "at most 16,777,216"),
    ("+model.depth=5", "model: depth: linear has no such setting", "it has num_classes"),
    ("+model.mean=[0.5] +model.std=[0.2]", "model.mean", "follows from the data"),
    ("+model.num_classes=3", "model.num_classes", "follows from the data"),
    ("~model._target_", "model._target_=None", "must name a class"),
    # Protocols.
    ("+protocol.attacks.x=null", "protocol.attacks.x=None", "with its _target_"),
    ("+protocol.attacks.x={}", "protocol.attacks.x._target_=None", "must name a class"),
    ("+protocol.attacks.x={_target_:mixadv.losses.AT}", "protocol.attacks.x._target_=mixadv.losses.AT", "no Attack"),
    ("+protocol.attacks.a__b={_target_:mixadv.attacks.pgd.PGD}", "protocol.attacks.a__b", "names consist of"),
    ("protocol.attacks.subsets.num_steps=1.5", "protocol.attacks.subsets.num_steps=1.5", "a whole number"),
    ("+protocol.attacks.pgd-20.objective=ce", "protocol.attacks.pgd-20.objective=ce", "_target_ (Objective)"),
    (
        "+protocol.attacks.pgd-20.objective={_target_:mixadv.losses.AT}",
        "protocol.attacks.pgd-20.objective._target_=mixadv.losses.AT is no Objective",
        "called with (logits, y, weights, clean_logits)",
    ),
    ("~protocol.attacks", "protocol.attacks is missing", "remove ~protocol.attacks from"),
    ("protocol.attacks=null", "protocol.attacks=None", "choose protocol=fast"),
    ("protocol.validation=null", "protocol.validation=None", "with its _target_"),
    ("protocol.validation={_target_:mixadv.attacks.arc.ARC}", "protocol.validation must be PGD", "not ARC"),
    ("protocol.diagnosed=abc", "protocol.diagnosed=abc", "at least 0"),
    ("protocol.name=../data/digits", "protocol.name=../data/digits", "letters, digits"),
    # Keys and interpolations.
    ("+threat_model.bounds=[0,255]", "threat_model.bounds: there is no such key", "--cfg job"),
    ("+protocol.foo=1", "protocol.foo: there is no such key", "--cfg job"),
    ("+logger.foo=1", "logger.foo=1", "with its _target_"),
    ("mixture=outputs/train/x", "mixture=outputs/train/x", "task=evaluate measures it"),
    ("L='${nothing}'", "L has no value", "set L=..."),
    ("data.batch_size='${oc.env:NOT_SET_ANYWHERE}'", "data.batch_size has no value", "set data.batch_size=..."),
    # The mirror: known before the training, not after it.
    ("logger=wandb logger.wandb.images=abc", "logger.wandb.images=abc", "a whole number"),
    ("logger=wandb logger.wandb.init_timeout=0", "logger.wandb: init_timeout=0", "positive number of seconds"),
    ("logger=wandb logger.wandb.project=a/b", "logger.wandb: project=a/b", "without /"),
    ("logger=wandb logger.wandb.entity=3", "logger.wandb.entity=3", "must be text"),
]


@pytest.mark.parametrize(("words", "start", "remedy"), SETTINGS, ids=[words for words, _, _ in SETTINGS])
def test_a_setting_that_cannot_work_is_refused_before_long_work(place, changed, words, start, remedy):
    message = refused_command(changed(words))
    assert message.startswith(start), message
    assert remedy in message


def test_settings_of_every_shipped_class_are_accepted(changed, place):
    """The checks know all annotations: another stop comes first only where there is nothing wrong."""
    from mixadv.tasks import build

    for path in sorted((ROOT / "conf").glob("*/*.yaml")):
        group, name = path.parent.name, path.stem
        if group == "lambda_solver":
            cfg = changed(f"{group}={name}")
            assert build.build_solver(cfg) is not None
            assert build.build_phase(cfg) is not None
        elif group == "loss":
            cfg = changed(f"{group}={name}")
            assert build.build_loss(cfg) is not None
            assert build.build_class_weights(cfg) is not None
        elif group == "attack":
            cfg = changed(f"{group}={name}")
            assert build.build_training_attack(cfg) is not None
            assert build.build_members_phase(cfg) is not None
        elif group == "protocol":
            assert build.build_protocol(changed(f"protocol={name}"))
        elif group == "data":
            cfg = changed(f"data={name}" + (" data.root=x" if name == "image_folder" else ""))
            assert build.instantiate(cfg.data, "data").batch_size > 0


@pytest.mark.parametrize("words", ["L=two", "eps=8", "attack.num_steps=abc"])
def test_a_real_process_ends_with_one_line_and_code_1(tmp_path, words):
    hidden = ("PYTEST", "WANDB", "COVERAGE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    argv = [sys.executable, str(ROOT / "run.py"), *TINY, "name=bad", words]
    answer = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"mixadv: {words}"), answer.stderr
    assert answer.stderr.count("\n") == 1
    assert (answer.stdout, contents(tmp_path)) == ("", {})


# --- data --------------------------------------------------------------------------------------------------


def corpus(**change):
    fields = {
        "train_images": torch.zeros(6, 3, 4, 5, dtype=torch.uint8),
        "train_labels": torch.tensor([0, 1, 2, 0, 1, 2]),
        "test_images": torch.zeros(3, 3, 4, 5, dtype=torch.uint8),
        "test_labels": torch.tensor([0, 1, 2]),
        "class_names": ("ant", "bee", "cat"),
    }
    return ImageCorpus(**{**fields, **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_images": 255 * torch.rand(6, 3, 4, 5)}, "torch.float32 (6, 3, 4, 5), not uint8 [N,C,H,W]: convert"),
        ({"train_images": torch.full((6, 3, 4, 5), float("nan"))}, "convert them to whole numbers 0..255"),
        ({"test_images": torch.zeros(3, 3, 4, 5, dtype=torch.int64)}, "test images are torch.int64"),
        ({"train_images": torch.zeros(6, 4, 5, dtype=torch.uint8)}, "(6, 4, 5), not uint8 [N,C,H,W]"),
        (
            {"test_images": torch.zeros(3, 1, 4, 5, dtype=torch.uint8)},
            "test images are (1, 4, 5), training images (3, 4",
        ),
        ({"train_images": torch.zeros(6, 3, 0, 5, dtype=torch.uint8)}, "0 values each: give every image"),
        ({"train_labels": torch.tensor([0, 1, 2, 0, 1])}, "6 train images with 5 labels"),
        ({"train_labels": torch.tensor([0.0, 1, 2, 0, 1, 2])}, "train labels are torch.float32, not whole numbers"),
        ({"train_labels": torch.tensor([float("nan")] * 6)}, "not whole numbers"),
        ({"test_labels": torch.tensor([True, False, True])}, "test labels are torch.bool, not whole numbers"),
        ({"train_labels": torch.tensor([0, 2, 2, 0, 2, 2])}, "no training image has label 1 ('bee')"),
        (
            {"train_labels": torch.zeros(6, dtype=torch.long), "test_labels": torch.zeros(3), "class_names": ("a",)},
            "test",
        ),
        (
            {k: torch.zeros(n, dtype=torch.long) for k, n in (("train_labels", 6), ("test_labels", 3))}
            | {"class_names": ("ant",)},
            "1 class: a classifier needs two classes or more",
        ),
    ],
)
def test_a_corpus_that_is_none_is_refused(change, said):
    corpus().validate("made")
    with pytest.raises(UserError) as error:
        corpus(**change).validate("made")
    assert said in str(error.value)
    assert str(error.value).startswith("made: ")


@pytest.fixture
def images(place):
    """A folder of images of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for label in ("aster", "rose"):
            folder = place / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number:02}.png")
    return place / "images"


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255
    path.write_bytes(content)


FOLDERS = {
    "one class": (
        lambda root: [shutil.rmtree(root / split / "rose") for split in ("train", "test")],
        "has only the class 'aster'",
        "give every class a folder",
    ),
    "an empty class": (
        lambda root: [path.unlink() for path in (root / "test" / "rose").iterdir()],
        "test/rose holds no images",
        "add some, or remove the class",
    ),
    "no images at all": (lambda root: shutil.rmtree(root / "train"), "must hold the folders train/CLASS", "test/CLASS"),
    "images without classes": (
        lambda root: [shutil.move(path, root / "train") for path in (root / "train" / "rose").iterdir()],
        "train/rose holds no images",
        "add some",
    ),
    "a flipped byte": (
        lambda root: flip_a_byte(root / "train" / "rose" / "03.png"),
        "cannot read the image",
        "replace or remove it",
    ),
    "an empty file": (
        lambda root: (root / "train" / "rose" / "03.png").write_bytes(b""),
        "03.png (it is not an image in PNG,",
        "replace or remove it",
    ),
    "a web page": (
        lambda root: (root / "test" / "aster" / "01.png").write_text("<!DOCTYPE html><html>Sign in</html>"),
        "01.png (it is not an image in PNG,",
        "replace or remove it",
    ),
    "mixed sizes": (
        lambda root: Image.new("L", (9, 8)).save(root / "test" / "rose" / "02.png"),
        "images of different sizes",
        "data.image_size=32",
    ),
    "16 bits": (
        lambda root: Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(root / "train" / "aster" / "00.png"),
        "more than 8 bits per channel",
        "convert it to 8 bits",
    ),
    "floating point under another ending": (
        lambda root: Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(
            root / "train" / "aster" / "00.png", format="TIFF"
        ),
        "00.png has more than 8 bits per channel",
        "convert it to 8 bits",
    ),
    "a pipe": (
        lambda root: (
            (root / "train" / "aster" / "00.png").unlink(),
            os.mkfifo(root / "train" / "aster" / "00.png"),
        ),
        "00.png (it is not a file)",
        "replace or remove it",
    ),
    "too few for the validation": (
        lambda root: [path.unlink() for path in (root / "train").glob("*/*.png") if path.name != "00.png"],
        "2 training images, too few",
        "lower num_train",
    ),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_folder_of_images_that_cannot_be_used_is_refused(images, changed, damage):
    spoil, said, remedy = FOLDERS[damage]
    tiny = tuple(word for word in TINY if not word.startswith("data"))
    command = partial(changed, tiny=(*tiny, "data=image_folder", "data.num_val=2", "data.channels=1"))
    spoil(images)
    (images / ".mixadv-cache").write_text("in the way: no cache")
    message = refused_command(command(f"data.root={images}"))
    assert said in message, message
    assert remedy in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html><head><title>Proxy authentication required</title>", "it is a web page, not an archive"),
        (b"\x1f\x8b\x08\x00" + 200 * b"\x00", "(204 bytes)"),
        (b"PK\x03\x04" + 100 * b"x", "(104 bytes)"),
        (b"", "(0 bytes)"),
    ],
    ids=["web page", "torn archive", "zip", "empty"],
)
def test_what_is_not_the_archive_is_refused_and_kept(place, changed, content, said):
    (place / "cifar-10-python.tar.gz").write_bytes(content)
    message = refused_command(changed(f"data=cifar10 data.root={place}"))
    assert said in message
    for part in ("instead of c58f30108f718f92721af3b95e74349a", "Delete it and run again", "data.root=PATH"):
        assert part in message


def archive_of(official, extra):
    """The official archive with further members in front."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, kind in extra:
            member = tarfile.TarInfo(name)
            if kind is None:
                member.size = 4
                tar.addfile(member, io.BytesIO(b"evil"))
            else:
                member.type, member.linkname = tarfile.SYMTYPE, kind
                tar.addfile(member)
        taken = {name for name, _ in extra}
        for name, content in official.files.items():
            if f"{BASE}/{name}" not in taken:
                member = tarfile.TarInfo(f"{BASE}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def official():
    return small_archive()


def test_an_archive_writes_nothing_outside_its_folder(official, place):
    home = place / "data"
    home.mkdir()
    outside = place / "outside"
    extra = [("../evil", None), (str(outside), None), (f"{BASE}/../evil", None), (f"{BASE}/link", "/"), ("evil", "..")]
    archive = archive_of(official, extra)
    (home / "cifar-10-python.tar.gz").write_bytes(archive)
    before = contents(place)
    data = official.module(home, download=False, archive=archive)
    data.prepare_data()
    data.setup()
    new = set(contents(place)) - set(before)
    assert new == {f"data/{BASE}/{name}" for name in official.files}
    assert data.num_test == 60


def test_a_batch_that_is_a_link_to_elsewhere_is_refused(official, place):
    secret = place / "secret"
    secret.write_text("secret")
    archive = archive_of(official, [(f"{BASE}/data_batch_2", str(secret))])
    (place / "cifar-10-python.tar.gz").write_bytes(archive)
    before = contents(place)
    with pytest.raises(UserError, match="cannot unpack") as error:
        official.module(place, download=False, archive=archive).prepare_data()
    assert "\n" not in str(error.value)
    assert contents(place) == before


def test_a_failed_download_is_one_line(official, place):
    mirrors = ["http://127.0.0.1:9/a", "http://127.0.0.1:9/b", "not an address"]
    with pytest.raises(UserError) as error:
        official.module(place / "data", mirrors=mirrors).prepare_data()
    assert "\n" not in str(error.value)
    for part in (*mirrors, "data.root=PATH", "data=digits"):
        assert part in str(error.value)


# --- a full disk -------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """disk(size): a folder on a disk of its own, of so many KiB; a second call makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size, options=""):
        words = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, check=False).returncode == 0
        except OSError:
            done = False
        if not done:
            pytest.skip("needs the right to mount a small disk")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def test_a_disk_that_is_full_while_unpacking_is_told_and_left_clean(official, disk, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = disk(1600)
    archive = folder / "cifar-10-python.tar.gz"
    archive.write_bytes(official.archive)
    with pytest.raises(UserError, match="No space left on device") as error:
        official.module(folder, download=False).prepare_data()
    assert "\n" not in str(error.value)
    assert "data.root=PATH" in str(error.value)
    assert contents(folder) == {archive.name: official.archive}
    disk(8000, "remount,")
    official.module(folder, download=False).prepare_data()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_while_downloading_is_told_and_left_clean(official, disk, tmp_path):
    (tmp_path / "source.tar.gz").write_bytes(official.archive)
    folder = disk(600)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/source.tar.gz"
        with pytest.raises(UserError, match="No space left on device") as error:
            official.module(folder, url=url).prepare_data()
        server.shutdown()
    # pooch leaves the connection to the garbage collector, which warns; here, not in the test that follows.
    error.value.__traceback__ = None
    gc.collect()
    assert "\n" not in str(error.value)
    assert contents(folder) == {}


@pytest.mark.parametrize("size", [90, 160])
def test_a_disk_that_is_full_while_training_is_told_and_the_same_command_goes_on(disk, tmp_path, size):
    run = disk(size) / "run"
    argv = (*TINY, "L=3", "name=full", f"hydra.run.dir={run}")
    refusal = run_command(tmp_path, *argv).refusal()
    assert refusal.startswith(f"the disk of {run} is full")
    assert "the same command continues" in refusal
    assert not list(run.rglob("*.tmp"))
    kept = [path for path in (run / "checkpoints").iterdir() if path.suffix == ".ckpt"]
    assert kept
    for path in kept:
        assert torch.load(path, weights_only=True)["state_dict"]
    if size == 160:
        disk(8000, "remount,")
        finished = run_command(tmp_path, *argv)
        assert finished.rc == 0, finished.err
        assert (run / "DONE").exists()


# --- mixtures ----------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(trained, place):
    """A copy of an exported mixture of three linear members on digits, to be damaged."""
    shutil.copytree(trained.path / "mixture", place / "mixture")
    return place / "mixture"


def with_config(folder, **keys):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **keys}))


def with_model(folder, **keys):
    record = json.loads((folder / "config.json").read_text())
    with_config(folder, model={**record["model"], **keys})


def with_data(folder, **keys):
    record = json.loads((folder / "config.json").read_text())
    with_config(folder, data={**record["data"], **keys})


def with_tensors(folder, **tensors):
    file = folder / "mixture.safetensors"
    save_file({**load_file(file), **tensors}, file)


def without(folder, name):
    file = folder / "mixture.safetensors"
    state = load_file(file)
    del state[name]
    save_file(state, file)


def with_entry(folder, name, value):
    file = folder / "mixture.safetensors"
    state = load_file(file)
    state[name].view(-1)[0] = value
    save_file(state, file)


def with_directory(folder):
    (folder / "mixture.safetensors").unlink()
    (folder / "mixture.safetensors").mkdir()


def with_millions(folder):
    """As many members as there are weights, and these are cheap."""
    with_tensors(folder, weights=torch.full((20_000,), 1 / 20_000))
    with_config(folder, L=20_000, weights=None)


WEIGHT = "members.1.net.1.weight"
MIXTURES = {
    "NaN parameter": (lambda f: with_entry(f, WEIGHT, float("nan")), f"{WEIGHT} holds numbers that are not finite"),
    "infinite deviation": (lambda f: with_entry(f, "members.2.normalize.std", float("inf")), "not finite"),
    "other weights in the recipe": (lambda f: with_config(f, weights=[1, 0, 0]), "has weights=[1, 0, 0], the file ["),
    "too few weights in the recipe": (
        lambda f: with_config(f, weights=[0.5, 0.5]),
        "has weights=[0.5, 0.5], the file [",
    ),
    "weights that are text": (lambda f: with_config(f, weights="1,0,0"), "has weights=1,0,0, the file ["),
    "weights that are NaN": (
        lambda f: with_config(f, weights=[float("nan")] * 3),
        "has weights=[nan, nan, nan], the file [",
    ),
    "weights that are negative": (
        lambda f: (with_tensors(f, weights=torch.tensor([1.5, -0.5, 0])), with_config(f, weights=[1.5, -0.5, 0])),
        "weights",
    ),
    "weights that sum to 0.9": (lambda f: with_tensors(f, weights=torch.tensor([0.3, 0.3, 0.3])), "weights"),
    "no weights and very many members": (
        lambda f: (without(f, "weights"), with_config(f, L=100_000_000)),
        "weights for 0 members",
    ),
    "two weights for three": (lambda f: with_tensors(f, weights=torch.tensor([0.5, 0.5])), "weights for 2 members"),
    "a column of weights": (lambda f: with_tensors(f, weights=torch.full((3, 1), 1 / 3)), "size mismatch for weights"),
    "an extra member": (lambda f: with_tensors(f, **{"members.3.net.1.bias": torch.zeros(10)}), "Unexpected key(s)"),
    "more than memory holds": (
        lambda f: with_model(f, name="small_cnn", width=100_000),
        "numbers, the file holds",
    ),
    "as many members as weights": (with_millions, "the recipe describes 1"),
    "a width that is text": (lambda f: with_model(f, name="small_cnn", width="a"), "width is 'a'"),
    "a width of 1.5": (lambda f: with_model(f, name="small_cnn", width=1.5), "width is 1.5"),
    "a shape that is text": (lambda f: with_model(f, image_shape="1x8x8"), "image_shape is '1x8x8'"),
    "a mean that is a number": (lambda f: with_model(f, mean=0.5), "mean is 0.5: it must be a list"),
    "a mean that is text": (lambda f: with_model(f, mean=["0.5"]), "mean is ['0.5']"),
    "a deviation of NaN": (lambda f: with_model(f, std=[float("nan")]), "std is [nan]"),
    "a foreign argument": (lambda f: with_model(f, command="touch x"), "linear has no such setting"),
    "parameters that are a folder": (with_directory, "cannot be read"),
    "data of a foreign class": (
        lambda f: with_data(f, _target_="os.system"),
        "names data of 'os.system', which is not part",
    ),
    "data of another class": (lambda f: with_data(f, _target_="mixadv.losses.AT"), "no ImageDataModule"),
    "data without a class": (lambda f: with_config(f, data={}), "data._target_=None must name a class"),
    "data of other types": (lambda f: with_data(f, batch_size="abc"), "data.batch_size=abc must be a whole number"),
    "data with what it does not take": (lambda f: with_data(f, hook="x"), "data.hook: Digits has no such setting"),
    "data that are elsewhere": (
        lambda f: with_config(f, data={"_target_": "mixadv.data.image_folder.ImageFolder", "root": "../../.."}),
        "must hold the folders train/CLASS",
    ),
    "data that are missing": (lambda f: with_data(f, num_test="???"), "data.num_test=??? must be a whole number"),
    "a radius that is a list": (lambda f: with_config(f, eps=[8, 255]), "eps=[8, 255] is not a number"),
    "a norm that is a number": (lambda f: with_config(f, threat_model={"norm": 7}), "threat_model.norm=7 is unknown"),
}


@pytest.mark.parametrize("damage", MIXTURES)
def test_a_damaged_mixture_is_refused(mixture, changed, damage):
    spoil, said = MIXTURES[damage]
    spoil(mixture)
    cfg = changed("task=evaluate", tiny=("data=digits", "logger=csv", "trainer.accelerator=cpu"))
    cfg.mixture = str(mixture)
    message = refused_command(cfg, ["task=evaluate", f"mixture={mixture}"])
    assert said in message, message
    assert len(message) < 700


@pytest.mark.parametrize(
    ("words", "start"),
    [
        ("protocol.attacks.arc.num_steps=abc", "protocol.attacks.arc.num_steps=abc"),
        ("+protocol.attacks.x={_target_:os.system}", "protocol.attacks.x._target_='os.system'"),
        ("trainer.accelerator=gpu", "trainer.accelerator=gpu"),
        ("threat_model=l2 eps=9", "eps=9 exceeds the diagonal 8.00"),
        ("data.num_test=1.5", "data.num_test=1.5 must be a whole number"),
    ],
)
def test_an_evaluation_that_is_refused_leaves_no_directory_behind(mixture, changed, monkeypatch, words, start):
    """The mended command would find a run with other settings there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = changed(f"task=evaluate {words}", tiny=("data=digits", "logger=csv", "trainer.accelerator=cpu"))
    cfg.mixture = str(mixture)
    assert refused_command(cfg, ["task=evaluate", "mixture=x", *words.split()]).startswith(start)


def test_a_recipe_does_not_say_whom_to_ask_for_data(mixture, changed, monkeypatch):
    """The addresses of a received recipe are not called."""
    asked = []
    monkeypatch.setattr("mixadv.data.cifar10._download", lambda url, target, md5: asked.append(url) or "no answer")
    recipe = {"_target_": "mixadv.data.cifar10.CIFAR10", "root": "nowhere", "mirrors": ["http://evil.example/x"]}
    with_config(mixture, data=recipe)
    for argv, expected in (([], False), (["data.mirrors=[http://mine.example/x]"], True)):
        cfg = changed("task=evaluate data=cifar10 " + " ".join(f"'{word}'" for word in argv), tiny=("logger=csv",))
        cfg.mixture = str(mixture)
        with pytest.raises(UserError, match="could not be downloaded"):
            run_task(cfg, run_dir=Path("bad"), overrides=["task=evaluate", "mixture=x", *argv], sweep=None)
        assert not any("evil" in url for url in asked)
        assert any("mine" in url for url in asked) == expected


def test_members_that_hold_no_numbers_are_refused(mixture, changed, place):
    state = build_member("linear", num_classes=10, image_shape=(1, 8, 8)).net.state_dict()
    torch.save(state, "good.pt")
    torch.save({**state, "1.bias": torch.full((10,), float("nan"))}, "nan.pt")
    with_entry(mixture, WEIGHT, float("inf"))
    for member, said in (("nan.pt", "not all finite numbers"), ("mixture", "not finite")):
        members = ["good.pt", member]
        cfg = changed("task=solve lambda_solver=lp", tiny=("data=digits", "model=linear", "logger=csv"))
        cfg.members = members
        message = refused_command(cfg, ["task=solve", "members=[...]", "data=digits", "model=linear"])
        assert said in message, message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mean": 0.5, "std": 0.5}, "mean is 0.5: it must be a list of finite numbers"),
        ({"mean": ["a"], "std": [1.0]}, "mean is ['a']"),
        ({"mean": [0.5], "std": [float("inf")]}, "std is [inf]"),
        ({"mean": [0.5], "std": [True]}, "std is [True]"),
    ],
)
def test_a_normalisation_that_is_none_is_refused(place, settings, said):
    torch.save(build_member("linear", num_classes=10, image_shape=(1, 8, 8)).net.state_dict(), "good.pt")
    recipe = {"name": "linear", "num_classes": 10, "image_shape": [1, 8, 8], **settings}
    with pytest.raises(UserError) as error:
        Source("good.pt").members(Recipe.of(recipe))
    assert said in str(error.value)
    assert str(error.value).startswith("model=linear: ")


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(trained, place):
    """The checkpoints of a run, without the last but one."""
    folder = place / "outputs" / "train" / "tiny" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("best.ckpt", "last.ckpt"):
        shutil.copy(trained.path / "checkpoints" / name, folder / name)
    return folder


def noise(size):
    return np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8).tobytes()


# At both ends, where a zip has its signature and its index, and between them.
SHARES = [0, 1e-5, 1e-4, 1e-3, 0.01, 0.02, *np.linspace(0.05, 0.95, 10), 0.98, 0.99, 0.999, 0.9999]


@pytest.mark.parametrize("share", SHARES, ids=lambda share: f"{share:g}")
def test_a_checkpoint_cut_anywhere_is_refused_or_the_one_before_is_taken(checkpoints, share):
    last, said = checkpoints / "last.ckpt", []
    whole = last.read_bytes()
    cut = whole[: int(share * len(whole))]
    last.write_bytes(cut)
    with pytest.raises(UserError, match="resume=never") as error:
        newest(checkpoints, said.append)
    assert str(error.value).startswith(str(last))
    assert "\n" not in str(error.value)
    assert (last.read_bytes(), said) == (cut, [])
    (checkpoints / "previous.ckpt").write_bytes(whole)
    assert newest(checkpoints, said.append) == checkpoints / "previous.ckpt"
    assert "going on from previous.ckpt" in said[0]
    assert (checkpoints / "last.ckpt.torn").read_bytes() == cut


NO_CHECKPOINTS = {
    "random bytes": noise(50_000),
    "zeros": bytes(50_000),
    "text": b'{"state_dict": {}}',
    "a web page": b"<!DOCTYPE html><html></html>",
    "a pickle": pickle.dumps({"state_dict": {}}),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_what_is_no_checkpoint_is_refused_wherever_one_is_read(checkpoints, changed, kind, name):
    path = checkpoints / name
    path.write_bytes(NO_CHECKPOINTS[kind])
    cfg = changed("task=evaluate", tiny=("data=digits", "logger=csv"))
    cfg.mixture = str(path)
    assert refused_command(cfg, ["task=evaluate", "mixture=x"]).startswith(str(path))
    cfg = changed("task=solve lambda_solver=lp", tiny=("data=digits", "model=linear", "logger=csv"))
    cfg.members = [str(path), str(path)]
    assert refused_command(cfg, ["task=solve", "members=[...]"]).startswith(str(path))


@pytest.mark.parametrize("kind", ["random bytes", "a bomb", "another run"])
def test_a_run_whose_last_checkpoint_is_none_is_not_gone_on_with(trained, tmp_path, kind):
    cwd, mark = tmp_path / "copy", tmp_path / "executed"
    shutil.copytree(trained.cwd, cwd)
    run = cwd / "outputs" / "train" / "tiny"
    for path in (run / "DONE", run / "results.json", *(run / "checkpoints").glob("previous.ckpt")):
        path.unlink()
    last = run / "checkpoints" / "last.ckpt"
    if kind == "random bytes":
        last.write_bytes(noise(50_000))
    elif kind == "a bomb":
        torch.save({**torch.load(last, weights_only=True), "callbacks": Bomb(mark)}, last)
    else:
        content = torch.load(last, weights_only=True)
        members = {name: value[..., :5] if value.ndim == 2 else value for name, value in content["state_dict"].items()}
        content = {**content, "state_dict": members}
        torch.save({**content, "digest": digest_of(content)}, last)
    before = contents(run)
    refusal = run_command(cwd, *TINY, "L=3", "seed=5", "name=tiny").refusal()
    assert "resume=never" in refusal
    assert not mark.exists()
    after = contents(run)
    assert re.sub(r"\s+", " ", after.pop("FAILED").decode()).strip() == refusal
    log = after.pop("mixadv.log")
    assert log.startswith(before.pop("mixadv.log"))
    assert log.decode().endswith(f"[ERROR] {refusal}\n")
    # Where it goes on, the history is cut to the checkpoint's step: a refused checkpoint cuts nothing.
    assert after == before


@pytest.mark.parametrize("text", [b"{: not yaml", b"\xff\xfe\x00", b"L: ${nothing}\n", b"- 1\n", b""], ids=repr)
def test_a_run_whose_settings_cannot_be_read_is_left_alone(place, changed, text):
    run = place / "outputs" / "train" / "bad"
    run.mkdir()
    (run / "config.yaml").write_bytes(text)
    message = refused_command(changed("L=3"))
    assert str(run) in message
    assert "resume=never" in message


def test_the_lists_are_as_long_as_they_should_be():
    assert len(COMMANDS) + len(SETTINGS) >= 40
    assert len(FOLDERS) >= 10
    assert len(MIXTURES) + len(NO_CHECKPOINTS) >= 10
    assert len(SHARES) == 20
