"""Stratified subsets and pixel statistics, the same on every machine."""

import hashlib

import torch
from torch import Tensor


def stratified_subset(labels: Tensor, size: int, seed: int | str) -> Tensor:
    """Indices (ascending, long [size]) of a subset in which every class keeps its share.

    Class c with N_c of N examples gets floor(size N_c / N) of them; the remaining places go to the largest remainders
    (Hamilton's method; ties to the smaller label). Within a class the examples with the smallest BLAKE2b(seed, index)
    are taken. So the subset does not depend on the version of a random generator, and for one seed a class with a
    larger quota keeps the examples of a smaller one.

    Args:
        labels: long [N].
        size: 0 <= size <= N.
        seed: decides which examples are chosen.

    Raises:
        ValueError: size is outside 0..N.
    """
    total = len(labels)
    if not 0 <= size <= total:
        raise ValueError(f"a subset of {size} out of {total} examples does not exist")
    classes, counts = labels.unique(return_counts=True)
    quota, remainder = (size * counts).div(total, rounding_mode="floor"), size * counts % total
    quota[remainder.argsort(descending=True, stable=True)[: size - int(quota.sum())]] += 1

    def rank(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()

    chosen: list[int] = []
    for label, count in zip(classes, quota.tolist(), strict=True):
        chosen += sorted((labels == label).nonzero().flatten().tolist(), key=rank)[:count]
    return torch.tensor(sorted(chosen), dtype=torch.long)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation of each channel of x = uint8 / 255, from exact histograms.

    A constant channel gets deviation 1, so that (x - mean) / std is 0 there.

    Args:
        images: uint8 [N, C, H, W], N >= 1.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        histogram = torch.bincount(images[:, channel].flatten(), minlength=256).to(torch.float64)
        shares = histogram / histogram.sum()
        mean = float(shares @ values)
        deviation = float((shares @ (values - mean) ** 2).sqrt())
        means.append(mean)
        # For a constant channel the formula gives rounding noise of about 1e-17, not an exact zero.
        deviations.append(deviation if int((histogram > 0).sum()) > 1 else 1.0)
    return tuple(means), tuple(deviations)
