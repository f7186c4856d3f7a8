"""Corpora elsewhere, by addresses such as `s3://...`, through the package fsspec of the extra `data`.

They are copied into the cache, a file at a time, and read from there. Token shards are compared with the checksums of
their index as they arrive; of other files the name, the size and what else the place says make the key.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from morex.data.cache import key_of, temporary_name, write_faults, write_file
from morex.data.encoding import SETTINGS
from morex.data.errors import DataError
from morex.data.formats.kinds import FOLDER_SUFFIXES, format_of
from morex.data.progress import Progress
from morex.data.shards import INDEX, TOKENIZER, index_from
from morex.files import cache_folder

CHUNK_BYTES = 1 << 20


def is_remote(name: str) -> bool:
    """Whether a name is an address."""
    return "://" in name


def local_copy(address: str, option: str) -> Path:
    """Copies the file or the folder of an address into the cache, or finds the copy made before.

    Raises:
        DataError: fsspec is not installed, the place cannot be reached, or a shard is not what its index says.
    """
    title = f"{option} '{address}'"
    try:
        import fsspec
    except ImportError:
        raise DataError(f"{title} needs the package fsspec; install it with pip install 'morex[data]'") from None
    with _unreachable(title):
        system, path = fsspec.url_to_fs(address)
        if system.isfile(path):
            return _copied(system, {PurePosixPath(path).name: path}, address) / PurePosixPath(path).name
        if not system.exists(path):
            raise FileNotFoundError(path)
        if system.isfile(f"{path}/{INDEX}"):
            return _copied_shards(system, path, address, title)
        found = {name.removeprefix(path).lstrip("/"): name for name in system.find(path)}
    files = {name: place for name, place in found.items() if _is_text(PurePosixPath(name))}
    if not files:
        raise DataError(
            f"{title} is a folder without text: it needs {', '.join(FOLDER_SUFFIXES)} files or token shards"
        )
    with _unreachable(title):
        return _copied(system, files, address)


def _is_text(path: PurePosixPath) -> bool:
    """Whether a file is read, as in a folder here: its format is known, and it is not hidden."""
    return format_of(Path(path)) in FOLDER_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _copied(system: Any, files: dict[str, str], address: str) -> Path:
    """A folder with copies of files, given as names in it -> paths there."""
    known = {name: str(system.ukey(path)) for name, path in files.items()}
    folder = cache_folder() / "remote" / key_of(address, known)
    left = {name: path for name, path in files.items() if not (folder / name).is_file()}
    sizes = {name: int(system.size(path)) for name, path in left.items()}
    with Progress("Copying", sum(sizes.values())) as progress:
        for name, path in left.items():
            with system.open(path, "rb") as source:
                _copy(source, folder / name, progress.advance)
    return folder


def _copied_shards(system: Any, path: str, address: str, title: str) -> Path:
    """A folder with the shards of a folder there, each compared with the index."""
    content = system.cat_file(f"{path}/{INDEX}")
    folder = cache_folder() / "remote" / key_of(address, hashlib.sha256(content).hexdigest())
    if (folder / INDEX).is_file():
        return folder
    index = index_from(content, title)
    if not index.complete:
        raise DataError(f"{title} is not finished: it was copied before its shards were all there")
    write_file(folder / TOKENIZER / SETTINGS, system.cat_file(f"{path}/{TOKENIZER}/{SETTINGS}"))
    shards = index.named()
    with Progress("Copying", sum(map(index.size, shards.values()))) as progress:
        for name, shard in shards.items():
            if (folder / name).is_file():
                progress.advance(index.size(shard))
                continue
            with system.open(f"{path}/{name}", "rb") as source:
                found = _copy(source, folder / name, progress.advance, shard.sha256)
            if found != shard.sha256:
                raise DataError(
                    f"{title}: '{name}' has changed since it was indexed: its SHA-256 is not {shard.sha256}; restore "
                    "it, or prepare the folder again"
                )
    write_file(folder / INDEX, content)
    return folder


def _copy(source: IO[bytes], path: Path, advance: Callable[[int], None], expected: str | None = None) -> str:
    """Copies a file a piece at a time and returns its SHA-256; nothing stays where another is expected."""
    digest, temporary = hashlib.sha256(), temporary_name(path)
    with write_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    try:
        with file:
            while chunk := source.read(CHUNK_BYTES):
                with write_faults(path):
                    file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
        if expected in (None, digest.hexdigest()):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


@contextmanager
def _unreachable(title: str) -> Iterator[None]:
    """Says in a sentence what a place elsewhere answers."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{title} is not there: no file or folder '{error.filename or error}'") from None
    except Exception as error:  # each kind of place raises its own
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"{title} cannot be reached ({reason}); check the address and the network, or copy it here"
        ) from None
