"""Functions ``package.module:callable`` that build members: the one place that imports code of the user's own."""

import importlib
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from mixadv.errors import UserError

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
FACTORY = re.compile(rf"{_DOTTED}:{_DOTTED}")


def build_factory(path: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Import the callable at `path` and call it: the module that it returns, in eval mode on the CPU.

    This runs code: `path` must come from the person who runs the program, never from a file. The working directory
    comes first on `sys.path` while the callable is imported and called, and no longer.

    Args:
        path: its import path, ``package.module:callable``.
        arguments: plain values by name, which may come from a file. None for none.

    Raises:
        UserError: it cannot be imported, raises, or returns anything but a `torch.nn.Module` with all shapes known.
    """
    name, _, attribute = path.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        # Python's cached listing of a folder does not show a module that was written a moment ago.
        importlib.invalidate_caches()
        factory: Any = importlib.import_module(name)
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
        return module.cpu().eval()
    except UserError:
        raise
    # A script without a main guard may end the process on import.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{path}: no module {error.name} in {here} or among the installed packages") from error
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(f"{path} cannot be used ({type(error).__name__}: {reason}): correct the factory") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
