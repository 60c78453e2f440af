"""The processes of a command: one, or several that Lightning, torchrun or Slurm has started.

Imports neither torch nor Lightning, because a sweep needs it for every job, also for finished ones.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from mixadv.errors import UserError

# The environment variable that tells processes started by rank 0 its run directory.
RUN_DIR = "MIXADV_RUN_DIR"


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process, if a launcher (torchrun, Slurm, Lightning) has started it; else 0."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in environment:
            return int(environment[name])
    return 0


def process_place(environment: Mapping[str, str] = os.environ) -> int:
    """The local rank of this process on its machine; 0 without a launcher."""
    return int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", 0)))


def is_helper(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether rank 0 of this command started this process."""
    return RUN_DIR in environment and process_rank(environment) > 0


def started_from_outside(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or Slurm started this process, with others that run the same command."""
    return any(name in environment for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"))


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
    """The rank of this process; 0 if there is one process, whatever launched it."""
    return process_rank() if number(cfg) > 1 else 0


def place(cfg: DictConfig) -> int:
    """The local rank of this process; 0 if there is one process."""
    return process_place() if number(cfg) > 1 else 0


def check(cfg: DictConfig, sweep: str | None) -> None:
    """Refuse commands that several processes cannot run together.

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
    """Pass the run directory on to the processes that this one starts."""
    os.environ[RUN_DIR] = str(run_dir.absolute())
