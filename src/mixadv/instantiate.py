"""Builds objects from settings with a ``_target_``.

The user's own command and configuration directory may name any class or function; `instantiate` builds it as Hydra
does. A file from somebody else (the record of a mixture) may name classes of mixadv only: `held_to_mixadv` checks this
before anything is built.
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
# Hydra's special keys; they are not arguments of the class.
SPECIAL = ("_convert_", "_recursive_", "_partial_", "_args_")
# Types -> the words for them in messages.
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", type(None): "null"}


def instantiate(settings: Mapping[str, Any], key: str, kind: type | None = None) -> Any:
    """Call the class or function ``_target_`` with the other settings as arguments, as ``hydra.utils.instantiate``.

    Modules are also found in the working directory.

    Args:
        settings: plain containers with ``_target_``; nested settings with a ``_target_`` are built first.
        key: the key of the settings on the command line, for messages.
        kind: a base class, or a protocol with ``__call__``, that the object must match.

    Raises:
        UserError: the target cannot be imported, is abstract, or does not match `kind`; an argument is unknown, missing
            or of the wrong type; or the class refuses a value.
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
    """Check that a record, which may come from anywhere, names only classes of mixadv, at any depth.

    Args:
        node: plain containers.
        where: the file of the record, for messages.
        key: the key of `node` on the command line.

    Raises:
        UserError: a ``_target_`` is not a class of mixadv, or there is one of Hydra's special keys.
    """
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name == TARGET and not _is_ours(value):
                raise UserError(
                    f"the record of {where} names {key} of {value!r}, which is not part of mixadv: give "
                    f"{key.partition('.')[0]}=... (or {key}.{TARGET}={value}) on the command line"
                )
            if name in SPECIAL:
                raise UserError(
                    f"the record of {where} has {key}.{name}: a record may give only a class and its arguments"
                )
            held_to_mixadv(value, where, f"{key}.{name}")
    elif isinstance(node, (list, tuple)):
        for value in node:
            held_to_mixadv(value, where, key)


def _is_ours(target: Any) -> bool:
    """Whether `target` is ``module.Class`` of a class defined in mixadv. Importing mixadv's modules has no effects."""
    if not isinstance(target, str) or not target.startswith("mixadv."):
        return False
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(found, type) and found.__module__.startswith("mixadv.")


def named(target: Any, key: str) -> Callable[..., Any]:
    """Import the class or function ``package.module.name``; modules are also found in the working directory.

    Raises:
        UserError: it does not exist, its module cannot be imported, or Hydra refuses it, such as `os.system`.
    """
    if not isinstance(target, str) or not target:
        raise UserError(f"{key}.{TARGET}={target!r} must name a class, as package.module.Class")
    here = os.getcwd()
    if here not in sys.path and not target.startswith("mixadv."):
        # At the end, so that no file hides an installed package. It stays there, for imports inside functions.
        sys.path.append(here)
    # Python caches the listing of a folder, and would miss a module that was written a moment ago.
    importlib.invalidate_caches()
    try:
        # Hydra's `get_class` and `get_method` lack the blocklist of its `instantiate`.
        found = hydra.utils.instantiate({TARGET: target, "_partial_": True})
    # A script without a main guard may call sys.exit on import.
    except (InstantiationException, SystemExit) as error:
        raise UserError(f"{key}.{TARGET}={target!r} {_import_problem(target, error)}") from error
    # The name in the module may be a partial itself; keep its arguments.
    return functools.partial(found.func, *found.args, **found.keywords) if found.args or found.keywords else found.func


def _import_problem(target: str, error: BaseException) -> str:
    """Why `target` could not be imported, for a message."""
    *_, last = _causes(error)
    missing = (last.name or "") if isinstance(last, (ModuleNotFoundError, AttributeError)) else ""
    # Else the name is missing inside the module of the target, not in `target` itself.
    if f"{target}.".startswith(f"{missing}."):
        above, _, name = missing.rpartition(".")
        if above in sys.modules:
            return f"does not exist: {above} has no {name}"
        if isinstance(last, ModuleNotFoundError):
            return f"does not exist: no module {missing} in {os.getcwd()} or among the installed packages"
    if isinstance(last, InstantiationException):
        return f"is refused: {_first_line(last)}"
    return f"cannot be imported ({type(last).__name__}: {_first_line(last)}{_place(last)})"


