"""The corpus of the training tests."""

import gc
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.helpers import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text file."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.txt")


@pytest.fixture(scope="session", autouse=True)
def quick_collection() -> Iterator[None]:
    """A run collects garbage before it measures memory; going through all of torch each time would take most of it."""
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
