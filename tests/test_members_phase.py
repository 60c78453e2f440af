"""Attacks of the members' phases: against a loop written out here, in parts, and after an interruption."""

import copy
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.optim import SGD

from builders.data import digits_module, set_up
from builders.networks import InFloat64, same_tensors, untrained_members
from builders.stops import Interrupted, SaveAndStop
from conftest import QUIET, TINY
from mixadv.attacks import PGD
from mixadv.attacks.objectives import InnerLoss
from mixadv.data.stream import BatchStream
from mixadv.lambda_solvers import OracleSubgradient, Uniform
from mixadv.losses import AT, TRADES, SmoothedZeroOne
from mixadv.mixture import Mixture
from mixadv.ranks import Ranks
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel
from mixadv.training import ClassWeights, MembersPhase, MixtureTraining
from mixadv.training.learning_rate import constant
from mixadv.training.members_phase import MembersAttack, random_wrong_classes

EPS, STEP, NUM_STEPS, CLASSES = 0.1, 0.3, 3, [1, 5, 7]
LAM = [0.25, 0.75]


def members(count=2, name="linear"):
    return untrained_members(count, name, num_classes=3, mean=(0.3,), std=(0.4,))


def training(nets, lam=None, **settings):
    return MixtureTraining(
        Mixture(nets, lam),
        ThreatModel("linf", EPS),
        validation_attack=PGD(num_steps=1),
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        scheduler=constant,
        **{"attack": PGD(NUM_STEPS, STEP), "kind": "shared", "T_theta": 2, "seed": 7, "solver": Uniform(), **settings},
    )


def data():
    return digits_module(classes=CLASSES, seed=3)


def fit(module, batches=5, epochs=1, callbacks=(), **more):
    trainer = pl.Trainer(
        max_epochs=epochs, **QUIET, limit_train_batches=batches, limit_val_batches=0, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=data(), **more)
    return module


# --- a loop of our own ----------------------------------------------------------------------------------------------


def attacked_by_hand(nets, lam, x, y, generator, targets, eps):
    """Signed steps on sum_k lam_k l_k, with l_k = z_t - z_y where there are targets, else the cross-entropy."""
    for net in nets:
        net.eval()
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    point = low + (high - low) * torch.rand(x.shape, generator=generator)
    for _ in range(NUM_STEPS):
        point = point.detach().requires_grad_()
        total = torch.zeros(())
        for weight, net in zip(lam, nets, strict=True):
            z = net(point)
            rows = range(len(y))
            loss = F.cross_entropy(z, y, reduction="none") if targets is None else z[rows, targets] - z[rows, y]
            total = total + (weight * loss).sum()
        (gradient,) = torch.autograd.grad(total, point)
        point = torch.min(torch.max(point + STEP * eps * gradient.sign(), low), high)
    return point.detach()


def cross_entropy(z, y, share_done):
    return F.cross_entropy(z, y, reduction="none")


def smoothed(z, y, share_done):
    """4 times the probability that logistic noise of scale T makes the right class lose; T from 3 to 1/3 by thirds."""
    T = 3 * (1 / 9) ** share_done
    others = torch.stack([z[:, [c for c in range(3) if c != label]].amax(1) for label in range(3)], dim=1)
    rows = range(len(y))
    return 4 * (1 - 1 / (1 + torch.exp(-(z[rows, y] - others[rows, y]) / T)))


