"""mixadv.simplex against brute force over supports and the conditions of optimality."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixadv.simplex import is_distribution, project_simplex, uniform
from oracles_game import project_by_supports

ROWS = st.integers(1, 6).flatmap(
    lambda size: arrays(np.float64, size, elements=st.floats(-5, 5, allow_subnormal=False))
)


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_projection_is_the_nearest_point_over_all_supports(v):
    projected = project_simplex(torch.from_numpy(v))
    np.testing.assert_allclose(projected.numpy(), project_by_supports(v), atol=1e-13)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.sampled_from([1e-9, 1.0, 1e4, 1e9]))
def test_projection_satisfies_the_conditions_of_optimality(v, scale):
    v = torch.from_numpy(v * scale)
    lam = project_simplex(v)
    assert lam.min() >= 0
    assert abs(lam.sum().item() - 1) <= 1e-15 * len(v) * 4
    # With one multiplier tau: v - lam = tau on the support, and v <= tau off it.
    tau = (v - lam)[lam > 0]
    tolerance = 1e-15 * (10 + 4 * v.abs().max())
    assert tau.max() - tau.min() <= tolerance
    assert (v[lam == 0] <= tau.min() + tolerance).all()


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_projection_is_idempotent_and_ignores_common_shifts(v):
    v = torch.from_numpy(v)
    lam = project_simplex(v)
    torch.testing.assert_close(project_simplex(lam), lam, rtol=0, atol=1e-15)
    torch.testing.assert_close(project_simplex(v + 7.25), lam, rtol=0, atol=1e-14)


def test_projection_of_known_points():
    def projected(*v):
        return project_simplex(torch.tensor(v, dtype=torch.float64)).tolist()

    assert projected(0.5, 0.25, 0.25) == [0.5, 0.25, 0.25]
    assert projected(0.0, 3.0, 1.0) == [0.0, 1.0, 0.0]
    assert projected(2.0, 2.0, -1.0) == [0.5, 0.5, 0.0]
    assert projected(-4.0) == [1.0]
    assert projected(1e9, 1e9 + 0.5, 0.0) == [0.25, 0.75, 0.0]
    assert projected(-1e308, 1e308, 1e308) == [0.0, 0.5, 0.5]
    assert projected(1.0, 0.0, 0.0) == [1.0, 0.0, 0.0]
    np.testing.assert_allclose(projected(0.9, 0.4, -0.2), [0.75, 0.25, 0.0], atol=1e-15)


def test_projection_of_large_rows_keeps_its_digits():
    small = torch.tensor([0.75, 0.125, -0.5, 0.5, 0.0], dtype=torch.float64)
    assert project_simplex(small + 2.0**30).tolist() == project_simplex(small).tolist()


def test_projection_works_on_batches_of_rows_and_leaves_its_input():
    v = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    before = v.clone()
    rows = [project_by_supports(row) for row in v.reshape(-1, 5).numpy()]
    np.testing.assert_allclose(project_simplex(v).reshape(-1, 5).numpy(), rows, atol=1e-14)
    assert torch.equal(v, before)


def test_projection_of_a_thousand_entries_sums_to_one():
    v = torch.linspace(-1e-3, 1e-3, 1001, dtype=torch.float64)
    lam = project_simplex(v)
    assert abs(math.fsum(lam.tolist()) - 1) < 1e-14
    assert (lam > 0).sum() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_projection_keeps_floating_dtypes(dtype):
    lam = project_simplex(torch.tensor([1.5, 1.0, -3.0], dtype=dtype))
    assert lam.dtype == dtype
    assert lam.tolist() == [0.75, 0.25, 0.0]


def test_projection_of_integers_is_float64():
    assert project_simplex(torch.tensor([2, 2, 0])).dtype == torch.float64


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.tensor(1.0), r"shape \[\].*L >= 1"),
        (torch.zeros(2, 0), r"shape \[2, 0\].*L >= 1"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), r"v\[1, 1\] is nan"),
        (torch.tensor([0.0, -math.inf]), r"v\[1\] is -inf"),
        (torch.zeros(2, dtype=torch.complex64), "must be real"),
    ],
)
def test_projection_refuses(v, message):
    with pytest.raises(ValueError, match=message):
        project_simplex(v)


def test_uniform():
    assert uniform(4).tolist() == [0.25] * 4
    assert uniform(4).dtype == torch.float64
    assert uniform(2, dtype=torch.float32, device="cpu").dtype == torch.float32
    with pytest.raises(ValueError, match="at least one member, got 0"):
        uniform(0)


@pytest.mark.parametrize(
    ("lam", "answer"),
    [
        ([0.2, 0.8], True),
        ([[0.2, 0.8], [1.0, 0.0]], True),
        ([[0.2, 0.8], [1.0, 0.1]], False),
        ([1.0], True),
        ([1.1, -0.1], False),
        ([1.0 + 5e-7, -5e-7], True),
        ([0.3, 0.3], False),
        ([math.nan, 1.0], False),
        ([math.inf, 0.0], False),
        ([], False),
    ],
)
def test_is_distribution(lam, answer):
    assert is_distribution(torch.tensor(lam, dtype=torch.float64)) is answer


def test_is_distribution_tolerance():
    lam = torch.tensor([0.5, 0.501])
    assert not is_distribution(lam)
    assert is_distribution(lam, atol=0.01)
    assert not is_distribution(torch.tensor(1.0))
