"""Tensors on disk, divided as the ranks hold them: torch's distributed checkpoints, in safetensors and JSON alone.

A tensor is known by its part and its name, `model/embedding.weight`. Every rank writes the pieces that it holds, those
of a part together: `model.safetensors` of a training alone, `model-RANK.safetensors` of several, with `-2`, `-3` behind
it where a file has grown to FILE_BYTES. index.json says which piece of which tensor lies where. Nothing is pickled.
"""

import errno
import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from morex.files import read_json, sha256, write_json, write_whole
from morex.train.errors import CheckpointError

INDEX = "index.json"
FILE_BYTES = 2**30
"""A file takes no further tensor once it has grown to this; writing needs so much memory."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, and the file that it lies in."""

    name: str
    dtype: str
    whole: tuple[int, ...]
    """Shape of the tensor."""
    at: tuple[int, ...]
    """Where in it the piece begins."""
    shape: tuple[int, ...]
    file: str


class Writer(dcp.StorageWriter):
    """Writes the pieces of one rank into a folder.

    Args:
        folder: made if need be.
        rank: of several; None where the training is alone.
        prepare: called on the first rank before anything is written.
        complete: called on the first rank with the SHA-256 of every file, once all read back as they were written.
    """

    def __init__(
        self, folder: Path, rank: int | None, prepare: Callable[[], None], complete: Callable[[dict[str, str]], None]
    ) -> None:
        self._folder, self._prepare, self._complete = folder, prepare, complete
        self._ending = "" if rank is None else f"-{rank}"

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Keeps nothing between checkpoints."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Needs nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._prepare()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        self._folder.mkdir(exist_ok=True)
        parts: dict[str, list[WriteItem]] = defaultdict(list)
        for item in plan.items:
            parts[item.index.fqn.partition("/")[0]].append(item)
        written: TorchFuture[list[WriteResult]] = TorchFuture()
        written.set_result([result for part, items in parts.items() for result in self._write(part, items, planner)])
        return written

    def _write(self, part: str, items: Iterable[WriteItem], planner: SavePlanner) -> Iterator[WriteResult]:
        for number, group in enumerate(_files(items), start=1):
            file = f"{part}{self._ending}{'' if number == 1 else f'-{number}'}.safetensors"
            tensors = {}
            for item in group:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                tensors[item.index.fqn.removeprefix(f"{part}/")] = tensor.detach().cpu().contiguous()
            digest = _write_verified(self._folder / file, save(tensors))
            for item in group:
                about = item.tensor_data
                assert about is not None
                dtype = str(about.properties.dtype).removeprefix("torch.")
                at, shape = tuple(about.chunk.offsets), tuple(about.chunk.sizes)
                piece = Piece(item.index.fqn, dtype, tuple(about.size), at, shape, file)
                yield WriteResult(item.index, _size(item), (piece, digest))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result.storage_data for own in results for result in own]
        index: dict[str, Any] = {}
        for piece, _ in written:
            entry = index.setdefault(piece.name, {"dtype": piece.dtype, "shape": piece.whole, "pieces": []})
            entry["pieces"].append({"at": piece.at, "shape": piece.shape, "file": piece.file})
        write_json(self._folder / INDEX, index)
        digests = {piece.file: digest for piece, digest in written}
        self._complete(digests | {INDEX: sha256(self._folder / INDEX)})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return False


