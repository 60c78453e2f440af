"""How far attacks on the same mixtures get, and what they cost: PGD, APGD, ARC, subset attacks, climber, and the suite.

    python benchmarks/attacks.py outputs/train/quickstart OTHER_RUN ...

measures exported mixtures on their own test images, and always a mixture of three small networks in the plane, trained
here in seconds. Every number is the mean exact expected accuracy at the points of that attack against the mixture; the
last row is the minimum over everything that any attack of `protocol=strict` found against anyone. Lower is stronger.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from mixadv import Mixture, ThreatModel
from mixadv.attacks import APGD, ARC, PGD, AttackSuite, LatticeClimber, SubsetAttack
from mixadv.instantiate import held_to_mixadv, instantiate
from mixadv.intervals import confidence_interval
from mixadv.members.store import read_mixture

ATTACKS = {
    "pgd-20": PGD(20),
    "pgd-20, 5 restarts": PGD(20, restarts=5),
    "apgd-ce": APGD(100, loss="ce"),
    "apgd-dlr": APGD(100, loss="dlr"),
    "arc, published": ARC(20, variant="published", order="weights", decay=1.0, step_size=0.25),
    "arc": ARC(20),
    "arc, 5 restarts": ARC(20, restarts=5),
    "subsets": SubsetAttack(20),
    "climber": LatticeClimber(300),
}


def plane(count: int) -> tuple[str, Mixture, Tensor, Tensor, ThreatModel]:
    """Three small networks on two interleaved half circles, each trained on points of its own."""
    generator = torch.Generator().manual_seed(0)
    angle = math.pi * torch.rand(1000, generator=generator)
    y = torch.arange(1000) % 2
    x = torch.stack([angle.cos() + y, torch.where(y == 1, 0.5 - angle.sin(), angle.sin())], 1)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        member = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        optimizer = torch.optim.Adam(member.parameters(), 2e-2)
        mine = torch.randperm(500)[:60]
        for _ in range(150):
            loss = nn.functional.cross_entropy(member(x[mine]), y[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        members.append(member.eval())
    ball = ThreatModel("l2", 0.4, None)
    return (
        "two moons, 3 networks, l2 0.4",
        Mixture(members, [0.4, 0.25, 0.35]),
        x[500 : 500 + count],
        y[500 : 500 + count],
        ball,
    )


def exported(path: Path, count: int) -> tuple[str, Mixture, Tensor, Tensor, ThreatModel]:
    """A mixture, the first of its test images, and its ball."""
    mixture, config = read_mixture(path)
    held_to_mixadv(config["data"], str(path))
    data = instantiate({**config["data"], "num_test": None}, "data")
    data.prepare_data()
    data.setup("test")
    x, y = (torch.cat(parts)[:count] for parts in zip(*data.test_dataloader(), strict=True))
    ball = ThreatModel(config["threat_model"]["norm"], config["threat_model"]["eps"])
    name = f"{config['data_name']}, L={config['L']}, {ball.norm} {config['eps']}"
    return name, mixture, x, y, ball


def measure(mixture: Mixture, x: Tensor, y: Tensor, ball: ThreatModel) -> list[dict[str, object]]:
    """A row for every attack, and one for the suite."""
    rows: list[dict[str, object]] = []

    def add(name: str, accuracy: Tensor, seconds: float) -> None:
        mean = float(accuracy.mean())
        rows.append({"attack": name, "accuracy": mean, "ci95": confidence_interval(mean, len(y)), "seconds": seconds})

    add("clean", mixture.expected_accuracy(x, y), 0.0)
    for name, attack in ATTACKS.items():
        started = time.perf_counter()
        x_adv = attack(mixture, x, y, ball, torch.Generator().manual_seed(0))
        seconds = time.perf_counter() - started
        add(name, mixture.expected_accuracy(x_adv, y), seconds)
    started = time.perf_counter()
    record = AttackSuite.from_protocol("strict")(mixture, x, y, ball)
    add("protocol=strict", record.expected_accuracy, time.perf_counter() - started)
    return rows


def main() -> None:
    """Measure, print a table for each mixture, write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories or exported mixtures")
    parser.add_argument("--num-examples", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    problems = [plane(arguments.num_examples), *(exported(path, arguments.num_examples) for path in arguments.runs)]
    for name, mixture, x, y, ball in problems:
        rows = measure(mixture, x, y, ball)
        found.append({"problem": name, "num_examples": len(y), "threads": torch.get_num_threads(), "rows": rows})
        print(f"\n{name}: {len(y)} test examples, {torch.get_num_threads()} threads")
        for row in rows:
            low, high = row["ci95"]
            print(
                f"  {row['attack']:<20} {100 * row['accuracy']:6.2f} %  [{100 * low:.1f}, {100 * high:.1f}]"
                f"  {row['seconds']:8.1f} s"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
