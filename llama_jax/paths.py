"""Local files, gs:// and s3:// behind one face; files and directories that appear whole or not at all.

A remote path is one of etils' epath, which behaves like pathlib over fsspec (gcsfs, s3fs); the bytes of
weights come through tensorstore. On a disk, work goes to a temporary sibling on the same filesystem,
which is renamed to its final name once its bytes are on the disk. An object store has no rename and no
append, but an object appears whole: there a file is made on the local disk and sent, and a directory
is filled under its own name, the file that makes it one (config.json, say) last. The one invariant: a
failure of any kind removes what was begun and leaves what was there as it was.
"""

import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# Scheme to the library that serves it, which is also the name of its logger.
_LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+([^/]*)/*(.*)")  # pathlib turns "gs://bucket" into "gs:/bucket"

_reached: set[tuple[str, str]] = set()


def as_path(path: str | os.PathLike) -> Path:
    """The path, absolute; one of gs:// or s3:// behaves like pathlib's.

    The first path of a bucket asks whether the bucket can be reached. Raises ValueError for another
    scheme or a library that is not installed, FileNotFoundError for a bucket that does not exist,
    OSError with the reason for one that cannot be reached.
    """
    match = _URL.match(os.fspath(path))
    if match is None:
        return Path(path).absolute()
    scheme, bucket, key = match.groups()
    if scheme not in _LIBRARIES or not bucket:
        raise ValueError(f"{path}: expected a local path, gs://bucket/... or s3://bucket/...")
    if (scheme, bucket) not in _reached:
        _reach(scheme, bucket, key)
    from etils import epath

    return epath.Path(f"{scheme}://{bucket}/{key}".rstrip("/"))  # type: ignore[return-value]


def is_remote(path: str | os.PathLike) -> bool:
    """Whether what `as_path` gave lies in an object store."""
    return _URL.match(os.fspath(path)) is not None


def _reach(scheme: str, bucket: str, key: str) -> None:
    path = f"{scheme}://{bucket}/{key}"
    try:
        filesystem = _filesystem(scheme)
        if not filesystem.exists(path):
            with contextlib.suppress(PermissionError):  # for the bucket as a whole; it is there
                filesystem.info(f"{scheme}://{bucket}")
    except ImportError:
        library = _LIBRARIES[scheme]
        raise ValueError(f"{path} needs {library}, which is not installed: python -m pip install {library}") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no bucket {bucket}; create it or mend the name") from None
    except Exception as error:  # botocore's, google's and aiohttp's kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{path} cannot be reached: {reason}; check the network and your credentials") from None
    _reached.add((scheme, bucket))


@functools.cache
def _filesystem(scheme: str) -> Any:
    import fsspec
    from fsspec.config import conf

    # Objects are written by tensorstore and by other processes too, so a listing that was kept would be stale.
    conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    logging.getLogger(_LIBRARIES[scheme]).setLevel(logging.CRITICAL)  # tracebacks of what is raised, too
    return fsspec.filesystem(scheme)


def kvstore_spec(path: str | os.PathLike) -> dict[str, Any]:
    """Tensorstore's description of a file, or of a directory if the caller adds "/" to its "path".

    For s3, AWS_ENDPOINT_URL and AWS_REGION are obeyed.
    """
    match = _URL.match(os.fspath(path))
    if match is None:
        return {"driver": "file", "path": os.fspath(path)}
    scheme, bucket, key = match.groups()
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {"endpoint": endpoint, "aws_region": region or "us-east-1"} if endpoint else {}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else tensorstore tells of every other place where it has looked
        options["aws_credentials"] = {"type": "environment"}
    return {"driver": "s3", "bucket": bucket, "path": key} | options


def open_file(path: Path) -> BinaryIO:
    """A file open for reading small parts of it; a remote one comes in pieces of 1 MiB."""
    if is_remote(path):
        return _filesystem(os.fspath(path)[:2]).open(os.fspath(path), "rb", block_size=2**20)
    return path.open("rb")


def vacant_directory(path: str | os.PathLike) -> Path:
    """The absolute path of a directory that is absent or empty. Raises FileExistsError if something is there."""
    path = as_path(path)
    path = path if is_remote(path) else path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; remove it or choose another destination")
    return path


def make_directory(path: Path) -> None:
    """Create a directory and its parents where they are absent; in an object store what it will hold makes it."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_directory(path: Path) -> None:
    """Remove a directory with all that it holds, if it is there."""
    if is_remote(path):
        path.rmtree(missing_ok=True)  # type: ignore[attr-defined]
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def staged_directory(dst: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty directory that becomes dst when the block ends well, and is removed when it does not.

    Parents of dst are created. In an object store the directory is dst itself, and a process that is
    killed leaves what it has written: write the file that describes the rest last. Raises
    FileExistsError before any work if dst is not vacant.
    """
    dst = vacant_directory(dst)
    staged = dst if is_remote(dst) else _partial(dst)
    make_directory(staged)
    try:
        yield staged
        if staged != dst:
            for entry in staged.rglob("*"):
                _fsync(entry)
            _fsync(staged)
            os.rename(staged, dst)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk does not say where
            error.filename = str(dst)
        with contextlib.suppress(OSError):
            remove_directory(staged)
        raise
    if staged != dst:
        _fsync(dst.parent)


@contextlib.contextmanager
def staged_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the name of a local file to write, which becomes path, or replaces it, when the block ends well.

    Until then one that is for an object store lies in TMPDIR.
    """
    path = as_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder) / path.name
            yield staged
            _send(staged, path)
        return
    path = path.resolve()
    staged = _partial(path)
    try:
        yield staged
        _fsync(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    _fsync(path.parent)


def _send(file: Path, path: Path) -> None:
    try:
        _filesystem(os.fspath(path)[:2]).put_file(os.fspath(file), os.fspath(path))
    except Exception as error:  # botocore's, google's and aiohttp's kinds
        raise OSError(f"{path} cannot be written: {' '.join(str(error).split())}") from None


def fetch_file(path: Path, file: Path) -> None:
    """Copy a remote file to a local one. Raises OSError if it cannot be read."""
    try:
        _filesystem(os.fspath(path)[:2]).get_file(os.fspath(path), os.fspath(file))
    except Exception as error:  # botocore's, google's and aiohttp's kinds
        raise OSError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def cache_directory() -> Path:
    """Where this user keeps what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llama_jax"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def _fsync(path: Path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
