"""The vote of a mixture's members, against counting; and the attack on it, against linear programs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mixadv.attacks import PGD
from mixadv.evaluation import evaluate
from mixadv.evaluation.vote_attack import VoteAttack
from mixadv.mixture import Mixture
from mixadv.threat_model import ThreatModel
from mixadv.vote import Vote
from oracles_vote import vote_by_counting, vote_stands


@pytest.mark.parametrize(
    "lam",
    [(0.5, 0.2, 0.3), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.1, 0.3, 0.2, 0.3), (0.25, 0.5, 0.25), (0.0, 0.4, 0.6), (1.0,)],
)
@pytest.mark.parametrize("threshold", [None, 0.15, 0.5, 0.77])
def test_the_vote_is_that_of_counting(lam: tuple[float, ...], threshold: float | None) -> None:
    classes = range(4 if threshold is None else 2)
    patterns = list(itertools.product(classes, repeat=len(lam)))
    found = Vote(lam, threshold).of(torch.tensor(patterns).T).tolist()
    assert found == [vote_by_counting(pattern, lam, threshold) for pattern in patterns]


def test_with_two_members_or_a_majority_the_heaviest_member_decides() -> None:
    answers = torch.tensor(list(itertools.product(range(3), repeat=2))).T
    assert torch.equal(Vote((0.5, 0.5)).of(answers), answers[0])
    assert torch.equal(Vote((0.4, 0.6)).of(answers), answers[1])
    three = torch.tensor(list(itertools.product(range(3), repeat=3))).T
    assert torch.equal(Vote((0.2, 0.2, 0.6)).of(three), three[2])


@pytest.mark.parametrize("hole", [float("nan"), float("inf"), -float("inf")])
def test_a_member_without_an_answer_votes_for_no_class(hole: float) -> None:
    logits = torch.zeros(3, 2, 2)
    logits[:, :, 1] = 1.0
    logits[0, 0, 0] = hole
    assert Vote((0.6, 0.2, 0.2))(logits).tolist() == [-1, 1]
    assert Vote((0.2, 0.4, 0.4))(logits).tolist() == [1, 1]
    # 0.8 for class 1 and 0 for class 0: neither reaches its part.
    assert Vote((0.2, 0.4, 0.4), threshold=0.9)(logits).tolist() == [-1, 1]


# --- the attack --------------------------------------------------------------------------------------------


class Linear:
    """L linear members around common ones; N labelled points; whether the vote can be turned there."""

    def __init__(self, L: int, C: int, d: int, eps: float, seed: int, threshold: float | None = None) -> None:
        g = np.random.default_rng(seed)
        centre = g.normal(size=(C, d))
        self.W = centre + 0.9 * g.normal(size=(L, C, d))
        self.b = -(self.W @ np.full(d, 0.5)) + 0.1 * g.normal(size=(L, C))
        # Logits of unlike size, as members of unlike training have them.
        size = 10.0 ** g.uniform(-1, 1, size=L)
        self.W, self.b = self.W * size[:, None, None], self.b * size[:, None]
        lam = g.uniform(0.5, 1.5, size=L)
        self.x = torch.tensor(g.uniform(size=(40, d)))
        self.y = torch.tensor((self.x.numpy() - 0.5) @ centre.T).argmax(1)
        self.mixture = Mixture([affine(w, c) for w, c in zip(self.W, self.b, strict=True)], lam / lam.sum())
        self.vote = Vote(tuple(self.mixture.weights.tolist()), threshold)
        self.ball = ThreatModel("linf", eps)
        self.stands = np.array(
            [
                vote_stands(self.W, self.b, int(y), x.numpy(), eps, self.vote.weights, threshold)
                for x, y in zip(self.x, self.y, strict=True)
            ]
        )

    def right(self, points: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            logits = self.mixture.member_logits(points)
        answers = logits.argmax(-1).T.tolist()
        return np.array(
            [
                vote_by_counting(each, self.vote.weights, self.vote.threshold) == y
                for each, y in zip(answers, self.y.tolist(), strict=True)
            ]
        )


def affine(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(weight))
        made.bias.copy_(torch.tensor(bias))
    return made


PROBLEMS = [(3, 3, 12, 0.06, 0, None), (3, 4, 20, 0.05, 1, None), (4, 3, 16, 0.06, 2, None), (3, 2, 16, 0.05, 3, 0.3)]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_attack_turns_nearly_every_vote_that_can_be_turned(problem) -> None:
    linear = Linear(*problem)
    points = VoteAttack(linear.vote.threshold)(
        linear.mixture, linear.x, linear.y, linear.ball, torch.Generator().manual_seed(0)
    )
    assert linear.ball.contains(points, linear.x).all()
    right = linear.right(points)
    # Some votes fall and some stand, so that the test says something.
    assert 0.1 < linear.stands.mean() < 0.9
    assert (right & ~linear.stands).sum() <= 2
    # Only what hangs on the depth of the oracle may fall beyond it.
    assert (~right & linear.stands).sum() <= 1


def test_an_evaluation_asks_the_vote_at_every_point_of_every_pass() -> None:
    linear = Linear(*PROBLEMS[1])
    batches = list(zip(linear.x.split(16), linear.y.split(16), strict=True))
    attacks = {"pgd-5": PGD(5, restarts=1)}
    record = evaluate(linear.mixture, batches, attacks, linear.ball, vote=linear.vote)
    assert list(record.vote) == ["clean", *record.found]
    assert list(record.found)[-1] == "coalition on vote"
    assert record.attacks == ["pgd-5"]
    assert record.vote["clean"].tolist() == linear.right(linear.x).tolist()
    worst = record.vote_worst_case()
    assert (worst & ~linear.stands).sum() <= 1
    assert (~worst & linear.stands).sum() <= 1
    # The points against the vote count for everybody: no vote falls without a member that is wrong.
    assert (worst[record.worst_case() == 1]).all()
    # The other passes do not depend on it.
    without = evaluate(linear.mixture, batches, attacks, linear.ball)
    assert without.vote == {}
    for key, correct in without.found.items():
        assert np.array_equal(correct, record.found[key])


def test_it_begins_at_the_points_that_others_found() -> None:
    linear = Linear(*PROBLEMS[0])
    found = VoteAttack()(linear.mixture, linear.x, linear.y, linear.ball, torch.Generator().manual_seed(0))
    turned = ~linear.right(found)
    again = VoteAttack(num_steps=1, targets=1)(
        linear.mixture, linear.x, linear.y, linear.ball, torch.Generator().manual_seed(1), starts=found
    )
    assert torch.equal(again[turned], found[turned])
    assert turned.any()


class Rounded(nn.Module):
    """A member without a gradient."""

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member = member

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.member(x.detach())


def test_members_without_gradient_vote_but_do_not_pull() -> None:
    linear = Linear(*PROBLEMS[0])
    first, second, third = linear.mixture.members
    stiff = Mixture([Rounded(first), second, third], linear.mixture.weights)
    points = VoteAttack()(stiff, linear.x, linear.y, linear.ball, torch.Generator().manual_seed(0))
    right = linear.right(points)
    assert (~right & linear.stands).sum() <= 1
    assert right.mean() < linear.right(linear.x).mean()
    none = Mixture([Rounded(member) for member in linear.mixture.members])
    assert torch.equal(VoteAttack()(none, linear.x, linear.y, linear.ball), linear.x)
