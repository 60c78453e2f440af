"""Algorithm 2 through the real trainer: against loops written out here, and what a step may and may not move."""

import copy
import csv
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from builders.data import digits_module, set_up
from builders.networks import WEIGHTS, InFloat64, same_tensors, untrained_members
from conftest import QUIET
from mixadv.attacks import PGD
from mixadv.callbacks import Checkpoints, WholeFiles
from mixadv.checkpoint_files import read_checkpoint
from mixadv.data.digits import Digits
from mixadv.data.stream import BatchStream
from mixadv.errors import UserError
from mixadv.game import Equilibrium
from mixadv.lambda_solvers import OracleSubgradient, Uniform
from mixadv.lambda_solvers.driver import LambdaSolver
from mixadv.loggers.csv import CSVLogger
from mixadv.losses import AT, TRADES
from mixadv.members.store import load_mixture
from mixadv.metrics_file import MetricsFile, standard_columns
from mixadv.mixture import Mixture
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.learning_rate import constant, cosine, piecewise
from recorded_rows import Rows

EPS, STEP, NUM_STEPS = 0.1, 0.3, 3  # STEP is relative to EPS


class LongEpochs(Digits):
    """An epoch is as long as a test limits it to, and not one pass; the batches are those of Digits."""

    @property
    def batches_per_pass(self):
        return 1000


@pytest.fixture(scope="module")
def digits():
    return set_up(digits_module(LongEpochs, seed=3))


def normalising_members(count, name="small_resnet", **settings):
    return untrained_members(count, name, mean=(0.3,), std=(0.4,), **settings)


def training(mixture, *, loss=None, solver=None, attack=None, lr=0.1, rate=constant, **settings):
    settings = {"T_theta": 2, "seed": 7, **settings}
    attack = attack or PGD(num_steps=NUM_STEPS, step_size=STEP)
    return MixtureTraining(
        mixture,
        loss=loss or AT(),
        threat_model=ThreatModel("linf", EPS),
        attack=attack,
        validation_attack=PGD(num_steps=NUM_STEPS, step_size=STEP, keep="last"),
        solver=solver or Uniform(),
        optimizer=partial(SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
        scheduler=rate,
        **settings,
    )


def fit(module, data, batches, epochs=1, validate=False, callbacks=(), loggers=(), every=1):
    keeps = any(isinstance(callback, Checkpoints) for callback in callbacks)
    trainer = pl.Trainer(
        max_epochs=epochs,
        **QUIET | {"logger": [Rows(), *loggers], "enable_checkpointing": keeps},
        limit_train_batches=batches,
        limit_val_batches=None if validate else 0,
        log_every_n_steps=every,
        callbacks=list(callbacks),
        plugins=[WholeFiles()],
    )
    trainer.fit(module, datamodule=data)
    return module


def batches_of(data, count):
    """The first batches of training, from a stream of our own."""
    stream = BatchStream(data.train_images, data.train_labels, 16, seed=3, batches_per_epoch=count)
    return list(stream)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- L = 1 is plain adversarial training --------------------------------------------------------------------


def pgd_by_hand(models, weights, x, y, generator, trades):
    """Signed gradient steps on the weighted loss, uniform start (TRADES: Gaussian), last iterate; eval mode."""
    for model in models:
        model.eval()
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    if trades:
        with torch.no_grad():
            clean = [F.softmax(model(x), dim=1) for model in models]
        x_adv = (x + 0.001 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    else:
        x_adv = low + (high - low) * torch.rand(x.shape, generator=generator)
    for _ in range(NUM_STEPS):
        x_adv = x_adv.detach().requires_grad_()
        total = torch.zeros(())
        for k, model in enumerate(models):
            logits = model(x_adv)
            if trades:
                total = total + weights[k] * F.kl_div(F.log_softmax(logits, dim=1), clean[k], reduction="sum")
            else:
                total = total + weights[k] * F.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(total, x_adv)
        x_adv = torch.min(torch.max(x_adv + STEP * EPS * gradient.sign(), low), high)
    return x_adv.detach()


def plain_training(model, batches, rates, trades):
    """Adversarial training as in Madry et al., and TRADES as in Zhang et al., of one network."""
    generator = generator_for(7, "attacks")
    optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for (x, y), rate in zip(batches, rates, strict=True):
        x_adv = pgd_by_hand([model], [1.0], x, y, generator, trades)
        model.train()
        if trades:
            # Batch norm sees the clean images first, then the attacked ones.
            clean = model(x)
            attacked = model(x_adv)
            divergence = F.kl_div(F.log_softmax(attacked, dim=1), F.softmax(clean, dim=1), reduction="batchmean")
            loss = F.cross_entropy(clean, y) + 6.0 * divergence
        else:
            loss = F.cross_entropy(model(x_adv), y)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["sampled", "shared", "grow"])
@pytest.mark.parametrize("loss", [AT(), TRADES(beta=6.0)], ids=["at", "trades"])
def test_one_member_is_plain_adversarial_training_step_for_step(digits, loss, kind):
    """Parameters, batch-norm statistics and the count of forwards: AT bit for bit in float32; TRADES in float64,
    where torch's kl_div and ours differ by rounding alone."""
    trades = isinstance(loss, TRADES)
    (member,) = normalising_members(1, width=3)
    if trades:
        member = InFloat64(member)
    plain, before = copy.deepcopy(member), state_of(member)
    module = training(Mixture([member]), loss=loss, kind=kind, rate=partial(piecewise, milestones=(0.6,), gamma=0.1))
    fit(module, digits, 5)
    plain_training(plain, batches_of(digits, 5), [0.1, 0.1, 0.1, 0.1 * 0.1, 0.1 * 0.1], trades)
    ours, theirs = state_of(member), state_of(plain)
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).abs().max()
        assert difference <= (1e-12 if trades else 0), f"{name} differs by {difference}"
        assert name.endswith(("mean", "std")) or not torch.equal(ours[name], before[name]), name
    counted = [int(tensor) for name, tensor in ours.items() if name.endswith("num_batches_tracked")]
    assert set(counted) == {10 if trades else 5}


