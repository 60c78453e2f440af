"""Weights & Biases as a logger of Lightning's Trainer: it may fail, the run goes on.

Online with a key, offline without. The run's id is kept in the run directory, and every row has the number that it has
in metrics.csv: a run that was stopped and continued goes on in the same Weights & Biases run, where each row is once.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning.loggers as pl_loggers
from pytorch_lightning.loggers.logger import DummyExperiment, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from torch import nn

from mixadv.errors import UserError
from mixadv.loggers.accuracies import accuracies_of
from mixadv.loggers.metrics_file import FILE, RowReader, as_numbers
from mixadv.loggers.wandb_link import Link
from mixadv.results import Results

MODES = ("online", "offline", "disabled")


class _Experiment:
    """The run as callbacks and the user's own code see it: what they log joins the next row, and never fails.

    Numbers of records are those of rows; a record between two rows, or with another number, would shut rows out.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link.run, name)

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        how = {"commit": False} if self._link.follows else {"step": step, "commit": commit}
        self._link.attempt(lambda: self._link.run.log(data, **how), but="what was logged beside the rows")

    # The hooks of wandb.watch use this name.
    _log = log


class WandbLogger(pl_loggers.WandbLogger):
    """One Weights & Biases run for one run directory. No failure of the service stops the training.

    It follows ``save_dir/metrics.csv``, which another logger writes: put it behind `CSVLogger` in
    ``Trainer(logger=[...])``. Records are numbered (W&B's ``_step``): row i of the file is number i, tables and
    pictures follow the last row, and the baseline's rows and tables follow those. A session that continues a run sends
    the rows that the service has not got, from the beginning where it is offline, for offline files do not continue
    each other: uploading one replaces the other. The folders of earlier sessions are moved to wandb/superseded.
    Where there is no metrics.csv, metrics are sent as Lightning's own logger sends them.

    It connects at the first use, waits at most `init_timeout` seconds, and goes on offline where that fails. The run
    stays open between `fit`, `validate` and `test`; `finish` ends it. Only the first process logs.

    Args:
        save_dir: the run's directory. Files go to save_dir/wandb, the run's id to save_dir/wandb-run-id.txt.
        project: where it is shown; by default WANDB_PROJECT, or else "mixadv".
        entity, group: as in `wandb.init`; None leaves them to WANDB_ENTITY and WANDB_RUN_GROUP.
        watch: None, or what is logged of the module: "gradients", "parameters", "all", or a dict of arguments of
            `watch` (``{"log": "all", "log_freq": 500}``). Parameters are logged in the module's `forward`: a module
            that never calls itself shows gradients alone.
        offline: True for offline. Otherwise WANDB_MODE says it, and without WANDB_MODE whether there is a key.
        settings: arguments of `wandb.Settings` which replace ours.
        init_timeout: seconds to wait for the service before going on offline.
        finish_timeout: seconds to wait at the end until the service has everything.
        images: rows of the table of example images that the caller of `images` should make; kept as `num_images`.
        console: for the one line that says how to see the curves, and for one warning; by default the terminal.
        kwargs: of Lightning's logger and of `wandb.init`, under their names: ``name, tags, notes, job_type, id,
            config``, which WANDB_NAME, WANDB_TAGS and so on set where they are left out; and
            ``log_model``: True uploads checkpoints at the end of a fit, "all" whenever one is saved. Offline none is
            kept.

    Raises:
        UserError: WANDB_MODE is none of online, offline and disabled.
        ValueError: an argument is out of its range.
        MisconfigurationException: log_model with offline=True.
    """

    def __init__(
        self,
        save_dir: str | Path,
        *,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        watch: str | Mapping[str, Any] | None = None,
        offline: bool | None = None,
        settings: Mapping[str, Any] | None = None,
        init_timeout: float = 10,
        finish_timeout: float = 30,
        images: int = 8,
        console: Console | None = None,
        **kwargs: Any,
    ) -> None:
        asked = os.environ.get("WANDB_MODE") or None
        if asked not in (None, *MODES):
            raise UserError(f"WANDB_MODE={asked} is unknown: choose one of {', '.join(MODES)}, or leave it unset")
        # Lightning's constructor sets `_experiment`, which is the link's.
        self._link = Link(console or Console(), "offline" if offline and asked != "disabled" else asked)
        project = project or os.environ.get("WANDB_PROJECT") or "mixadv"
        if not re.fullmatch(r"[^/\\#?%:]{1,128}", project):
            raise ValueError(f"project={project} must be 1 to 128 characters without / \\ # ? % :")
        for name, seconds in (("init_timeout", init_timeout), ("finish_timeout", finish_timeout)):
            if not 0 < seconds < math.inf:
                raise ValueError(f"{name}={seconds} must be a positive number of seconds")
        if images < 0:
            raise ValueError(f"images={images} must be at least 0")
        super().__init__(
            save_dir=save_dir, project=project, offline=bool(offline), entity=entity, group=group, **kwargs
        )
        self.num_images = images
        self._watch: dict[str, Any] = {"log": watch} if isinstance(watch, str) else dict(watch or {})
        self._settings = {"init_timeout": init_timeout, "finish_timeout": finish_timeout, **(settings or {})}
        self._directory, self._namespace = Path(save_dir), ""
        self._rows, self._offset = RowReader(self._directory / FILE), 0
        self._mixture: WandbLogger | None = None
        self._views = [self]

    # --- the connection ------------------------------------------------------------------------------------

    @property
    def mode(self) -> str | None:
        """ "online", "offline" or "disabled"; None before the first use, unless the mode was given."""
        return self._link.mode

    @property
    def run(self) -> Any:
        """The `wandb.Run` itself, None where there is none (yet)."""
        return self._link.run

    @property
    def _experiment(self) -> Any:
        return self._link.run

    @_experiment.setter
    def _experiment(self, run: Any) -> None:
        self._link.run = run

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, connected at the first use; a dummy where the service failed for good.

        Its `log` never raises, and what it gets becomes part of the next row, whatever `step` and `commit` are.
        """
        self._link.connect(self._wandb_init, self._settings)
        return DummyExperiment() if self._link.lost else _Experiment(self._link)

    def _attempt(self, action: Callable[[], object], *, but: str | None = None) -> None:
        self._link.connect(self._wandb_init, self._settings)
        self._link.attempt(action, but=but)

    # --- what Lightning calls ------------------------------------------------------------------------------

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Store plain containers in the run's config; a failure prints one warning, and the run goes on."""
        parent = super().log_hyperparams
        self._attempt(lambda: parent(params), but="the settings")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send the rows of metrics.csv that are new; `metrics` themselves where they are not of that file.

        Args:
            metrics: name -> number, or a table or image of wandb, which joins the next row.
            step: where there is no metrics.csv, for the axis ``trainer/global_step``.
        """

        def send() -> None:
            self._link.follows = self._rows.path.exists()
            if not self._link.follows:
                self._define(metrics, "trainer/global_step")
                axis = {} if step is None else {"trainer/global_step": step}
                self._link.run.log(self._named({**metrics, **axis}))
            elif not self._follow():
                self._link.run.log(self._named(metrics), commit=False)

        self._attempt(send)

    @rank_zero_only
    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        """Begin to watch the module, where `watch` asks for it: Lightning calls this when a fit begins."""
        if self._watch:
            self._attempt(lambda: self._begin_to_watch(model, **{"log_graph": False, **self._watch}), but="the model")

    def _begin_to_watch(self, model: nn.Module, **how: Any) -> None:
        import wandb

        # wandb's hooks log to the program's one run, whose errors would end the backward pass.
        wandb.run = _Experiment(self._link)  # type: ignore[assignment]
        self.watch(model, **how)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload a checkpoint, or remember to do it at the end, as `log_model` says."""
        parent = super().after_save_checkpoint
        self._attempt_online(lambda: parent(checkpoint_callback))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload checkpoints where `log_model` asks for it; the run stays open, for what is measured after the fit."""
        parent = super().finalize
        self._attempt_online(lambda: parent(status))

    def _attempt_online(self, action: Callable[[], object]) -> None:
        def send() -> None:
            # An offline folder would hold a copy of every checkpoint.
            if self.mode != "online":
                return
            # Else they would be versions of the mixture's.
            if self._mixture is not None:
                self._checkpoint_name = f"baseline-{self.run.id}"
            action()

        if self._log_model:
            self._attempt(send, but="the model")

    # --- what is ours --------------------------------------------------------------------------------------

    def baseline(self) -> "WandbLogger":
        """A logger for ``save_dir/baseline`` in the same run, under ``baseline/``, after all rows of the mixture."""
        view = object.__new__(WandbLogger)
        view.__dict__.update(self.__dict__)
        view._directory, view._namespace = self._directory / "baseline", "baseline/"
        view._rows, view._mixture = RowReader(view._directory / FILE), self
        view._checkpoint_callbacks, view._checkpoint_name = {}, None
        self._views.append(view)
        return view

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self._namespace}{name}": value for name, value in values.items()}

    def _define(self, names: Iterable[str], axis: str) -> None:
        """Plot metrics over the axis of their own namespace: a pattern for all would mix the mixture's and its
        baseline's."""
        for name in self._named(dict.fromkeys(names)):
            if name not in self._link.defined:
                self._link.defined.add(name)
                if name != self._namespace + axis:
                    self._link.run.define_metric(name, step_metric=self._namespace + axis)

    def _follow(self) -> bool:
        """Send the rows of metrics.csv that were not sent yet; whether there are any."""
        if self._mixture is not None and not self._offset:
            self._mixture._follow()
            # One number is the mixture's table's, whether it has one or not.
            self._offset = self._mixture._rows.count + 1
        first = self._rows.count
        rows = self._rows.new()
        for i, row in enumerate(rows, self._offset + first):
            numbers = as_numbers(row)
            self._define(numbers, "step")
            self._link.send(i, self._named(numbers))
        return bool(rows)

    def _add(self, values: Mapping[str, Any]) -> None:
        """Tables and pictures, in one record behind the rows."""
        if not self._link.follows:
            self._link.run.log(self._named(values))
            return
        self._follow()
        self._link.send(self._offset + self._rows.count, self._named(values), commit=False)

    @rank_zero_only
    def summary(self, results: Results) -> None:
        """Put the final numbers of the results into the run's summary, as ``test/robust_accuracy`` and others."""
        values = self._named(accuracies_of(results))
        self._attempt(lambda: self._link.run.summary.update(values))

    @rank_zero_only
    def images(
        self, clean: np.ndarray, adversarial: np.ndarray, labels: Sequence[str], wrong: Sequence[str], eps: float
    ) -> None:
        """A table of clean, adversarial and difference images, [N, C, H, W] in [0, 1].

        The difference is scaled so that -eps is black and +eps is white. The service is asked for a place, which takes
        20 seconds where it does not answer: rows go on without a table, and where something has failed none is tried.
        """

        def picture(image: np.ndarray) -> Any:
            import wandb

            pixels = np.clip(np.round(image * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
            return wandb.Image(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)

        def send() -> None:
            difference = 0.5 + (adversarial - clean) / (2 * eps) if eps > 0 else np.full_like(clean, 0.5)
            rows = [
                [picture(a), picture(b), picture(d), label, members]
                for a, b, d, label, members in zip(clean, adversarial, difference, labels, wrong, strict=True)
            ]
            self._add({"examples": _table(["clean", "adversarial", "difference", "label", "fooled members"], rows)})

        if not self._link.told:
            self._attempt(send, but="the images")

    @rank_zero_only
    def log_results(self, results: Results, figures: Sequence[Path] = ()) -> None:
        """Log the results as tables: ``results`` (who, clean, robust) and ``attacks`` (name, expected accuracy).

        Args:
            figures: PNG files, shown as ``figures/NAME``; those that do not exist are left out.
        """

        def send() -> None:
            import wandb

            who = [["mixture", results.clean.value, results.robust.value]]
            others = {f"member {k}": member for k, member in enumerate(results.members)}
            if results.averaged_twin is not None:
                others["averaged twin"] = results.averaged_twin
            who += [[name, other.clean, other.robust.value] for name, other in others.items()]
            attacks = [[name, attack.mixture] for name, attack in results.attacks.items()]
            self._add(
                {
                    "results": _table(["who", "clean", "robust"], who),
                    "attacks": _table(["attack", "expected accuracy"], attacks),
                    **{f"figures/{path.stem}": wandb.Image(str(path)) for path in figures if path.is_file()},
                }
            )

        if not self._link.told:
            self._attempt(send, but="the tables")

    @rank_zero_only
    def finish(self, exit_code: int) -> None:
        """Close the run, a stop by a signal (above 128) as preempted; say how to upload what is not uploaded.

        Args:
            exit_code: of the program: 0 shows as finished, others as failed.
        """
        if self._link.run is None or self._link.ended:
            return
        for view in self._views:
            self._link.attempt(view._follow)
        self._link.finish(exit_code)
        if self._watch:
            import wandb

            wandb.run = None


def _table(columns: list[str | int], rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=columns, data=rows)
