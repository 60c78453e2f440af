"""The vote of members by counting, and exact worst cases of the vote of linear members, in numpy and scipy alone."""

import itertools

import numpy as np
from scipy.optimize import linprog


def vote_by_counting(answers, lam, threshold=None):
    """The vote where the members give `answers` [L]: by a list of voices for each class."""
    if threshold is not None:
        return int(sum(weight for weight, answer in zip(lam, answers, strict=True) if answer == 1) > threshold)
    voices = {}
    for weight, answer in zip(lam, answers, strict=True):
        voices[answer] = voices.get(answer, 0) + weight
    most = max(voices.values())
    # Of members with equal weights the first one decides a tie.
    for k in sorted(range(len(lam)), key=lambda k: (-lam[k], k)):
        if voices[answers[k]] > most - 1e-9:
            return answers[k]
    raise AssertionError("some class has the most voices")


def vote_stands(W, b, y, x, eps, lam, threshold=None, depth=1e-3):
    """Whether no point of the linf ball and the box turns the vote away from y: a linear program for each joint answer.

    Member k has the logits W_k x' + b_k; it answers with class c where its logit of c is above all others by
    depth * eps * ||difference of the rows||_1, so that nothing hangs on rounding.

    Args:
        W: [L, C, d]; b: [L, C]; y: a label; x: [d]; lam: [L].
    """
    box = list(zip(np.maximum(-eps, -x), np.minimum(eps, 1 - x), strict=True))
    L, C = b.shape
    for answers in itertools.product(range(C), repeat=L):
        if vote_by_counting(answers, lam, threshold) == y:
            continue
        rows, limits = [], []
        for k, c in enumerate(answers):
            for other in set(range(C)) - {c}:
                row = W[k, other] - W[k, c]
                rows.append(row)
                limits.append(-(row @ x + b[k, other] - b[k, c]) - depth * eps * np.abs(row).sum())
        if linprog(np.zeros(len(x)), A_ub=np.array(rows), b_ub=np.array(limits), bounds=box).status == 0:
            return False
    return True