@pytest.mark.parametrize("kind", ["sampled", "shared"])
def test_three_members_follow_algorithm_2_written_out(digits, kind):
    """The attack sees the whole mixture with its weights; then the drawn member steps (shared: each of them)."""
    networks = [InFloat64(member) for member in normalising_members(3, width=2)]
    plain = copy.deepcopy(networks)
    mixture = Mixture(networks, WEIGHTS)
    weights = [float(w) for w in mixture.weights]
    fit(training(mixture, kind=kind), digits, 6)

    noise, draws = generator_for(7, "attacks"), generator_for(7, "members")
    optimizers = [SGD(member.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for member in plain]
    drawn = []
    for x, y in batches_of(digits, 6):
        x_adv = pgd_by_hand(plain, weights, x, y, noise, trades=False)
        drawn += [0, 1, 2] if kind == "shared" else [int(torch.randint(3, (), generator=draws))]
        for k in drawn[-3:] if kind == "shared" else drawn[-1:]:
            plain[k].train()
            optimizers[k].zero_grad()
            F.cross_entropy(plain[k](x_adv), y).backward()
            optimizers[k].step()
    assert len({drawn.count(k) for k in range(3)}) > 1 or kind == "shared"
    for ours, theirs in zip(networks, plain, strict=True):
        for name, tensor in state_of(theirs).items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-12)


# --- what a step moves --------------------------------------------------------------------------------------


@dataclass
class Snapshot:
    members: list
    momentum: list
    weights: torch.Tensor
    rates: list
    counts: list
    flags: list


def state_of_training(trainer, module):
    mixture = module.mixture
    return Snapshot(
        members=[state_of(member) for member in mixture.members],
        momentum=[
            {str(i): s["momentum_buffer"].clone() for i, s in enumerate(optimizer.state.values())}
            for optimizer in trainer.optimizers
        ],
        weights=mixture.weights.clone(),
        rates=[optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers],
        counts=list(module.member_updates),
        flags=[m.training for m in mixture.modules()] + [p.requires_grad for p in mixture.parameters()],
    )


