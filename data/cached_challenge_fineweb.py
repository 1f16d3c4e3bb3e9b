#!/usr/bin/env python3
"""Download tokenized FineWeb shards and the matching tokenizer from the Hugging Face hub.

Usage:
    python3 data/cached_challenge_fineweb.py --variant sp1024 --train-shards 80
    python3 data/cached_challenge_fineweb.py --variant sp8192                      # from its community repo
    python3 data/cached_challenge_fineweb.py --variant sp8192_lossless_caps_caseops_v1_reserved 10

Every shard is checked (magic, version, size) before it gets its final name, valid local shards are kept, and an
interrupted run is continued by the same command. All validation shards are always fetched. Environment:
MATCHED_FINEWEB_REPO_ID, MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, DATA_DIR, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import errno
import filecmp
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import console
import shards
from console import say

try:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars
except ImportError as missing:
    raise SystemExit(f"error: {missing}; run: python3 -m pip install 'huggingface_hub>=0.30'") from missing

Result = TypeVar("Result")

OFFICIAL_REPO = "willdepueoai/parameter-golf"
CASEOPS_REPO = "romeerp/parameter-golf-caseops-v1"
REPO_OF_VARIANT = {
    "sp1024": OFFICIAL_REPO,
    "byte260": OFFICIAL_REPO,
    "sp4096": "kevclark/parameter-golf",
    "sp8192": "kevclark/parameter-golf",
}
DEFAULT_TRAIN_SHARDS = 80
OFFICIAL_VAL_DOCS = 50_000
LEAKY_SHARD_TOKENS = 10_000_000
FULL_SHARD_BYTES = 200_001_024  # of 100,000,000 tokens; for the disk estimate only
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
# The hub client's HTTP library differs between its versions; the bases of its own error name the right one.
HUB_ERRORS = (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__)
DATASET_FILE = re.compile(r"(?:.*/)?([^/]+)/fineweb_(train|val|val_bytes)_\d{6}\.bin")


class DownloadError(Exception):
    """A problem that the user has to solve; the message says how."""


class MissingFileError(DownloadError):
    """The repo exists and does not hold the file."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to fetch: remote paths by split, tokenizer files, and those of them that the repo may lack."""

    dataset: str
    train: list[str]
    val: list[str]
    val_bytes: list[str]
    tokenizers: list[str]
    optional: frozenset[str] = frozenset()
    bos_id: int = shards.BOS_ID


def default_repo(variant: str) -> str:
    """Repo that holds a variant."""
    if "caseops" in variant:
        return CASEOPS_REPO
    return REPO_OF_VARIANT.get(short_name(variant), OFFICIAL_REPO)


def short_name(dataset: str) -> str:
    """fineweb10B_sp1024 -> sp1024."""
    return dataset.partition("_")[2] if dataset.startswith("fineweb") else dataset