class Reader(dcp.StorageReader):
    """Reads pieces from the files of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces = read_index(folder)

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Keeps nothing between checkpoints."""

    def read_metadata(self) -> Metadata:
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, pieces in self._pieces.items():
            chunks = [ChunkStorageMetadata(torch.Size(piece.at), torch.Size(piece.shape)) for piece in pieces]
            properties = TensorProperties(dtype=getattr(torch, pieces[0].dtype))
            found[name] = TensorStorageMetadata(properties, torch.Size(pieces[0].whole), chunks)
        return Metadata(state_dict_metadata=found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Needs nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        files = {
            MetadataIndex(piece.name, piece.at): piece.file for pieces in self._pieces.values() for piece in pieces
        }
        wanted: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[files[item.storage_index]].append(item)
        for file, items in wanted.items():
            with safe_open(self._folder / file, framework="pt") as tensors:
                for item in items:
                    where = zip(item.storage_offsets, item.lengths, strict=True)
                    name = item.storage_index.fqn.partition("/")[2]
                    piece = tensors.get_slice(name)[tuple(slice(at, at + length) for at, length in where)]
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return False


class Saving:
    """A checkpoint that is being written, or none.

    Args:
        written: what ends when it is there.
        abandon: called where it cannot be written.
    """

    def __init__(self, written: Future[Any] | None = None, abandon: Callable[[], None] | None = None) -> None:
        self._written, self._abandon = written, abandon

    def finish(self) -> None:
        """Waits until it is there; raises what went wrong with it, once."""
        written, self._written = self._written, None
        if written is None:
            return
        try:
            written.result()
        except dcp.CheckpointException as report:
            if self._abandon is not None:
                self._abandon()
            [(error, _), *_] = report.failures.values()
            raise error from None


def write(
    tensors: Mapping[str, Tensor],
    writer: Writer,
    group: dist.ProcessGroup | None,
    in_background: bool,
    abandon: Callable[[], None],
) -> Saving:
    """Writes tensors; all ranks have to call it.

    Args:
        tensors: by part and name. Divided ones are divided on all ranks; of whole ones that several have, one writes.
        group: what ranks agree over, one that nothing else uses; None where the training is alone.
        in_background: copies the tensors and writes while the training goes on.
        abandon: called where they cannot be written.

    Raises:
        OSError: the disk is full or not writable; on all ranks, in the background from `Saving.finish`.
    """
    # What torch would say of a training alone; a thread cannot leave it out for itself.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
    options: dict[str, Any] = {"storage_writer": writer, "process_group": group, "no_dist": group is None}
    if in_background:
        found = dcp.async_save(dict(tensors), **options)
        return Saving(found if isinstance(found, Future) else found.upload_completion, abandon)
    written: Future[Any] = Future()
    try:
        written.set_result(dcp.save(dict(tensors), **options))
    except dcp.CheckpointException as report:
        written.set_exception(report)
    saving = Saving(written, abandon)
    saving.finish()
    return saving


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors, by part and name and of the shapes that are there, each rank its own pieces; formats may differ.

    Raises:
        CheckpointError: a file is not what the index says.
    """
    if not tensors:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            dcp.load(dict(tensors), storage_reader=Reader(folder), no_dist=True)
        except dcp.CheckpointException as report:
            [(error, _), *_] = report.failures.values()
            if not isinstance(error, (SafetensorError, OSError, KeyError)):
                raise error from None
            raise CheckpointError(f"checkpoint '{folder}' is damaged: {type(error).__name__}: {error}") from None


def read_index(folder: Path) -> dict[str, list[Piece]]:
    """Pieces of every tensor of a checkpoint by part and name. Raises CheckpointError where there is no valid index."""
    try:
        return {
            name: [
                Piece(name, entry["dtype"], tuple(entry["shape"]), tuple(p["at"]), tuple(p["shape"]), p["file"])
                for p in entry["pieces"]
            ]
            for name, entry in read_json(folder / INDEX).items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint '{folder}' is damaged: {INDEX} cannot be read") from None


def _files(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items in groups for one file each: no name twice, and none added to a group that has grown to FILE_BYTES."""
    group: dict[str, WriteItem] = {}
    grown = 0
    for item in items:
        if grown >= FILE_BYTES or item.index.fqn in group:
            yield list(group.values())
            group, grown = {}, 0
        group[item.index.fqn] = item
        grown += _size(item)
    if group:
        yield list(group.values())


def _size(item: WriteItem) -> int:
    return item.tensor_storage_size() or 0


def _write_verified(path: Path, content: bytes) -> str:
    """Writes a file, reads it back and returns its SHA-256. Raises OSError where what is there is something else."""
    digest = hashlib.sha256(content).hexdigest()
    write_whole(path, content)
    if sha256(path) != digest:
        raise OSError(errno.EIO, "it does not read back as it was written", str(path))
    return digest
