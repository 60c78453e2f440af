"""The typed top level of the configuration, its resolvers and its checks of what is known without data or models.

Imports neither torch nor Lightning, so that ``--help``, ``--cfg`` and every refusal answer at once.
"""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixadv.errors import UserError
from mixadv.setting_keys import flat_settings
from mixadv.unknown_keys import unknown_key

TASKS = ("train", "evaluate", "solve", "game", "report")
PRECISIONS = ("auto", "fp32", "bf16")
RESUME = ("auto", "never")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
MAX_NAME = 120
# The length of every epoch is laid down beforehand.
MAX_EPOCHS = 1_000_000
# Names that stay what they are as names of files.
PLAIN_NAME = r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*"
# As much as a mixture's weights may miss 1.
WEIGHTS_TOLERANCE = 1e-6


@dataclass
class ScheduleConfig:
    """When members and weights are updated (Algorithm 2)."""

    kind: str = "sampled"
    epochs: int = 200
    T_theta: int = 50


@dataclass
class OptimizerConfig:
    """One SGD optimizer per member, and the shape of its learning rate over the member's own updates."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    lr_schedule: str = "piecewise"
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1
    warmup: float = 0.25


@dataclass
class TrainerConfig:
    """Where it runs, and how often it looks."""

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    deterministic: bool = False
    limit_train_batches: Any = None
    limit_val_batches: Any = None
    limit_test_batches: Any = None
    val_every_epochs: int = 1
    log_every_steps: int = 10
    checkpoint_minutes: float | None = 10.0
    checkpoint_updates: int | None = None
    # The most images per forward-backward pass in training: auto (what memory holds), null (no limit) or a number.
    micro_batch_size: Any = "auto"
    progress: bool = True


@dataclass
class Config:
    """Top level. Pluggable groups are free-form here: their classes check their own arguments."""

    task: str = "train"
    L: int = 2
    eps: Any = "8/255"
    seed: int = 0
    name: str | None = None
    resume: str = "auto"
    compile: Any = "auto"
    precision: str = "auto"
    baseline: bool = False
    members: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    mixture: str | None = None
    runs: str = "outputs"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    loss: dict[str, Any] = MISSING
    threat_model: dict[str, Any] = MISSING
    attack: dict[str, Any] = MISSING
    protocol: dict[str, Any] = MISSING
    lambda_solver: dict[str, Any] = MISSING
    game: dict[str, Any] = MISSING
    logger: dict[str, Any] = MISSING


# Where no class checks its own arguments: the keys that must be there, and those that may.
SCHEMAS = {"": Config, "schedule": ScheduleConfig, "optimizer": OptimizerConfig, "trainer": TrainerConfig}
KEYS: dict[str, tuple[set[str], set[str]]] = {
    **{name: ({key.name for key in fields(schema)}, set()) for name, schema in SCHEMAS.items()},
    "threat_model": ({"norm"}, {"eps"}),
    "protocol": ({"name", "validation", "attacks"}, {"diagnosed"}),
    "logger": ({"kind"}, {"project", "entity", "init_timeout", "finish_timeout", "images"}),
}


def parse_eps(value: Any) -> float:
    """Read a radius: ``8/255``, ``0.031`` or ``0``, in input units.

    Raises:
        UserError: not a finite non-negative number or fraction.
    """
    number = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    match = re.fullmatch(rf"\s*({number})\s*(?:/\s*({number})\s*)?", str(value))
    if match is None or isinstance(value, bool):
        raise UserError(
            f"eps={value} is not a number: write a fraction or a decimal in input units, as eps=8/255 or eps=0.031"
        )
    numerator, denominator = float(match[1]), float(match[2] or 1)
    if denominator == 0:
        raise UserError(f"eps={value} divides by zero: write a fraction such as eps=8/255")
    eps = numerator / denominator
    if not math.isfinite(eps) or eps < 0:
        raise UserError(f"eps={value} must be finite and at least 0: it is a radius, as eps=8/255 or eps=0")
    return eps


def path_safe(text: str) -> str:
    """``eps=8/255`` becomes ``eps=8-255``; names too long for a file system are cut, and closed with a digest."""
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", re.sub(r"[\[\]'\"]", "", text)).strip("-. ")
    if len(safe) > MAX_NAME:
        import hashlib

        safe = f"{safe[:MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return safe


# Overrides that say where or what, not how: they do not belong to a run's name.
UNNAMED = ("task", "name", "resume", "runs", "launch", "logger")


def run_name(overrides: Any, name: Any = None) -> str:
    """Directory name of a run: ``name=...`` if given, else its path-safe overrides, else ``default``.

    A function of the command alone, so that the same command finds the same directory and resumes.
    """
    if name is not None:
        return path_safe(str(name)) or "default"
    kept = [text for text in overrides if text.split("=", 1)[0].lstrip("+~") not in UNNAMED]
    return path_safe(",".join(kept)) or "default"


def register() -> None:
    """Make the schema and the resolvers known to Hydra and OmegaConf (idempotent)."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    # Cached, because Hydra hands the cache of the sweep to its jobs: every job must find the sweep's own directory.
    OmegaConf.register_new_resolver("sweep_name", run_name, replace=True, use_cache=True)
    ConfigStore.instance().store(name="mixadv_schema", node=Config, provider="mixadv")


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is unknown: choose one of {', '.join(choices)}")


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low or not math.isfinite(value):
        raise UserError(f"{key}={value} must be at least {low:g}")


