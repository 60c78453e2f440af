"""The start of ``mixadv``, ``python -m mixadv`` and ``python run.py``.

It imports nothing at first, so that it can tell of an environment that lacks the requirements, and of Ctrl-C while
they are imported.
"""

import os
import sys

# What a requirement of mixadv is called when it is imported. A module of the user's own that is missing is another
# matter.
REQUIREMENTS = (
    *("hydra", "omegaconf", "torch", "torchvision", "pytorch_lightning", "lightning_fabric", "torchmetrics", "wandb"),
    *("numpy", "scipy", "sklearn", "matplotlib", "PIL", "rich", "jinja2", "pooch", "safetensors", "dotenv", "yaml"),
    "pydantic",
)
# Exit codes by which shells report programs that SIGINT and SIGPIPE ended.
INTERRUPTED, PIPE_CLOSED = 130, 141


def start() -> None:
    """Run the command line; what cannot be told inside it ends here in one line."""
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot show a character shows a question mark.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        from mixadv.main import main

        main()
    except KeyboardInterrupt:
        print("mixadv: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(PIPE_CLOSED)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing not in REQUIREMENTS:
            raise
        sys.exit(
            f"mixadv: mixadv is not installed for this Python ({sys.executable} has no {missing}): activate its "
            "environment, `. .venv/bin/activate` in the checkout, or make one with `make quickstart`"
        )
    finally:
        _close_output()


def _close_output() -> None:
    """Flush standard output; if its reader has ended, as `head` does, let Python's own flush at exit find no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    start()
