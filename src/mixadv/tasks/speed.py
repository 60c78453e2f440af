"""``auto`` in precision and compile: what pays on the device, and in a run of this length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from rich.console import Console

from mixadv.attacks.apgd import APGD
from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.search import Attack, value_and_gradient
from mixadv.attacks.suite import MIXTURE, TWIN, passes_of
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.losses import cross_entropy
from mixadv.mixture import SMALL_BATCH, Mixture
from mixadv.tasks import build
from mixadv.tasks.choices import AUTO, Choices
from mixadv.training import MixtureTraining
from mixadv.training.generators import same_draws

# Compiling takes one to three minutes, for graphs of the attack, the update and other sizes of batch; on two CPU cores
# it then saves about a quarter (docs/performance.md). A run has to be long enough for that: in floating-point
# operations, for each thread of a CPU about 20 minutes, for a GPU some minutes.
ENOUGH = {"cpu": 5e13, "cuda": 1e16}


def settle_precision(cfg: DictConfig, device: torch.device, choices: Choices) -> str:
    """Lightning's precision for training; auto is bf16-mixed on GPUs whose tensor cores compute in it, else 32-true.

    Evaluation is in float32 always. On CPUs without instructions for bfloat16 autocast is many times slower.
    """
    if cfg.trainer.precision != AUTO:
        return str(cfg.trainer.precision)
    # Compute capability 8 is the first with them; is_bf16_supported() counts emulation.
    cores = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return str(choices.settle("trainer.precision", lambda: "bf16-mixed" if cores else "32-true"))


def settle_compilation(
    cfg: DictConfig, operations: Callable[[], float], device: torch.device, choices: Choices
) -> bool:
    """Whether members are compiled; ``auto`` asks whether a run of so many floating-point operations repays it.

    It counts and does not time, so that the same command decides the same.
    """
    if cfg.compile != AUTO:
        return _wanted(cfg)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    enough = ENOUGH.get(device.type, float("inf")) * threads
    return bool(choices.settle("compile", lambda: operations() > enough))


def operations_of(mixture: Mixture, image_shape: Sequence[int]) -> float:
    """Floating-point operations of one image's forward pass through all the members, by torch's own counter.

    Two for each multiply-add of convolutions and matrix products; other layers count nothing.
    """
    from torch.utils.flop_counter import FlopCounterMode

    place = mixture.weights.device
    counter = FlopCounterMode(display=False)
    with mixture.attack_mode(), torch.no_grad(), same_draws(place), counter:
        # Two, for members that take no image alone.
        mixture.member_logits(torch.full((2, *image_shape), 0.5, device=place))
    return counter.get_total_flops() / 2


def passes_of_protocol(attacks: Mapping[str, Attack], mixture: Mixture, num_classes: int) -> float:
    """Forward and backward passes of one image through each member that a measurement may take at most, about.

    Attacks on one member alone count with their share. Restarts and steps multiply; an attack that says neither counts
    as one of 100 queries.
    """
    total = 0.0
    for one in passes_of(attacks, mixture):
        attack = one.attack
        alone = one.against not in (MIXTURE, TWIN)
        objectives = len(attack.objectives(num_classes)) if isinstance(attack, APGD) else 1
        steps = getattr(attack, "num_steps", None)
        # A backward pass for each class that ARC tries.
        backward = getattr(attack, "num_runner_ups", 1)
        passes = getattr(attack, "num_queries", 100) if steps is None else (1 + backward) * steps
        total += passes * getattr(attack, "restarts", 1) * objectives / (mixture.num_members if alone else 1)
    return total


def operations_of_training(
    cfg: DictConfig, module: MixtureTraining, protocol: Mapping[str, Attack], data: ImageDataModule
) -> float:
    """Floating-point operations of ``task=train``, about: training, validation and the final measurement."""
    training = 2 * (module.training_attack.num_steps + 1) * batches_of_training(cfg, module, data) * data.batch_size
    validations = cfg.trainer.max_epochs / (cfg.trainer.check_val_every_n_epoch or 1)
    seen = attacked_images(cfg.trainer.limit_val_batches, data.num_val, data)
    validation = 2 * module.validation_attack.num_steps * seen * validations
    tested = attacked_images(cfg.trainer.limit_test_batches, data.num_test, data)
    measurement = passes_of_protocol(protocol, module.mixture, data.num_classes) * tested
    return (training + validation + measurement) * operations_of(module.mixture, data.image_shape)


def batches_of_training(cfg: DictConfig, module: MixtureTraining, data: ImageDataModule) -> int:
    """How many batches t a training of ``trainer.max_epochs`` has."""
    length = module.schedule.batches_in_epoch(data.batches_per_pass)
    return cfg.trainer.max_epochs * build.limited(cfg.trainer.limit_train_batches, length)


def attacked_images(limit: float | None, count: int, data: ImageDataModule) -> int:
    """How many of `count` images there are in as many batches as a limit leaves."""
    batches = build.limited(limit, -(-count // data.eval_batch_size))
    return min(count, batches * data.eval_batch_size)


@dataclass(frozen=True)
class Graphs:
    """What compiled members will be run on first: full batches, attacked and, if `trained`, in an update.

    Args:
        batch_size: images. image_shape: [C, H, W]. device: where they run.
        trained: whether members are updated. bf16: whether under autocast.
    """

    batch_size: int
    image_shape: Sequence[int]
    device: torch.device
    trained: bool = False
    bf16: bool = False

    def make(self, mixture: Mixture) -> None:
        """Run each member once; random states, parameters and statistics stay as they are."""
        x = torch.full((self.batch_size, *self.image_shape), 0.5, device=self.device)
        y = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        # Attack mode puts back what the update changes.
        with same_draws(self.device), torch.inference_mode(False), mixture.attack_mode(), autocast:
            value_and_gradient(mixture, ExpectedLoss(), x, y, None)
            for member in mixture.members if self.trained else ():
                parameters = list(member.train().requires_grad_(True).parameters())
                torch.autograd.grad(cross_entropy(member(x), y).mean(), parameters, allow_unused=True)


def compile_members(cfg: DictConfig, mixture: Mixture, graphs: Graphs, console: Console) -> None:
    """Compile the members in place, and make the graphs of full batches first, whatever the run begins with.

    Where that fails, members run as they were written, which is said.

    Raises:
        UserError: it fails, and ``compile=true`` asks for it.
    """
    if graphs.batch_size < SMALL_BATCH and graphs.device.type == "cpu":
        line = f"compile: batches of {graphs.batch_size} images run as written, {SMALL_BATCH} or more are compiled"
        console.print(line, highlight=False, soft_wrap=True)
    # Graphs of earlier jobs in this process count against the limit beyond which nothing is compiled any more.
    torch.compiler.reset()
    mixture.to(graphs.device).compile()
    try:
        graphs.make(mixture)
    except torch.OutOfMemoryError:
        raise
    # What compilers raise: errors of their own, of the toolchain that is not there, of a cache that cannot be written.
    except (RuntimeError, OSError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        if _wanted(cfg):
            raise UserError(
                f"compile=true: the members cannot be compiled here ({reason}): use compile=false"
            ) from error
        mixture.uncompile()
        line = f"compile=auto: the members run as they were written, for they cannot be compiled here ({reason})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def settle_evaluation(
    cfg: DictConfig,
    data: ImageDataModule,
    mixture: Mixture,
    passes: float,
    device: torch.device,
    choices: Choices,
    console: Console,
) -> None:
    """Compile the members where attacks of so many `passes` of single images through each member repay it."""
    if settle_compilation(cfg, lambda: passes * operations_of(mixture, data.image_shape), device, choices):
        graphs = Graphs(min(data.eval_batch_size, data.num_test), data.image_shape, device)
        compile_members(cfg, mixture, graphs, console)


def _wanted(cfg: DictConfig) -> bool:
    """Whether ``compile=true`` is said (quoted, it is text)."""
    return str(cfg.compile).lower() == "true"
