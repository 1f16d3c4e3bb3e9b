"""Checks of a submission's files: what must be there, the schema, the script and the README's command."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from records.checking.result import CheckResult
from records.reading.folder import Folder
from records.reading.rules import OFFICIAL_DOCUMENTS
from records.reading.runs import read_text
from records.reading.script import names_read, syntax, unpacked

SCHEMA = Path(__file__).with_name("submission.schema.json")
PATHS = ("DATA_PATH", "DATA_DIR", "TOKENIZER_PATH")
STUB_BYTES = 2000  # a script shorter than this that executes another file is a stub
# Variables of launchers, libraries and shells: they may stand in a command though no script reads them.
FOREIGN = re.compile(r"^(NCCL_|CUDA_|TORCH|PYTORCH_|TRITON_|OMP_|MKL_|GLOO_|PYTHON|HF_|HUGGINGFACE_|WANDB_|LD_|MASTER_|"
                     r"MATCHED_FINEWEB_|NPROC|NUM_GPUS|PATH$|HOME$|TMPDIR$|UV_|PIP_|FLASH_ATTENTION_|MAX_JOBS$)")
CODE = (".py", ".pyc", ".so", ".zip", ".cpp", ".cu")
# What a script may name without using it as code: the tokenizer, texts, pictures, and other forms of itself.
KNOWN_FILES = re.compile(r"\.(model|vocab|md|log|txt|png|svg|sh|tsv|csv)$|^submission.*\.json$|tokenizer|"
                         r"^train_gpt_(human|decode)\.py$")
VAL_DOCUMENTS = re.compile(
    r"(?i)((?:--)?\b(?:num[-_]|n[-_]|max[-_])?(?:val|valid|validation|eval)[-_](?:num[-_])?doc(?:ument)?s?"
    r"(?:[-_](?:count|num))?)\b(?:[^)\n]*?\bdefault *= *|[\"']? *(?:: *int *)?[:= ] *)(\d[\d_,]*)")
SOURCE_KEPT = r"linecache|\bopen\(|write_text|write_bytes|import_module|run_path|spec_from"  # inspect finds the source
COMMAND = re.compile(r"(torchrun|python[\d.]*|accelerate|deepspeed)\b.*\btrain\w*\.py|train_gpt\.py|"
                     r"\b(ba)?sh +\S*\w+\.sh\b")  # or a script of the folder's that starts it


def files(folder: Folder) -> Iterator[CheckResult]:
    """README, submission.json, script and logs exist and hold something."""
    def said(name: str, holds: bool, fine: str, remedy: str) -> CheckResult:
        return CheckResult(name, "pass" if holds else "fail", fine if holds else remedy)

    yield said("file README.md", bool(folder.readme.strip()), "there", "missing or empty: write it, or let `python -m "
               "records new` make it")
    names = ", ".join(path.name for path in folder.json_files)
    yield said("file submission.json", bool(folder.json_files), names, "missing: reviewers cannot score the folder; "
               "`python -m records new` writes it")
    script = folder.script
    others = "" if script is None or script.name == "train_gpt.py" else " (reviewers look for train_gpt.py)"
    yield said("file train_gpt.py", script is not None, f"{script.name if script else ''}{others}", "missing: put the "
               "exact file that ran there")
    logs = ", ".join(run.path.name for run in folder.logs)
    yield from (CheckResult("readable logs", "fail", problem) for problem in folder.unreadable)
    yield said("file logs", bool(folder.logs), logs, "no train_seed<SEED>.log or train.log: put the log of every seed "
               "there")
    empty = [run.path.name for run in folder.logs if not run.score]
    if folder.logs:
        yield said("logs end", not empty, "every log has a score", f"{', '.join(empty)}: no final score line "
                   "(finite val_loss: and val_bpb: under a name); the run did not end, or this is no run log: run the "
                   "seed again")


def schema(folder: Folder) -> Iterator[CheckResult]:
    """submission.json against submission.schema.json."""
    data = folder.data
    if folder.problems:
        yield CheckResult("schema", "fail", "; ".join(folder.problems))
    if data is None:
        return
    try:
        import jsonschema
    except ModuleNotFoundError:
        yield CheckResult("schema", "skip", "jsonschema is not installed: python -m pip install -r "
                          "requirements-dev.txt")
        return
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    errors = sorted(validator.iter_errors(data), key=str)
    found = [f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message[:160]}" for error in errors]
    if found:
        yield CheckResult("schema", "fail", "; ".join(found[:5]))
    elif not folder.problems:
        yield CheckResult("schema", "pass", f"{len(data)} keys")


def place(folder: Folder) -> Iterator[CheckResult]:
    """The folder's name, and the track that it claims against the track that it lies in."""
    name, parent = folder.path.resolve().name, folder.path.resolve().parent.name
    if re.match(r"^\d{4}-\d{2}-\d{2}_\S+$", name):
        yield CheckResult("folder name", "pass", name)
    else:
        yield CheckResult("folder name", "fail", f"{name}: rename it to <YYYY-MM-DD>_<Name>")
    claimed = str((folder.data or {}).get("track", ""))
    if not parent.startswith("track_"):
        yield CheckResult("track", "skip", f"the folder lies in {parent}, which is no track_* folder")
    elif not claimed:
        yield CheckResult("track", "skip", f"submission.json claims no track; the folder lies in {parent}")
    else:
        same = ("non" in claimed) == ("non" in parent)
        message = f"claimed {claimed}, lies in {parent}"
        yield CheckResult("track", "pass" if same else "fail", message + ("" if same else ": move it or correct "
                                                                          "`track`"))