class Watch(pl.Callback):
    """Records (outputs, before, after) for every batch: its phase with the logged metrics, and the state around it."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = state_of_training(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = state_of_training(trainer, pl_module)
        step, row = trainer.loggers[0].rows[-1]
        is_phase = step == pl_module.t and "weights/value" in row
        said = {name.rpartition("/")[2]: float(value) for name, value in trainer.callback_metrics.items()}
        if is_phase:
            outputs = {"phase": "weights", **said}
        else:
            updated = [k for k, count in enumerate(after.counts) for _ in range(count - self.before.counts[k])]
            outputs = {"phase": "members", "members": updated, **said}
        self.steps.append((outputs, self.before, after))


UPDATES = {"sampled": 6, "shared": 14}


@pytest.fixture(scope="module", params=["sampled", "shared"])
def watched(request, digits):
    """20 batches with weights phases; L=3, batch norm."""
    watch = Watch()
    module = training(
        Mixture(normalising_members(3, width=2), WEIGHTS),
        solver=OracleSubgradient(num_steps=3),
        kind=request.param,
        rate=cosine,
    )
    fit(module, digits, 20, callbacks=[watch])
    return request.param, module, watch.steps


def test_phases_of_a_training(watched):
    kind, module, steps = watched
    by_hand = {"sampled": "MMMMMMWMMMMMMWMMMMMM", "shared": "MMWMMWMMWMMWMMWMMWMM"}
    assert "".join(outputs["phase"][0].upper() for outputs, *_ in steps) == by_hand[kind]
    assert module.t == 20
    if kind == "sampled":
        draws = generator_for(7, "members")
        wanted = [[int(torch.randint(3, (), generator=draws))] for _ in range(18)]
    else:
        wanted = 14 * [[0, 1, 2]]
    assert [outputs["members"] for outputs, *_ in steps if outputs["phase"] == "members"] == wanted


def test_a_members_step_moves_the_updated_members_alone(watched):
    kind, module, steps = watched
    tally = [0, 0, 0]
    for outputs, before, after in steps:
        if outputs["phase"] != "members":
            continue
        assert len(outputs["members"]) == (1 if kind == "sampled" else 3)
        for k in range(3):
            if k in outputs["members"]:
                tally[k] += 1
                moved = [n for n in after.members[k] if not torch.equal(before.members[k][n], after.members[k][n])]
                fixed = ("normalize.mean", "normalize.std")
                assert sorted(moved) == sorted(set(after.members[k]) - set(fixed))
                for name in moved:
                    if name.endswith("num_batches_tracked"):
                        assert after.members[k][name] == before.members[k][name] + 1
            else:
                assert same_tensors(before.members[k], after.members[k])
                assert same_tensors(before.momentum[k], after.momentum[k])
                assert before.rates[k] == after.rates[k]
        assert torch.equal(before.weights, after.weights)
        assert after.counts == tally
        assert math.isfinite(outputs["loss"])
        assert 0 <= outputs["adversarial_accuracy"] <= 1
    assert module.member_updates == tally
    assert sum(tally) == (18 if kind == "sampled" else 42)


def test_a_weights_phase_moves_the_weights_alone(watched):
    _, _, steps = watched
    phases = [step for step in steps if step[0]["phase"] == "weights"]
    for outputs, before, after in phases:
        for k in range(3):
            assert same_tensors(before.members[k], after.members[k])
            assert same_tensors(before.momentum[k], after.momentum[k])
        assert before.rates == after.rates
        assert before.counts == after.counts
        assert (after.weights >= 0).all()
        assert float(after.weights.double().sum()) == pytest.approx(1, abs=1e-6)
        assert outputs["lower_bound"] <= outputs["value"] + 1e-9
    assert any(not torch.equal(before.weights, after.weights) for _, before, after in phases)


def test_attacks_leave_modes_and_gradient_flags(watched):
    _, _, steps = watched
    for _, before, after in steps:
        assert all(before.flags)
        assert all(after.flags)
    assert len(steps[0][1].flags) > 3 * 10


def test_the_rate_follows_the_updates_of_its_own_member(watched):
    """The rate that an SGD step really used, p' = p - rate * momentum, against torch's cosine schedule."""
    kind, _, steps = watched
    total = UPDATES[kind]
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    curve = []
    for _ in range(total):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    curve += 20 * curve[-1:]
    for outputs, before, after in steps:
        for k in range(3):
            assert before.rates[k] == pytest.approx(curve[before.counts[k]], rel=1e-9)
        for k in outputs.get("members", []):
            p, q = (s.members[k]["net.fc.weight"] for s in (before, after))
            velocity = next(v for v in after.momentum[k].values() if v.shape == p.shape)
            torch.testing.assert_close(q, p - curve[before.counts[k]] * velocity, rtol=1e-5, atol=1e-7)


@dataclass(frozen=True)
class Scripted(LambdaSolver):
    """Gives prepared answers and notes what it was asked."""

    answers: tuple
    calls: list
    adapts: ClassVar[bool] = True

    def attack_cost(self):
        return 1.0

    def solve(self, game, lam0=None, generator=None):
        weights = torch.tensor(self.answers[len(self.calls)], dtype=torch.float64)
        self.calls.append((game, lam0, generator))
        return Equilibrium(weights, 0.25, None, None, "completed", {}, 1, None, None)


def test_a_weights_phase_starts_from_the_current_weights_on_its_own_batch(digits):
    """T_theta=1, L=3: phases at t = 4 and 8."""
    solver = Scripted(((0.5, 0.2, 0.3), (0.1, 0.65, 0.25)), [])
    module = training(
        Mixture(normalising_members(3, "linear"), [0.2, 0.3, 0.5]), solver=solver, T_theta=1, loss=TRADES()
    )
    fit(module, digits, 9)
    assert len(solver.calls) == 2
    batches = batches_of(digits, 9)
    for (game, lam0, generator), t, lam in zip(solver.calls, (4, 8), ([0.2, 0.3, 0.5], [0.5, 0.2, 0.3]), strict=True):
        assert lam0.dtype == torch.float64
        assert lam0.tolist() == pytest.approx(lam, abs=1e-7)
        assert generator is module.attack_generator
        assert game.mixture is module.mixture
        assert game.loss is module.loss
        assert torch.equal(game.x, batches[t - 1][0])
        assert torch.equal(game.y, batches[t - 1][1])
        (attack,) = game.attacks
        assert (attack.attack.keep, attack.attack.start) == ("objective", "gaussian")
    assert module.mixture.weights.tolist() == pytest.approx([0.1, 0.65, 0.25])


@pytest.mark.parametrize("count", [1, 3])
def test_fixed_weights_need_no_phases(digits, count):
    """A mixture of one has nothing to weigh, whatever the solver."""
    solver = Uniform() if count == 3 else Scripted((), [])
    watch = Watch()
    module = training(Mixture(normalising_members(count, "linear")), solver=solver, T_theta=1)
    fit(module, digits, 9, callbacks=[watch])
    assert [outputs["phase"] for outputs, *_ in watch.steps] == 9 * ["members"]
    assert sum(module.member_updates) == 9
    assert module.mixture.weights.tolist() == pytest.approx(count * [1 / count])


# --- a loss that is not finite ------------------------------------------------------------------------------


class Poison(pl.Callback):
    """Puts NaN into one parameter of a member before (or after) batch t."""

    def __init__(self, t, after=False):
        self.t, self.after = t, after

    def _poison(self, module, t):
        if t == self.t:
            with torch.no_grad():
                next(module.mixture.members[1].parameters()).view(-1)[0] = math.nan

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.after:
            self._poison(pl_module, pl_module.t + 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.after:
            self._poison(pl_module, pl_module.t)


RECIPE = {
    "L": 3,
    "model": {"name": "linear", "num_classes": 10, "image_shape": [1, 8, 8], "mean": [0.3], "std": [0.4]},
}


class CheckEvery(pl.Callback):
    """Has the module ask the device as rarely as on a GPU."""

    def __init__(self, count):
        self.count = count

    def on_train_start(self, trainer, pl_module):
        pl_module.check_every = self.count


def poisoned(digits, tmp_path, poison, check_every=1, **settings):
    """Three epochs of four batches; what the training raised, and last.ckpt of the first epoch."""
    module = training(Mixture(normalising_members(3, "linear")), kind="shared", recipe=RECIPE, **settings)
    module.validation_attack = PGD(num_steps=2)
    callbacks = [CheckEvery(check_every), poison, Checkpoints(tmp_path)]
    with pytest.raises(UserError) as caught:
        fit(module, digits, 4, epochs=3, validate=True, callbacks=callbacks)
    # The state before a validation is kept beside the one after it.
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt"):
        checkpoint = read_checkpoint(tmp_path / name)
        assert checkpoint["mixadv"]["t"] == 4
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())
        assert load_mixture(tmp_path / name).num_members == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    return str(caught.value)


@pytest.mark.parametrize("check_every", [1, 4, 7])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(digits, tmp_path, check_every):
    """Asked every 4 or 7 batches (7 falls in epoch 2 as well), it still names the step where it happened."""
    message = poisoned(digits, tmp_path, Poison(6), check_every=check_every)
    assert "not finite at step 6" in message
    assert "optimizer.lr (now at 0.1)" in message


class Gap(nn.Module):
    """A linear classifier without a finite answer for some images; its cross-entropy does not see that."""

    def __init__(self, lost):
        super().__init__()
        self.net, self.lost = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), lost

    def forward(self, x):
        eleventh = torch.where(self.lost(x), -math.inf, 0.0)
        return torch.cat([self.net(x), eleventh[:, None]], dim=1)


@pytest.mark.parametrize(
    ("split", "message"),
    [("train", "a logit was not finite at step 1"), ("val", "member 1 has logits that are not finite on")],
)
def test_answers_that_are_not_there_stop_a_training(digits, split, message):
    digits.setup("fit")
    validated = (digits.val_images / 255).flatten(1)
    lost = {
        "train": lambda x: x.mean((1, 2, 3)) > 0.3,
        "val": lambda x: (torch.cdist(x.flatten(1), validated) == 0).any(1),
    }
    torch.manual_seed(0)
    members = [nn.Sequential(nn.Flatten(), nn.Linear(64, 11)), Gap(lost[split])]
    module = training(Mixture(members), kind="shared")
    module.validation_attack = PGD(num_steps=1)
    with pytest.raises(UserError, match=message) as caught:
        fit(module, digits, 2, validate=True)
    assert "logarithm, division or root" in str(caught.value)


def test_a_loss_that_is_not_finite_stops_before_the_validation(digits, tmp_path):
    assert "step 6" in poisoned(digits, tmp_path, Poison(6), check_every=50)


def test_a_loss_that_is_not_finite_stops_before_a_weights_phase(digits, tmp_path):
    """T_theta=6: the members' batches 1..6 come before the phase at t = 7."""
    solver = OracleSubgradient(num_steps=2)
    assert "step 6" in poisoned(digits, tmp_path, Poison(6), check_every=50, solver=solver, T_theta=6)


