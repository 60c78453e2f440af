"""What was tried to make a pass through a member faster, kept or not: layouts, graphs, bf16, stacking, convolutions.

A pass is forward and backward to the images, parameters frozen, in eval mode. What is compared is timed in turn;
`gain` is the median over the rounds of the first variant's time over each one's.

    python benchmarks/variants.py [--models small_resnet preact_resnet20] [--batch 64] [--repeats 7]
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from mixadv.models import build_member

CONVOLUTIONS = ((8, 32), (16, 32), (32, 16), (64, 8), (64, 32), (128, 16))
STACKS = (("small_cnn", 64, 3), ("linear", 64, 3), ("linear", 64, 8), ("small_cnn", 16, 8))


def frozen(model: str, shape: tuple[int, ...]) -> nn.Module:
    """A member in PyTorch's own layout of weights."""
    net = build_member(model, num_classes=10, image_shape=shape).to(memory_format=torch.contiguous_format)
    return net.eval().requires_grad_(False)


def one_pass(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, bf16: bool = False) -> Tensor:
    """The gradient of the summed cross-entropy in the images."""
    leaf = x.detach().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = net(leaf)
    (grad,) = torch.autograd.grad(F.cross_entropy(logits.float(), y, reduction="sum"), leaf)
    return grad


def rows_of(part: str, runs: dict[str, Callable[[], object]], repeats: int) -> list[dict[str, Any]]:
    """One row for each run."""
    times = harness.interleaved(runs, repeats, warmup=2)
    first = next(iter(runs))
    return [
        {
            "part": part,
            "variant": name,
            "ms": 1e3 * one["median"],
            "gain": harness.paired_ratio(times, first, name),
            "spread": one["spread"],
        }
        for name, one in harness.summary(times).items()
    ]


def passes(model: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Layout of weights, graphs for one size or any, autocast."""
    torch.compiler.reset()
    plain = frozen(model, (3, 32, 32))
    wide = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    fixed, fixed_wide = (torch.compile(copy.deepcopy(net)) for net in (plain, wide))
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    any_size = torch.compile(copy.deepcopy(plain), dynamic=True)
    runs = {
        "eager": lambda: one_pass(plain, x, y),
        "eager, channels_last": lambda: one_pass(wide, x, y),
        "compiled": lambda: one_pass(fixed, x, y),
        "compiled, channels_last": lambda: one_pass(fixed_wide, x, y),
        "compiled for any size": lambda: one_pass(any_size, x, y),
        "eager, bf16 autocast": lambda: one_pass(plain, x, y, bf16=True),
    }
    return rows_of(f"{model}, batch {batch}", runs, repeats)


def stacked(model: str, batch: int, count: int, repeats: int) -> list[dict[str, Any]]:
    """Members one after the other, or as one with `torch.func`."""
    shape = (1, 8, 8)
    members = [frozen(model, shape) for _ in range(count)]
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    x, y = torch.rand(batch, *shape), torch.randint(10, (batch,))

    def together() -> Tensor:
        leaf = x.detach().requires_grad_(True)
        logits = vmap(lambda p, b: functional_call(base, (p, b), (leaf,)))(parameters, buffers)
        (grad,) = torch.autograd.grad(sum(F.cross_entropy(z, y, reduction="sum") for z in logits), leaf)
        return grad

    def in_turn() -> Tensor:
        return torch.stack([one_pass(member, x, y) for member in members]).sum(0)

    torch.testing.assert_close(together(), in_turn(), rtol=1e-3, atol=1e-4)
    return rows_of(f"{count} {model}, 8x8, batch {batch}", {"in turn": in_turn, "stacked": together}, 4 * repeats)


def convolution(channels: int, size: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """The backward pass of a 3x3 convolution to its input, by PyTorch and as a forward convolution."""
    wide = torch.channels_last
    x = torch.randn(batch, channels, size, size).to(memory_format=wide)
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=wide)

    def backward() -> Tensor:
        return torch.nn.grad.conv2d_input(x.shape, weight, x, padding=1)

    def forward() -> Tensor:
        return F.conv2d(x, weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=wide), padding=1)

    torch.testing.assert_close(backward(), forward(), rtol=1e-3, atol=1e-2)
    runs = {"backward": backward, "as a forward convolution": forward}
    return rows_of(f"convolution of {channels} channels, {size}x{size}", runs, 4 * repeats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small_resnet", "preact_resnet20"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(harness.describe(), flush=True)
    torch.manual_seed(0)
    rows = [row for channels, size in CONVOLUTIONS for row in convolution(channels, size, args.batch, args.repeats)]
    rows += [row for setting in STACKS for row in stacked(*setting, args.repeats)]
    for model in args.models:
        rows += passes(model, args.batch, args.repeats)
    harness.table(rows)
    harness.save("variants", rows, vars(args))


if __name__ == "__main__":
    main()
