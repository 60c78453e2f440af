"""The time announced before training, and that asking for it changes nothing."""

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import pytorch_lightning as pl
import torch

from builders.data import digits_module
from builders.networks import untrained_mixture
from conftest import QUIET, TINY
from mixadv.attacks import APGD, ARC, PGD, Square
from mixadv.evaluation import evaluate
from mixadv.lambda_solvers import OracleSubgradient
from mixadv.losses import TRADES
from mixadv.mixture import Mixture
from mixadv.tasks import attack_cost, estimate
from mixadv.tasks.attack_cost import passes_of_protocol, passes_per_image
from mixadv.tasks.estimate import in_words, seconds_per_batch
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining, WeightsPhase

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def training(kind="shared"):
    return MixtureTraining(
        untrained_mixture("small_resnet", seed=1, width=2),
        loss=TRADES(),
        threat_model=ThreatModel("linf", 0.1),
        attack=PGD(num_steps=2),
        validation_attack=PGD(num_steps=2),
        solver=OracleSubgradient(num_steps=2),
        kind=kind,
        T_theta=2,
        seed=5,
    )


def everything(module):
    """All that the training to come depends on."""
    return {
        **{name: tensor.clone() for name, tensor in module.state_dict().items()},
        "global generator": torch.get_rng_state(),
        "member generator": module.member_generator.get_state(),
        "modes": torch.tensor([m.training for m in module.modules()]),
        "frozen": torch.tensor([p.requires_grad for p in module.parameters()]),
        "gradients": torch.tensor([p.grad is not None for p in module.parameters()]),
        "counters": torch.tensor([module.t, *module.member_updates]),
        "attack generator": torch.tensor(module.attack_generator is not None),
    }


def fit(module):
    data = digits_module(seed=2)
    trainer = pl.Trainer(max_epochs=1, **QUIET, limit_train_batches=3, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    return everything(module) | {"noise": module.attack_generator.get_state()}


@pytest.mark.parametrize("kind", ["sampled", "shared"])
def test_an_estimate_leaves_the_module_and_the_generators_alone(kind):
    module = training(kind)
    before = everything(module)
    assert seconds_per_batch(module, SHAPE, 10, 64, CPU) > 0
    after = everything(module)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_training_that_follows_is_the_same():
    module = training()
    untouched = copy.deepcopy(module)
    seconds_per_batch(module, SHAPE, 10, 64, CPU)
    with_estimate, without = fit(module), fit(untouched)
    assert [name for name in without if not torch.equal(with_estimate[name], without[name])] == []


@dataclass
class OnTheClock:
    """An attack that takes the seconds that are given for its number of images, by a clock of its own."""

    seconds: Callable[[int], float]
    mixtures: list = field(default_factory=list)
    shapes: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    now: float = 0.0

    def __call__(self, mixture, x, y, threat_model, generator=None):
        self.mixtures.append(mixture)
        self.shapes.append(tuple(x.shape))
        self.labels.append(y)
        self.now += self.seconds(len(x))
        return x


@pytest.fixture
def timed(monkeypatch):
    """timed(seconds): a training whose attack takes seconds(images), while nothing else takes any."""

    def make(seconds):
        module = training()
        module.training_attack = attack = OnTheClock(seconds)
        monkeypatch.setattr("time.perf_counter", lambda: attack.now)
        return module, attack

    return make


def test_a_step_is_timed_on_few_images_and_scaled_to_the_batch(monkeypatch, timed):
    """Too short at 2 and 8 images, long enough (0.2 s) at 32: 0.3 s there, and 0.25 / 24 s for each image more."""
    monkeypatch.setattr(estimate, "ENOUGH_SECONDS", 0.2)
    module, attack = timed({2: 0.01, 8: 0.05, 32: 0.3}.__getitem__)
    assert seconds_per_batch(module, (1, 16, 12), 7, 128, CPU) == pytest.approx(0.3 + 96 * 0.25 / 24)
    assert attack.shapes == [(count, 1, 16, 12) for count in (2, 2, 8, 8, 32, 32)]
    assert all(
        y.shape == (shape[0],) and int(y.max()) < 7 for y, shape in zip(attack.labels, attack.shapes, strict=True)
    )
    assert all(mixture is not module.mixture for mixture in attack.mixtures)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_small_batch_is_timed_whole(timed, batch_size):
    module, attack = timed(lambda count: 0.001 * count)
    assert seconds_per_batch(module, (1, 16, 16), 10, batch_size, CPU) == pytest.approx(0.001 * batch_size)
    counts = [shape[0] for shape in attack.shapes]
    assert counts[-1] == max(counts) == batch_size


def test_the_estimate_grows_with_the_steps_of_the_attack(monkeypatch):
    """10 steps on 3 members cost far more than none: the training's own attack is what is timed."""
    short, long = training(), training()
    short.training_attack = PGD(num_steps=0, keep="last")
    long.training_attack = PGD(num_steps=10, keep="last")
    # One size for both: where the clock stops is another test's concern.
    monkeypatch.setattr(estimate, "ENOUGH_SECONDS", 0.0)
    times = [seconds_per_batch(m, SHAPE, 10, 32, CPU) for m in (short, long)]
    assert times[1] > 2 * times[0]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (40, "40 seconds"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7199, "120 minutes"),
        (7200, "2 hours"),
        (47 * 3600, "47 hours"),
        (48 * 3600, "2 days"),
        (59 * 86400, "59 days"),
        (60 * 86400, "2 months"),
        (2.6e7, "10 months"),
        (3 * 365 * 86400 - 1, "36 months"),
        (100 * 365 * 86400, "1217 months"),
    ],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


