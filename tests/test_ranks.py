"""Several processes under torchrun: what happens when one of them fails, and two nodes.

Each fault is injected by a script of a few lines that changes train_gpt in one rank and then runs its main().
"""

import errno
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_config, tiny_env, tiny_model

import train_gpt as t

SCRIPT = Path(t.__file__)
LIMIT = 60  # seconds within which a fault must have ended the run; as the timeout it is part of every test here
FAST = {"NUM_LAYERS": 2, "XSA_LAST_N": 2, "VE_LAYERS": "1", "WARMUP_STEPS": 0, "GPTQ_ENABLED": 0, "EVAL_STRIDE": 0,
        "CHECKPOINT_EVERY": 5, "RUN_ID": "r"}  # fmt: skip

INJECT = f"""
import hashlib, os, runpy, signal, sys, time, errno
sys.path.insert(0, {str(SCRIPT.parent)!r})
import pathlib, torch
import train_gpt as t
rank = int(os.environ["RANK"])
plain_step, write_bytes = t.Trainer.step, pathlib.Path.write_bytes

def before_step(number, action):
    "Call `action` before optimizer step `number` of the loop."
    def step(trainer, now, *plan):
        if now == number:
            action(trainer)
        return plain_step(trainer, now, *plan)
    t.Trainer.step = step

def fail(kind, *text):
    def action(_):
        raise kind(*text)
    return action

def spoil(trainer):
    trainer.model.rest["resid_mix"].data.fill_(float("nan"))

def die(_):
    os.kill(os.getpid(), signal.SIGKILL)

def wait_in_c(_):
    "Waits where no handler of a signal runs, as for a GPU that waits for a lost peer."
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def full(path, blob):
    "A disk that takes half of an artifact."
    if ".pgolf" in path.name:
        write_bytes(path, blob[: len(blob) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return write_bytes(path, blob)

{{fault}}

try:
    t.main()
except t.UserError as problem:
    sys.exit(f"error: {{{{problem}}}}")
"""

FAULTS = {
    "killed": "if rank == 1: before_step(7, die)",
    "stuck": "t.STUCK_SECONDS = 3; before_step(7, wait_in_c if rank == 0 else die)",
    "bad input": 'if rank == 1: before_step(7, fail(t.UserError, "shard 3 is bad"))',
    "nan": "if rank == 1: before_step(7, spoil)",
    "disk full": "pathlib.Path.write_bytes = full",
    "terminated": 'if rank == 1: before_step(7, lambda _: os.kill(os.getpid(), signal.SIGTERM))',
    "launcher terminated": 'if rank == 1: before_step(7, lambda _: os.kill(os.getppid(), signal.SIGTERM))',
}  # fmt: skip


class Ended(NamedTuple):
    """How a launcher ended."""

    folder: Path
    status: int
    stdout: str
    stderr: str
    seconds: float  # since the last line of the log

    def messages(self) -> list[str]:
        """What our processes, and not the launcher, said on stderr about the end."""
        return re.findall(r"(?m)^error: .*$|^Traceback .*\n  File \"(?!<frozen).*$", self.stderr)


def environment(corpus: dict[str, str], **changes: object) -> dict[str, str]:
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_", "NCCL_", "NVSHMEM_", "TORCH_")  # a machine may forbid NVLS by them
    outside = {key: value for key, value in os.environ.items() if key.startswith(kept)}
    return {**outside, "OMP_NUM_THREADS": "1", **tiny_env(**corpus, **{**FAST, **changes})}


