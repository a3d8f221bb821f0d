"""README promises nothing that is not there."""

import re
from pathlib import Path

import linfusion as lf

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def rows(heading):
    """The rows of the table whose header starts with `heading`, as lists of cells."""
    table = re.search(rf"^\| {heading} \|.*\n\|[ |-]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def test_every_mechanism_and_family_is_listed_and_no_other():
    classes = {c.__name__ for c in lf.mechanisms().values()}
    assert {re.match(r"`(\w+)\(", row[0])[1] for row in rows("mechanism")} == classes
    assert {re.match(r"`(\w+)`", row[0])[1] for row in rows("model")} == set(lf.families())
    header = re.search(r"^\| model \|.*$", TEXT, re.MULTILINE)[0]
    assert {c.strip() for c in header.strip("|").split("|")[2:]} == classes


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", TEXT, re.MULTILINE)) <= targets


def test_names_in_code_blocks_are_public():
    names = set(re.findall(r"\blf\.(\w+)", TEXT))
    assert names and all(hasattr(lf, n) for n in names)
