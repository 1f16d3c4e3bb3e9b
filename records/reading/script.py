"""What a training script says of itself, asked in a process of its own: no tool imports torch to read a default."""

from __future__ import annotations

import ast
import base64
import functools
import json
import lzma
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import ToolError

# What differs between runs of one configuration: who ran it, where, with which seed, and what became of older files.
IDENTITY = ("run_id", "seed", "recipe", "data_dir", "data_path", "tokenizer_path", "device", "artifact_path",
            "weights_path", "resume", "overwrite")  # fmt: skip
PATHS = ("data_dir", "data_path", "tokenizer_path")

LOAD = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("probed_script", sys.argv[1])
script = importlib.util.module_from_spec(spec)
sys.modules["probed_script"] = script
spec.loader.exec_module(script)
"""
PROBE = LOAD + """
Config = script.Config
try:
    cfg = Config.from_env(json.loads(sys.stdin.read()))
except script.UserError as error:
    print(json.dumps({"error": str(error)}))
else:
    names = list(Config.variables())
    values = {name.lower(): getattr(cfg, name.lower()) for name in names}
    aliases = sorted(vars(script).get("ALIASES", ()))
    print(json.dumps({"values": values, "sources": dict(cfg.sources), "aliases": aliases,
                      "tokenizer_file": str(cfg.tokenizer_file)}))
"""
DATA_PROBE = LOAD + """
try:
    cfg = script.Config.from_env(json.loads(sys.stdin.read()))
    ranks = script.Ranks(0, 1, script.torch.device("cpu"))
    run = script.Runtime(cfg, ranks, script.Log(cfg, enabled=False), [])
    answer = {"identity": dict(script.load_validation(run).identity)}
except script.UserError as error:
    answer = {"error": str(error)}
print(json.dumps(answer))
"""


@dataclass(frozen=True)
class Resolved:
    """The configuration that a script takes from an environment: values and their sources by field name."""

    values: dict[str, Any]
    sources: dict[str, str]
    aliases: list[str]  # other spellings, which older versions of the script took
    tokenizer_file: str

    @property
    def variables(self) -> set[str]:
        """Every name that the script takes from the environment."""
        return {name.upper() for name in self.values} | set(self.aliases)


def resolve(script: Path, env: Mapping[str, str]) -> Resolved:
    """Ask `script` what it makes of `env`; ToolError with the script's own message if it refuses."""
    try:
        source = script.read_bytes()
    except OSError as error:
        raise ToolError(f"{script}: cannot be read ({error})") from None
    answer = json.loads(probe(script, source, json.dumps(dict(env))))
    if "error" in answer:
        raise ToolError(f"the configuration is refused: {answer['error']}")
    return Resolved(**answer)


def data_identity(script: Path, env: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the tokenizer's file and of the validation set that `script` reads in `env`, which it checks first."""
    answer = json.loads(ask(DATA_PROBE, script, json.dumps(dict(env))))
    if "error" in answer:
        raise ToolError(f"the data is refused: {answer['error']}")
    return answer["identity"]


@functools.lru_cache(maxsize=32)
def probe(script: Path, source: bytes, env: str) -> str:
    """What PROBE prints of a script with this `source`, as JSON; kept: a process that imports torch takes seconds."""
    return ask(PROBE, script, env)


def ask(program: str, script: Path, env: str) -> str:
    """The last line that a program prints of a script, in a process of its own; ToolError where that fails."""
    done = subprocess.run([sys.executable, "-c", program, str(script)], input=env, text=True, capture_output=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        raise ToolError(f"{script}: cannot be imported as a training script with a Config ({last})")
    return done.stdout.splitlines()[-1]


def hyperparameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values less the run's identity, as JSON has them (tuples are lists)."""
    return {name: json.loads(json.dumps(value)) for name, value in values.items() if name not in IDENTITY}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Hyperparameters that differ: NAME -> (ours, theirs); None where a side has no such name."""
    a, b = hyperparameters(ours), hyperparameters(theirs)
    return {name.upper(): (a.get(name), b.get(name)) for name in sorted({*a, *b}) if a.get(name) != b.get(name)}


def named(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences for a message: NAME=ours (there: theirs), ..."""
    return ", ".join(f"{name}={ours!r} (there: {theirs!r})" for name, (ours, theirs) in changes.items())


def as_variable(value: Any) -> str:
    """A value as the environment would spell it."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


# ---------------------------------------------------------------------------------------
# Reading scripts without running them
# ---------------------------------------------------------------------------------------

def constants(tree: ast.AST) -> Iterator[str | bytes]:
    """String and bytes constants of a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            yield node.value


def decompressed(blob: bytes) -> Iterator[bytes]:
    """What the usual compressors make of `blob`; nothing where none fits."""
    raw_lzma2 = [{"id": lzma.FILTER_LZMA2}]
    attempts = [lambda: lzma.decompress(blob), lambda: lzma.decompress(blob, lzma.FORMAT_RAW, filters=raw_lzma2),
                lambda: zlib.decompress(blob), lambda: zlib.decompress(blob, 31)]
    try:
        import brotli
        attempts.append(lambda: brotli.decompress(blob))
        errors: tuple[type[BaseException], ...] = (lzma.LZMAError, zlib.error, EOFError, brotli.error)
    except ModuleNotFoundError:
        errors = (lzma.LZMAError, zlib.error, EOFError)
    for attempt in attempts:
        try:
            yield attempt()
        except errors:
            continue


@functools.lru_cache(maxsize=8)
def syntax(text: str) -> ast.Module:
    """The syntax tree of a script, parsed once; not to be changed."""
    return ast.parse(text.removeprefix("\ufeff"))


@functools.lru_cache(maxsize=8)
def unpacked(text: str) -> str | None:
    """The source inside a self-extracting script, or None if it is not one; nothing of it is run."""
    try:
        longest = max(constants(syntax(text)), key=len, default="")
    except (SyntaxError, ValueError):
        return None
    if len(longest) < 0.5 * len(text):
        return None
    payload = longest.encode("latin-1", "ignore") if isinstance(longest, str) else longest
    for decode in (base64.b85decode, base64.b64decode, base64.a85decode, bytes):
        try:
            blob = decode(payload)
        except ValueError:
            continue
        for plain in decompressed(blob):
            if is_source(plain):
                return plain.decode("utf-8")
    return None


def is_source(plain: bytes) -> bool:
    """Whether some bytes are the text of a Python program, perhaps of a newer Python than this one."""
    try:
        text = plain.decode("utf-8")
        return bool(syntax(text).body)
    except SyntaxError:
        return len(re.findall(r"^(?:import |from \S+ import |def |class )", text, re.MULTILINE)) > 1
    except (UnicodeDecodeError, ValueError):
        return False


def names_read(text: str) -> set[str]:
    """Names that a script takes from the environment, read off its syntax tree.

    Strings that are a name in capitals (os.environ.get("SEED")), the fields of a Config that is built by from_env,
    and the words of the table SPELLINGS of older versions. Of a script that this Python cannot parse, all strings that
    are such a name.
    """
    text = unpacked(text) or text
    try:
        tree = syntax(text)
    except SyntaxError:
        return set(re.findall(r"""["']([A-Z][A-Z0-9_]+)["']""", text))
    names = {value for value in constants(tree) if isinstance(value, str) and re.fullmatch(r"[A-Z][A-Z0-9_]+", value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(getattr(part, "name", "") == "from_env" for part in node.body):
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            names |= {field.id.upper() for field in fields if isinstance(field, ast.Name)}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SPELLINGS":
            names |= set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", ast.unparse(node.value)))
    return names
