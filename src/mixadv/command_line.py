"""Arguments as they are typed, made readable for Hydra's grammar.

The grammar reads few characters without quotes, and splits values at commas. Values with other characters get the
quotes that it needs; paths that exist are one value, whatever their names; ``~`` is the home directory, which shells
expand only at the start of a word.
"""

import os
import re

# Keys whose values are paths.
PATH_KEYS = ("mixture", "runs", "data.root", "members", "hydra.run.dir", "hydra.sweep.dir")
# Keys whose values are text: 007 is a name, not a number.
TEXT_KEYS = (*PATH_KEYS, "name", "data.name")
# Keys that have no default and are documented without Hydra's +.
WITHOUT_DEFAULT = ("model.mean", "model.std")

# The characters that the grammar reads without quotes, and the words that it reads as text.
_PLAIN = re.compile(r"[A-Za-z0-9_/\-\\+.$%*@?|: \t]*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_RESERVED = ("true", "false", "null", "inf", "nan")
_ESCAPE = re.compile(r"\\([()\[\]{}:=, \t\\])")
_QUOTED = re.compile(r"""(['"])(?:(?:\\\\)*|.*?[^\\](?:\\\\)*)\1(?=\s*(?:[,:\])}]|$))""", re.DOTALL)
_INTERPOLATION = re.compile(r"\$\{[^}]*\}")
_CLOSING = {"[": "]", "{": "}", "(": ")"}


def for_hydra(argument: str) -> str:
    """The argument with quotes where Hydra's grammar needs them; flags and what cannot be mended stay as they are."""
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    if key in WITHOUT_DEFAULT:
        key = f"++{key}"
    name = key.lstrip("+~")
    return f"{key}={_Reader(value, name in PATH_KEYS, name in TEXT_KEYS).read()}"


def as_typed(argument: str) -> str:
    """The argument without the quotes around its value where `for_hydra` adds them again."""
    found = re.fullmatch(r"([^=']+=)'([^'\\]*)'", argument)
    plain = found[1] + found[2] if found else argument
    return plain if for_hydra(plain) == argument else argument


def unreadable(argument: str) -> str:
    """One line for an argument that Hydra's grammar cannot read even after `for_hydra`: the reason and the remedy."""
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    strange = next((char for char in name if not re.fullmatch(r"[\w.@:/$-]", char, re.ASCII)), None)
    if not equals or (strange is None and not name):
        reason = "it is not KEY=VALUE or GROUP=CHOICE; a value with spaces needs quotes for the shell, as 'KEY=A B'"
    elif strange is not None:
        reason = f"the key has the character {strange!r}; keys have letters from a to z, digits, _ . / @ and -"
    elif any(value.count(mark) > value.count(closing) for mark, closing in _CLOSING.items()):
        reason = f"a bracket is not closed; a list needs quotes for the shell, as '{key}=[A,B]'"
    elif value.startswith(("[", "{")):
        reason = f"entries with brackets or quotes need quotes of their own, as \"{key}=['A','B']\""
    else:
        reason = f'quote the value twice, once for the shell: "{key}={quoted(value)}"'
    return f"cannot read {argument!r}: {reason}"


class _Reader:
    """Copies one value word by word, quoting the words that need it."""

    def __init__(self, value: str, is_path: bool, is_text: bool) -> None:
        self.value, self.is_path, self.is_text = value, is_path, is_text
        self.open: list[str] = []
        # False if a bracket stands inside a word of a list: the word might end there.
        self.is_clear = True

    def read(self) -> str:
        parts, place = [], 0
        while place < len(self.value):
            part, place = self._next(place)
            parts.append(part)
        # A list that is not closed was split by the shell. The grammar refuses both, and `unreadable` says why.
        return "".join(parts) if self.is_clear and not self.open else self.value

    def _next(self, place: int) -> tuple[str, int]:
        """The next part, as Hydra has to see it, and the place behind it."""
        value, char = self.value, self.value[place]
        if char in " \t" or char == ",":
            return char, place + 1
        if self.open and char == _CLOSING[self.open[-1]]:
            self.open.pop()
            return char, place + 1
        if self.is_path and (end := self._end_of_path(place)):
            path = _home(value[place:end].strip()).replace("${", r"\${")
            return path if _is_word(path) else quoted(path), end
        if found := _QUOTED.match(value, place):
            return found[0], found.end()
        if char in "[{":
            self.open.append(char)
            return char, place + 1
        return self._word(place)

    def _end_of_path(self, place: int) -> int | None:
        """Where the longest path ends that begins at `place` and exists."""
        ends = [place + found.start() for found in re.finditer(r"[,\]})]|$", self.value[place:])]
        return next((end for end in reversed(ends) if _exists(self.value[place:end].strip())), None)

    def _word(self, place: int) -> tuple[str, int]:
        value, end = self.value, place
        closing = _CLOSING[self.open[-1]] if self.open else ""
        while end < len(value) and value[end] not in ("," + closing):
            if value[end] == "(" and _IDENTIFIER.fullmatch(value[place:end].strip()):
                # A function of the grammar, as choice(a,b).
                self.open.append("(")
                return value[place : end + 1], end + 1
            if self.open and value[end] in "[{(":
                self.is_clear = False
            if value[end] in "=:" and self._names_what_follows(value[end], value[place:end]):
                return value[place : end + 1], end + 1
            skipped = _ESCAPE.match(value, end) or _INTERPOLATION.match(value, end)
            end = skipped.end() if skipped else end + 1
        return self._with_quotes(value[place:end]), end

    def _names_what_follows(self, char: str, before: str) -> bool:
        """Whether `before` is an argument's name in a function, or a key in braces."""
        inside = self.open[-1] if self.open else ""
        return (char, inside) in (("=", "("), (":", "{")) and _IDENTIFIER.fullmatch(before.strip()) is not None

    def _with_quotes(self, word: str) -> str:
        text = word.strip()
        space = word[len(word.rstrip()) :]
        if self.is_path:
            text = _home(text)
        bare = _INTERPOLATION.sub("", text)
        if not _PLAIN.fullmatch(_ESCAPE.sub("", bare)):
            return quoted(_ESCAPE.sub(r"\1", text)) + space
        is_typed = self.is_text and "(" not in self.open and bare == text and text.lower() != "null"
        return (quoted(_ESCAPE.sub(r"\1", text)) if is_typed and not _is_word(text) else text) + space


def quoted(text: str) -> str:
    """`text` in quotes, as Hydra's grammar reads it back."""
    mark = '"' if "'" in text and '"' not in text else "'"
    # Backslashes count as escapes only before a quote.
    inside = re.sub(rf"(\\*){mark}", lambda found: f"{found[1] * 2}\\{mark}", text)
    trailing = inside[len(inside.rstrip("\\")) :]
    return f"{mark}{inside}{trailing}{mark}"


def _is_word(text: str) -> bool:
    """Whether the grammar reads `text` as text without quotes."""
    return _IDENTIFIER.fullmatch(text) is not None and text.lower() not in _RESERVED


def _home(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~") else text


def _exists(text: str) -> bool:
    """Whether it is a path, or FILE:NAME, a state dict or a function in a file."""
    file, colon, name = text.rpartition(":")
    inside = bool(colon) and re.fullmatch(r"[\w.-]+", name) is not None and os.path.isfile(_home(file))
    return bool(text) and (os.path.exists(_home(text)) or inside)
