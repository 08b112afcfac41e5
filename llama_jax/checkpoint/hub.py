"""A checkpoint from the Hugging Face hub: what it is made of, fetched once into the hub's own cache.

Source: huggingface_hub, which keeps the cache, its locks, tokens and offline mode. The one invariant:
nothing large is fetched before it is known that the repository is a Llama in safetensors, that this
account may read it, and that it fits the disk.
"""

import contextlib
import fnmatch
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.companions import COMPANION_FILES
from llama_jax.checkpoint.hf import read_config, read_quantization
from llama_jax.config import LlamaConfig
from llama_jax.paths import staged_file
from llama_jax.progress import progress

_INDEX = "model.safetensors.index.json"

# Asked about a model before its weights are fetched: what it is, and the bytes of its files if they hold few bits.
Check = Callable[[LlamaConfig, int | None], None]


def download(hub_id: str, check: Check | None = None) -> Path:
    """The local snapshot of `org/name` or `org/name@revision`: config, safetensors, tokenizer and licence.

    What the cache has is not fetched again; where the hub cannot be asked, the cached snapshot is
    used. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are obeyed. Says on stderr what is fetched.
    check is asked about the model, and may raise, before its weights are fetched.
    Raises FileNotFoundError with the reason, ValueError for a repository that is no Llama in
    safetensors, OSError if the disk has too little room.
    """
    import huggingface_hub  # a second to import

    name, revision = _split(hub_id)
    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # the client raises its own, httpx's and OSError's kinds
        return _cached(hub_id, _reason(hub_id, error))
    _check_form(hub_id, [file.rfilename for file in info.siblings or ()])
    files = {file.rfilename: file for file in info.siblings or () if "/" not in file.rfilename}
    with _one_line(hub_id):  # a repository whose licence is not accepted is refused here
        snapshot = Path(huggingface_hub.hf_hub_download(name, "config.json", revision=info.sha)).parent
        if _INDEX in files:
            huggingface_hub.hf_hub_download(name, _INDEX, revision=info.sha)
    cfg, _ = read_config(snapshot, allow_unknown=True)
    weights = _weight_files(snapshot)
    if check:
        sizes = [files[file].size or 0 for file in weights if file in files]
        check(cfg, None if read_quantization(snapshot) is None else sum(sizes))
    wanted = [file for file in files if _is_wanted(file)] + weights
    if absent := [file for file in wanted if file not in files]:
        raise ValueError(f"{hub_id} lacks {', '.join(absent)}, which its {_INDEX} names")
    missing = _check_room(hub_id, [files[file] for file in wanted], snapshot)
    in_a_log = not sys.stderr.isatty()
    if not missing or in_a_log:
        huggingface_hub.utils.disable_progress_bars()
    with _one_line(hub_id):
        if missing and in_a_log:
            _fetch(hub_id, snapshot.name, missing)
        huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=wanted)
    _remember(snapshot, revision or "main")
    return snapshot


def _fetch(hub_id: str, sha: str, files: list[Any]) -> None:
    """Fetch files into the cache, eight at a time, and tell after each how much is done."""
    import huggingface_hub

    def fetch(file: Any) -> int:
        huggingface_hub.hf_hub_download(_split(hub_id)[0], file.rfilename, revision=sha)
        return file.size or 0

    total = sum(file.size or 0 for file in files)
    with progress(total, desc=hub_id) as bar, ThreadPoolExecutor(max_workers=8) as pool:
        for fetched in as_completed([pool.submit(fetch, file) for file in files]):
            bar.update(fetched.result())


def _remember(snapshot: Path, revision: str) -> None:
    """Note in the cache which commit a name stands for, as the hub's client does for files asked for by name."""
    ref, sha = snapshot.parents[1] / "refs" / revision, snapshot.name
    if revision != sha and not (ref.exists() and ref.read_text() == sha):
        ref.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(ref) as staged:
            staged.write_text(sha)


