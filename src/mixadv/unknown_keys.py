"""Messages for unknown keys and words of the command line: the new name of a key, or the most similar one."""

import difflib
from argparse import ArgumentParser
from collections.abc import Collection

# Keys of version 0.1 -> their new names. Some new names are groups: precision=16 but scheduler=cosine.
RENAMED = {
    "schedule.epochs": "trainer.max_epochs",
    "trainer.nodes": "trainer.num_nodes",
    "trainer.val_every_epochs": "trainer.check_val_every_n_epoch",
    "trainer.log_every_steps": "trainer.log_every_n_steps",
    "trainer.progress": "trainer.enable_progress_bar",
    "precision": "trainer.precision",
    "game.seeds": "game.draws",
    "trainer.checkpoint_minutes": "callbacks.checkpoint.train_time_interval.minutes",
    "trainer.checkpoint_updates": "callbacks.checkpoint.every_n_train_steps",
    "trainer.micro_batch_size": "micro_batch_size",
    "optimizer.lr_schedule": "scheduler",
    "optimizer.milestones": "scheduler.milestones",
    "optimizer.gamma": "scheduler.gamma",
    "optimizer.warmup": "scheduler.warmup",
    "logger.project": "logger.wandb.project",
    "logger.entity": "logger.wandb.entity",
    "logger.images": "logger.wandb.images",
    "logger.init_timeout": "logger.wandb.init_timeout",
    "logger.finish_timeout": "logger.wandb.finish_timeout",
    "logger.kind": "logger",
    "model.name": "model",
}
# Keys whose values have new names as well.
RENAMED_VALUES = {"trainer.precision": {"fp32": "32-true", "bf16": "bf16-mixed"}}
# Arguments of Lightning's Trainer that would break a run, and why.
REFUSED = {
    "trainer.logger": "loggers are a group: logger=wandb, logger=[csv,tensorboard], logger=none",
    "trainer.callbacks": "callbacks are a group: callbacks=[default,ema], or +callbacks.NAME._target_=CLASS",
    "trainer.enable_checkpointing": (
        "a run is continued and measured from its checkpoints; callbacks.checkpoint.* sets them"
    ),
    "trainer.accumulate_grad_batches": (
        "one batch is one step of Algorithm 2; micro_batch_size=N serves a large batch in parts"
    ),
    "trainer.barebones": "it switches checkpoints off, and a run is continued and measured from them",
    "trainer.default_root_dir": "a run writes to its own directory: name=..., or hydra.run.dir=DIR",
    "trainer.inference_mode": "attacks need gradients where others only measure",
    "trainer.use_distributed_sampler": "every process makes the same batches and attacks its share of each",
    "trainer.reload_dataloaders_every_n_epochs": "the stream of batches keeps its own place",
    "trainer.enable_autolog_hparams": "the settings of a run are logged always",
    "trainer.model_registry": "mixtures are exported to mixture/ in the run directory",
}
# What other programs call trainer.max_epochs. By its letters, trainer.min_epochs is as similar to trainer.epochs.
EPOCHS = ("epochs", "num_epochs", "n_epochs")
# Least similarity (difflib's ratio, 0 to 1) of two names to suggest one for the other.
ALIKE = 0.75
# Most suggestions in one message; if there are more, none is given.
SUGGESTIONS = 3


def unknown_key(key: str, known: Collection[str], value: str | None = None) -> str:
    """The message for the unknown `key`.

    Args:
        key: dotted, as the user wrote it.
        known: dotted keys and names of groups; `key` itself and its parents are ignored.
        value: the value that the user gave, as text; None if unknown.

    Returns:
        One line: the new name of an old key, or why the key cannot be set, or similar keys.
    """
    if key in RENAMED:
        new = RENAMED[key]
        value = "..." if value is None else RENAMED_VALUES.get(new, {}).get(value, value)
        return f"{key} is called {new} now: write {new}={value}"
    if key in REFUSED:
        return f"{key}: {REFUSED[key]}"
    group, _, rest = key.partition(".")
    if group in ("callbacks", "logger") and "." in rest:
        first = "default" if group == "callbacks" else "csv"
        name = rest.partition(".")[0]
        return f"{key}: {group}.{name} is not chosen; choose it first, as {group}=[{first},{name}]"
    likely = _likely(key, known)
    question = f", did you mean {' or '.join(likely)}?" if likely else ";"
    return f"{key}: there is no such key{question} `--cfg job` shows all of them, --help the groups"


def _likely(key: str, known: Collection[str]) -> list[str]:
    """The key that sets how long to train; the keys that end in `key`, if they are few; else the most similar key."""
    others = sorted(name for name in known if not f"{key}.".startswith(f"{name}."))
    if key.removeprefix("trainer.") in EPOCHS:
        return ["trainer.max_epochs"]
    nested = [name for name in others if name.endswith(f".{key}")]
    if nested:
        return nested if len(nested) <= SUGGESTIONS else []
    # Letters in another order; the similarity of short names, as of esp and eps, is small.
    swapped = [name for name in others if sorted(name.lower()) == sorted(key.lower())]
    return swapped[:1] or difflib.get_close_matches(key, others, n=1, cutoff=ALIKE)


def misplaced_word(words: list[str], parser: ArgumentParser, tasks: Collection[str]) -> str | None:
    """The message for the first word in the style of other programs, such as ``--eps 0.1`` or ``evaluate``.

    Args:
        words: the command line without the program's name.
        parser: Hydra's parser of the command line.
        tasks: the values of ``task=``.

    Returns:
        One line with the right spelling; None if there is no such word.
    """
    known, unknown = parser.parse_known_args(words)
    for word in unknown:
        if word.startswith("-"):
            key, equals, value = word.lstrip("-").partition("=")
            if not equals:
                following = words[words.index(word) + 1 :][:1]
                value = next((text for text in following if "=" not in text and not text.startswith("-")), "VALUE")
            return f"{word}: there is no such flag; settings have no dashes, write {key.replace('-', '_')}={value}"
    for word in [*known.overrides, *unknown]:
        if word in tasks:
            return f"{word} is not KEY=VALUE: write task={word}"
    # Hydra's parser accepts settings in one place only.
    return f"{unknown[0]}: write flags such as -m before or after all settings, not between them" if unknown else None