def is_transient(error: BaseException) -> bool:
    """True if trying again may help: rate limits, server errors and broken connections."""
    if error.__cause__ is not None and isinstance(error, (LocalEntryNotFoundError, ValueError)):
        return is_transient(error.__cause__)
    if isinstance(error, (OfflineModeIsEnabled, ValueError)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in (408, 429) or status >= 500
    return not (isinstance(error, OSError) and error.errno in DISK_ERRORS)


@dataclasses.dataclass(frozen=True)
class Hub:
    """One dataset repo, with retries and errors that say what to do.

    prefix: folder of the repo that holds manifest.json; only_prefix: ignore what is listed outside it.
    """

    repo_id: str
    retries: int
    prefix: str
    only_prefix: bool

    def download(self, remote: str, force: bool = False) -> Path:
        """Path of one file in the local hub cache."""
        return Path(self._call(remote, lambda: huggingface_hub.hf_hub_download(
            self.repo_id, remote, repo_type="dataset", force_download=force)))

    def list_files(self) -> list[str]:
        """All paths that count."""
        api = huggingface_hub.HfApi()
        files = self._call("the file list", lambda: list(api.list_repo_files(self.repo_id, repo_type="dataset")), 1)
        return [path for path in files if not self.only_prefix or path.startswith(f"{self.prefix}/")]

    def _call(self, what: str, action: Callable[[], Result], most: int | None = None) -> Result:
        """Result of action, which is tried again up to self.retries times, or `most` if that is less."""
        attempt = 0
        while True:
            try:
                return action()
            except HUB_ERRORS as error:
                # The client itself retries look-ups for 20 s; the error of those of files is this one.
                most = 1 if isinstance(error, LocalEntryNotFoundError) else most
                limit = self.retries if most is None else min(self.retries, most)
                if attempt >= limit or not is_transient(error):
                    raise self._explain(what, error) from error
                delay = min(0.5 * 2**attempt, 30.0)
                say(f"{what}: {first_line(error)}; trying again in {delay:.1f} s")
            time.sleep(delay)
            attempt += 1

    def _explain(self, what: str, error: Exception) -> DownloadError:
        """Turn an error of the hub client into a DownloadError."""
        where = f"{what} of {self.repo_id}"
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            return DownloadError(f"no dataset repo {self.repo_id} (or it is private: set HF_TOKEN)")
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return MissingFileError(f"{self.repo_id} does not hold {what} (if its manifest says so: --skip-manifest)")
        if isinstance(cause, OfflineModeIsEnabled):
            return DownloadError(f"{where} is not in the local cache and HF_HUB_OFFLINE forbids fetching it")
        if getattr(getattr(cause, "response", None), "status_code", None) in (401, 403):
            return DownloadError(f"access to {where} refused; set HF_TOKEN to a token that may read the repo")
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return DownloadError(f"cannot store {where}: {error.strerror}; make room or set HF_HOME and --data-dir")
        text = f"fetching {where} failed: {first_line(cause)}"
        if is_transient(error):
            text += f"; check that {huggingface_hub.constants.ENDPOINT} is reachable and run the same command again"
        return DownloadError(text)


def first_line(error: BaseException) -> str:
    """Short form of an error; those of the hub client span many lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def remembered(path: Path, fetch: Callable[[], Any]) -> Any:
    """JSON value from fetch(), kept at path; the kept one is used while the hub cannot be reached."""
    try:
        value = fetch()
    except MissingFileError:
        raise
    except DownloadError as error:
        kept = read_json(path)
        if kept is None:
            raise
        say(f"warning: {error}; using {path}")
        return kept
    shards.write_json(path, value)
    return value


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def index_path(data_dir: Path, repo_id: str, kind: str) -> Path:
    """Where a repo's manifest or file list is kept: by repo, so that one never stands in for another."""
    return data_dir / f"{kind}.{repo_id.replace('/', '--')}.json"


def load_manifest(hub: Hub, data_dir: Path) -> dict[str, Any] | None:
    """The repo's manifest, or None if it has none."""
    remote = join_remote(hub.prefix, "manifest.json")

    def fetch() -> dict[str, Any]:
        try:
            return json.loads(hub.download(remote).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DownloadError(f"{remote} of {hub.repo_id} is not JSON ({error}); use --skip-manifest") from error

    try:
        return remembered(index_path(data_dir, hub.repo_id, "manifest"), fetch)
    except MissingFileError:
        say(f"{hub.repo_id} has no {remote}; listing its files instead")
    except DownloadError as error:
        if not index_path(data_dir, hub.repo_id, "manifest_listing").exists():
            raise
        say(f"warning: {error}; using the list of files from an earlier run")
    return None


def join_remote(*parts: str) -> str:
    """Join the non-empty parts of a path inside a repo."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def match_dataset(variant: str, names: list[str]) -> str | None:
    """The dataset that a variant means: its full name, or the name without the fineweb10B_ part."""
    matches = [name for name in names if variant in (name, short_name(name))]
    return min(matches, key=lambda name: (name != variant, not name.startswith("fineweb10B_"), name), default=None)


def plan_from_manifest(manifest: dict[str, Any], dataset: str, prefix: str) -> Plan:
    """All files of a dataset that the manifest describes."""
    entry = next(item for item in manifest["datasets"] if item["name"] == dataset)
    folder = join_remote(prefix, entry.get("path", f"datasets/{dataset}"))
    stats = entry.get("stats", {})
    if "files_train" not in stats:
        raise DownloadError(f"the manifest gives no number of train shards for {dataset}; use --skip-manifest")

    def names(split: str, count: int) -> list[str]:
        return [f"{folder}/{shards.shard_name(split, index)}" for index in range(count)]

    val_count = int(stats.get("files_val", 1))
    sidecars = names("val_bytes", val_count)
    tokenizer = next((item for item in manifest.get("tokenizers", [])
                      if item["name"] == entry.get("tokenizer_name")), {})
    paths = [tokenizer[key] for key in ("model_path", "path", "vocab_path") if tokenizer.get(key)]
    tokenizers = [join_remote(prefix, path) for path in paths]
    optional = [path for path in tokenizers if path.endswith(".vocab")]
    if "val_bytes_glob" not in entry:  # the manifest may be older than its sidecars, so look anyway
        optional += sidecars
    return Plan(dataset, names("train", int(stats["files_train"])), names("val", val_count), sidecars, tokenizers,
                frozenset(optional), int(entry.get("bos_id", shards.BOS_ID)))


def dataset_folders(files: list[str]) -> dict[str, str]:
    """Dataset name -> its folder in the repo; of several folders of one name the one with most files counts."""
    sizes = Counter((match.group(1), path.rpartition("/")[0])
                    for path in files if (match := DATASET_FILE.fullmatch(path)))
    return {name: folder for (name, folder), _ in sorted(sizes.items(), key=lambda item: item[1])}


def plan_from_listing(files: list[str], dataset: str) -> Plan:
    """All files of a dataset, found by name."""
    folder = dataset_folders(files)[dataset]
    found: dict[str, list[str]] = {"train": [], "val": [], "val_bytes": []}
    for path in sorted(files):
        match = DATASET_FILE.fullmatch(path)
        if match and path.rpartition("/")[0] == folder:
            found[match.group(2)].append(path)
    variant = re.fullmatch(r"sp(\d+)(_.+)?", short_name(dataset))
    stem = f"fineweb_{variant.group(1)}_bpe{variant.group(2) or ''}" if variant else "fineweb_pure_byte_260"
    by_name = {path.rpartition("/")[2]: path for path in sorted(files, reverse=True)}
    wanted = [f"{stem}.json"] if variant is None else [f"{stem}.model", f"{stem}.vocab"]
    return Plan(dataset, found["train"], found["val"], found["val_bytes"],
                [by_name[name] for name in wanted if name in by_name])


def make_plan(hub: Hub, variant: str, skip_manifest: bool, data_dir: Path) -> Plan:
    """Find the variant in the repo's manifest or, failing that, among its files."""
    manifest = None if skip_manifest else load_manifest(hub, data_dir)
    try:
        listed = [item["name"] for item in (manifest or {}).get("datasets", [])]
        dataset = match_dataset(variant, listed)
        if manifest is not None and dataset is not None:
            return plan_from_manifest(manifest, dataset, hub.prefix)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"the manifest of {hub.repo_id} has another form than expected ({type(error).__name__}: "
                            f"{error}); use --skip-manifest") from error
    files = remembered(index_path(data_dir, hub.repo_id, "manifest_listing"), hub.list_files)
    folders = dataset_folders(files)
    dataset = match_dataset(variant, sorted(folders))
    if dataset is not None:
        return plan_from_listing(files, dataset)
    available = sorted({short_name(name) for name in [*listed, *folders]})
    elsewhere = default_repo(variant)
    hint = f" {variant} is in {elsewhere}." if elsewhere != hub.repo_id and variant in REPO_OF_VARIANT else ""
    raise DownloadError(
        f"variant {variant} not found in {hub.repo_id}, which has: {', '.join(available) or 'no datasets'}.{hint} "
        "Set MATCHED_FINEWEB_REPO_ID to a repo that holds it."
    )


def is_valid_shard(path: Path) -> bool:
    """True for a complete local shard."""
    try:
        shards.read_header(path)
    except (FileNotFoundError, shards.ShardError):
        return False
    return True


def place(cached: Path, target: Path) -> None:
    """Put a cached file at target in one step. Not a symlink: that breaks when the cache moves or is pruned."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    source = cached.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise DownloadError(f"cannot write {target}: {error.strerror}; make room or change --data-dir") from error
    finally:
        temporary.unlink(missing_ok=True)


def fetch_shard(hub: Hub, remote: str, target: Path) -> bool:
    """Fetch one shard unless a valid one is there; True if it was fetched. A bad one is fetched a second time."""
    if is_valid_shard(target):
        return False
    problem = ""
    for force in (False, True):
        cached = hub.download(remote, force)
        try:
            shards.read_header(cached)
        except shards.ShardError as error:
            problem = str(error).partition(": ")[2]
            say(f"{remote}: bad shard ({problem})" + ("" if force else "; fetching it again"))
            continue
        place(cached, target)
        return True
    raise DownloadError(f"{remote} is damaged in {hub.repo_id} itself ({problem}); tell its owner or use another repo")


def fetch_small(hub: Hub, remote: str, target: Path) -> None:
    """Bring a tokenizer or document file up to date; a local one will do while the hub cannot be reached."""
    try:
        cached = hub.download(remote)
    except MissingFileError:
        raise
    except DownloadError as error:
        if not target.exists():
            raise
        say(f"warning: {error}; keeping {target}")
        return
    if not target.exists() or not (target.samefile(cached) or filecmp.cmp(cached, target, shallow=False)):
        place(cached, target)
        say(f"{target.name}: fetched")


def fetch_all_shards(hub: Hub, plan: Plan, folder: Path, workers: int) -> None:
    """Fetch all shards of the plan in parallel. One failure does not stop the others; all are reported."""
    remotes = [*plan.val, *plan.val_bytes, *plan.train]
    missing = sum(not is_valid_shard(folder / Path(remote).name) for remote in remotes)
    free = shutil.disk_usage(folder).free
    if missing * FULL_SHARD_BYTES > free:
        need = missing * FULL_SHARD_BYTES
        say(f"warning: {missing} shards may need {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    done, failures, started = 0, [], time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=workers)
    try:
        futures = {pool.submit(fetch_shard, hub, remote, folder / Path(remote).name): remote for remote in remotes}
        for future in concurrent.futures.as_completed(futures):
            remote, done = futures[future], done + 1
            error = future.exception()
            if error is None:
                status = "fetched" if future.result() else "already there"
                say(f"[{done}/{len(remotes)}] {Path(remote).name}: {status}, {time.monotonic() - started:.1f} s")
            elif remote not in plan.optional or not isinstance(error, DownloadError):
                failures.append(error)
            elif not isinstance(error, MissingFileError):
                say(f"warning: not known whether {remote} exists: {error}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    unexpected = [error for error in failures if not isinstance(error, DownloadError)]
    if unexpected:
        raise unexpected[0]
    if failures:
        raise DownloadError("; ".join(sorted(str(error) for error in failures)))


def report(folder: Path, plan: Plan, official: bool) -> None:
    """Print the fingerprint that reviewers compare, and warn of the known kinds of wrong data."""
    train, val, sidecars = (shards.list_shards(folder, split) for split in ("train", "val", "val_bytes"))
    val_tokens = sum(shards.read_header(path).count for path in val)
    val_docs = shards.count_documents(val, plan.bos_id)
    counted = sum(shards.read_header(path).count for path in sidecars)
    if sidecars and counted != val_tokens:
        raise shards.ShardError(f"{folder}: {counted} byte counts for {val_tokens} validation tokens; remove "
                                "fineweb_val_* and fetch them again")
    if "caseops" in plan.dataset and not sidecars:
        raise DownloadError(f"{plan.dataset} came without fineweb_val_bytes_*.bin; its tokenizer alone would count "
                            "case marks as text, and bits per byte would be wrong by some 7%: use a repo that has them")
    if len(train) != len(plan.train):
        say(f"note: {folder} holds {len(train)} train shards, not the {len(plan.train)} asked for; training reads all")
    if official and val_docs != OFFICIAL_VAL_DOCS:
        say(f"warning: {val_docs} validation documents instead of {OFFICIAL_VAL_DOCS}: not the official split, "
            "scores cannot be compared")
    if train and shards.read_header(train[0]).count == LEAKY_SHARD_TOKENS:
        say(f"warning: shards of {LEAKY_SHARD_TOKENS} tokens are the mark of a preparation script that left 80% of "
            "the validation documents in train")
    say(f"fingerprint: train_shards: {len(train)} val_tokens: {val_tokens} val_docs: {val_docs}")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line, compatible with the official script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_shards_positional", nargs="?", type=int, metavar="N", help="same as --train-shards")
    parser.add_argument("--variant", default="sp1024", help="byte260, sp<digits> or any dataset name in the manifest")
    parser.add_argument("--train-shards", type=int, help=f"number of train shards (default {DEFAULT_TRAIN_SHARDS})")
    parser.add_argument("--skip-manifest", action="store_true", help="find files by listing the repo")
    parser.add_argument("--with-docs", action="store_true", help="fetch docs_selected.jsonl as well (about 48 GB)")
    parser.add_argument("--workers", type=int, default=8, help="parallel downloads (default 8)")
    parser.add_argument("--retries", type=int, default=5, help="per file, on network and server errors (default 5)")
    parser.add_argument("--data-dir", type=Path, help="default: DATA_DIR, or else the folder of this script")
    args = parser.parse_args(arguments)
    given = {value for value in (args.train_shards, args.train_shards_positional) if value is not None}
    if len(given) > 1 or any(value < 0 for value in given):
        parser.error(f"the number of train shards must be one number >= 0, got {sorted(given)}")
    if args.workers < 1 or args.retries < 0:
        parser.error("--workers must be at least 1 and --retries at least 0")
    args.train_shards = given.pop() if given else None
    read_environment(args, os.environ)
    return args


def read_environment(args: argparse.Namespace, env: Mapping[str, str]) -> None:
    """Add to args what comes from the environment; an empty variable counts as unset."""
    args.data_dir = args.data_dir or Path(env.get("DATA_DIR") or Path(__file__).resolve().parent)
    args.repo_id = env.get("MATCHED_FINEWEB_REPO_ID") or default_repo(args.variant)
    prefix = env.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "").strip("/")
    args.prefix, args.only_prefix = prefix or "datasets", bool(prefix)


def limit_train_shards(plan: Plan, asked: int | None, repo_id: str) -> Plan:
    """Keep the first train shards; asking by number for more than exist is an error."""
    count = min(DEFAULT_TRAIN_SHARDS, len(plan.train)) if asked is None else asked
    if count > len(plan.train):
        raise DownloadError(f"{count} train shards asked for, {repo_id} has {len(plan.train)} of {plan.dataset}")
    if not plan.val:
        raise DownloadError(f"{repo_id} has no validation shards of {plan.dataset}")
    return dataclasses.replace(plan, train=plan.train[:count])


def run(args: argparse.Namespace) -> None:
    """Find, fetch, check and report."""
    hub = Hub(args.repo_id, args.retries, args.prefix, args.only_prefix)
    plan = make_plan(hub, args.variant, args.skip_manifest, args.data_dir)
    plan = limit_train_shards(plan, args.train_shards, hub.repo_id)
    folder = args.data_dir / "datasets" / plan.dataset
    say(f"{plan.dataset} from {hub.repo_id}: {len(plan.train)} train and {len(plan.val)} val shards -> {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    shards.claim_folder(folder, hub.repo_id)
    if not plan.tokenizers:
        say(f"warning: {hub.repo_id} has no tokenizer for {plan.dataset}; put one into {args.data_dir / 'tokenizers'}")
    documents = [join_remote(hub.prefix, f"docs_selected.{kind}") for kind in ("jsonl", "source_manifest.json")]
    targets = {remote: args.data_dir / "tokenizers" / Path(remote).name for remote in plan.tokenizers}
    targets.update({remote: args.data_dir / Path(remote).name for remote in documents if args.with_docs})
    for remote, target in targets.items():
        try:
            fetch_small(hub, remote, target)
        except MissingFileError:
            if remote not in plan.optional and remote != documents[1]:
                raise
    fetch_all_shards(hub, plan, folder, args.workers)
    for model in (target for target in targets.values() if target.suffix == ".model"):
        shards.record_tokenizer(folder, model)
    official = short_name(plan.dataset) in REPO_OF_VARIANT or "caseops" in plan.dataset
    report(folder, plan, official)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_args(arguments)
    disable_progress_bars()
    try:
        run(args)
    except KeyboardInterrupt as stop:
        console.warn("interrupted; the same command goes on from here")
        for remnant in args.data_dir.glob(f"**/.*.{os.getpid()}.tmp"):
            remnant.unlink(missing_ok=True)
        os._exit(console.exit_status(stop))  # a plain exit would wait for the downloads that are under way
    except (DownloadError, shards.ShardError) as error:
        console.warn(f"error: {error}")
        return 1
    except OSError as error:
        console.warn(f"error: {error}; check space and rights of {args.data_dir}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(console.run_tool(main))
