"""Peak memory of training and of evaluation, as a function of the members L and of the batch, beside the estimate.

    python benchmarks/memory.py [--members 1 2 4 8] [--batches 64 128 256 512] [--models small_resnet preact_resnet20]

Three works: one update of each schedule (attack and step; PGD with --steps steps), and PGD-20 on a mixture, images of
3x32x32 pixels. On the CPU each measurement is a process of its own: its largest resident size less the size after
imports and building. On a CUDA device it is `torch.cuda.max_memory_allocated` less what was allocated before, so
parameters are not in it, nor in the estimate beside it: gradients and momentum are.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import describe, save, table
from mixadv.training.memory import MemoryEstimate, attack_memory, training_memory

from mixadv.attacks import PGD
from mixadv.losses import AT
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel
from mixadv.training.update import add_gradient

SHAPE, CLASSES = (3, 32, 32), 10
WORKS = ("sampled", "shared", "evaluation")
MIB = 2**20
# One step of the attack reaches the peak of all of them.
STEPS = 2


def mixture_of(model: str, count: int, device: torch.device) -> Mixture:
    torch.manual_seed(0)
    return Mixture([build_member(model, num_classes=CLASSES, image_shape=SHAPE) for _ in range(count)]).to(device)


def work_of(work: str, mixture: Mixture, batch: int, part: int | None, steps: int) -> Callable[[], object]:
    """What is measured; its images are made inside, as a data set would hand them over."""
    device = mixture.weights.device
    threat_model = ThreatModel("linf", 8 / 255)

    def images() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(batch, *SHAPE, device=device), torch.arange(batch, device=device) % CLASSES

    def evaluation() -> None:
        # keep="accuracy" would drop what these untrained members get wrong, and measure few images.
        PGD(num_steps=20 if steps > STEPS else steps, keep="objective")(mixture, *images(), threat_model)

    def update() -> None:
        from mixadv.attacks.objectives import InnerLoss
        from mixadv.ranks import Ranks
        from mixadv.training.shared_attack import SharedAttack

        x, y = images()
        pgd = PGD(num_steps=steps, objective=InnerLoss(AT()), keep="last")
        x_adv = SharedAttack(pgd, Ranks(), part).own_rows(mixture, x, y, threat_model, None)
        members = list(mixture.members)
        optimizers = [torch.optim.SGD(member.parameters(), lr=0.1, momentum=0.9) for member in members]
        # After some batches every member has a gradient and a momentum, whatever the schedule.
        for member, optimizer in zip(members, optimizers, strict=True):
            for parameter in member.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        for member, optimizer in list(zip(members, optimizers, strict=True))[: 1 if work == "sampled" else None]:
            optimizer.zero_grad()
            add_gradient(member.train(), AT(), x, x_adv, y, part, torch.Tensor.backward)
            optimizer.step()

    return evaluation if work == "evaluation" else update


def estimate_of(work: str, mixture: Mixture) -> MemoryEstimate:
    device = mixture.weights.device
    if work == "evaluation":
        return attack_memory(list(mixture.members), SHAPE, CLASSES, device)
    return training_memory(mixture.members[0], mixture.num_members, AT(), SHAPE, CLASSES, device)


def resident() -> int:
    """Bytes resident now, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_on_cpu(work: str, model: str, count: int, batch: int, part: int | None, steps: int) -> int:
    """In this process, which does nothing else."""
    import resource

    mixture = mixture_of(model, count, torch.device("cpu"))
    # Threads and code that the first pass sets up belong to the baseline.
    work_of(work, mixture, 1, None, 1)()
    for parameter in mixture.parameters():
        parameter.grad = None
    run = work_of(work, mixture, batch, part, steps)
    before = resident()
    run()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def peak_on_cuda(work: str, model: str, count: int, batch: int, part: int | None, steps: int) -> int:
    device = torch.device("cuda")
    mixture = mixture_of(model, count, device)
    work_of(work, mixture, 2, None, 1)()
    for parameter in mixture.parameters():
        parameter.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work_of(work, mixture, batch, part, steps)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured(work: str, model: str, count: int, batch: int, part: int | None, steps: int, device: str) -> int | str:
    """Bytes, or why there is no number."""
    if device == "cuda":
        try:
            return peak_on_cuda(work, model, count, batch, part, steps)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return "out of memory"
    command = [sys.executable, __file__, "--one", json.dumps([work, model, count, batch, part, steps])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return "out of memory"
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.split()[-1])


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512])
    gpu_models = ["resnet18"] if device == "cuda" else []
    parser.add_argument("--models", nargs="+", default=["small_resnet", "preact_resnet20", *gpu_models])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--part", type=int, help="micro_batch_size in the updates")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the attack; above 2, 20 in the evaluation")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(peak_on_cpu(*json.loads(arguments.one)))
        return
    print(describe(), flush=True)
    rows: list[dict[str, Any]] = []
    for model, work in itertools.product(arguments.models, arguments.works):
        for count, batch in itertools.product(arguments.members, arguments.batches):
            part = None if work == "evaluation" else arguments.part
            peak = measured(work, model, count, batch, part, arguments.steps, device)
            mixture = mixture_of(model, count, torch.device(device))
            parameters = sum(p.numel() * p.element_size() for p in mixture.parameters())
            estimate = estimate_of(work, mixture).needed(batch, part) - parameters
            row: dict[str, Any] = {"model": model, "work": work, "L": count, "batch": batch, "part": part or batch}
            row |= {"peak MiB": peak / MIB if isinstance(peak, int) else peak, "estimate MiB": estimate / MIB}
            row["estimate / peak"] = estimate / peak if isinstance(peak, int) and peak else None
            rows.append(row)
    table(rows)
    save("memory", rows, {"device": device, "steps": arguments.steps, "part": arguments.part})


if __name__ == "__main__":
    main()
