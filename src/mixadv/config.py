"""The typed top level of the configuration, its resolvers, and the checks that need neither data nor models.

Imports neither torch nor Lightning, so that ``--help``, ``--cfg`` and error messages appear at once.
"""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mixadv.errors import UserError
from mixadv.run_names import name_in, path_safe, run_name
from mixadv.setting_keys import flat_settings
from mixadv.unknown_keys import RENAMED_VALUES, unknown_key

TASKS = ("train", "evaluate", "solve", "ceiling", "game", "predict", "report")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true", "32", "16", "64")
RESUME = ("auto", "never")
# The splits of task=ceiling; "all" stands for the three.
SPLITS = ("train", "validation", "test")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
# Names that are safe as file names.
PLAIN_NAME = r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*"
# Tolerance on sum(weights) = 1.
WEIGHTS_TOLERANCE = 1e-6


@dataclass
class ScheduleConfig:
    """When members and weights are updated, see `mixadv.training.Schedule`; the last four: `mixadv.training.Growth`."""

    kind: str = "sampled"
    T_theta: int = 50
    start: str = "last"
    response: str = "adaptive"
    min_gain: float | None = 0.005
    num_images: int = 1000


@dataclass
class CeilingConfig:
    """What `task=ceiling` looks at: radii (null: `eps`), splits, seconds for each linear or integer program."""

    eps: list[Any] | None = None
    split: Any = "train"
    time_limit: float = 60.0


@dataclass
class PredictConfig:
    """What `task=predict` labels: the folder, and whether its images are resized to those of the mixture."""

    images: str | None = None
    resize: bool = False


@dataclass
class TrainerConfig:
    """The arguments of Lightning's Trainer; see its documentation.

    The differences: `max_epochs` counts epochs per model; `precision` may also be auto; `strategy` auto is
    `mixadv.training.Replicas` on several devices. Null stands for Lightning's default.
    """

    accelerator: str = "auto"
    strategy: str = "auto"
    devices: Any = 1
    num_nodes: int = 1
    precision: Any = "auto"
    fast_dev_run: Any = False
    max_epochs: int = 200
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: Any = None
    limit_train_batches: Any = None
    limit_val_batches: Any = None
    limit_test_batches: Any = None
    limit_predict_batches: Any = None
    overfit_batches: Any = 0.0
    val_check_interval: Any = None
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int | None = 0
    log_every_n_steps: int = 10
    enable_progress_bar: bool = True
    enable_model_summary: bool = False
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    deterministic: Any = False
    benchmark: bool | None = None
    profiler: Any = None
    detect_anomaly: bool = False
    sync_batchnorm: bool = False
    plugins: Any = None


