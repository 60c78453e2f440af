"""MixtureTraining as a module of anybody's Trainer: the command's numbers, loading, monitors, refusals, resuming."""

import copy
import csv
import json
import os
import subprocess
from dataclasses import dataclass
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from pytorch_lightning.loggers import CSVLogger
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from builders.data import digits_module
from builders.networks import WEIGHTS, same_tensors, untrained_members
from builders.refusals import refusal
from builders.stops import Interrupted, SaveAndStop
from conftest import QUIET, TINY, run_command
from mixadv.attacks import APGD, PGD
from mixadv.checkpoint_files import read_checkpoint
from mixadv.data.digits import Digits
from mixadv.data.stream import BatchStream
from mixadv.errors import UserError
from mixadv.evaluation import evaluate
from mixadv.lambda_solvers import OracleSubgradient, Uniform
from mixadv.losses import AT, TRADES
from mixadv.members.recipe import build_mixture
from mixadv.mixture import Mixture
from mixadv.models import MODELS, build_member
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.learning_rate import constant, cosine, piecewise
from mixadv.training.recorded import rebuilt, recorded

BALL = ThreatModel("linf", 0.1)
small_digits = partial(digits_module, num_train=48, num_test=40)


def training(mixture=None, **settings):
    return MixtureTraining(
        Mixture(untrained_members(), WEIGHTS) if mixture is None else mixture,
        BALL,
        **{
            "attack": PGD(num_steps=2),
            "validation_attack": PGD(num_steps=2),
            "solver": OracleSubgradient(num_steps=2),
            "T_theta": 2,
            "kind": "shared",
            "seed": 3,
            **settings,
        },
    )


def stock(epochs=2, **settings):
    return pl.Trainer(max_epochs=epochs, **QUIET | settings)


def fitted(module=None, epochs=2, data=None, callbacks=(), **settings):
    module = training() if module is None else module
    trainer = stock(epochs, callbacks=list(callbacks), **settings)
    trainer.fit(module, datamodule=data or small_digits())
    return module


def assert_same_training(one, two):
    """The same members, weights and counts, bit for bit."""
    assert same_tensors(one.state_dict(), two.state_dict())
    assert (one.t, one.member_updates) == (two.t, two.member_updates)
    assert torch.equal(one.member_generator.get_state(), two.member_generator.get_state())
    assert torch.equal(one.attack_generator.get_state(), two.attack_generator.get_state())


# --- the same as the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sampled", "shared"])
def test_ten_lines_of_python_train_what_the_command_trains(tmp_path, kind):
    """200 images in batches of 20 and T_theta=4, L=3: sampled 30 batches of members and 2 phases, shared 10 and 2."""
    said = [*TINY, "model=small_cnn", "model.width=3", "L=3", "seed=4", f"schedule={kind}", "scheduler=cosine"]
    done = run_command(tmp_path, *said, "optimizer.lr=0.05", "name=run")
    assert done.rc == 0, done.err

    data = Digits(num_train=200, num_test=50, batch_size=20, padding=0, flip=False, seed=4)
    data.prepare_data()
    data.setup()
    settings = {"num_classes": 10, "image_shape": (1, 8, 8), "mean": data.mean, "std": data.std, "width": 3}
    module = MixtureTraining(
        build_mixture({"L": 3, "model": {"name": "small_cnn", **settings}}, seed=4),
        ThreatModel("linf", 0.05),
        solver=OracleSubgradient(num_steps=2),
        kind=kind,
        T_theta=4,
        optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
        scheduler=cosine,
        validation_attack=PGD(num_steps=4),
        seed=4,
    )
    stock().fit(module, datamodule=data)

    last = read_checkpoint(tmp_path / "outputs" / "train" / "run" / "checkpoints" / "last.ckpt")
    assert same_tensors(module.state_dict(), last["state_dict"])
    assert module.t == last["mixadv"]["t"] == (64 if kind == "sampled" else 24)
    assert module.member_updates == last["mixadv"]["member_updates"]
    assert len(set(module.mixture.weights.tolist())) == 3


# --- forward, test, validate, predict -----------------------------------------------------------------------------


def test_forward_is_that_of_the_mixture():
    module, x = training().eval(), torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module(x), module.mixture(x))
    by_hand = sum(w * member(x).softmax(1) for w, member in zip(WEIGHTS, module.mixture.members, strict=True))
    torch.testing.assert_close(module(x).exp(), by_hand)


@pytest.fixture(scope="module")
def learnt():
    """Members that are right on some images, and a loaded data module."""
    data = small_digits()
    module = fitted(
        training(Mixture(untrained_members(name="small_cnn", width=4)), solver=Uniform()), epochs=15, data=data
    )
    module.mixture.set_weights(WEIGHTS)
    return module, data


