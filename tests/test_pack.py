"""records/writing/pack.py: the packed script is the same program, and everything that reads sources still finds them."""

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
from conftest import tiny_env

import train_gpt as t
from records import ToolError
from records.__main__ import main
from records.writing.pack import STUB_LINES, cut_docstrings, pack, same_code, strip, unpack, without_docstrings

SOURCE = Path(t.__file__).read_text(encoding="utf-8")
FINAL = r"(?m)^final_.*_exact .*$"


def start(script: Path, folder: Path, env: dict[str, str], *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` with `env` and only the paths of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    outside = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
    command = [sys.executable, *launcher, str(script)]
    return subprocess.run(command, cwd=folder, env={**outside, "OMP_NUM_THREADS": "1", **env}, capture_output=True,
                          text=True, timeout=110, check=False)  # fmt: skip


def import_from(path: Path, name: str) -> ModuleType:
    """Import a file as module `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Stripping

AWKWARD = {
    "only a docstring": 'def f():\n    """Doc."""\n\nclass A:\n    "Doc."\n',
    "on the line of the def": 'def f(): "Doc."\ndef g(): "Doc."; return 1\nclass A: "Doc."\n',
    "statements after it": 'def f():\n    """Doc.\n    more"""; x = 1; return x\n',
    "comment after it": 'def f():\n    """Doc."""  # why\n    return 1  # because\n',
    "in parentheses": 'def f():\n    ("Doc."\n     "more")\n    return 1\n',
    "async and nested": 'async def f():\n    "Doc."\n    def g(a: int) -> int:\n        "Doc."\n    return g\n',
    "strings that are data": 'x = """\n# no comment\n\n   \nend"""\ny = f"""\n\n{x}  # text\n"""\nz = "# text"\n',
    "a second string": 'def f():\n    "Doc."\n    "not a docstring"\n',
    "other letters": 'def f(): "Größe 字"; return "ü"  # ö\n# 字\nx = "字"  # 字\n',
    "continuations": "x = [  # one\n\n    1,  # two\n    2\n]\ny = 1 + \\\n    2\n",
    "module": '"""Doc."""\nfrom __future__ import annotations\n',
    "module of nothing else": '"""Doc."""\n',
    "carriage returns": '"""Doc."""\r\ndef f():\r\n    """Doc."""\r\n    return """a\r\nb"""\r\n',
    "annotations": "class A:\n    # one\n    b: int\n    a: str = 'x'  # two\ndef f(x: int = 1) -> None: ...\n",
}


@pytest.mark.parametrize("source", [*AWKWARD.values(), SOURCE], ids=[*AWKWARD, "train_gpt.py"])
def test_the_program_stays_the_same(source: str) -> None:
    """Equal syntax trees of the unpacked and the stripped source and of the original less its docstrings."""
    stripped = strip(source)
    assert same_code(ast.parse(unpack(pack(source))), ast.parse(stripped))
    assert same_code(ast.parse(stripped), without_docstrings(source.replace("\r\n", "\n")))
    tokens = list(tokenize.generate_tokens(StringIO(stripped).readline))
    assert not [token for token in tokens if token.type == tokenize.COMMENT]
    assert not [node for node in ast.walk(ast.parse(stripped)) if isinstance(node, ast.FunctionDef | ast.ClassDef)
                and ast.get_docstring(node) not in (None, "not a docstring")]  # fmt: skip


def test_lines_that_stay_are_those_of_the_author() -> None:
    """No statement is rewritten: what a traceback shows is what stands in the readable file."""
    written = iter(SOURCE.splitlines())
    kept = [line for line in strip(SOURCE).splitlines() if line != "    pass"]
    assert all(any(line.startswith(text) for line in written) for text in kept)  # each a prefix of one, in order
    assert cut_docstrings(SOURCE).count("\n") == SOURCE.count("\n")


def test_docstrings_that_a_script_reads_stay() -> None:
    source = '"""Usage: x"""  # a\nprint(__doc__)\n'
    assert same_code(ast.parse(strip(source)), ast.parse(source))


def test_the_packed_script_is_small_and_ascii() -> None:
    """A third of the readable file at most; one long line; every byte survives any editor and checkout."""
    packed = pack(SOURCE)
    assert len(packed.encode()) < 0.33 * len(SOURCE.encode())
    assert packed.isascii() and "\r" not in packed and packed.count("\n") == STUB_LINES
    assert sorted(map(len, packed.splitlines()))[-2] < 120


# A program that asks for its own source in every way we know

PROGRAM = '''"""Doc."""
import inspect
import pickle
import sys
from dataclasses import dataclass
from typing import NamedTuple


def jit(function):
    """As @triton.jit: the source, then what follows `def`."""
    lines, first = inspect.getsourcelines(function)
    text = "".join(lines)
    assert "def " in text and first > 1
    function.text = text[text.index("def ") :]
    return function


@jit
def kernel(x, BLOCK: int):
    # a comment
    return x * BLOCK


@dataclass(frozen=True)
class Point:
    """Fields in order."""

    x: int
    y: "list[int]"


class Row(NamedTuple):
    """Doc."""

    a: int
    b: str


def fail(x):
    """Doc."""
    return 1 / x  # the line to show


if __name__ == "__main__":
    assert kernel.text == "def kernel(x, BLOCK: int):\\n    return x * BLOCK\\n", kernel.text
    assert inspect.getsource(Point).endswith("    y: \\"list[int]\\"\\n"), inspect.getsource(Point)
    assert "class Row" in inspect.getsource(sys.modules["__main__"])
    assert pickle.loads(pickle.dumps(Point(1, [2]))) == Point(1, [2]) and Row._fields == ("a", "b")
    print(__file__, Point.__module__, inspect.getsourcelines(fail)[1])
    fail(0)
'''


def test_tracebacks_and_inspect_see_the_source(tmp_path: Path) -> None:
    """Run by path: functions, classes and a traceback show their lines, under the packed file's own name."""
    script = tmp_path / "program.py"
    script.write_text(pack(PROGRAM))
    done = start(script, tmp_path, {})
    source_line = unpack(script.read_text()).splitlines().index("    return 1 / x") + 1
    assert done.stdout.split() == [str(script), "__main__", str(source_line - 1)], done.stderr
    assert f'File "{script}", line {source_line}, in fail\n    return 1 / x\n' in done.stderr
    assert re.search(r"\nZeroDivisionError: [^\n]*\n$", done.stderr)
    assert "__packed__" not in done.stderr and len(done.stderr) < 1000  # never the payload


def test_a_packed_script_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module: its name, its file, its sources; and nothing is changed in the importing process."""
    path = tmp_path / "packed_program.py"
    path.write_text(pack(PROGRAM))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    hook = sys.excepthook
    module = import_from(path, "packed_program")
    assert sys.excepthook is hook
    assert module.__name__ == module.Point.__module__ == "packed_program"
    assert module.__file__ == str(path)
    assert inspect.getsource(module.fail) == "def fail(x):\n    return 1 / x\n"
    assert inspect.getsource(module.Row).startswith("class Row(NamedTuple):\n")


TORCH_PROGRAM = '''
import torch
from torch import Tensor


@torch.library.custom_op("packed_test::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    """Doc."""
    return 2 * x


@double.register_fake
def _(x: Tensor) -> Tensor:
    """Doc."""
    return torch.empty_like(x)


@torch.compile(backend="eager", fullgraph=True)
def compiled(x: Tensor) -> Tensor:
    return double(x) + 1  # one graph


def broken(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


if __name__ == "__main__":
    assert compiled(torch.ones(3)).tolist() == [3.0] * 3
    torch.compile(broken, backend="eager", fullgraph=True)(torch.ones(3))
'''


def test_operators_and_compilation_work_packed(tmp_path: Path) -> None:
    """custom_op reads its annotations, torch.compile traces, and its complaint quotes the line."""
    script = tmp_path / "program.py"
    script.write_text(pack(TORCH_PROGRAM))
    done = start(script, tmp_path, {})
    assert done.returncode == 1 and "AssertionError" not in done.stderr
    assert re.search(r'program\.py", line \d+, in broken\n +torch\._dynamo\.graph_break\(\)', done.stderr), done.stderr


TRITON_PROGRAM = """
import triton
import triton.language as tl


@triton.jit
def kernel(x, BLOCK: tl.constexpr):
    # a comment
    tl.store(x + tl.arange(0, BLOCK), 1)


print(kernel.src)
"""


def test_triton_accepts_the_packed_script(tmp_path: Path) -> None:
    """The real decorator, which refuses the usual wrapper (exec of a string)."""
    pytest.importorskip("triton", reason="Triton is for Linux")
    script, plain = tmp_path / "program.py", tmp_path / "plain.py"
    script.write_text(pack(TRITON_PROGRAM))
    plain.write_text(f"exec({TRITON_PROGRAM!r})\n")
    done, refused = start(script, tmp_path, {}), start(plain, tmp_path, {})
    source = "def kernel(x, BLOCK: tl.constexpr):\n    tl.store(x + tl.arange(0, BLOCK), 1)\n"
    assert done.stdout == source + "\n", done.stderr
    assert refused.returncode == 1 and "defined in a Python file" in refused.stderr


# train_gpt.py itself


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train_gpt.py packed by the command."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    assert main(["pack", t.__file__, "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]) -> Path:
    """Folder of a finished tiny run of the packed script."""
    folder = tmp_path_factory.mktemp("trained")
    done = start(packed, folder, tiny_env(**corpus, RUN_ID="p"))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_packed_run_is_the_run(trained: Path, tmp_path: Path, corpus: dict[str, str]) -> None:
    """Same losses and scores, digit for digit, as of the readable file."""
    done = start(Path(t.__file__), tmp_path, tiny_env(**corpus, RUN_ID="r"))
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / "logs/r.txt").read_text(), (trained / "logs/p.txt").read_text()]
    for pattern in (FINAL, r"(?m)^step:\d+/\d+ train_loss:\S+", r"(?m)^model_params:\d+"):
        plain, packed = (re.findall(pattern, log) for log in logs)
        assert plain and plain == packed


def test_the_bytes_that_count_are_those_of_the_packed_file(trained: Path, packed: Path) -> None:
    """Code size, source line and the copy beside the log are the packed file's."""
    log, data = (trained / "logs/p.txt").read_text(), packed.read_bytes()
    assert f"\nCode size: {len(data)} bytes\n" in log
    assert f"source: sha256:{hashlib.sha256(data).hexdigest()} bytes:{len(data)} " in log
    assert (trained / "logs/p.py").read_bytes() == data


def test_torchrun_starts_it(trained: Path, packed: Path, tmp_path: Path, corpus: dict[str, str]) -> None:
    """One rank under torchrun reproduces the score from the artifact."""
    artifact = trained / "logs/p.pgolf"
    env = tiny_env(**corpus, RUN_ID="e", EVAL_ONLY=1, ARTIFACT_PATH=artifact)
    done = start(packed, tmp_path, env, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    assert done.returncode == 0, done.stderr
    scores = re.findall(FINAL, (trained / "logs/p.txt").read_text())
    assert re.findall(FINAL, done.stdout) == scores and len(scores) == 3


def test_the_imported_script_has_all_of_its_parts(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same public names in the same order, same --help, and user errors that name the variable."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = import_from(packed, "packed_train_gpt")
    assert [name for name in vars(module) if not name.startswith("__")] == [
        name for name in vars(t) if not name.startswith("__")
    ]
    assert module.Config.describe_variables() == t.Config.describe_variables()
    assert module.code_bytes() == packed.stat().st_size
    with pytest.raises(module.UserError, match="MATRX_LR"):
        module.Config.from_env({"MATRX_LR": "1"})


# The command


def test_the_command_reports_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw, stripped and packed; the default name is beside the script; --unpack gives the source back."""
    script, copy = tmp_path / "prog.py", tmp_path / "deep" / "copy.py"
    script.write_text(PROGRAM)
    assert main(["pack", str(script)]) == 0
    result = tmp_path / "prog_packed.py"
    sizes = [len(text.encode()) for text in (PROGRAM, strip(PROGRAM))] + [result.stat().st_size]
    report = capsys.readouterr().out.replace(",", "")
    assert all(f"{word} {size}" in report for word, size in zip(("raw", "stripped", "packed"), sizes, strict=True))
    assert main(["pack", str(result), "--unpack", "-o", str(copy)]) == 0
    assert copy.read_text().lstrip("\n") == strip(PROGRAM)
    capsys.readouterr()
    assert main(["pack", str(result), "--unpack"]) == 0
    assert capsys.readouterr().out == copy.read_text()


def test_what_cannot_be_packed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the reason, status 1, and the script stays as it was."""
    script, damaged = tmp_path / "prog.py", tmp_path / "damaged.py"
    script.write_text(PROGRAM)
    damaged.write_text(pack(PROGRAM).replace('b85decode("', 'b85decode("zzzzz'))
    refused = {
        "would replace": [str(script), "-o", str(script)],
        "cannot be read": [str(tmp_path / "none.py")],
        "not packed by": [str(script), "--unpack"],
        "damaged": [str(damaged), "--unpack"],
    }
    for reason, arguments in refused.items():
        assert main(["pack", *arguments]) == 1
        assert reason in capsys.readouterr().err
    assert script.read_text() == PROGRAM
    for text, reason in ((pack(PROGRAM), "already packed"), ("def f(:", "not a Python script"), ("\0", "not a Python")):
        with pytest.raises(ToolError, match=reason):
            pack(text)


def test_copies_of_the_script_in_one_process_have_operators_of_their_own() -> None:
    """torch frees an operator that is defined again, and a call of the freed one ended a test run with a crash."""
    copies = [import_from(Path(t.__file__), f"copy_of_the_script_{number}") for number in range(2)]
    names = [script.resid_mix_norm._qualname for script in (t, *copies)]
    assert len(set(names)) == 3 and all(name.endswith("::resid_mix_norm") for name in names)
