"""Phases of Algorithm 2, member draws, learning rates: sequences written out by hand, torch's own schedulers."""

from fractions import Fraction

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from mixadv.training import LearningRate, Schedule

# T_theta=2, L=3, batches t = 1..20; M: members, W: weights.
PHASES = {
    "sampled": "MMMMMM W MMMMMM W MMMMMM".replace(" ", ""),
    "shared": "MM W MM W MM W MM W MM W MM W MM".replace(" ", ""),
}


def phases(schedule, count):
    return "".join("W" if schedule.is_weights_phase(t) else "M" for t in range(1, count + 1))


@pytest.mark.parametrize("kind", ["sampled", "shared"])
def test_sequence_of_phases(kind):
    assert len(PHASES[kind]) == 20
    assert phases(Schedule(kind, 3, 2), 20) == PHASES[kind]
    assert phases(Schedule(kind, 3, 2, weights_phases=False), 20) == 20 * "M"


def test_a_member_gets_T_theta_updates_between_phases_in_both_kinds():
    assert Schedule("sampled", 3, 50).member_batches == 150
    assert Schedule("shared", 3, 50).member_batches == 50
    for kind, first in (("sampled", 151), ("shared", 51)):
        assert phases(Schedule(kind, 3, 50), 400).index("W") + 1 == first


# 5 batches in a pass. sampled: 15, 30, 45, 60 member batches need a phase after each 6: 2, 5, 7, 10 in total.
# shared: 5, 10, 15, 20 member batches with a phase after each 2: the same 2, 5, 7, 10.
@pytest.mark.parametrize(("kind", "lengths"), [("sampled", [17, 18, 17, 18]), ("shared", [7, 8, 7, 8])])
def test_lengths_of_epochs(kind, lengths):
    schedule = Schedule(kind, 3, 2)
    assert [schedule.batches_in_epoch(epoch, 5) for epoch in range(4)] == lengths
    fixed = Schedule(kind, 3, 2, weights_phases=False)
    assert [fixed.batches_in_epoch(epoch, 5) for epoch in range(3)] == [15 if kind == "sampled" else 5] * 3


@pytest.mark.parametrize("kind", ["sampled", "shared"])
@pytest.mark.parametrize(("members", "T_theta", "per_pass"), [(3, 2, 5), (2, 7, 3), (1, 1, 4), (4, 3, 6)])
def test_epochs_add_up_to_the_phases_counted_one_by_one(kind, members, T_theta, per_pass):
    schedule = Schedule(kind, members, T_theta)
    wanted = per_pass * (members if kind == "sampled" else 1)
    end = 0
    for epoch in range(9):
        length = schedule.batches_in_epoch(epoch, per_pass)
        assert [schedule.is_weights_phase(t) for t in range(end + 1, end + length + 1)].count(False) == wanted
        end += length
        assert end == schedule.batches_for((epoch + 1) * wanted)
    sequence = phases(schedule, 60)
    assert [schedule.member_batches_in(b) for b in range(61)] == [sequence[:b].count("M") for b in range(61)]


def test_draws_are_uniform_and_independent():
    schedule, generator = Schedule("sampled", 3, 2), torch.Generator().manual_seed(4)
    draws = [schedule.members_at(generator) for _ in range(18000)]
    assert all(len(draw) == 1 for draw in draws)
    ks = torch.tensor(draws).flatten()
    # 18000 draws: 6000 of each member and 2000 of each successive pair, deviations within four sigma.
    assert ((ks.bincount(minlength=3) - 6000).abs() < 4 * (18000 * 2 / 9) ** 0.5).all()
    pairs = (3 * ks[:-1] + ks[1:]).bincount(minlength=9)
    assert ((pairs - 2000).abs() < 4 * (18000 * 8 / 81) ** 0.5).all()


def test_draws_are_a_function_of_the_generator_and_continue_from_its_state():
    schedule = Schedule("sampled", 3, 2)

    def draw(generator, count):
        return [schedule.members_at(generator)[0] for _ in range(count)]

    generator = torch.Generator().manual_seed(11)
    before = torch.get_rng_state()
    whole = draw(generator, 50)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(11)
    start = draw(generator, 20)
    restored = torch.Generator()
    restored.set_state(generator.get_state())
    assert start + draw(restored, 30) == whole
    assert draw(torch.Generator().manual_seed(12), 50) != whole


def test_shared_serves_all_members_and_draws_nothing():
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    assert Schedule("shared", 3, 2).members_at(generator) == [0, 1, 2]
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [(("alternating", 3, 2), "sampled or shared"), (("shared", 0, 2), "L=0"), (("sampled", 3, 0), "T_theta=0")],
)
def test_impossible_schedules_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Schedule(*settings)


# --- learning rates ---------------------------------------------------------------------------------------


def torch_curve(make, total, lr):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_piecewise_is_multi_step():
    ours = LearningRate("piecewise", milestones=(0.3, 0.7), gamma=0.2)
    theirs = torch_curve(lambda o: MultiStepLR(o, [6, 14], gamma=0.2), 20, lr=0.5)
    assert [0.5 * ours.factor(done, 20) for done in range(20)] == pytest.approx(theirs, rel=1e-12)
    assert len(set(theirs)) == 3


def test_piecewise_between_updates():
    """0.5 of 5 updates is passed at the third update, with s = 0.6."""
    rate = LearningRate("piecewise", milestones=(0.5,), gamma=0.1)
    assert [rate.factor(done, 5) for done in range(5)] == pytest.approx([1, 1, 1, 0.1, 0.1])


def test_cosine_is_cosine_annealing():
    theirs = torch_curve(lambda o: CosineAnnealingLR(o, T_max=17), 17, lr=0.3)
    rate = LearningRate("cosine")
    assert [0.3 * rate.factor(done, 17) for done in range(17)] == pytest.approx(theirs, rel=1e-9)


def test_one_cycle_at_points_computed_by_hand():
    """8 updates, warm-up 1/4: s = 1/16, 3/16, ..., 15/16; up to 1 at s = 1/4, down to 0 at s = 1."""
    rate = LearningRate("one_cycle", warmup=0.25)
    by_hand = [Fraction(1, 4), Fraction(3, 4), *(Fraction(n, 12) for n in (11, 9, 7, 5, 3, 1))]
    assert [rate.factor(done, 8) for done in range(8)] == pytest.approx([float(f) for f in by_hand], rel=1e-12)
    falling = LearningRate("one_cycle", warmup=0.0)
    assert [falling.factor(done, 2) for done in range(2)] == pytest.approx([0.75, 0.25])


def test_constant():
    assert {LearningRate("constant").factor(done, 7) for done in range(20)} == {1.0}


@pytest.mark.parametrize(
    ("kind", "last"), [("piecewise", 0.01), ("cosine", 0.0380602337443566), ("one_cycle", 0.0833333333333333)]
)
def test_beyond_the_end_the_last_rate_stays(kind, last):
    """8 updates; a sampled schedule may draw a member more often than planned."""
    rate = LearningRate(kind)
    assert [rate.factor(done, 8) for done in (7, 8, 9, 1000)] == pytest.approx(4 * [last], rel=1e-12)


def test_unknown_curve_is_refused():
    with pytest.raises(ValueError, match="linear"):
        LearningRate("linear")