def arguments_of(factory: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that can be given by name, with resolved annotations, and whether any other name is accepted.

    ``**others`` in the ``__init__`` of a class is replaced by the arguments of its base classes.
    """
    found: dict[str, inspect.Parameter] = {}
    if not isinstance(factory, type):
        functions: list[Any] = [factory]
    else:
        functions = [vars(base)["__init__"] for base in factory.__mro__ if "__init__" in vars(base)]
        if functions[0] is object.__init__ and factory.__new__ is not object.__new__:
            # Such as datetime.timedelta: `__new__` has no signature, so only the call shows what is accepted.
            return found, True
    for function in functions:
        try:
            parameters = list(inspect.signature(function).parameters.values())[int(isinstance(factory, type)) :]
        except ValueError:
            # Written in C, without a signature.
            return found, True
        hints = _hints(function)
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                # The class itself may pass the required arguments of its base classes.
                default = parameter.default if function is functions[0] else None
                annotation = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, parameter.replace(annotation=annotation, default=default))
        if function is object.__init__:
            # No base class consumes ``**others``: the class uses it in another way, or has no such argument.
            return found, function is not functions[0]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
    return found, True


def check_arguments(
    factory: Callable[..., Any], settings: Mapping[str, Any], key: str, given_later: bool = False
) -> None:
    """Check settings against the signature of the class or function that is called with them.

    Args:
        factory: the class or function.
        settings: argument -> value; ``_target_`` and Hydra's special keys are ignored.
        key: the key of the settings on the command line, for messages.
        given_later: whether more arguments follow later (``_partial_``).

    Raises:
        UserError: an argument is unknown or missing, or a value is not of the annotated type.
    """
    taken, any_other = arguments_of(factory)
    name_of_factory = getattr(factory, "__name__", type(factory).__name__)
    for name in (str(name) for name in settings if name not in (TARGET, *SPECIAL)):
        if name not in taken and not any_other:
            likely = difflib.get_close_matches(name, taken, n=1)
            question = f", did you mean {key}.{likely[0]}? It" if likely else "; it"
            has = f"{name_of_factory} has no such setting{question} has {', '.join(taken) or 'none'}"
            raise UserError(f"{key}.{name}: {has}. If the group sets it, remove it with ~{key}.{name}")
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
    """The names of the arguments of ``__call__`` of an object, or of the objects of a class."""
    if not isinstance(thing, type):
        return list(inspect.signature(thing).parameters)
    # `hasattr` would also find the `__call__` of the class itself, which makes objects.
    return list(inspect.signature(thing.__call__).parameters)[1:] if "__call__" in dir(thing) else []


def _fits(thing: Any, kind: type) -> bool:
    """Whether an object, or the objects of a class, match `kind`."""
    if not _is_protocol(kind):
        return issubclass(thing, kind) if isinstance(thing, type) else isinstance(thing, kind)
    # Protocols such as Attack and Objective differ in the names of their arguments.
    wanted = _called_with(kind)
    return callable(thing) and _called_with(thing)[: len(wanted)] == wanted


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        # There are no annotations, or only a type checker can resolve them: values are not checked.
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
        remedy = f": quote it, {key}=\"'{value}'\"" if str in choices and isinstance(value, (int, float)) else ""
        shown = "null" if value is None else value
        # str and Path have the same words; `dict.fromkeys` drops duplicates.
        raise UserError(f"{key}={shown} must be {' or '.join(dict.fromkeys(map(str, misfits)))}{remedy}")


def _misfit(value: Any, annotation: Any) -> str | None:
    """Words for the type that `value` should have; None if it has it."""
    try:
        # Strict JSON mode accepts a list for every sequence and text for a path, but no boolean for a number.
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
    message = _first_line(reason).replace(".__init__()", "")
    if not isinstance(reason, (ValueError, TypeError, InstantiationException)):
        message = f"{type(reason).__name__}: {message}{_place(reason)}"
    return UserError(f"{key}: {message}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or ["no reason given"]
    # Hydra's messages span several lines; only the first sentence is about the target.
    return " ".join(lines).split(". ")[0] if isinstance(error, InstantiationException) else lines[0]


def _place(error: BaseException) -> str:
    """Line and file in which the error was raised; empty inside Hydra."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or str(trace.tb_frame.f_globals.get("__name__")).startswith("hydra."):
        return ""
    return f", line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name}"
