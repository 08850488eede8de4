"""What is measured during training: it leaves the training as it is, at every ZeRO stage, and equals what is measured afterwards."""

import json
from pathlib import Path

import pytest

from tests.tiny import metrics
from vicreg_mm import config as configs

from .ranks import run_ranks
from .test_image_text_ranks import text_config


def train_all(given):
    """On each rank: train every configuration, and measure as the program does at the end."""
    from vicreg_mm import distributed
    from vicreg_mm.pretrain import evaluate, evaluate_pairs, open_evaluation, open_pair_evaluation, pretrain

    device = distributed.start()
    for config in given:
        loaders, pairs = open_evaluation(config), open_pair_evaluation(config)
        run = pretrain(config, device, loaders, pairs)
        if config.evaluation.every_epochs and config.engine.zero_stage:
            evaluate(config, run, loaders, device)
            evaluate_pairs(run, pairs, device)


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """(ZeRO stage, measured or not) -> configuration of a run of 4 steps on two ranks; every second is measured."""
    folder = tmp_path_factory.mktemp("online")
    found = {}
    for stage in (0, 3):
        for every in (0.0, 2 / 46):
            test = configs.EvaluationConfig(
                train=digits["train"], test=digits["test"], limit=256, templates="builtin:digits", every_epochs=every
            )
            changes = {"steps": 4, "engine__zero_stage": stage, "expander__projection": 16, "evaluation": test}
            run = folder / f"{stage} {every > 0}"
            found[stage, every > 0] = text_config(digits["train"], run, "crossmodal", **changes)
    run_ranks(train_all, 2, list(found.values()), timeout_seconds=400)
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_measuring_does_not_move_the_training(runs, stage):
    bare, measured = (metrics(runs[stage, online].run) for online in (False, True))
    assert list(bare) == [1, 2, 3, 4] and bare == measured
    assert not metrics(runs[stage, False].run, "eval/knn")


def test_the_last_measurement_is_that_of_the_end(runs):
    run = Path(runs[3, True].run)
    assert list(metrics(run, "eval/knn")) == [2, 4]
    reports = json.loads((run / "image_text.json").read_text())
    for output, report in reports.items():
        retrieval, zero_shot = report["retrieval"]["as they are"], report["zero_shot"]["as they are"]
        for name, value in {
            "rsum": retrieval["rsum"],
            "zero_shot/top_1": zero_shot["top_1"],
            "modality_gap": report["modality_gap"],
        }.items():
            measured = metrics(run, f"eval/{output}/{name}")
            assert measured[4] == pytest.approx(value, rel=1e-3)
        assert metrics(run, f"eval/{output}/modality_gap")[2] != metrics(run, f"eval/{output}/modality_gap")[4]
    rows = {row["encoder"]: row["knn"] for row in json.loads((run / "evaluation.json").read_text())}
    assert metrics(run, "eval/knn")[4] == pytest.approx(rows["pretrained encoder"], abs=2e-3)


def test_a_period_without_a_held_out_set_is_refused(digits):
    config = text_config(digits["train"], "", "crossmodal", evaluation=configs.EvaluationConfig(every_epochs=1.0))
    with pytest.raises(configs.ConfigError, match=r"evaluation.every_epochs 1.0 has no effect: evaluation.test is empty; leave it out"):
        configs.check(config)
