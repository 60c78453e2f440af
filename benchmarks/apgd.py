"""APGD-CE, then APGD-DLR on what is left, against pyautoattack at equal iterations and restarts.

Two targets: one network, and the averaged prediction of a mixture of three (`Mixture([mixture])`). The networks are
trained here once, adversarially, and kept in the results folder. Robust accuracy is recomputed at the points that each
side returned, by a plain copy of the network.

    python benchmarks/apgd.py [--data FOLDER_OR_NPZ] [--images 500] [--steps 100] [--restarts 1 5] [--repeats 3]

--data (default: $DATA_DIR, then data): a folder that holds CIFAR-10's archive, or an .npz of train_images and
test_images (uint8 [N, 3, 32, 32]), train_labels and test_labels. Without either: digits and small_cnn.
"""

import argparse
import copy
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor, nn

from mixadv import Mixture, ThreatModel
from mixadv.attacks import APGD, PGD
from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.data.cifar10 import CIFAR10
from mixadv.data.digits import Digits
from mixadv.errors import UserError
from mixadv.models import build_member

COLUMNS = ["target", "steps", "restarts", "attack", "seconds", "peer/it", "robust_accuracy", "spread", "first_call_s"]
MEMBERS = 3


class Arrays(ImageDataModule):
    """Images from an .npz file."""

    name = "images of an .npz"

    def __init__(self, path: Path, **common: Any) -> None:
        super().__init__(**common)
        self.path = path

    def load(self) -> ImageCorpus:
        with np.load(self.path) as file:
            parts = {key: torch.from_numpy(file[key]) for key in file.files}
        labels = [parts[f"{split}_labels"].long() for split in ("train", "test")]
        names = tuple(str(k) for k in range(int(labels[0].max()) + 1))
        return ImageCorpus(parts["train_images"], labels[0], parts["test_images"], labels[1], names)


def images(path: Path, model: str, count: int) -> tuple[ImageDataModule, str, float]:
    """The data, the network for them, and the radius of the ball."""
    common: dict[str, Any] = {"batch_size": 64, "val_fraction": 0.02}
    try:
        if path.suffix == ".npz":
            data: ImageDataModule = Arrays(path, num_test=count, **common)
        else:
            data = CIFAR10(path, download=False, num_train=5000, num_test=count, **common)
        data.prepare_data()
        data.setup("fit")
        return data, model, 4 / 255
    except UserError as error:
        print(f"digits and small_cnn instead of CIFAR-10 and {model}: {error}")
    data = Digits(batch_size=64)
    data.setup("fit")
    return data, "small_cnn", 0.1


