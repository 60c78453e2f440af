"""What studies/fifteen.py runs, how long that should take, and how many epochs fit.

The cost model is that of docs/performance.md, in passes of one member over one image; a backward pass to the parameters
counts twice. Seconds are projected from assumed rates before anything ran, and from a measured step afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gpu_processes  # noqa: F401 - puts the package on the path

from mixadv.attacks import APGD, PGD
from mixadv.attacks.climber import LatticeClimber
from mixadv.tasks.attack_cost import passes_of_protocol

# Attacks of the measurement: PGD-20, APGD-CE and the climber, each once; `attacks_of` builds the same.
PROTOCOL = (
    "protocol=fast",
    "protocol.name=fifteen",
    "protocol.diagnosed=0",
    "protocol.save_points=true",
    "protocol.attacks.pgd-20.restarts=1",
    "~protocol.attacks.arc",
    "~protocol.attacks.subsets",
    "~protocol.attacks.square",
)
# Share of the time that a plan leaves unused, because runs differ from one another.
MARGIN = 0.1
# Seconds of the last step, which replays points; it begins with the start of a process.
REPLAYS = 15.0


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        accelerator: of Lightning.
        model, batch, steps: of the training; steps of its PGD.
        validation_steps: of the PGD after each epoch.
        num_train, num_val, num_test: images.
        members: L of the mixture.
        attack_steps: of APGD and of the climber in the measurement.
        T_theta, solver_steps: batches between two weights phases, and responses in each.
        more: further settings of the trainings.
        checks, speed: seconds that these parts may take.
        most_epochs: E is not larger.
        pass_seconds, exact_pass_seconds: assumed seconds of a forward pass of the model over one image, in training
            and in measurements, which are in float32.
        start: assumed seconds from the start of a process to its first step.
        wrap_up: seconds kept for tables and figures.
    """

    accelerator: str
    model: str
    batch: int
    steps: int
    validation_steps: int
    num_train: int
    num_val: int
    num_test: int
    attack_steps: int
    T_theta: int
    checks: float
    speed: float
    most_epochs: int
    pass_seconds: float
    exact_pass_seconds: float
    start: float
    wrap_up: float
    solver_steps: int = 10
    members: int = 3
    more: tuple[str, ...] = ()

    def training(self, root: Path, num_members: int, epochs: int, folder: Path) -> list[str]:
        """The settings of one training, whose directory is `folder`."""
        return [
            *("data=cifar10_jpeg", f"data.root={root}", f"model={self.model}", f"L={num_members}"),
            *("schedule=shared", "scheduler=one_cycle", "optimizer.lr=0.4", f"schedule.T_theta={self.T_theta}"),
            *(f"attack.num_steps={self.steps}", f"lambda_solver.num_steps={self.solver_steps}"),
            *(f"data.batch_size={self.batch}", f"data.eval_batch_size={self.batch}"),
            *(f"data.num_train={self.num_train}", f"data.num_val={self.num_val}", f"data.num_test={self.num_test}"),
            *(f"trainer.accelerator={self.accelerator}", f"trainer.max_epochs={epochs}"),
            # In trainings of minutes, compiling takes longer than it gains.
            *("compile=false", "logger=csv"),
            *self.measurement(),
            *self.more,
            f"hydra.run.dir={folder}",
        ]

    def measurement(self) -> list[str]:
        """The settings of the protocol."""
        apgd = f"{{_target_:mixadv.attacks.apgd.APGD,num_steps:{self.attack_steps},loss:ce}}"
        return [
            *PROTOCOL,
            f"protocol.validation.num_steps={self.validation_steps}",
            f"+protocol.attacks.apgd-ce={apgd}",
            f"protocol.attacks.climber.num_steps={self.attack_steps}",
        ]

    def attacks(self) -> dict[str, Any]:
        """The attacks of `measurement`."""
        apgd, climber = APGD(num_steps=self.attack_steps, loss="ce"), LatticeClimber(num_steps=self.attack_steps)
        return {"pgd-20": PGD(20), "apgd-ce": apgd, "climber": climber}

    def batches(self) -> int:
        """In an epoch."""
        return max(1, self.num_train // self.batch)


# Assumed, not measured: 150 TFLOP/s in bf16 and 60 in float32; a forward pass of ResNet-18 is 1.11 GFLOP. PGD-4, so
# that more epochs fit.
FULL = Size(
    accelerator="gpu",
    model="resnet18",
    batch=512,
    steps=4,
    validation_steps=20,
    num_train=48_976,
    num_val=1024,
    num_test=1000,
    attack_steps=100,
    T_theta=50,
    checks=60,
    speed=120,
    most_epochs=30,
    pass_seconds=1.11e9 / 150e12,
    exact_pass_seconds=1.11e9 / 60e12,
    start=15,
    wrap_up=35,
)
# The same steps on a CPU, for a test of them.
TINY = Size(
    accelerator="cpu",
    model="small_resnet",
    batch=16,
    steps=1,
    validation_steps=2,
    num_train=48,
    num_val=16,
    num_test=16,
    attack_steps=2,
    T_theta=2,
    checks=300,
    speed=200,
    most_epochs=2,
    pass_seconds=1e-3,
    exact_pass_seconds=1e-3,
    start=8,
    wrap_up=60,
    solver_steps=2,
)


def step_passes(size: Size, num_members: int) -> int:
    """Passes of a training step for one image: L (2K + 3)."""
    return num_members * (2 * size.steps + 3)


def epoch_seconds(size: Size, num_members: int, step: float) -> float:
    """Seconds of an epoch of L members with its validation and its weights phases, if a step takes `step` seconds.

    A best response costs about a step, and the validation L (2V + 5) passes for each image.
    """
    phases = size.solver_steps / size.T_theta if num_members > 1 else 0.0
    validation = num_members * (2 * size.validation_steps + 5) * size.num_val / size.batch
    return step * (size.batches() * (1 + phases) + validation / step_passes(size, num_members))


@cache
def measurement_passes(size: Size, num_members: int) -> int:
    """Passes of members over single images in the measurement of L members.

    The validation images are attacked once more, to choose a single model and the vote that the mixture is compared
    with.
    """
    passes = size.num_test * passes_of_protocol(size.attacks(), num_members, 10, "linf")
    if num_members > 1:
        passes += size.num_val * passes_of_protocol({"pgd-20": PGD(size.validation_steps)}, num_members, 10, "linf")
    return passes


@dataclass(frozen=True)
class Rates:
    """Seconds of a training step for each L, and of a pass of one member over one image in float32."""

    steps: Mapping[int, float]
    exact_pass: float

    @classmethod
    def assumed(cls, size: Size) -> "Rates":
        """Those that `size` assumes before anything ran."""
        steps = {n: size.batch * step_passes(size, n) * size.pass_seconds for n in (1, size.members)}
        return cls(steps, size.exact_pass_seconds)

    def seconds(self, size: Size, num_members: int, epochs: int) -> float:
        """Of a training of L members with its start and its measurement."""
        training = epochs * epoch_seconds(size, num_members, self.steps[num_members])
        return size.start + training + measurement_passes(size, num_members) * self.exact_pass


@dataclass(frozen=True)
class Training:
    """One of the three trainings, and its seconds, projected from assumed rates and planned with measured ones."""

    name: str
    num_members: int
    epochs: int
    projected: float
    planned: float


def plan(size: Size, left: float, measured: Rates) -> list[Training]:
    """L = 1 for E epochs, L members for E, and L = 1 for L E, with the largest E for which all fit, at least 1.

    Args:
        size: of the trainings.
        left: seconds for the three trainings and the replays.
        measured: of a step of this size.
    """

    def trainings(epochs: int) -> list[tuple[int, int]]:
        return [(1, epochs), (size.members, epochs), (1, size.members * epochs)]

    def fit(epochs: int) -> bool:
        needed = REPLAYS + sum(measured.seconds(size, *one) for one in trainings(epochs))
        return needed <= (1 - MARGIN) * left

    epochs = max([1, *filter(fit, range(1, size.most_epochs + 1))])
    before = Rates.assumed(size)
    return [
        Training(f"L{n}-E{e}", n, e, before.seconds(size, n, e), measured.seconds(size, n, e))
        for n, e in trainings(epochs)
    ]
