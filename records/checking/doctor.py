"""`python -m records doctor [-- KEY=value ...]`: what would spoil a paid run, found before it is paid for.

Imports train_gpt.py itself and uses its own functions, so that what is tested here is what will run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from records import REPOSITORY, ToolError
from records.checking.overlap import overlap
from records.checking.result import CheckResult, report
from records.reading.rules import OFFICIAL_DOCUMENTS, data_set, is_leaky
from records.reading.runs import config_hash

if TYPE_CHECKING:
    import torch

    import train_gpt

RATES = Path(__file__).with_name("step_rates.json")  # GPU name and configuration hash -> milliseconds per step
SLOWER = 1.05  # pods differ by up to 8%; from here on it is worth another one


def number(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def versions() -> Iterator[CheckResult]:
    """Python, and every package of requirements.txt against its bound."""
    python = sys.version.split()[0]
    fine = sys.version_info >= (3, 10)
    yield CheckResult("python", "pass" if fine else "fail", python + ("" if fine else ": 3.10 or newer is needed"))
    for line in (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines():
        wanted = re.match(r"([A-Za-z0-9_-]+)(==|>=)([\d.]+)", line)
        if not wanted:
            continue
        name, relation, bound = wanted.groups()
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield CheckResult(f"package {name}", "fail", "not installed: python -m pip install -r requirements.txt")
            continue
        holds = number(have) == number(bound) if relation == "==" else number(have) >= number(bound)
        remedy = "" if holds else f", not {relation}{bound}: python -m pip install -r requirements.txt"
        yield CheckResult(f"package {name}", "pass" if holds else "fail", have + remedy)


def configuration(t: Any, env: Mapping[str, str]) -> tuple[Any, CheckResult]:
    """(Config or None, result): what the script makes of the environment."""
    try:
        cfg = t.load_architecture(t.Config.from_env(env))
    except t.UserError as error:
        return None, CheckResult("configuration", "fail", str(error))
    changed = {name.upper(): vars(cfg)[name] for name, source in cfg.sources.items() if source != "default"}
    text = " ".join(f"{name}={value}" for name, value in changed.items())
    values = {name.lower(): vars(cfg)[name.lower()] for name in t.Config.variables()}
    return cfg, CheckResult("configuration", "pass", f"hash {config_hash(values)[:12]}; changed: {text or 'nothing'}")


def machine(cfg: train_gpt.Config) -> Iterator[CheckResult]:
    """GPUs and disk space."""
    import torch

    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if names:
        text = ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in names)
        yield CheckResult("GPUs", "pass", f"{len(names)}: {text}; CUDA {torch.version.cuda}")
    else:
        yield CheckResult("GPUs", "skip", "none visible: only small configurations train on a CPU")
    free, wanted = shutil.disk_usage(Path.cwd()).free, 2 * 10**9
    status = "pass" if free > wanted else "fail"
    yield CheckResult("disk", status, f"{free / 1e9:.1f} GB free here; weights, artifact and compile caches take about "
                      "2 GB")
    if cfg.compile and shutil.which("gcc") is None and shutil.which("cc") is None:
        yield CheckResult("compiler", "fail", "no C compiler, which torch.compile needs: apt-get install gcc")


@contextlib.contextmanager
def runtime(t: Any, cfg: train_gpt.Config) -> Iterator[train_gpt.Runtime]:
    """A runtime whose logs go to a folder that is removed; paths of the data stay valid."""
    home = Path.cwd()
    paths = {"data_path": str(cfg.shard_folder.resolve()), "tokenizer_path": str(cfg.tokenizer_file.resolve()),
             "weights_path": "", "artifact_path": str(cfg.artifact_file.resolve()) if cfg.eval_only else ""}
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(place)
        try:
            with t.Runtime.start(t.replace(cfg, **paths), {}) as run:
                yield run
        finally:
            os.chdir(home)


def logged(run: train_gpt.Runtime, pattern: str) -> str:
    """What the run's log says where a pattern with one group last matches."""
    log = Path("logs", f"{run.cfg.log_name}.txt").read_text(encoding="utf-8")
    return re.findall(pattern, log, re.MULTILINE)[-1]


