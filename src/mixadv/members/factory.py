"""Functions ``module:callable`` or ``FILE.py:callable`` that build members: here code of the user's own is imported."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from mixadv.errors import UserError

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
FACTORY = re.compile(rf"(?:{_DOTTED}|[^\0]+\.py):{_DOTTED}")


def build_factory(path: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Import the callable at `path` and call it: the module that it returns, in eval mode on the CPU.

    This runs code: `path` must come from the person who runs the program, never from a file. The working directory,
    before it the folder of a .py file, comes first on `sys.path` while the callable is imported and called, and no
    longer.

    Args:
        path: its import path, ``package.module:callable``, or ``FILE.py:callable``.
        arguments: plain values by name, which may come from a file. None for none.

    Raises:
        UserError: it cannot be imported, raises, or returns anything but a `torch.nn.Module` with all shapes known.
    """
    name, _, attribute = path.rpartition(":")
    here = os.getcwd()
    file = Path(os.path.expanduser(name)).absolute() if name.endswith(".py") else None
    places = [here] if file is None else [str(file.parent), here]
    sys.path[:0] = places
    try:
        # Python's cached listing of a folder does not show a module that was written a moment ago.
        importlib.invalidate_caches()
        factory: Any = importlib.import_module(name) if file is None else _module_of(file)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        # Two members that are the same object would share their parameters.
        if isinstance(factory, nn.Module):
            raise UserError(f"{path} is a module, not a function: name a function that builds and returns one")
        if not callable(factory):
            raise UserError(f"{path} is a {type(factory).__name__}, not a function that returns a torch.nn.Module")
        module = factory(**(arguments or {}))
        if not isinstance(module, nn.Module):
            raise UserError(f"{path} returned a {type(module).__name__}: it must return a torch.nn.Module")
        if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
            raise UserError(f"{path} returned a module without shapes: run one batch through it in the factory")
        return _in_eval_mode(path, module.cpu())
    except UserError:
        raise
    # A script without a main guard may end the process on import.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{path}: no module {error.name} in {here} or among the installed packages") from error
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(f"{path} cannot be used ({type(error).__name__}: {reason}): correct the factory") from error
    finally:
        for place in places:
            if place in sys.path:
                sys.path.remove(place)


def _in_eval_mode(path: str, module: nn.Module) -> nn.Module:
    try:
        return module.eval()
    except NotImplementedError as error:
        raise UserError(
            f"{path} returned a program of torch.export, which has no eval mode: return the module it was made from"
        ) from error


def _module_of(file: Path) -> ModuleType:
    """The module in a file, imported once; its name is the path, so that it hides no other module."""
    name = str(file).replace(".", "_")
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise UserError(f"{file} is not a file: name a .py file and a function in it, as nets.py:first")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a name that ends in .py has a loader"
    assert spec.loader is not None, "a name that ends in .py has a loader"
    # Before it runs: dataclasses look for the module of a class there.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