PROTOCOL = {"pgd-5": PGD(num_steps=5, restarts=2), "apgd-3": APGD(num_steps=3)}


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_test_measures_what_evaluate_measures(learnt, inference_mode):
    trained, data = learnt
    module = training(copy.deepcopy(trained.mixture), protocol=PROTOCOL, seed=11)
    (found,) = stock(inference_mode=inference_mode).test(module, datamodule=data, verbose=False)
    record = evaluate(module.mixture, data.test_dataloader(), PROTOCOL, BALL, seed=11)
    results = record.results({key: {} for key in PROTOCOL})
    assert found["test/robust_accuracy"] == pytest.approx(results.robust.value, abs=1e-12)
    assert found["test/clean_accuracy"] == pytest.approx(results.clean.value, abs=1e-12)
    assert 0 < found["test/robust_accuracy"] < found["test/clean_accuracy"]
    with torch.no_grad():
        hits = (module.mixture(data.test_images / 255).argmax(1) == data.test_labels).double()
    assert found["test/ensemble_accuracy"] == pytest.approx(float(hits.mean()), abs=1e-12)


def test_without_a_protocol_the_test_attacks_as_the_validation_does(learnt):
    trained, data = learnt
    module = training(copy.deepcopy(trained.mixture), seed=11)
    (found,) = stock().test(module, datamodule=data, verbose=False)
    record = evaluate(module.mixture, data.test_dataloader(), {"validation": PGD(num_steps=2)}, BALL, seed=11)
    results = record.results({"validation": {}})
    assert found["test/robust_accuracy"] == pytest.approx(results.robust.value, abs=1e-12)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validation_alone_gives_the_numbers_of_the_fit(learnt, inference_mode):
    trained, data = learnt
    module = training(copy.deepcopy(trained.mixture))
    (found,) = stock(inference_mode=inference_mode).validate(module, datamodule=data, verbose=False)
    generator = [generator_for(3, "validation", number) for number in range(3)]
    robust = clean = 0.0
    for (x, y), draws in zip(data.val_dataloader(), generator, strict=True):
        x_adv = PGD(num_steps=2)(module.mixture, x, y, BALL, draws)
        robust += float(module.mixture.expected_accuracy(x_adv, y).sum())
        clean += float(module.mixture.expected_accuracy(x, y).sum())
    assert found["val/robust_accuracy"] == pytest.approx(robust / 40, abs=1e-12)
    assert found["val/clean_accuracy"] == pytest.approx(clean / 40, abs=1e-12)
    assert robust < clean


def test_validation_of_members_that_are_not_finite_is_refused():
    module = training()
    with torch.no_grad():
        next(module.mixture.members[1].parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="member 1 is not finite") as caught:
        stock().validate(module, datamodule=small_digits(), verbose=False)
    assert "optimizer.lr" in str(caught.value)


class Fixed(torch.nn.Module):
    """Says the same label for all images; its one parameter learns nothing."""

    def __init__(self, label):
        super().__init__()
        self.label, self.scale = label, torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        logits = torch.zeros(len(x), 10)
        logits[:, self.label] = 5.0
        return self.scale * logits


def test_predictions_are_drawn_as_lambda_says_and_again_the_same():
    data = small_digits(num_test=360)
    module = training(Mixture([Fixed(k) for k in range(3)], WEIGHTS))
    labels = torch.cat(stock().predict(module, datamodule=data))
    assert labels.shape == (360,)
    counts = labels.bincount(minlength=3)
    assert counts.sum() == 360
    # Four standard deviations of a binomial.
    for count, weight in zip(counts.tolist(), WEIGHTS, strict=True):
        assert abs(count - 360 * weight) < 4 * (360 * weight * (1 - weight)) ** 0.5
    assert torch.equal(torch.cat(stock().predict(module, datamodule=data)), labels)
    batches = stock().predict(module, datamodule=data)
    assert len({tuple(batch.tolist()) for batch in batches}) == len(batches)
    other = training(module.mixture, seed=4)
    assert not torch.equal(torch.cat(stock().predict(other, datamodule=data)), labels)


