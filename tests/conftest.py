"""What every test may use: the built-in digits as shards, written once a session."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports DeepSpeed, which else warns at every start

import pytest

from vicreg_mm.input import builtin


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """split -> folder of indexed shards."""
    folder = tmp_path_factory.mktemp("digits")
    return {split: str(builtin.digits(split, folder)) for split in ("train", "test")}