def test_no_time_at_all_still_counts():
    assert in_words(0.0) == in_words(1.4) == "1 second"


# --- the measurement after it ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("num_members", [1, 3])
def test_passes_of_pgd_are_those_of_the_formula(num_members, norm):
    """K steps take a forward and a backward pass through each member; keep="accuracy" looks at every point again."""
    for steps in (1, 5, 100):
        attack = PGD(num_steps=steps, keep="last")
        assert passes_per_image(attack, num_members, 10, norm) == 2 * steps * num_members


@pytest.mark.parametrize(
    "attack", [PGD(num_steps=20, keep="accuracy"), ARC(num_steps=20), Square(num_queries=60), APGD(num_steps=40)]
)
def test_long_attacks_are_extrapolated_from_short_ones(attack, monkeypatch):
    short = passes_per_image(attack, 3, 10, "linf")
    monkeypatch.setattr(attack_cost, "FEW", (1000, 2000))
    assert short == pytest.approx(passes_per_image(attack, 3, 10, "linf"), rel=0.15)


def test_an_evaluation_is_counted_like_a_run_of_its_passes():
    """On members that no attack fools, counted by hooks of the test."""
    counts = []
    members = [SureOfZero(counts) for _ in range(3)]
    attacks = {"pgd-6": PGD(num_steps=6), "arc": ARC(num_steps=5), "square": Square(num_queries=7)}
    x, y = torch.full((4, 1, 3, 3), 0.5), torch.zeros(4, dtype=torch.long)
    evaluate(Mixture(members), [(x, y)], attacks, ThreatModel("linf", 1e-3))
    assert passes_of_protocol(attacks, 3, 5, "linf") == pytest.approx(sum(counts) / 4, rel=0.1)


class SureOfZero(torch.nn.Module):
    def __init__(self, counts):
        super().__init__()
        self.linear = torch.nn.Linear(9, 5)
        with torch.no_grad():
            self.linear.bias[0] += 10
        self.linear.register_forward_hook(lambda module, given, out: counts.append(len(out)))
        self.linear.register_full_backward_hook(lambda module, given, out: counts.append(len(out[0])))

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_the_announcement_covers_training_and_measurement(trained):
    (line,) = [line for line in trained.finished.out.splitlines() if line.startswith("Training 3 members")]
    assert re.search(
        r" for 2 epochs each on .*: about \d+ seconds?, then at most about \d+ seconds? to measure 50 test images$",
        line,
    )


def test_one_model_is_not_several(command):
    finished = command(*TINY, "L=1", "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    assert finished.rc == 0, finished.err
    (line,) = [line for line in finished.out.splitlines() if line.startswith("Training ")]
    assert line.startswith("Training one model for 1 epoch on ")


def test_a_phase_with_attacks_of_its_own_is_timed_on_a_copy():
    """Each of eight images costs what the slow attack takes for it; nothing of the training moves."""

    @dataclass(frozen=True)
    class Slow:
        seen: list

        def __call__(self, mixture, x, y, threat_model, generator=None):
            with mixture.attack_mode():
                self.seen.append((len(x), y.tolist(), mixture(x).argmax(1).tolist()))
            time.sleep(0.08)
            return x

    slow = Slow([])
    module = MixtureTraining(
        untrained_mixture("small_resnet", seed=1, width=2),
        ThreatModel("linf", 0.1),
        solver=OracleSubgradient(num_steps=2),
        phase=WeightsPhase("zero_one", {"slow": slow}, num_images=30),
    )
    before = everything(module)
    seconds = estimate.seconds_per_response(module, SHAPE, CPU)
    assert 0.01 <= seconds < 0.2
    ((count, labels, answers),) = slow.seen
    assert count == 8
    assert labels == answers
    after = everything(module)
    assert all(torch.equal(before[name], after[name]) for name in before)
