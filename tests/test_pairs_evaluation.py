"""Embeddings of a set's images and captions, on one and on two ranks, and the report made of them."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.test_image_text_ranks import text_config
from vicreg_mm import config as configs
from vicreg_mm.assemble import build_model
from vicreg_mm.evaluation.pairs import Pairs, embed_pairs, embed_texts, image_text_report, image_text_table
from vicreg_mm.input.loader import LabelledLoader
from vicreg_mm.input.shards import Reader, ShardIndex
from vicreg_mm.input.tokenizers import build_tokenizer, pack
from vicreg_mm.input.views import EvalTransform, decode

CPU = torch.device("cpu")


def embedded(train, test, name="crossmodal"):
    """The pairs of the held-out digits under an untrained model, on this rank."""
    from vicreg_mm import distributed

    torch.manual_seed(0)
    tokenizer = build_tokenizer(train)
    model = build_model(text_config(train, "", name), tokenizer)
    index = ShardIndex.open(test)
    loader = LabelledLoader(index, EvalTransform(32), 40, rank=distributed.rank(), world_size=distributed.world_size())
    return tuple(embed_pairs(model, loader, Reader(index), tokenizer, 12, CPU))


@pytest.fixture(scope="module")
def alone(digits):
    return Pairs(*run_ranks(embedded, 1, digits["train"], digits["test"])[0])


def test_every_image_and_every_caption_is_there_once(alone, digits):
    reader = Reader(ShardIndex.open(digits["test"]))
    assert alone.images.shape == (297, 64) and alone.texts.shape == (891, 64)
    assert alone.image_of_text.tolist() == [row for row in range(297) for _ in range(3)]
    assert alone.labels.tolist() == [reader.read(row).label for row in range(297)]


@pytest.mark.parametrize("name", ["crossmodal", "clip", "clip+vicreg"])
def test_they_are_in_the_space_in_which_the_objective_compares_them(digits, name):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(digits["train"])
    model = build_model(text_config(digits["train"], "", name), tokenizer).eval()
    pairs = Pairs(*run_ranks(embedded, 1, digits["train"], digits["test"], name)[0])
    sample = Reader(ShardIndex.open(digits["test"])).read(5)
    image = torch.from_numpy(EvalTransform(32)(decode(sample.image)))[None]
    tokens = torch.from_numpy(pack(tokenizer.encode(sample.captions[2]), 12, tokenizer))[None]
    own = model.objective.parts["clip"] if "+" in name else model.objective
    heads = (own.image_projection, own.text_projection) if "clip" in name else (model.expander, model.text.expander)
    with torch.no_grad():
        torch.testing.assert_close(pairs.images[5:6], heads[0](model.encoder(model.normalize(image))), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pairs.texts[17:18], heads[1](model.text.encoder(tokens)), rtol=1e-4, atol=1e-5)


def test_two_ranks_give_the_pairs_of_one(alone, digits):
    for found in run_ranks(embedded, 2, digits["train"], digits["test"]):
        for mine, expected in zip(Pairs(*found), alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_model_in_training_is_left_in_training(digits):
    tokenizer = build_tokenizer(digits["train"])
    model = build_model(text_config(digits["train"], "", "crossmodal"), tokenizer).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    embed_texts(model, ["a seven", "\u200b"], tokenizer, 12, CPU)
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_images_without_a_caption_are_left_out_of_retrieval_alone():
    pairs = Pairs(torch.eye(4), torch.eye(4)[[3, 1, 1]], torch.tensor([3, 1, 1]), torch.tensor([0, 1, 2, 3]))
    own = pairs.captioned()
    assert torch.equal(own.images, torch.eye(4)[[1, 3]]) and own.image_of_text.tolist() == [1, 0, 0] and own.labels.tolist() == [1, 3]
    report = image_text_report(pairs, torch.eye(4))
    assert report["retrieval"]["as they are"]["num_images"] == 2 and report["zero_shot"]["as they are"]["num_images"] == 4
    assert report["retrieval"]["as they are"]["text_to_image/R@1"] == report["zero_shot"]["as they are"]["top_1"] == 1


def trained(config):
    """Train, then evaluate; the run directory."""
    from vicreg_mm import distributed
    from vicreg_mm.pretrain import evaluate_pairs, open_evaluation, pretrain

    device = distributed.start()
    loaders = open_evaluation(config)
    run = pretrain(config, device)
    evaluate_pairs(config, run, loaders[1], device)
    return str(run)


@pytest.mark.long
def test_a_digits_caption_finds_its_digit_far_above_chance(digits, tmp_path):
    report = after_training(digits, tmp_path, steps=200, batch=64)
    assert report["zero_shot"]["as they are"]["top_1_low"] > 0.3
    assert report["retrieval"]["centred"]["text_to_image/R@10"] > 3 * report["retrieval"]["chance"]["text_to_image/R@10"]


def after_training(digits, tmp_path, **changes):
    evaluation = configs.EvaluationConfig(train=digits["train"], test=digits["test"], templates="builtin:digits")
    changes |= {"evaluation": evaluation, "optim__lr": 1e-3, "text__depth": 2, "text__context": 16, "input__slots": 8}
    config = text_config(digits["train"], tmp_path / "run", "crossmodal", **changes)
    run_ranks(trained, 1, config, timeout_seconds=400)
    return json.loads(Path(config.run, "image_text.json").read_text())


def test_a_run_ends_with_retrieval_and_zero_shot_beside_chance(digits, tmp_path):
    report = after_training(digits, tmp_path, steps=2)
    zero_shot = report["zero_shot"]["as they are"]
    assert zero_shot["num_images"] == 297 and zero_shot["num_classes"] == 10 and zero_shot["top_1_chance"] == pytest.approx(0.1)
    assert set(report["retrieval"]) == {"chance", "as they are", "centred"}
    assert {row["num_texts"] for row in report["retrieval"].values()} == {891}
    table = image_text_table(report)
    assert "chance" in table and "zero-shot, as they are: " in table and "297 images of 10 classes" in table