def script(folder: Folder) -> Iterator[CheckResult]:
    """The script is a program of its own that this Python compiles."""
    path = folder.script
    if path is None:
        return
    raw = path.read_bytes()
    if not raw.strip():
        yield CheckResult("script", "fail", f"{path.name} is empty ({len(raw)} bytes): put the exact file that ran "
                          "there")
        return
    if raw.startswith(b"\xef\xbb\xbf"):
        yield CheckResult("script", "fail", f"{path.name} begins with a byte order mark, which breaks exec and "
                          "packing: save it as UTF-8 without BOM")
    if folder.source is None:
        yield CheckResult("script", "fail", f"{path.name} is not UTF-8 text: save it as UTF-8")
        return
    text = folder.source.removeprefix("\ufeff")
    try:
        tree = syntax(text)
        compile(text, path.name, "exec", dont_inherit=True)  # some errors only show here
    except (SyntaxError, ValueError) as error:
        where = f"{path.name}:{getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}"
        yield version_result(folder, where)
        return
    yield from stub(folder, tree)
    yield CheckResult("script compiles", "pass", f"on Python {sys.version.split()[0]}, {len(raw)} bytes")
    yield packed(folder)
    yield imports(folder)


def version_result(folder: Folder, problem: str) -> CheckResult:
    """A script that does not compile may want a newer Python and say so."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    notes = folder.readme + "".join(path.read_text(errors="replace") for path in folder.path.glob("requirements*.txt"))
    wanted = re.search(r"[Pp]ython[ >=~]*(3\.1[2-9])", notes)
    if wanted and float(wanted[1][2:]) > sys.version_info.minor and "f-string" in problem:
        return CheckResult("script compiles", "skip", f"{problem}; the folder asks for Python {wanted[1]}, this is "
                           f"{version}")
    note = " (nested quotes in an f-string need Python 3.12, PEP 701: avoid them, or name the version in README)"
    return CheckResult("script compiles", "fail", f"Python {version}: {problem}{note if 'f-string' in problem else ''}")


def executed_files(tree: ast.Module) -> list[str]:
    """Names of files that a script executes: exec(open("x.py").read()), runpy.run_path("x.py")."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and ast.unparse(node.func).rsplit(".")[-1] in ("exec", "run_path", "execfile")]
    return [value.value for call in calls for value in ast.walk(call)
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.endswith(".py")]


def stub(folder: Folder, tree: ast.Module) -> Iterator[CheckResult]:
    """A script that only runs another file hides that file's bytes."""
    size, targets = folder.script.stat().st_size, executed_files(tree)
    if targets and size < STUB_BYTES:
        there = [name for name in targets if (folder.path / Path(name).name).is_file()]
        absent = sorted(set(targets) - set(there))
        missing = f"; not in the folder: {', '.join(absent)}" if absent else ""
        yield CheckResult("script is no stub", "fail", f"{folder.script.name} has {size} bytes and executes "
                          f"{', '.join(targets)}{missing}: ship that file as train_gpt.py; its bytes count")


