"""Objects from settings with a ``_target_``.

Who names the class decides which classes there are. What the user types, or keeps in a configuration directory of
their own, may name any class or function: `instantiate` builds it, as Hydra does. What a file names that may come from
anywhere (the record of a mixture) is held to the classes of mixadv by `held_to_mixadv` before anything is built.
"""

import difflib
import functools
import importlib
import inspect
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import hydra.utils
from hydra.errors import InstantiationException
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from mixadv.errors import UserError

TARGET = "_target_"
# How Hydra builds, not what the class is given.
SPECIAL = ("_convert_", "_recursive_", "_partial_", "_args_")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", type(None): "null"}


def instantiate(settings: Mapping[str, Any], key: str, kind: type | None = None) -> Any:
    """Build what ``_target_`` names with the other settings as its arguments, and so what is nested in them.

    Modules of the user's own are found in the working directory too.

    Args:
        settings: plain, with ``_target_``; values with a ``_target_`` are built first, as ``hydra.utils.instantiate``
            does.
        key: what the settings are called, for messages.
        kind: a base class, or a protocol with ``__call__``, that the object has to fit.

    Raises:
        UserError: the target cannot be imported, is of another kind, or is a base class; it does not take an argument,
            or needs another one; a value is not of the type that it is annotated with; or the class refuses it.
    """
    _check(settings, key, kind)
    try:
        built = hydra.utils.instantiate(dict(settings), _convert_="all")
    except InstantiationException as error:
        raise _refusal(error, key) from error
    if kind is not None and not _fits(built, kind):
        raise _wrong_kind(settings, key, kind)
    return built


def held_to_mixadv(node: Any, where: str, key: str = "data") -> None:
    """Look that a record, which may come from anywhere, names classes of mixadv alone, at any depth.

    Args:
        node: plain containers.
        where: whose record it is, for messages.
        key: what `node` is called on the command line.

    Raises:
        UserError: a ``_target_`` is not a class that is defined in mixadv, or a key is one with which Hydra calls
            something in another way.
    """
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == TARGET and not _is_ours(value):
                raise UserError(
                    f"the record of {where} names {key} of {value!r}, which is not part of mixadv: say "
                    f"{key.partition('.')[0]}=... (or {key}.{TARGET}={value}) on the command line"
                )
            if name in SPECIAL:
                raise UserError(f"the record of {where} has {key}.{name}: a record only names a class and its settings")
            held_to_mixadv(value, where, f"{key}.{name}")
    elif isinstance(node, (list, tuple)):
        for value in node:
            held_to_mixadv(value, where, key)


def _is_ours(target: Any) -> bool:
    """Whether it is ``module.Class`` of a class defined there, in mixadv; importing a module of ours does nothing."""
    if not isinstance(target, str) or not target.startswith("mixadv."):
        return False
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and found.__module__.startswith("mixadv.")


def named(target: Any, key: str) -> Callable[..., Any]:
    """The class or function at ``package.module.name``, imported; modules in the working directory are found too.

    Raises:
        UserError: there is none, its module fails, or Hydra refuses to call it, as `os.system`.
    """
    if not isinstance(target, str) or not target:
        raise UserError(f"{key}.{TARGET}={target!r} must name a class, as package.module.Class")
    here = os.getcwd()
    if here not in sys.path and not target.startswith("mixadv."):
        # At the end, where no file hides an installed package; for good, because functions import as well.
        sys.path.append(here)
    # A module written a moment ago may hide behind a cached listing of its folder.
    importlib.invalidate_caches()
    try:
        # Hydra's own look-up functions do not refuse what its `instantiate` refuses.
        found = hydra.utils.instantiate({TARGET: target, "_partial_": True})
    # A script without a main guard may end the process on import.
    except (InstantiationException, SystemExit) as error:
        *_, last = _causes(error)
        missing = (last.name or "") if isinstance(last, (ModuleNotFoundError, AttributeError)) else ""
        above, _, name = missing.rpartition(".")
        if above in sys.modules and f"{target}.".startswith(f"{missing}."):
            said = f"does not exist: {above} has no {name}"
        elif isinstance(last, ModuleNotFoundError) and f"{target}.".startswith(f"{missing}."):
            said = f"does not exist: no module {missing} in {here} or among the installed packages"
        elif isinstance(last, InstantiationException):
            said = f"is refused: {_first_line(last)}"
        else:
            said = f"cannot be imported ({type(last).__name__}: {_first_line(last)}{_place(last)})"
        raise UserError(f"{key}.{TARGET}={target!r} {said}") from error
    # A module may hold a function with some of its arguments given already.
    return functools.partial(found.func, *found.args, **found.keywords) if found.args or found.keywords else found.func


