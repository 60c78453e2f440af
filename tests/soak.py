"""The long reliability run, ``make soak``: a line for each promise; exit code 1 if one of them is broken.

Runs are forked from a process that has everything imported, so that a run of a few seconds costs a few seconds; each is
`main()` with its arguments, in a directory of its own. Pass names of parts (kills writes signals memory) to run these
alone.
"""

import argparse
import csv
import gc
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from mixadv.checkpoint_files import read_checkpoint
from mixadv.main import main

RUN = (
    "logger=csv",
    "data=digits",
    "data.num_train=96",
    "data.num_test=30",
    "data.batch_size=16",
    "data.padding=1",
    "model=small_cnn",
    "model.width=4",
    "optimizer.lr=0.02",
    "loss=trades",
    "lambda_solver=entropic",
    "lambda_solver.num_steps=4",
    "lambda_solver.num_samples=2",
    "trainer.max_epochs=2",
    "schedule.T_theta=2",
    "attack.num_steps=3",
    "protocol.attacks.pgd-20.num_steps=3",
    "protocol.attacks.arc.num_steps=1",
    "protocol.attacks.subsets.num_steps=1",
    "protocol.validation.num_steps=3",
    "protocol.diagnosed=0",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    # Callbacks of Lightning's own keep their state as well.
    "callbacks=[default,ema,early_stopping,lr_monitor]",
    "callbacks.checkpoint.every_n_train_steps=1",
    "callbacks.ema.decay=0.9",
    "callbacks.early_stopping.patience=1",
    "L=3",
    "eps=0.1",
    "seed=7",
    "name=soak",
)
PLACE = Path("outputs/train/soak")


