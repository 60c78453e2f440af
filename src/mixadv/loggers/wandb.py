"""Weights & Biases as a logger of Lightning's Trainer whose failures never stop the training.

It logs online if there is a key, else offline. The run directory keeps the id of the Weights & Biases run, and records
have the numbers of the rows in metrics.csv. So a resumed run continues the same Weights & Biases run, with each row
once.
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
from mixadv.loggers.wandb_link import Link
from mixadv.metrics_file import FILE, RowReader, as_numbers
from mixadv.results import Results

MODES = ("online", "offline", "disabled")


class _Experiment:
    """The run for callbacks and the user's own code: what they log joins the next row, and never raises.

    wandb drops records whose number is not larger than the last one. A record of its own would take the number of a
    row, and wandb would drop that row.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link.run, name)

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        how = {"commit": False} if self._link.follows else {"step": step, "commit": commit}
        self._link.attempt(lambda: self._link.run.log(data, **how), optional="what was logged beside the rows")

    # The hooks of wandb.watch call this name.
    _log = log


class WandbLogger(pl_loggers.WandbLogger):
    """One Weights & Biases run for one run directory. No failure of the service stops the training.

    It sends the rows of ``save_dir/metrics.csv``, so put it after `CSVLogger` in ``Trainer(logger=[...])``. Row i of
    the file is record number i (W&B's ``_step``). Tables and images follow the last row; the rows and tables of a
    baseline follow those. A resumed session sends the rows that the server does not have. Offline it sends all rows,
    because offline files do not continue each other: uploading one replaces the other. Offline folders of earlier
    sessions are moved to wandb/superseded. Without a metrics.csv, it sends metrics as Lightning's own logger does.

    It connects at the first use, for at most `init_timeout` seconds, and continues offline if that fails. The run stays
    open between `fit`, `validate` and `test`; `finish` closes it. Only rank 0 logs.

    Args:
        save_dir: the run directory. Files go to save_dir/wandb, the run's id to save_dir/wandb-run-id.txt.
        project: name of the project; by default WANDB_PROJECT, else "mixadv".
        entity, group: see `wandb.init`; by default WANDB_ENTITY and WANDB_RUN_GROUP.
        watch: what to log of the module: None, "gradients", "parameters", "all", or a dict of arguments of `watch`
            (``{"log": "all", "log_freq": 500}``). Parameters are logged in the module's `forward`; if the training
            does not call it, only gradients are logged.
        offline: whether to log offline; by default WANDB_MODE decides, and without it whether there is a key.
        settings: arguments of `wandb.Settings` that override ours.
        init_timeout: seconds to wait for the service at the start before continuing offline.
        finish_timeout: seconds to wait at the end until everything is uploaded.
        images: number of rows that the caller of `images` should pass; stored as `num_images`.
        console: for the line with the run's address and for one warning; by default the terminal.
        kwargs: arguments of Lightning's logger and of `wandb.init`: ``name, tags, notes, job_type, id, config`` (by
            default WANDB_NAME, WANDB_TAGS and so on), and ``log_model``: True uploads checkpoints at the end of a fit,
            "all" whenever one is saved. Offline, no checkpoint is stored.

    Raises:
        UserError: WANDB_MODE is not online, offline or disabled.
        ValueError: an argument is out of range.
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
        mode = os.environ.get("WANDB_MODE") or None
        if mode not in (None, *MODES):
            raise UserError(f"WANDB_MODE={mode} is unknown: choose one of {', '.join(MODES)}, or leave it unset")
        # Before Lightning's constructor, which sets `_experiment`, a property of the link.
        self._link = Link(console or Console(), "offline" if offline and mode != "disabled" else mode)
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
        """ "online", "offline" or "disabled"; None before the first use if neither `offline` nor WANDB_MODE is set."""
        return self._link.mode

    @property
    def run(self) -> Any:
        """The `wandb.Run`; None before the first use and after a failed start."""
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
        """The run, connected at the first use; a dummy if sending has ended.

        Its `log` never raises. What it gets becomes part of the next row; `step` and `commit` are ignored.
        """
        self._link.connect(self._wandb_init, self._settings)
        return DummyExperiment() if self._link.lost else _Experiment(self._link)

    def _attempt(self, action: Callable[[], object], *, optional: str | None = None) -> None:
        self._link.connect(self._wandb_init, self._settings)
        self._link.attempt(action, optional=optional)

    # --- the interface of Lightning's logger ---------------------------------------------------------------

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Store `params`, plain containers, in the run's config."""
        parent = super().log_hyperparams
        self._attempt(lambda: parent(params), optional="the settings")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Send the new rows of metrics.csv; if there are none, add `metrics` to the next row.

        Args:
            metrics: name -> number, table or image of wandb.
            step: value of ``trainer/global_step`` if there is no metrics.csv.
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
        """Watch the module if `watch` is set; Lightning calls this at the start of a fit."""
        if self._watch:
            how = {"log_graph": False, **self._watch}
            self._attempt(lambda: self._begin_to_watch(model, **how), optional="the model")

    def _begin_to_watch(self, model: nn.Module, **how: Any) -> None:
        import wandb

        # wandb's hooks log to the global run; errors of a plain run would end the backward pass.
        wandb.run = _Experiment(self._link)  # type: ignore[assignment]
        self.watch(model, **how)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload a checkpoint now or at the end of the fit, see `log_model`."""
        parent = super().after_save_checkpoint
        self._attempt_online(lambda: parent(checkpoint_callback))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload checkpoints, see `log_model`. The run stays open for the measurements after the fit."""
        parent = super().finalize
        self._attempt_online(lambda: parent(status))

    def _attempt_online(self, action: Callable[[], object]) -> None:
        def send() -> None:
            # Offline, wandb would store a copy of every checkpoint.
            if self.mode != "online":
                return
            # With the default name, they would become versions of the mixture's artifact.
            if self._mixture is not None:
                self._checkpoint_name = f"baseline-{self.run.id}"
            action()

        if self._log_model:
            self._attempt(send, optional="the model")

    # --- beyond Lightning's logger -------------------------------------------------------------------------

    def baseline(self) -> "WandbLogger":
        """A logger for ``save_dir/baseline`` in the same run. Its names begin with ``baseline/``."""
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
        """Set the x-axis of metrics to `axis` of the same namespace: mixture and baseline have different steps."""
        for name in self._named(dict.fromkeys(names)):
            if name not in self._link.defined:
                self._link.defined.add(name)
                if name != self._namespace + axis:
                    self._link.run.define_metric(name, step_metric=self._namespace + axis)

    def _follow(self) -> bool:
        """Send the new rows of metrics.csv; return whether there were any."""
        if self._mixture is not None and not self._offset:
            self._mixture._follow()
            # One number is reserved for the mixture's tables.
            self._offset = self._mixture._rows.count + 1
        first = self._rows.count
        rows = self._rows.new()
        for i, row in enumerate(rows, self._offset + first):
            numbers = as_numbers(row)
            self._define(numbers, "step")
            self._link.send(i, self._named(numbers))
        return bool(rows)

    def _add(self, values: Mapping[str, Any]) -> None:
        """Add tables and images to the record after the last row."""
        if not self._link.follows:
            self._link.run.log(self._named(values))
            return
        self._follow()
        self._link.send(self._offset + self._rows.count, self._named(values), commit=False)

    @rank_zero_only
    def summary(self, results: Results) -> None:
        """Write the accuracies of the results to the run's summary, as ``test/robust_accuracy`` etc."""
        values = self._named(accuracies_of(results))
        self._attempt(lambda: self._link.run.summary.update(values))

    @rank_zero_only
    def images(
        self, clean: np.ndarray, adversarial: np.ndarray, labels: Sequence[str], wrong: Sequence[str], eps: float
    ) -> None:
        """Log a table of clean images, adversarial images and their differences.

        Differences are scaled so that -eps is black and +eps is white. The table is skipped after an earlier failure,
        because wandb waits 20 seconds for a server that does not answer.

        Args:
            clean: [N, C, H, W] in [0, 1].
            adversarial: [N, C, H, W] in [0, 1].
            labels: N names of classes.
            wrong: N texts that list the fooled members.
            eps: the radius in input units.
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

        if not self._link.warned:
            self._attempt(send, optional="the images")

    @rank_zero_only
    def log_results(self, results: Results, figures: Sequence[Path] = ()) -> None:
        """Log the results as tables: ``results`` (who, clean, robust) and ``attacks`` (name, expected accuracy).

        Args:
            results: the content of results.json.
            figures: PNG files, logged as ``figures/NAME``; missing files are skipped.
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

        if not self._link.warned:
            self._attempt(send, optional="the tables")

    @rank_zero_only
    def finish(self, exit_code: int) -> None:
        """Close the run, and print how to upload what is not on the server.

        Args:
            exit_code: of the program. 0 marks the run as finished, codes above 128 (signals) as preempted, others as
                failed.
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