def launch(folder: Path, env: dict[str, str], script: Path, *options: str) -> subprocess.Popen[str]:
    """torchrun in `folder`, in a process group of its own so that a test can end all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", *(options or ("--standalone", "--nproc_per_node=2"))]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, str(script)], cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True,
                            start_new_session=True)  # fmt: skip


def finish(process: subprocess.Popen[str], folder: Path) -> Ended:
    """Wait for the end; whatever is left after LIMIT is killed and the test fails."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    seconds = time.time() - (folder / "logs/r.txt").stat().st_mtime if (folder / "logs/r.txt").exists() else 0.0
    return Ended(folder, process.returncode, stdout, stderr, seconds)


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def faults(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: dict[str, str]
) -> dict[str, Ended]:
    """Every fault's run, two at a time, under gloo or NCCL."""
    folders = {name: tmp_path_factory.mktemp("fault") for name in FAULTS}

    def attempt(name: str) -> Ended:
        script = folders[name] / "faulty.py"
        script.write_text(INJECT.format(fault=FAULTS[name]))
        endless = {"ITERATIONS": 1_000_000} if name == "launcher terminated" else {}
        env = environment(corpus, DEVICE=request.param, **endless)
        return finish(launch(folders[name], env, script), folders[name])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAULTS, pool.map(attempt, FAULTS), strict=True))