def trained_by_hand(nets, lam, table, batches, radii=None, loss=cross_entropy):
    generator = generator_for(7, "attacks")
    optimizers = [SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    for t, ((x, y), eps) in enumerate(zip(batches, radii or [EPS] * len(batches), strict=True), start=1):
        targets = (y + torch.randint(1, len(CLASSES), y.shape, generator=generator)) % len(CLASSES)
        x_adv = attacked_by_hand(nets, lam, x, y, generator, targets, eps)
        for net, weights, optimizer in zip(nets, table, optimizers, strict=True):
            net.train()
            optimizer.zero_grad()
            (torch.tensor(weights)[y] * loss(net(x_adv), y, t / len(batches))).mean().backward()
            optimizer.step()


def batches_of(count):
    prepared = set_up(data())
    return list(BatchStream(prepared.train_images, prepared.train_labels, 16, seed=3, batches_per_epoch=count))


@pytest.mark.parametrize(("count", "name"), [(1, "small_cnn"), (2, "small_cnn"), (2, "linear")])
def test_antithetic_members_on_random_targets_are_the_loop_bit_for_bit(count, name):
    nets = members(count, name)
    plain = copy.deepcopy(nets)
    weights = ClassWeights("antithetic", ratio=2.0, orders=[[1, 0, 2]])
    lam = LAM if count == 2 else [1.0]
    fit(training(nets, lam, class_weights=weights, members_phase=MembersPhase(targets="random")))
    # Of the classes 1, 0, 2 in this order: 1, 2, 4 over 7/3, and the reverse.
    rows = [[2 / (7 / 3), 1 / (7 / 3), 4 / (7 / 3)], [2 / (7 / 3), 4 / (7 / 3), 1 / (7 / 3)]]
    trained_by_hand(plain, lam, rows[:count], batches_of(5))
    for ours, theirs in zip(nets, plain, strict=True):
        assert same_tensors(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(("ramp", "shares"), [(0.0, [1, 1, 1, 1]), (0.5, [0.5, 1, 1, 1]), (1.0, [0.25, 0.5, 0.75, 1])])
def test_the_radius_grows_in_the_loop_bit_for_bit(ramp, shares):
    nets = members(2, "small_cnn")
    plain = copy.deepcopy(nets)
    fit(training(nets, LAM, members_phase=MembersPhase(targets="random", eps_ramp=ramp)), batches=4)
    trained_by_hand(plain, LAM, [[1.0] * 3] * 2, batches_of(4), [EPS * share for share in shares])
    for ours, theirs in zip(nets, plain, strict=True):
        assert same_tensors(ours.state_dict(), theirs.state_dict())


def test_the_temperature_falls_in_the_loop():
    nets = [InFloat64(net) for net in members(2, "small_cnn")]
    plain = copy.deepcopy(nets)
    loss = SmoothedZeroOne(temperature=3.0, final_temperature=1 / 3)
    fit(training(nets, LAM, loss=loss, members_phase=MembersPhase(targets="random")))
    trained_by_hand(plain, LAM, [[1.0] * 3] * 2, batches_of(5), loss=smoothed)
    for ours, theirs in zip(nets, plain, strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-11)


# --- the worst of several attacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("lam", [[0.5, 0.2, 0.3], [0.6, 0.0, 0.4]], ids=["all", "two"])
def test_each_example_keeps_the_point_of_least_accuracy(lam, most):
    """By brute force over the points of the parts; without random starts the parts are the same alone."""
    prepared = set_up(data())
    nets = members(3, "small_cnn")
    with torch.random.fork_rng([]):
        fit(training(nets, [0.5, 0.2, 0.3]), 18, epochs=3)
    mixture, ball = Mixture(nets, lam).eval(), ThreatModel("linf", 0.25)
    x, y = prepared.train_images.float() / 255, prepared.train_labels
    steps = PGD(3, 0.4, objective=InnerLoss(AT()), start="none", keep="last")

    def found(target, *names):
        attack = MembersAttack(MembersPhase(worst_of=names), steps, SmoothedZeroOne(0.7), 3, Ranks(), most)
        return attack(target, x, y, ball, None)

    def judged(points):
        with torch.no_grad():
            z = torch.stack([net(points) for net in nets])
        wrong = z.scatter(-1, y.expand(3, -1).unsqueeze(-1), float("-inf")).amax(-1)
        right = z.gather(-1, y.expand(3, -1).unsqueeze(-1)).squeeze(-1)
        weights = torch.tensor(lam)[:, None]
        return (weights * (right > wrong)).sum(0), (weights * torch.sigmoid((wrong - right) / 0.7)).sum(0)

    alone = [found(Mixture([nets[k]]).eval(), "expected") for k in range(3) if lam[k]]
    parts = [found(mixture, "expected"), found(mixture, "smoothed"), *alone]
    accuracy, loss = (torch.stack(values) for values in zip(*map(judged, parts), strict=True))
    kept, its_loss = judged(found(mixture, "members", "smoothed", "expected"))
    least = accuracy.amin(0)
    torch.testing.assert_close(kept, least)
    largest = torch.where((accuracy - least).abs() < 1e-6, loss, torch.tensor(-1.0)).amax(0)
    torch.testing.assert_close(its_loss, largest)
    # The choice matters: no part is the worst everywhere.
    assert (accuracy.mean(1) > least.mean()).all()
    # The order of the names does not.
    assert torch.equal(
        found(mixture, "members", "smoothed", "expected"), found(mixture, "expected", "smoothed", "members")
    )


def test_on_a_single_model_the_members_are_the_expected():
    x, y = batches_of(1)[0]
    one = Mixture(members(1, "small_cnn")).eval()
    steps = PGD(3, 0.4, objective=InnerLoss(AT()), keep="last")

    def found(*names):
        attack = MembersAttack(MembersPhase(worst_of=names), steps, SmoothedZeroOne(), 3, Ranks())
        return attack(one, x, y, ThreatModel("linf", 0.2), torch.Generator().manual_seed(1))

    assert torch.equal(found("members"), found())
    assert torch.equal(found("members", "expected"), found("expected"))


# --- targets --------------------------------------------------------------------------------------------------------


def test_every_wrong_class_is_as_likely_and_the_right_one_never_comes():
    y = torch.arange(5).repeat_interleave(4000)
    drawn = random_wrong_classes(y, 5, torch.Generator().manual_seed(0))
    counts = torch.zeros(5, 5).index_put((y, drawn), torch.ones(len(y)), accumulate=True)
    assert counts.diag().sum() == 0
    # 1,000 expected, standard deviation 27.
    assert (counts[~torch.eye(5, dtype=torch.bool)] - 1000).abs().max() < 150
    assert random_wrong_classes(torch.tensor([0, 1]), 2, None).tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["sampled", "shared"])
@pytest.mark.parametrize("loss", [None, TRADES(2.0), SmoothedZeroOne()], ids=["at", "trades", "smoothed"])
def test_parts_give_what_the_whole_batch_gives(kind, loss):
    """With a weights phase at t = 3 (sampled: t = 5), whose attack has neither targets nor ramp."""
    nets = [InFloat64(net) for net in members(2, "small_cnn")]
    runs = {}
    for most in (None, 7, 100):
        worst_of = ("expected", "smoothed", "members") if isinstance(loss, SmoothedZeroOne) else ()
        phase = MembersPhase(targets="random", eps_ramp=0.7, worst_of=worst_of)
        settings = {"kind": kind, "loss": loss, "solver": OracleSubgradient(2), "members_phase": phase}
        runs[most] = fit(training(copy.deepcopy(nets), LAM, micro_batch_size=most, **settings), 6)
    assert [max(net.most for net in run.mixture.members) for run in runs.values()] == [16, 6, 16]
    for key, value in runs[None].state_dict().items():
        difference = (runs[7].state_dict()[key].double() - value.double()).abs().max()
        assert difference <= (1e-6 if key.endswith("weights") else 1e-11), key
    assert same_tensors(runs[None].state_dict(), runs[100].state_dict())
    assert torch.equal(runs[None].attack_generator.get_state(), runs[7].attack_generator.get_state())


SETTINGS = {
    "targets": {"members_phase": MembersPhase(targets="random"), "class_weights": ClassWeights("antithetic")},
    "ramp": {"members_phase": MembersPhase(eps_ramp=0.9)},
    "worst": {"members_phase": MembersPhase("random", worst_of=("expected", "smoothed", "members"))},
    "smoothed": {"loss": SmoothedZeroOne()},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_that_was_stopped_goes_on_bit_for_bit(tmp_path, name):
    """Two epochs of 5 batches, stopped inside the first; weights phases at t = 3, 6, 9."""
    settings = SETTINGS[name] | {"solver": OracleSubgradient(2)}
    whole = fit(training(members(), LAM, **settings), epochs=2)
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Interrupted):
        fit(training(members(), LAM, **settings), epochs=2, callbacks=[SaveAndStop(path, 4)])
    torch.manual_seed(99)
    again = fit(training(members(), LAM, **settings), epochs=2, ckpt_path=path)
    assert same_tensors(again.state_dict(), whole.state_dict())
    loaded = MixtureTraining.load_from_checkpoint(path, mixture=Mixture(members(), LAM))
    for key, value in settings.items():
        assert getattr(loaded, key) == value


@dataclass(frozen=True)
class NotingRadii(PGD):
    """PGD that notes how it keeps points, and the radius, of every call of it and of its copies."""

    seen: list = field(default_factory=list)

    def __call__(self, mixture, x, y, threat_model, generator=None, **more):
        self.seen.append((self.keep, threat_model.eps))
        return super().__call__(mixture, x, y, threat_model, generator, **more)


def test_the_ramp_is_of_the_members_phases_and_follows_the_whole_training():
    """Two epochs of 4 batches; every third batch is a weights phase, whose radius is eps always."""
    attack = NotingRadii(1)
    settings = {"solver": OracleSubgradient(1), "members_phase": MembersPhase(eps_ramp=0.5)}
    module = training(members(), LAM, attack=attack, **settings)
    fit(module, batches=4, epochs=2)
    assert [eps for keep, eps in attack.seen if keep == "last"] == [EPS * s for s in (0.25, 0.5, 1, 1, 1, 1)]
    assert {eps for keep, eps in attack.seen if keep == "objective"} == {EPS}


@pytest.mark.parametrize(("ramp", "shares"), [(0.0, [1.25] * 4), (0.5, [0.625, 1.25, 1.25, 1.25])])
def test_the_radius_may_be_larger_than_eps_in_members_phases_alone(ramp, shares):
    nets = members(2, "small_cnn")
    plain = copy.deepcopy(nets)
    fit(training(nets, LAM, members_phase=MembersPhase(targets="random", eps_scale=1.25, eps_ramp=ramp)), batches=4)
    trained_by_hand(plain, LAM, [[1.0] * 3] * 2, batches_of(4), [EPS * share for share in shares])
    for ours, theirs in zip(nets, plain, strict=True):
        assert same_tensors(ours.state_dict(), theirs.state_dict())
    attack = NotingRadii(1)
    settings = {"solver": OracleSubgradient(1), "members_phase": MembersPhase(eps_scale=1.25)}
    fit(training(members(), LAM, attack=attack, **settings), batches=4)
    assert {(keep, eps) for keep, eps in attack.seen} == {("last", EPS * 1.25), ("objective", EPS)}


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_the_scale_of_the_radius_is_positive(scale):
    with pytest.raises(ValueError, match="must be positive and finite"):
        MembersPhase(eps_scale=scale)


@pytest.mark.parametrize("ramp", [-0.1, 1.5, float("nan")])
def test_a_ramp_is_a_share_of_the_training(ramp):
    with pytest.raises(ValueError, match="must be a share of the training, from 0 to 1"):
        MembersPhase(eps_ramp=ramp)


def test_a_phase_that_does_not_exist_is_refused(command):
    with pytest.raises(ValueError, match="targets=all is unknown: choose one of none, random"):
        MembersPhase(targets="all")
    assert command(*TINY, "attack.targets=all").refusal().startswith("attack.targets=all is unknown: choose one of")
    assert command(*TINY, "attack.eps_ramp=2").refusal().startswith("attack.eps_ramp=2 must be a share of the training")
    for names in ('["expected","own"]', '["smoothed","smoothed"]'):
        assert (
            "give some of expected, smoothed, members, each once"
            in command(*TINY, f"attack.worst_of={names}").refusal()
        )
    assert command(*TINY, "attack.worst_of=expected").refusal().startswith("attack.worst_of=expected must be a list")


def test_targets_that_no_attack_would_use_are_refused(command):
    with pytest.raises(ValueError, match=r"worst_of=\[smoothed\] has no attack on targets"):
        MembersPhase(targets="random", worst_of=["smoothed"])
    refused = command(*TINY, "attack.targets=random", "attack.worst_of=[smoothed]").refusal()
    assert refused.startswith("attack.worst_of=[smoothed] has no attack on targets, so targets=random would be ignored")
    MembersPhase(worst_of=["smoothed"])
    MembersPhase(targets="random", worst_of=["smoothed", "members"])


# --- a loss that follows the training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Following(AT):
    """Notes the share of the training at which each of its losses is used; shared by what `at` returns."""

    share: float = -1.0
    used: list = field(default_factory=list)

    def at(self, share_done):
        return replace(self, share=share_done)

    def inner(self, adv_logits, clean_logits, y):
        self.used.append(("inner", self.share))
        return super().inner(adv_logits, clean_logits, y)

    def outer(self, adv_logits, clean_logits, y):
        self.used.append(("outer", self.share))
        return super().outer(adv_logits, clean_logits, y)


def test_attacks_updates_and_weights_phases_use_the_loss_of_their_batch():
    """Six batches; the third and the sixth are weights phases."""
    loss = Following()
    fit(training(members(), LAM, loss=loss, solver=OracleSubgradient(1)), batches=6)
    shares = [t / 6 for t in range(1, 7)]
    assert sorted({share for what, share in loss.used if what == "outer"}) == shares
    assert sorted({share for what, share in loss.used if what == "inner"}) == shares