def _whole(key: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f"{key}={value} must be a whole number of at least {low}")


def _limit(key: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and (value >= 1 if isinstance(value, int) else 0 < value <= 1)):
        raise UserError(f"{key}={value} must be a number of batches (1 or more) or a share in (0, 1]")


def _check_weights(cfg: DictConfig) -> None:
    """That they are read at all, and a distribution; how many members there are is known only once these are loaded."""
    weights = list(cfg.weights)
    shown = f"weights=[{','.join(f'{weight:g}' for weight in weights)}]"
    if cfg.task == "solve":
        raise UserError(f"{shown}: task=solve finds the weights itself; task=evaluate measures those that you give")
    if cfg.task != "evaluate":
        raise UserError(f"{shown}: task={cfg.task} does not read it; it belongs to task=evaluate members=[A,B,...]")
    if cfg.mixture:
        raise UserError(
            f"{shown}: mixture={cfg.mixture} has weights of its own; to give its members others, name it in "
            "members=[...] and leave mixture=... out"
        )
    for weight in weights:
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"{shown}: {weight:g} is no probability; give one number of at least 0 for each member")
    largest = max(weights, default=0.0)
    if largest == 0:
        raise UserError(f"{shown} lets no member be drawn: give positive weights, or leave it out for 1/L each")
    # Divided twice, so that no sum overflows.
    relative = [weight / largest for weight in weights]
    if not abs(sum(weights) - 1) <= WEIGHTS_TOLERANCE:
        divided = ",".join(f"{part / sum(relative):.9g}" for part in relative)
        raise UserError(f"{shown} sum to {sum(weights):.9g}, not to 1: divide them by their sum, weights=[{divided}]")


def _check_keys(cfg: DictConfig) -> None:
    """That the keys are the known ones, and that every interpolation has a value."""
    for name, (must, may) in KEYS.items():
        if name and OmegaConf.is_missing(cfg, name):
            continue
        # Hydra's `+key=value` adds to typed nodes too, and `~key` takes away.
        there, prefix = set(map(str, cfg[name] if name else cfg)), f"{name}." if name else ""
        for key in sorted(there - must - may):
            raise UserError(unknown_key(f"{prefix}{key}", flat_settings(OmegaConf.to_container(cfg))))
        for key in sorted(must - there):
            raise UserError(f"{prefix}{key} is not there: leave ~{prefix}{key} out of the command")
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "a key"
        raise UserError(f"{key} has no value ({str(error).splitlines()[0]}): say {key}=...") from None


