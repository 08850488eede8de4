"""Evaluation on several ranks gives what one process gives, from real shards."""

import cv2
import numpy as np
import pytest
import torch

from vicreg_mm import distributed
from vicreg_mm.evaluation.features import extract_features, raw_pixels
from vicreg_mm.evaluation.report import compare_encoders
from vicreg_mm.input.loader import LabelledLoader
from vicreg_mm.input.shards import ShardIndex, write_index
from vicreg_mm.input.views import EvalTransform
from vicreg_mm.input.writing import write_tar

from .ranks import run_ranks


def write_set(folder, num_samples, seed, bad=()):
    """Small noisy pictures of 3 brightnesses in two shards; the rows in `bad` do not decode."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    samples = []
    for n in range(num_samples):
        pixels = generator.integers(0, 200, (8, 8, 3), dtype=np.uint8) + np.uint8(25 * (n % 3))
        data = b"\xff\xd8\xff nothing" if n in bad else cv2.imencode(".png", pixels)[1].tobytes()
        samples.append({"__key__": f"{n:04d}", "png": data, "cls": str(n % 3).encode()})
    write_tar(folder / "a.tar", samples[:11])
    write_tar(folder / "b.tar", samples[11:])
    write_index(folder)
    return folder


def loader(folder, batch=4):
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    return LabelledLoader(ShardIndex.open(folder), EvalTransform(8), batch, **ranks)


def features_of(folder, batch=4):
    return extract_features(raw_pixels, loader(folder, batch))


def rows_of(train, test):
    return compare_encoders({"brightness": lambda x: raw_pixels(x)[:, :9]}, loader(train), loader(test))


def error_of(train, test):
    with pytest.raises(ValueError) as error:
        rows_of(train, test)
    return str(error.value)


@pytest.mark.parametrize("world_size", [2, 3])
def test_features_are_those_of_one_process_in_the_order_of_the_data(tmp_path, world_size):
    folder = write_set(tmp_path / "set", 29, seed=0, bad=(3, 4, 28))
    features, labels = features_of(folder)
    assert labels.tolist() == [n % 3 for n in range(29) if n not in (3, 4, 28)]
    for found, classes in run_ranks(features_of, world_size, folder):
        assert torch.equal(found, features)
        assert torch.equal(classes, labels)


def test_a_rank_without_a_single_good_sample_takes_part(tmp_path):
    folder = write_set(tmp_path / "set", 12, seed=0, bad=range(6, 12))
    features, labels = features_of(folder)
    for found, classes in run_ranks(features_of, 2, folder, 2):
        assert torch.equal(found, features)
        assert classes.tolist() == labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_table_is_the_same_on_every_rank_and_that_of_one_process(tmp_path):
    train, test = write_set(tmp_path / "train", 60, seed=0), write_set(tmp_path / "test", 31, seed=1)
    expected = rows_of(train, test)
    assert 1 / 3 < expected[0]["linear"] <= 1
    assert run_ranks(rows_of, 2, train, test) == [expected, expected]


def test_an_error_of_rank_0_is_raised_on_every_rank(tmp_path):
    train, test = write_set(tmp_path / "train", 14, seed=0, bad=(2, 5, 8, 11)), write_set(tmp_path / "test", 12, seed=1)
    first, second = run_ranks(error_of, 2, train, test)
    assert first == second == "test labels 2 do not occur in the train set: are both from one data set?"