def chosen(run: train_gpt.Runtime, variable: str) -> str:
    """The back end that was last chosen for a variable, and why."""
    return logged(run, rf"^{variable.lower()}:(.*)$")


def back_ends(t: Any, run: train_gpt.Runtime) -> Iterator[CheckResult]:
    """Which attention and which layer kernels the run would take, and why no better one."""
    chains = {"attention": (t.attention_back_ends(run.cfg), run.cfg.attn_backend),
              "layer": (t.LAYER_BACK_ENDS, run.cfg.layer_backend)}  # fmt: skip
    for name, (ends, asked) in chains.items():
        try:
            t.choose_back_end(run, ends, asked)
        except t.UserError as error:
            yield CheckResult(name, "fail", str(error))
            continue
        what = chosen(run, ends.variable)
        is_slow = name == "attention" and run.ranks.device.type == "cuda" and not what.startswith(("fa3 ", "fa4 "))
        remedy = "; on a Hopper GPU FlashAttention 4 is faster: python -m pip install -r requirements-gpu.txt"
        yield CheckResult(name, "pass", what + (remedy if is_slow else ""))


def data(t: Any, run: train_gpt.Runtime) -> Iterator[CheckResult]:
    """Shards, documents, bytes and tokenizer, as the run would read and refuse them."""
    cfg = run.cfg
    try:
        validation = t.load_validation(run)
        train = None if cfg.eval_only else t.TokenStream(cfg, "train")
        if train:
            t.check_tokenizer(cfg, train, validation.identity["tokenizer_sha256"])
    except t.UserError as error:
        yield CheckResult("data", "fail", str(error))
        return
    tokens = validation.tokens.cpu().numpy()
    official, documents = data_set(len(tokens)), int((tokens == validation.bos_id).sum())
    kind = official.name if official else "not the official FineWeb split: scores are not comparable with the board"
    if official and documents != OFFICIAL_DOCUMENTS:
        yield CheckResult("validation", "fail", f"{documents} documents in {kind}, not {OFFICIAL_DOCUMENTS}")
    else:
        yield CheckResult("validation", "pass" if official else "skip", f"{len(tokens)} tokens, {documents} documents; "
                          f"{kind}")
    digests = " ".join(f"{key}:{value[:16]}" for key, value in validation.identity.items())
    yield CheckResult("tokenizer", "pass", f"{logged(run, r'^val_tokens: .*; (.*)[)]$')}; {digests}")
    if train is None:
        yield artifact(t, cfg, validation)
        return
    leaky = is_leaky(len(train.shards), train.total, cfg.shard_folder.name)
    remedy = ": shards of 10M tokens are the mark of data whose train split holds validation; fetch the official ones"
    yield CheckResult("train shards", "fail" if leaky else "pass", f"{len(train.shards)}, {train.total} "
                      f"tokens{remedy if leaky else ''}")
    yield overlap(train, tokens, validation.bos_id)


def artifact(t: Any, cfg: train_gpt.Config, validation: train_gpt.ValidationSet) -> CheckResult:
    """Whether the artifact that EVAL_ONLY=1 scores belongs to this tokenizer and validation set."""
    path = cfg.artifact_file
    try:
        header = t.read_header(path.read_bytes(), path)[0]
        where = f"ARTIFACT_PATH={path} belongs to other data"
        t.refuse_other(header["identity"], validation.identity, where, "set its own")
    except (t.UserError, OSError) as error:
        return CheckResult("artifact", "fail", str(error))
    return CheckResult("artifact", "pass", f"{path} was made with this tokenizer and validation set")


def outputs(t: Any, cfg: train_gpt.Config) -> CheckResult:
    """What the run would write over; it refuses to."""
    try:
        taken = [f"{name}={path}" for name, path in cfg.outputs.items() if t.Claim.is_taken(name, path)]
    except (t.UserError, OSError) as error:
        return CheckResult("outputs", "fail", str(error))
    if taken and not (cfg.overwrite or cfg.resume):
        return CheckResult("outputs", "fail", f"{' '.join(taken)}: an earlier run left its files there; set another "
                           "one, OVERWRITE=1 or RESUME=1")  # fmt: skip
    return CheckResult("outputs", "pass", f"nothing stands at {', '.join(map(str, cfg.outputs.values()))} that the run "
                       "may not replace")


