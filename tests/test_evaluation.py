"""Evaluation against numbers counted by hand: three members, five examples, weights that are not uniform."""

import os

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mixadv.attacks import PGD, AttackSuite, LatticeClimber
from mixadv.attacks.suite import TWIN
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationRecord, EvaluationState, evaluate, fingerprint
from mixadv.intervals import confidence_interval
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from mixadv.vote import Vote

WEIGHTS = [0.5, 0.125, 0.375]
BALL = ThreatModel("linf", 0.1)


# --- the interval ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 50, 1000, 10000])
def test_the_interval_is_wilsons(count):
    for hits in {0, 1, count // 3, count // 2, count - 1, count}:
        expected = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
        low, high = confidence_interval(hits / count, count)
        assert low == pytest.approx(expected.low, abs=1e-12)
        assert high == pytest.approx(expected.high, abs=1e-12)
        assert 0 <= low <= hits / count <= high <= 1


def test_the_interval_does_not_collapse_at_the_ends():
    assert confidence_interval(0.0, 20)[0] == 0
    assert confidence_interval(0.0, 20)[1] > 0.1
    assert confidence_interval(1.0, 20)[0] < 0.9
    assert confidence_interval(1.0, 20)[1] == 1


def test_an_interval_needs_examples():
    with pytest.raises(ValueError, match="at least one example"):
        confidence_interval(0.5, 0)


# --- members that are right or wrong as a table says -------------------------------------------------------

# The first pixel counts tenths: 0.50 is clean, 0.55 the point of `up`, 0.45 that of `down`.
CLEAN, UP, DOWN = 0.5, 0.55, 0.45
RIGHT = {
    CLEAN: [[1, 1, 1, 0, 1], [1, 1, 0, 0, 1], [1, 0, 1, 0, 1]],
    UP: [[0, 1, 1, 0, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 1]],
    DOWN: [[1, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 0, 1]],
}
LABELS = torch.tensor([2, 0, 1, 2, 0])


class Table(nn.Module):
    """Member k: reads example and point off the image, answers with the label or another class."""

    def __init__(self, k, sure=4.0):
        super().__init__()
        self.k, self.sure = k, sure
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        logits = torch.zeros(len(x), 3)
        for row, image in enumerate(x.flatten(1)):
            point, example = round(float(image[0]), 2), round(float(image[1]) * 10)
            label = int(LABELS[example])
            answer = label if RIGHT[point][self.k][example] else (label + 1) % 3
            logits[row, answer] = self.sure
        return logits


class Shift:
    """An attack that sets the first pixel; against one member alone it may set another value."""

    def __init__(self, point, alone=None):
        self.point, self.alone = point, alone

    def __call__(self, mixture, x, y, threat_model, generator=None):
        point = self.alone if self.alone is not None and mixture.num_members == 1 else self.point
        x_adv = x.clone()
        x_adv[:, :, 0, 0] = point
        return x_adv


class Alone(Shift):
    """Not worth replaying from members."""

    transfers = False


def images():
    x = torch.zeros(5, 1, 1, 2)
    x[:, :, 0, 0] = CLEAN
    x[:, 0, 0, 1] = torch.arange(5) / 10
    return x


def batches(*sizes):
    start = 0
    for size in sizes:
        yield images()[start : start + size], LABELS[start : start + size]
        start += size


def mixture():
    return Mixture([Table(0), Table(1), Table(2)], WEIGHTS)


def expected(point):
    """sum_k lambda_k right[k][i], by hand."""
    return [sum(w * RIGHT[point][k][i] for k, w in enumerate(WEIGHTS)) for i in range(5)]


ATTACKS = {"pgd-up": Shift(UP), "square-down": Shift(DOWN)}


def test_accuracies_are_the_exact_expectation_over_the_draw():
    record = evaluate(mixture(), batches(5), ATTACKS, BALL)
    np.testing.assert_array_equal(record.labels, LABELS)
    np.testing.assert_array_equal(record.clean, RIGHT[CLEAN])
    np.testing.assert_array_equal(record.found["pgd-up"], RIGHT[UP])
    np.testing.assert_array_equal(record.found["square-down"], RIGHT[DOWN])
    np.testing.assert_allclose(record.expected(record.clean), [1, 0.625, 0.875, 0, 1], atol=1e-12)
    np.testing.assert_allclose(record.expected(record.found["pgd-up"]), expected(UP), atol=1e-12)


def test_the_worst_case_is_per_example_and_includes_the_clean_image():
    record = evaluate(mixture(), batches(5), ATTACKS, BALL)
    by_hand = np.min([expected(point) for point in (CLEAN, UP, DOWN)], axis=0)
    np.testing.assert_allclose(record.worst_case(), by_hand, atol=1e-12)
    # Example 3: wrong on the clean image, right in part at both attacks' points.
    assert record.worst_case()[3] == 0
    assert expected(UP)[3] > 0
    assert expected(DOWN)[3] > 0
    # Per example, below each attack's mean.
    assert record.worst_case().mean() < min(np.mean(expected(UP)), np.mean(expected(DOWN)))


def test_members_are_attacked_alone_and_by_what_hits_the_mixture():
    attacks = {"pgd": Shift(UP, alone=DOWN)}
    record = evaluate(mixture(), batches(5), attacks, BALL)
    np.testing.assert_array_equal(record.found["pgd"], RIGHT[UP])
    # Every member is attacked alone, and each of those points is shown to all members.
    assert set(record.found) == {"pgd", *(f"pgd on {whom}" for whom in ("member 0", "member 1", "member 2", TWIN))}
    for key in set(record.found) - {"pgd"}:
        np.testing.assert_array_equal(record.found[key], RIGHT[DOWN])
    survives = np.array(RIGHT[CLEAN]) & np.array(RIGHT[UP]) & np.array(RIGHT[DOWN])
    np.testing.assert_array_equal(record.members_worst_case(), survives.astype(bool))
    results = record.results({"pgd": {}})
    assert [member.clean for member in results.members] == pytest.approx([0.8, 0.6, 0.6])
    assert [member.robust.value for member in results.members] == pytest.approx([row.mean() for row in survives])
    assert results.weights == pytest.approx(WEIGHTS)


def test_points_found_against_a_member_count_against_the_mixture():
    """An attack that is weak on the mixture and strong on its members must not flatter the mixture."""
    record = evaluate(mixture(), batches(5), {"pgd": Shift(UP, alone=DOWN)}, BALL)
    by_hand = np.min([expected(point) for point in (CLEAN, UP, DOWN)], axis=0)
    np.testing.assert_allclose(record.worst_case(), by_hand, atol=1e-12)
    assert by_hand.sum() < np.min([expected(point) for point in (CLEAN, UP)], axis=0).sum()
    results = record.results({"pgd": {}})
    assert results.attacks["pgd"].mixture == pytest.approx(np.mean(expected(UP)))
    assert results.attacks["pgd"].replayed_from_parts == pytest.approx(np.mean(expected(DOWN)))
    # Replayed on everybody: no mixture can be below the average of its members' worst cases.
    assert (record.worst_case() >= record.weights @ record.members_worst_case() - 1e-12).all()


def test_the_ensemble_is_the_argmax_of_the_averaged_probabilities():
    record = evaluate(mixture(), batches(5), ATTACKS, BALL)
    # Lambda = (1/2, 1/8, 3/8) and equally sure members: whoever holds more than half of the weight wins.
    by_hand = [float(value > 0.5) for value in expected(UP)]
    ties = [i for i, value in enumerate(expected(UP)) if value == 0.5]
    for i, value in enumerate(by_hand):
        if i not in ties:
            assert record.ensemble["pgd-up"][i] == value
    # One member that is surer than the others together overrules them.
    sure = Mixture([Table(0, 0.2), Table(1, 20.0), Table(2, 0.2)], [0.3, 0.4, 0.3])
    np.testing.assert_array_equal(evaluate(sure, batches(5), {}, BALL).ensemble_clean, RIGHT[CLEAN][1])


def test_the_results_are_the_record_in_numbers():
    record = evaluate(mixture(), batches(5), ATTACKS, BALL)
    results = record.results({"pgd-up": {"num_steps": 3}, "square-down": {"queries": 5}})
    assert (results.L, results.num_examples) == (3, 5)
    assert results.weights == pytest.approx(WEIGHTS)
    assert results.clean.value == pytest.approx(3.5 / 5)
    assert results.clean.ends == confidence_interval(results.clean.value, 5)
    assert results.robust.value == pytest.approx(record.worst_case().mean())
    assert results.attacks["pgd-up"].mixture == pytest.approx(np.mean(expected(UP)))
    assert results.attacks["square-down"].settings == {"queries": 5}
    assert all(attack.seconds >= 0 for attack in results.attacks.values())


def test_the_arrays_allow_every_number_to_be_computed_again():
    record = evaluate(mixture(), batches(2, 3), ATTACKS, BALL)
    arrays = record.arrays()
    assert set(arrays) == {
        *("labels", "weights", "clean", "robust", "found_by", "members_robust", "averaged_twin_robust"),
        *(f"attack/{name}" for name in ATTACKS),
        *(f"member_correct/{key}" for key in ("clean", *record.found)),
    }
    lam = arrays["weights"]
    again = [lam @ arrays[f"member_correct/{key}"] for key in ("clean", *record.found)]
    np.testing.assert_allclose(np.min(again, axis=0), arrays["robust"], atol=1e-12)
    assert arrays["members_robust"].shape == (3, 5)
    assert arrays["member_correct/pgd-up"].dtype == np.uint8
    assert arrays["member_correct/pgd-up"].shape == (3, 5)
    assert all(array.dtype != object for array in arrays.values())


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (1, 1, 1, 1, 1), (4, 1)])
def test_numbers_do_not_depend_on_the_batches(sizes):
    whole = evaluate(mixture(), batches(5), ATTACKS, BALL).arrays()
    split = evaluate(mixture(), batches(*sizes), ATTACKS, BALL).arrays()
    for name, array in whole.items():
        np.testing.assert_array_equal(split[name], array, err_msg=name)


