"""Weights & Biases as a logger of Lightning's Trainer: it may fail, the run goes on.

Online with a key, offline without. The run's id is kept in the run directory, and every row has the number that it has
in metrics.csv: a run that was stopped and continued goes on in the same Weights & Biases run, where each row is once.
"""

import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytorch_lightning.loggers as pl_loggers
from pytorch_lightning.loggers.logger import DummyExperiment, rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.text import Text
from torch import nn

from mixadv.errors import UserError
from mixadv.loggers.metrics_file import FILE, RowReader, as_numbers
from mixadv.redaction import shown

ID_FILE = "wandb-run-id.txt"
MODES = ("online", "offline", "disabled")
SERVICE = "Weights & Biases"
# Offline folders that a later session has replaced; `wandb sync` without arguments does not look there.
SUPERSEDED = "superseded"
# The shell's codes of programs that a signal has ended lie above.
SIGNALLED = 128
SENT_SETTINGS = (Path("wandb/settings"), Path(".wandb/settings"))
LAUNCH = "wandb.sdk.launch.inputs.internal"


class _Link:
    """The connection that a logger and its views share; of all that goes wrong, the first thing is told.

    wandb reports to it instead of the terminal: the program hears nothing else of errors of the background process.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.mode: str | None = None
        self.run: Any = None
        self.is_tried = False  # the connection
        self.known = 0  # records below this number are there already
        self.told = False  # something failed
        self.lost = False  # nothing more is sent
        self.ended = False
        self.listening = False  # before and after, what wandb reports is an exception as well
        self.follows = True  # metrics.csv, or else whatever is logged
        self.defined: set[str] = set()  # metrics whose axis the service knows

    def attempt(self, action: Callable[[], object], *, but: str | None = None) -> None:
        """Do it, unless something vital has failed before; vital is what has no name `but` is missing alone."""
        if self.lost:
            return
        try:
            action()
        except Exception as error:  # whatever the service does, the training and its local files go on
            self.lost = but is None
            missing = f"did not take {but}" if but else "stopped taking values"
            self.tell(f"{missing} ({type(error).__name__}: {shown(error)}); the local files are complete")

    def tell(self, reason: str) -> None:
        """One warning a run."""
        if not self.told:
            self.told = True
            self.say(f"{SERVICE} {reason}", style="yellow")

    def say(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style), soft_wrap=True)

    def send(self, number: int, values: Mapping[str, Any], *, commit: bool = True) -> None:
        """Record `number` of the run, unless the service has it from an earlier session."""
        if number >= self.known:
            self.run.log(dict(values), step=number, commit=commit)

    def info(self, message: str) -> None:
        """Nothing that anybody waits for."""

    def warning(self, message: str) -> None:
        """Something did not arrive."""
        if self.listening:
            self.tell(f"did not take everything ({shown(message)}); the local files are complete")

    error = warning


class _Experiment:
    """The run as callbacks and the user's own code see it: what they log joins the next row, and never fails.

    Numbers of records are those of rows; a record between two rows, or with another number, would shut rows out.
    """

    def __init__(self, link: _Link) -> None:
        self.__dict__["_link"] = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link.run, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._link.run, name, value)

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
        entity, name, group, tags, notes, job_type: as in `wandb.init`; None leaves them to WANDB_ENTITY, WANDB_NAME
            and so on.
        log_model: True uploads checkpoints at the end of a fit, "all" whenever one is saved; see Lightning's logger.
            Offline none is kept.
        watch: None, or what is logged of the module: "gradients", "parameters", "all", or a dict of arguments of
            `watch` (``{"log": "all", "log_freq": 500}``).
        offline: True for offline. Otherwise WANDB_MODE says it, and without WANDB_MODE whether there is a key.
        settings: arguments of `wandb.Settings` which replace ours.
        init_timeout: seconds to wait for the service before going on offline.
        finish_timeout: seconds to wait at the end until the service has everything.
        images: rows of the table of example images that the caller of `images` should make; kept as `num_images`.
        console: for the one line that says how to see the curves, and for one warning; by default the terminal.
        kwargs: further arguments of Lightning's logger (``id``, ``checkpoint_name``, ...) and of `wandb.init`.

    Raises:
        UserError: WANDB_MODE is none of online, offline and disabled.
        MisconfigurationException: log_model with offline=True.
    """

    def __init__(
        self,
        save_dir: str | Path,
        *,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        job_type: str | None = None,
        log_model: Any = False,
        watch: str | Mapping[str, Any] | None = None,
        offline: bool | None = None,
        settings: Mapping[str, Any] | None = None,
        init_timeout: float = 10,
        finish_timeout: float = 30,
        images: int = 8,
        console: Console | None = None,
        **kwargs: Any,
    ) -> None:
        # Lightning's constructor sets `_experiment`, which is the link's.
        self._link = _Link(console or Console())
        self.num_images = images
        super().__init__(
            name=name,
            save_dir=save_dir,
            offline=bool(offline),
            project=project or os.environ.get("WANDB_PROJECT") or "mixadv",
            log_model=log_model,
            entity=entity,
            group=group,
            tags=None if tags is None else list(tags),
            notes=notes,
            job_type=job_type,
            **kwargs,
        )
        self._watch: dict[str, Any] = {"log": watch} if isinstance(watch, str) else dict(watch or {})
        self._settings = {"init_timeout": init_timeout, "finish_timeout": finish_timeout, **(settings or {})}
        self._directory, self._namespace = Path(save_dir), ""
        self._rows, self._offset = RowReader(self._directory / FILE), 0
        self._mixture: WandbLogger | None = None
        self._views = [self]
        asked = os.environ.get("WANDB_MODE")
        if asked and asked not in MODES:
            raise UserError(f"WANDB_MODE={asked} is unknown: choose one of {', '.join(MODES)}, or leave it unset")
        self._link.mode = "offline" if offline and asked != "disabled" else asked or None
        self._link.lost = asked == "disabled"

    # --- the connection ------------------------------------------------------------------------------------

    @property
    def mode(self) -> str | None:
        """ "online", "offline" or "disabled"; None before the first use where nobody has said it."""
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
        self._connect()
        return DummyExperiment() if self._link.lost else _Experiment(self._link)

    def _connect(self) -> None:
        """Start online if there is a key, else or failing that offline, failing that not at all; at the first call."""
        link = self._link
        if link.is_tried or link.lost or link.run is not None:
            return
        link.is_tried = True
        # wandb's reports of its own errors would fail, and say so, where the service does.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        refused = ""
        # Exceptions are the service's, the network's, the disk's, and what libraries make of them.
        try:
            self._wandb_init["id"] = self._id = self._id or _kept_id(Path(str(self.save_dir)) / ID_FILE)
            # wandb would take from there where the key is sent, and through whom: a folder may come with one.
            sent = [path for path in SENT_SETTINGS if path.exists()]
            if sent and link.mode != "offline":
                refused, link.mode = f"{sent[0]} could send your key elsewhere: move it to ~/.config/wandb", "offline"
            link.mode = link.mode or ("online" if _has_key() else "offline")
            if link.mode == "online":
                try:
                    link.run = self._start("online")
                    link.known = link.run.starting_step
                except Exception as error:
                    refused, link.mode = shown(error), "offline"
                    _release()
            if link.mode == "offline":
                link.run = self._start("offline")
        except Exception as error:
            link.run, link.lost = None, True
            link.tell(f"cannot be used ({refused or shown(error)}); the local files are complete")
            return
        if refused:
            link.tell(f"cannot be reached ({refused}); going on offline")
            # What befalls the offline file is another matter.
            link.told = False
        link.listening = True
        if link.mode == "online":
            link.say(f"{SERVICE}: {getattr(link.run, 'url', '')}")

    def _start(self, mode: Any) -> Any:
        import wandb

        wandb.setup()
        wandb.termsetup(wandb.Settings(silent=True), self._link)
        ours = {
            "finish_timeout_raises": True,
            "silent": True,
            "console": "off",
            # Remotes of checkouts may hold passwords; versions and commit are in results.json.
            "disable_git": True,
            "x_save_requirements": False,
            # In a sweep, never the run of the job before.
            "reinit": "create_new",
        }
        # Offline files continue nothing.
        but = {"resume"} if mode == "offline" else set()
        arguments = {name: v for name, v in self._wandb_init.items() if v is not None and name not in but}
        # What wandb looks through for inputs of W&B Launch takes half as long to import as the rest; it goes on
        # without. None is what Python takes for a module that cannot be imported.
        modules: dict[str, Any] = sys.modules
        blocked = modules.setdefault(LAUNCH, None) is None
        try:
            return wandb.init(mode=mode, settings=wandb.Settings(**{**ours, **self._settings}), **arguments)
        finally:
            if blocked:
                del modules[LAUNCH]

    def _attempt(self, action: Callable[[], object], *, but: str | None = None) -> None:
        self._connect()
        self._link.attempt(action, but=but)

    # --- what Lightning calls ------------------------------------------------------------------------------

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Store plain containers in the run's config; what cannot be stored is told, and the run goes on."""
        if not self._link.is_tried and isinstance(params, Mapping):
            # With the start of the run: the config is there even where the run is killed at once.
            self._wandb_init["config"] = {**(self._wandb_init.get("config") or {}), **params}
            self._connect()
            return
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
        # An offline folder would hold a copy of every checkpoint.
        if self._log_model:
            self._connect()
            if self.mode == "online":
                self._link.attempt(action, but="the model")

    # --- what is ours --------------------------------------------------------------------------------------

    def baseline(self) -> "WandbLogger":
        """A logger for ``save_dir/baseline`` in the same run, under ``baseline/``, after all rows of the mixture."""
        view = object.__new__(WandbLogger)
        view.__dict__.update(self.__dict__)
        view._directory, view._namespace = self._directory / "baseline", "baseline/"
        view._rows, view._mixture, view._checkpoint_callbacks = RowReader(view._directory / FILE), self, {}
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
    def summary(self, results: Mapping[str, Any]) -> None:
        """Put the final numbers of a results.json into the run's summary, as ``test/robust_accuracy`` and others."""
        clean, robust = results["clean"], results["robust"]
        numbers = {"clean": clean["expected_accuracy"], "ensemble": clean["ensemble_accuracy"]}
        numbers["robust"] = robust["expected_accuracy"]
        values = self._named({f"test/{name}_accuracy": number for name, number in numbers.items()})
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
    def log_results(self, results: Mapping[str, Any], figures: Sequence[Path] = ()) -> None:
        """Log a results.json as tables: ``results`` (who, clean, robust) and ``attacks`` (name, expected accuracy).

        Args:
            results: the content of results.json.
            figures: PNG files, shown as ``figures/NAME``; those that do not exist are left out.
        """

        def send() -> None:
            import wandb

            who = [["mixture", results["clean"]["expected_accuracy"], results["robust"]["expected_accuracy"]]]
            others = {f"member {k}": member for k, member in enumerate(results.get("members", ()))}
            if "averaged_twin" in results:
                others["averaged twin"] = results["averaged_twin"]
            who += [[name, other["clean"], other["robust"]] for name, other in others.items()]
            attacks = [[name, attack["expected_accuracy"]] for name, attack in results.get("attacks", {}).items()]
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
        link = self._link
        if link.run is None or link.ended:
            return
        for view in self._views:
            link.attempt(view._follow)
        if exit_code > SIGNALLED:
            link.attempt(link.run.mark_preempting)
        # Also where values were lost: the next job of a sweep must not meet an open run.
        lost, link.lost = link.lost, False
        link.attempt(lambda: link.run.finish(exit_code=exit_code))
        link.listening = False
        folder = Path(link.run.settings.sync_dir)
        if link.lost:
            _release()
        elif not (lost or link.told):
            link.attempt(lambda: _set_aside(folder, link.run.id))
        if self._watch:
            import wandb

            wandb.run = None
        if link.mode == "offline" or link.told:
            state = "is offline" if link.mode == "offline" else "is not complete"
            link.say(f"{SERVICE} {state}; to upload: wandb sync {os.path.relpath(folder)}")
        # What comes after the end goes nowhere.
        link.lost = link.ended = True


