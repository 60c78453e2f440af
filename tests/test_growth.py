"""Mixtures that grow: stages counted by hand, loops written out, games of known value, linear programs of scipy."""

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging
from scipy.optimize import linprog
from torch import nn
from torch.optim import SGD

from builders.data import digits_module
from builders.networks import same_tensors, untrained_members
from builders.runs import read_metrics, read_results
from builders.stops import Interrupted, SaveAndStop
from conftest import QUIET, run_command
from mixadv.attacks import ARC, PGD, SubsetAttack
from mixadv.callbacks import Checkpoints, ProgressBar
from mixadv.data.stream import BatchStream
from mixadv.data.triangle import CORNERS, Triangle
from mixadv.errors import UserError
from mixadv.game import FiniteGame
from mixadv.lambda_solvers import LinearProgram, OracleSubgradient
from mixadv.losses import SmoothedZeroOne, ZeroOne
from mixadv.members.store import load_mixture, read_config
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.report import write_report
from mixadv.seeding import generator_for
from mixadv.threat_model import ThreatModel
from mixadv.training import Growth, MembersPhase, MixtureTraining, Replicas, Schedule, WeightsPhase
from mixadv.training.checks import check_trainer
from mixadv.training.growth import RecordedGame, Strategy, weigh
from mixadv.training.learning_rate import constant, one_cycle

HELD_OUT = WeightsPhase("zero_one", {"arc": ARC(3), "subsets": SubsetAttack(5)}, num_images="all")
EPS, STEP, NUM_STEPS = 0.1, 0.3, 3


def training(members, *, growth=None, ball=None, lr=0.1, rate=constant, solver=None, phase=HELD_OUT, **settings):
    return MixtureTraining(
        Mixture(members),
        ball or ThreatModel("linf", EPS),
        attack=PGD(NUM_STEPS, STEP),
        validation_attack=PGD(NUM_STEPS, STEP),
        solver=solver or LinearProgram(num_rounds=20, attack_tolerance=0.0),
        phase=phase,
        kind="grow",
        growth=growth or Growth(),
        optimizer=partial(SGD, lr=lr, momentum=0.9),
        scheduler=rate,
        seed=7,
        **settings,
    )


def fit(module, batches, epochs=1, data=None, callbacks=(), validate=0, trainer=None, **more):
    given = {"max_epochs": epochs, "limit_train_batches": batches, "limit_val_batches": validate}
    trainer = pl.Trainer(**QUIET | given | (trainer or {}), callbacks=list(callbacks))
    trainer.fit(module, datamodule=data or digits_module(seed=3), **more)
    return module


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# --- the stages ---------------------------------------------------------------------------------------------------