def test_predictions_as_probabilities(learnt):
    trained, data = learnt
    module = training(copy.deepcopy(trained.mixture), predict="probabilities")
    found = torch.cat(stock().predict(module, datamodule=data))
    assert found.shape == (40, 10)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    x = data.test_images / 255
    with torch.no_grad():
        by_hand = sum(w * member(x).softmax(1) for w, member in zip(WEIGHTS, module.mixture.members, strict=True))
    torch.testing.assert_close(found, by_hand)
    # Images without labels are enough.
    images = torch.cat(stock().predict(module, DataLoader(x, batch_size=None, sampler=[range(40)])))
    torch.testing.assert_close(images, found)
    with pytest.raises(ValueError, match="choose draw or probabilities"):
        training(predict="logits")


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "mlp", "small_cnn", "small_resnet"])
def test_a_built_member_tells_how_to_build_it_again(name):
    own = {"mlp": {"hidden": (7, 5)}, "small_cnn": {"width": 3}, "small_resnet": {"width": 2}}.get(name, {})
    (member,) = untrained_members(1, name, mean=(0.3,), std=(0.4,), **own)
    plain = MODELS[name](num_classes=10, image_shape=(1, 8, 8), mean=(0.3,), std=(0.4,), **own)
    assert member.state_dict().keys() == plain.state_dict().keys()
    assert member.recipe == json.loads(json.dumps(member.recipe))
    assert member.recipe["name"] == name
    again = build_member(**member.recipe)
    again.load_state_dict(member.state_dict())
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.eval()(x), member.eval()(x))
    twin = copy.deepcopy(member)
    assert twin.recipe == member.recipe
    assert same_tensors(twin.state_dict(), member.state_dict())


def test_a_recipe_holds_pythons_own_numbers():
    import numpy as np

    member = build_member(
        "linear", num_classes=np.int64(10), image_shape=torch.Size((1, 8, 8)), mean=[np.float64(0.3)], std=[1]
    )
    kinds = [type(value) for value in (member.recipe["num_classes"], member.recipe["mean"][0])]
    assert kinds == [int, float]
    assert type(member.recipe["image_shape"]) is list


def stock_checkpoint(folder, module, data=None):
    """A training with Lightning's own checkpoints, and the file of its end."""
    keeper = ModelCheckpoint(folder, save_last=True)
    fitted(module, data=data, callbacks=[keeper], enable_checkpointing=True)
    return keeper.last_model_path


def test_a_training_is_loaded_from_a_file_of_lightnings(tmp_path):
    module = training(
        Mixture(untrained_members(name="small_resnet", width=2), WEIGHTS),
        loss=TRADES(beta=3.0),
        optimizer=partial(SGD, lr=0.05, momentum=0.8),
        scheduler=partial(piecewise, milestones=(0.4,), gamma=0.2),
        kind="sampled",
        protocol=PROTOCOL,
        micro_batch_size=8,
    )
    path = stock_checkpoint(tmp_path, module)
    loaded = MixtureTraining.load_from_checkpoint(path)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    loaded.train()
    assert same_tensors(loaded.state_dict(), module.state_dict())
    assert (loaded.t, loaded.member_updates) == (module.t, module.member_updates)
    assert all(p.requires_grad for p in loaded.parameters())
    assert loaded.hparams == module.hparams
    assert module.hparams["loss"] == {"_target_": "mixadv.losses.TRADES", "beta": 3.0}
    assert module.hparams["optimizer"] == {
        "_target_": "torch.optim.sgd.SGD",
        "_partial_": True,
        "lr": 0.05,
        "momentum": 0.8,
    }
    assert module.hparams["kind"] == "sampled"
    assert module.hparams["micro_batch_size"] == 8
    assert (loaded.loss, loaded.threat_model, loaded.solver) == (module.loss, module.threat_model, module.solver)
    assert (loaded.training_attack, loaded.validation_attack) == (module.training_attack, module.validation_attack)
    assert loaded.protocol == PROTOCOL
    assert loaded.schedule == module.schedule
    # And it can be trained like any other.
    fitted(loaded)
    assert not same_tensors(loaded.state_dict(), module.state_dict())


def test_arguments_given_take_the_place_of_recorded_ones(tmp_path):
    path = stock_checkpoint(tmp_path, training(seed=9))
    loaded = MixtureTraining.load_from_checkpoint(path, loss=TRADES(), predict="probabilities", map_location="cpu")
    assert loaded.loss == TRADES()
    assert loaded.predict == "probabilities"
    assert loaded.seed == 9
    recipe = {"L": 3, "model": untrained_members(1)[0].recipe, "note": "mine"}
    assert MixtureTraining.load_from_checkpoint(path, recipe=recipe).recipe == recipe


@dataclass(frozen=True)
class OwnLoss(AT):
    """A loss that is not part of mixadv."""


def test_a_loss_of_ones_own_has_to_be_given(tmp_path):
    path = stock_checkpoint(tmp_path, training(loss=OwnLoss()))
    with pytest.raises(UserError, match=r"loss=.*OwnLoss.*loss=\.\.\.") as caught:
        MixtureTraining.load_from_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert MixtureTraining.load_from_checkpoint(path, loss=OwnLoss()).loss == OwnLoss()


