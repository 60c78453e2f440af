"""A game of the user's own: a table of losses in a file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixadv.files import read_arrays
from mixadv.game import FiniteGame
from mixadv.games.base import Playable, Played, solve_values
from mixadv.games.rational import proved

# Moves of the attacker that table and figure show, those of the largest probability.
SHOWN = 24


class Losses(NamedTuple):
    """What a file holds.

    losses: [N, m, L], or [m, L] for one example.
    mask: [N, m] bool, the moves that exist; None for all.
    masses: [N]; None for 1/N each.
    members: L names.
    """

    losses: np.ndarray
    mask: np.ndarray | None
    masses: np.ndarray | None
    members: list[str]


class Table(Playable):
    """The finite game of a table of losses, solved by linear programming, and in fractions where these are small.

    Args:
        file: ``.npy``, an array [m, L] or [N, m, L]; ``.npz``, such an array `losses` with optional `masses` [N],
            `mask` [N, m] and names `members` [L]; or ``.csv``, a column per member and a row per move of the attacker,
            numbers or fractions such as 1/3. A header gives the names of the members; a column `example` says to which
            example a row belongs, a column `mass` the probability of that example.

    Raises:
        ValueError: the file cannot be read or holds no game; the message says what is wrong.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        found = read_losses(Path(file).expanduser())
        try:
            self.game = FiniteGame(found.losses, found.mask, found.masses)
        except ValueError as error:
            raise ValueError(f"file={file}: {error}") from error
        if len(found.members) != self.game.num_members:
            raise ValueError(f"file={file}: {len(found.members)} names for {self.game.num_members} members")
        self.members = found.members

    def play(self, log: Callable[[str], None]) -> Played:
        """See `Playable.play`; fractions are text in results.json."""
        game = self.game
        values = solve_values(game)
        exact = proved(game, values)
        largest = values.attack.flatten().argsort(descending=True, stable=True)[:SHOWN]
        places = sorted(divmod(int(at), game.num_perturbations) for at in largest if values.attack.flatten()[at] > 1e-9)
        if game.num_examples == 1 and game.num_perturbations <= SHOWN:
            allowed = range(game.num_perturbations) if game.mask is None else game.mask[0].nonzero()[:, 0].tolist()
            places = [(0, j) for j in allowed]
        moves = [
            {
                "example": i,
                "move": j,
                "mass": game.masses[i].item(),
                "probability": values.attack[i, j].item(),
                "losses": game.losses[i, j].tolist(),
            }
            for i, j in places
        ]
        summary = {
            "file": self.file,
            "examples": game.num_examples,
            "perturbations": game.num_perturbations,
            "members": self.members,
            "deterministic_risks": game.deterministic_values().tolist(),
            "runs": [values.row(0, 0.0)],
            "exact": None if exact is None else exact.as_text(),
            "moves": moves,
            "played_moves": int((values.attack > 1e-9).sum()),
        }
        return Played("table", summary, {"attack": values.attack.numpy()})


def read_losses(path: Path) -> Losses:
    """The losses in a .npy, .npz or .csv file, see `Table`.

    Raises:
        ValueError: see `Table`.
    """
    try:
        if path.suffix == ".npy":
            return _of_arrays({"losses": _load(path)}, path)
        if path.suffix == ".npz":
            arrays = read_arrays(path)
            if arrays is None:
                raise FileNotFoundError
            return _of_arrays(arrays, path)
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return _of_rows([row for row in csv.reader(file) if any(cell.strip() for cell in row)], path)
    except FileNotFoundError as error:
        raise ValueError(f"file={path}: there is no such file") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"file={path} cannot be read: {error}") from error
    raise ValueError(f"file={path} must end in .npy, .npz or .csv")


def _load(path: Path) -> np.ndarray:
    with path.open("rb") as raw:
        try:
            return np.load(raw, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"file={path} cannot be read as an array of numbers, as numpy.save writes it") from error


def _of_arrays(arrays: dict[str, np.ndarray], path: Path) -> Losses:
    known = ("losses", "mask", "masses", "members")
    if "losses" not in arrays or set(arrays) - set(known):
        raise ValueError(
            f"file={path} has {', '.join(arrays) or 'no arrays'}: it needs an array losses, and may have "
            "mask, masses and members"
        )
    losses = arrays["losses"]
    if not np.issubdtype(losses.dtype, np.number) and losses.dtype != bool:
        raise ValueError(f"file={path}: losses are of dtype {losses.dtype}, numbers are needed")
    if losses.dtype in (np.float16, np.float32):
        # A float32 loss that prints as 0.1 is taken as the decimal number 0.1, so that fractions stay small.
        losses = np.array([float(str(loss)) for loss in losses.flat]).reshape(losses.shape)
    count = losses.shape[-1] if losses.ndim else 0
    names = arrays.get("members")
    members = [f"f{k + 1}" for k in range(count)] if names is None else [str(name) for name in names.flatten()]
    return Losses(losses, arrays.get("mask"), arrays.get("masses"), members)


def _of_rows(rows: list[list[str]], path: Path) -> Losses:
    header = None
    if rows and is_header(rows[0]):
        header, rows = [cell.strip() for cell in rows[0]], rows[1:]
        if "" in header:
            raise ValueError(f"file={path}: column {header.index('') + 1} has no name: name it, or leave it out")
    if not rows:
        raise ValueError(f"file={path} holds no losses: give a row per move of the attacker, a column per member")
    names = header or [f"f{k + 1}" for k in range(len(rows[0]))]
    columns = [k for k, name in enumerate(names) if header is None or name not in ("example", "mass")]
    examples: dict[str, list[list[float]]] = {}
    masses: dict[str, float] = {}
    for number, row in enumerate(rows, start=1 + (header is not None)):
        if len(row) != len(names):
            raise ValueError(f"file={path}, row {number}: {len(row)} cells where {len(names)} are needed")
        named = dict(zip(names, row, strict=True)) if header else {}
        example = named.get("example", "").strip()
        wanted = [row[k] for k in columns] + ([named["mass"]] if "mass" in named else [])
        wrong = [cell for cell in wanted if not _is_number(cell)]
        if wrong:
            raise ValueError(f"file={path}, row {number}: {wrong[0]!r} is no number or fraction such as 1/3")
        examples.setdefault(example, []).append([float(Fraction(row[k].strip())) for k in columns])
        if "mass" in named and masses.setdefault(example, float(Fraction(named["mass"].strip()))) != float(
            Fraction(named["mass"].strip())
        ):
            raise ValueError(f"file={path}, row {number}: example {example} has two different masses")
    longest = max(map(len, examples.values()))
    losses = np.zeros((len(examples), longest, len(columns)))
    mask = np.zeros((len(examples), longest), dtype=bool)
    for i, moves in enumerate(examples.values()):
        losses[i, : len(moves)], mask[i, : len(moves)] = moves, True
    given = np.array(list(masses.values())) if masses else None
    return Losses(losses, None if mask.all() else mask, given, [names[k] for k in columns])


def is_header(row: list[str]) -> bool:
    """Whether the first row of a csv file has names: no cell is a number, nan or inf. One that is may be a mistake."""
    return not any(_is_number(cell) or cell.strip().lstrip("+-").lower() in ("nan", "inf", "infinity") for cell in row)


def _is_number(cell: str) -> bool:
    try:
        Fraction(cell.strip())
    except (ValueError, ZeroDivisionError):
        return False
    return True
