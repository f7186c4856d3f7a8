"""Shared fixtures: every test starts from the same seeds, on one thread, with its cache folder out of the way."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("morex", deadline=None, derandomize=True, database=None)
settings.load_profile("morex")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread makes sums reproducible to the bit and leaves the machine to the other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this test run's own, so that nothing is read from or written to the user's."""
    folder = tmp_path_factory.mktemp("morex-cache")
    before = os.environ.get("MOREX_CACHE")
    os.environ["MOREX_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MOREX_CACHE"]
    else:
        os.environ["MOREX_CACHE"] = before


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random state at the start of every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
