"""Offline, without telemetry, one thread per process (unless set otherwise), the same random numbers every time."""

import os

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # tests start processes of their own
}.items():
    os.environ.setdefault(name, value)

import gc  # noqa: E402
import logging  # noqa: E402
import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


LEVELS = {name: logging.getLogger(name).level for name in ("hf_distill", "trl", "accelerate", "transformers")}


@pytest.fixture(autouse=True)
def heard():
    """What ran quietly in this process, in a fixture of another file too, leaves no logger quiet."""
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)


LONGEST = ("test_every_method", "test_recipe")  # files; they start first, or one process would wait for them at the end


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST))


def pytest_collection_finish(session):
    """Trainers collect garbage at every start and end: it should not look at half a million imported objects."""
    gc.collect()
    gc.freeze()
