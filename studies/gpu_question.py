#!/usr/bin/env python3
"""Steps of studies/fifteen.py: the images, the seconds of a step, points replayed on other mixtures,
and curves of the trainings.

python studies/gpu_question.py images --archive cifar10-jpeg.tar.gz --root DIR
python studies/gpu_question.py step --out step.json [--cpu]
python studies/gpu_question.py replays --out replays.json --runs RUN ... [--cpu]
"""

import argparse
import json
import subprocess
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_plan import FULL, TINY, Size
from training_job import BALL, FAST, PLAIN, Job

from mixadv import load_mixture, points_file
from mixadv.attacks import PGD
from mixadv.data.image_folder import ImageFolder
from mixadv.files import write_text
from mixadv.report.figures.curves import column
from mixadv.report.figures.style import LINE_COLOURS, MARKERS, new_figure, save
from mixadv.report.files import read_run
from mixadv.report.names import format_ball

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps that are timed, after as many that are not.
TIMED = 5


def images(archive: Path, root: Path) -> None:
    """Unpack the archive into `root` and decode it into the cache that all runs share."""
    if not (root / "test").is_dir():
        # Renamed when it is whole: whatever was stopped begins anew.
        beside = root.with_name(f"{root.name}.part")
        beside.mkdir(parents=True, exist_ok=True)
        # Several times as fast as the module tarfile.
        subprocess.run(["tar", "xzf", archive, "-C", beside], check=True)
        beside.rename(root)
    data = ImageFolder(root)
    data.prepare_data()
    data.setup()
    print(f"{data.num_train + data.num_val:,} training and {data.num_test:,} test images", flush=True)


def step_seconds(size: Size, cpu: bool) -> dict[str, Any]:
    """Seconds of a training step for each L, and of a pass of one member over one image in float32."""
    ours = (PLAIN if cpu else FAST) | {"compile": None, "channels_last": True}
    args = Namespace(model=size.model, steps=size.steps, images=4 * size.batch, cpu=cpu)
    steps = {}
    for members in (1, size.members):
        job = Job(args, members, size.batch, ours)
        job.steps(TIMED)
        steps[members] = job.steps(TIMED + 1)
    mixture = job.mixture
    mixture.set_weights([1.0] + [0.0] * (size.members - 1))
    x, y = (part.to(job.device) for part in next(iter(job.data.endless(torch.device("cpu")))))
    with mixture.attack_mode():
        y = mixture(x).argmax(1)
        PGD(1)(mixture, x, y, BALL)
        seconds = []
        # A point is worth a forward and a backward pass; the difference of two lengths leaves out what is fixed.
        for count in (2, 2 + TIMED):
            if not cpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            PGD(count, start="none", keep="last")(mixture, x, y, BALL)
            if not cpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    exact = max(seconds[1] - seconds[0], 1e-9) / (2 * TIMED * len(x))
    return {"steps": steps, "exact_pass": exact}


@torch.no_grad()
def replays(runs: Sequence[Path], device: torch.device) -> list[dict[str, Any]]:
    """The exact expected accuracy of every mixture at the worst points found for every mixture.

    Args:
        runs: directories of finished runs that measured the same images and kept their points.
        device: of the passes, which are in plain float32.

    Returns:
        For each mixture its accuracy in percent at the points of each run, and at the worst of all points.

    Raises:
        ValueError: two runs measured other images.
    """
    saved = {run.name: points_file.read(run / points_file.FILE) for run in runs}
    first = next(iter(saved.values()))
    rows = []
    for run in runs:
        mixture = load_mixture(run).to(device)
        row: dict[str, Any] = {"mixture": run.name}
        worst = torch.ones(len(first.labels), dtype=torch.float64)
        for name, points in saved.items():
            if not torch.equal(points.indices, first.indices):
                raise ValueError(f"{run} and {name} measured other images: their points cannot be compared")
            found = []
            with mixture.attack_mode(plain=True):
                for x, y in zip(points.points.split(500), points.labels.split(500), strict=True):
                    found.append(mixture.expected_accuracy(x.to(device), y.to(device)).cpu())
            accuracy = torch.cat(found).to(torch.float64)
            worst = torch.minimum(worst, accuracy)
            row[f"points of {name}"] = 100 * float(accuracy.mean())
        rows.append(row | {"worst of all": 100 * float(worst.mean()), "images": len(worst)})
    return rows


def curves(runs: Sequence[Path]) -> "Figure":
    """Validation accuracy under PGD after each epoch, of trainings of different lengths.

    On the left against the epochs that each member has seen, on the right against those of all members together, which
    are in proportion to the cost: L times as many.
    """
    found = [read_run(run) for run in runs]
    figure = new_figure(5.4, f"{found[0].data} · {format_ball(found[0].norm, found[0].eps)}")
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.27, top=0.9, wspace=0.08)
    titles = ("epochs per model", "epochs of all members together")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title in zip(panels, titles, strict=True):
        for i, run in enumerate(found):
            epochs, values = column(run, "val/robust_accuracy")
            size = run.num_members or 1
            look = {"color": LINE_COLOURS[i % len(LINE_COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            label = f"L = {size}, {run.config['trainer']['max_epochs']} epochs"
            axes.plot(epochs * (size if title == titles[1] else 1), values, label=label, **look)
        axes.set_xlabel(title)
        axes.set_xlim(0, None)
    panels[0].set_ylabel("validation accuracy under PGD")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.14), ncols=3)
    return figure


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("images", "step", "replays", "curves"))
    parser.add_argument("--runs", nargs="+", type=Path)
    for name in ("archive", "root", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.what == "images":
        images(args.archive, args.root)
    elif args.what == "step":
        write_text(args.out, json.dumps(step_seconds(TINY if args.cpu else FULL, args.cpu)) + "\n")
    elif args.what == "curves":
        save(lambda: curves(args.runs), args.out)
    else:
        found = replays(args.runs, torch.device("cpu" if args.cpu else "cuda"))
        write_text(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
