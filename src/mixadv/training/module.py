"""Algorithm 2: adversarial training of the members alternating with weights phases, as manual optimization."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import SGD, Optimizer
from torchmetrics import MeanMetric

from mixadv.attacks.objectives import InnerLoss
from mixadv.attacks.pgd import PGD
from mixadv.attacks.search import Attack
from mixadv.attacks.suite import AttackSuite
from mixadv.checkpoint_files import read_checkpoint
from mixadv.correctness import answered, correct
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.lambda_solvers import LambdaSolver, LinearProgram, OracleSubgradient
from mixadv.losses import AT, RobustLoss, SmoothedZeroOne
from mixadv.members.store import mixture_of_checkpoint
from mixadv.mixture import Mixture
from mixadv.mixture_game import AttackedBatch, MixtureGame
from mixadv.models import MODELS
from mixadv.ranks import Ranks
from mixadv.seeding import generator_for
from mixadv.signals import Signals
from mixadv.threat_model import ThreatModel
from mixadv.training import generators, learning_rate
from mixadv.training.checks import check_growth, check_optimizer, check_trainer
from mixadv.training.class_weights import ClassWeights
from mixadv.training.growth import Growth, RecordedGame, Stage, Strategy, weigh
from mixadv.training.learning_rate import build_scheduler
from mixadv.training.members_phase import MembersAttack, MembersPhase
from mixadv.training.phase import WeightsPhase, fixed_images
from mixadv.training.recorded import rebuilt, recorded
from mixadv.training.schedule import Schedule
from mixadv.training.shared_attack import DividedGame, SharedAttack
from mixadv.training.update import add_gradient, running_statistics

STATE_SCHEMA = 6
# Arguments of `MixtureTraining` that a checkpoint records; the members are recorded by their recipe.
RECORDED = (
    "loss",
    "class_weights",
    "members_phase",
    "threat_model",
    "attack",
    "validation_attack",
    "solver",
    "phase",
    "kind",
    "T_theta",
    "growth",
    "optimizer",
    "scheduler",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "seed",
    "micro_batch_size",
    "protocol",
)


class MixtureTraining(pl.LightningModule):
    """Adversarial training for mixtures (Meunier et al., 2021, Algorithm 2).

    For t = 1, 2, ..., with batch B_t: in a weights phase the solver plays the game of the mixture on B_t, warm
    started from the current weights lam_t, members fixed; otherwise B_t is attacked for the mixture
    (lam_t, theta_t) and one member (``sampled``) or every member (``shared``) takes a step on its outer loss
    at the attacked batch. Training attacks return their last iterate; the weights phase keeps the best one. The step of
    member k does not carry the factor lam_k of the gradient of the mixture's loss: a member without weight would never
    learn. theta_0 and lam_0 are the members and the weights that `mixture` has.

    An epoch is one *per model*: it shows every member the training set about once (in expectation when sampled), and
    all epochs have the same number of batches (`Schedule.batches_in_epoch`). It works under any ``pl.Trainer`` with
    ``max_epochs``, an `ImageDataModule` and one device, or several with ``strategy=Replicas()``:

        trainer.fit(module, datamodule=data); trainer.test(module, datamodule=data)

    It logs ``train/loss``, ``train/adversarial_accuracy``, ``train/lr``, ``weights/value``, ``weights/lower_bound``
    (every ``log_every_n_steps`` batches, weights phases always), ``val/robust_accuracy``, ``val/clean_accuracy``,
    ``val/ensemble_accuracy``, and beside them ``epoch`` (per model), ``member_updates`` (summed over members) and
    ``lambda/k``; the step of all of them is t.

    Args:
        mixture: the members and the weights.
        threat_model: the ball.
        loss: inner and outer loss (AT, TRADES, ...); ``loss.at`` the share of the training that is done gives that of a
            batch.
        class_weights: weights of the classes in the outer loss of each member; None: all 1. The payoff of the weights
            phases has none.
        attack: PGD settings of training; objective, start and `keep` follow from the loss and the phase.
        members_phase: what the attacks of the members' phases try; None: the published phase, see `MembersPhase`.
        validation_attack: PGD whose exact expected accuracy is ``val/robust_accuracy``.
        solver: weights of a phase; one with ``adapts = False`` keeps them fixed, without phases. Where its
            ``recent_batches`` says so, the last batches of the members' phases, with the points found for them then,
            join the game of a weights phase.
        phase: payoff, attacks and images of a weights phase; None: the published ones, see `WeightsPhase`.
        kind, T_theta: the schedule, see `Schedule`.
        growth: how a mixture grows (kind="grow"), see `Growth`; its `solver` must be a `LinearProgram`.
        optimizer: called with a member's parameters, makes its optimizer:
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        scheduler: called with that optimizer, makes the schedule of its learning rate, see `build_scheduler`; stepped
            after every update of the member.
        gradient_clip_val, gradient_clip_algorithm: clip the gradient of each member before its step, by "norm" (the
            default) or "value"; Lightning's Trainer does not clip in manual optimization.
        seed: seeds the generators of member draws, attacks and solver samples.
        micro_batch_size: the most images of a process's share in one forward-backward pass of members phases and
            weights phases; None for no limit. Gradients of the parts add up to that of the batch, one step follows,
            and the result is that of one pass up to rounding. Batch norm is the exception: in train mode it
            normalises each part by the part's own statistics, and updates its running ones once for each part. Dropout
            draws for each part.
        protocol: attacks by name for ``trainer.test``, as `AttackSuite` takes them; None: the validation attack alone.
        predict: what ``trainer.predict`` returns: "draw" (the label of a member drawn for each image) or
            "probabilities" (sum_k lambda_k softmax f_k).
        recipe: what it takes to build the mixture again, see `mixadv.members.recipe`; kept in checkpoints. None: that
            of the members where `mixadv.models.build_member` built them, else a checkpoint can only be loaded with
            ``load_from_checkpoint(path, mixture=...)``.

    Raises:
        ValueError: an argument is out of its range, or optimizer and scheduler do not fit.
    """

    def __init__(
        self,
        mixture: Mixture,
        threat_model: ThreatModel,
        *,
        loss: RobustLoss | None = None,
        class_weights: ClassWeights | None = None,
        attack: PGD | None = None,
        members_phase: MembersPhase | None = None,
        validation_attack: PGD | None = None,
        solver: LambdaSolver | None = None,
        phase: WeightsPhase | None = None,
        kind: str = "sampled",
        T_theta: int = 50,
        growth: Growth | None = None,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        seed: int = 0,
        micro_batch_size: int | None = None,
        protocol: Mapping[str, Attack] | None = None,
        predict: str = "draw",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if predict not in ("draw", "probabilities"):
            raise ValueError(f"predict is {predict!r}: choose draw or probabilities")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1, or None")
        if gradient_clip_val is not None and not 0 < gradient_clip_val < math.inf:
            raise ValueError(f"gradient_clip_val={gradient_clip_val} must be positive and finite, or None")
        if isinstance(threat_model.eps, Tensor):
            raise ValueError("a training has one eps for all examples: give ThreatModel a number")
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ValueError(f"gradient_clip_algorithm={gradient_clip_algorithm!r}: choose norm or value")
        self.mixture = mixture
        self.loss = AT() if loss is None else loss
        self.class_weights = class_weights or ClassWeights()
        self.members_phase = members_phase or MembersPhase()
        self.threat_model = threat_model
        attack = PGD(num_steps=10, step_size=0.25) if attack is None else attack
        inner = InnerLoss(self.loss)
        self.training_attack = replace(attack, objective=inner, start=self.loss.start, keep="last", restarts=1)
        self.weights_attack = replace(self.training_attack, keep="objective")
        self.validation_attack = validation_attack or PGD(num_steps=20, step_size=0.25)
        self.solver = OracleSubgradient(num_steps=10) if solver is None else solver
        self.phase = phase or WeightsPhase()
        adapts = self.solver.adapts and mixture.num_members > 1
        self.schedule = Schedule(kind, mixture.num_members, T_theta, weights_phases=adapts)
        self.growth = growth or Growth()
        if self.schedule.grows:
            check_growth(self.growth, self.members_phase, self.solver, list(mixture.members))
        self.optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.scheduler = scheduler or learning_rate.piecewise
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.protocol = protocol
        self.predict = predict
        self.recipe = dict(recipe) if recipe is not None else _recipe_of(mixture)
        check_optimizer(self.optimizer, self.scheduler, list(mixture.members))
        settings = {name: getattr(self, name) for name in RECORDED if name not in ("attack", "kind", "T_theta")}
        settings |= {"attack": attack, "kind": kind, "T_theta": T_theta}
        self.save_hyperparameters(recorded(settings))

        # Set in `setup`, when a trainer is known.
        self.batches_per_epoch = self.total_batches = self.updates_per_member = 0
        self.check_every = 1
        self._class_weights = torch.ones(mixture.num_members, 1)
        self._begin()
        self.ranks = Ranks()
        # Settings of the trainer that the training changes, by name, with their original values.
        self._of_trainer: dict[str, Any] = {}
        # States of the generators before the current batch, until that batch changes members or weights.
        self._before_batch: dict[str, Any] | None = None
        self.accuracies = torch.nn.ModuleDict({name: MeanMetric() for name in ("clean", "robust", "ensemble")})

    def _begin(self, device: torch.device | str = "cpu") -> None:
        """Set counters and generators to the start of a training; members and weights stay as they are."""
        self.t = 0
        self.member_updates = [0] * self.mixture.num_members
        self.member_generator = generator_for(self.seed, "members")
        self.attack_generator = generator_for(self.seed, "attacks", device=device)
        self._phase_images: tuple[Tensor, Tensor] | None = None
        self._recent: deque[AttackedBatch] = deque(maxlen=self.solver.recent_batches)
        self._bad_step: Tensor | None = None
        # Of a growing mixture: its stages so far, and the attacker's strategy in the current one.
        self.stages: list[Stage] = []
        self._strategy: Strategy | None = None

    def forward(self, x: Tensor) -> Tensor:
        """log sum_k lambda_k softmax(f_k(x)) [B, C], as `Mixture.forward`: the averaged prediction, not the draw."""
        return self.mixture(x)

    def configure_optimizers(self) -> Any:
        """One optimizer and one schedule per member; the schedules are stepped by hand, with their member."""
        optimizers = [self.optimizer(member.parameters()) for member in self.mixture.members]
        schedules = [build_scheduler(self.scheduler, optimizer, self.updates_per_member) for optimizer in optimizers]
        return optimizers, schedules

    def setup(self, stage: str) -> None:
        """Read from the trainer how many processes there are and, before a fit, how long epochs and training are.

        Raises:
            UserError: the trainer asks for what the algorithm cannot do; the message says what works.
        """
        self.ranks = Ranks.here()
        device = self.trainer.strategy.root_device
        metrics: Any = self.accuracies.values()
        for metric in metrics:
            # A separate validation or test leaves inference tensors, which a fit cannot update.
            metric.reset()
        if stage != "fit":
            return
        self._set_lengths()
        try:
            table = self.class_weights.table(self.mixture.num_members, self._data().num_classes)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._class_weights = table.to(device)
        # Each check of the loss waits for the device; on the CPU that costs nothing.
        self.check_every = 1 if device.type == "cpu" else 50
        # A second fit starts from the members as they are. If it resumes, Lightning loads the state after this hook.
        self._begin(device)

    def teardown(self, stage: str) -> None:
        """Restore the settings of the trainer that `_set_for_now` changed."""
        for name, value in self._of_trainer.items():
            setattr(self.trainer, name, value)
        self._of_trainer.clear()

    def _set_for_now(self, name: str, value: Any) -> None:
        """Change an attribute of the trainer until the end of the fit."""
        self._of_trainer.setdefault(name, getattr(self.trainer, name))
        setattr(self.trainer, name, value)

    def _set_lengths(self) -> None:
        trainer: Any = self.trainer
        data = self._data()
        check_trainer(trainer, list(self.mixture.members), grows=self.schedule.grows)
        if self.schedule.weights_phases:
            self._check_phase(data)
        length = self.schedule.batches_in_epoch(data.batches_per_pass, trainer.limit_train_batches)
        if length < 1:
            raise UserError("limit_train_batches=0 trains nothing: leave it out, or give 1 batch or more")
        # A number of batches: Lightning would apply a share once more, to the shortened epoch.
        self._set_for_now("limit_train_batches", length)
        data.batches_per_epoch = self.batches_per_epoch = length
        data.overfit_batches = length if trainer.overfit_batches else None
        self.total_batches = trainer.max_epochs * length
        if self.schedule.grows:
            self._set_stages()
        updates = self.schedule.member_batches_in(self.total_batches) * self.schedule.updated_at_once
        self.updates_per_member = max(1, round(updates / self.mixture.num_members))

    def _set_stages(self) -> None:
        """Tell the schedule how long the stages of a growing mixture are.

        Raises:
            UserError: too few batches for L stages.
        """
        self.schedule = replace(self.schedule, total_batches=self.total_batches)
        if self.total_batches < 2 * self.mixture.num_members:
            raise UserError(
                f"a mixture of {self.mixture.num_members} members grows in as many stages of 2 batches or more, but "
                f"this training has {self.total_batches}: raise trainer.max_epochs, trainer.limit_train_batches or "
                f"trainer.fast_dev_run (a number of batches)"
            )

    def _data(self) -> ImageDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        own = isinstance(data, ImageDataModule) and is_overridden("train_dataloader", data, ImageDataModule)
        if not isinstance(data, ImageDataModule) or own:
            raise UserError(
                "MixtureTraining has epochs per model, longer than one pass over the images, and continues inside "
                "them: give trainer.fit(module, datamodule=...) an ImageDataModule of mixadv.data with its own "
                "train_dataloader, not a DataLoader"
            )
        return data

    def on_train_start(self) -> None:
        """Log the state before the first batch, or prepare to resume inside an epoch."""
        if self.t == 0:
            if self.schedule.grows:
                self._begin_stage(0)
            for logger in self.loggers:
                logger.log_metrics(self.progress(), 0)
        if self._data().train_dataloader().batches_left < self.batches_per_epoch:
            # The first epoch is the rest of an interrupted one: Lightning must read the length of the next one again.
            self._set_for_now("reload_dataloaders_every_n_epochs", 1)

    def on_train_epoch_end(self) -> None:
        """Close the epoch of the data stream."""
        self._data().train_dataloader().close_epoch()
        if "val_check_interval" in self._of_trainer:
            self.trainer.val_check_interval = self._of_trainer.pop("val_check_interval")
        # Lightning also counted the batch without examples.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.t

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Run the members phase or weights phase of batch t, as the schedule says; skip a batch without examples."""
        x, y = batch
        if not len(y):
            self._end_if_grown()
            return
        self._before_batch = self._generators()
        self.t += 1
        if self.schedule.grows and self.schedule.stage_at(self.t) > self.schedule.stage_at(self.t - 1):
            self._begin_stage(self.schedule.stage_at(self.t))
        if self.schedule.is_weights_phase(self.t):
            self._record(self._weights_phase(x, y))
            return
        found = self._members_phase(x, y)
        # For callbacks and progress bars; loggers get a row every `log_every_n_steps` batches.
        for name, value in found.items():
            self.log(name, value, logger=False, batch_size=1, prog_bar=name == "train/loss")
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.t % every == 0:
            self._record(found)

    def _record(self, values: dict[str, Any]) -> None:
        """Give every logger one row, and callbacks and progress bars the values.

        self.log alone would repeat the values of the last members phase in the rows of weights phases.
        """
        numbers = {name: float(value) for name, value in {**values, **self.progress()}.items()}
        for name, number in numbers.items():
            if not name.startswith("train/"):
                self.log(name, number, logger=False, batch_size=1)
        for logger in self.loggers:
            logger.log_metrics(numbers, self.t)

    def progress(self) -> dict[str, float]:
        """The columns of every row: epochs per model, updates of all members together, lambda."""
        weights = self.mixture.weights.tolist()
        return {
            "epoch": self.epochs_done,
            "member_updates": sum(self.member_updates),
            **{f"lambda/{k}": weight for k, weight in enumerate(weights)},
        }

    def _begin_stage(self, s: int) -> None:
        """Give member s its first parameters, and the mixture the weights that the attacks of stage s meet.

        A stage may begin twice, if its first batch is interrupted: all that is set depends on the members before s.
        """
        members, lam = self.mixture.members, torch.zeros(self.mixture.num_members, dtype=torch.float64)
        if s == 0:
            lam[0] = 1.0
            self.mixture.set_weights(lam)
            return
        if self.growth.start == "last":
            members[s].load_state_dict(members[s - 1].state_dict())
        if self.growth.response == "adaptive":
            lam[: s + 1] = 1 / (s + 1)
            self.mixture.set_weights(lam)
        self._strategy = None

    def _end_stage(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Weigh the members so far; if the new one adds nothing, the training ends."""
        s = self.schedule.stage_at(self.t)
        before = self.stages[-1].weights[:s] if self.stages else []
        game = self._checked(self._game(Mixture(self.mixture.members[: s + 1]), x, y))
        assert isinstance(self.solver, LinearProgram)
        with self._interruptible():
            stage = weigh(game, self.solver, before, self.growth.min_gain, self.mixture.num_members)
        self._before_batch = None
        self.stages.append(stage)
        self.mixture.set_weights(stage.weights)
        self._end_if_grown()
        return {"weights/value": stage.value, "weights/lower_bound": stage.lower_bound}

    def _end_if_grown(self) -> None:
        """End the training, after a validation, if the last member was left out."""
        if self.stages and not self.stages[-1].kept:
            self._data().train_dataloader().end_epoch()
            self.trainer.should_stop = True

    @property
    def stage_ended(self) -> bool:
        """Whether the last batch ended a stage of a growing mixture."""
        return self.schedule.grows and self.t > 0 and self.schedule.is_weights_phase(self.t)

    @property
    def grown(self) -> Mixture:
        """The members that the mixture has, with their weights: all, or those that a growing mixture has kept."""
        kept = sum(stage.kept for stage in self.stages)
        if not kept or kept == self.mixture.num_members:
            return self.mixture
        return Mixture(self.mixture.members[:kept], self.mixture.weights[:kept])

    def _response(self) -> Strategy:
        """The attacker's strategy against the members before that of the current stage.

        It follows from the members and the seed, and its loss is that of the start of the stage, so that a training
        that continues inside the stage finds the same one.
        """
        if self._strategy is None:
            s, data = self.schedule.stage_at(self.t), self._data()
            count = min(self.growth.num_images, data.num_train)
            x, y = fixed_images(data.train_images, data.train_labels, count, data.device)
            loss = self.loss.at(0.0)
            game = RecordedGame(
                *(Mixture(self.mixture.members[:s]), x, y, self.threat_model),
                [self._with_loss(self.weights_attack, loss), *self.phase.attacks.values()],
                self.phase.loss(loss),
                generator_for(self.seed, "response", s, device=x.device),
                batch_size=self.micro_batch_size or data.eval_batch_size,
            )
            assert isinstance(self.solver, LinearProgram)
            lam0 = torch.tensor(self.stages[-1].weights[:s], dtype=torch.float64)
            self.solver.solve(game, lam0=lam0, generator=game.generator)
            self._strategy = Strategy(game, self.solver)
        return self._strategy

    def _checked(self, game: MixtureGame) -> MixtureGame:
        try:
            game.known()
        except ValueError as error:
            raise UserError(
                f"the members' losses are not finite at step {self.t}: stopped, the last good checkpoint is kept. "
                f"Lower {self._rate()}"
            ) from error
        return game

    def _weights_phase(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        self.refuse_broken()
        if self.schedule.grows:
            return self._end_stage(x, y)
        game = self._checked(self._game(self.mixture, x, y))
        lam0 = self.mixture.weights.to("cpu", torch.float64, copy=True)
        with self._interruptible():
            solution = self.solver.solve(game, lam0=lam0, generator=self.attack_generator)
        self._before_batch = None
        self.mixture.set_weights(solution.weights)
        self.ranks.take_from_first_(self.mixture.weights)
        bound = {} if solution.lower_bound is None else {"weights/lower_bound": solution.lower_bound}
        return {"weights/value": solution.value, **bound}

    def _game(self, mixture: Mixture, x: Tensor, y: Tensor) -> MixtureGame:
        """The game of a weights phase on the members of `mixture`, whose batch is x, y."""
        most, phase = self.micro_batch_size, self.phase
        # After a resume they come from a checkpoint, on the CPU.
        recent = [AttackedBatch(*(part.to(x.device) for part in batch)) for batch in self._recent]
        loss, weights_attack = phase.loss(self.loss_now), self._with_loss(self.weights_attack, self.loss_now)
        if phase.is_published:
            attacks = [SharedAttack(weights_attack, self.ranks, most)]
            parts = (mixture, x, y, self.threat_model, attacks, loss, self.attack_generator)
            return DividedGame(*parts, recent=recent, micro_batch_size=most)
        if phase.num_images is not None:
            self._phase_images = self._phase_images or phase.images(self._data())
            assert self._phase_images is not None
            (x, y), recent = self._phase_images, []
        # Of several processes each attacks all images: the weights come from the first.
        return MixtureGame(
            *(mixture, x, y, self.threat_model),
            list(phase.attacks.values()) or [weights_attack],
            loss,
            self.attack_generator,
            batch_size=most or self._data().eval_batch_size,
            recent=recent,
        )

    def _check_phase(self, data: ImageDataModule) -> None:
        """Refuse before the first batch what a weights phase cannot play.

        Raises:
            UserError: too few validation images, or temperatures for another number of examples.
        """
        images = self.phase.images(data)
        count = min(data.batch_size, data.num_train) if images is None else len(images[1])
        if self.solver.num_examples not in (None, count):
            raise UserError(
                f"lambda_solver.alpha has {self.solver.num_examples} temperatures, but a weights phase has {count} "
                "images: give one for each, or one number for all"
            )

    def members_attack(self, num_classes: int) -> MembersAttack:
        """The attack of a members' phase, on images of C classes, with the loss of the current batch."""
        loss = self.loss_now
        attack = self._with_loss(self.training_attack, loss)
        smoothed = loss if isinstance(loss, SmoothedZeroOne) else SmoothedZeroOne().at(self.share_done)
        return MembersAttack(self.members_phase, attack, smoothed, num_classes, self.ranks, self.micro_batch_size)

    @property
    def loss_now(self) -> RobustLoss:
        """The loss of the current batch, which may follow the share of the training that is done."""
        return self.loss.at(self.share_done)

    def _with_loss(self, attack: PGD, loss: RobustLoss) -> PGD:
        return attack if loss is self.loss else replace(attack, objective=InnerLoss(loss))

    def _members_phase(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        updated = self.schedule.members_at(self.t, self.member_generator)
        with self._interruptible():
            if self.schedule.grows and self.growth.response == "equilibrium" and updated != [0]:
                x, x_adv, y = self._response().draw(len(y), self.member_generator)
            else:
                ball = self.members_phase.ball(self.threat_model, self.share_done)
                attack = self.members_attack(self._data().num_classes)
                x_adv = attack.own_rows(self.mixture, x, y, ball, self.attack_generator)
        self._before_batch = None
        if self.solver.recent_batches and self.phase.num_images is None:
            self._recent.append(AttackedBatch(x, self.ranks.gather(x_adv, len(x)), y))
        rows = self.ranks.rows(len(x))
        x, y = x[rows], y[rows]
        rates = [self._as_list(self.optimizers())[k].param_groups[0]["lr"] for k in updated]
        losses, hits = [], []
        for k in updated:
            loss, hit = self._update_member(k, x, x_adv, y)
            losses.append(loss)
            hits.append(hit)
        mean_loss = torch.stack(losses).mean()
        self._watch(mean_loss)
        return {
            "train/loss": mean_loss,
            "train/adversarial_accuracy": torch.stack(hits).mean(),
            "train/lr": sum(rates) / len(rates),
        }

    def _update_member(self, k: int, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        member = self.mixture.members[k].train()
        optimizer = self._as_list(self.optimizers())[k]
        optimizer.zero_grad()
        most, weights = self.micro_batch_size, self._class_weights[k]
        seen = add_gradient(member, self.loss_now, weights, x, x_adv, y, most, self.manual_backward)
        gradients = [p.grad for p in member.parameters() if p.grad is not None]
        # Batch norm's statistics too, so that members stay the same in all processes.
        self.ranks.average_([*gradients, *running_statistics(member), seen])
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)
        optimizer.step()
        self.member_updates[k] += 1
        # The sampled schedule may give a member more updates than its share. It keeps the last rate then: some
        # schedulers of torch cannot go on, others rise again.
        scheduler = self._as_list(self.lr_schedulers())[k]
        if scheduler.last_epoch + 1 < self.updates_per_member:
            scheduler.step()
        return seen[0], seen[1]

    @staticmethod
    def _as_list(one_or_many: Any) -> list[Any]:
        return one_or_many if isinstance(one_or_many, list) else [one_or_many]

    def _watch(self, loss: Tensor) -> None:
        """Note the first step with a loss that is not finite; read it from the device only every few steps."""
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, device=loss.device)
        now_bad = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(now_bad, self.t, self._bad_step)
        if self.t % self.check_every == 0:
            self.refuse_non_finite()

    def _interruptible(self) -> AbstractContextManager[None]:
        """Inside, a signal may stop the work at once: `abandon_batch` restores all that changes."""
        # With several processes, a signal must not interrupt one of them inside a collective operation.
        signals = Signals.active if self.ranks.size == 1 else None
        return nullcontext() if signals is None else signals.interruptible()

    def abandon_batch(self) -> bool:
        """Undo the current batch if it changed only generators; return whether it did."""
        if self._before_batch is None:
            return False
        self._set_generators(self._before_batch)
        self._before_batch = None
        self.t -= 1
        self._data().train_dataloader().take_back()
        return True

    def _generators(self) -> dict[str, Any]:
        return {
            "member_generator": self.member_generator.get_state(),
            "attack_generator": self.attack_generator.get_state(),
            # Members may draw too (dropout).
            **generators.state(),
        }

    def _set_generators(self, state: dict[str, Any]) -> None:
        self.member_generator.set_state(state["member_generator"])
        generators.restore(state)
        self.attack_generator.set_state(state["attack_generator"])

    def _rate(self) -> str:
        made = self._as_list(self.optimizers())
        return f"optimizer.lr (now at {made[0].param_groups[0]['lr']:g})" if made else "optimizer.lr"

    def refuse_non_finite(self) -> None:
        """Stop the training if a loss was not finite.

        Raises:
            UserError: names the first such step; checkpoints written before it are good.
        """
        if self._bad_step is not None and (step := int(self._bad_step)) >= 0:
            raise UserError(
                f"the training loss or a logit was not finite at step {step}: stopped, the last good checkpoint is "
                f"kept. Lower {self._rate()} or use trainer.precision=32-true; if it was an early step, look for a "
                "logarithm, division or root in the model that fails on some images"
            )

    def refuse_broken(self) -> None:
        """Stop the training if a loss was, or a member is, not finite; a broken model never becomes a checkpoint.

        Raises:
            UserError: names the step or the member.
        """
        self.refuse_non_finite()
        for k, member in enumerate(self.mixture.members):
            finite = [t.isfinite().all() for t in member.state_dict().values() if t.is_floating_point()]
            if finite and not bool(torch.stack(finite).all()):
                raise UserError(
                    f"member {k} is not finite after step {self.t}: stopped, the last good checkpoint is kept. "
                    f"Lower {self._rate()}"
                )

    def on_validation_start(self) -> None:
        """Refuse members that are not finite before attacking them."""
        self._unanswered = torch.zeros(self.mixture.num_members, dtype=torch.long)
        self.refuse_broken()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Exact expected accuracy, clean and under attack; every epoch meets the same random starts.

        Of several processes each takes whole batches: the numbers are those of one.
        """
        x, y = self._own(batch, batch_idx)
        draws = generator_for(self.seed, "validation", batch_idx, device=x.device)
        with self._interruptible(), torch.inference_mode(False), torch.enable_grad():
            x_adv = self.validation_attack(self.mixture, x, y, self.threat_model, draws)
        # Training and attack may compute in other precisions; correctness is judged in plain float32.
        with torch.inference_mode(False), self.mixture.attack_mode(plain=True):
            robust = self.mixture.expected_accuracy(x_adv, y)
        self._log_accuracies("val", x, y, robust)

    def on_validation_epoch_end(self) -> None:
        """Log the other columns of the row of a validation; refuse members without an answer on a clean image.

        Raises:
            UserError: names the members.
        """
        total = sum(self.ranks.gather_objects(self._unanswered))
        for k in total.nonzero().flatten().tolist():
            raise UserError(
                f"member {k} has logits that are not finite on {int(total[k])} clean validation images: stopped. Look "
                "for a logarithm, division or root in the model that fails on some images"
            )
        self.log_dict({**self.progress(), "step": float(self.t)}, batch_size=1)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """``test/robust_accuracy``: per image the least exact expected accuracy over all points that `protocol` finds.

        The attacks and their random starts are those of ``task=evaluate`` and of `AttackSuite`.
        """
        x, y = self._own(batch, batch_idx)
        suite = AttackSuite(self.protocol or {"validation": self.validation_attack})
        robust = torch.zeros(0, device=x.device)
        if len(y):
            with torch.inference_mode(False), torch.enable_grad():
                found = suite(self.mixture, x, y, self.threat_model, seed=self.seed, batch=batch_idx)
            robust = found.expected_accuracy
        self._log_accuracies("test", x, y, robust)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Labels [B] of members drawn for each image, or probabilities [B, C], as `predict` says.

        The draws follow from seed and batch number alone.
        """
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if self.predict == "probabilities":
            return self.mixture(x).exp()
        return self.mixture.predict(x, generator_for(self.seed, "predict", batch_idx, device=x.device))

    def _own(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """The batch, or an empty one if another process serves it; no inference tensors, so that attacks can
        differentiate."""
        x, y = batch if self.ranks.serves(batch_idx) else (batch[0][:0], batch[1][:0])
        if not x.is_inference():
            return x, y
        with torch.inference_mode(False):
            return x.clone(), y.clone()

    def _log_accuracies(self, stage: str, x: Tensor, y: Tensor, robust: Tensor) -> None:
        """Update and log the three accuracies; their metrics reduce over batches and processes."""
        with torch.inference_mode(False), self.mixture.attack_mode(plain=True):
            logits = self.mixture.member_logits(x)
            clean = self.mixture.expectation(correct(logits, y))
            ensemble = correct(self.mixture.log_average(logits), y)
        if stage == "val":
            self._unanswered += (~answered(logits)).sum(1).cpu()
        for name, values in {"clean": clean, "robust": robust, "ensemble": ensemble}.items():
            metric: Any = self.accuracies[name]
            # Sums in float64 (if the device has it) do not depend on the batching. Set every time: a metric that
            # Lightning moves to a device computes in float32 again.
            metric.set_dtype(clean.dtype)
            metric.update(values.to(clean.dtype))
            shown = name == "robust"
            self.log(f"{stage}/{name}_accuracy", metric, batch_size=max(1, len(y)), prog_bar=shown)

    @property
    def epochs_done(self) -> float:
        """Epochs per model so far: batches done over the batches of an epoch."""
        return self.t / max(1, self.batches_per_epoch)

    @property
    def share_done(self) -> float:
        """Batches done, the current one included, over all batches of the training, or of the stage if it grows."""
        if self.schedule.grows and self.t:
            return self.t * self.mixture.num_members / self.total_batches - self.schedule.stage_at(self.t)
        return min(1.0, self.t / max(1, self.total_batches))

    @property
    def validation_is_due(self) -> bool:
        """Whether the last batch of the epoch is done, but not its validation."""
        return self._data().train_dataloader().batches_left == 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters, generators and the recipe, as tensors and plain containers.

        Lightning's loop counters are dropped: they cannot express an interrupted epoch. Only the epoch number is
        restored.
        """
        stream = self._data().train_dataloader()
        checkpoint.pop("loops", None)
        checkpoint["epoch"] = stream.epoch
        if self.recipe is not None:
            checkpoint["mixture_config"] = self.recipe
        checkpoint["mixadv"] = {
            "schema": STATE_SCHEMA,
            "t": self.t,
            "epochs_done": self.epochs_done,
            "member_updates": list(self.member_updates),
            # A validation that is due comes first.
            "should_stop": bool(self.trainer.should_stop) and not self.validation_is_due,
            **self._generators(),
            "recent": [list(batch) for batch in self._recent],
            "stages": [asdict(stage) for stage in self.stages],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore counters and generators, and set the trainer's own counters.

        Raises:
            UserError: the checkpoint is not one of ours, or of another schema or L.
        """
        state = checkpoint.get("mixadv")
        if state is None or state.get("schema") != STATE_SCHEMA:
            raise UserError("the checkpoint was not written by this version's training: use resume=never")
        if len(state["member_updates"]) != self.mixture.num_members:
            raise UserError(
                f"the checkpoint holds {len(state['member_updates'])} members, not L={self.mixture.num_members}: "
                "use another name=... or resume=never"
            )
        own, held = self.state_dict(), checkpoint.get("state_dict", self.state_dict())
        if {k: v.shape for k, v in own.items()} != {k: getattr(v, "shape", None) for k, v in held.items()}:
            raise UserError("the checkpoint is of other members than these: use another name=... or resume=never")
        self.t = state["t"]
        self.member_updates = list(state["member_updates"])
        self._recent.extend(AttackedBatch(*batch) for batch in state["recent"])
        self.stages = [Stage(**stage) for stage in state["stages"]]
        if self._trainer is None or not self.trainer.training:
            return
        before, now = checkpoint.get("hyper_parameters", {}), self.hparams
        for name in RECORDED:
            if name not in ("micro_batch_size", "protocol") and before.get(name) != now.get(name):
                raise UserError(
                    f"the checkpoint was trained with {name}={before.get(name)}, this training has {now.get(name)}: "
                    "go on with the same settings, or begin anew without a checkpoint"
                )
        if self.schedule.grows and len(self.stages) != self.schedule.stage_at(self.t + 1):
            raise UserError(
                f"the checkpoint has {len(self.stages)} stages after {self.t} batches, which is no place in a training "
                f"of {self.total_batches} batches: go on with the same number of epochs"
            )
        self._set_generators(state)
        loop: Any = self.trainer.fit_loop
        loop.epoch_progress.current.processed = checkpoint["epoch"]
        # Lightning refuses a validation interval that is longer than the rest of the epoch.
        interval = self.trainer.val_check_interval
        left = (checkpoint["epoch"] + 1) * self.batches_per_epoch - self.t
        if isinstance(interval, int) and interval > left:
            self._set_for_now("val_check_interval", max(1, left))
        # Callbacks such as weight averaging use trainer.global_step, which Lightning derives from these.
        steps = loop.epoch_loop.manual_optimization.optim_step_progress.total
        steps.ready = steps.completed = checkpoint["global_step"]
        loop.epoch_loop._batches_that_stepped = self.t
        self.trainer.should_stop = state["should_stop"]

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **given: Any,
    ) -> "MixtureTraining":
        """The training of a checkpoint, with its members; nothing in the file can run code.

        Args:
            checkpoint_path: a checkpoint of ours. map_location: the device, None for the CPU.
            hparams_file, strict, weights_only: ignored; they belong to Lightning's signature. The checkpoint holds its
                settings, is read whole, and never runs code.
            given: arguments of `MixtureTraining` that replace the recorded ones; needed for parts that are not of
                mixadv (``mixture`` for members of your own, ``loss``, ...).

        Raises:
            UserError: it cannot be read, or names code that has to be given.
        """
        path = Path(checkpoint_path)
        checkpoint = read_checkpoint(path)
        settings = checkpoint.get("hyper_parameters")
        if not isinstance(settings, Mapping):
            raise UserError(f"{path} was not written by a training of mixadv: it does not say how it was trained")
        mixture = given.pop("mixture", None)
        if mixture is None:
            if checkpoint.get("mixture_config") is None:
                raise UserError(f"{path} does not say how to build its members: give mixture=...")
            mixture = mixture_of_checkpoint(path, checkpoint)[0].train()
        parts = {key: rebuilt(settings[key], key) for key in RECORDED if key in settings and key not in given}
        parts["recipe"] = checkpoint.get("mixture_config")
        # The content of a file may have any type.
        try:
            module = cls(mixture, **{**parts, **given})
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} does not hold a training of this version ({reason}): train it again") from error
        return module if map_location is None else module.to(map_location)


def _recipe_of(mixture: Mixture) -> dict[str, Any] | None:
    recipes = [getattr(member, "recipe", None) for member in mixture.members]
    # Members of the user may have another attribute of that name.
    if not all(isinstance(recipe, dict) and recipe.get("name") in MODELS for recipe in recipes):
        return None
    return {"L": len(recipes), "models": recipes}
