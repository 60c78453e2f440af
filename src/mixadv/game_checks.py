"""What a finite game demands of its tensors; each message names the first offending index and the remedy."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def checked_losses(losses: Tensor) -> Tensor:
    """Losses [N, m, L], real, without an empty dimension."""
    shape = list(losses.shape)
    if losses.ndim != 3:
        raise ValueError(f"losses must be [examples, perturbations, members], got shape {shape}")
    for size, what in zip(shape, ("examples", "perturbations", "members"), strict=True):
        if size == 0:
            raise ValueError(f"losses of shape {shape} hold no {what}: each dimension needs one or more")
    if losses.is_complex():
        raise ValueError(f"losses must be real, got dtype {losses.dtype}")
    return losses


def checked_mask(mask: Tensor, losses: Tensor) -> Tensor:
    """A bool mask [N, m] beside the losses, with something allowed for every example."""
    shape = losses.shape[:2]
    if mask.shape != shape or mask.dtype != torch.bool:
        got = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"mask must be torch.bool {list(shape)}, True where allowed, got {got}")
    mask = mask.to(losses.device)
    if empty := _first(~mask.any(1)):
        raise ValueError(f"example {empty[0]} is fully masked: allow a perturbation, such as none at all")
    return mask


def checked_masses(masses: Tensor | None, losses: Tensor) -> Tensor:
    """Probabilities [N] in float64 beside the losses, 1/N by default, their rounding error divided away."""
    n, device = len(losses), losses.device
    if masses is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64, device=device)
    if masses.shape != (n,):
        raise ValueError(f"masses must be [{n}], one per example, got shape {list(masses.shape)}")
    masses = masses.detach().to(device, torch.float64)
    if bad := _first(~(torch.isfinite(masses) & (masses >= 0))):
        raise ValueError(f"masses must be finite and >= 0, but masses{bad} is {masses[bad[0]].item()}")
    total = masses.sum()
    if abs(total.item() - 1.0) > 1e-6:
        raise ValueError(f"masses must sum to 1, got {total.item()}: divide them by their sum")
    return masses / total


def largest_loss(losses: Tensor, first_example: int) -> float:
    """max |l| of a chunk [n, m, L], which begins at `first_example` and is zero where masked."""
    # NaN and infinity survive the maximum, so one number vouches for the whole chunk.
    largest = losses.abs().amax().item()
    if not math.isfinite(largest):
        i, j, k = _first(~torch.isfinite(losses))
        name = f"losses[{first_example + i}, {j}, {k}]"
        raise ValueError(f"{name} is {losses[i, j, k].item()}: losses must be finite, or masked")
    return largest


def checked_attack(attack: Tensor, masses: Tensor, mask: Tensor | None, losses: Tensor) -> Tensor:
    """An attacker's strategy [N, m] >= 0 whose rows sum to the masses, zero on masked perturbations."""
    shape = losses.shape[:2]
    if attack.shape != shape:
        raise ValueError(f"attack must be {list(shape)}, got shape {list(attack.shape)}")
    attack = attack.detach().to(losses.device)
    if bad := _first(~(torch.isfinite(attack) & (attack >= 0))):
        raise ValueError(f"attack must be finite and >= 0, but attack{bad} is {attack[tuple(bad)].item()}")
    if mask is not None and (bad := _first(~mask & (attack > 0))):
        raise ValueError(f"attack{bad} is {attack[tuple(bad)].item()}, but that perturbation is masked")
    sums = attack.sum(1, dtype=torch.float64)
    if bad := _first((sums - masses).abs() > 1e-5 * masses + 1e-12):
        total, mass = sums[bad[0]].item(), masses[bad[0]].item()
        raise ValueError(f"attack{bad} sums to {total}, but the example has mass {mass}: scale the rows to it")
    return attack


def _first(wrong: Tensor) -> list[int]:
    """The index of the first True, or an empty list."""
    return wrong.nonzero()[0].tolist() if bool(wrong.any()) else []