def trained(data: ImageDataModule, model: str, eps: float, epochs: int) -> list[nn.Module]:
    """Three networks, trained adversarially with PGD-3 under different seeds, or as they were kept."""
    path = harness.results_folder() / f"apgd-{type(data).__name__}-{model}-{data.num_train}-{epochs}.pt"
    shape = {"num_classes": data.num_classes, "image_shape": data.image_shape, "mean": data.mean, "std": data.std}
    members = []
    for seed in range(MEMBERS):
        torch.manual_seed(seed)
        members.append(build_member(model, **shape))
    if path.exists():
        for member, state in zip(members, torch.load(path, weights_only=True), strict=True):
            member.load_state_dict(state)
        return [member.eval() for member in members]
    ball, attack, generator = ThreatModel("linf", eps), PGD(3, step_size=0.5, keep="last"), torch.Generator()
    per_pass = data.num_train // data.batch_size
    for k, member in enumerate(members):
        optimizer = torch.optim.SGD(member.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * per_pass)
        for _ in range(epochs):
            for x, y in data.train_dataloader():
                x_adv = attack(member, x, y, ball, generator)
                loss = nn.functional.cross_entropy(member.train()(x_adv), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
            data.train_dataloader().close_epoch()
        print(f"network {k} of {MEMBERS} trained, loss {loss.item():.2f}", flush=True)
    torch.save([member.state_dict() for member in members], path)
    return [member.eval() for member in members]


def in_batches(attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, size: int) -> Tensor:
    """Attack `size` images at a time."""
    return torch.cat([attack(*part) for part in zip(x.split(size), y.split(size), strict=True)])


@torch.no_grad()
def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model gets right, [N] bool."""
    return torch.cat([model(part) for part in x.split(250)]).argmax(-1) == y


def ours(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, restarts: int) -> Tensor:
    """CE on what is right, DLR on what still is."""
    ball, generator = ThreatModel("linf", eps), torch.Generator(x.device).manual_seed(0)
    x_adv = x.clone()
    for loss in ("ce", "dlr"):
        (rows,) = right(model, x_adv, y).nonzero(as_tuple=True)
        if len(rows):
            x_adv[rows] = APGD(steps, restarts=restarts, loss=loss)(Mixture([model]), x[rows], y[rows], ball, generator)
    return x_adv


def peer(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, restarts: int) -> Tensor:
    """The same with pyautoattack."""
    from pyautoattack.autopgd_base import APGDAttack

    x_adv = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zero gradients
        for loss in ("ce", "dlr"):
            (rows,) = right(model, x_adv, y).nonzero(as_tuple=True)
            if len(rows):
                attack = APGDAttack(
                    model, n_iter=steps, norm="Linf", n_restarts=restarts, eps=eps, loss=loss, device=x.device
                )
                x_adv[rows] = attack.perturb(x[rows], y[rows]).detach()
    return x_adv


def compare(target: str, model: nn.Module, data: tuple[Tensor, Tensor], args: argparse.Namespace, restarts: int) -> Any:
    """Rows of ours plain, ours compiled and the peer on one target."""
    torch.compiler.reset()
    x, y = data
    plain, compiled = copy.deepcopy(model), copy.deepcopy(model)
    # As others have it: in PyTorch's own layout of weights.
    theirs = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    for net in (plain, compiled, theirs):
        net.eval().requires_grad_(False)
    (compiled if isinstance(compiled, Mixture) else Mixture([compiled])).compile()
    attacks = {"ours, compiled": (ours, compiled), "ours, plain": (ours, plain), "pyautoattack": (peer, theirs)}
    points: dict[str, Tensor] = {}

    def run(name: str) -> None:
        attack, net = attacks[name]
        points[name] = in_batches(lambda a, b: attack(net, a, b, args.eps, args.steps, restarts), x, y, args.batch)

    # Ours compiles in its first call, the peer is imported in its own; neither is timed.
    first = {name: harness.seconds(lambda n=name: run(n)) for name in attacks}
    times = harness.interleaved({name: lambda n=name: run(n) for name in attacks}, args.repeats, warmup=0)
    found = harness.summary(times)
    ball = ThreatModel("linf", args.eps)
    rows = []
    for name in attacks:
        if not bool(ball.contains(points[name], x).all()):
            raise SystemExit(f"{name} left the ball")
        rows.append(
            {
                "target": target,
                "steps": args.steps,
                "restarts": restarts,
                "attack": name,
                "seconds": found[name]["median"],
                "peer/it": harness.paired_ratio(times, "pyautoattack", name),
                "robust_accuracy": float(right(plain, points[name], y).double().mean()),
                "clean_accuracy": float(right(plain, x, y).double().mean()),
                "spread": found[name]["spread"],
                "first_call_s": first.get(name),
                "times": times[name],
            }
        )
    return rows


def main() -> None:
    """Train or load, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DATA_DIR") or "data"))
    parser.add_argument("--model", default="small_resnet")
    parser.add_argument("--epochs", type=int, default=10, help="of training, for each network")
    parser.add_argument("--images", type=int, default=500, help="test images attacked")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--restarts", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    data, model, args.eps = images(args.data, args.model, args.images)
    print(f"APGD-CE + APGD-DLR, {data.name}, {model}, eps {args.eps:.4f}: {harness.describe()}", flush=True)
    # Passes over the few digits are short.
    members = trained(data, model, args.eps, args.epochs * (4 if isinstance(data, Digits) else 1))
    test = tuple(torch.cat(part)[: args.images] for part in zip(*data.test_dataloader(), strict=True))
    targets = {"one network": members[0], f"average of {MEMBERS}": Mixture(members, [0.4, 0.25, 0.35])}
    rows = []
    for restarts in args.restarts:
        for target, net in targets.items():
            rows += compare(target, net, test, args, restarts)
    print(f"{len(test[1])} images; clean accuracy {[round(row['clean_accuracy'], 3) for row in rows[::3]]}")
    harness.table(rows, COLUMNS)
    harness.save("apgd", rows, vars(args) | {"data": data.name, "model": model})


if __name__ == "__main__":
    main()