def test_another_attack_never_raises_robust_accuracy():
    alone = evaluate(mixture(), batches(5), {"a": Shift(UP)}, BALL)
    both = evaluate(mixture(), batches(5), {"a": Shift(UP), "b": Shift(DOWN)}, BALL)
    nothing = evaluate(mixture(), batches(5), {}, BALL)
    assert (both.worst_case() <= alone.worst_case()).all()
    assert (alone.worst_case() <= nothing.worst_case()).all()
    assert both.worst_case().sum() < alone.worst_case().sum() < nothing.worst_case().sum()
    np.testing.assert_array_equal(nothing.worst_case(), nothing.expected(nothing.clean))
    assert (both.members_worst_case() <= alone.members_worst_case()).all()


def test_weights_are_scaled_to_sum_to_one():
    record = evaluate(Mixture([Table(k) for k in range(3)], [1 / 3] * 3), batches(5), {}, BALL)
    assert record.weights.dtype == np.float64
    assert record.weights.sum() == pytest.approx(1, abs=1e-15)
    assert record.expected(np.ones((3, 5))).max() <= 1 + 1e-15


def test_a_single_member_is_not_attacked_twice():
    member = Table(0)
    record = evaluate(Mixture([member]), batches(5), {"pgd": Shift(UP)}, BALL)
    assert member.seen == 2 * 5
    assert list(record.found) == ["pgd"]
    assert record.results({"pgd": {}}).attacks["pgd"].members == (record.found["pgd"].mean(),)