def _table(columns: list[str | int], rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=columns, data=rows)


def _has_key() -> bool:
    """Whether `wandb login` or the environment left a key."""
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url).hostname
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def _kept_id(path: Path) -> str:
    """The run's id, kept in `path`; a new one where there is none. It becomes part of a folder's name."""
    kept = path.read_text(errors="replace").strip() if path.is_file() and not path.is_symlink() else ""
    if not re.fullmatch(r"\w{4,64}", kept, re.ASCII):
        kept = secrets.token_hex(4)
        # Renamed into place: a link that came with the folder is replaced, not followed.
        temporary = path.with_name(f".{path.name}.{kept}")
        temporary.write_text(kept + "\n")
        os.replace(temporary, path)
    return kept


def _set_aside(folder: Path, run_id: str) -> None:
    """Move the run's other offline folders, whose rows are all in `folder` or uploaded, out of the way."""
    # Of two that began in one second, the later has a number behind the id.
    for other in set(folder.parent.glob(f"offline-run-*-{run_id}*")) - {folder}:
        (folder.parent / SUPERSEDED).mkdir(exist_ok=True)
        os.replace(other, folder.parent / SUPERSEDED / other.name)


def _release() -> None:
    """End wandb's background process, which may hold the id of a run that did not start, or be dead already."""
    import wandb

    with suppress(Exception):  # of a process that is gone; the next run starts another one
        wandb.teardown()