def packed(folder: Folder) -> CheckResult:
    """Whether the script is self-extracting, and the readable form beside it."""
    inner = unpacked(folder.source)
    if inner is None:
        return CheckResult("packed code", "pass", "not packed: the shipped file is readable as it is")
    wrapper = re.sub(r"[\"'][^\"'\n]{200,}[\"']", '""', folder.source)  # without its payload
    if re.search(r"^\s*@triton\.jit", inner, re.MULTILINE) and not re.search(SOURCE_KEPT, wrapper):
        return CheckResult("packed code", "fail", "the packed source has @triton.jit functions, and the wrapper runs "
                           "it by exec without registering it with linecache: Triton refuses source-less code; pack "
                           "it by `python -m records pack`")
    human = folder.path / "train_gpt_human.py"
    sizes = f"{folder.script.stat().st_size} bytes hold {len(inner.encode())} bytes of source"
    if not human.is_file():
        return CheckResult("packed code", "pass", f"{sizes}; a readable train_gpt_human.py beside it helps reviewers")
    try:
        names = [{node.name for node in ast.walk(syntax(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
                 for text in (inner, human.read_text(encoding="utf-8"))]
    except (SyntaxError, ValueError) as error:
        if inner.strip() == human.read_text(encoding="utf-8", errors="replace").strip():
            return CheckResult("packed code", "pass", f"{sizes}; train_gpt_human.py is what they hold")
        return CheckResult("packed code", "fail", f"{human.name} is not a Python script ({error}): put the source "
                           "there that was packed")
    if names[0] != names[1]:
        odd = ", ".join(sorted(names[0] ^ names[1])[:5])
        return CheckResult("packed code", "fail", f"train_gpt_human.py is not what is packed (they differ in {odd}): "
                           "put the source there that was packed")
    return CheckResult("packed code", "pass", f"{sizes}; train_gpt_human.py defines the same names")


def strings(tree: ast.AST) -> Iterator[str]:
    """The text constants of a script, and sums of them."""
    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = text(node.left), text(node.right)
            return None if left is None or right is None else left + right
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    yield from filter(None, map(text, ast.walk(tree)))


def companions(folder: Folder, tree: ast.AST) -> list[str]:
    """Files of the folder that the script names, or that Python runs by itself: code and data that nothing counts."""
    named = {Path(text).name for text in strings(tree) if len(text) < 200}
    counted = {folder.script, *folder.artifacts}
    found = []
    for path in folder.path.rglob("*"):
        is_code = path.suffix in CODE or path.is_dir() and any(path.glob("*.py"))
        by_name = path.name in named or is_code and path.name.partition(".")[0] in named
        if path.name in ("sitecustomize.py", "usercustomize.py") or path.suffix == ".pth" or (
                by_name and path not in counted and not KNOWN_FILES.search(path.name)
                and (path.is_file() or is_code)):
            found.append(str(path.relative_to(folder.path)))
    return sorted(found)


def imports(folder: Folder) -> CheckResult:
    """Modules that the folder would have to bring along."""
    source, found, beside = folder.inner_source, set(), []
    try:
        beside = companions(folder, syntax(source))
        for node in ast.walk(syntax(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add("." if node.level else (node.module or "").split(".")[0])
    except SyntaxError:  # packed for a newer Python
        found |= set(re.findall(r"^\s*(?:from|import) +(\w+|\.)", source, re.MULTILINE))
    helpers = sorted({path.name for name in found for path in folder.path.glob(f"{name}*")
                      if path.name.partition(".")[0] == name and (path.suffix in CODE or path.is_dir())})
    own = sorted(found & {"records", "data", "benchmarks", "tests", "."})
    if own:
        return CheckResult("self-contained", "fail", f"imports {', '.join(own)}: all code must live in "
                           f"{folder.script.name}")
    if helpers:
        return CheckResult("self-contained", "fail", f"imports {', '.join(helpers)} of this "
                           f"folder: counted code lives in {folder.script.name}; move it there")
    if beside:
        return CheckResult("self-contained", "fail", f"uses {', '.join(beside)} of this folder, whose bytes nothing "
                           f"counts: move what it needs into {folder.script.name} or the artifact")
    return CheckResult("self-contained", "pass", f"imports {len(found)} modules, none of this folder or repository")


def command_variables(readme: str) -> list[str]:
    """NAME of every NAME=value in the README's run commands, continued lines included, in order."""
    names: list[str] = []
    blocks = re.findall(r"^ *(?:```|~~~)[^\n]*\n(.*?)^ *(?:```|~~~)", readme, re.MULTILINE | re.DOTALL)
    indented = ["\n".join(line for line in readme.splitlines() if re.match(r"(    |\t)\S", line))]
    for block in blocks + ([] if blocks else indented):
        joined = re.sub(r"\\\s*\n", " ", block)
        if not COMMAND.search(joined):
            continue
        for line in joined.splitlines():
            exported = re.match(r"\s*(?:export\s+)?((?:[A-Z][A-Z0-9_]+=(?:\"[^\"]*\"|'[^']*'|\S*)[\s;]*)+)", line)
            inline = line if COMMAND.search(line) else exported[1] if exported else ""
            names += re.findall(r"(?:^|[\s;])([A-Z][A-Z0-9_]+)=", inline)
    return list(dict.fromkeys(names))


def readme_command(folder: Folder) -> CheckResult:
    """The run command sets only variables that the script reads."""
    name = "README command"
    page = re.sub(r"\\([_*.])", r"\1", folder.readme)  # Markdown's escapes
    if not page or not folder.source:
        return CheckResult(name, "skip", "README or script is missing")
    if not COMMAND.search(page):
        return CheckResult(name, "fail", "no run command: add `SEED=42 torchrun --standalone --nproc_per_node=8 "
                           "train_gpt.py` in a code block")
    variables, known = command_variables(page), names_read(folder.inner_source)
    for path in [*folder.path.glob("*.sh"), *folder.path.glob("*.py")]:  # starters, preparation of the data
        text = path.read_text(encoding="utf-8", errors="replace")
        starter = r"\$\{?([A-Z][A-Z0-9_]+)" if path.suffix == ".sh" else r"environ\S*[(\[]\s*[\"']([A-Z][A-Z0-9_]+)"
        known |= set(re.findall(starter, text)) if path != folder.script else set()
    unread = [variable for variable in variables if variable not in known and not FOREIGN.match(variable)]
    if unread:
        return CheckResult(name, "fail", f"sets {', '.join(unread)}, which {folder.script.name} never reads: correct "
                           "the spelling or leave it out; the value in force is the script's default")
    extra = [variable for variable in variables
             if not re.search(r"^SEED$|^RUN_ID$|PATH|DIR", variable) and not FOREIGN.match(variable)]
    ideal = f"{len(extra)} more than paths and SEED; `records seeds` bakes them in" if extra else "only paths and SEED"
    return CheckResult(name, "pass", f"sets {', '.join(variables) or 'nothing'}: {ideal}")


def claim_line(folder: Folder) -> Iterator[CheckResult]:
    """Megabytes in the README's claim are decimal."""
    totals = [run.total_bytes for run in folder.logs if run.total_bytes]
    if not totals or not folder.readme:
        return
    mebi = {f"{total / 2**20:.{digits}f}" for total in totals for digits in (1, 2, 3)}
    mega = {f"{total / 1e6:.{digits}f}" for total in totals for digits in (1, 2, 3)}
    said = re.findall(r"(?<![\w.])(\d{1,2}\.\d{1,3}) ?MB\b", folder.readme)
    wrong = sorted({text for text in said if text in mebi - mega})
    if wrong:
        yield CheckResult("README size", "fail", f"{', '.join(wrong)} MB is a size in MiB (2^20): the limit is "
                          f"decimal, {max(totals) / 1e6:.3f} MB = {max(totals)} bytes")


def re_evaluation(folder: Folder) -> CheckResult:
    """An artifact in the folder is what the logs weigh; scoring it again takes data and is the user's command."""
    if not folder.artifacts:
        return CheckResult("artifact", "skip", "no artifact in the folder, so it cannot be scored again (it is not "
                           "required)")
    path = folder.artifacts[0]
    size, logged = path.stat().st_size, [run.artifact_bytes for run in folder.logs if run.artifact_bytes]
    if logged and size not in logged:
        return CheckResult("artifact", "fail", f"{path.name} has {size} bytes, the logs say {sorted(set(logged))}: "
                           "ship the artifact of one of the logged runs")
    return CheckResult("artifact", "pass", f"{path.name}, {size} bytes, as a log says")


def preparation(folder: Folder) -> Iterator[CheckResult]:
    """A script that makes the data splits off all official validation documents, not the first of them."""
    def documents(text: str) -> list[tuple[str, int]]:
        return [(name, int(re.sub(r"\D", "", count))) for name, count in VAL_DOCUMENTS.findall(text)]

    given = documents(folder.readme)
    for path in sorted(path for kind in ("*.py", "*.sh") for path in folder.path.rglob(kind) if path != folder.script):
        text = path.read_text(encoding="utf-8", errors="replace")
        own = documents(text) if not path.name.startswith("train_gpt") else []
        if not own:
            continue
        name, (variable, count) = f"data preparation {path.name}", min(given or own, key=lambda pair: pair[1])
        if count < OFFICIAL_DOCUMENTS:
            yield CheckResult(name, "fail", f"{variable} {count} leaves {OFFICIAL_DOCUMENTS - count} of the "
                              f"{OFFICIAL_DOCUMENTS} validation documents in the training shards that it makes: "
                              f"set the default to {OFFICIAL_DOCUMENTS}, or say {variable} in README's command")
        else:
            yield CheckResult(name, "pass", f"{variable} {count}")


def check_files(folder: Folder) -> Iterator[CheckResult]:
    """All checks of this module."""
    for part in (files, schema, place, script):
        yield from part(folder)
    yield from preparation(folder)
    yield readme_command(folder)
    yield from claim_line(folder)
    yield re_evaluation(folder)


def evaluation_environment(folder: Folder, environment: Mapping[str, str], artifact: Path) -> dict[str, str]:
    """For EVAL_ONLY=1 of an artifact: the data as named, and nothing else of a caller's shell that the script reads."""
    paths = {name: str(Path(environment[name]).resolve()) for name in PATHS if environment.get(name)}
    shipped = sorted(folder.path.glob("*.model"))
    if "TOKENIZER_PATH" not in paths and shipped:
        paths["TOKENIZER_PATH"] = str(shipped[0].resolve())
    mine = names_read(folder.inner_source) - {"DEVICE"}
    kept = {name: value for name, value in environment.items() if name not in mine}
    return {**kept, **paths, "EVAL_ONLY": "1", "ARTIFACT_PATH": str(artifact.resolve()), "RUN_ID": "again"}


def score_again(folder: Folder, environment: Mapping[str, str]) -> Iterator[CheckResult]:
    """EVAL_ONLY=1 with each artifact of the folder, in a process of its own, against the log of the same size."""
    if not folder.artifacts or not folder.script or not folder.source:
        yield CheckResult("re-evaluation", "skip", "no artifact or no script in the folder")
        return
    for artifact in folder.artifacts:
        name = f"re-evaluation {artifact.name}"
        with tempfile.TemporaryDirectory() as place_to_run:
            done = subprocess.run([sys.executable, str(folder.script.resolve())], cwd=place_to_run, text=True,
                                  env=evaluation_environment(folder, environment, artifact), capture_output=True)
            logs = sorted(Path(place_to_run, "logs").glob("again*.txt"))
            again = read_text(logs[0]).score if logs else None
        if again is None or done.returncode:
            said = (done.stderr.strip().splitlines() or ["no score"])[-1]
            yield CheckResult(name, "fail", f"EVAL_ONLY=1 ended with status {done.returncode}: {said[:300]}; either "
                              "the artifact is not this script's, or DATA_PATH and TOKENIZER_PATH do not name the "
                              "run's data")
            continue
        logged = [run.score for run in folder.logs if run.artifact_bytes == artifact.stat().st_size and run.score]
        same = any(abs(score.val_bpb - again.val_bpb) < 5e-5 for score in logged)
        remedy = "" if same else ": ship the artifact of the logged run, or run the seed again"
        yield CheckResult(name, "pass" if same else "fail", f"{again.name} val_bpb {again.val_bpb:.8f}, logged "
                          f"{', '.join(f'{score.val_bpb:.8f}' for score in logged) or 'nothing for its size'}{remedy}")