def _split(hub_id: str) -> tuple[str, str | None]:
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def _cached(hub_id: str, reason: str) -> Path:
    """The snapshot in the cache. Raises FileNotFoundError with the reason why the hub was no help."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = _split(hub_id)
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=["config.json", _INDEX], local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        raise FileNotFoundError(reason) from None
    if absent := [file for file in _weight_files(snapshot) if not (snapshot / file).exists()]:
        raise FileNotFoundError(f"{snapshot} lacks {', '.join(absent)}: {reason}")
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        print(f"using the copy in {snapshot}, because {reason}", file=sys.stderr)
    return snapshot


def _check_form(hub_id: str, names: list[str]) -> None:
    """Raises ValueError unless the files of the repository are a model in safetensors."""
    if "config.json" in names and {"model.safetensors", _INDEX} & {*names}:
        return
    if any(name.endswith(".pth") for name in names):
        raise ValueError(
            f"{hub_id} holds Meta's original form, not safetensors; fetch it with `hf download "
            f"{_split(hub_id)[0]} --local-dir DIR` and give the directory that has params.json"
        )
    if pickled := [name for name in names if name.endswith(".bin")]:
        raise ValueError(
            f"{hub_id} holds pickled weights alone ({pickled[0]}), which are not opened; "
            "give a repository with safetensors, or save this one as such with transformers"
        )
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ValueError(f"{hub_id} is no model in safetensors: expected config.json and {_INDEX}, it has {shown}")


def _is_wanted(name: str) -> bool:
    """Whether a file at the top of a repository is fetched whatever the index names."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in ("config.json", _INDEX, *COMPANION_FILES))


def _weight_files(snapshot: Path) -> list[str]:
    """The safetensors that the index names, or the one file of a model without an index."""
    index = snapshot / _INDEX
    if not index.exists():
        return ["model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if other := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"{other[0]!r} is no name")
        return sorted(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: a JSON object with a weight_map of file names was expected: {error!r}") from None


def _check_room(hub_id: str, files: list[Any], snapshot: Path) -> list[Any]:
    """Says what will be fetched, and returns those files. Raises OSError if the cache's disk has too little room."""
    blobs = snapshot.parents[1] / "blobs"  # what another revision has is there under its hash
    missing = [
        file
        for file in files
        if not (snapshot / file.rfilename).exists()
        and not (blobs / str(file.lfs.sha256 if file.lfs else file.blob_id)).exists()
    ]
    needed, total = (sum(file.size or 0 for file in listed) for listed in (missing, files))
    free = shutil.disk_usage(snapshot).free
    if needed > free:
        raise OSError(
            f"{hub_id} takes {_gigabytes(needed)} more and {snapshot} has {_gigabytes(free)} free; "
            "make room, or set HF_HOME to a directory on a larger disk"
        )
    if missing:
        print(f"downloading {hub_id}: {_gigabytes(needed)} of {_gigabytes(total)} to {snapshot}", file=sys.stderr)
    return missing


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


@contextlib.contextmanager
def _one_line(hub_id: str) -> Iterator[None]:
    """Whatever the hub's client raises becomes a FileNotFoundError of one line."""
    try:
        yield
    except Exception as error:  # its own, httpx's and OSError's kinds
        raise FileNotFoundError(_reason(hub_id, error)) from None


def _reason(hub_id: str, error: Exception) -> str:
    """Why the hub did not give a repository, and what to do about it, in one line."""
    from huggingface_hub import constants, errors

    name, revision = _split(hub_id)
    page = f"https://huggingface.co/{name}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why a file that is not in the cache did not come from the hub
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{hub_id} is no local directory and not whole in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; {page}/tree/main shows those that it has"
    if status in (401, 403):
        return (
            f"the hub does not let this account read {hub_id} ({status}): if the name is right, accept "
            f"the licence at {page} and set HF_TOKEN to a token of the account that did"
        )
    if status == 404:
        return f"{hub_id} is no local directory, and on the hub there is no {page}, or none for this account"
    said = " ".join(str(error).split()) or type(error).__name__
    return f"{hub_id} is no local directory and could not be downloaded: {said}"