@dataclass
class Config:
    """The top level. Groups with a ``_target_`` are plain dicts here: their classes check their own arguments."""

    task: str = "train"
    L: int = 2
    eps: Any = "8/255"
    seed: int = 0
    name: str | None = None
    resume: str = "auto"
    compile: Any = "auto"
    # Most images in one forward-backward pass of a training; null: the whole batch.
    micro_batch_size: int | None = None
    baseline: bool = False
    members: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    biases: list[Any] = field(default_factory=list)
    mixture: str | None = None
    points: str | None = None
    runs: str = "outputs"
    optimized_metric: str = "test/robust_accuracy"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: dict[str, Any] = MISSING
    scheduler: dict[str, Any] = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ceiling: CeilingConfig = field(default_factory=CeilingConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    data: dict[str, Any] = MISSING
    model: dict[str, Any] = MISSING
    loss: dict[str, Any] = MISSING
    threat_model: dict[str, Any] = MISSING
    attack: dict[str, Any] = MISSING
    protocol: dict[str, Any] = MISSING
    lambda_solver: dict[str, Any] = MISSING
    game: dict[str, Any] = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


# Groups whose keys no class checks: their required and their optional keys.
SCHEMAS = {
    "": Config,
    "schedule": ScheduleConfig,
    "trainer": TrainerConfig,
    "ceiling": CeilingConfig,
    "predict": PredictConfig,
}
KEYS: dict[str, tuple[set[str], set[str]]] = {
    **{name: ({key.name for key in fields(schema)}, set()) for name, schema in SCHEMAS.items()},
    "threat_model": ({"norm"}, {"eps"}),
    "protocol": ({"name", "validation", "attacks"}, {"diagnosed", "save_points"}),
}


def parse_eps(value: Any, key: str = "eps") -> float:
    """Parse a radius in input units, ``8/255``, ``0.031`` or ``0``; `key` is its name in messages.

    Raises:
        UserError: it is not a finite, non-negative number or fraction.
    """
    number = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    match = re.fullmatch(rf"\s*({number})\s*(?:/\s*({number})\s*)?", str(value))
    if match is None or isinstance(value, bool):
        raise UserError(
            f"{key}={value} is not a number: write a fraction or a decimal in input units, as 8/255 or 0.031"
        )
    numerator, denominator = float(match[1]), float(match[2] or 1)
    if denominator == 0:
        raise UserError(f"{key}={value} divides by zero: write a fraction such as 8/255")
    eps = numerator / denominator
    if not math.isfinite(eps) or eps < 0:
        raise UserError(f"{key}={value} must be finite and at least 0: it is a radius, as 8/255 or 0")
    return eps


def _run_dir(folder: str, overrides: Any, name: Any) -> str:
    return f"{folder}/{name_in(Path(folder), run_name(overrides, name))}"


def _job_name(sweep_dir: str, overrides: Any) -> str:
    return name_in(Path(sweep_dir), run_name(overrides))


def register() -> None:
    """Register the schema and the resolvers with Hydra and OmegaConf; may be called again."""
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True)
    # Hydra passes the resolver cache of a sweep to its jobs, so with the cache every job finds the sweep's directory.
    OmegaConf.register_new_resolver("sweep_dir", _run_dir, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("job_name", _job_name, replace=True)
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
    """Check that the task uses `weights` and that they are a distribution. The members are counted when loaded."""
    weights = list(cfg.weights)
    shown = f"weights=[{','.join(f'{weight:g}' for weight in weights)}]"
    if cfg.task == "solve":
        raise UserError(f"{shown}: task=solve finds the weights itself; task=evaluate measures those that you give")
    if cfg.task not in ("evaluate", "train"):
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
    # Divide by the largest first, so that the sum cannot overflow.
    relative = [weight / largest for weight in weights]
    if not abs(sum(weights) - 1) <= WEIGHTS_TOLERANCE:
        divided = ",".join(f"{part / sum(relative):.9g}" for part in relative)
        raise UserError(f"{shown} sum to {sum(weights):.9g}, not to 1: divide them by their sum, weights=[{divided}]")
    if cfg.task == "train" and not cfg.members and len(weights) != cfg.L:
        raise UserError(f"{shown} has {len(weights)} numbers, but L={cfg.L}: give one for each member")


def _check_keys(cfg: DictConfig) -> None:
    """Check that keys are known, that required keys exist, and that every interpolation has a value."""
    for name, (required, optional) in KEYS.items():
        if name and OmegaConf.is_missing(cfg, name):
            continue
        # Hydra's `+key=value` adds keys to typed nodes too, and `~key` removes them.
        found = set(map(str, cfg[name] if name else cfg))
        prefix = f"{name}." if name else ""
        for key in sorted(found - required - optional):
            raise UserError(unknown_key(f"{prefix}{key}", flat_settings(OmegaConf.to_container(cfg))))
        for key in sorted(required - found):
            raise UserError(f"{prefix}{key} is missing: remove ~{prefix}{key} from the command")
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "a key"
        raise UserError(f"{key} has no value ({str(error).splitlines()[0]}): set {key}=...") from None


def _check_groups(cfg: DictConfig) -> None:
    """Check what the classes of the groups cannot check themselves."""
    model, protocol = cfg.model, cfg.protocol
    if str(model.get("_target_")).startswith("mixadv."):
        from_data = ["num_classes", "image_shape"]
        if cfg.task == "train":
            from_data += ["mean", "std"]
        for key in from_data:
            if key in model:
                raise UserError(f"model.{key}: it follows from the data; leave it out")
    if not isinstance(protocol.name, str) or not re.fullmatch(PLAIN_NAME, protocol.name):
        raise UserError(f"protocol.name={protocol.name} must consist of letters, digits and single . _ -")
    if not isinstance(protocol.attacks, DictConfig) or not protocol.attacks:
        raise UserError(f"protocol.attacks={protocol.attacks} must hold at least one attack: choose protocol=fast")
    for name in map(str, protocol.attacks):
        if not re.fullmatch(PLAIN_NAME, name):
            raise UserError(f"protocol.attacks.{name}: names consist of letters, digits and single . _ -, as pgd-20")
    _whole("protocol.diagnosed", protocol.get("diagnosed", 0), 0)
    if not isinstance(protocol.get("save_points", False), bool):
        raise UserError(f"protocol.save_points={protocol.save_points} must be true or false")
    for key in sorted({"restarts", "keep", "start", "objective"} & set(cfg.attack)):
        raise UserError(f"attack.{key}: in training it follows from the loss and the phase; leave it out")
    for group in ("callbacks", "logger"):
        for name, node in cfg[group].items():
            if not isinstance(node, DictConfig) or "_target_" not in node:
                raise UserError(f"{group}.{name}={node} must be the settings of a class, with its _target_")


def _check_trainer(cfg: DictConfig) -> None:
    """Check the ranges that Lightning checks late or not at all."""
    trainer = cfg.trainer
    _one_of("trainer.accelerator", trainer.accelerator, ACCELERATORS)
    precision = str(trainer.precision)
    if precision in RENAMED_VALUES["trainer.precision"]:
        new = RENAMED_VALUES["trainer.precision"][precision]
        raise UserError(f"trainer.precision={precision} is called {new} now: write trainer.precision={new}")
    _one_of("trainer.precision", precision, PRECISIONS)
    devices = trainer.devices
    number = isinstance(devices, int) and not isinstance(devices, bool) and (devices == -1 or devices >= 1)
    listed = isinstance(devices, ListConfig) and len(devices) > 0 and all(type(d) is int and d >= 0 for d in devices)
    if devices != "auto" and not number and not listed:
        raise UserError(f"trainer.devices={devices} must be auto, -1, a number of at least 1, or a list of GPUs")
    for key, low in (("max_epochs", 1), ("num_nodes", 1), ("check_val_every_n_epoch", 1), ("log_every_n_steps", 0)):
        if trainer[key] is not None:
            _at_least(f"trainer.{key}", trainer[key], low)
    every = trainer.check_val_every_n_epoch
    if every is not None and trainer.max_epochs % every:
        raise UserError(
            f"trainer.check_val_every_n_epoch={every} must divide trainer.max_epochs={trainer.max_epochs}: otherwise "
            "the last epochs are never validated, and cannot be selected"
        )
    for part in ("train", "val", "test", "predict"):
        _limit(f"trainer.limit_{part}_batches", trainer[f"limit_{part}_batches"])


def _check_top_level(cfg: DictConfig) -> None:
    """Check the plain keys, and that no group's required key lacks a value."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key} has no default: add {key}=... to the command")
    _one_of("task", cfg.task, TASKS)
    _at_least("L", cfg.L, 1)
    _at_least("seed", cfg.seed, 0)
    if cfg.seed >= 2**32:
        raise UserError(f"seed={cfg.seed} must be below 2**32: NumPy's generators take no more")
    _one_of("compile", str(cfg.compile).lower(), ("auto", "true", "false"))
    _one_of("resume", cfg.resume, RESUME)
    if cfg.name is not None and not path_safe(cfg.name):
        raise UserError(f"name={cfg.name!r} leaves no usable directory name: use letters and digits")
    if cfg.micro_batch_size is not None:
        _at_least("micro_batch_size", cfg.micro_batch_size, 1)
    _check_schedule(cfg)


def _check_schedule(cfg: DictConfig) -> None:
    schedule = cfg.schedule
    _one_of("schedule.kind", schedule.kind, ("sampled", "shared", "grow"))
    _one_of("schedule.start", schedule.start, ("last", "fresh"))
    _one_of("schedule.response", schedule.response, ("adaptive", "fixed", "equilibrium"))
    _at_least("schedule.T_theta", schedule.T_theta, 1)
    if schedule.min_gain is not None:
        _at_least("schedule.min_gain", schedule.min_gain, 0)
    _at_least("schedule.num_images", schedule.num_images, 1)
    if cfg.task != "train" or schedule.kind != "grow":
        return
    if cfg.weights is not None:
        raise UserError("weights=[...]: schedule=grow finds the weights itself, after every member; leave it out")
    if cfg.members and schedule.start == "last":
        raise UserError(
            "members=[...]: schedule.start=last would replace all but the first of them; use schedule.start=fresh"
        )


def _check_threat_model(cfg: DictConfig) -> None:
    if "eps" in cfg.threat_model:
        raise UserError("threat_model.eps: the radius is the top-level key, eps=8/255")
    norm = cfg.threat_model.get("norm")
    _one_of("threat_model.norm", norm, ("linf", "l2"))
    _check_eps("eps", cfg.eps, norm)


def _check_eps(key: str, value: Any, norm: str) -> None:
    if parse_eps(value, key) > 1 and norm == "linf":
        raise UserError(
            f"{key}={value} is larger than the whole input range [0, 1]: eps is in input units, "
            f"did you mean {key}={value}/255?"
        )


def ceiling_splits(cfg: DictConfig) -> list[str]:
    """The splits that `ceiling.split` names, in the order of `SPLITS`.

    Raises:
        UserError: it names none, or an unknown one.
    """
    wanted = cfg.ceiling.split
    named = list(wanted) if isinstance(wanted, ListConfig) else [wanted]
    if not named:
        raise UserError("ceiling.split=[] names no split: choose ceiling.split=train, or several as [train,validation]")
    for name in named:
        _one_of("ceiling.split", name, (*SPLITS, "all"))
    return [name for name in SPLITS if name in named or "all" in named]


def _check_ceiling(cfg: DictConfig) -> None:
    _at_least("ceiling.time_limit", cfg.ceiling.time_limit, 0)
    ceiling_splits(cfg)
    if cfg.ceiling.eps is None:
        return
    if not cfg.ceiling.eps:
        raise UserError("ceiling.eps=[] names no radius: give several, as ceiling.eps=[4/255,8/255], or leave it out")
    for eps in cfg.ceiling.eps:
        _check_eps("ceiling.eps", eps, cfg.threat_model.get("norm"))


def _check_inputs(cfg: DictConfig) -> None:
    """Check that the task uses `members`, `mixture` and `weights` if they are given, and has what it needs."""
    unread = f"task={cfg.task} does not read it; task=evaluate measures"
    if cfg.task == "predict":
        _check_predict(cfg)
    elif cfg.predict.images is not None:
        raise UserError(f"predict.images={cfg.predict.images}: task={cfg.task} does not read it, task=predict does")
    if cfg.members and cfg.task not in ("solve", "evaluate", "train", "predict"):
        raise UserError(f"members=[...]: {unread} them, task=solve finds their weights, task=train trains them further")
    if cfg.members and cfg.task == "train" and cfg.baseline:
        raise UserError("members=[...]: baseline=true trains a fresh single model, no member of these; leave it out")
    if cfg.mixture and cfg.task not in ("evaluate", "predict"):
        raise UserError(f"mixture={cfg.mixture}: {unread} it")
    if cfg.points is not None:
        if cfg.task != "evaluate":
            raise UserError(f"points={cfg.points}: {unread} a mixture at saved points")
        if not Path(cfg.points).is_file():
            raise UserError(f"points={cfg.points} is no file: give a points.safetensors of protocol.save_points=true")
    if cfg.weights is not None:
        _check_weights(cfg)
    if cfg.biases:
        _check_biases(cfg)
    if cfg.task == "solve" and not cfg.members:
        raise UserError(
            "task=solve needs members=[A,B,...]: exported mixtures, run directories, checkpoints, state dicts "
            "(with model=NAME), .safetensors files or module:callable"
        )
    if cfg.task in ("evaluate", "predict"):
        wanted = "an exported mixture/ folder, a run directory or a .ckpt"
        if not cfg.mixture and not cfg.members:
            raise UserError(f"task=evaluate needs mixture=PATH ({wanted}) or members=[A,B,...], with weights=[...]")
        if cfg.mixture and not Path(cfg.mixture).exists():
            raise UserError(f"mixture={cfg.mixture} does not exist: give {wanted}")


def _check_biases(cfg: DictConfig) -> None:
    """Check that `biases` holds scales or a table, and that the task uses it. The classes are counted when known."""
    biases = OmegaConf.to_container(cfg.biases)
    assert isinstance(biases, list)
    shown = f"biases={biases}".replace(" ", "")
    if cfg.task != "solve":
        raise UserError(f"{shown}: task={cfg.task} does not read it; it belongs to task=solve members=[RUN]")
    if all(map(_is_number, biases)):
        for scale in biases:
            if not scale > 0:
                raise UserError(
                    f"{shown}: {scale:g} is no scale; scales are positive, because every order of the classes has its "
                    "reverse and the members without a bias are always there"
                )
    elif not all(isinstance(row, list) and len(row) > 1 and all(map(_is_number, row)) for row in biases):
        raise UserError(
            f"{shown} is neither a list of scales, as [0.1,0.3,1], nor a table of finite numbers with a column for "
            "each class, as [[0.3,0,-0.3],[-0.3,0,0.3]]"
        )
    elif len({len(row) for row in biases}) > 1:
        raise UserError(f"{shown} has rows of different lengths: give every row a number for each class")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_predict(cfg: DictConfig) -> None:
    if not cfg.mixture:
        raise UserError("task=predict needs mixture=PATH: an exported mixture/ folder, a run directory or a .ckpt")
    if not cfg.predict.images or not Path(cfg.predict.images).is_dir():
        raise UserError(f"predict.images={cfg.predict.images} is no folder: name the folder with the images to label")


def check(cfg: DictConfig) -> None:
    """Refuse settings that cannot work, before torch is imported.

    Raises:
        UserError: one line that names the key, the value and the remedy.
    """
    _check_keys(cfg)
    _check_top_level(cfg)
    _check_threat_model(cfg)
    _check_ceiling(cfg)
    _check_groups(cfg)
    _check_trainer(cfg)
    _check_inputs(cfg)