def test_members_of_ones_own_have_to_be_given(tmp_path):
    def nets():
        torch.manual_seed(1)
        return [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)) for _ in range(2)]

    module = training(Mixture(nets()))
    path = stock_checkpoint(tmp_path, module)
    with pytest.raises(UserError, match=r"give mixture=\.\.\."):
        MixtureTraining.load_from_checkpoint(path)
    loaded = MixtureTraining.load_from_checkpoint(path, mixture=Mixture(nets()))
    assert same_tensors(loaded.state_dict(), module.state_dict())
    with pytest.raises(UserError, match="not L=3"):
        MixtureTraining.load_from_checkpoint(path, mixture=Mixture(untrained_members()))


def test_an_attribute_that_happens_to_be_called_recipe_is_no_recipe():
    nets = untrained_members()
    nets[1].recipe = torch.nn.Identity()
    assert training(Mixture(nets)).recipe is None


FOREIGN = [
    "os.system",
    "mixadv.main.os.system",
    "subprocess.Popen",
    "mixadv.training.recorded.importlib.import_module",
    "mixadv.members.factory.build_factory",
    "mixadv.loggers.csv.CSVLogger",
    "mixadv.losses.Path",
    "torch.optim.lr_scheduler.types.FunctionType",
    "torch.optim.Optimizer.__init__",
    "builtins.exec",
    "",
]


@pytest.mark.parametrize("target", FOREIGN)
@pytest.mark.parametrize("key", ["loss", "optimizer", "protocol"])
def test_a_file_cannot_name_other_code(tmp_path, monkeypatch, key, target):
    path = stock_checkpoint(tmp_path, training())
    checkpoint = torch.load(path, weights_only=True)
    record = {"_target_": target, "command": "touch hacked", "args": "touch hacked", "save_dir": "hacked"}
    checkpoint["hyper_parameters"][key] = {"one": record} if key == "protocol" else {**record, "_partial_": True}
    torch.save(checkpoint, path)
    called = []
    monkeypatch.setattr(os, "system", called.append)
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: called.append(args))
    with pytest.raises(UserError, match=rf"{key}=\.\.\."):
        MixtureTraining.load_from_checkpoint(path)
    assert called == []


def test_a_file_cannot_hold_other_objects(tmp_path):
    path = stock_checkpoint(tmp_path, training())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["loss"] = AT()
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        MixtureTraining.load_from_checkpoint(path, weights_only=False)


def test_a_file_cannot_ask_for_more_members_than_it_holds(tmp_path):
    path = stock_checkpoint(tmp_path, training())
    checkpoint = torch.load(path, weights_only=True)
    recipe = checkpoint["mixture_config"]
    for changed in ({**recipe, "L": 10**9}, {"L": 3, "model": {**recipe["models"][0], "num_classes": 2**20}}):
        torch.save({**checkpoint, "mixture_config": changed}, path)
        with pytest.raises(UserError, match="do not fit its recipe"):
            MixtureTraining.load_from_checkpoint(path)
    torch.save({**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], "kind": "other"}}, path)
    with pytest.raises(UserError, match="sampled, shared or grow"):
        MixtureTraining.load_from_checkpoint(path)


def test_parts_are_recorded_and_built_again():
    parts = {
        "optimizer": partial(AdamW, lr=0.1, betas=(0.8, 0.9)),
        "scheduler": partial(OneCycleLR, max_lr=0.2),
        "solver": OracleSubgradient(num_steps=3),
        "attack": PGD(num_steps=3, step_size=0.5),
        "threat_model": ThreatModel("l2", 0.5),
        "protocol": PROTOCOL,
        "seed": 4,
        "micro_batch_size": None,
    }
    again = {key: rebuilt(record, key) for key, record in json.loads(json.dumps(recorded(parts))).items()}
    for key in ("optimizer", "scheduler"):
        assert again[key].func is parts[key].func
        assert list(again[key].keywords) == list(parts[key].keywords)
    for key in ("solver", "attack", "threat_model", "protocol", "seed", "micro_batch_size"):
        assert again[key] == parts[key]
    assert rebuilt(recorded(piecewise), "scheduler").func is piecewise


# --- monitors -----------------------------------------------------------------------------------------------------


