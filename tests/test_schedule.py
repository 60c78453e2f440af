"""Phases of Algorithm 2, member draws, learning rates: sequences written out by hand, torch's own schedulers."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, StepLR

from mixadv.training import Schedule
from mixadv.training.learning_rate import build_scheduler, constant, cosine, one_cycle, piecewise

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


# 5 batches in a pass. sampled: 15 member batches, of which 2 times 6 are followed by a phase. shared: 5 member batches,
# of which 2 times 2 are.
@pytest.mark.parametrize(("kind", "length"), [("sampled", 17), ("shared", 7)])
def test_lengths_of_epochs(kind, length):
    assert Schedule(kind, 3, 2).batches_in_epoch(5) == length
    assert Schedule(kind, 3, 2, weights_phases=False).batches_in_epoch(5) == (15 if kind == "sampled" else 5)


@pytest.mark.parametrize("kind", ["sampled", "shared"])
@pytest.mark.parametrize(("members", "T_theta", "per_pass"), [(3, 2, 5), (2, 7, 3), (1, 1, 4), (4, 3, 6)])
def test_epochs_have_the_phases_counted_one_by_one(kind, members, T_theta, per_pass):
    """All epochs are equally long. With w member batches wanted and P between two phases, w = f P + r, an epoch has
    f (P + 1) + r batches and so f phases, or f + 1 at the cost of one member batch; the first has what is wanted."""
    schedule = Schedule(kind, members, T_theta)
    wanted = per_pass * (members if kind == "sampled" else 1)
    length = schedule.batches_in_epoch(per_pass)
    assert length == schedule.batches_for(wanted)
    sequence = phases(schedule, 9 * length)
    epochs = [sequence[start : start + length] for start in range(0, 9 * length, length)]
    assert epochs[0].count("M") == wanted
    assert {epoch.count("M") for epoch in epochs} <= {wanted, wanted - 1}
    # Where the phases divide the member batches, no epoch is short of any.
    if wanted % schedule.member_batches == 0:
        assert {epoch.count("M") for epoch in epochs} == {wanted}
    assert [schedule.member_batches_in(b) for b in range(61)] == [phases(schedule, b).count("M") for b in range(61)]


def test_draws_are_uniform_and_independent():
    schedule, generator = Schedule("sampled", 3, 2), torch.Generator().manual_seed(4)
    draws = [schedule.members_at(1, generator) for _ in range(18000)]
    assert all(len(draw) == 1 for draw in draws)
    ks = torch.tensor(draws).flatten()
    # 18000 draws: 6000 of each member and 2000 of each successive pair, deviations within four sigma.
    assert ((ks.bincount(minlength=3) - 6000).abs() < 4 * (18000 * 2 / 9) ** 0.5).all()
    pairs = (3 * ks[:-1] + ks[1:]).bincount(minlength=9)
    assert ((pairs - 2000).abs() < 4 * (18000 * 8 / 81) ** 0.5).all()


def test_draws_are_a_function_of_the_generator_and_continue_from_its_state():
    schedule = Schedule("sampled", 3, 2)

    def draw(generator, count):
        return [schedule.members_at(1, generator)[0] for _ in range(count)]

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
    assert Schedule("shared", 3, 2).members_at(1, generator) == [0, 1, 2]
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [(("alternating", 3, 2), "sampled, shared or grow"), (("shared", 0, 2), "L=0"), (("sampled", 3, 0), "T_theta=0")],
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


def rates(make, updates, count=None, lr=1.0):
    """The rates of the first `count` updates of a member that is to make `updates`."""
    return torch_curve(lambda optimizer: build_scheduler(make, optimizer, updates), count or updates, lr)


def test_piecewise_is_multi_step():
    ours = rates(partial(piecewise, milestones=(0.3, 0.7), gamma=0.2), 20, lr=0.5)
    theirs = torch_curve(lambda o: MultiStepLR(o, [6, 14], gamma=0.2), 20, lr=0.5)
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert len(set(theirs)) == 3


def test_piecewise_between_updates():
    """0.5 of 5 updates is passed at the third update, with s = 0.6."""
    assert rates(partial(piecewise, milestones=(0.5,), gamma=0.1), 5) == pytest.approx([1, 1, 1, 0.1, 0.1])


def test_cosine_is_cosine_annealing():
    theirs = torch_curve(lambda o: CosineAnnealingLR(o, T_max=17), 17, lr=0.3)
    assert rates(cosine, 17, lr=0.3) == pytest.approx(theirs, rel=1e-9)


def test_cosine_after_a_warmup_computed_by_hand():
    """10 updates, 4 of them rising through 1/8, 3/8, 5/8, 7/8; then torch's cosine over the 6 that are left."""
    found = rates(partial(cosine, warmup=0.4), 10)
    assert found[:4] == pytest.approx([0.125, 0.375, 0.625, 0.875], rel=1e-12)
    assert found[4:] == pytest.approx(torch_curve(lambda o: CosineAnnealingLR(o, T_max=6), 6, lr=1.0), rel=1e-9)


