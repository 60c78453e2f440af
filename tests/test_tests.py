"""The tests themselves: what several of them need lies in a module of its own, under a name that means one thing."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


def tree(path):
    return ast.parse(path.read_text(), str(path))


def imported(path):
    """The top-level names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def defined(path):
    """The functions and classes at the top of a file."""
    return [node.name for node in tree(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_imports_a_test(path):
    """What two tests share belongs into a helper: else running, moving or deleting one of them breaks the other."""
    tests = {other.stem for other in FILES if other.name.startswith("test_")}
    assert sorted(tests.intersection(imported(path))) == []


def test_the_name_of_a_shared_helper_means_one_thing():
    """One file defines the name of a helper, so the name means the same in every test."""
    places = defaultdict(set)
    shared = set()
    for path in FILES:
        names = defined(path)
        if not path.name.startswith("test_") and path.name != "soak.py":
            shared.update(name for name in names if not name.startswith("_"))
        for name in names:
            places[name].add(path.name)
    assert {name: sorted(places[name]) for name in sorted(shared) if len(places[name]) > 1} == {}