def test_callbacks_and_loggers_of_lightning_work_together(tmp_path):
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="val/robust_accuracy", mode="max", save_top_k=2)
    stopping = EarlyStopping("val/robust_accuracy", mode="max", patience=50)
    averaging = EMAWeightAveraging(decay=0.9)
    logger = CSVLogger(tmp_path, name="csv", version=0)
    module = fitted(
        training(optimizer=partial(SGD, lr=0.05)),
        epochs=3,
        callbacks=[keeper, stopping, LearningRateMonitor("step"), averaging],
        logger=logger,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    found = module.trainer.callback_metrics
    names = ["train/loss", "train/adversarial_accuracy", "train/lr", "weights/value", "weights/lower_bound"]
    names += ["val/robust_accuracy", "val/clean_accuracy", "val/ensemble_accuracy", "epoch", "member_updates"]
    assert set(names) | {"lambda/0", "lambda/1", "lambda/2"} <= set(found)
    assert float(found["epoch"]) == 3
    assert float(found["member_updates"]) == sum(module.member_updates)
    assert float(keeper.best_model_score) == float(stopping.best_score)
    assert len(keeper.best_k_models) == 2
    loaded = MixtureTraining.load_from_checkpoint(keeper.best_model_path)
    (again,) = stock().validate(loaded, datamodule=small_digits(), verbose=False)
    # What was validated and kept are the averages.
    assert again["val/robust_accuracy"] == pytest.approx(float(keeper.best_model_score), abs=1e-6)
    logger.save()
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {int(row["step"]): float(row["val/robust_accuracy"]) for row in rows if row["val/robust_accuracy"]}
    # 3 batches in a pass and T_theta=2: an epoch has 3 batches of members and 1 phase.
    assert list(scores) == [4, 8, 12]
    assert [int(row["step"]) for row in rows if row["weights/value"]] == [3, 6, 9, 12]
    assert {row["lambda/1"] != "" for row in rows if row["train/loss"]} == {True}
    assert all(any(row[name] for row in rows) for name in ("lr-SGD", "lr-SGD-1", "lr-SGD-2"))


def test_early_stopping_ends_the_training():
    stopping = EarlyStopping("val/robust_accuracy", mode="max", patience=1)
    # Members that stand still do not get better: the first validation stays the best.
    module = fitted(training(optimizer=partial(SGD, lr=1e-300), solver=Uniform()), epochs=6, callbacks=[stopping])
    assert module.t == 2 * 3
    assert stopping.stopped_epoch == 1


# --- refusals -----------------------------------------------------------------------------------------------------


def refused_fit(module, trainer, **data):
    return refusal(trainer.fit, module, **(data or {"datamodule": small_digits()}))


def test_a_loader_in_the_place_of_a_data_module():
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)), 4)
    text = refused_fit(training(), stock(), train_dataloaders=loader, val_dataloaders=loader)
    assert "ImageDataModule" in text
    assert "DataLoader" in text


def test_a_training_without_batches_or_end():
    assert "limit_train_batches=0" in refused_fit(training(), stock(limit_train_batches=0))
    assert "max_epochs" in refused_fit(training(), pl.Trainer(max_epochs=-1, max_steps=5, **QUIET))


