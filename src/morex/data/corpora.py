"""Which corpus an option means: a name, a data set of the hub, a file, or a folder of files in sorted order."""

import json
import os
from pathlib import Path

from morex.data.corpus import Corpus, FileCorpus, SeparateCorpora
from morex.data.errors import DataError
from morex.data.formats.kinds import FOLDER_SUFFIXES, REFUSED_SUFFIXES, format_of
from morex.data.hub import HUB_PREFIX, open_hub
from morex.data.named import NAMED
from morex.data.remote import is_remote, local_copy
from morex.data.shards import is_shard_folder
from morex.loading import closest
from morex.sections.data import DataConfig

# What the package datasets writes into a folder with `save_to_disk`.
SAVED_STATE = "state.json"
SAVED_SPLITS = "dataset_dict.json"


def open_data(data: DataConfig) -> Corpus:
    """What a config names: one corpus to split, or one to train on and one that is held out.

    Raises:
        DataError: as `open_corpus`.
    """
    train = open_corpus(data.corpus, data.column)
    named = NAMED.get(data.corpus)
    if data.val_corpus is not None:
        return SeparateCorpora(train, open_corpus(data.val_corpus, data.column, "data.val_corpus"))
    if named is not None and named.held_out is not None:
        return SeparateCorpora(train, FileCorpus(data.corpus, named.held_out(), data.column, "the held-out part of"))
    return train


def open_corpus(name: str, column: str = "text", option: str = "data.corpus") -> Corpus:
    """Finds the files of a corpus; reads none of them, except that a named one may be downloaded and is checked.

    Args:
        name: a name, `hf:...`, a file, a folder, or the address of one elsewhere. As `data.val_corpus` a named corpus
            with a held-out part means that.
        column: what holds the text, in formats with columns.
        option: where the user gave the name.

    Raises:
        DataError: there is no such corpus, or no file with text in it.
    """
    if name in NAMED:
        named = NAMED[name]
        find = named.held_out if option == "data.val_corpus" and named.held_out is not None else named.files
        return FileCorpus(name, find(), column, option)
    if name.startswith(HUB_PREFIX):
        return open_hub(name, column, option)
    path = local_copy(name, option) if is_remote(name) else Path(name).expanduser()
    if is_shard_folder(path):
        raise DataError(f"{option} '{name}' holds token shards, which are for data.corpus or data.mixture; give text")
    if path.is_dir():
        return FileCorpus(name, _files_of(path, f"{option} '{name}'"), column, option)
    if not path.exists():
        hint = closest(name, NAMED)
        raise DataError(f"{option} '{name}' is neither a file nor a folder nor a corpus by name{hint}")
    if format_of(path) in REFUSED_SUFFIXES:
        raise DataError(f"{option} '{name}' is markup, which no reader knows; convert it to .txt, .md or .jsonl")
    return FileCorpus(name, (path,), column, option)


def folder_of_shards(name: str, option: str = "data.corpus") -> Path | None:
    """The folder of token shards that a name means, brought here where it is remote; None where it means text.

    Raises:
        DataError: a remote one cannot be reached, or what arrives is not what its index says.
    """
    if name in NAMED or name.startswith(HUB_PREFIX):
        return None
    path = local_copy(name, option) if is_remote(name) else Path(name).expanduser()
    return path if is_shard_folder(path) else None


def located(data: DataConfig) -> DataConfig:
    """The same corpora by names that mean the same from every current directory: the paths of those that are here."""
    members = [member.model_copy(update={"corpus": lasting_name(member.corpus)}) for member in data.mixture]
    names = {"corpus": lasting_name(data.corpus), "val_corpus": data.val_corpus and lasting_name(data.val_corpus)}
    return data.model_copy(update={**names, "mixture": tuple(members)})


def lasting_name(name: str) -> str:
    """The name of a corpus that means the same from every current directory: the path of one that is there in full."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in NAMED and path.exists() else name


def _files_of(folder: Path, title: str) -> tuple[Path, ...]:
    if (folder / SAVED_STATE).is_file():
        return _saved_files(folder, title)
    if (folder / SAVED_SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{SAVED_STATE}"))
        raise DataError(f"{title} is a data set with the splits {', '.join(splits)}; name one: '{folder / splits[0]}'")
    files = _files_below(folder)
    if not files:
        kinds = ", ".join(FOLDER_SUFFIXES)
        raise DataError(f"{title} is a folder without text: it needs {kinds} files")
    return tuple(files)


def _saved_files(folder: Path, title: str) -> tuple[Path, ...]:
    """The files of a data set that the package datasets has saved; others in its folder are the package's own cache."""
    try:
        state = json.loads((folder / SAVED_STATE).read_text(encoding="utf-8"))
        files = tuple(folder / entry["filename"] for entry in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{title} has a {SAVED_STATE} that is not that of a saved data set ({error!r})") from None
    missing = [path for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(f"{title} is a saved data set without '{(missing or [folder])[0]}'; save it again")
    return files


def _files_below(folder: Path) -> list[Path]:
    """Files with text of a folder and the folders in it, sorted by path; hidden ones are passed over."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if format_of(path) in FOLDER_SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)