EXPECTED = {  # fault -> beginning of the message, steps behind the saved weights
    "killed": ("error: another rank has ended or does not answer", 5),
    "stuck": ("error: another rank has ended or does not answer: no step ended within 3 s of SIGTERM", 5),
    "bad input": ("error: shard 3 is bad", 5),
    "nan": ("error: step 8: the training loss is nan; lower MATRIX_LR=0.025 or change SEED; logs/r.weights.pt has", 5),
    "disk full": ("error: ARTIFACT_PATH=logs/r.pgolf: No space left on device", 12),
    "terminated": ("error: SIGTERM: stopped after step 8", 8),
    "launcher terminated": ("error: SIGTERM: stopped after step ", None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_run_with_one_message(faults: dict[str, Ended], name: str) -> None:
    """Exit status not 0, in time, one message on the console and in the log, and the log flushed up to the last step."""
    ended, beginning = faults[name], EXPECTED[name][0]
    print(f"{ended.seconds:.1f} s after the last line of the log", ended.stdout[-600:], ended.stderr[-3000:])
    assert ended.status != 0 and ended.seconds < LIMIT
    assert len(ended.messages()) == 1 and ended.messages()[0].startswith(beginning)
    log = (ended.folder / "logs/r.txt").read_text()
    assert re.findall(r"(?m)^step:(\d+)/\d+ train_loss", log)[6] == "7"
    if name != "bad input":  # rank 1's own
        assert log.splitlines()[-1].startswith(beginning)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_the_last_good_weights(faults: dict[str, Ended], name: str) -> None:
    """Raw and averaged, finite, of the last checkpoint or of the step that SIGTERM ended; nothing is half-written."""
    ended, steps = faults[name], EXPECTED[name][1]
    saved = torch.load(ended.folder / "logs/r.weights.pt", weights_only=True)
    assert saved["steps"] == steps or steps is None and f"after step {saved['steps']}" in ended.messages()[0]
    assert all(tensor.isfinite().all() for kind in ("raw", "average") for tensor in saved[kind].values())
    assert not [*ended.folder.rglob("*.partial"), *ended.folder.rglob("*.pgolf")]


def test_a_bug_keeps_its_traceback() -> None:
    """What is no fault of the outside is not cut to one line."""
    try:
        {}["a bug"]
    except KeyError as problem:
        text = t.describe(problem)
    assert text.startswith("Traceback") and text.endswith("KeyError: 'a bug'") and "test_ranks.py" in text


def training_of(run: t.Runtime) -> t.Training:
    """Before the first step."""
    return t.Training(run, t.Trainer(run, t.build_model(run, run.cfg, 1)), t.load_validation(run), math.inf)


def test_weights_that_cannot_be_saved_are_a_warning(
    run: t.Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run may still end well; the file is the older one, and no half of a new one takes room on the disk."""
    training, path, write_bytes = training_of(run), run.cfg.weights_file, Path.write_bytes
    training.step = 1
    assert training.save("running")

    def full(path: Path, blob: bytes) -> int:
        write_bytes(path, blob[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    training.step = 2
    assert not training.save("running")
    assert re.search(r"(?m)^WARNING: weights of step 2 not saved: WEIGHTS_PATH=\S+: No space left on device, \d+ bytes",
                     capsys.readouterr().out)  # fmt: skip
    assert torch.load(path, weights_only=True)["steps"] == 1 and not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize("last", [0, 500])
def test_spoilt_weights_never_replace_good_ones(run: t.Runtime, last: int) -> None:
    """The error names the parameter, and the step of the weights that are kept where there are any."""
    training, step = training_of(run), last + 7
    training.step = last
    training.save("running")
    training.step, training.model.rest["q_gain"].data[0, 0] = step, math.inf
    with pytest.raises(t.UserError, match=f"step {step}: not finite any more: rest.q_gain") as caught:
        training.save("running")
    assert ("has the weights of step 500" in str(caught.value)) == bool(last)
    assert torch.load(run.cfg.weights_file, weights_only=True)["steps"] == last


def test_a_rank_without_windows_runs_no_model(run: t.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk may have fewer windows than there are ranks; an empty batch would be a graph of its own."""
    model, validation = tiny_model(), t.load_validation(run)
    monkeypatch.setattr(model, "fast_nll", lambda *_: pytest.fail("the model ran"))
    windows = t.plan_windows(validation.targets, run.cfg.eval_len, 16)[:0]
    assert t.score_windows(run, model, validation, windows).tolist() == [0, 0, 0]


# Two nodes


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_nodes_end_with_the_score_of_one_process(tmp_path: Path, corpus: dict[str, str]) -> None:
    """Two launchers on loopback, in folders of their own: the first node writes everything, the second one nothing."""
    env = environment(corpus, GPTQ_ENABLED=1, EVAL_STRIDE=16, RUN_ID="r")
    master, nodes = ("--master_addr=127.0.0.1", f"--master_port={free_port()}"), []
    for node in range(2):
        place = ("--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", *master)
        nodes.append(launch(tmp_path / f"node{node}", env, SCRIPT, *place))
    ends = [finish(process, tmp_path / f"node{node}") for node, process in enumerate(nodes)]
    assert [end.status for end in ends] == [0, 0], ends[0].stderr + ends[1].stderr
    command, folder = [sys.executable, str(SCRIPT)], tmp_path / "alone"
    folder.mkdir()
    alone = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT, check=True)
    pattern = r"(?m)^final_int6_sliding_window_exact .*val_bpb:(\S+)"
    (two,), (one,) = (re.findall(pattern, text) for text in (ends[0].stdout, alone.stdout))
    assert float(two) == pytest.approx(float(one), abs=1e-3) and "world_size:2" in ends[0].stdout
    assert (tmp_path / "node0/logs/r.pgolf").exists()
    assert list((tmp_path / "node1").iterdir()) == [] and ends[1].stdout == ""


def gloo_threads() -> int:
    """Threads of this process that run gloo's collectives."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name == "pt_gloo_runloop" for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have names under Linux")
def test_no_thread_of_gloo_outlives_the_group(tmp_path: Path) -> None:
    """One that lets go of a tensor while the interpreter ends aborts the process, after everything was done."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    ranks = t.Ranks(0, 2, torch.device("cpu"), dist.new_group(backend="gloo"), {})
    assert ranks.all_reduce_max(1.0, 2.0) == [1.0, 2.0] and gloo_threads() >= 2
    ranks.close(None)
    assert not gloo_threads() and not dist.is_initialized()


def test_ranks_wait_five_minutes_for_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both groups: torch gives a second one 30 minutes of its own."""
    waits = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: waits.append(timeout))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: waits.append(timeout))
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    t.Ranks.start(tiny_config(), launch)
    assert waits == [timedelta(minutes=5)] * 2