def test_a_strategy_that_wraps_the_module(monkeypatch):
    """In `setup`, before any process has trained: what is there is said to be another strategy."""
    module, trainer = training(), stock()
    module.trainer, module_data = trainer, small_digits()
    module_data.setup("fit")
    trainer.datamodule = module_data

    class DDPStrategy:
        root_device = torch.device("cpu")

    monkeypatch.setattr(type(trainer), "strategy", property(lambda self: DDPStrategy()))
    with pytest.raises(UserError, match=r"DDPStrategy cannot train a mixture.*Replicas\(\)"):
        module.setup("fit")
    # Measuring is for everybody.
    module.setup("test")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": partial(SGD, lr=0.0)}, r"optimizer: lr=0\.0 would learn nothing"),
        ({"optimizer": partial(SGD, lr=float("nan"))}, "optimizer: "),
        ({"optimizer": partial(SGD, lr=float("inf"))}, "optimizer: lr=inf must be finite"),
        ({"optimizer": partial(SGD, lr=-0.1)}, "optimizer: .*-0.1"),
        ({"optimizer": partial(SGD, lr=0.1, nesterov=True)}, "optimizer: Nesterov momentum"),
        ({"optimizer": partial(SGD, lr=0.1, momentun=0.9)}, "optimizer: .*momentun"),
        ({"scheduler": ReduceLROnPlateau}, "scheduler: ReduceLROnPlateau waits for a metric"),
        ({"scheduler": OneCycleLR}, "scheduler: .*max_lr"),
        ({"scheduler": partial(piecewise, milestones=(2.0,))}, "scheduler: milestones"),
        ({"kind": "both"}, "sampled, shared or grow"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val=-1.0"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "both"}, "gradient_clip_algorithm='both'"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_construction(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        training(**settings)
    assert "\n" not in str(caught.value)


# --- flags of the trainer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "length"), [(1, 1), (3, 3), (100, 9), (0.5, 4), (0.05, 1), (1.0, 9), (None, 9)])
def test_epochs_are_cut_by_a_number_of_batches_or_a_share(limit, length):
    """96 images in batches of 16: 6 batches of members and, with T_theta=2, 3 phases."""
    module = fitted(data=small_digits(num_train=96), limit_train_batches=limit, limit_val_batches=1)
    assert module.batches_per_epoch == length
    assert module.t == module.total_batches == 2 * length
    # The rate follows the length: batches of members among them.
    assert module.updates_per_member == 2 * length - 2 * length // 3


class Batches(pl.Callback):
    """Keeps what the module is given."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((batch[0].clone(), batch[1].clone()))


@pytest.mark.parametrize("share", [2, 0.5])
def test_overfitting_meets_the_same_batches_again(share):
    """48 images in batches of 16, an epoch of 4: half of it are 2."""
    data, watch = small_digits(padding=1, flip=True, seed=8), Batches()
    fitted(data=data, callbacks=[watch], overfit_batches=share)
    first = list(BatchStream(data.train_images, data.train_labels, 16, seed=8, padding=1, flip=True))[:2]
    assert len(watch.seen) == 4
    for (x, y), (u, v) in zip(watch.seen, first * 2, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


class Steps(pl.Callback):
    """Parameters of every member before and after each batch."""

    def __init__(self):
        self.steps = []

    def flat(self, module):
        return [torch.cat([p.detach().flatten() for p in m.parameters()]).clone() for m in module.mixture.members]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.flat(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append((self.before, self.flat(pl_module)))


@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_the_gradient_of_each_member_is_clipped_alone(algorithm):
    """Steps of SGD with rate 1: their size is that of the gradient. Against gradients taken and clipped by hand."""
    bound, data = 0.05, small_digits()
    settings = {"optimizer": partial(SGD, lr=1.0), "scheduler": constant, "solver": Uniform(), "attack": PGD(0)}
    plain, clipped = (
        training(copy.deepcopy(Mixture(untrained_members(), WEIGHTS)), **settings, **clip)
        for clip in ({}, {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm})
    )
    watch, free = Steps(), Steps()
    fitted(clipped, 1, data, [watch])
    fitted(plain, 1, data, [free])

    nets = untrained_members()
    noise = generator_for(3, "attacks")
    for (x, y), (before, after) in zip(epoch_of(data), watch.steps, strict=True):
        low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
        x_adv = low + (high - low) * torch.rand(x.shape, generator=noise)
        for k, net in enumerate(nets):
            net.zero_grad()
            torch.nn.functional.cross_entropy(net(x_adv), y).backward()
            gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
            if algorithm == "value":
                gradient = gradient.clamp(-bound, bound)
                assert (before[k] - after[k]).abs().max() <= bound * 1.01
            else:
                gradient = gradient * min(1.0, bound / float(gradient.norm()))
                assert (before[k] - after[k]).norm() <= bound * 1.01
            torch.testing.assert_close(after[k], before[k] - gradient, rtol=1e-4, atol=1e-6)
            torch.nn.utils.vector_to_parameters(after[k].clone(), net.parameters())
    # There was something to clip.
    assert all((before[k] - after[k]).norm() > 2 * bound for before, after in free.steps for k in range(3))


def epoch_of(data):
    """The batches of the first epoch, from a stream of our own."""
    return list(BatchStream(data.train_images, data.train_labels, 16, padding=data.padding, flip=data.flip))


class Rates(pl.Callback):
    """The rate of every member before each batch, with its updates so far."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for k, optimizer in enumerate(trainer.optimizers):
            self.seen.append((pl_module.member_updates[k], optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("kind", ["sampled", "shared"])
@pytest.mark.parametrize(
    "optimizer", [partial(SGD, lr=0.1, momentum=0.9), partial(AdamW, lr=0.01)], ids=["sgd", "adamw"]
)
@pytest.mark.parametrize(
    ("given", "whole"),
    [
        (partial(OneCycleLR, max_lr=0.1), lambda o, n: OneCycleLR(o, max_lr=0.1, total_steps=n)),
        (partial(CosineAnnealingLR), lambda o, n: CosineAnnealingLR(o, T_max=n)),
    ],
    ids=["one-cycle", "cosine"],
)
def test_schedules_of_torch_follow_the_updates_of_their_member(given, whole, kind, optimizer):
    """Two epochs. shared: 4 batches, 6 of the 8 update every member; sampled: 9 + 1, 18 of the 20, so 6 on average."""
    watch = Rates()
    module = fitted(training(kind=kind, optimizer=optimizer, scheduler=given), callbacks=[watch])
    assert module.updates_per_member == 6
    alone = optimizer([torch.nn.Parameter(torch.zeros(1))])
    scheduler, curve = whole(alone, 6), []
    for _ in range(6):
        curve.append(alone.param_groups[0]["lr"])
        alone.step()
        scheduler.step()
    assert {done for done, _ in watch.seen} >= set(range(5))
    # Beyond its share, where the draws may lead a member, its last rate stays.
    assert max(done for done, _ in watch.seen) > (6 if kind == "sampled" else 4)
    for done, rate in watch.seen:
        assert rate == curve[min(done, 5)]


def test_a_second_fit_has_a_schedule_of_its_own():
    """3 batches of members in an epoch, each followed by a step: cos at 0, 1/3 and 2/3 of the training."""
    module = fitted(training(solver=Uniform(), scheduler=cosine), 1)
    watch = Rates()
    fitted(module, 1, callbacks=[watch])
    assert [rate for _, rate in watch.seen[::3]] == pytest.approx([0.1, 0.075, 0.025])


def test_adamw_trains_as_written_out():
    """One member, attacks that only start: batch after batch."""
    data, (net,) = small_digits(), untrained_members(1)
    plain = copy.deepcopy(net)
    module = training(
        Mixture([net]), optimizer=partial(AdamW, lr=0.01, weight_decay=0.1), scheduler=constant, attack=PGD(0)
    )
    fitted(module, 1, data)
    optimizer, noise = AdamW(plain.parameters(), lr=0.01, weight_decay=0.1), generator_for(3, "attacks")
    for x, y in epoch_of(data):
        low, high = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            plain(low + (high - low) * torch.rand(x.shape, generator=noise)), y
        ).backward()
        optimizer.step()
    assert same_tensors(net.state_dict(), plain.state_dict())


# --- stopping and going on ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sampled", "shared"])
def whole(request):
    return request.param, fitted(resumable(request.param), data=small_digits(padding=1, flip=True))


def resumable(kind):
    nets = Mixture(untrained_members(name="small_resnet", width=2), WEIGHTS)
    return training(nets, kind=kind, optimizer=partial(SGD, lr=0.05, momentum=0.9))


# sampled: 9 batches of members and, after each 6, a phase: epochs of 10. shared: 3 and, after each 2, a phase: 4.
@pytest.mark.parametrize("where", ["first", "middle", "last", "second", "end"])
def test_a_trainer_goes_on_from_its_checkpoint_bit_for_bit(whole, tmp_path, where):
    kind, reference = whole
    length = 10 if kind == "sampled" else 4
    assert reference.t == 2 * length
    t = {"first": 1, "middle": length // 2, "last": length, "second": length + 2, "end": 2 * length}[where]
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Interrupted):
        fitted(resumable(kind), data=small_digits(padding=1, flip=True), callbacks=[SaveAndStop(path, t)])
    # Other draws in between.
    torch.manual_seed(99)
    module, watch = resumable(kind), Batches()
    stock(callbacks=[watch]).fit(module, datamodule=small_digits(padding=1, flip=True), ckpt_path=path)
    assert sum(len(y) > 0 for _, y in watch.seen) == 2 * length - t
    assert_same_training(module, reference)
    validated = [m.trainer.callback_metrics["val/robust_accuracy"] for m in (module, reference)]
    assert torch.equal(*validated)


# What Lightning says about callbacks in the checkpoint, and about counting steps in manual optimization.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Using ModelCheckpoint with manual")
@pytest.mark.parametrize("settings", [{}, {"save_on_train_epoch_end": True}, {"every_n_train_steps": 3}])
def test_a_trainer_goes_on_from_checkpoints_of_lightning_bit_for_bit(whole, tmp_path, settings):
    """Those after validation, after the epoch, and by the count of steps."""
    kind, reference = whole
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, **settings)
    fitted(resumable(kind), data=small_digits(padding=1, flip=True), callbacks=[keeper], enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= 2
    for path in files:
        module = resumable(kind)
        stock().fit(module, datamodule=small_digits(padding=1, flip=True), ckpt_path=path)
        assert_same_training(module, reference)


def test_a_finished_training_goes_on_for_more_epochs(tmp_path):
    """A rate that does not depend on the length of the training."""
    settings = {"scheduler": constant}
    reference = fitted(training(**settings), 4)
    path = tmp_path / "done.ckpt"
    fitted(training(**settings), 2).trainer.save_checkpoint(path)
    module = training(**settings)
    stock(4).fit(module, datamodule=small_digits(), ckpt_path=path)
    assert_same_training(module, reference)


def test_a_checkpoint_can_be_written_without_a_fit(tmp_path):
    module, trainer = training(), stock()
    trainer.validate(module, datamodule=small_digits(), verbose=False)
    path = tmp_path / "new.ckpt"
    trainer.save_checkpoint(path)
    assert same_tensors(MixtureTraining.load_from_checkpoint(path).state_dict(), module.state_dict())
    again = training()
    stock().fit(again, datamodule=small_digits(), ckpt_path=path)
    assert_same_training(again, fitted())


# --- in any order, and with what a Trainer may have ---------------------------------------------------------


@pytest.mark.parametrize("first", ["validate", "test", "predict", "fit"])
def test_a_fit_after_anything_else_is_the_same_fit(first):
    """Before it, only another fit changes the members: then it begins anew from these."""
    module, trainer = training(), stock()
    getattr(trainer, first)(module, datamodule=small_digits())
    start = training(Mixture(copy.deepcopy(list(module.mixture.members)), module.mixture.weights.clone()))
    stock().fit(module, datamodule=small_digits())
    assert_same_training(module, fitted(start))
    # And the other way round.
    stock().validate(module, datamodule=small_digits(), verbose=False)
    stock().fit(module, datamodule=small_digits())


def test_a_trainer_has_its_own_settings_back_after_a_fit():
    trainer = stock(limit_train_batches=0.5)
    trainer.fit(training(), datamodule=small_digits())
    assert (trainer.limit_train_batches, trainer.reload_dataloaders_every_n_epochs) == (0.5, 0)
    trainer.fit_loop.epoch_progress.reset()
    module = training()
    trainer.fit(module, datamodule=small_digits(num_train=96))
    alone = fitted(training(), data=small_digits(num_train=96), limit_train_batches=0.5)
    assert module.t == alone.t > 0


@pytest.mark.parametrize("finder", [BatchSizeFinder, LearningRateFinder])
def test_callbacks_that_try_batches_are_refused(finder):
    with pytest.raises(UserError, match="give numbers"):
        fitted(callbacks=[finder()])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_in_which_no_attack_works_are_refused(precision):
    module, trainer = training(), stock()
    trainer.strategy.precision_plugin.precision = precision
    with pytest.raises(UserError, match="use bf16-mixed"):
        trainer.fit(module, datamodule=small_digits())


def test_a_data_module_with_loaders_of_its_own_is_refused():
    class Own(Digits):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4)))

    with pytest.raises(UserError, match="not a DataLoader"):
        fitted(data=Own(batch_size=16, num_train=48))