def arguments_of(factory: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that can be given by name, with resolved annotations, and whether any other name is taken too.

    In a class, ``**others`` stands for the arguments of the classes that it derives from.
    """
    found: dict[str, inspect.Parameter] = {}
    if not isinstance(factory, type):
        functions: list[Any] = [factory]
    else:
        functions = [vars(base)["__init__"] for base in factory.__mro__ if "__init__" in vars(base)]
        if functions[0] is object.__init__ and factory.__new__ is not object.__new__:
            # Such as datetime.timedelta: what takes the arguments has no signature, the call itself tells.
            return found, True
    for function in functions:
        try:
            parameters = list(inspect.signature(function).parameters.values())[int(isinstance(factory, type)) :]
        except ValueError:
            # Written in C: the call itself tells.
            return found, True
        hints = _hints(function)
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                # What a base class needs, the class itself may give it.
                default = parameter.default if function is functions[0] else None
                annotation = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, parameter.replace(annotation=annotation, default=default))
        if function is object.__init__:
            # Nobody above took all that ``**others`` holds: it goes elsewhere.
            return found, function is not functions[0]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
    return found, True


def check_arguments(
    factory: Callable[..., Any], settings: Mapping[str, Any], key: str, given_later: bool = False
) -> None:
    """Hold settings to the names and annotations of what they are for.

    Args:
        factory: what is called with them.
        settings: by name; ``_target_`` and Hydra's special keys are passed over.
        key: what the settings are called, for messages.
        given_later: whether more arguments come later (``_partial_``).

    Raises:
        UserError: an argument that it does not take, or one too few; a value of another type.
    """
    taken, any_other = arguments_of(factory)
    name_of_factory = getattr(factory, "__name__", type(factory).__name__)
    for name in (str(name) for name in settings if name not in (TARGET, *SPECIAL)):
        if name not in taken and not any_other:
            likely = difflib.get_close_matches(name, taken, n=1)
            question = f", did you mean {key}.{likely[0]}? It" if likely else "; it"
            has = f"{name_of_factory} has no such setting{question} has {', '.join(taken) or 'none'}"
            raise UserError(f"{key}.{name}: {has}. Where the group sets it, ~{key}.{name} takes it away")
    for name, parameter in taken.items():
        if name in settings:
            _check_value(f"{key}.{name}", settings[name], parameter.annotation)
        elif parameter.default is parameter.empty and not given_later and "_args_" not in settings:
            raise UserError(f"{key}.{name} has no default: add {key}.{name}=... to the command")


def _check(settings: Mapping[str, Any], key: str, kind: type | None) -> None:
    factory, partial = named(settings.get(TARGET), key), bool(settings.get("_partial_"))
    if inspect.isabstract(factory):
        raise UserError(f"{key}.{TARGET}={settings[TARGET]} is a base class: name one that derives from it")
    if kind is not None and isinstance(factory, type) and not partial and not _fits(factory, kind):
        raise _wrong_kind(settings, key, kind)
    check_arguments(factory, settings, key, given_later=partial)


def _wrong_kind(settings: Mapping[str, Any], key: str, kind: type) -> UserError:
    if _is_protocol(kind):
        wanted = f"one that is called with ({', '.join(_called_with(kind))})"
    else:
        wanted = f"one that derives from {kind.__module__}.{kind.__qualname__}"
    return UserError(f"{key}.{TARGET}={settings[TARGET]} is no {kind.__name__}: name {wanted}")


def _is_protocol(kind: type) -> bool:
    return getattr(kind, "_is_protocol", False)


def _called_with(thing: Any) -> list[str]:
    """The names of the arguments with which an object, or the objects of a class, are called."""
    if not isinstance(thing, type):
        return list(inspect.signature(thing).parameters)
    # Every class can be called itself; `dir` leaves that out.
    return list(inspect.signature(thing.__call__).parameters)[1:] if "__call__" in dir(thing) else []


def _fits(thing: Any, kind: type) -> bool:
    """Whether an object, or the objects of a class, are of a kind."""
    if not _is_protocol(kind):
        return issubclass(thing, kind) if isinstance(thing, type) else isinstance(thing, kind)
    # The names of their arguments tell an attack from an objective.
    wanted = _called_with(kind)
    return callable(thing) and _called_with(thing)[: len(wanted)] == wanted


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        # Annotations that only a type checker resolves, or an object that has none: nothing to hold a value to.
        return {}


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _check_value(key: str, value: Any, annotation: Any) -> None:
    choices = _choices(annotation)
    if isinstance(value, Mapping) and TARGET in value:
        kinds = [c for c in choices if isinstance(c, type) and c is not Any and c.__module__ != "builtins"]
        _check(value, key, kinds[0] if len(kinds) == 1 else None)
        return
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if any(isinstance(part, Mapping) and TARGET in part for _, part in inside):
        for name, part in inside:
            _check_value(f"{key}.{name}", part, Any)
        return
    misfits = [_misfit(value, choice) for choice in choices]
    if all(misfits):
        remedy = f": in quotes it is, {key}=\"'{value}'\"" if str in choices and isinstance(value, (int, float)) else ""
        shown = "null" if value is None else value
        # Of a path or a text, one is enough.
        raise UserError(f"{key}={shown} must be {' or '.join(dict.fromkeys(map(str, misfits)))}{remedy}")


def _misfit(value: Any, annotation: Any) -> str | None:
    """What a value would have to be, None if it is that already."""
    try:
        # As JSON, where a list is a sequence of any kind and a text a path, but true no number.
        TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        if get_origin(annotation) in (Sequence, list, tuple):
            return "a list"
        return WORDS.get(annotation) or error.errors()[0]["msg"].removeprefix("Input should be ")
    except PydanticUserError:
        if not isinstance(annotation, type):
            return None
        return f"the settings of a class, with its {TARGET} ({annotation.__name__})"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _refusal(error: InstantiationException, key: str) -> UserError:
    reason = next((cause for cause in _causes(error) if not isinstance(cause, InstantiationException)), error)
    if isinstance(reason, UserError):
        return reason
    said = _first_line(reason).replace(".__init__()", "")
    if not isinstance(reason, (ValueError, TypeError, InstantiationException)):
        said = f"{type(reason).__name__}: {said}{_place(reason)}"
    return UserError(f"{key}: {said}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or ["no reason given"]
    # Hydra breaks its sentences over lines; the first says what it refuses, the next how to allow it.
    return " ".join(lines).split(". ")[0] if isinstance(error, InstantiationException) else lines[0]


def _place(error: BaseException) -> str:
    """Where in whose file it happened."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or str(trace.tb_frame.f_globals.get("__name__")).startswith("hydra."):
        return ""
    return f", line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name}"
