"""Mixtures of 4, 8 and 16 small networks: the protocols, long runs of the climber, and other libraries.

    python benchmarks/many_members.py --members 4 8 16 --num-examples 60

trains the networks on the digits in seconds, each on half of the images drawn for it: every third one on clean images,
the others on images that PGD attacks. All numbers are mean exact expected accuracies on the same test images, and
lower is stronger. pyautoattack (APGD-CE, APGD-DLR, Square) and foolbox (PGD) attack every member and the averaged twin,
and all of their points are tried on the mixture. The long climber runs once from the images alone, and once from the
worst points of `strict`.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mixadv import Mixture, ThreatModel
from mixadv.attacks import PGD, AttackSuite, LatticeClimber
from mixadv.data.digits import Digits

SLACK = 1e-6


def digits(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and the first `count` test images and labels."""
    data = Digits()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    return data.train_images / 255, data.train_labels, data.test_images[:count] / 255, data.test_labels[:count]


def network(number: int) -> nn.Module:
    """One of four architectures."""
    hidden = 24 + 8 * (number % 3)
    return [
        nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)),
        nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)),
        nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)),
        nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    ][number % 4]


def trained(number: int, x: Tensor, y: Tensor, ball: ThreatModel) -> nn.Module:
    """Member `number`, after 200 batches of 64."""
    torch.manual_seed(number)
    member = network(number)
    mine = torch.randperm(len(x))[: len(x) // 2]
    optimizer = torch.optim.Adam(member.parameters(), 5e-3)
    attack = PGD(4, 0.5, keep="last")
    for _ in range(200):
        batch = mine[torch.randint(len(mine), (64,))]
        points = x[batch] if number % 3 == 0 else attack(member, x[batch], y[batch], ball)
        loss = nn.functional.cross_entropy(member(points), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return member.eval()


class Twin(nn.Module):
    """log sum_k lambda_k softmax(f_k(x)), in float64, where the sum of small numbers is no zero."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.members, self.lam = mixture.members, mixture.weights.double()

    def forward(self, x: Tensor) -> Tensor:
        """Log probabilities, [B, C]."""
        parts = [lam * member(x).double().softmax(-1) for lam, member in zip(self.lam, self.members, strict=True)]
        return torch.stack(parts).sum(0).log().float()


def others(net: nn.Module, x: Tensor, y: Tensor, ball: ThreatModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The points that pyautoattack and foolbox find against one classifier."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zero gradients, and of places that SciPy has moved away from
        import foolbox
        from pyautoattack.autopgd_base import APGDAttack
        from pyautoattack.square import SquareAttack

        common = {"norm": ball.norm.capitalize(), "eps": ball.eps, "device": "cpu", "n_restarts": 1, "seed": seed}
        for loss in ("ce", "dlr"):
            attack = APGDAttack(net, n_iter=100, loss=loss, **common)
            yield "pyautoattack", attack.perturb(x, y)
            # `perturb` gives x itself where nothing was fooled; a point of high loss may fool other members.
            yield "pyautoattack", attack.attack_single_run(x, y)[0]
        yield "pyautoattack", SquareAttack(net, n_queries=1000, **common).perturb(x, y)
        torch.manual_seed(seed)
        kind = foolbox.attacks.LinfPGD if ball.norm == "linf" else foolbox.attacks.L2PGD
        for size in (0.1, 0.25):
            attack = kind(rel_stepsize=size, steps=100, random_start=True)
            yield "foolbox", attack(foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu"), x, y, epsilons=ball.eps)[0]


def measure(mixture: Mixture, x: Tensor, y: Tensor, ball: ThreatModel, steps: int) -> dict[str, tuple[Tensor, float]]:
    """Name -> accuracy of every image, and seconds."""
    rows = {"clean": (mixture.expected_accuracy(x, y), 0.0)}
    strict = x
    for protocol in ("fast", "strict"):
        started = time.perf_counter()
        record = AttackSuite.from_protocol(protocol)(mixture, x, y, ball)
        rows[protocol] = record.expected_accuracy, time.perf_counter() - started
        strict = record.x_adv
    for name, starts in (("climber", None), ("climber from strict", strict)):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(1)
        points = LatticeClimber(num_steps=steps)(mixture, x, y, ball, generator, starts=starts)
        rows[f"{name}, {steps} steps"] = mixture.expected_accuracy(points, y), time.perf_counter() - started
    lowest = dict.fromkeys(("pyautoattack", "foolbox"), rows["clean"][0])
    seconds = dict.fromkeys(lowest, 0.0)
    with mixture.attack_mode():
        for net in [Twin(mixture).eval(), *mixture.members]:
            started = time.perf_counter()
            for name, points in others(net, x, y, ball, seed=0):
                lowest[name] = torch.minimum(lowest[name], mixture.expected_accuracy(points.detach(), y))
                seconds[name] += time.perf_counter() - started
                started = time.perf_counter()
    return rows | {name: (lowest[name], seconds[name]) for name in lowest}


def main() -> None:
    """Train, measure, print a table for each mixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--num-examples", type=int, default=60)
    parser.add_argument("--steps", type=int, default=2000, help="of the long climber")
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf")
    parser.add_argument("--eps", type=float, default=0.15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    x_train, y_train, x, y = digits(arguments.num_examples)
    ball = ThreatModel(arguments.norm, arguments.eps)
    members = [trained(number, x_train, y_train, ball) for number in range(max(arguments.members))]
    found = []
    for count in arguments.members:
        lam = np.random.default_rng(count).dirichlet(np.full(count, 3.0))
        rows = measure(Mixture(members[:count], lam.tolist()).eval(), x, y, ball, arguments.steps)
        strict = rows["strict"][0]
        print(
            f"\nL={count}, {ball.norm} {ball.eps}, {len(y)} digits, {torch.get_num_threads()} of {os.cpu_count()} CPUs"
        )
        for name, (accuracy, seconds) in rows.items():
            lower = int((accuracy < strict - SLACK).sum())
            print(f"  {name:<32} {100 * accuracy.mean():6.2f} %  {seconds:7.1f} s  below strict on {lower} images")
            row = {"members": count, "attack": name, "accuracy": accuracy.tolist(), "seconds": seconds}
            found.append(row | {"norm": ball.norm, "eps": ball.eps, "below_strict": lower})
        sys.stdout.flush()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