def _check_groups(cfg: DictConfig) -> None:
    """What the classes behind the groups cannot know, or would say late."""
    model, protocol, logger = cfg.model, cfg.protocol, cfg.logger
    if not isinstance(model.get("name"), str):
        raise UserError(f"model.name={model.get('name')} must be a model's name: choose it with model=...")
    for key in ("num_classes", "image_shape", *(("mean", "std") if cfg.task == "train" else ())):
        if key in model:
            raise UserError(f"model.{key}: it follows from the data; leave it out")
    if not isinstance(protocol.name, str) or not re.fullmatch(PLAIN_NAME, protocol.name):
        raise UserError(f"protocol.name={protocol.name} must be made of letters, digits and single . _ -")
    if not isinstance(protocol.attacks, DictConfig) or not protocol.attacks:
        raise UserError(f"protocol.attacks={protocol.attacks} must hold an attack at least: choose protocol=fast")
    attacks = {"attacks." + str(name): node for name, node in protocol.attacks.items()}
    for key, node in {"validation": protocol.validation, **attacks}.items():
        if not isinstance(node, DictConfig):
            raise UserError(f"protocol.{key}={node} must be the settings of an attack, with its _target_")
        if not re.fullmatch(PLAIN_NAME, key.removeprefix("attacks.")):
            raise UserError(f"protocol.{key}: a name is made of letters, digits and single . _ -, as pgd-20")
    _whole("protocol.diagnosed", protocol.get("diagnosed", 0), 0)
    _one_of("logger.kind", logger.kind, ("wandb", "csv"))
    if logger.kind == "csv":
        return
    if not isinstance(logger.get("project"), str) or not re.fullmatch(r"[^/\\#?%:]{1,128}", logger.project):
        raise UserError(f"logger.project={logger.get('project')} must be 1 to 128 characters without / \\ # ? % :")
    if not isinstance(logger.get("entity"), str | None):
        raise UserError(f"logger.entity={logger.entity} must be text: a user or team of Weights & Biases; or null")
    for key in ("init_timeout", "finish_timeout"):
        value = logger.get(key, 1)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"logger.{key}={value} must be a positive number of seconds")
    _whole("logger.images", logger.get("images", 0), 0)


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work before anything heavy is imported.

    Raises:
        UserError: one line that names the key, the value and the remedy.
    """
    _check_keys(cfg)
    eps = parse_eps(cfg.eps)
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key} has no default: add {key}=... to the command")
    _one_of("task", cfg.task, TASKS)
    _at_least("L", cfg.L, 1)
    _at_least("seed", cfg.seed, 0)
    if cfg.seed >= 2**32:
        raise UserError(f"seed={cfg.seed} must be below 2**32: NumPy's generators take no more")
    _one_of("precision", cfg.precision, PRECISIONS)
    _one_of("compile", str(cfg.compile).lower(), ("auto", "true", "false"))
    _one_of("resume", cfg.resume, RESUME)
    if cfg.name is not None and not path_safe(cfg.name):
        raise UserError(f"name={cfg.name!r} leaves no usable directory name: use letters, digits, - and _")
    if "eps" in cfg.threat_model:
        raise UserError("threat_model.eps: the radius is the top-level key, eps=8/255")
    norm = cfg.threat_model.get("norm")
    _one_of("threat_model.norm", norm, ("linf", "l2"))
    if norm == "linf" and eps > 1:
        raise UserError(
            f"eps={cfg.eps} is larger than the whole input range [0, 1]: eps is in input units, "
            f"did you mean eps={cfg.eps}/255?"
        )
    _check_groups(cfg)
    for key in sorted({"restarts", "keep", "start", "objective"} & set(cfg.attack)):
        raise UserError(f"attack.{key}: in training it follows from the loss and the phase; leave it out")
    unread = f"task={cfg.task} does not read it; task=evaluate measures"
    if cfg.members and cfg.task not in ("solve", "evaluate"):
        raise UserError(f"members=[...]: {unread} them, task=solve weighs them")
    if cfg.mixture and cfg.task != "evaluate":
        raise UserError(f"mixture={cfg.mixture}: {unread} it")
    if cfg.weights is not None:
        _check_weights(cfg)
    _one_of("schedule.kind", cfg.schedule.kind, ("sampled", "shared"))
    _at_least("schedule.epochs", cfg.schedule.epochs, 1)
    if cfg.schedule.epochs > MAX_EPOCHS:
        raise UserError(f"schedule.epochs={cfg.schedule.epochs} must be at most {MAX_EPOCHS}")
    _at_least("schedule.T_theta", cfg.schedule.T_theta, 1)
    opt = cfg.optimizer
    _one_of("optimizer.lr_schedule", opt.lr_schedule, ("constant", "piecewise", "cosine", "one_cycle"))
    for key in ("lr", "momentum", "weight_decay", "gamma", "warmup"):
        _at_least(f"optimizer.{key}", opt[key], 0)
    if opt.lr == 0:
        raise UserError("optimizer.lr=0 would learn nothing: give a positive rate, as optimizer.lr=0.1")
    if opt.momentum >= 1:
        raise UserError(f"optimizer.momentum={opt.momentum} must be below 1: nothing would be forgotten")
    if opt.nesterov and opt.momentum == 0:
        raise UserError("optimizer.nesterov=true needs momentum: set optimizer.momentum=0.9")
    if any(not 0 < m < 1 for m in opt.milestones):
        raise UserError(f"optimizer.milestones={list(opt.milestones)} must be shares of the training in (0, 1)")
    if opt.warmup >= 1:
        raise UserError(f"optimizer.warmup={opt.warmup} must be a share of the training in [0, 1)")
    _one_of("trainer.accelerator", cfg.trainer.accelerator, ACCELERATORS)
    if cfg.trainer.devices != -1:
        _at_least("trainer.devices", cfg.trainer.devices, 1)
    for key in ("nodes", "val_every_epochs", "log_every_steps", "checkpoint_updates", "checkpoint_minutes"):
        if cfg.trainer[key] is not None:
            _at_least(f"trainer.{key}", cfg.trainer[key], int(key != "checkpoint_minutes"))
    if cfg.schedule.epochs % cfg.trainer.val_every_epochs:
        raise UserError(
            f"trainer.val_every_epochs={cfg.trainer.val_every_epochs} must divide "
            f"schedule.epochs={cfg.schedule.epochs}: else the last epochs could not be selected"
        )
    for part in ("train", "val", "test"):
        _limit(f"trainer.limit_{part}_batches", cfg.trainer[f"limit_{part}_batches"])
    if cfg.trainer.micro_batch_size not in (None, "auto"):
        _whole("trainer.micro_batch_size", cfg.trainer.micro_batch_size, 1)
    if cfg.task == "solve" and not cfg.members:
        raise UserError(
            "task=solve needs members=[A,B,...]: exported mixtures, run directories, checkpoints, state dicts "
            "(with model=NAME), .safetensors files or module:callable"
        )
    if cfg.task == "evaluate":
        wanted = "an exported mixture/ folder, a run directory or a .ckpt"
        if not cfg.mixture and not cfg.members:
            raise UserError(f"task=evaluate needs mixture=PATH ({wanted}) or members=[A,B,...], with weights=[...]")
        if cfg.mixture and not Path(cfg.mixture).exists():
            raise UserError(f"mixture={cfg.mixture} does not exist: give {wanted}")