def test_one_cycle_at_points_computed_by_hand():
    """8 updates, warm-up 1/4: s = 1/16, 3/16, ..., 15/16; up to 1 at s = 1/4, down to 0 at s = 1."""
    by_hand = [Fraction(1, 4), Fraction(3, 4), *(Fraction(n, 12) for n in (11, 9, 7, 5, 3, 1))]
    assert rates(partial(one_cycle, warmup=0.25), 8) == pytest.approx([float(f) for f in by_hand], rel=1e-12)
    assert rates(partial(one_cycle, warmup=0.0), 2) == pytest.approx([0.75, 0.25])


def test_constant():
    assert set(rates(constant, 7, 20)) == {1.0}


@pytest.mark.parametrize(
    ("make", "last"), [(piecewise, 0.01), (cosine, 0.0380602337443566), (one_cycle, 0.0833333333333333)]
)
def test_beyond_the_end_the_last_rate_stays(make, last):
    """8 updates; a sampled schedule may draw a member more often than planned."""
    assert rates(make, 8, 30)[7:] == pytest.approx(23 * [last], rel=1e-12)


def test_schedules_of_torch_get_the_length_of_the_training():
    """Under the name they take, where the settings do not say otherwise; StepLR takes none."""
    theirs = torch_curve(lambda o: OneCycleLR(o, max_lr=0.4, total_steps=12), 12, lr=0.1)
    assert rates(partial(OneCycleLR, max_lr=0.4), 12, lr=0.1) == theirs
    theirs = torch_curve(lambda o: CosineAnnealingLR(o, T_max=12), 12, lr=0.1)
    assert rates(CosineAnnealingLR, 12, lr=0.1) == theirs
    assert rates(partial(CosineAnnealingLR, eta_min=0.0), 12, lr=0.1) == theirs
    theirs = torch_curve(lambda o: CosineAnnealingLR(o, T_max=30), 12, lr=0.1)
    assert rates(partial(CosineAnnealingLR, T_max=30), 12, lr=0.1) == theirs
    theirs = torch_curve(lambda o: StepLR(o, 5), 12, lr=0.1)
    assert rates(partial(StepLR, step_size=5), 12, lr=0.1) == theirs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(piecewise, milestones=(0.5, 1.0)), r"milestones=\[0.5, 1.0\] must be shares"),
        (partial(piecewise, gamma=-0.1), "gamma=-0.1"),
        (partial(piecewise, gamma=float("nan")), "gamma=nan"),
        (partial(cosine, warmup=1.0), "warmup=1.0"),
        (partial(one_cycle, warmup=-0.1), "warmup=-0.1"),
        (ReduceLROnPlateau, "ReduceLROnPlateau waits for a metric"),
        (lambda optimizer: 0.1, "returned a float"),
    ],
)
def test_impossible_rates_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        rates(make, 8)
