"""`python -m records check FOLDER`: one line per check of a submission folder, exit status 1 if any fails.

Works on folders as they were published: several dialects of logs, one train.log or one per seed, submission_*.json.
What a folder's logs do not say is skipped with the reason. The script is only parsed, but for C1-C4, which import it,
and --reevaluate, which runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from records.checking.files import check_files, score_again
from records.checking.logs import check_logs
from records.checking.result import COLOURS, CheckResult, report
from records.reading.folder import Folder, open_folder


def legality(folder: Folder) -> Iterator[CheckResult]:
    """The reviewers' conditions C1 to C4, as far as a CPU can test them: this runs the folder's script as a module."""
    try:
        from records.checking.legality import legality_checks  # here: imports torch, which no other check needs
    except ModuleNotFoundError as error:
        yield CheckResult("C1-C4", "skip", f"{error}: python -m pip install -r requirements.txt")
        return
    yield from legality_checks(folder.path, folder.script)


def check_folder(path: Path, args: argparse.Namespace) -> Iterator[CheckResult]:
    """All checks, cheap ones first."""
    folder = open_folder(path)
    yield from check_files(folder)
    yield from check_logs(folder, args.baseline)
    if args.reevaluate:
        yield from score_again(folder, os.environ)
    elif folder.artifacts:
        yield CheckResult("re-evaluation", "skip", "not asked for: --reevaluate scores the artifact again (minutes; "
                          "DATA_PATH names the validation shards)")
    if not args.no_legality:
        yield from legality(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `check` takes."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="submission folder")
    parser.add_argument("--baseline", type=Path, help="submission.json (or its folder) that must be beaten")
    parser.add_argument("--no-legality", action="store_true", help="leave out C1-C4, which import the folder's script")
    parser.add_argument("--reevaluate", action="store_true",
                        help="score the folder's artifact again (DATA_PATH and TOKENIZER_PATH name the data)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per check instead of text")


def run(args: argparse.Namespace) -> int:
    """Check every folder; 1 if anything failed."""
    failed = 0
    for path in args.folders:
        counts = dict.fromkeys(COLOURS, 0)
        for result in check_folder(path, args):
            counts[result.status] += 1
            if args.json:
                print(json.dumps({"folder": str(path), **result._asdict()}), flush=True)
            else:
                report(result, sys.stdout)
        failed += counts["fail"]
        if not args.json:
            print(f"{path}: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} not "
                  "checkable", flush=True)
    return int(failed > 0)