def size(t: Any, run: train_gpt.Runtime, model: train_gpt.GPT) -> CheckResult:
    """Artifact size from parameters and bits: an upper figure, since untrained weights do not compress like trained."""
    cfg, bits = run.cfg, 0
    for name, tensor in model.named_parameters():
        width = cfg.matrix_bits if name.startswith("banks.") else cfg.embed_bits if tensor.dim() > 1 else 16
        bits += width * tensor.numel()
    total = bits // 8 + t.code_bytes()
    text = f"about {total} bytes at full bit width with {t.code_bytes()} of code; entropy coding takes off 10 to 40%"
    if cfg.auto_clip:
        return CheckResult("artifact size", "pass", f"{text}; the clip is chosen to fit {cfg.target_bytes}")
    status = "pass" if 0.7 * total < cfg.target_bytes else "fail"
    return CheckResult("artifact size", status, text + ("" if status == "pass" else "; lower MATRIX_BITS or MODEL_DIM"))


class Measured(NamedTuple):
    """What a run will take: milliseconds per step of each of its phases in turn, the part of the run that each has, and
    seconds of the clock kept for calibration and GPTQ."""

    rates: list[float]
    shares: list[float]
    reserve: float

    @property
    def rate(self) -> float:
        """Milliseconds per step of the whole run: phases have parts of its time, not of its steps."""
        return sum(self.shares) / sum(share / rate for share, rate in zip(self.shares, self.rates, strict=True))


def measure(t: Any, run: train_gpt.Runtime, model: train_gpt.GPT, steps: int) -> Measured:
    """Steps of each phase after three untimed ones, recorded as in a run; then what that would reserve."""
    trainer, rates = t.Trainer(run, model), []
    turns = Counter(t.phase_at(run.cfg, (i + 0.5) / 1000)[0] for i in range(1000))
    for name in turns:
        plan = t.StepPlan(1.0, t.muon_momentum_at(run.cfg, 0), name)
        for step in range(3):
            trainer.step(step, plan)
            if not step:
                trainer.record(t.phases(run.cfg)[name])
        t.synchronize(run.ranks.device)
        start = time.perf_counter()
        for step in range(3, 3 + steps):
            trainer.step(step, plan)
        t.synchronize(run.ranks.device)
        rates.append(1000 * (time.perf_counter() - start) / steps)
    return Measured(rates, [count / 1000 for count in turns.values()], t.measure_reserve(run, trainer))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def rate_key(cfg: train_gpt.Config, device: str, attention: str) -> str:
    """What a step rate depends on: GPU, attention back end, model, tokens of one rank's step, and compilation.

    Features that are off are left out, so that a reference outlives the next feature.
    """
    what = {name: value for name, value in {**cfg.architecture(), "compile": cfg.compile}.items() if value}
    return f"{device}, {attention}, {cfg.train_batch_tokens} tokens a step, model {config_hash(what)[:12]}"


def ranks_of(args: argparse.Namespace) -> int:
    """GPUs of the planned run."""
    import torch

    return args.ranks or torch.cuda.device_count() or 1