@pytest.mark.parametrize("value", [0.7, -0.2, float("nan"), float("inf")])
def test_an_attack_that_leaves_the_ball_stops_the_evaluation(value):
    class Cheat:
        def __call__(self, mixture, x, y, threat_model, generator=None):
            x_adv = x.clone()
            x_adv[1, :, 0, 0] = value
            return x_adv

    with pytest.raises(RuntimeError, match=r"attack pgd-cheat left the threat model at example 1"):
        evaluate(mixture(), batches(5), {"pgd-cheat": Cheat()}, BALL)


def test_an_attack_that_cheats_only_on_members_alone_is_caught_too():
    with pytest.raises(RuntimeError, match="left the threat model"):
        evaluate(mixture(), batches(5), {"pgd": Shift(UP, alone=0.9)}, BALL)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(mixture(), [], ATTACKS, BALL)


def test_progress_counts_examples_per_attack():
    seen = []
    attacks = {"pgd-up": Shift(UP), "square-down": Alone(DOWN)}
    evaluate(mixture(), batches(2, 3), attacks, BALL, on_progress=lambda key, count: seen.append((key, count)))
    parts = [f"pgd-up on {whom}" for whom in ("member 0", "member 1", "member 2", TWIN)]
    assert seen == [(key, count) for key in ("clean", "pgd-up", "square-down", *parts) for count in (2, 3)]


