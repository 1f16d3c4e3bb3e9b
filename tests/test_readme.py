"""What a machine can check of the texts: variables, recipes, links, figures that are also data, and their length."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import train_gpt as t
from benchmarks import track

ROOT = Path(__file__).parent.parent
README, RESULTS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/RESULTS.md"))
TEXTS = [ROOT / "README.md", *ROOT.glob("benchmarks/*.md"), *ROOT.glob("data/*.md"), ROOT / "records/README.md"]


def test_variable_table_is_the_help() -> None:
    """The table at the end is what --help prints today, to the letter."""
    table = README.split("```text\n", 1)[1].split("\n```", 1)[0]
    assert table == t.Config.describe_variables(), "run `python train_gpt.py --help` and replace the table in README.md"


def test_texts_name_only_known_variables() -> None:
    """Every KEY=value and every `LONG_NAME` is a variable of the script, or stands for any."""
    prose = README.split("```text\n", 1)[0] + RESULTS
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]{2,})=", prose)) | set(re.findall(r"`([A-Z0-9]+(?:_[A-Z0-9]+)+)`", prose))
    assert {"ITERATIONS", "EVAL_ONLY", "ATTN_BACKEND", "NUM_LOOPS"} <= named
    assert named <= {*t.Config.variables(), "KEY"}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "records" / "recipes").glob("*.env")))
def test_every_recipe_is_a_row_of_the_table_of_systems(name: str) -> None:
    assert re.search(rf"^\|.*\| `{re.escape(name)} .*train_gpt\.py` \|$", README, re.MULTILINE)


def test_texts_stay_short() -> None:
    """What grows goes into one table a question, or out: 250 lines each, the table of variables aside."""
    table = README.split("```text\n", 1)[1].split("\n```", 1)[0]
    assert len(README.splitlines()) - len(table.splitlines()) <= 250
    assert len(RESULTS.splitlines()) <= 250


def test_links_lead_somewhere() -> None:
    """Files of the repository, and headings of the page as GitHub names them."""
    headings = {re.sub(r"[^a-z0-9 -]", "", line.strip("# ").lower()).replace(" ", "-")
                for line in README.splitlines() if line.startswith("#")}  # fmt: skip
    for page in TEXTS:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert target.lstrip("#") in headings if target.startswith("#") else (page.parent / target).exists(), target


def test_scores_are_those_of_the_data() -> None:
    """RESULTS has the table that `python -m benchmarks.track` prints, and the README's rows are among its rows."""
    cells = [score.cells() for score in track.read_scores()]
    assert track.markdown(track.HEAD, cells) in RESULTS
    first = README.split("## Three ways", 1)[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[2:-1]] for line in first.splitlines() if line.count("|") == 7][2:]
    known = [[f"{float(row[1].replace(',', '')) / 1e6:.1f}M", *row[2:6]] for row in cells]
    assert rows and all(row in known for row in rows)


def test_picture_is_drawn_from_the_data(tmp_path: Path) -> None:
    """And the committed one is small."""
    pytest.importorskip("matplotlib", reason="pictures need requirements-dev.txt")
    track.main(["--out", str(tmp_path / "track.png")])
    assert (tmp_path / "track.png").stat().st_size > 10_000
    assert track.DATA.with_suffix(".png").stat().st_size < 100_000


def test_the_demo_runs_again_over_its_own_files() -> None:
    """After a change of the script: what the last demo left is replaced, and `make clean` takes all of it away."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    for target, wanted in (("demo", "RUN_ID=demo OVERWRITE=1 "), ("clean", "rm -f logs/demo.*")):
        said = subprocess.run(["make", "-nB", target], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        assert wanted in said.stdout
