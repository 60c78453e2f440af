"""Class weights: tables by hand, what does not fit, and that they reach the members and nothing else."""

import copy
import re
from dataclasses import dataclass, field
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.optim import SGD

from builders.data import digits_module
from builders.networks import same_tensors, untrained_members
from builders.runs import read_results
from conftest import QUIET, TINY
from mixadv.attacks import PGD
from mixadv.errors import UserError
from mixadv.lambda_solvers import OracleSubgradient
from mixadv.losses import TRADES
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from mixadv.training import ClassWeights, MixtureTraining
from mixadv.training.learning_rate import constant


def table(num_members, num_classes, **settings):
    return ClassWeights("antithetic", **settings).table(num_members, num_classes).double()


def test_members_have_an_order_and_its_reverse():
    """Powers of the ratio over their mean: (1, 2, 4) / (7/3) for three classes and ratio 2."""
    by_hand = torch.tensor([[3.0, 6.0, 12.0], [12.0, 6.0, 3.0]], dtype=torch.float64) / 7
    torch.testing.assert_close(table(2, 3, ratio=2), by_hand, atol=1e-6, rtol=0)
    # A single model has the first row.
    torch.testing.assert_close(table(1, 3, ratio=2), by_hand[:1], atol=1e-6, rtol=0)
    # Class 2 weighs least, class 1 most: not the same as its inverse permutation.
    given = torch.tensor([[6.0, 12.0, 3.0], [6.0, 3.0, 12.0]], dtype=torch.float64) / 7
    torch.testing.assert_close(table(2, 3, ratio=2, orders=[[2, 0, 1]]), given, atol=1e-6, rtol=0)
    torch.testing.assert_close(table(1, 3, ratio=2, orders=[[2, 0, 1], [1, 0, 2]]), given[:1], atol=1e-6, rtol=0)


def test_further_pairs_begin_at_other_classes():
    """Ten classes and three pairs: the orders begin at 0, floor(10/3) = 3 and floor(20/3) = 6."""
    found = table(6, 10, ratio=1.3)
    assert found.argmin(1).tolist() == [0, 9, 3, 2, 6, 5]
    assert found.argmax(1).tolist() == [9, 0, 2, 3, 5, 6]
    torch.testing.assert_close(found.mean(1), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    for j, first in enumerate((0, 3, 6)):
        upwards = found[2 * j].roll(-first)
        torch.testing.assert_close(upwards[1:] / upwards[:-1], torch.full((9,), 1.3).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(found[2 * j + 1].roll(-first), upwards.flip(0), atol=1e-6, rtol=0)


def test_a_table_of_ones_own_is_used_as_it_is():
    rows = [[1.0, 0.0, 2.5], [0.5, 0.5, 0.25]]
    assert ClassWeights(rows).table(2, 3).tolist() == rows
    assert ClassWeights().table(3, 4).tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"class_weights": "antithetik"}, None, "class_weights=antithetik is unknown: choose null, antithetic or a"),
        ({"class_weights": "antithetic", "ratio": 0.0}, None, "ratio=0.0 must be positive and finite"),
        ({"class_weights": "antithetic", "ratio": float("inf")}, None, "ratio=inf must be positive and finite"),
        ({"orders": [[0, 1]]}, None, "orders belong to class_weights=antithetic"),
        ({"class_weights": "antithetic"}, (3, 4), "L=3 is odd: choose an even L, or give a table"),
        (
            {"class_weights": [[1.0, 1.0]]},
            (2, 2),
            "rows of [2] numbers: give 2 rows, one for each member, of 2 numbers",
        ),
        ({"class_weights": [[1.0, 1.0], [1.0]]}, (2, 2), "rows of [2, 1] numbers"),
        ({"class_weights": [[1.0, -1.0]]}, (1, 2), "the row [1.0, -1.0]: give numbers of at least 0, not all 0"),
        ({"class_weights": [[float("nan"), 1.0]]}, (1, 2), "give numbers of at least 0"),
        ({"class_weights": [[0.0, 0.0]]}, (1, 2), "not all 0"),
        ({"class_weights": "antithetic", "orders": [[0, 1, 2]]}, (4, 3), "has 1 orders: L=4 needs 2"),
        ({"class_weights": "antithetic", "orders": [[0, 1], [1, 0]]}, (2, 2), "has 2 orders: L=2 needs 1"),
        ({"class_weights": "antithetic", "orders": []}, (1, 2), "has 0 orders: L=1 needs 1"),
        (
            {"class_weights": "antithetic", "orders": [[0, 1, 1]]},
            (2, 3),
            "has [0, 1, 1]: give each of the classes 0..2",
        ),
        ({"class_weights": "antithetic", "orders": [[1, 2, 3]]}, (2, 3), "give each of the classes 0..2 once"),
    ],
)
def test_what_does_not_fit_is_refused(settings, size, message):
    """Without a size: as soon as it is made."""
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassWeights(**settings).table(*size)


# --- in a training --------------------------------------------------------------------------------------------------


def weighted(nets, weights, batches=3, **settings):
    module = MixtureTraining(
        Mixture(copy.deepcopy(nets)),
        ThreatModel("linf", 0.1),
        class_weights=weights,
        attack=PGD(2),
        kind="shared",
        optimizer=partial(SGD, lr=0.1),
        scheduler=constant,
        **{"solver": OracleSubgradient(3), "T_theta": 2, **settings},
    )
    trainer = pl.Trainer(max_epochs=1, **QUIET, limit_train_batches=batches, limit_val_batches=0)
    trainer.fit(module, datamodule=digits_module(classes=[1, 5, 7]))
    return module