def test_members_that_the_last_update_broke_never_become_a_checkpoint(digits, tmp_path):
    """The loss of batch 8 is finite, its update is not: the epoch ends there."""
    assert "finite" in poisoned(digits, tmp_path, Poison(8, after=True))


def test_a_broken_update_before_a_weights_phase_is_the_users_to_mend(digits, tmp_path):
    solver = OracleSubgradient(num_steps=2)
    assert "finite" in poisoned(digits, tmp_path, Poison(6, after=True), solver=solver, T_theta=6)


def test_a_rate_far_too_large_is_the_users_to_mend_in_a_weights_phase_too(digits):
    """Parameters of 1e12 are finite, the logits of three layers of them are not: T_theta=1 looks right after."""
    mixture = Mixture(normalising_members(3, "small_cnn", width=2))
    module = training(mixture, solver=OracleSubgradient(num_steps=2), kind="shared", T_theta=1, lr=1e13)
    with pytest.raises(UserError, match="finite"):
        fit(module, digits, 4)


# --- validation, best epoch, history ------------------------------------------------------------------------


def validation_by_hand(module, data, attack_steps, seed):
    """Clean, robust and ensemble accuracy, example by example, in Python numbers."""
    nets = module.mixture.members
    weights = [float(w) / float(module.mixture.weights.double().sum()) for w in module.mixture.weights.double()]
    clean = robust = ensemble = 0.0
    for number, start in enumerate(range(0, 40, 16)):
        x = data.val_images[start : start + 16].float() / 255
        y = data.val_labels[start : start + 16]
        generator = generator_for(seed, "validation", number)
        if attack_steps:
            x_adv = pgd_by_hand(nets, weights, x, y, generator, trades=False)
        else:
            low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
            x_adv = low + (high - low) * torch.rand(x.shape, generator=generator)
        with torch.no_grad():
            before, after = ([net.eval()(images) for net in nets] for images in (x, x_adv))
        for i, label in enumerate(y.tolist()):
            clean += sum(w * (int(z[i].argmax()) == label) for w, z in zip(weights, before, strict=True))
            robust += sum(w * (int(z[i].argmax()) == label) for w, z in zip(weights, after, strict=True))
            average = sum(w * z[i].softmax(0) for w, z in zip(weights, before, strict=True))
            ensemble += int(average.argmax()) == label
    return {
        "val/clean_accuracy": clean / 40,
        "val/robust_accuracy": robust / 40,
        "val/ensemble_accuracy": ensemble / 40,
    }