def started(cwd, arguments=RUN, before=None):
    """The process number of a forked run, which writes to log.txt in `cwd`."""
    cwd.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(cwd)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        sys.argv = ["run.py", *arguments]
        if before is not None:
            before()
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid):
    """Exit code of a run; minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(cwd):
    """Everything that a finished run has computed, without times."""
    place = cwd / PLACE
    if not (place / "results.json").exists():
        return "not finished: " + (cwd / "log.txt").read_text()[-500:]
    with (place / "metrics.csv").open(newline="") as file:
        history = [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
    results = json.loads((place / "results.json").read_text())
    del results["seconds"], results["date"]
    for attack in results["attacks"].values():
        del attack["seconds"], attack["seconds_on_parts"]
    for row in results["ceiling"]:
        del row["seconds"]
    with np.load(place / "records.npz") as file:
        records = {name: file[name].tobytes() for name in file.files}
    return {
        "checkpoints": [read_checkpoint(place / "checkpoints" / f"{name}.ckpt")["digest"] for name in ("last", "best")],
        "history": history,
        "results": results,
        "records": records,
        "mixture": (place / "mixture" / "mixture.safetensors").read_bytes(),
        "left over": sorted(path.name for path in place.rglob("*") if path.suffix == ".tmp" or path.name == ".lock"),
    }


def resumed_as(reference, cwd):
    """Whether the same command ends where the uninterrupted run ended."""
    code = ended(started(cwd))
    found = content(cwd)
    if code == 0 and found == reference:
        return True
    parts = [key for key in reference if isinstance(found, dict) and found[key] != reference[key]]
    print(f"  {cwd.name}: exit code {code}, differs in {parts or found}", flush=True)
    return False


def half_a_checkpoint(nth):
    """Die in the middle of writing checkpoint number `nth`, or, if negative, between the renames of number -nth."""

    def prepare():
        saved, renamed, count = torch.save, os.replace, {"save": 0, "rename": 0}

        def save(thing, file, **settings):
            count["save"] += 1
            if count["save"] == nth:
                position = file.tell()
                saved(thing, file, **settings)
                file.truncate(position + (file.tell() - position) // 2)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            saved(thing, file, **settings)

        def replace(source, target):
            renamed(source, target)
            if str(target).endswith("previous.ckpt"):
                count["rename"] += 1
                if count["rename"] == -nth:
                    os.kill(os.getpid(), signal.SIGKILL)

        torch.save, os.replace = save, replace

    return prepare


def kills(root, reference, seconds, draw):
    """40 random moments."""
    good = 0
    for number in range(40):
        cwd = root / f"kill-{number}"
        pid = started(cwd)
        time.sleep(draw.uniform(0.02, 0.98) * seconds)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        good += resumed_as(reference, cwd)
        shutil.rmtree(cwd)
    return good, 40, "runs killed at a random moment resumed bitwise"


def writes(root, reference, seconds, draw):
    """10 moments inside the writing of a checkpoint."""
    good = 0
    for number, nth in enumerate((1, 2, 5, 9, 14, 21, -1, -4, -8, -15)):
        cwd = root / f"write-{number}"
        assert ended(started(cwd, before=half_a_checkpoint(nth))) == -signal.SIGKILL
        good += resumed_as(reference, cwd)
        shutil.rmtree(cwd)
    return good, 10, "runs killed while writing a checkpoint resumed bitwise"


def signals(root, reference, seconds, draw):
    """30 random moments, three signals."""
    good = handled = 0
    for number in range(30):
        cwd, signum = root / f"signal-{number}", (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3]
        pid = started(cwd)
        time.sleep(draw.uniform(0.02, 0.98) * seconds)
        os.kill(pid, signum)
        code = ended(pid)
        # Before the training begins (nothing is computed yet) the signal does what it does to any program.
        assert code in (128 + signum, -signum, 0), code
        handled += code == 128 + signum
        good += resumed_as(reference, cwd)
        shutil.rmtree(cwd)
    return (
        good,
        30,
        f"signalled runs resumed bitwise ({handled} ended with exit code 128 + n, the others before training)",
    )


def memory(root, reference, seconds, draw):
    """1,000 checkpoints, 10,000 weights phases: resident memory and open files before and after."""
    from mixadv.attacks import PGD
    from mixadv.callbacks import WholeFiles
    from mixadv.lambda_solvers import OracleSubgradient
    from mixadv.losses import AT
    from mixadv.mixture import Mixture
    from mixadv.mixture_game import MixtureGame
    from mixadv.models import build_member
    from mixadv.threat_model import ThreatModel

    torch.set_num_threads(1)
    members = [build_member("linear", num_classes=10, image_shape=(1, 8, 8)) for _ in range(3)]
    mixture = Mixture(members)
    state = {"state_dict": mixture.state_dict(), "more": [torch.randn(100_000), {"t": 3}]}
    path = root / "one.ckpt"

    def checkpoint():
        WholeFiles().save_checkpoint(state, path)
        read_checkpoint(path)

    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    solver, ball = OracleSubgradient(num_steps=2), ThreatModel("linf", 0.1)

    def phase():
        game = MixtureGame(mixture, x, y, ball, [PGD(num_steps=1, keep="objective")], AT())
        mixture.set_weights(solver.solve(game).weights)

    good = 0
    for what, work, count in (("checkpoints", checkpoint, 1000), ("weights phases", phase, 10_000)):
        for _ in range(count // 10):
            work()
        before = usage()
        for _ in range(count):
            work()
        after = usage()
        growth = after[0] / before[0] - 1
        print(f"  {count} {what}: memory {100 * growth:+.2f} %, open files {before[1]} -> {after[1]}", flush=True)
        good += growth < 0.01 and after[1] <= before[1]
    return good, 2, "loops without growth of memory (1 %) or open files"


def usage():
    """Resident bytes and open files of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))


PARTS = {"kills": kills, "writes": writes, "signals": signals, "memory": memory}


def soak():
    """Run the parts that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them if none is named")
    chosen = parser.parse_args().parts or list(PARTS)
    # What a run imports, imported before the forks, while nothing has started a thread.
    for name in (
        "matplotlib.pyplot",
        "scipy.optimize",
        "sklearn.datasets",
        "mixadv.lambda_solvers",
        "mixadv.tasks.train",
    ):
        importlib.import_module(name)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ended(started(root / "warm"))
        begun = time.monotonic()
        assert ended(started(root / "whole")) == 0, (root / "whole" / "log.txt").read_text()
        seconds = time.monotonic() - begun
        reference = content(root / "whole")
        print(f"The uninterrupted run takes {seconds:.1f} s", flush=True)
        for name in chosen:
            begun = time.monotonic()
            good, count, what = PARTS[name](root, reference, seconds, random.Random(f"soak {name}"))
            print(f"{name}: {good} of {count} {what} ({time.monotonic() - begun:.0f} s)", flush=True)
            failed |= good < count
    return int(failed)


if __name__ == "__main__":
    sys.exit(soak())
