"""Estimates the time of a training from timed steps on a few images."""

import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mixadv import seeding
from mixadv.attacks.search import Attack
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.tasks.attack_cost import passes_of_protocol, passes_per_image
from mixadv.tasks.session import Session
from mixadv.tasks.speed import batches_of_training
from mixadv.training import MixtureTraining
from mixadv.wording import counted

# A step that takes at least this long, in seconds, is extrapolated without timing more images.
ENOUGH_SECONDS = 1.0
# Images on which a best response of a weights phase is timed.
RESPONSE_IMAGES = 8
# Seconds beyond which a training on a CPU is announced with the presets that fit a CPU.
LONG_ON_CPU = 86400
PRESETS = "experiment=quickstart (digits, minutes) or experiment=cifar10_small_at (a small net on part of CIFAR-10)"


def announce(session: Session, module: MixtureTraining) -> None:
    """Print estimates of the length of the training and of the measurement after it, which is shorter if attacks
    succeed early, and smaller presets if they take more than a day on a CPU."""
    cfg, data, device = session.cfg, session.data, session.device
    epochs = cfg.trainer.max_epochs
    # At most as many images at once as in the training itself.
    part = min(data.batch_size, module.micro_batch_size or data.batch_size)
    per_part = seconds_per_batch(module, data.image_shape, data.num_classes, part, device)
    per_batch = per_part * data.batch_size / part
    total = batches_of_training(cfg, module, data)
    member_batches = module.schedule.member_batches_in(total)
    steps = module.validation_attack.num_steps / max(1, module.training_attack.num_steps)
    validations = epochs / (cfg.trainer.check_val_every_n_epoch or 1) * steps * data.num_val / data.batch_size
    per_response = per_batch
    if total > member_batches and not module.phase.is_published:
        per_response = seconds_per_response(module, data.image_shape, device) * module.phase.num_played(data)
    phases = (total - member_batches) * module.solver.attack_cost()
    seconds = per_batch * (member_batches + validations) + per_response * phases
    one, length = module.mixture.num_members == 1, counted(epochs, "epoch")
    what = f"one model for {length}" if one else f"{module.mixture.num_members} members for {length} each"
    cores = counted(torch.get_num_threads(), "CPU core")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cores
    line = f"Training {what} on {hardware}: about {in_words(seconds)}"
    measuring = _seconds_to_measure(session, module, per_batch / data.batch_size)
    line += f", then at most about {in_words(measuring)} to measure {counted(session.num_test_images, 'test image')}"
    if device.type == "cpu" and seconds + measuring > LONG_ON_CPU:
        line += f".\n[bold yellow]That is for a GPU.[/] What fits this machine: {PRESETS}"
    session.console.print(line, highlight=False, soft_wrap=True)


def _seconds_to_measure(session: Session, module: MixtureTraining, per_image: float) -> float:
    """Seconds of the measurement; `per_image` are those of a training step, whose passes give the time of one."""
    size, classes, norm = module.mixture.num_members, session.data.num_classes, module.threat_model.norm
    stepped = module.schedule.updated_at_once
    # A member's own step is a forward and a backward pass, which is twice as long with gradients of parameters.
    step = passes_per_image(module.members_attack(classes), size, classes, norm) + 3 * stepped
    protocol = passes_of_protocol(module.protocol or {}, size, classes, norm)
    return session.num_test_images * per_image * protocol / step


def _typical(module: MixtureTraining) -> Mixture:
    """A copy of the members that an attack of the training meets; on average half of them if the mixture grows."""
    count = module.mixture.num_members
    return Mixture(copy.deepcopy(module.mixture.members[: (count + 2) // 2 if module.schedule.grows else count]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(
    module: MixtureTraining, attack: Attack, mixture: Mixture, x: Tensor, y: Tensor, generator: torch.Generator
) -> None:
    x_adv = attack(mixture, x, y, module.threat_model, generator)
    for member in mixture.members[: module.schedule.updated_at_once]:
        member.train()
        clean = member(x) if module.loss.needs_clean else None
        module.loss.outer(member(x_adv), clean, y).mean().backward()


def seconds_per_batch(
    module: MixtureTraining,
    image_shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    device: torch.device,
) -> float:
    """Seconds of one members step on a batch of `batch_size` images, extrapolated from fewer images.

    Times a step on two images, then on four times as many until it takes `ENOUGH_SECONDS`. The rest is extrapolated by
    the seconds per further image, so that the fixed cost of a step counts once. The steps use a copy of the members and
    their own generators, so the training that follows is not changed.

    Args:
        module: the training to time.
        image_shape: (C, H, W).
        num_classes: of the data.
        batch_size: images per batch.
        device: where the training runs.
    """
    mixture = _typical(module).to(device)
    generator = seeding.generator_for(0, "estimate", device=device)
    attack = module.members_attack(num_classes)

    def timed(count: int) -> float:
        x = torch.rand(count, *image_shape, generator=generator, device=device)
        y = torch.randint(num_classes, (count,), generator=generator, device=device)
        # The first call includes the one-time setup of libraries.
        return min(_timed(partial(_step, module, attack, mixture, x, y, generator), device) for _ in range(2))

    count = min(2, batch_size)
    seconds = timed(count)
    per_image = seconds / count
    while count < batch_size and seconds < ENOUGH_SECONDS:
        more = min(4 * count, batch_size)
        longer = timed(more)
        per_image = max(0.0, longer - seconds) / (more - count)
        count, seconds = more, longer
    return seconds + per_image * (batch_size - count)


def seconds_per_response(module: MixtureTraining, image_shape: tuple[int, int, int], device: torch.device) -> float:
    """Seconds per image of one best response in a weights phase whose attacks are not those of the training.

    Measured on `RESPONSE_IMAGES` images with the labels that the mixture gives them, so that attacks have work to do.
    Members and generators of the training are not changed.
    """
    mixture = _typical(module).to(device)
    generator = seeding.generator_for(0, "estimate", device=device)
    x = torch.rand(RESPONSE_IMAGES, *image_shape, generator=generator, device=device)
    with mixture.attack_mode(), torch.no_grad():
        y = mixture(x).argmax(1)
    game = MixtureGame(
        *(mixture, x, y, module.threat_model),
        list(module.phase.attacks.values()) or [module.weights_attack],
        module.phase.loss(module.loss),
        generator,
    )
    _synchronize(device)
    started = time.perf_counter()
    game.best_response(mixture.weights.to("cpu", torch.float64))
    return (time.perf_counter() - started) / RESPONSE_IMAGES


def _timed(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - started


def in_words(seconds: float) -> str:
    """A duration in its largest suitable unit: `40 seconds`, `3 hours`, `4 months`."""
    for size, unit in ((30 * 86400, "months"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return counted(max(1, round(seconds)), "second")