def members(count=2):
    return untrained_members(count, num_classes=3, mean=(0.3,), std=(0.4,))


def test_weights_of_one_are_none():
    """The weights phase comes at t = 3."""
    without, ones = weighted(members(), None), weighted(members(), ClassWeights([[1.0] * 3] * 2))
    assert same_tensors(without.state_dict(), ones.state_dict())
    assert same_tensors(weighted(members(), ClassWeights("antithetic", ratio=1.0)).state_dict(), ones.state_dict())
    assert not same_tensors(weighted(members(), ClassWeights("antithetic")).state_dict(), ones.state_dict())


def test_reversed_orders_exchange_the_members():
    one = weighted(members(1) * 1 + [copy.deepcopy(members(1)[0])], ClassWeights("antithetic", orders=[[2, 0, 1]]))
    other = weighted(members(1) * 1 + [copy.deepcopy(members(1)[0])], ClassWeights("antithetic", orders=[[1, 0, 2]]))
    assert same_tensors(one.mixture.members[0].state_dict(), other.mixture.members[1].state_dict())
    assert same_tensors(one.mixture.members[1].state_dict(), other.mixture.members[0].state_dict())
    assert not same_tensors(one.mixture.members[0].state_dict(), one.mixture.members[1].state_dict())


@dataclass(frozen=True)
class Noting(OracleSubgradient):
    """Notes the images, labels and losses at the images of every game that it solves."""

    games: list = field(default_factory=list)

    def solve(self, game, lam0=None, generator=None):
        self.games.append((game.x, game.y, game.known().losses[:, 0]))
        return super().solve(game, lam0=lam0, generator=generator)


def test_lambda_does_not_see_the_weights():
    """The payoff at the images themselves; the last batch is the weights phase, so the members are still those."""
    solver = Noting(2)
    module = weighted(members(), ClassWeights([[0.0, 2.0, 1.0], [1.0, 3.0, 0.5]]), solver=solver)
    ((x, y, losses),) = solver.games
    for k, member in enumerate(module.mixture.members):
        with torch.no_grad():
            logits = member.eval()(x)
        torch.testing.assert_close(losses[:, k], F.cross_entropy(logits, y, reduction="none").double())


def test_twice_the_weights_are_a_step_of_twice_the_length():
    """Of the whole outer loss, both terms of TRADES."""
    nets = members()
    steps = []
    for row in ([0.0, 1.0, 0.5], [0.0, 2.0, 1.0]):
        module = weighted(nets, ClassWeights([row, [1.0] * 3]), batches=1, loss=TRADES(2.0))
        after = module.mixture.members[0].parameters()
        steps.append([new - old for new, old in zip(after, nets[0].parameters(), strict=True)])
    for once, twice in zip(*steps, strict=True):
        assert once.abs().max() > 1e-4
        torch.testing.assert_close(twice, 2 * once, atol=1e-6, rtol=0)


def test_a_table_for_other_classes_is_refused_before_the_first_batch():
    with pytest.raises(UserError, match="give 2 rows, one for each member, of 3 numbers"):
        weighted(members(), ClassWeights([[1.0, 1.0]] * 2))


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_single_model_beside_the_mixture_takes_the_first_row(command, tmp_path):
    rows = "[[1,2,0.5],[0.5,1,2]]"
    small = (*TINY, "data.num_train=60", "data.classes=[1,5,7]", "trainer.max_epochs=1", "protocol.diagnosed=0")
    done = command(*small, f"loss.class_weights={rows}", "baseline=true", "name=own")
    assert done.rc == 0, done.err
    path = tmp_path / "outputs" / "train" / "own"
    assert read_results(path)["config"]["loss"]["class_weights"] == [[1, 2, 0.5], [0.5, 1, 2]]
    assert read_results(path / "baseline")["config"]["loss"]["class_weights"] == [[1, 2, 0.5]]
    assert "is done" in command(*small, f"loss.class_weights={rows}", "baseline=true", "name=own").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loss.class_weights=antithetic L=3", "loss.class_weights=antithetic gives each order of the classes"),
        ("loss.class_weights=balanced", "loss.class_weights=balanced is unknown: choose null, antithetic or a table"),
        ("loss.class_weights=[[1,2]] L=1", "loss.class_weights has rows of [2] numbers: give 1 rows"),
        ("loss.class_weights=3", "loss.class_weights=3 must be"),
        ("loss.class_weights=antithetic loss.ratio=-1", "loss.ratio=-1 must be positive"),
        ("loss.class_weights=antithetic loss.ratio=big", "loss.ratio=big must be a number"),
        ("loss.orders=[[0,1]]", "loss.orders belong to class_weights=antithetic"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(command, tmp_path, words, said):
    assert command(*TINY, *words.split(), "name=refused").refusal().startswith(said)
    assert not (tmp_path / "outputs" / "train" / "refused" / "config.yaml").exists()


def test_a_loss_of_ones_own_may_not_take_a_key_of_the_group(command, own_modules):
    (own_modules / "taken_names.py").write_text(
        "from mixadv.losses import AT\n\nclass Ratio(AT):\n    def __init__(self, ratio=2.0):\n        pass\n"
    )
    said = command(*TINY, "loss._target_=taken_names.Ratio").refusal()
    assert said.startswith("loss._target_=taken_names.Ratio has an argument ratio, a key of the group loss: rename it")
