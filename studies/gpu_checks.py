#!/usr/bin/env python3
"""Does mixadv do on this device what it does on a CPU? Checks of studies/fifteen.py, side by side.

    python studies/gpu_checks.py --folder DIR --root IMAGES --out checks.json [--cpu]

The file is written after each check, so that what was cut off keeps what it has.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_plan import FULL, TINY, Size
from gpu_processes import answer, start, stop
from safetensors.torch import load_file

from mixadv import ThreatModel, load_mixture
from mixadv.attacks import AttackSuite
from mixadv.checkpoint_files import BEST
from mixadv.data.digits import Digits
from mixadv.files import write_text
from mixadv.metrics_file import read_rows
from mixadv.results import read

# Digits: seconds on any device, and several epochs, validations and weights phases.
DIGITS = (
    *(
        "data=digits",
        "model=small_cnn",
        "L=2",
        "eps=0.1",
        "schedule=shared",
        "schedule.T_theta=20",
        "data.batch_size=64",
    ),
    *("scheduler=one_cycle", "optimizer.lr=0.05", "attack.num_steps=5", "logger=csv", "trainer.precision=auto"),
)
BALL = ThreatModel("linf", 0.1)
# Points of accuracy by which two devices may differ.
TOLERANCE = 0.5
# Of the checks. The larger number makes more batches than those from which compile=auto compiles.
EPOCHS, MANY_EPOCHS = 6, 200

Check = tuple[str, bool, str]


class Checks:
    """The checks; each yields its name, whether it passed, and what was found."""

    def __init__(self, size: Size, folder: Path, root: Path) -> None:
        self.size, self.folder, self.root = size, folder, root
        self.cpu = size.accelerator == "cpu"
        self.where = [f"trainer.accelerator={size.accelerator}"]

    def digits(self, name: str, epochs: int = EPOCHS) -> list[str | Path]:
        """The command of a deterministic training."""
        how = [f"trainer.max_epochs={epochs}", "trainer.deterministic=true", f"hydra.run.dir={self.folder / name}"]
        return ["run.py", *DIGITS, *replace(self.size, attack_steps=8).measurement(), *self.where, *how]

    def straight(self) -> None:
        """A training that nothing stops."""
        answer(self.digits("straight"))

    def resumed(self, straight: "Future[None]") -> Iterator[Check]:
        """Killed after its first validation and continued, a deterministic training ends bitwise the same."""
        run = self.folder / "killed"
        process = start(*self.digits("killed"))
        while not (run / "checkpoints" / BEST).exists() and process.poll() is None:
            time.sleep(0.005)
        stop(process, grace=0.0)
        yield "killed before its end", not (run / "DONE").exists(), f"{epochs_of(run)} of {EPOCHS} epochs were done"
        answer(self.digits("killed"))
        straight.result()
        runs = self.folder / "straight", run
        one, other = (load_file(path / "mixture" / "mixture.safetensors") for path in runs)
        different = [key for key in one if not torch.equal(one[key], other[key])]
        yield "resumed bitwise, deterministic=true: parameters", not different, f"{len(different)} of {len(one)} differ"
        one, other = (load_file(path / "points.safetensors") for path in runs)
        same = all(torch.equal(one[key], other[key]) for key in one)
        yield "resumed bitwise, deterministic=true: points found", same, f"{len(one['labels'])} images"

    def choices(self) -> Iterator[Check]:
        """What trainer.precision=auto and compile=auto choose for a training of many batches."""
        run = self.folder / "long"
        process = start(*self.digits("long", MANY_EPOCHS))
        while not (run / "config.yaml").exists() and process.poll() is None:
            time.sleep(0.02)
        stop(process, grace=0.0)
        found = json.loads((run / "choices.json").read_text())
        cores = not self.cpu and torch.cuda.get_device_capability()[0] >= 8
        wanted = {"trainer.precision": "bf16-mixed" if cores else "32-true", "compile": not self.cpu}
        yield "choices of a long training", found == wanted, json.dumps(found)

    def subset(self) -> Iterator[Check]:
        """An epoch of two members on a part of the images of the question, and its measurement."""
        run, few = self.folder / "subset", min(2048, self.size.num_train)
        while not any(self.root.glob(".mixadv-cache/*.npz")):
            time.sleep(0.2)
        answer(
            [
                *("run.py", *self.size.training(self.root, 2, 1, run)),
                *(f"data.num_train={few}", "data.num_test=16", "schedule.T_theta=2", "compile=auto"),
            ]
        )
        results, problems = read(run / "results.json")
        clean, robust = results.clean.value, results.robust.value
        fits = not problems and clean is not None and robust is not None and 0 <= robust <= clean <= 1
        yield "an epoch of L=2 on a subset, and its measurement", bool(fits), f"clean {clean}, robust {robust}"
        found = json.loads((run / "choices.json").read_text())
        cores = not self.cpu and torch.cuda.get_device_capability()[0] >= 8
        wanted = {"trainer.precision": "bf16-mixed" if cores else "32-true", "compile": False}
        yield "choices of a short training", found == wanted, json.dumps(found)

    def suite(self, straight: "Future[None]") -> Iterator[Check]:
        """All attacks of protocol=fast on both devices; every point is checked for its ball and box by the suite."""
        straight.result()
        data = Digits()
        data.setup()
        count = 40 if self.cpu else data.num_test
        x, y = data.test_images[:count].float() / 255, data.test_labels[:count]
        robust, clean = {}, {}
        device = "cpu" if self.cpu else "cuda"
        for name in dict.fromkeys(("cpu", device)):
            mixture = load_mixture(self.folder / "straight").to(name)
            record = AttackSuite.from_protocol("fast")(mixture, x.to(name), y.to(name), BALL)
            robust[name] = 100 * float(record.expected_accuracy.mean())
            clean[name] = 100 * float(record.clean.mean())
        said = ", ".join(f"{name} {robust[name]:.2f} % of {clean[name]:.2f} % clean" for name in robust)
        fits = all(0 < robust[name] <= clean[name] for name in robust)
        yield "the attack suite", fits, f"{said}, {count} digits"
        apart = max(robust.values()) - min(robust.values())
        yield f"cpu and {device} agree on robust accuracy", apart <= TOLERANCE, f"{apart:.2f} points apart"


def epochs_of(run: Path) -> float:
    """Epochs in the history of a run."""
    return max((float(row["epoch"]) for row in read_rows(run / "metrics.csv") if row["epoch"]), default=0.0)


def main() -> None:
    """Make the checks, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "root", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    begun = time.perf_counter()
    checks = Checks(TINY if args.cpu else FULL, args.folder, args.root)
    rows: list[dict[str, Any]] = []

    def note(name: str, ok: bool, found: str) -> None:
        rows.append({"check": name, "ok": ok, "found": found, "after s": round(time.perf_counter() - begun, 1)})
        print(f"  {'ok    ' if ok else 'FAILED'} {name}: {found}", flush=True)
        write_text(args.out, json.dumps(rows, indent=1) + "\n")

    def made(check: Callable[..., Iterator[Check]], *given: Any) -> None:
        try:
            for found in check(*given):
                note(*found)
        # One check that breaks must not hide what the others find.
        except Exception as error:
            note((check.__doc__ or check.__name__).splitlines()[0], False, f"{type(error).__name__}: {error}"[:600])

    with ThreadPoolExecutor() as pool:
        straight = pool.submit(checks.straight)
        kinds = [(checks.resumed, straight), (checks.suite, straight), (checks.choices,), (checks.subset,)]
        for done in as_completed([pool.submit(made, *one) for one in kinds]):
            done.result()


if __name__ == "__main__":
    main()