def accuracies(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def test_validation_is_the_exact_expectation_under_attack(digits):
    module = training(Mixture([InFloat64(m) for m in normalising_members(3, width=3)], WEIGHTS), kind="shared", lr=0.05)
    fit(module, digits, 12, validate=True)
    by_hand = validation_by_hand(module, digits, NUM_STEPS, seed=7)
    assert accuracies(module.trainer) == pytest.approx(by_hand, abs=1e-12)
    assert 0.05 < by_hand["val/robust_accuracy"] < by_hand["val/clean_accuracy"]
    assert len({round(value, 6) for value in by_hand.values()}) == 3


class Validations(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append((pl_module.t, accuracies(trainer)))


def test_every_epoch_meets_the_same_random_starts_and_a_tie_keeps_the_first_epoch(digits, tmp_path):
    """Members that stand still score the same in every epoch, on random points of the ball too."""
    networks = normalising_members(3, "linear")
    fit(training(Mixture(networks, WEIGHTS), lr=0.1), digits, 20)
    # Float32 does not hold so small a rate.
    module = training(Mixture(networks, WEIGHTS), lr=1e-300)
    module.validation_attack = PGD(num_steps=0, keep="last")
    validations = Validations()
    fit(module, digits, 2, epochs=3, validate=True, callbacks=[validations, Checkpoints(tmp_path)])
    assert [t for t, _ in validations.seen] == [2, 4, 6]
    by_hand = validation_by_hand(module, digits, 0, seed=7)
    for _, seen in validations.seen:
        assert seen == pytest.approx(by_hand, abs=1e-12)
    other = [validation_by_hand(module, digits, 0, seed=seed) for seed in range(100, 110)]
    assert any(o["val/robust_accuracy"] != pytest.approx(by_hand["val/robust_accuracy"], abs=1e-9) for o in other)
    assert read_checkpoint(tmp_path / "best.ckpt")["mixadv"]["t"] == 2
    assert read_checkpoint(tmp_path / "last.ckpt")["mixadv"]["t"] == 6


class Collapse(pl.Callback):
    """From epoch 2 on (counted from 0) every parameter is zero: the best epoch lies before."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch >= 2:
            with torch.no_grad():
                for parameter in pl_module.mixture.parameters():
                    parameter.zero_()


HEADER = (
    "epoch,step,member_updates,seconds,train/loss,train/adversarial_accuracy,train/lr,val/clean_accuracy,"
    "val/robust_accuracy,val/ensemble_accuracy,weights/value,weights/lower_bound,lambda/0,lambda/1,lambda/2"
)


@pytest.fixture(scope="module")
def recorded(digits, tmp_path_factory):
    """Four epochs of 9 batches: shared, T_theta=2, so phases at t = 3, 6, ..., 36 and 24 updates per member."""
    path = tmp_path_factory.mktemp("recorded")
    watch, validations = Watch(), Validations()
    module = training(
        Mixture(normalising_members(3, "linear"), WEIGHTS),
        solver=OracleSubgradient(num_steps=3),
        kind="shared",
        rate=partial(piecewise, milestones=(0.5,), gamma=0.1),
        recipe=RECIPE,
    )
    callbacks = [Collapse(), watch, validations, Checkpoints(path)]
    history = CSVLogger(path, standard_columns(3))
    fit(module, digits, 9, epochs=4, validate=True, callbacks=callbacks, loggers=[history], every=4)
    with (path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return path, module, rows, module.trainer.loggers[0].rows, watch.steps, validations.seen


def test_best_checkpoint_is_the_epoch_with_the_highest_robust_accuracy(recorded):
    path, _, rows, *_ = recorded
    scores = {int(r["step"]): float(r["val/robust_accuracy"]) for r in rows if r["val/robust_accuracy"]}
    assert list(scores) == [9, 18, 27, 36]
    best = max(scores, key=scores.get)
    assert best == 18, "the fixture should peak in the second epoch"
    checkpoint = read_checkpoint(path / "best.ckpt")
    assert checkpoint["mixadv"]["t"] == best
    assert checkpoint["mixture_config"] == RECIPE
    assert float(checkpoint["callbacks"]["mixadv.Checkpoints"]["best_model_score"]) == pytest.approx(scores[best])
    assert checkpoint["mixadv"]["epochs_done"] == pytest.approx(2)
    last = read_checkpoint(path / "last.ckpt")
    assert last["mixadv"]["t"] == 36
    assert last["mixadv"]["member_updates"] == [24, 24, 24]


def test_the_best_checkpoint_holds_the_members_and_weights_of_its_epoch(recorded):
    path, _, _, _, steps, _ = recorded
    after = steps[17][2]
    restored = load_mixture(path / "best.ckpt")
    assert torch.equal(restored.weights, after.weights)
    for member, state in zip(restored.members, after.members, strict=True):
        assert same_tensors(state_of(member), state)


def test_history_rows(recorded):
    """A row at the start, at every fourth batch that updates members, at every weights phase and validation."""
    path, _, rows, _, steps, validations = recorded
    assert (path / "metrics.csv").read_text().splitlines()[0] == HEADER
    expected = [("start", 0)]
    for t in range(1, 37):
        if t % 3 == 0:
            expected.append(("weights", t))
        elif t % 4 == 0:
            expected.append(("train", t))
        if t % 9 == 0:
            expected.append(("val", t))
    groups = ("train", "val", "weights")
    kinds = []
    for row in rows:
        filled = {name.split("/")[0] for name, cell in row.items() if cell} & set(groups)
        kinds.append((filled.pop() if filled else "start", int(row["step"])))
        assert not filled
        assert all(row[name] for name in ("epoch", "member_updates", "seconds", "lambda/0", "lambda/1", "lambda/2"))
    assert kinds == expected
    scores = dict(validations)
    for (kind, t), row in zip(kinds, rows, strict=True):
        updates = t - t // 3
        assert int(row["member_updates"]) == 3 * updates
        # Epochs are equally long: the share that is done goes by batches.
        assert float(row["epoch"]) == pytest.approx(t / 9, rel=1e-7)
        weights = WEIGHTS if t == 0 else steps[t - 1][2].weights.tolist()
        assert [float(row[f"lambda/{k}"]) for k in range(3)] == pytest.approx(weights, abs=1e-7)
        if kind == "train":
            assert float(row["train/loss"]) == pytest.approx(float(steps[t - 1][0]["loss"]), rel=1e-6)
            hits = float(steps[t - 1][0]["adversarial_accuracy"])
            assert float(row["train/adversarial_accuracy"]) == pytest.approx(hits, rel=1e-6)
            assert float(row["train/lr"]) == pytest.approx(0.1 if updates < 12 else 0.01, rel=1e-6)
        elif kind == "weights":
            assert float(row["weights/value"]) == pytest.approx(steps[t - 1][0]["value"], rel=1e-6)
            assert float(row["weights/lower_bound"]) == pytest.approx(steps[t - 1][0]["lower_bound"], rel=1e-6)
        elif kind == "val":
            assert {name: float(row[name]) for name in scores[t]} == pytest.approx(scores[t], rel=1e-6)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_every_logger_receives_the_same_rows(recorded):
    """The wall time, which the file adds, aside."""
    _, _, rows, mirrored, *_ = recorded
    assert len(mirrored) == len(rows)
    for row, (step, numbers) in zip(rows, mirrored, strict=True):
        assert step == int(row["step"])
        assert {"step", "seconds", *numbers} == {name for name, cell in row.items() if cell}
        assert all(isinstance(number, (int, float)) for number in numbers.values())
        assert {name: float(row[name]) for name in numbers} == pytest.approx(numbers, rel=1e-6, abs=1e-9)


def test_metrics_file_keeps_whole_lines_and_forgets_later_steps(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, ["epoch", "step", "loss"])
    for step in (0, 3, 6):
        file.append({"step": step, "epoch": step / 6})
    with path.open("a") as raw:
        raw.write("1.5,9")
    again = MetricsFile(path, ["epoch", "step", "loss"])
    assert [row["step"] for row in again.rows()] == ["0", "3", "6"]
    assert [row["step"] for row in again.truncate(3)] == ["0", "3"]
    again.append({"step": 4, "epoch": 0.75, "loss": 2.5})
    assert path.read_text().splitlines() == ["epoch,step,loss", "0.0,0,", "0.5,3,", "0.75,4,2.5"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
