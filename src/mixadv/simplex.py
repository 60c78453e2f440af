"""The probability simplex {lam in R^L : lam_k >= 0, sum_k lam_k = 1}, the set of a mixture's weights."""

from __future__ import annotations

import torch
from torch import Tensor


def project_simplex(v: Tensor) -> Tensor:
    """Euclidean projection onto the simplex: argmin over lam of ||lam - v||_2, for every row of v.

    The minimiser is lam_k = max(v_k - tau, 0) with the tau for which the entries sum to 1; sorting each row finds
    tau in O(L log L) (Held, Wolfe, Crowder, 1974; Duchi et al., ICML 2008, figure 1). The projection does not change
    when a constant is added to a row.

    Args:
        v: [..., L], L >= 1, finite.

    Returns:
        [..., L]: non-negative rows that sum to 1 up to rounding, in the dtype of v (float64 for integers). The
        arithmetic is float64.

    Raises:
        ValueError: v has no last dimension, L = 0, v is complex, or an entry is NaN or infinite.
    """
    if v.ndim == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"cannot project a tensor of shape {list(v.shape)}: the last dimension must hold L >= 1 entries"
        )
    if v.is_complex():
        raise ValueError(f"cannot project a tensor of dtype {v.dtype}: its entries must be real")
    finite = torch.isfinite(v)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise ValueError(f"cannot project onto the simplex: v{index} is {v[tuple(index)].item()}")
    wide = v.to(torch.float64)
    # With the row's maximum shifted to 0 the support lies in (-1, 0], so that rows of size 1e9 lose no digits.
    shifted = wide - wide.amax(-1, keepdim=True)
    ordered = shifted.sort(-1, descending=True).values
    sizes = torch.arange(1, v.shape[-1] + 1, dtype=torch.float64, device=v.device)
    thresholds = (ordered.cumsum(-1) - 1.0) / sizes
    support = (ordered > thresholds).sum(-1, keepdim=True)
    tau = thresholds.gather(-1, support - 1)
    return (shifted - tau).clamp(min=0.0).to(v.dtype if v.is_floating_point() else torch.float64)


def uniform(num_members: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """The weights lam_k = 1/L, [L].

    Raises:
        ValueError: fewer than one member.
    """
    if num_members < 1:
        raise ValueError(f"uniform weights need at least one member, got {num_members}")
    return torch.full((num_members,), 1.0 / num_members, dtype=dtype, device=device)


def is_distribution(lam: Tensor, atol: float = 1e-6) -> bool:
    """Whether every row of lam [..., L] is on the simplex: lam_k >= -atol and |sum_k lam_k - 1| <= atol.

    Tensors without a last dimension, with L = 0, or with NaN or infinite entries are not distributions.
    """
    if lam.ndim == 0 or lam.shape[-1] == 0 or lam.is_complex():
        return False
    wide = lam.detach().to(torch.float64)
    # Written so that NaN fails both comparisons.
    return bool((wide >= -atol).all()) and bool(((wide.sum(-1) - 1.0).abs() <= atol).all())
