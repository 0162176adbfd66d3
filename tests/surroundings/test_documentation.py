"""docs/surroundings.md: every row names tests that exist, and every test of surroundings is in a row."""

import re
from pathlib import Path

import pytest

from fusepass.report import CODES

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "surroundings.md").read_text().splitlines()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES if re.match(r"\| (?!\-)", line)]
ROWS = [row for row in ROWS if row[2] != "test"]


def defined_in(folder: Path) -> set[str]:
    return {
        name for file in folder.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }


def test_the_table_is_read() -> None:
    assert len(ROWS) > 30
    assert all(len(row) == 3 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_tests_that_exist_and_codes_that_are_given(row: list[str]) -> None:
    names = re.findall(r"`(\w+)`", row[2])
    assert names
    assert set(names) <= defined_in(ROOT / "tests")
    codes = re.findall(r"refused \(`([^`]+)`\)", row[1])
    assert set(codes) <= CODES.keys()
    assert codes or "refused" not in row[1]


def test_every_fault_and_every_input_that_is_tested_is_in_a_row() -> None:
    named = {name for row in ROWS for name in re.findall(r"`(test_\w+)`", row[2])}
    files = [Path(__file__).parent / f"test_{theme}.py" for theme in ("faults", "inputs")]
    tested = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert tested - named == {
        "test_a_table_of_the_user_goes_before_the_shipped_one",
        "test_a_users_table_may_have_one_row_run_on_tensor_cores",
        "test_the_shipped_tables_can_be_read",
    }
