"""Random crops and horizontal flips of a whole batch at once."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def random_crop_flip(x: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Shift every image by up to `padding` pixels and mirror it left to right with probability 1/2.

    With P the images surrounded by `padding` zeros on each side, offsets r, c uniform on {0, ..., 2 padding} and a
    fair coin s per image, the result is out[b, :, i, j] = P[b, :, r_b + i, c_b + j']. With `flip` and s_b = 1,
    j' = W - 1 - j, else j' = j. This is the usual CIFAR augmentation (He et al. 2016, section 4.2).

    Args:
        x: images [B, C, H, W], any dtype; the result has the same shape, dtype and device.
        padding: zeros on each side, >= 0; 0 switches the crop off.
        flip: whether images are mirrored.
        generator: source of all randomness. The numbers are drawn on its device, so that a CPU generator gives the
            same crops on every device. None uses torch's global generator.
    """
    if padding == 0 and not flip:
        return x
    count, channels, height, width = x.shape
    source = torch.device("cpu") if generator is None else generator.device
    rows = torch.arange(height, device=x.device).expand(count, height)
    columns = torch.arange(width, device=x.device).expand(count, width)
    if padding:
        offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, device=source)
        offsets = offsets.to(x.device)
    if flip:
        mirrored = torch.randint(0, 2, (count, 1), generator=generator, device=source).to(x.device).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    if padding:
        x = pad(x, (padding, padding, padding, padding))
        rows, columns = rows + offsets[0], columns + offsets[1]
    images = torch.arange(count, device=x.device).view(-1, 1, 1, 1)
    planes = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return x[images, planes, rows[:, None, :, None], columns[:, None, None, :]]
