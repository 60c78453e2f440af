"""``python -m mixadv``: the same command line as ``mixadv`` and ``python run.py``."""

from mixadv.main import main

if __name__ == "__main__":
    main()