def test_members_that_cannot_be_trained_are_refused():
    member = untrained_members(1)[0]
    with pytest.raises(ValueError, match="members 0 and 2 are the same module"):
        training(Mixture([member, *untrained_members(1), member]))
    frozen = untrained_members(1)[0].requires_grad_(False)
    # They can be measured.
    module = training(Mixture([*untrained_members(1), frozen]))
    stock().validate(module, datamodule=small_digits(), verbose=False)
    with pytest.raises(UserError, match="member 1 has no parameter"):
        fitted(module)


def test_the_loss_can_be_monitored_after_every_step():
    """With Lightning's own log_every_n_steps=50 no row of this training has one."""
    stopper = EarlyStopping("train/loss", patience=0, mode="max", min_delta=1e9)
    module = fitted(epochs=4, callbacks=[stopper])
    assert module.trainer.current_epoch < 4


def test_loggers_of_a_stock_trainer_get_the_settings(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fitted(logger=logger, log_every_n_steps=1)
    text = (tmp_path / "hparams.yaml").read_text()
    assert "T_theta: 2" in text
    assert "mixadv.threat_model.ThreatModel" in text


def test_a_trainer_does_not_go_on_with_other_settings(tmp_path):
    path = tmp_path / "last.ckpt"
    fitted().trainer.save_checkpoint(path)
    for settings, name in (({"loss": TRADES()}, "loss"), ({"optimizer": partial(SGD, lr=0.3)}, "optimizer")):
        with pytest.raises(UserError, match=f"was trained with {name}="):
            stock(4).fit(training(**settings), datamodule=small_digits(), ckpt_path=path)
    # What changes no number may differ.
    stock(4).fit(training(micro_batch_size=8), datamodule=small_digits(), ckpt_path=path)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "at"},
        {"loss": None},
        {"loss": {"_target_": "torch.optim.SGD", "_partial_": True}},
        {"optimizer": {"_target_": "mixadv.attacks.pgd.PGD"}},
        {"solver": {"_target_": "mixadv.attacks.suite.AttackSuite"}},
        {"threat_model": "x"},
        {"seed": "a"},
        {"protocol": [1, 2]},
        {"kind": 3},
    ],
    ids=str,
)
def test_settings_of_a_file_that_are_of_another_kind_are_refused(tmp_path, change):
    path = stock_checkpoint(tmp_path, training())
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"] |= change
    torch.save(content, path)
    with pytest.raises(UserError) as caught:
        MixtureTraining.load_from_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"t": None}, {"recent": [1]}, {"member_updates": 5}, "x"], ids=str)
def test_a_state_of_a_file_that_is_none_is_refused(tmp_path, change):
    path = stock_checkpoint(tmp_path, training())
    content = torch.load(path, weights_only=True)
    content["mixadv"] = change if isinstance(change, str) else {**content["mixadv"], **change}
    if change == {"t": None}:
        del content["mixadv"]["t"]
    torch.save(content, path)
    with pytest.raises(UserError, match="does not hold a training"):
        MixtureTraining.load_from_checkpoint(path)
