"""A training step on a GPU: images per second, FLOP utilisation, memory, where the time goes, and whether it is right.

PGD-10 adversarial training (schedule=shared) of a mixture of ResNet-18 on 3x32x32, as the package trains it (Lightning,
bf16 autocast, channels_last, torch.compile) against the loop of a research script (eager, float32). Both are fed by the
same batches, resident on the device. Images are synthetic: classes are smooth patterns of random contrast in noise.

Utilisation divides the operations of the model (convolutions and products, counted: K passes to the input and one to
the parameters for each member) by the bf16 rate of a matrix product measured in the same run, whatever the precision.

    python benchmarks/gpu.py [--quick] [--cpu] [--parts speed ablations profile correctness] [--variants NAME ...]
        [--ablations NAME ...]

Without a GPU it says so and does nothing; --cpu --quick runs all its code on tiny settings, for a test of it.
"""

import argparse
import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from harness import describe, interleaved, save, table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from training_job import BALL, FAST, PLAIN, Job, images

from mixadv.attacks.pgd import PGD

# Spans of the host that the profiler also shows on the device.
NO_WORK = ("ProfilerStep", "Optimizer.", "Torch-Compiled Region", "## Call CompiledFxGraph")
PARTS = ("speed", "ablations", "profile", "correctness")
# Name -> how the package trains, None for the research loop, and whether float32 products may round to TF32.
VARIANTS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "eager float32": (None, False),
    "eager TF32": (None, True),
    "ours": (FAST, False),
    "without compile": (FAST | {"compile": None}, False),
    "without channels_last": (FAST | {"channels_last": False}, False),
    "float32": (FAST | {"precision": "32-true"}, False),
    "CUDA graphs": (FAST | {"compile": "reduce-overhead"}, False),
}
LOOPS = ("eager float32", "eager TF32", "ours")
ABLATIONS = ("ours", "without compile", "without channels_last", "float32", "CUDA graphs")


