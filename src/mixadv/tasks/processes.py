"""Who computes: one process, or several that Lightning, torchrun or Slurm has started for one command.

Imports neither torch nor Lightning: a sweep asks for every job, the finished ones too.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig

from mixadv.errors import UserError
from mixadv.launchers import RUN_DIR, process_place, process_rank, started_from_outside

if TYPE_CHECKING:
    import torch

ALL = (-1, "auto")


def number(cfg: DictConfig) -> int:
    """How many processes the command asks for, on all machines.

    Raises:
        UserError: all GPUs of a machine that has none.
    """
    return devices(cfg) * cfg.trainer.num_nodes


def devices(cfg: DictConfig) -> int:
    """Processes on each machine: one on every GPU for -1 and auto, and for auto without a GPU one on the CPU.

    Raises:
        UserError: -1, and there is no GPU.
    """
    wanted = cfg.trainer.devices
    if wanted not in ALL:
        return wanted if isinstance(wanted, int) else len(wanted)
    import torch

    if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu":
        return torch.cuda.device_count()
    if wanted == "auto":
        return 1
    raise UserError("trainer.devices=-1 asks for all GPUs, and there is none: use trainer=ddp_cpu for processes")


def rank(cfg: DictConfig) -> int:
    """This process's number; 0 where there is one process, whatever launched it."""
    return process_rank() if number(cfg) > 1 else 0


def place(cfg: DictConfig) -> int:
    """This process's number on its machine; 0 where there is one process."""
    return process_place() if number(cfg) > 1 else 0


def trainer_settings(cfg: DictConfig, device: "torch.device") -> dict[str, Any]:
    """What Lightning's Trainer has to know of devices and processes.

    Raises:
        UserError: a strategy that cannot train a mixture.
    """
    wanted = cfg.trainer.strategy
    if wanted not in ("auto", "ddp"):
        raise UserError(
            f"trainer.strategy={wanted} cannot train a mixture, whose members are updated one at a time and attacked "
            "whole: leave it at auto; several processes average the gradients of each member"
        )
    # A list names GPUs; on the CPU it says how many processes.
    named = isinstance(cfg.trainer.devices, ListConfig) and device.type != "cpu"
    settings: dict[str, Any] = {
        "accelerator": {"cpu": "cpu", "mps": "mps"}.get(device.type, "gpu"),
        "devices": list(cfg.trainer.devices) if named else devices(cfg),
        "num_nodes": cfg.trainer.num_nodes,
    }
    if number(cfg) > 1:
        from mixadv.training import Replicas

        settings["strategy"] = Replicas()
    return settings


def check(cfg: DictConfig, sweep: str | None) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        UserError: a sweep, a task of one process, more GPUs than there are, or a new directory on which they could not
            agree.
    """
    if number(cfg) == 1:
        return
    import torch

    if cfg.trainer.accelerator != "cpu" and 0 < torch.cuda.device_count() < devices(cfg):
        raise UserError(
            f"trainer.devices={devices(cfg)}, but there are {torch.cuda.device_count()} GPUs: use trainer.devices=-1 "
            "for all of them, and trainer.num_nodes=N for more machines"
        )
    if sweep is not None:
        raise UserError(
            f"a sweep (-m) cannot start {number(cfg)} processes for each of its jobs: run the jobs one by one, without "
            "-m, or with one device each (trainer.devices=1)"
        )
    if cfg.task not in ("train", "evaluate"):
        raise UserError(f"task={cfg.task} runs in one process: use trainer.devices=1 trainer.num_nodes=1")
    if cfg.resume == "never" and started_from_outside():
        raise UserError("resume=never: processes started from outside cannot agree on a new directory: use name=...")


def work_in(run_dir: Path) -> None:
    """Tell the processes that this one will start where it works."""
    os.environ[RUN_DIR] = str(run_dir.absolute())


def help_along(cfg: DictConfig, run_dir: Path, work: Callable[..., Any]) -> None:
    """The part of every process but the first: it computes along, and leaves the directory's files to the first."""
    from mixadv.tasks.run_directory import State

    # Started from outside, it knows what its command says; started by the first process, what that one says.
    run_dir = Path(os.environ.get(RUN_DIR, run_dir))
    if not (run_dir / "DONE").exists():
        work(cfg, run_dir, State.UNFINISHED)
