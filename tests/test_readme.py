"""The README's promises that a machine can check: the table of variables and every variable it mentions."""

import re
from pathlib import Path

import pytest

import train_gpt as t

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_variable_table_is_the_help() -> None:
    """The table at the end is what --help prints today, to the letter."""
    table = README.split("```text\n", 1)[1].split("\n```", 1)[0]
    assert table == t.Config.describe_variables(), "run `python train_gpt.py --help` and replace the table in README.md"


def test_commands_set_only_known_variables() -> None:
    """Every KEY=value in the README is a variable of the script or names the environment."""
    prose = README.split("```text\n", 1)[0]
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]{2,})=", prose))
    assert {"ITERATIONS", "EVAL_ONLY", "ATTN_BACKEND"} <= named
    assert named <= {*t.Config.variables(), "KEY"}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "records" / "recipes").glob("*.env")))
def test_every_recipe_is_a_row_of_the_table_of_systems(name: str) -> None:
    assert re.search(rf"^\|.*\| `{re.escape(name)} .*train_gpt\.py` \|$", README, re.MULTILINE)
