"""The choices of ``trainer.precision=auto`` and ``compile=auto``, and the compilation of members."""

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
from mixadv.tasks.session import Session
from mixadv.training import MixtureTraining
from mixadv.training.generators import same_draws

# Compiling the attack and the update, for several batch sizes, takes one to three minutes. A training on a GPU saves
# more than that from about this number of batches. On two CPU cores it saves about a quarter (docs/performance.md).
ENOUGH_BATCHES = 2000


def settle_precision(cfg: DictConfig, device: torch.device, choices: Choices) -> str:
    """Lightning's precision for training: auto is bf16-mixed on GPUs with tensor cores for bfloat16, else 32-true.

    Evaluation always uses float32. On CPUs without bfloat16 instructions, autocast is many times slower.
    """
    if cfg.trainer.precision != AUTO:
        return str(cfg.trainer.precision)
    # Compute capability 8 is the first with such cores; torch.cuda.is_bf16_supported() is also true for emulation.
    cores = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return str(choices.settle("trainer.precision", lambda: "bf16-mixed" if cores else "32-true"))


def settle_compilation(cfg: DictConfig, batches: int, device: torch.device, choices: Choices) -> bool:
    """Whether to compile the members; auto: on a GPU, for a training of at least `ENOUGH_BATCHES` batches.

    Args:
        cfg: the configuration.
        batches: number of batches of the training; 0 for an evaluation.
        device: where the members run.
        choices: records the choice, see `mixadv.runs.choices`.
    """
    if cfg.compile != AUTO:
        return _is_required(cfg)
    return bool(choices.settle("compile", lambda: device.type == "cuda" and batches >= ENOUGH_BATCHES))


def batches_of_training(cfg: DictConfig, module: MixtureTraining, data: ImageDataModule) -> int:
    """The number of batches t in a training of ``trainer.max_epochs``."""
    limit = cfg.trainer.limit_train_batches
    return cfg.trainer.max_epochs * module.schedule.batches_in_epoch(data.batches_per_pass, limit)


@dataclass(frozen=True)
class Graphs:
    """The graphs that compiled members need first: full batches in an attack and, if `trained`, in an update.

    Args:
        batch_size: images per batch.
        image_shape: (C, H, W).
        device: where the members run.
        trained: whether members are updated.
        bf16: whether they run under autocast to bfloat16.
    """

    batch_size: int
    image_shape: Sequence[int]
    device: torch.device
    trained: bool = False
    bf16: bool = False

    def make(self, mixture: Mixture) -> None:
        """Run each member once. Random states, parameters and statistics are unchanged afterwards."""
        x = torch.full((self.batch_size, *self.image_shape), 0.5, device=self.device)
        y = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        # Attack mode restores the modes, flags and statistics that the update changes.
        with same_draws(self.device), torch.inference_mode(False), mixture.attack_mode(), autocast:
            value_and_gradient(mixture, ExpectedLoss(), x, y, None)
            for member in mixture.members if self.trained else ():
                parameters = list(member.train().requires_grad_(True).parameters())
                torch.autograd.grad(cross_entropy(member(x), y).mean(), parameters, allow_unused=True)


def compile_members(cfg: DictConfig, mixture: Mixture, graphs: Graphs, console: Console) -> None:
    """Compile the members in place, with the graphs of full batches first.

    If compilation fails under ``compile=auto``, the members run uncompiled, and one line says so.

    Raises:
        UserError: compilation fails under ``compile=true``.
    """
    if graphs.batch_size < SMALL_BATCH and graphs.device.type == "cpu":
        line = f"compile: batches of {graphs.batch_size} images run uncompiled; {SMALL_BATCH} or more are compiled"
        console.print(line, highlight=False, soft_wrap=True)
    # Torch stops compiling beyond a number of graphs; graphs of earlier jobs in this process must not count.
    torch.compiler.reset()
    mixture.to(graphs.device).compile()
    try:
        graphs.make(mixture)
    except torch.OutOfMemoryError:
        raise
    # Errors of the compiler, of a missing toolchain, or of a cache that cannot be written.
    except (RuntimeError, OSError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        if _is_required(cfg):
            raise UserError(
                f"compile=true: the members cannot be compiled here ({reason}): use compile=false"
            ) from error
        mixture.uncompile()
        line = f"compile=auto: the members run uncompiled, because they cannot be compiled here ({reason})"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def compile_for_evaluation(session: Session, mixture: Mixture) -> None:
    """Compile the members of an evaluation under ``compile=true``."""
    data, device = session.data, session.device
    if settle_compilation(session.cfg, 0, device, session.choices):
        graphs = Graphs(min(data.eval_batch_size, data.num_test), data.image_shape, device)
        compile_members(session.cfg, mixture, graphs, session.console)


def _is_required(cfg: DictConfig) -> bool:
    """Whether the command says ``compile=true``; a quoted value is text."""
    return str(cfg.compile).lower() == "true"