# --- what everybody was shown --------------------------------------------------------------------------------


def test_other_weights_are_attacked_as_well_and_judged_on_everything():
    class Weighed:
        """Finds `DOWN` where the last member has most of the weight, else `UP`."""

        transfers = False

        def __call__(self, mixture, x, y, threat_model, generator=None):
            x_adv = x.clone()
            x_adv[:, :, 0, 0] = DOWN if mixture.weights[-1] > 0.5 else UP
            return x_adv

    other = np.array([0.1, 0.2, 0.7])
    record = evaluate(mixture(), batches(5), {"pgd": Weighed()}, BALL, other_weights=[other.tolist()])
    assert set(record.found) == {"pgd", "pgd on other weights 0"}
    np.testing.assert_array_equal(record.found["pgd on other weights 0"], RIGHT[DOWN])
    for lam in (WEIGHTS, other):
        by_hand = [
            min(sum(w * RIGHT[point][k][i] for k, w in enumerate(lam)) for point in (CLEAN, UP, DOWN)) for i in range(5)
        ]
        np.testing.assert_allclose(record.worst_case(np.asarray(lam)), by_hand, atol=1e-7)


def test_the_first_to_find_the_worst_case_is_named():
    record = evaluate(mixture(), batches(5), {"pgd": Shift(UP), "square": Alone(DOWN)}, BALL)
    by_hand = []
    for i in range(5):
        values = {"clean": expected(CLEAN)[i], "pgd": expected(UP)[i], "square": expected(DOWN)[i]}
        by_hand.append(min(values, key=values.get))
    assert record.found_by() == by_hand
    counts = record.results({"pgd": {}, "square": {}}).attacks
    assert [counts[name].worst_found for name in ("pgd", "square")] == [
        by_hand.count("pgd"),
        by_hand.count("square"),
    ]
    assert len(set(by_hand)) == 3


def test_the_averaged_twin_is_measured_under_its_own_name():
    weights = [0.45, 0.2, 0.35]
    record = evaluate(Mixture([Table(k) for k in range(3)], weights), batches(5), {"pgd": Shift(UP, alone=DOWN)}, BALL)
    # Equally sure members: whoever holds more than half of the weight wins the average.
    survives = [
        all(sum(w * RIGHT[point][k][i] for k, w in enumerate(weights)) > 0.5 for point in (CLEAN, UP, DOWN))
        for i in range(5)
    ]
    np.testing.assert_array_equal(record.averaged_twin_worst_case(), survives)
    assert 0 < sum(survives) < 5
    results = record.results({"pgd": {}})
    assert results.attacks["pgd"].averaged_twin == record.ensemble["pgd on averaged twin"].mean()
    assert results.averaged_twin.robust.value == np.mean(survives)


