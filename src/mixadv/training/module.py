"""Algorithm 2: adversarial training of the members alternating with weights phases, as manual optimization."""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from mixadv.attacks.objectives import InnerLoss
from mixadv.attacks.pgd import PGD
from mixadv.errors import UserError
from mixadv.lambda_solvers import LambdaSolver
from mixadv.losses import RobustLoss
from mixadv.mixture import Mixture
from mixadv.mixture_game import AttackedBatch, MixtureGame
from mixadv.threat_model import ThreatModel
from mixadv.training.learning_rate import LearningRate
from mixadv.training.metrics import MeanAccuracy
from mixadv.training.schedule import Schedule

STATE_SCHEMA = 2


@dataclass(frozen=True)
class MemberOptimizer:
    """SGD of one member: base rate, momentum, weight decay, and the rate's shape over its own updates."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    learning_rate: LearningRate = field(default_factory=LearningRate)


class MixtureTraining(pl.LightningModule):
    """Adversarial training for mixtures (Meunier et al., 2021, Algorithm 2).

    For t = 1, 2, ..., with batch B_t: in a weights phase the solver plays the game of the mixture on B_t, warm
    started from the current weights lam_t, members fixed; otherwise B_t is attacked for the mixture
    (lam_t, theta_t) and one member (``sampled``) or every member (``shared``) takes an SGD step on its outer loss
    at the attacked batch. Training attacks return their last iterate; the weights phase keeps the best one.

    An epoch is one *per model*: it shows every member the training set once (in expectation when sampled).

    Args:
        mixture: the members and the weights.
        loss: inner and outer loss (AT or TRADES).
        threat_model: the ball.
        attack: PGD settings of training; objective, start and `keep` follow from the loss and the phase.
        validation_attack: PGD whose exact expected accuracy selects the best epoch.
        solver: weights of a phase; one with ``adapts = False`` keeps them fixed, without phases. Where its
            ``recent_batches`` says so, the last batches of the members' phases, with the points found for them then,
            join the game of a weights phase.
        kind, T_theta: the schedule, see `Schedule`.
        optimizer: settings of the members' optimizers.
        updates_per_member: length of the learning-rate schedule, in updates of one member.
        total_batches: batches t of the whole training, weights phases included.
        seed: seeds the generators of member draws, attacks and solver samples.
        check_every: batches between two checks that the loss is finite (each waits for the device).
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        loss: RobustLoss,
        threat_model: ThreatModel,
        attack: PGD,
        validation_attack: PGD,
        solver: LambdaSolver,
        kind: str = "sampled",
        T_theta: int = 50,
        optimizer: MemberOptimizer | None = None,
        updates_per_member: int,
        total_batches: int,
        seed: int = 0,
        check_every: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.mixture = mixture
        self.loss = loss
        self.threat_model = threat_model
        inner = InnerLoss(loss)
        self.training_attack = replace(attack, objective=inner, start=loss.start, keep="last", restarts=1)
        self.weights_attack = replace(self.training_attack, keep="objective")
        self.validation_attack = validation_attack
        self.solver = solver
        adapts = solver.adapts and mixture.num_members > 1
        self.schedule = Schedule(kind, mixture.num_members, T_theta, weights_phases=adapts)
        self.optimizer_settings = optimizer or MemberOptimizer()
        self.updates_per_member = updates_per_member
        self.total_batches = total_batches
        self.seed = seed
        self.check_every = check_every

        self.t = 0
        self.member_updates = [0] * mixture.num_members
        self.member_generator = torch.Generator().manual_seed(seed)
        self.attack_generator: torch.Generator | None = None
        self._attack_state: Tensor | None = None
        self._recent: deque[AttackedBatch] = deque(maxlen=solver.recent_batches)
        self._bad_step: Tensor | None = None

        self.validation: dict[str, float] = {}
        self.clean_accuracy = MeanAccuracy()
        self.robust_accuracy = MeanAccuracy()
        self.ensemble_accuracy = MeanAccuracy()

    def configure_optimizers(self) -> Any:
        """One SGD and one schedule per member; the schedules are stepped by hand, with their member."""
        settings = self.optimizer_settings
        optimizers, schedulers = [], []
        for member in self.mixture.members:
            optimizer = SGD(
                member.parameters(),
                lr=settings.lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=settings.nesterov,
            )
            optimizers.append(optimizer)
            schedulers.append(LambdaLR(optimizer, self._rate))
        return optimizers, schedulers

    def _rate(self, done: int) -> float:
        return self.optimizer_settings.learning_rate.factor(done, self.updates_per_member)

    def setup(self, stage: str) -> None:
        """Place the attack's generator on the device of the run."""
        device = self.trainer.strategy.root_device
        self.attack_generator = torch.Generator(device).manual_seed(self.seed + 1)
        if self._attack_state is not None:
            self.attack_generator.set_state(self._attack_state)
            self._attack_state = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """Serve batch t to the members or to the weights, as the schedule says."""
        x, y = batch
        self.t += 1
        if self.schedule.is_weights_phase(self.t):
            return self._weights_phase(x, y)
        return self._members_phase(x, y)

    def _weights_phase(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        self.refuse_broken()
        attacks, generator = [self.weights_attack], self.attack_generator
        # After a resume they come from a file.
        recent = [AttackedBatch(*(part.to(x.device) for part in batch)) for batch in self._recent]
        game = MixtureGame(self.mixture, x, y, self.threat_model, attacks, self.loss, generator, recent=recent)
        try:
            game.known()
        except ValueError as error:
            raise UserError(
                f"the members' losses are not finite at step {self.t}: stopped, the last good checkpoint is kept. "
                f"Lower optimizer.lr (now {self.optimizer_settings.lr:g})"
            ) from error
        solution = self.solver.solve(game, lam0=self.mixture.weights.double().cpu(), generator=self.attack_generator)
        self.mixture.set_weights(solution.weights)
        return {"phase": "weights", "value": solution.value, "lower_bound": solution.lower_bound}

    def _members_phase(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        updated = self.schedule.members_at(self.member_generator)
        x_adv = self.training_attack(self.mixture, x, y, self.threat_model, self.attack_generator)
        self._recent.append(AttackedBatch(x, x_adv, y))
        rates = [self._as_list(self.optimizers())[k].param_groups[0]["lr"] for k in updated]
        losses, hits = [], []
        for k in updated:
            loss, logits = self._update_member(k, x, x_adv, y)
            losses.append(loss)
            hits.append((logits.argmax(dim=-1) == y).float().mean())
        mean_loss = torch.stack(losses).mean()
        self._watch(mean_loss)
        return {
            "phase": "members",
            "members": updated,
            "loss": mean_loss,
            "adversarial_accuracy": torch.stack(hits).mean(),
            "lr": sum(rates) / len(rates),
        }

    def _update_member(self, k: int, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        member = self.mixture.members[k].train()
        clean_logits = member(x) if self.loss.needs_clean else None
        logits = member(x_adv)
        loss = self.loss.outer(logits, clean_logits, y).mean()
        optimizer = self._as_list(self.optimizers())[k]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self._as_list(self.lr_schedulers())[k].step()
        self.member_updates[k] += 1
        return loss.detach(), logits.detach()

    @staticmethod
    def _as_list(one_or_many: Any) -> list[Any]:
        return one_or_many if isinstance(one_or_many, list) else [one_or_many]

    def _watch(self, loss: Tensor) -> None:
        """Remember the first step whose loss was not finite; ask the device for it only every few steps."""
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, device=loss.device)
        now_bad = ~torch.isfinite(loss) & (self._bad_step < 0)
        self._bad_step = torch.where(now_bad, self.t, self._bad_step)
        if self.t % self.check_every == 0:
            self.refuse_non_finite()

    def refuse_non_finite(self) -> None:
        """Stop the training if a loss was not finite.

        Raises:
            UserError: names the first such step; checkpoints written before it are good.
        """
        if self._bad_step is not None and (step := int(self._bad_step)) >= 0:
            raise UserError(
                f"the training loss was not finite at step {step}: stopped, the last good checkpoint is kept. "
                f"Lower optimizer.lr (now {self.optimizer_settings.lr:g}) or use precision=fp32"
            )

    def refuse_broken(self) -> None:
        """Stop the training if a loss was, or a member is, not finite; a broken model never becomes a checkpoint.

        Raises:
            UserError: names the step or the member.
        """
        self.refuse_non_finite()
        for k, member in enumerate(self.mixture.members):
            tensors = [t for t in member.state_dict().values() if t.is_floating_point()]
            if not bool(torch.stack([t.isfinite().all() for t in tensors]).all()):
                raise UserError(
                    f"member {k} is not finite after step {self.t}: stopped, the last good checkpoint is kept. "
                    f"Lower optimizer.lr (now {self.optimizer_settings.lr:g})"
                )

    def on_validation_start(self) -> None:
        """Look before attacking what training left."""
        self.refuse_broken()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Exact expected accuracy, clean and under attack; every epoch meets the same random starts."""
        x, y = batch
        generator = torch.Generator(x.device).manual_seed(self.seed + 2 + batch_idx)
        with torch.enable_grad():
            x_adv = self.validation_attack(self.mixture, x, y, self.threat_model, generator)
        # Whatever the precision of training and attack, correctness is that of the float32 model.
        with torch.autocast(x.device.type, enabled=False):
            self.clean_accuracy.update(self.mixture.expected_accuracy(x, y))
            self.ensemble_accuracy.update(self.mixture.ensemble_accuracy(x, y))
            self.robust_accuracy.update(self.mixture.expected_accuracy(x_adv, y))

    def on_validation_epoch_end(self) -> None:
        """Metrics of the validation pass just made, reduced over processes, into `validation`."""
        metrics = {
            "val/clean_accuracy": self.clean_accuracy,
            "val/robust_accuracy": self.robust_accuracy,
            "val/ensemble_accuracy": self.ensemble_accuracy,
        }
        self.validation = {name: float(metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()

    @property
    def epochs_done(self) -> float:
        """Epochs per model so far: the members' mean number of updates over the updates of one epoch."""
        per_epoch = self.updates_per_member / (self.trainer.max_epochs or 1)
        return sum(self.member_updates) / len(self.member_updates) / per_epoch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of: counters and generators, as tensors and plain containers."""
        assert self.attack_generator is not None
        checkpoint["mixadv"] = {
            "schema": STATE_SCHEMA,
            "t": self.t,
            "member_updates": list(self.member_updates),
            "member_generator": self.member_generator.get_state(),
            "attack_generator": self.attack_generator.get_state(),
            # Members may draw too (dropout).
            "torch_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "recent": [list(batch) for batch in self._recent],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up counters and generators.

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
        self.t = state["t"]
        self.member_updates = list(state["member_updates"])
        self.member_generator.set_state(state["member_generator"])
        torch.set_rng_state(state["torch_generator"])
        if len(state["cuda_generators"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_generators"])
        self._recent.extend(AttackedBatch(*batch) for batch in state["recent"])
        self._attack_state = state["attack_generator"]
        if self.attack_generator is not None:
            self.attack_generator.set_state(self._attack_state)
            self._attack_state = None
