"""The data path's share of a training step: fetching a batch (permutation, crops, flips, scaling) against serving it.

CIFAR-shaped uint8 images resident on the device, as in training. The step is PGD-10 adversarial training of one member
(L = 1, the worst case: more members make the step longer and the batch not), eager on the CPU, the fast path on a GPU.
Both are timed alone, to their end: on a GPU they overlap with the host's work, so that the true share is smaller (that
of the kernels is in gpu.py). Target: under 2 % on a GPU.

    python benchmarks/data_path.py [--models small_resnet] [--batches 64 256 1024] [--quick]
"""

import argparse
import itertools
from typing import Any

import torch
from harness import describe, interleaved, save, summary, table
from training_job import FAST, PLAIN, SHAPE, Job, images

from mixadv.data.augment import random_crop_flip
from mixadv.data.stream import BatchStream
from mixadv.seeding import generator_for

IMAGES = 50_000


def pieces(stream: BatchStream, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of the parts of a batch: selection, augmentation, scaling, and the order of a pass over its batches."""
    rows = torch.randperm(len(stream.images), device=device)[:batch]
    chosen = stream.images[rows]
    runs = {
        "select": lambda: stream.images[rows],
        "augment": lambda: random_crop_flip(chosen, 4, True, generator_for(0, "augment", 1)),
        "scale": lambda: chosen.float().div_(255),
        "order": lambda: torch.randperm(len(stream.images), generator=generator_for(0, "order", 1)).to(device),
    }
    found = {name: one["median"] for name, one in summary(interleaved(runs, repeats, 2, device)).items()}
    # One permutation serves all batches of a pass.
    return found | {"order": found["order"] / stream.batches_per_pass}


def measure(args: argparse.Namespace, model: str, batch: int, device: torch.device) -> dict[str, Any]:
    """One row of the table."""
    x, y = images(args.images, 0)
    stream = BatchStream(x, y, batch, padding=4, flip=True, device=device, batches_per_epoch=10**9)
    served = itertools.chain.from_iterable(itertools.repeat(stream))
    fetching = interleaved({"fetch": lambda: next(served)}, args.repeats, warmup=3, synchronize=device)
    settings = argparse.Namespace(model=model, cpu=device.type == "cpu", steps=args.steps, images=2 * batch)
    job = Job(settings, 1, batch, FAST if device.type == "cuda" else PLAIN)
    job.steps(3)
    # The steps of a job fetch their batches too.
    step = sorted(job.steps(1 + args.timed_steps) for _ in range(args.rounds))[args.rounds // 2]
    fetch = summary(fetching)["fetch"]
    parts = {f"{name} ms": 1e3 * took for name, took in pieces(stream, batch, args.repeats, device).items()}
    row = {"model": model, "batch": batch, "step ms": 1e3 * step, "fetch ms": 1e3 * fetch["median"]}
    row |= {"share %": 100 * fetch["median"] / step, "spread": fetch["spread"], "images/s": batch / step}
    return row | parts | {"MB/s": batch * (SHAPE[0] * SHAPE[1] * SHAPE[2]) / fetch["median"] / 1e6}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--repeats", type=int, default=30, help="batches fetched")
    parser.add_argument("--rounds", type=int, default=3, help="of timed training steps")
    parser.add_argument("--quick", action="store_true", help="one small batch size and few repeats")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = args.models or (["small_resnet", "resnet18"] if device.type == "cuda" else ["small_resnet"])
    args.images, args.timed_steps = IMAGES, 20 if device.type == "cuda" else 3
    if args.quick:
        args.batches, args.repeats, args.rounds, args.timed_steps = args.batches[:1], 10, 1, 2
    print(describe())
    rows = [measure(args, model, batch, device) for model in models for batch in args.batches]
    table(rows)
    if device.type == "cuda":
        print("target met" if max(row["share %"] for row in rows if row["model"] == "resnet18") < 2 else "MISSED: 2 %")
    save("data_path", rows, vars(args))


if __name__ == "__main__":
    main()