def test_the_worst_point_of_every_example_is_kept_and_of_equal_ones_the_first():
    attacks = {"pgd-up": Alone(UP), "square-down": Alone(DOWN)}
    for sizes in ((5,), (2, 3)):
        record = evaluate(mixture(), batches(*sizes), attacks, BALL)
        by_hand = []
        for i in range(5):
            values = {point: round(expected(point)[i], 9) for point in (CLEAN, UP, DOWN)}
            by_hand.append(min(values, key=values.get))
        assert {CLEAN, UP, DOWN} == set(by_hand)
        np.testing.assert_allclose(record.worst_points[:, 0, 0, 0], by_hand)
        np.testing.assert_array_equal(record.worst_points[:, 0, 0, 1], images()[:, 0, 0, 1])
        lam = np.asarray(WEIGHTS)
        answers = torch.stack([member(record.worst_points).argmax(-1) for member in mixture().members])
        np.testing.assert_allclose(lam @ (answers == LABELS).numpy(), record.worst_case(), atol=1e-12)


def test_rounding_does_not_decide_which_of_equal_points_is_the_worst():
    """Sums in another order differ by rounding; the same answers must give the same bits at any place of a batch."""
    weights = np.random.default_rng(0).dirichlet(np.ones(16))
    column = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0], dtype=np.uint8)
    record = EvaluationRecord(weights, np.zeros(37), np.tile(column[:, None], 37), np.ones(37))
    assert len(set(record.expected(record.clean).tolist())) == 1
    assert record.expected(column[:, None])[0] == record.expected(record.clean)[0]
    assert record.expected(column[:, None])[0] == pytest.approx(weights @ column, abs=1e-15)


# --- resuming ------------------------------------------------------------------------------------------------


class Counted:
    """Random points, and a count of the calls; refuses the call number `limit`."""

    def __init__(self, limit=None):
        self.calls, self.limit = 0, limit

    def __call__(self, mixture, x, y, threat_model, generator=None):
        self.calls += 1
        if self.calls == self.limit:
            raise KeyError("killed")
        return threat_model.sample(x, generator)


class Warm:
    """Small random steps from the worst points of the passes before it."""

    transfers, warm_starts = False, True

    def __call__(self, mixture, x, y, threat_model, generator=None, *, starts):
        return threat_model.project(starts + 0.02 * torch.randn(x.shape, generator=generator), x)


def measured(state, limit=None, weights=WEIGHTS, seed=3):
    x, y = random_examples()
    torch.manual_seed(4)
    mixture = mixture_with_batch_norm().eval()
    mixture.set_weights(weights)
    attacks = {"a": Counted(), "warm": Warm(), "b": Counted(limit)}
    parts = [(x[:30], y[:30]), (x[30:], y[30:])]
    mark = fingerprint(mixture, parts, [sorted(attacks), BALL, seed])
    record = evaluate(mixture, parts, attacks, BALL, seed=seed, state=EvaluationState(state, mark))
    return record, attacks


def test_a_killed_evaluation_continues_with_the_pass_it_was_in(tmp_path):
    whole, _ = measured(None)
    with pytest.raises(KeyError, match="killed"):
        measured(tmp_path / "state", limit=4)
    files = {path.name for path in (tmp_path / "state").iterdir()}
    parts = [f"a_on_{whom}.npz" for whom in ("member_0", "member_1", "member_2", "averaged_twin")]
    assert files == {"clean.npz", "a.npz", "b.npz", *parts, "worst-7.safetensors"}
    resumed, attacks = measured(tmp_path / "state")
    assert (attacks["a"].calls, attacks["b"].calls) == (0, 2 * 4)
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], array, err_msg=name)
    assert torch.equal(resumed.worst_points, whole.worst_points)
    again, attacks = measured(tmp_path / "state")
    assert attacks["a"].calls == attacks["b"].calls == 0
    assert torch.equal(again.worst_points, whole.worst_points)
    np.testing.assert_array_equal(again.worst_case(), whole.worst_case())