def peak_rate(size: int, device: torch.device) -> float:
    """Operations per second of a bf16 product of size^3, the median of 20."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"product": lambda: a @ b}, 20, warmup=3, synchronize=device)["product"]
    return 2 * size**3 / sorted(times)[10]


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether float32 products and convolutions may round to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def measure(args: argparse.Namespace, members: int, batch: int, variants: Sequence[str], peak: float) -> list[dict]:
    """Every variant on one mixture and batch size, in turn; a variant that fails says why in its row.

    The row of "ours" also tells where its time goes, see `shares`.
    """
    torch.compiler.reset()
    rows, runs = [], {}
    for name in variants:
        ours, rounding = VARIANTS[name]
        row: dict[str, Any] = {"L": members, "batch": batch, "name": name}
        rows.append(row)
        before = 0 if args.cpu else torch.cuda.memory_allocated()
        if not args.cpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            started = time.perf_counter()
            with tf32(rounding):
                job = Job(args, members, batch, ours)
                job.steps(3)  # Compiles, and lets cuDNN and the allocator settle.
                row["first 3 steps s"] = time.perf_counter() - started
                per_step = job.steps(3)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160]
            continue
        row["GiB"] = None if args.cpu else (torch.cuda.max_memory_allocated() - before) / 2**30
        runs[name] = (job, rounding, 1 + max(2, min(100, round(args.seconds / per_step))), row)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, (job, rounding, count, _) in runs.items():
            with tf32(rounding):
                times[name].append(job.steps(count))
    for name, (job, _, _, row) in runs.items():
        middle = sorted(times[name])[len(times[name]) // 2]
        row |= {"ms": 1e3 * middle, "spread": max(times[name]) / min(times[name]), "images/s": batch / middle}
        row["MFU %"] = 100 * job.operations() * batch / middle / peak
        if name == "ours":
            with tf32(False):
                row |= shares(args, job, middle)
    for row in rows:
        if "ms" in row and "ms" in rows[0]:
            row["speed-up"] = rows[0]["ms"] / row["ms"]
    return rows


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def shares(args: argparse.Namespace, job: Job, per_step: float) -> dict[str, Any]:
    """Where a step's time goes: what the device computes in the attack, the update and the data path, and nothing.

    Idle time is a step's time without the profiler, which slows the host down, less the device's busy time.

    Args:
        args: of the command line.
        job: compiled, and warm.
        per_step: seconds of one of its steps without the profiler.
    """
    count = 2 if args.cpu else 6
    kinds = [ProfilerActivity.CPU] + ([] if args.cpu else [ProfilerActivity.CUDA])
    job.profiler = profile(activities=kinds)
    profiled = job.steps(count + 1)
    wanted = torch.autograd.DeviceType.CPU if args.cpu else torch.autograd.DeviceType.CUDA
    events = [event for event in job.profiler.events() if event.device_type == wanted]
    marks: dict[str, list[tuple[float, float]]] = {"attack": [], "data": []}
    work = []
    for event in events:
        span = (event.time_range.start, event.time_range.end)
        if event.name in marks:
            marks[event.name].append(span)
        elif not event.is_user_annotation and not event.name.startswith(NO_WORK):
            work.append(span)
    job.profiler = None
    if not marks["attack"]:
        return {"failed": "the profiler shows no marks on the device"}
    parts: dict[str, list[tuple[float, float]]] = {"attack": [], "update": [], "data": []}
    for span in work:
        inside = [name for name, spans in marks.items() if any(a <= span[0] <= b for a, b in spans)]
        parts[inside[0] if inside else "update"].append(span)
    busy = {name: union(spans) / 1e6 / count for name, spans in parts.items()}
    row = {"profiled ms": 1e3 * profiled}
    row |= {f"{name} %": 100 * seconds / per_step for name, seconds in busy.items()}
    return row | {"idle %": 100 * max(0.0, 1 - sum(busy.values()) / per_step), "kernels": len(work) / count}


def profiled(args: argparse.Namespace, members: int, batch: int) -> dict[str, Any]:
    """`shares` of a job of its own."""
    torch.compiler.reset()
    job = Job(args, members, batch, FAST)
    job.steps(3)
    per_step = sorted(job.steps(3 if args.cpu else 7) for _ in range(3))[1]
    return {"L": members, "batch": batch, "ms": 1e3 * per_step} | shares(args, job, per_step)


def correctness(args: argparse.Namespace, members: int, batch: int) -> list[dict[str, Any]]:
    """The fast path against the plain one: losses of the first steps, of training and of an attack; robust accuracy."""
    torch.compiler.reset()
    rows = []
    fast, plain = (Job(args, members, batch, ours) for ours in (FAST, PLAIN))
    for job in (fast, plain):
        job.steps(3)
    for step, (a, b) in enumerate(zip(fast.losses, plain.losses, strict=True), 1):
        rows.append({"what": f"training loss, step {step}", "fast": float(a), "plain": float(b), "tolerance": 0.02})
    started = time.perf_counter()
    while time.perf_counter() - started < args.train_seconds:
        fast.steps(20)
    plain.mixture.load_state_dict(fast.mixture.state_dict())
    plain.mixture.eval()
    x, y = images(args.attacked, 1)
    x, y = x.to(fast.device) / 255, y.to(fast.device)
    autocast = partial(torch.autocast, fast.device.type, torch.bfloat16)

    def attacked(job: Job, attack: PGD, context: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        # What was found is measured by the plain float32 forward.
        found = []
        for i, (part, labels) in enumerate(zip(x.split(batch), y.split(batch), strict=True)):
            with context():
                generator = torch.Generator(fast.device).manual_seed(i)
                found.append(attack(job.mixture, part, labels, BALL, generator))
        points = torch.cat(found)
        with torch.no_grad():
            logits = torch.cat([plain.mixture.member_logits(part) for part in points.split(batch)], dim=1)
        losses = torch.stack([F.cross_entropy(z, y) for z in logits])
        right = plain.mixture.expectation(logits.argmax(-1) == y)
        return (plain.mixture.weights * losses).sum(), right.mean()

    for k in range(4):
        pair = [attacked(j, PGD(k, keep="last"), c)[0] for j, c in ((fast, autocast), (plain, contextlib.nullcontext))]
        names = dict(zip(("fast", "plain"), map(float, pair), strict=True))
        rows.append({"what": f"attack's loss after {k} steps", **names, "tolerance": 0.02})
    for attack, name in ((PGD(0, start="none", keep="last"), "clean"), (PGD(20), "robust")):
        pair = [100 * attacked(j, attack, c)[1] for j, c in ((fast, autocast), (plain, contextlib.nullcontext))]
        names = dict(zip(("fast", "plain"), map(float, pair), strict=True))
        rows.append({"what": f"{name} accuracy %, {len(y)} images", **names, "tolerance": max(0.5, 100 / len(y))})
    for row in rows:
        apart = abs(row["fast"] - row["plain"])
        row["apart"] = apart if "%" in row["what"] else apart / abs(row["plain"])
        row["ok"] = "yes" if row["apart"] <= row["tolerance"] else "NO"
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 512, L = 1, 2: within four minutes")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, with tiny settings")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    for name, variants in (("variants", LOOPS), ("ablations", ABLATIONS)):
        parser.add_argument(f"--{name}", nargs="+", choices=VARIANTS, default=variants)
    parser.add_argument("--model", help="resnet18; on the CPU small_resnet")
    for name, said in (("batches", "512 1024"), ("members", "1 2 4")):
        parser.add_argument(f"--{name}", type=int, nargs="+", help=said)
    parser.add_argument("--steps", type=int, help="of the attack, 10")
    parser.add_argument("--repeats", type=int, help="rounds, 3")
    parser.add_argument("--seconds", type=float, help="of a measurement, 2")
    parser.add_argument("--train-seconds", type=float, help="before robust accuracies are compared, 90")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("gpu.py: there is no GPU; nothing measured (--cpu --quick tries the code)")
        return
    small = {"model": "small_resnet", "batches": [16], "members": [1, 2], "steps": 2, "repeats": 1, "seconds": 0.1}
    large = {"model": "resnet18", "batches": [512, 1024], "members": [1, 2, 4], "steps": 10, "repeats": 3, "seconds": 2}
    quick = large | {"batches": [512], "members": [1, 2], "repeats": 2, "seconds": 1}
    defaults = small if args.cpu else quick if args.quick else large
    defaults |= {"train_seconds": 2 if args.cpu else 25 if args.quick else 90}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.images, args.attacked = (64, 40) if args.cpu else (20_000, 1000)
    warnings.filterwarnings("ignore", module="pytorch_lightning|torch")
    device = torch.device("cpu" if args.cpu else "cuda")
    peak = peak_rate(256 if args.cpu else 8192, device)
    print(f"{describe()}\nbf16 product {peak / 1e12:.3g} TFLOP/s; PGD-{args.steps}, {args.model}", flush=True)
    sizes = [(members, batch) for batch in args.batches for members in args.members]
    batch, middle = args.batches[0], args.members[min(1, len(args.members) - 1)]
    # Each measures in pieces.
    parts: dict[str, list[Callable[[], list[dict[str, Any]]]]] = {
        "speed": [partial(measure, args, *size, args.variants, peak) for size in sizes],
        "ablations": [partial(measure, args, middle, batch, args.ablations, peak)],
        "profile": [lambda members=members: [profiled(args, members, batch)] for members in args.members],
        "correctness": [partial(correctness, args, middle, batch)],
    }
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        found: list[dict[str, Any]] = []
        for piece in parts[part]:
            with tf32(False):
                found += piece()
            # After each piece, so that a run that is cut off keeps what it has.
            save("gpu", rows + [{"part": part} | row for row in found], vars(args) | {"peak_flop_per_s": peak})
        print()
        table(found, list(dict.fromkeys(key for row in found for key in row)))
        rows += [{"part": part} | row for row in found]


if __name__ == "__main__":
    main()