def test_stages_end_where_a_hand_put_them():
    """11 batches, L=3: 11/3, 22/3, 33/3 rounded down are 3, 7, 11."""
    schedule = Schedule("grow", 3, 50, total_batches=11)
    shown = ["W" if schedule.is_weights_phase(t) else str(schedule.members_at(t, None)[0]) for t in range(1, 12)]
    assert "".join(shown) == "00W111W222W"
    assert [schedule.stage_at(t) for t in range(12)] == [-1, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert schedule.member_batches_in(11) == 8
    fixed = replace(schedule, weights_phases=False)
    assert not any(fixed.is_weights_phase(t) for t in range(1, 12))


def test_an_epoch_is_a_pass_for_every_member():
    assert Schedule("grow", 3, 50).batches_in_epoch(5) == 15
    assert Schedule("grow", 3, 50).batches_in_epoch(5, 7) == 7
    assert Schedule("grow", 1, 50).batches_in_epoch(5) == 5


class Watch(pl.Callback):
    """The members and the weights after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        members = [copy.deepcopy(member.state_dict()) for member in pl_module.mixture.members]
        self.seen.append((members, pl_module.mixture.weights.tolist()))


class Shares(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.share_done)


def test_what_follows_the_share_of_the_training_follows_that_of_the_stage():
    shares = Shares()
    fit(training(untrained_members(2, mean=(0.3,), std=(0.4,))), 8, callbacks=[shares])
    assert shares.seen == pytest.approx(2 * [0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("response", ["adaptive", "fixed", "equilibrium"])
def test_each_stage_trains_its_own_member(response):
    """L=3 on batch norm and 11 batches: who moves, from which parameters, and which weights the attacks meet."""
    members, watch = untrained_members(3, "small_resnet", width=2, mean=(0.3,), std=(0.4,)), Watch()
    growth = Growth(response=response, start="fresh" if response == "fixed" else "last", num_images=30, min_gain=None)
    module = training(members, growth=growth, rate=partial(one_cycle, warmup=0.5))
    before = [copy.deepcopy(member.state_dict()) for member in members]
    fit(module, 11, callbacks=[watch])
    assert len(watch.seen) == 11
    previous = before
    for t, (now, lam) in enumerate(watch.seen, 1):
        s, is_phase = module.schedule.stage_at(t), t in (3, 7, 11)
        moved = [k for k in range(3) if not same_tensors(now[k], previous[k])]
        assert moved == ([] if is_phase else [s])
        inside = [1 / (s + 1)] * (s + 1) if response == "adaptive" else [1.0, *[0.0] * (s - 1)][:s] or [1.0]
        if response != "adaptive" and s == 2:
            inside = module.stages[1].weights[:2]
        if is_phase:
            inside = module.stages[s].weights[: s + 1]
        assert lam == pytest.approx([*inside, *[0.0] * (3 - len(inside))], abs=1e-12)
        previous = now
    assert module.member_updates == [2, 3, 3]
    assert [stage.member for stage in module.stages] == [0, 1, 2]


def test_a_member_starts_as_a_copy_or_as_it_is():
    for start in ("last", "fresh"):
        members, watch = untrained_members(2, "small_resnet", width=2, mean=(0.3,), std=(0.4,)), Watch()
        given = copy.deepcopy(members[1].state_dict())
        fit(training(members, growth=Growth(start=start), lr=1e-12), 8, callbacks=[watch])
        (first, second), _ = watch.seen[4]
        source = first if start == "last" else given
        # A step of 1e-13 and batch norm's own statistics are all that has changed.
        for name, tensor in second.items():
            if "running" not in name and "tracked" not in name:
                assert torch.allclose(tensor.float(), source[name].float(), atol=1e-9), (start, name)


# --- one member, and two, written out -------------------------------------------------------------------------------


def test_one_member_is_that_of_the_other_schedules_bit_for_bit():
    """tests/test_training.py compares those with plain adversarial training."""
    found = {}
    for kind in ("grow", "shared"):
        module = training(untrained_members(1, "small_resnet", width=2, mean=(0.3,), std=(0.4,)))
        module.schedule = Schedule(kind, 1, 50, weights_phases=False)
        found[kind] = state(fit(module, 5, epochs=2))
        assert module.stages == []
    assert same_tensors(found["grow"], found["shared"])


@dataclass(frozen=True)
class Nowhere:
    """An attack that stays at x and draws nothing."""

    def __call__(self, mixture, x, y, threat_model, generator=None):
        return x


def pgd(model, x, y, generator):
    low, high = (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)
    x_adv = low + (high - low) * torch.rand(x.shape, generator=generator)
    for _ in range(NUM_STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = (x_adv.detach() + STEP * EPS * slope.sign()).maximum(low).minimum(high)
    return x_adv.detach()


def test_two_members_with_the_fixed_response_are_a_loop_written_out():
    """BAT: the second member, fresh, trains on attacks of the first; batches 5 and 10 go to the weights."""
    members = untrained_members(2, mean=(0.3,), std=(0.4,))
    by_hand = copy.deepcopy(members)
    phase = WeightsPhase("zero_one", {"none": Nowhere()}, num_images="all")
    module = training(members, growth=Growth("fresh", "fixed"), phase=phase)
    data = digits_module(seed=3)
    fit(module, 10, data=data)
    stream = BatchStream(data.train_images, data.train_labels, 16, seed=3, batches_per_epoch=10)
    generator = generator_for(7, "attacks")
    for t, (x, y) in enumerate(stream, 1):
        s = (t - 1) // 5
        if t == 1 + 5 * s:
            optimizer = SGD(by_hand[s].parameters(), lr=0.1, momentum=0.9)
        if t in (5, 10):
            continue
        x_adv = pgd(by_hand[0], x, y, generator)
        optimizer.zero_grad()
        F.cross_entropy(by_hand[s](x_adv), y).backward()
        optimizer.step()
    for ours, theirs in zip(members, by_hand, strict=True):
        assert same_tensors(ours.state_dict(), theirs.state_dict())


# --- the game after a stage -----------------------------------------------------------------------------------------


def class_order(order):
    """A linear member of the triangle whose boundaries give each lens to the class that comes first in `order`."""
    layer = nn.Linear(2, 3)
    corners = torch.tensor(CORNERS)
    rank = torch.tensor([float(order.index(k)) for k in range(3)])
    with torch.no_grad():
        layer.weight.copy_(2 * corners)
        # The lens of two discs of radius 0.26, 0.5 apart, is 0.01 thick to each side; this moves boundaries by 0.015.
        layer.bias.copy_(-corners.square().sum(1) - 0.015 * rank)
    return nn.Sequential(nn.Flatten(), layer)


class Corners(Triangle):
    """All points of a class are its corner."""

    def _point(self, corner, split, i):
        return tuple(round(255 * coordinate) for coordinate in corner)


DISCS = ThreatModel("l2", 0.26)
FOR_DISCS = WeightsPhase("zero_one", {"arc": ARC(10), "subsets": SubsetAttack(20)}, num_images="all")


def triangle():
    return Corners(num_train=120, num_val=30, num_test=30, batch_size=12)


def test_a_second_member_that_must_help_and_a_third_that_cannot():
    """One member is right on one class of three: value 2/3. With the reverse order exactly one of the two is right at
    every point: 1/2. A third one that is like the first adds nothing, so that the fourth is never trained."""
    members = [class_order(order) for order in ([0, 1, 2], [2, 1, 0], [0, 1, 2], [1, 2, 0])]
    module = training(members, growth=Growth("fresh", min_gain=0.01), ball=DISCS, lr=1e-12, phase=FOR_DISCS)
    fit(module, 40, data=triangle())
    first, second, third = module.stages
    assert (first.value, first.lower_bound, first.value_without) == (pytest.approx(2 / 3), pytest.approx(2 / 3), None)
    assert second.value_without == pytest.approx(2 / 3)
    assert (second.value, second.lower_bound) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    assert second.weights == pytest.approx([0.5, 0.5, 0, 0])
    assert (third.value, third.value_without) == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    assert [stage.kept for stage in module.stages] == [True, True, False]
    assert module.mixture.weights.tolist() == second.weights
    assert module.t == 30
    assert module.member_updates == [9, 9, 9, 0]
    assert module.grown.num_members == 2
    assert module.grown.weights.tolist() == second.weights[:2]
    assert [id(one) for one in module.grown.members] == [id(one) for one in members[:2]]


def test_where_the_balls_do_not_meet_the_second_member_ends_the_training():
    """The first member is right on every ball: nothing is left to gain."""
    data = triangle()
    module = training(
        [nn.Sequential(nn.Flatten(), nn.Linear(2, 3)) for _ in range(3)],
        ball=ThreatModel("l2", 0.02),
        lr=5.0,
        phase=FOR_DISCS,
    )
    fit(module, 120, data=data)
    assert [stage.kept for stage in module.stages] == [True, False]
    assert module.stages[0].value == module.stages[1].value == module.stages[1].value_without == 0
    assert module.grown.num_members == 1
    assert module.t == 20


@dataclass(frozen=True)
class Recording(LinearProgram):
    games: list = field(default_factory=list)

    def solve(self, game, lam0=None, generator=None):
        found = super().solve(game, lam0, generator)
        if not isinstance(game, FiniteGame):
            self.games.append(game)
        return found


def lp_value(losses):
    """min over the simplex of the mean over i of max_j sum_k lam_k losses[i, j, k], by scipy."""
    n, m, size = losses.shape
    rows = np.concatenate([losses.reshape(n * m, size), -np.kron(np.eye(n), np.ones((m, 1)))], axis=1)
    cost = np.concatenate([np.zeros(size), np.full(n, 1 / n)])
    simplex = np.concatenate([np.ones(size), np.zeros(n)])[None]
    return linprog(cost, rows, np.zeros(n * m), simplex, [1.0], bounds=[(0, None)] * (size + n)).fun


def test_the_certificate_is_that_of_scipy_on_the_points_found():
    solver = Recording(num_rounds=20, attack_tolerance=0.0)
    members = [class_order(order) for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0])]
    # 11, 10 and 10 points of the classes: the classes do not weigh the same.
    data = Triangle(num_train=60, num_val=31, num_test=30, batch_size=12)
    growth = Growth("fresh", min_gain=None)
    module = training(members, growth=growth, ball=DISCS, lr=1e-12, phase=FOR_DISCS, solver=solver)
    fit(module, 15, data=data)
    assert len(module.stages) == 3
    for s, (stage, game) in enumerate(zip(module.stages, solver.games, strict=True)):
        losses = game.known().losses.double().numpy()
        assert losses.shape == (31, stage.num_points, s + 1)
        assert set(np.unique(losses)) == {0.0, 1.0}
        best = lp_value(losses)
        assert stage.lower_bound == pytest.approx(best, abs=1e-9)
        worst = (losses @ np.array(stage.weights[: s + 1])).max(1).mean()
        assert stage.value == pytest.approx(worst, abs=1e-9)
        assert stage.value >= best - 1e-9
        if s:
            assert stage.value_without == pytest.approx(lp_value(losses[..., :s]), abs=1e-9)
    # Mixing matters: no member has all the weight.
    assert module.stages[1].value < module.stages[1].value_without - 0.1
    assert max(module.stages[1].weights) < 0.9


def test_without_the_new_member_the_weights_are_those_of_the_value_without_it():
    """The weights of before, 0.9 and 0.1, are not the best at the points of the new game: 1/2 and 1/2 are."""
    members = [class_order(order) for order in ([0, 1, 2], [2, 1, 0], [0, 1, 2])]
    y = torch.arange(15) % 3
    x = torch.tensor(CORNERS)[y].view(15, 1, 1, 2)
    attacks = [ARC(10), SubsetAttack(20)]
    game = MixtureGame(Mixture(members), x, y, DISCS, attacks, ZeroOne(), torch.Generator().manual_seed(1))
    stage = weigh(game, LinearProgram(num_rounds=20, attack_tolerance=0.0), [0.9, 0.1], 0.01, num_members=4)
    assert not stage.kept
    losses = game.known().losses.double().numpy()
    assert stage.value_without == pytest.approx(lp_value(losses[..., :2]), abs=1e-9)
    assert (losses @ np.array(stage.weights[:3])).max(1).mean() == pytest.approx(stage.value_without, abs=1e-9)
    assert stage.weights == pytest.approx([0.5, 0.5, 0, 0])


# --- the attacker's mixed strategy --------------------------------------------------------------------------------


def test_batches_of_the_equilibrium_are_drawn_from_its_strategy():
    """The least risk against Q is the value of the game, by scipy; draws follow Q, points belong to their image."""
    members = [class_order(order) for order in ([0, 1, 2], [2, 1, 0])]
    y = torch.arange(15) % 3
    x = (torch.tensor(CORNERS)[y] + 0.0002 * torch.arange(15)[:, None]).view(15, 1, 1, 2)
    game = RecordedGame(
        Mixture(members), x, y, DISCS, [ARC(10), SubsetAttack(20)], ZeroOne(), torch.Generator().manual_seed(1)
    )
    solver = LinearProgram(num_rounds=20, attack_tolerance=0.0)
    solver.solve(game, generator=game.generator)
    strategy = Strategy(game, solver)
    losses = game.known().losses.double()
    Q = strategy.probabilities
    assert Q.sum(1).tolist() == pytest.approx([1 / 15] * 15)
    assert float((Q[..., None] * losses).sum((0, 1)).min()) == pytest.approx(lp_value(losses.numpy()), abs=1e-9)
    generator = torch.Generator().manual_seed(2)
    images, points, labels = strategy.draw(6000, generator)
    assert DISCS.contains(points, images).all()
    number = (images[:, None] == x[None]).flatten(2).all(2).float().argmax(1)
    assert torch.equal(y[number], labels)
    # 400 draws of each image in expectation; 4.5 deviations.
    assert ((number.bincount(minlength=15) - 400).abs() < 4.5 * math.sqrt(400)).all()
    # Against these draws each member errs as often as the value says, within 4 deviations of 6,000 coin tosses.
    for member in members:
        with torch.no_grad():
            wrong = (member(points).argmax(1) != labels).double().mean()
        assert abs(wrong - 0.5) < 4 * 0.5 / math.sqrt(6000)


# --- stopped and continued ----------------------------------------------------------------------------------------


QUICK = WeightsPhase("zero_one", {"arc": ARC(1)}, num_images=20)


@pytest.fixture(scope="module")
def continuable():
    """The same training again and again, and once to its end, for each response; stages end at 4, 8, 12."""
    ends = {}

    def make(response):
        members = untrained_members(3, "small_resnet", width=2, mean=(0.3,), std=(0.4,))
        solver = LinearProgram(num_rounds=2)
        follows = response == "equilibrium, falling T"
        growth = Growth(response="equilibrium" if follows else response, num_images=20, min_gain=None)
        # The payoff itself follows the share of the stage that is done.
        more = {"loss": SmoothedZeroOne(4.0, 0.1), "phase": replace(QUICK, payoff="loss")} if follows else {}
        return training(members, growth=growth, lr=0.02, **{"phase": QUICK, "solver": solver, **more})

    def end(response):
        if response not in ends:
            ends[response] = fit(make(response), 12)
        return ends[response]

    return make, end


@pytest.mark.parametrize(
    ("response", "stop"),
    [
        *(("adaptive", 2), ("adaptive", 4), ("fixed", 8), ("fixed", 9)),
        *(("equilibrium", 4), ("equilibrium", 5), ("equilibrium", 7), ("equilibrium", 11)),
        *(("equilibrium, falling T", 6), ("equilibrium, falling T", 9)),
    ],
)
def test_a_stopped_growth_ends_as_if_it_had_not_been_stopped(continuable, tmp_path, response, stop):
    """Stops inside a stage, just before its end, at its end, and just after it."""
    make, end = continuable
    whole, path = end(response), tmp_path / "stopped.ckpt"
    with pytest.raises(Interrupted):
        fit(make(response), 12, callbacks=[SaveAndStop(path, stop)])
    again = fit(make(response), 12, ckpt_path=path)
    assert again.stages == whole.stages
    assert len(whole.stages) == 3
    assert same_tensors(state(again), state(whole))
    loaded = MixtureTraining.load_from_checkpoint(path, mixture=Mixture(make(response).mixture.members))
    assert loaded.stages == whole.stages[: stop // 4]
    assert loaded.growth == whole.growth


def test_a_checkpoint_of_a_longer_training_is_refused(tmp_path):
    path = tmp_path / "stopped.ckpt"
    members = partial(untrained_members, 2, mean=(0.3,), std=(0.4,))
    with pytest.raises(Interrupted):
        fit(training(members()), 6, epochs=2, callbacks=[SaveAndStop(path, 5)])
    with pytest.raises(UserError, match="0 stages after 5 batches"):
        fit(training(members()), 6, epochs=1, ckpt_path=path)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "first"}, "start='first' is unknown: choose one of last, fresh"),
        ({"response": "none"}, "response='none' is unknown"),
        ({"min_gain": -0.1}, "min_gain=-0.1 must be at least 0"),
        ({"min_gain": math.nan}, "min_gain=nan"),
        ({"num_images": 0}, "num_images=0 must be a whole number"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Growth(**settings)


def test_what_cannot_grow_is_refused():
    alike = untrained_members(2, mean=(0.3,), std=(0.4,))
    with pytest.raises(ValueError, match="weighed by linear programs, not by OracleSubgradient"):
        training(alike, solver=OracleSubgradient())
    other = [alike[0], *untrained_members(1, "small_cnn", width=2, mean=(0.3,), std=(0.4,))]
    with pytest.raises(ValueError, match=r"schedule\.start=last copies members, but these are not alike"):
        training(other)
    training(other, growth=Growth("fresh"))
    for trainer, callbacks, words in (
        ({"max_steps": 3}, [], "max_steps"),
        ({"min_epochs": 1}, [], "min_epochs"),
        ({"max_time": "00:00:01:00"}, [], "Timer"),
        ({}, [EarlyStopping("val/robust_accuracy")], "EarlyStopping"),
        ({}, [EMAWeightAveraging()], "EMAWeightAveraging"),
    ):
        with pytest.raises(UserError, match=f"schedule=grow ends with its last stage.*leave out {words}"):
            fit(training(alike), 8, trainer=trainer, callbacks=callbacks, validate=None)
    # Only asked, because it would begin to talk to further processes.
    with pytest.raises(UserError, match="leave out further devices"):
        check_trainer(pl.Trainer(strategy=Replicas(), devices=1, **QUIET), alike, grows=True)
    with pytest.raises(UserError, match=r"2 members grows in as many stages of 2 batches or more, .* has 3"):
        fit(training(alike), 3)
    # One model is trained as ever.
    fit(training(alike[:1]), 3, trainer={"max_steps": 2})


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        (MembersPhase(targets="random"), "targets"),
        (MembersPhase(eps_scale=1.1), "eps_scale"),
        (MembersPhase(eps_ramp=0.5), "eps_ramp"),
        (MembersPhase(worst_of=["expected", "smoothed"]), "worst_of"),
    ],
)
def test_the_equilibrium_refuses_settings_of_the_attack_that_it_would_ignore(phase, name):
    members = untrained_members(2, mean=(0.3,), std=(0.4,))
    with pytest.raises(ValueError, match=rf"schedule\.response=equilibrium .* ignores attack\.{name}: leave that out"):
        training(members, growth=Growth(response="equilibrium"), members_phase=phase)
    # One model, and the other responses, use them.
    training(members[:1], growth=Growth(response="equilibrium"), members_phase=phase)
    training(members, growth=Growth(response="fixed"), members_phase=phase)


COMMAND = (
    *("data=digits", "model=linear", "eps=0.1", "schedule=grow", "L=3", "trainer.max_epochs=2", "name=one"),
    *("data.num_train=96", "data.num_val=40", "data.num_test=20", "data.batch_size=16", "protocol.diagnosed=0"),
    *("trainer.accelerator=cpu", "logger=csv"),
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights=[0.5,0.2,0.3]"], "schedule=grow finds the weights itself"),
        (["members=[a.pt,b.pt]"], "use schedule.start=fresh"),
        (["schedule.start=first"], "schedule.start=first is unknown"),
        (["schedule.response=best"], "schedule.response=best is unknown"),
        (["schedule.min_gain=-1"], "schedule.min_gain=-1"),
        (["schedule.num_images=0"], "schedule.num_images=0"),
        (["schedule.response=equilibrium", "attack.eps_ramp=0.5"], "ignores attack.eps_ramp: leave that out"),
        (["lambda_solver=oracle"], "choose lambda_solver=held_out or lp"),
        (["protocol=paper"], "give a list of attacks of protocol=paper"),
    ],
)
def test_commands_that_cannot_grow_are_refused_in_one_line(tmp_path, words, message):
    refused = run_command(tmp_path, *COMMAND, *words)
    assert refused.rc == 1
    assert message in refused.err.replace("\n", " ")
    assert "Traceback" not in refused.err


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run whose second member, a copy that hardly moves, is left out."""
    cwd = tmp_path_factory.mktemp("grow")
    finished = run_command(cwd, *COMMAND, "schedule.min_gain=0.2", "optimizer.lr=0.02", "baseline=true")
    assert finished.rc == 0, finished.err
    return cwd / "outputs" / "train" / "one", finished.out


def test_a_run_that_ends_before_L_members_holds_those_it_has_kept(grown):
    path, out = grown
    results = read_results(path)
    first, second = results["stages"]
    assert (first["kept"], second["kept"]) == (True, False)
    assert first["weights"] == second["weights"] == [1, 0, 0]
    assert second["value_without"] - second["value"] <= 0.2
    assert (first["num_images"], first["value_without"]) == (40, None)
    assert results["L"] == 1
    assert results["weights"] == [1]
    assert len(results["members"]) == 1
    assert results["member_updates"] == [11, 11, 0]
    assert f"member 0: value {first['value']:.4f} on 40 images" in out
    assert "it is left out, and the training ends" in out.replace("\n", " ")
    told = "Value of the game on 40 validation images after each member: "
    values = f"{first['value']:.3f}, {second['value']:.3f} ({second['value_without']:.3f} without it; left out)."
    assert told + values in " ".join(out.split())
    page = write_report(path).read_text()
    assert told + values in page
    mixture = load_mixture(path / "mixture")
    assert mixture.num_members == read_config(path / "mixture")["L"] == 1
    # Nothing was chosen by a score: the last state is the one that is measured.
    assert not (path / "checkpoints" / "best.ckpt").exists()
    assert results["best_epoch"] == pytest.approx(24 / 18)
    # The single model beside it is one of every training, chosen by its validation.
    assert (path / "baseline" / "checkpoints" / "best.ckpt").exists()
    assert "stages" not in read_results(path / "baseline") or read_results(path / "baseline")["stages"] == []


def test_the_history_of_a_growth(grown):
    rows = read_metrics(grown[0])
    phases = [row for row in rows if "weights/value" in row]
    assert [row["step"] for row in phases] == [12, 24]
    stages = read_results(grown[0])["stages"]
    assert [row["weights/value"] for row in phases] == pytest.approx([stage["value"] for stage in stages], abs=1e-6)
    inside = [[row[f"lambda/{k}"] for k in range(3)] for row in rows if 12 < row["step"] < 24]
    assert inside
    assert all(lam == pytest.approx([0.5, 0.5, 0]) for lam in inside)
    # The validation after the end.
    assert [row["step"] for row in rows if "val/robust_accuracy" in row] == [18, 24]


def test_a_finished_growth_is_shown_and_not_trained_again(grown):
    path, _ = grown
    before = (path / "results.json").read_bytes()
    again = run_command(path.parents[2], *COMMAND, "schedule.min_gain=0.2", "optimizer.lr=0.02", "baseline=true")
    assert again.rc == 0, again.err
    assert (path / "results.json").read_bytes() == before


def test_callbacks_show_each_stage_and_keep_no_best_epoch(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    module = training(untrained_members(2, mean=(0.3,), std=(0.4,)))
    fit(
        module,
        8,
        callbacks=[checkpoints, ProgressBar()],
        validate=None,
        trainer={"enable_checkpointing": True, "enable_progress_bar": True},
    )
    assert capsys.readouterr().out.count("member ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