class Killed(BaseException):
    """Nothing catches it."""


def resumed_after_every_rename(monkeypatch, tmp_path, moment, measure, first=1):
    """Each file is written by one rename: the process ends before or after it, at every rename from the first on.

    measure(folder) evaluates with its state in a folder (None: in memory). Returns the number of renames.
    """
    whole = measure(None)
    rename, calls = os.replace, []

    def killed_at(number):
        def replace(source, target):
            calls.append(target)
            if len(calls) == number and moment == "before":
                raise Killed
            rename(source, target)
            if len(calls) == number:
                raise Killed

        return replace

    for number in range(first, 40):
        calls.clear()
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr("mixadv.files.os.replace", killed_at(number))
            try:
                measure(folder)
            except Killed:
                pass
            else:
                return number - 1
        resumed = measure(folder)
        assert torch.equal(resumed.worst_points, whole.worst_points), f"at rename {number}"
        for name, array in whole.arrays().items():
            np.testing.assert_array_equal(resumed.arrays()[name], array, err_msg=f"{name} at rename {number}")
    raise AssertionError("so many files are not expected")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_moment_changes_no_bit(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(Counted, "transfers", False, raising=False)
    # Four passes, with two files each.
    assert resumed_after_every_rename(monkeypatch, tmp_path, moment, lambda folder: measured(folder)[0]) == 2 * 4


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_in_the_passes_of_climber_and_vote_changes_no_bit(tmp_path, monkeypatch, moment):
    """Both begin at the worst points of the passes before them, which must be those of the whole evaluation."""
    monkeypatch.setattr(Counted, "transfers", False, raising=False)
    (x, y), weights = random_examples(), (0.4, 0.35, 0.25)
    mixture = mixture_with_batch_norm().eval()
    mixture.set_weights(weights)
    parts = [(x[:30], y[:30]), (x[30:], y[30:])]
    attacks = {"a": Counted(), "climber": LatticeClimber(num_steps=8, steps_per_set=4)}
    reached = []

    def measure(folder):
        state = EvaluationState(folder, "the same")
        record = evaluate(mixture, parts, attacks, BALL, vote=Vote(weights), state=state)
        reached.append(record)
        return record

    # Two files for each of four passes, of which the first two are tested above.
    assert resumed_after_every_rename(monkeypatch, tmp_path, moment, measure, first=4) == 2 * 4
    found = reached[0].found
    assert list(found) == ["a", "climber", "coalition on vote"]
    assert (reached[0].expected(found["climber"]) < reached[0].expected(found["a"])).any()


def test_an_attack_begins_at_the_worst_points_of_the_passes_before_it():
    seen = []

    class Looks(Warm):
        def __call__(self, mixture, x, y, threat_model, generator=None, *, starts):
            seen.append(starts.clone())
            return x

    attacks = {"pgd-up": Alone(UP), "looks": Looks(), "square-down": Alone(DOWN)}
    evaluate(mixture(), batches(2, 3), attacks, BALL)
    # It comes last, though it is named between the others.
    by_hand = []
    for i in range(5):
        values = {point: round(expected(point)[i], 9) for point in (CLEAN, UP, DOWN)}
        by_hand.append(min(values, key=values.get))
    assert {CLEAN, UP, DOWN} == set(by_hand)
    np.testing.assert_allclose(torch.cat(seen)[:, 0, 0, 0], by_hand)
    seen.clear()
    AttackSuite(attacks)(mixture(), images(), LABELS, BALL)
    np.testing.assert_allclose(seen[0][:, 0, 0, 0], by_hand)


@pytest.mark.parametrize("change", [{"weights": [0.4, 0.3, 0.3]}, {"seed": 4}])
def test_the_state_of_another_evaluation_is_refused(tmp_path, change):
    measured(tmp_path / "state")
    with pytest.raises(UserError, match="belongs to another evaluation"):
        measured(tmp_path / "state", **change)


def test_a_torn_state_file_is_named(tmp_path):
    measured(tmp_path / "state")
    (points,) = (tmp_path / "state").glob("worst-*")
    for path in (points, tmp_path / "state" / "b.npz"):
        for count in (len(path.read_bytes()) // 2, 10, 0):
            path.write_bytes(path.read_bytes()[:count])
            with pytest.raises(UserError, match=rf"{path.name} cannot be read.*: remove .*state, and"):
                measured(tmp_path / "state")


# --- with networks -----------------------------------------------------------------------------------------


def mixture_with_batch_norm():
    torch.manual_seed(4)
    return Mixture(
        [
            nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
            for _ in range(3)
        ],
        WEIGHTS,
    )


def random_examples(count=40):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 2, 2, generator=generator), torch.randint(3, (count,), generator=generator)


def test_a_deterministic_attack_gives_the_same_numbers_for_every_batch_size():
    x, y = random_examples()
    attack = {"pgd": PGD(num_steps=3, start="none")}
    found = [
        evaluate(mixture_with_batch_norm().eval(), zip(x.split(n), y.split(n), strict=True), attack, BALL)
        for n in (40, 7, 16)
    ]
    for other in found[1:]:
        for name, array in found[0].arrays().items():
            np.testing.assert_array_equal(other.arrays()[name], array, err_msg=name)


def test_evaluation_is_in_eval_mode_and_leaves_the_mixture_as_found():
    mixture = mixture_with_batch_norm().train()
    before = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    x, y = random_examples()
    found = evaluate(mixture, [(x, y)], {"pgd": PGD(num_steps=2)}, BALL)
    assert all(module.training for module in mixture.modules())
    assert all(p.requires_grad and p.grad is None for p in mixture.parameters())
    for name, tensor in mixture.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again = evaluate(mixture.eval(), [(x, y)], {"pgd": PGD(num_steps=2)}, BALL)
    np.testing.assert_array_equal(found.clean, again.clean)
    np.testing.assert_array_equal(found.found["pgd"], again.found["pgd"])


def test_random_attacks_depend_on_the_seed_and_the_batch_alone():
    x, y = random_examples()

    def points(seed, *others):
        found = []

        class Kept:
            def __call__(self, mixture, x, y, threat_model, generator=None):
                x_adv = PGD(num_steps=1, keep="last")(mixture, x, y, threat_model, generator)
                if mixture.num_members > 1:
                    found.append(x_adv)
                return x_adv

        torch.manual_seed(100 + seed + len(others))
        attacks = {**{f"pgd-{k}": other for k, other in enumerate(others)}, "pgd": Kept()}
        evaluate(mixture_with_batch_norm().eval(), [(x[:20], y[:20]), (x[:20], y[:20])], attacks, BALL, seed=seed)
        return found

    first = points(0)
    for mine, theirs in zip(first, points(0, PGD(num_steps=2)), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], points(7)[0])


def test_a_record_is_plain_numbers():
    record = EvaluationRecord(
        weights=np.array([0.25, 0.75]),
        labels=np.array([0, 1, 1]),
        clean=np.array([[1, 0, 1], [1, 1, 0]], dtype=np.uint8),
        ensemble_clean=np.array([1, 1, 0]),
    )
    np.testing.assert_allclose(record.worst_case(), [1, 0.75, 0.25])
    np.testing.assert_array_equal(record.members_worst_case(), [[True, False, True], [True, True, False]])