def forecast(run: train_gpt.Runtime, found: Measured, args: argparse.Namespace, key: str) -> Iterator[CheckResult]:
    """Steps that the budget allows at the measured rates, and the last phase's rate against the stored reference."""
    cfg, rate = run.cfg, found.rates[-1]
    limit, kept = cfg.max_wallclock_seconds, found.reserve + cfg.post_qat_seconds
    steps = min(cfg.iterations, int(1000 * max(limit - kept, 0) / found.rate)) if limit else cfg.iterations
    budget = f"in {limit:g} s, {kept:.1f} of them for calibration, GPTQ and QAT" if limit else "and no limit of time"
    remedy = "" if steps else ": nothing is left to train in; raise MAX_WALLCLOCK_SECONDS"
    each = ", then ".join(f"{ms:.1f}" for ms in found.rates)
    yield CheckResult("forecast", "pass" if steps else "fail", f"{each} ms per step of {cfg.train_batch_tokens} "
                      f"tokens (one of {ranks_of(args)} ranks, no communication): {steps} steps {budget}; compilation "
                      f"is not timed{remedy}")
    rates = json.loads(RATES.read_text(encoding="utf-8")) if RATES.is_file() else {}
    reference = rates.get(key)
    if reference is None:
        yield CheckResult("step rate", "skip", f"no reference for {key}; --save-rate stores this one")
    else:
        slow = rate > SLOWER * reference
        yield CheckResult("step rate", "fail" if slow else "pass", f"{rate:.1f} ms, the reference is {reference:.1f} ms"
                          + (": a slow machine; take another one" if slow else ""))
    if args.save_rate:
        RATES.write_text(json.dumps({**rates, key: round(rate, 2)}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def measured(t: Any, run: train_gpt.Runtime, args: argparse.Namespace) -> Iterator[CheckResult]:
    """What needs the model: artifact size, and the step rate where steps were asked for."""
    steps = args.steps if args.steps is not None else 10 if run.ranks.device.type == "cuda" else 0
    bos_id = 1
    with contextlib.suppress(t.UserError):
        bos_id = t.ByteTable(run.cfg.tokenizer_file, run.cfg.vocab_size).bos_id
    ranks, cfg = ranks_of(args), run.cfg
    share = {"train_batch_tokens": cfg.train_batch_tokens // ranks,
             "gptq_calibration_batches": -(-cfg.gptq_calibration_batches // ranks)}  # fmt: skip
    run = t.replace(run, cfg=t.replace(cfg, **share))
    try:
        model = t.build_model(run, run.cfg, bos_id)
        yield size(t, run, model)
        found = measure(t, run, model, steps) if steps else None
    except (t.UserError, RuntimeError) as error:  # RuntimeError: out of memory, a compiler that fails
        yield CheckResult("step rate", "fail", f"the model does not run: {str(error).strip()[:300]}")
        return
    if found is None:
        yield CheckResult("step rate", "skip", "not measured on this device; --steps N measures it")
        return
    attention = chosen(run, t.attention_back_ends(run.cfg).variable).split()[0]
    yield from forecast(run, found, args, rate_key(run.cfg, device_name(run.ranks.device), attention))


def examine(args: argparse.Namespace) -> Iterator[CheckResult]:
    """All checks, in the order in which a failure makes the next ones moot."""
    yield from versions()
    sys.path.insert(0, str(REPOSITORY))
    try:
        import train_gpt as t
    except ImportError as error:
        yield CheckResult("train_gpt.py", "fail", f"cannot be imported: {error}")
        return
    cfg, result = configuration(t, {**os.environ, **given(args.settings)})
    yield result
    if cfg is None:
        return
    yield from machine(cfg)
    yield outputs(t, cfg)
    with runtime(t, cfg) as run:
        yield from back_ends(t, run)
        yield from data(t, run)
        yield from measured(t, run, args)


def given(settings: list[str]) -> dict[str, str]:
    """KEY=value words as a mapping."""
    odd = [word for word in settings if "=" not in word]
    if odd:
        raise ToolError(f"{' '.join(odd)}: expected KEY=value pairs after --, as `-- RECIPE=records/recipes/demo.env`")
    return dict(word.split("=", 1) for word in settings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `doctor` takes."""
    parser.add_argument("--steps", type=int, help="training steps to time (default: 10 on a GPU, none elsewhere)")
    parser.add_argument("--ranks", type=int, help="GPUs of the planned run, of which one is timed on its share "
                        "(default: those visible)")
    parser.add_argument("--save-rate", action="store_true", help="store the measured step rate as this GPU's reference")
    parser.add_argument("settings", nargs="*", metavar="-- KEY=value", help="variables on top of the environment")


def run(args: argparse.Namespace) -> int:
    """Print one line per check; 1 if any failed."""
    out = sys.stdout  # kept: while the script's runtime is open, stdout is where its log lines are sent away
    counts = dict.fromkeys(("pass", "fail", "skip"), 0)
    for result in examine(args):
        report(result, out)
        counts[result.status] += 1
    failed = counts["fail"]
    print(f"{counts['pass']} passed, {failed} failed, {counts['skip']} not checkable")
    return int(failed > 0)
