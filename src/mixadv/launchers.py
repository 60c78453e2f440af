"""What torchrun, Slurm and Lightning tell the processes that they start."""

import os
from collections.abc import Mapping

# Where the first process works; those that it starts itself find it here.
RUN_DIR = "MIXADV_RUN_DIR"


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number among those that a launcher (torchrun, Slurm, Lightning) has started; 0 without one."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if name in environment:
            return int(environment[name])
    return 0


def process_place(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number among those on its machine; 0 without a launcher."""
    return int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", 0)))


def is_helper(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether another process of ours started this one to help it."""
    return RUN_DIR in environment and process_rank(environment) > 0


def started_from_outside(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or Slurm started this process, beside others that run the same command."""
    return any(name in environment for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"))
