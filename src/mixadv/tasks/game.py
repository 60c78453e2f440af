"""``task=game``: a game solved exactly, checked against the theory, and drawn."""

import os
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import DictConfig

from mixadv.config import Config
from mixadv.console import Console
from mixadv.errors import UserError
from mixadv.files import digest_of_files
from mixadv.report import Run
from mixadv.report.figures.games import draw_game
from mixadv.results import Results
from mixadv.runs.directory import State, mark_done, write_config, write_results
from mixadv.tasks.build import as_dict, instantiate
from mixadv.tasks.provenance import device_name, provenance
from mixadv.tasks.session import as_finished


def content_of_game(cfg: DictConfig) -> str:
    """A digest of the files that a game is made from, its `file` and classifiers as ``file.py:callable``; "" for none.

    A file that is gone does not count, so that a finished run is still shown.
    """
    named = [cfg.game.get("file"), *(cfg.game.get("classifiers") or ())]
    texts = [text for text in named if isinstance(text, str)]
    paths = [Path(text).expanduser() for name in texts for text in (name, name.rpartition(":")[0])]
    files = [path for path in paths if path.is_file()]
    return digest_of_files(files) if files else ""


def play_game(cfg: DictConfig, run_dir: Path, state: State) -> Run:
    """Build ``cfg.game``, play it in `run_dir`, and draw it; from the start, where an earlier try was interrupted.

    Writes config.yaml, game.npz (the arrays of the figure), results.json, game.png and DONE.

    Args:
        cfg: the checked configuration.
        run_dir: a claimed directory, `state` what it holds (not a finished run).

    Raises:
        UserError: settings that the game does not take, before anything is written.
    """
    console = Console()
    for key, instead in (("eps", "game.eps=..."), ("L", "game.num_classifiers=... of game=gaussians")):
        if cfg[key] != getattr(Config, key):
            raise UserError(f"{key}={cfg[key]}: task=game has a key of its own, {instead}; leave {key} out")
    started = time.perf_counter()
    game = instantiate(cfg.game, "game")
    write_config(run_dir, cfg)
    verb = "Starting again in" if state is State.UNFINISHED else "Writing to"
    console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    played = game.play(partial(console.print, highlight=False))
    facts = provenance()
    results = Results(
        task="game",
        seed=cfg.seed,
        device=device_name(torch.device("cpu")),
        versions={**facts["versions"], "scipy": version("scipy")},
        git=facts["git"],
        config=as_dict(cfg),
        played={"name": played.name, **played.summary},
        flags=(),
        seconds={"total": round(time.perf_counter() - started, 3)},
    )
    write_results(run_dir, results, played.arrays, "game.npz")
    run = as_finished(run_dir)
    draw_game(run)
    mark_done(run_dir)
    return run
