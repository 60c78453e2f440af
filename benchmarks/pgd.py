"""PGD-10 on a mixture: ours, a plain eager loop, foolbox (L = 1), and the limit, interleaved in one run.

The limit is the same number of bare forward-backward passes through the members, with nothing around them. Prints
a table of medians over the repeats, as ratios to the limit, and the spread (largest over smallest repeat).

    python benchmarks/pgd.py [--model small_resnet] [--batch 64] [--members 1 2 4] [--repeats 5]
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mixadv.attacks.pgd import PGD
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel

STEPS, EPS = 10, 8 / 255


def plain_loop(mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
    """What a research script writes: the expected cross-entropy climbed by sign steps."""
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_(True)
        loss = sum(w * F.cross_entropy(m(x_adv), y) for w, m in zip(mixture.weights, mixture.members, strict=True))
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + 0.25 * EPS * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def bare_passes(mixture: Mixture, x: Tensor, y: Tensor) -> None:
    """Forward and backward passes to the input, as many as PGD needs."""
    for _ in range(STEPS):
        leaf = x.detach().requires_grad_(True)
        torch.autograd.grad(sum(member(leaf).sum() for member in mixture.members), leaf)


def foolbox_pgd(mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
    """foolbox's LinfPGD on the first member."""
    import foolbox

    model = foolbox.PyTorchModel(mixture.members[0], bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=STEPS)
    return attack(model, x, y, epsilons=EPS)[1]


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small_resnet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="foolbox|eagerpy")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"PGD-{STEPS}, {args.model}, batch {args.batch}, 32x32, {name}, torch {torch.__version__}")
    print(f"{'L':>2} {'limit ms':>9} {'ours':>6} {'eager loop':>11} {'foolbox':>8}   (ratios to the limit; spread)")
    for num_members in args.members:
        torch.manual_seed(0)
        members = [build_member(args.model, num_classes=10, image_shape=(3, 32, 32)) for _ in range(num_members)]
        mixture = Mixture(members).to(device).eval().requires_grad_(False)
        x = torch.rand(args.batch, 3, 32, 32, device=device)
        y = torch.randint(10, (args.batch,), device=device)
        attack = PGD(num_steps=STEPS, keep="last")
        generator = torch.Generator(device).manual_seed(0)
        runs: dict[str, Callable[[], object]] = {
            "limit": lambda m=mixture, x=x, y=y: bare_passes(m, x, y),
            "ours": lambda a=attack, m=mixture, x=x, y=y, g=generator: a(m, x, y, ThreatModel("linf", EPS), g),
            "eager loop": lambda m=mixture, x=x, y=y: plain_loop(m, x, y),
        }
        if num_members == 1:
            runs["foolbox"] = lambda m=mixture, x=x, y=y: foolbox_pgd(m, x, y)
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name].append(seconds(run, device))
        medians = {name: statistics.median(values) for name, values in times.items()}
        spread = max(max(values) / min(values) for values in times.values())
        cells = [
            f"{medians[name] / medians['limit']:.2f}" if name in medians else "-" for name in runs if name != "limit"
        ]
        cells += ["-"] * (3 - len(cells))
        print(
            f"{num_members:>2} {1e3 * medians['limit']:>9.1f} {cells[0]:>6} {cells[1]:>11} {cells[2]:>8}   {spread:.2f}"
        )


if __name__ == "__main__":
    main()
