"""Slow, obvious counterparts of the mathematics wing, in numpy, scipy and decimals."""

from __future__ import annotations

import itertools
from decimal import Decimal, localcontext

import numpy as np
import torch
from scipy.optimize import linprog, minimize


def best_value(losses, lam, masses=None, mask=None):
    """R(lam), by loops over examples, perturbations and members."""
    n, m, members = losses.shape
    total = 0.0
    for i in range(n):
        scores = [
            sum(float(lam[k]) * float(losses[i, j, k]) for k in range(members))
            for j in range(m)
            if mask is None or mask[i, j]
        ]
        total += (1 / n if masses is None else float(masses[i])) * max(scores)
    return total


def full_linear_program(losses, masses=None, mask=None):
    """V, lam and the attacker's Q [N, m]: the linear program with a row per example and perturbation."""
    n, m, members = losses.shape
    masses = np.full(n, 1 / n) if masses is None else np.asarray(masses, dtype=float)
    allowed = np.ones((n, m), dtype=bool) if mask is None else np.asarray(mask)
    pairs = [(i, j) for i, j in itertools.product(range(n), range(m)) if allowed[i, j]]
    rows = np.zeros((len(pairs), members + n))
    for row, (i, j) in zip(rows, pairs, strict=True):
        row[:members] = losses[i, j]
        row[members + i] = -1
    found = linprog(
        np.concatenate([np.zeros(members), masses]),
        A_ub=rows,
        b_ub=np.zeros(len(pairs)),
        A_eq=np.concatenate([np.ones(members), np.zeros(n)])[None],
        b_eq=[1.0],
        bounds=[(0, None)] * members + [(None, None)] * n,
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert found.status == 0
    attack = np.zeros((n, m))
    for (i, j), dual in zip(pairs, -found.ineqlin.marginals, strict=True):
        attack[i, j] = max(dual, 0.0)
    attack *= (masses / attack.sum(1))[:, None]
    return found.fun, found.x[:members], attack


def smoothed_value_in_decimals(losses, lam, alphas, masses=None, mask=None):
    """F(lam) with fifty digits."""
    n, m, members = losses.shape
    with localcontext() as context:
        context.prec = 50
        total = Decimal(0)
        for i in range(n):
            js = [j for j in range(m) if mask is None or mask[i, j]]
            scores = [sum(Decimal(float(lam[k])) * Decimal(float(losses[i, j, k])) for k in range(members)) for j in js]
            alpha, peak = Decimal(float(alphas[i])), max(scores)
            mean = sum(((s - peak) / alpha).exp() for s in scores) / len(js)
            mass = 1 / Decimal(n) if masses is None else Decimal(float(masses[i]))
            total += mass * (peak + alpha * mean.ln())
        return float(total)


def smoothed_minimum(losses, alpha):
    """min F over the simplex and the minimiser, by scipy's SLSQP from several starts."""
    n, _, members = losses.shape

    def value_and_gradient(lam):
        scores = losses @ lam / alpha
        peak = scores.max(1, keepdims=True)
        expo = np.exp(scores - peak)
        value = (alpha * (peak[:, 0] + np.log(expo.mean(1)))).mean()
        weights = expo / expo.sum(1, keepdims=True)
        return value, np.einsum("nm,nmk->k", weights, losses) / n

    best = None
    for start in [np.full(members, 1 / members), *np.eye(members)]:
        found = minimize(
            value_and_gradient,
            start,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * members,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones_like(x)},
            options={"ftol": 1e-16, "maxiter": 1000},
        )
        lam = np.clip(found.x, 0, None)
        lam /= lam.sum()
        value = value_and_gradient(lam)[0]
        if best is None or value < best[0]:
            best = (value, lam)
    return best


def project_by_supports(v):
    """The projection onto the simplex by trying every support."""
    v = np.asarray(v, dtype=float)
    best = None
    for size in range(1, len(v) + 1):
        for support in map(list, itertools.combinations(range(len(v)), size)):
            lam = np.zeros_like(v)
            lam[support] = v[support] - (v[support].sum() - 1) / size
            if lam.min() >= 0:
                distance = ((lam - v) ** 2).sum()
                if best is None or distance < best[0]:
                    best = (distance, lam)
    return best[1]


def random_losses(n=5, m=4, members=3, seed=0, dtype=torch.float64):
    """Asymmetric losses [N, m, L]: every member has a level of its own."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randn(n, m, members, generator=generator, dtype=torch.float64)
    return (losses + 0.2 * torch.arange(members)).to(dtype)


def motivating_example():
    """Losses [3, 3, 2] and masses of two threshold classifiers on the line, eps = 1/2.

    Labels -1 at 0 (mass 1/2) and +1 at -1 and at 1 (1/4 each); f1 says +1 iff x <= -1/2, f2 iff x >= 1/2.
    """
    points, labels = torch.tensor([0.0, -1.0, 1.0]), torch.tensor([-1, 1, 1])
    moved = points[:, None] + torch.tensor([0.0, -0.5, 0.5])
    predictions = torch.stack([moved <= -0.5, moved >= 0.5], dim=2) * 2 - 1
    return (predictions != labels[:, None, None]), torch.tensor([0.5, 0.25, 0.25])


def dual_linear_program(losses, masses=None, mask=None):
    """D = max over the attacker's strategies Q of min_k sum_ij Q[i, j] l_k(i, j), by a program of its own."""
    n, m, members = losses.shape
    masses = np.full(n, 1 / n) if masses is None else np.asarray(masses, dtype=float)
    allowed = np.ones((n, m), dtype=bool) if mask is None else np.asarray(mask)
    flat = np.where(allowed[..., None], np.asarray(losses, dtype=float), 0.0).reshape(n * m, members)
    found = linprog(
        np.concatenate([np.zeros(n * m), [-1.0]]),
        A_ub=np.concatenate([-flat.T, np.ones((members, 1))], axis=1),
        b_ub=np.zeros(members),
        A_eq=np.concatenate([np.kron(np.eye(n), np.ones(m)), np.zeros((n, 1))], axis=1),
        b_eq=masses,
        bounds=[(0, 1.0 if ok else 0.0) for ok in allowed.reshape(-1)] + [(None, None)],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert found.status == 0
    return -found.fun


def best_pure_attack(losses, masses=None):
    """max over maps i -> j of min_k sum_i mass_i l_k(i, map(i)): every map is tried. Exact on fractions."""
    n, m, members = len(losses), len(losses[0]), len(losses[0][0])
    masses = [1 / n] * n if masses is None else masses
    return max(
        min(sum(masses[i] * losses[i][choice[i]][k] for i in range(n)) for k in range(members))
        for choice in itertools.product(range(m), repeat=n)
    )
