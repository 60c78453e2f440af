"""``task=predict``: the answers of a mixture on the images of a folder, with their probabilities, in a csv file."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from mixadv.checkpoint_files import digest_of
from mixadv.console import Console
from mixadv.correctness import answered
from mixadv.data.image_folder import ENDINGS, ImageFolder
from mixadv.errors import UserError
from mixadv.files import digest_of_files
from mixadv.members.recipe import member_recipes
from mixadv.members.store import files_of
from mixadv.mixture import Mixture
from mixadv.redaction import printable
from mixadv.report import Run
from mixadv.report.cells import Column, Table, write_csv
from mixadv.report.show import PREDICTIONS
from mixadv.results import FILE, Data, Results, write
from mixadv.runs.directory import State, mark_done, recorded, write_config
from mixadv.seeding import generator_for
from mixadv.setting_keys import PREDICT, is_indifferent
from mixadv.tasks import build
from mixadv.tasks.provenance import device_name, provenance
from mixadv.tasks.session import as_finished

# Images in memory at once.
BATCH = 256


def check_read(overrides: Sequence[str]) -> None:
    """Refuse settings that ``task=predict`` does not read; raises UserError."""
    for key in build.keys_of(overrides):
        if key.split(".")[0] not in PREDICT and not is_indifferent(key):
            raise UserError(f"{key}=...: task=predict does not read it, the mixture decides; leave it out")


def content_of_prediction(cfg: DictConfig) -> str:
    """Digests CLASSIFIERS:IMAGES: of the files of the mixture, and of the names, sizes and dates of the images."""
    folder = Path(cfg.predict.images)
    stats = [(str(path.relative_to(folder)), path.stat()) for path in _images_in(folder)[0]]
    stamps = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    classifiers = digest_of_files(files_of(Path(cfg.mixture)))
    return f"{classifiers}:{digest_of({'images': stamps})}"


def predict_images(cfg: DictConfig, run_dir: Path, state: State, *, mixture: Mixture, config: dict[str, Any]) -> Run:
    """Write predictions.csv: for every image of ``cfg.predict.images`` the answer of the randomized classifier, with a
    member drawn from ``cfg.seed``, and the probabilities over that draw.

    Images are in the order of their paths, and image i has the same draw whatever the batches are.

    Args:
        cfg: the checked configuration.
        run_dir: a claimed directory, `state` what it holds (not a finished run).
        mixture: in eval mode. config: what it records of itself.

    Raises:
        UserError: the folder holds no images, or images that the mixture does not take.
    """
    started = time.perf_counter()
    console = Console()
    folder = Path(cfg.predict.images)
    paths, left_out = _images_in(folder)
    if not paths:
        raise UserError(f"predict.images={folder} holds no images ({', '.join(ENDINGS)})")
    shape = _image_shape(config)
    resized = cfg.predict.resize or bool(config.get("data", {}).get("image_size"))
    device = build.resolve_device(cfg)
    mixture.to(device)
    write_config(run_dir, cfg)
    verb = "Starting again in" if state is State.UNFINISHED else "Writing to"
    console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    drawn = mixture.sample_members(len(paths), generator_for(cfg.seed, "predict")).cpu()
    parts = [_answers(mixture, x.to(device)) for x in _batches(folder, paths, shape, resized, left_out)]
    if left_out:
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(left_out.items()))
        line = printable(f"{folder}: left out: {counts}.")
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    labels = torch.cat([part[0] for part in parts], dim=1).cpu()
    chances, means = (torch.cat([part[i] for part in parts]).cpu() for i in (1, 2))
    names = mixture.class_names or ()
    # Columns need names of their own; a mixture of factories may record the names of other classes.
    if len({*names}) != chances.shape[1]:
        names = tuple(map(str, range(chances.shape[1])))
    answers = [names[k] if k >= 0 else "" for k in labels.gather(0, drawn[None])[0].tolist()]
    files = [path.relative_to(folder).as_posix() for path in paths]
    lists = {"file": files, "member": drawn.tolist(), "answer": answers}
    lists |= {f"p_answer/{name}": column.tolist() for name, column in zip(names, chances.T, strict=True)}
    lists |= {f"mean_softmax/{name}": column.tolist() for name, column in zip(names, means.T, strict=True)}
    columns: list[Column[int]] = [Column(name, name, partial(_entry, values)) for name, values in lists.items()]
    write_csv(run_dir / PREDICTIONS, Table("", columns, range(len(paths))))
    results = Results(
        task=cfg.task,
        seed=cfg.seed,
        device=device_name(device),
        **provenance(),
        config=recorded(cfg),
        L=mixture.num_members,
        weights=tuple(mixture.weights.tolist()),
        num_examples=len(paths),
        answers=dict(Counter(answers).most_common()),
        data=Data(left_out=dict(sorted(left_out.items()))),
        seconds={"total": round(time.perf_counter() - started, 3)},
    )
    write(run_dir / FILE, results)
    run = as_finished(run_dir)
    mark_done(run_dir)
    return run


def _entry(values: list[Any], row: int) -> Any:
    return values[row]


def _images_in(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a folder and below it, sorted by their paths, and the numbers of other files by ending.

    Hidden files and folders are not counted.
    """
    found, others = [], Counter[str]()
    for place, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            if path.name.lower().endswith(ENDINGS):
                found.append(path)
            else:
                ending = path.suffix.lower()
                others[f"{ending} files" if ending else "files without an ending"] += 1
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix()), others


def _image_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """C, H, W of the images that the mixture records."""
    for record in (config, *(recipe.arguments for recipe in member_recipes(config))):
        shape = record.get("image_shape")
        if isinstance(shape, list) and len(shape) == 3 and shape[0] in (1, 3):
            return shape[0], shape[1], shape[2]
    raise UserError(
        "the mixture does not record the shape of its images, or they are neither grey nor RGB: use "
        "mixadv.load_mixture(...).predict(images) in Python"
    )


def _batches(
    folder: Path, paths: Sequence[Path], shape: tuple[int, int, int], resized: bool, left_out: Counter[str]
) -> Iterator[Tensor]:
    """Images [B, C, H, W] in [0, 1]; images whose transparency is dropped are counted in `left_out`."""
    channels, height, width = shape
    reader = ImageFolder(folder, image_size=height if resized and height == width else None, channels=channels)
    for start in range(0, len(paths), BATCH):
        images = []
        for path in paths[start : start + BATCH]:
            pixels, transparent = reader.decode(path)
            image = torch.tensor(pixels)
            if transparent:
                left_out["transparency of images"] += 1
            if tuple(image.shape) != shape:
                remedy = "predict.resize=true resizes all images" if height == width else "resize it"
                raise UserError(
                    f"{path} is {image.shape[2]}x{image.shape[1]}, but the mixture takes {width}x{height}: {remedy}"
                )
            images.append(image)
        yield torch.stack(images).float() / 255


@torch.no_grad()
def _answers(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For images x [B, ...]: the members' labels [L, B] (-1: no answer), the probability of each answer
    sum_k lambda_k 1[f_k(x) = c] [B, C], and the averaged probabilities sum_k lambda_k softmax(f_k(x))_c [B, C]."""
    with mixture.attack_mode(plain=True):
        logits = mixture.member_logits(x)
    labels = torch.where(answered(logits), logits.argmax(-1), -1)
    right = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=x.device)
    return labels, mixture.expectation(right), mixture.expectation(logits.to(mixture.weights.dtype).softmax(-1))
