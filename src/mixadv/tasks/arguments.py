"""What a configuration gives to a class, held to the class's own annotations before it is built."""

import inspect
import types
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from mixadv.errors import UserError

WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "text",
    type(None): "null",
}


def check_arguments(settings: Mapping[str, Any], key: str, kind: type | None = None) -> None:
    """Hold the settings of a class of ours, and of those nested in them, to its annotations.

    A target that is none of ours passes: `mixadv.shipped.construct` refuses it.

    Args:
        settings: ``_target_`` and arguments.
        key: what the settings are called, for messages.
        kind: a base class, or a protocol with ``__call__``, that the class has to fit.

    Raises:
        UserError: another kind of class, or a base class; an argument that it does not take, or one too few; a value of
            another type than it is annotated with.
    """
    cls = _named(str(settings.get("_target_", "")))
    if cls is None:
        return
    if kind is not None and not _fits(cls, kind):
        raise UserError(f"{key}._target_={settings['_target_']} is no {kind.__name__}: leave it as the group has it")
    if inspect.isabstract(cls):
        raise UserError(f"{key}._target_={settings['_target_']} is a base class: name one that derives from it")
    taken = _parameters(cls)
    for name in (str(name) for name in settings if name != "_target_"):
        if name not in taken:
            raise UserError(f"{key}.{name}: {cls.__name__} has no such setting; it has {', '.join(taken) or 'none'}")
    for name, (annotation, required) in taken.items():
        if name in settings:
            _check_value(f"{key}.{name}", settings[name], annotation)
        elif required:
            raise UserError(f"{key}.{name} has no default: add {key}.{name}=... to the command")


def _named(target: str) -> type | None:
    """The class of ours at ``module.Class``, None if there is none."""
    module, _, name = target.rpartition(".")
    if not module.startswith("mixadv."):
        return None
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None
    return found if isinstance(found, type) and found.__module__.startswith("mixadv.") else None


def _fits(cls: type, kind: type) -> bool:
    if not getattr(kind, "_is_protocol", False):
        return issubclass(cls, kind)
    # The names of their arguments tell an attack from an objective.
    wanted = list(inspect.signature(kind.__call__).parameters)
    return "__call__" in dir(cls) and list(inspect.signature(cls.__call__).parameters)[: len(wanted)] == wanted


def _parameters(cls: type) -> dict[str, tuple[Any, bool]]:
    """Annotation and whether it is required, of every argument; ``**others`` stands for those of the base classes."""
    found: dict[str, tuple[Any, bool]] = {}
    for base in cls.__mro__:
        own: Any = vars(base).get("__init__")
        if own is None:
            continue
        hints = get_type_hints(own)
        parameters = list(inspect.signature(own).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                wanted = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, (wanted, parameter.default is parameter.empty))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _check_value(key: str, value: Any, annotation: Any) -> None:
    choices = _choices(annotation)
    if isinstance(value, Mapping) and "_target_" in value:
        kinds = [choice for choice in choices if isinstance(choice, type) and choice not in WORDS]
        check_arguments(value, key, kinds[0] if len(kinds) == 1 else None)
    elif not any(_is(value, choice) for choice in choices):
        remedy = f": in quotes it is, {key}=\"'{value}'\"" if str in choices and isinstance(value, (int, float)) else ""
        shown = "null" if value is None else value
        # Of a path or a text, one is enough.
        words = dict.fromkeys(_word(choice) for choice in choices)
        raise UserError(f"{key}={shown} must be {' or '.join(words)}{remedy}")


def _is(value: Any, annotation: Any) -> bool:
    if annotation is Any:
        return True
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    if annotation is Path:
        return isinstance(value, str)
    if get_origin(annotation) in (Sequence, list, tuple):
        inner = [part for part in get_args(annotation) if part is not ...]
        return isinstance(value, (list, tuple)) and all(any(_is(v, part) for part in inner) for v in value)
    # A class of ours has to come as a mapping with a _target_.
    return annotation in WORDS and isinstance(value, annotation)


def _word(annotation: Any) -> str:
    if annotation in WORDS:
        return WORDS[annotation]
    if get_origin(annotation) in (Sequence, list, tuple):
        return "a list"
    return f"the settings of a class, with its _target_ ({getattr(annotation, '__name__', annotation)})"
