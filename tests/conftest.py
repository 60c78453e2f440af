"""Shared by the tests of the command line: the shipped configuration, main() in process, one small trained run."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig

pytest.register_assert_rewrite("builders")

# Seconds on one core, but with weights phases, several batches per epoch and numbers that are not all zero.
TINY = (
    "data=digits",
    "data.num_train=200",
    "data.num_test=50",
    "data.batch_size=20",
    "model=linear",
    "trainer.max_epochs=2",
    "schedule.T_theta=4",
    "lambda_solver.num_steps=2",
    "protocol.validation.num_steps=4",
    "protocol.attacks.pgd-20.restarts=1",
    "protocol.attacks.arc.num_steps=2",
    "protocol.attacks.subsets.num_steps=2",
    "protocol.diagnosed=0",
    "eps=0.05",
    "trainer.accelerator=cpu",
    "logger=csv",
)
# For a Lightning trainer that writes nothing and says nothing.
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
# What a developer's shell may hold and a test must not depend on.
OUTSIDE = ("DATA_DIR", "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_ID", "WANDB_DIR")


@dataclass
class Finished:
    """What a command left behind: exit status (0 where it returned), standard output and standard error."""

    rc: int
    out: str
    err: str

    def refusal(self) -> str:
        """The one line of a refused command, without the program's name."""
        assert self.rc == 1, (self.rc, self.out, self.err)
        assert "Traceback" not in self.out + self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("mixadv: "), self.err
        return lines[0].removeprefix("mixadv: ")


@contextlib.contextmanager
def surroundings(cwd: Path, argv: list[str], environment: dict[str, str]) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Working directory, arguments, environment and streams of a command, all restored afterwards.

    What does not train has Weights & Biases switched off: offline runs take seconds, and tests do not name a logger.
    """
    from hydra.core.global_hydra import GlobalHydra

    before, variables, arguments = Path.cwd(), dict(os.environ), sys.argv
    out, err = io.StringIO(), io.StringIO()
    for name in OUTSIDE:
        os.environ.pop(name, None)
    mode = {"WANDB_MODE": "disabled"} if {"task=evaluate", "task=solve"} & set(argv) else {}
    os.environ.update({"COLUMNS": "200", "HOME": str(cwd), **mode, **environment})
    sys.argv = ["run.py", *argv]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        os.chdir(before)
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(variables)
        GlobalHydra.instance().clear()


def run_command(cwd: Path, *argv: str, **environment: str) -> Finished:
    """`python run.py ARGV` in `cwd`, in this process; only a defect of the program raises."""
    from mixadv.main import main

    rc = 0
    with surroundings(cwd, list(argv), environment) as (out, err):
        try:
            main()
        except SystemExit as stop:
            rc = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return Finished(rc, out.getvalue(), err.getvalue())


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Finished]:
    """command(*argv, **environment): main() in a fresh directory."""

    def run(*argv: str, **environment: str) -> Finished:
        return run_command(tmp_path, *argv, **environment)

    return run


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh directory for modules of a user's own: sys.path is restored, and what came from there is forgotten."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def compose_shipped(*overrides: str) -> DictConfig:
    """The shipped configuration with `overrides`, as Hydra hands it to a job, but unchecked."""
    import hydra

    from mixadv import config
    from mixadv.shipped import config_dir

    config.register()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=config_dir()):
        return hydra.compose("config", overrides=list(overrides))


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """compose(*overrides): see `compose_shipped`."""
    return compose_shipped


@dataclass
class Trained:
    """A finished run: where it was started, its directory, what it printed."""

    cwd: Path
    path: Path
    finished: Finished


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One small mixture trained through the command line. Shared: look, do not touch."""
    cwd = tmp_path_factory.mktemp("trained")
    finished = run_command(cwd, *TINY, "L=3", "seed=5", "name=tiny")
    assert finished.rc == 0, finished.err
    return Trained(cwd, cwd / "outputs" / "train" / "tiny", finished)
