"""``auto`` in precision and compile: what pays on the device, and in a run of this length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from rich.console import Console

from mixadv.attacks.objectives import ExpectedLoss
from mixadv.attacks.search import value_and_gradient
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.losses import cross_entropy
from mixadv.mixture import SMALL_BATCH, Mixture
from mixadv.runs.choices import AUTO, Choices
from mixadv.training import MixtureTraining
from mixadv.training.generators import same_draws

# Compiling takes one to three minutes, for graphs of the attack, the update and other sizes of batch; a GPU's training
# of so many batches repays it. On two CPU cores it saves about a quarter (docs/performance.md).
ENOUGH_BATCHES = 2000


def settle_precision(cfg: DictConfig, device: torch.device, choices: Choices) -> str:
    """Lightning's precision for training; auto is bf16-mixed on GPUs whose tensor cores compute in it, else 32-true.

    Evaluation is in float32 always. On CPUs without instructions for bfloat16 autocast is many times slower.
    """
    if cfg.trainer.precision != AUTO:
        return str(cfg.trainer.precision)
    # Compute capability 8 is the first with them; is_bf16_supported() counts emulation.
    cores = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return str(choices.settle("trainer.precision", lambda: "bf16-mixed" if cores else "32-true"))


def settle_compilation(cfg: DictConfig, batches: int, device: torch.device, choices: Choices) -> bool:
    """Whether members are compiled; auto: on a GPU, in a training of at least `ENOUGH_BATCHES` batches.

    Args:
        batches: of the training; 0 for one that only measures.
    """
    if cfg.compile != AUTO:
        return _wanted(cfg)
    return bool(choices.settle("compile", lambda: device.type == "cuda" and batches >= ENOUGH_BATCHES))


def batches_of_training(cfg: DictConfig, module: MixtureTraining, data: ImageDataModule) -> int:
    """How many batches t a training of ``trainer.max_epochs`` has."""
    limit = cfg.trainer.limit_train_batches
    return cfg.trainer.max_epochs * module.schedule.batches_in_epoch(data.batches_per_pass, limit)


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
    cfg: DictConfig, data: ImageDataModule, mixture: Mixture, device: torch.device, choices: Choices, console: Console
) -> None:
    """Compile the members of an evaluation where ``compile=true`` asks for it."""
    if settle_compilation(cfg, 0, device, choices):
        graphs = Graphs(min(data.eval_batch_size, data.num_test), data.image_shape, device)
        compile_members(cfg, mixture, graphs, console)


def _wanted(cfg: DictConfig) -> bool:
    """Whether ``compile=true`` is said (quoted, it is text)."""
    return str(cfg.compile).lower() == "true"
