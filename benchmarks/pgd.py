"""PGD-10 on a mixture: ours compiled and plain, a plain eager loop, foolbox (L = 1), and the limit, interleaved.

The limit is the same number of bare forward-backward passes through the compiled members, frozen and in eval mode, with
nothing around them. Ratios are medians over the rounds. Before anything is timed, the attacks are held against the
plain loop: from the same starting points they must reach its mean loss to 1 %.

    python benchmarks/pgd.py [--models preact_resnet20 small_resnet] [--batches 64] [--members 1 2 4] [--repeats 5]
"""

import argparse
import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn import functional as F

from mixadv.attacks.pgd import PGD
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel

STEPS, EPS = 10, 8 / 255
BALL = ThreatModel("linf", EPS)
COLUMNS = {
    "model": "model",
    "batch": "batch",
    "L": "L",
    "limit_ms": "limit ms",
    "ours/limit": "ours/limit",
    "plain/bare": "plain ours/bare eager",
    "loop/ours": "loop/ours",
    "loop/plain": "loop/plain ours",
    "foolbox/ours": "foolbox/ours",
    "spread": "spread",
    "compile_s": "compile s",
}


def plain_loop(mixture: Mixture, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
    """What a research script writes: the expected cross-entropy climbed by sign steps."""
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1) if start is None else start.clone()
    for _ in range(STEPS):
        x_adv.requires_grad_(True)
        loss = sum(w * F.cross_entropy(m(x_adv), y) for w, m in zip(mixture.weights, mixture.members, strict=True))
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + 0.25 * EPS * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def bare_passes(mixture: Mixture, x: Tensor) -> None:
    """Forward and backward passes to the input, as many as PGD needs; one member after the other."""
    for _ in range(STEPS):
        for member in mixture.members:
            leaf = x.detach().requires_grad_(True)
            torch.autograd.grad(member(leaf).sum(), leaf)


def foolbox_pgd(mixture: Mixture, x: Tensor, y: Tensor) -> Tensor:
    """foolbox's LinfPGD on the first member."""
    import foolbox

    model = foolbox.PyTorchModel(mixture.members[0], bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=STEPS)
    return attack(model, x, y, epsilons=EPS)[1]


@torch.no_grad()
def mean_loss(mixture: Mixture, x: Tensor, y: Tensor) -> float:
    """Mean expected cross-entropy, by the definition."""
    losses = [F.cross_entropy(member(x), y) for member in mixture.members]
    return float(sum(w * loss for w, loss in zip(mixture.weights, losses, strict=True)))


def problem(model: str, num_members: int, batch: int, device: torch.device) -> tuple[Mixture, Tensor, Tensor]:
    """A mixture of random members of unequal weights, frozen and in eval mode, and a batch of random images."""
    torch.manual_seed(0)
    members = [build_member(model, num_classes=10, image_shape=(3, 32, 32)) for _ in range(num_members)]
    weights = torch.arange(1, num_members + 1).double()
    mixture = Mixture(members, weights / weights.sum()).to(device).eval().requires_grad_(False)
    return mixture, torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)


def check(losses: dict[str, float], clean: float) -> None:
    """Refuse to time an attack that does not do its work: its loss to 1 %, and its rise to a tenth."""
    loop = losses["loop"]
    if loop <= clean:
        raise SystemExit(f"the plain loop leads from a loss of {clean:.4f} to {loop:.4f}: no attack")
    for name, loss in losses.items():
        if abs(loss - loop) > 0.01 * loop or abs(loss - loop) > 0.1 * (loop - clean):
            raise SystemExit(f"{name} reaches a mean loss of {loss:.4f} from {clean:.4f}, the plain loop {loop:.4f}")


def measure(model: str, num_members: int, batch: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """One row: seconds of all runs, and their ratios."""
    torch.compiler.reset()
    plain, x, y = problem(model, num_members, batch, device)
    # As a script has it: in PyTorch's own layout of weights.
    script = copy.deepcopy(plain).requires_grad_(True).to(memory_format=torch.contiguous_format)
    compiled = copy.deepcopy(plain)
    compiled.compile()
    attack, generator = PGD(STEPS, keep="last"), torch.Generator(device).manual_seed(0)

    start = BALL.sample(x, torch.Generator(device).manual_seed(1))
    first = harness.seconds(lambda: attack(compiled, x, y, BALL, start_at=start), device)
    again = harness.seconds(lambda: attack(compiled, x, y, BALL, start_at=start), device)
    points = {
        "loop": plain_loop(script, x, y, start),
        "ours": attack(compiled, x, y, BALL, start_at=start),
        "plain": attack(plain, x, y, BALL, start_at=start),
    }
    losses = {name: mean_loss(plain, found, y) for name, found in points.items()}
    clean = mean_loss(plain, x, y)
    check(losses, clean)
    runs: dict[str, Callable[[], object]] = {
        "limit": lambda: bare_passes(compiled, x),
        "ours": lambda: attack(compiled, x, y, BALL, generator),
        "bare": lambda: bare_passes(plain, x),
        "plain": lambda: attack(plain, x, y, BALL, generator),
        "loop": lambda: plain_loop(script, x, y),
    }
    if num_members == 1:
        runs["foolbox"] = lambda: foolbox_pgd(script, x, y)
    times = harness.interleaved(runs, repeats, warmup=1, synchronize=device)
    found = harness.summary(times)
    pairs = (("ours", "limit"), ("plain", "bare"), ("loop", "ours"), ("loop", "plain"), ("foolbox", "ours"))
    return {
        "model": model,
        "batch": batch,
        "L": num_members,
        "limit_ms": 1e3 * found["limit"]["median"],
        **{f"{a}/{b}": harness.paired_ratio(times, a, b) if a in times else None for a, b in pairs},
        "spread": max(one["spread"] for one in found.values()),
        "compile_s": first - again,
        "clean_loss": clean,
        "losses": losses,
        "times": times,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["preact_resnet20", "small_resnet", "small_cnn"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small networks, batch 32, L = 1 and 2, 3 repeats")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.quick:
        args.models, args.batches, args.members, args.repeats = ["small_resnet", "small_cnn"], [32], [1, 2], 3
    warnings.filterwarnings("ignore", module="foolbox|eagerpy")
    print(f"PGD-{STEPS}, 3x32x32: {harness.describe()}, {args.repeats} rounds", flush=True)
    rows = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        # Seconds of compilation are those of a first run; later L of a model and batch size find its kernels.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for model in args.models:
            for batch in args.batches:
                for num_members in args.members:
                    rows.append(measure(model, num_members, batch, args.repeats, torch.device(args.device)))
                    print(f"{model}, batch {batch}, L={num_members}: {time.perf_counter() - started:.0f} s so far")
    harness.table(rows, COLUMNS)
    harness.save("pgd", rows, vars(args))


if __name__ == "__main__":
    main()
