"""Studies: what a cell changes, how its runs are made and resumed, and what stands in the table."""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import tiny_config
from vicreg_mm import config as configs
from vicreg_mm import objectives, study
from vicreg_mm.command_line import parse
from vicreg_mm.study import processes, program, table
from vicreg_mm.study.definition import Study, StudyConfig, changed, chosen, one_at_a_time, two_view_objectives, value_of

ROOT = Path(__file__).parent.parent
BASE = configs.RunConfig(
    name="tiny", objective=configs.ObjectiveConfig(options={"mu": 25.0}), expander=configs.ExpanderConfig(widths=(512, 512, 256)), batch=64
)


# Cells ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch": 32}, ["--batch", "32"]),
        ({"optim.weight_decay": 0.4}, ["--optim.weight_decay", "0.4"]),
        ({"expander.widths": [64, 32]}, ["--expander.widths", "64", "32"]),
        ({"objective.options.nu": 2.0, "objective.options.mu": 0.5}, ["--objective.options.nu=2.0", "--objective.options.mu", "0.5"]),
        ({"objective.name": "simclr"}, ["--objective.name", "simclr"]),
        ({"objective.name": "simclr", "objective.options.temperature": 0.2},
         ["--objective.name", "simclr", "--objective.options.temperature", "0.2"]),
        ({"objective.name": "vicreg"}, ["--objective.name", "vicreg"]),
    ],
)  # fmt: skip
def test_a_cells_changes_are_those_of_the_command_line(changes, words):
    base = dataclasses.replace(BASE, input=configs.InputConfig(shards="x"))
    assert changed(base, changes) == parse(base, words) != base or words[-1] == "vicreg"


@pytest.mark.parametrize("name", ["optim.rate", "optim", "objective.options", "temperature", "a.b.c"])
def test_a_change_of_what_does_not_exist_is_refused(name):
    with pytest.raises(configs.ConfigError, match=rf"unknown setting '{name}'; (known|closest)"):
        changed(BASE, {name: 1})


def test_factors_are_varied_one_at_a_time_by_multiples_of_the_base():
    factors = {
        "mu": ("objective.options.mu", (0.4, 1.0, 2.0)),
        "gamma": ("objective.options.gamma", (0.5,)),
        "width": ("expander.widths", (0.5,)),
        "weighting": ("objective.options.weighting", ("fixed", "budget")),
    }
    assert one_at_a_time(BASE, factors) == {
        "base": {},
        "mu=10": {"objective.options.mu": 10.0},
        "mu=50": {"objective.options.mu": 50.0},
        "gamma=0.5": {"objective.options.gamma": 0.5},
        "width=128": {"expander.widths": [256, 256, 128]},
        "weighting=budget": {"objective.options.weighting": "budget"},
    }


def test_another_batch_sees_as_many_images():
    factors = {"batch": ("batch", (0.25, 2.0))}
    assert one_at_a_time(BASE, factors) == {"base": {}, "batch=16": {"batch": 16}, "batch=128": {"batch": 128}}  # by epochs
    cells = one_at_a_time(dataclasses.replace(BASE, steps=300), factors)
    assert cells == {"base": {}, "batch=16": {"batch": 16, "steps": 1200}, "batch=128": {"batch": 128, "steps": 150}}


def test_an_option_that_the_objective_does_not_take_cannot_be_varied():
    base = changed(BASE, {"objective.name": "simclr"})
    with pytest.raises(configs.ConfigError, match=r"objective 'simclr' has no option mu to vary; it has: temperature"):
        one_at_a_time(base, {"mu": ("objective.options.mu", (2.0,))})
    assert value_of(changed(BASE, {"objective.name": "vicreg+simclr"}), "objective.options.mu") == 25.0


def test_names_are_chosen_from_those_that_are_known():
    assert chosen("factors", ("b", "a"), "abc") == ["b", "a"]
    assert chosen("factors", (), "abc") == ["a", "b", "c"]
    with pytest.raises(configs.ConfigError, match="--factors: unknown name 'x'; known: a, b, c"):
        chosen("factors", ("a", "x"), "abc")


def test_objectives_of_two_views_are_found_by_what_they_need(monkeypatch, capsys):
    def third_party():
        """Another package's."""
        return objectives.build("vicreg")

    def broken():
        raise ValueError("it lacks a licence")

    for name, builder in (("third_party", third_party), ("broken", broken)):
        monkeypatch.setitem(objectives.OBJECTIVES._builders, name, builder)
    found = two_view_objectives()
    assert {"vicreg", "adaptive", "third_party"} <= set(found)
    assert not {"multicrop", "crossmodal", "clip", "siglip", "broken"} & set(found)
    assert "left out, objective 'broken': it lacks a licence" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cells": {"a b": {}}}, "cell 'a b': its name is that of a folder"),
        ({"cells": {"a": {"objective.options.temperature": 1}}}, "cell 'a': unknown option of objective 'vicreg' 'temperature'"),
        ({"cells": {"a": {"batch": 1}}}, "cell 'a': batch is 1"),
        ({"cells": {}}, "tiny has no cells"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (1, 1)}, "seeds is 1 1; one or more different ones"),
        ({"seeds": (-1,)}, "seed is -1"),
    ],
)
def test_what_no_run_can_have_is_refused_before_the_first(changes, message):
    with pytest.raises(configs.ConfigError, match=message):
        dataclasses.replace(Study(BASE, {"a": {}}, (0,), ()), **changes).check()


# The table --------------------------------------------------------------------------------------------------------------


def write_run(run, values, accuracy=None, parameters=None):
    """A finished run as a pretraining leaves it: 20 lines of metrics, the last two of which count."""
    run.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step, "perf/images_per_second": 64.0 * step, "perf/host_memory_gib": 1 + step / 10} for step in range(1, 21)]
    for line, shift in ((lines[-3], 1000.0), (lines[-2], -0.5), (lines[-1], 0.5)):
        line |= {name: value + shift for name, value in values.items()}
    lines.insert(-1, {"step": 20, "epoch": 2.0, "mean/loss/total": 99.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "encoder.safetensors").write_bytes(b"")
    if accuracy is not None:
        rows = [{"encoder": "raw pixels", "knn": 0.5, "linear": 0.25, "one_label": 0.1}]
        rows += [{"encoder": "pretrained encoder", "knn": accuracy, "linear": accuracy / 2, "one_label": accuracy / 4}]
        (run / "evaluation.json").write_text(json.dumps(rows))
    if parameters is not None:
        folder = run / "checkpoints" / "step-00000020"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        save_file({"a.weight": torch.zeros(3, 5), "a.bias": torch.zeros(5), "a.mean": torch.zeros(7)}, folder / "model.safetensors")
        save_file({f"a.{name}/{s}": torch.zeros(1) for name in ("weight", "bias") for s in "mv"}, folder / "optimizer.safetensors")


def test_a_runs_values_are_means_over_its_last_tenth_and_what_it_cost(tmp_path):
    metrics = {"loss/covariance": 5.0, "stats/covariance_floor": 2.0, "stats/collapsed_dims": 0.5, "loss/variance": 0.75}
    write_run(tmp_path / "a", metrics, accuracy=0.8, parameters=20)
    values = table.read_run(tmp_path / "a", batch=64, results="evaluation.json")
    assert values == pytest.approx({
        "covariance": 5.0, "floor": 2.0, "redundancy": 3.0, "collapsed": 50.0, "variance": 0.75, "knn": 80.0, "linear": 40.0,
        "one_label": 20.0, "seconds": 1 / 10.5, "memory": 3.0, "parameters": 20e-6,
    })  # fmt: skip
    assert "knn" not in table.read_run(tmp_path / "a", batch=64, results=None)


def test_a_damaged_run_says_which_and_what_to_do(tmp_path):
    write_run(tmp_path / "a", {}, accuracy=0.8)
    (tmp_path / "a" / "evaluation.json").write_text("[{")
    with pytest.raises(ValueError, match=r"a cannot be read: JSONDecodeError.*; remove it to run it again"):
        table.read_run(tmp_path / "a", 64, "evaluation.json")


def test_the_spread_is_the_standard_deviation_of_a_sample():
    assert table.mean_and_std([1.0, 2.0, 6.0]) == (3.0, statistics.stdev([1.0, 2.0, 6.0]))
    assert table.mean_and_std([3.0]) == (3.0, None)


def test_the_table_shows_means_and_spreads_of_the_columns_that_any_run_has():
    cells = {"all": [{"knn": 90.0, "std": 0.5, "memory": 1.0}, {"knn": 94.0, "std": 0.7, "memory": 2.0}], "none": [{"knn": 10.0}]}
    rows = table.table(cells, 2, ("std", "rank", "memory", "knn"))
    assert rows == [
        ["cell", "runs", "std", "memory, GiB", "kNN, %"],
        ["all", "2", "0.6 ± 0.14", "1.5", "92.0 ± 2.8"],
        ["none", "1 of 2", "-", "-", "10.0"],
    ]
    assert table.fixed_width(rows).splitlines()[::2] == [
        "cell     runs          std   memory, GiB       kNN, %",
        "all         2   0.6 ± 0.14           1.5   92.0 ± 2.8",
    ]
    assert table.markdown(rows).splitlines()[1:3] == ["| --- | --- | --- | --- | --- |", "| all | 2 | 0.6 ± 0.14 | 1.5 | 92.0 ± 2.8 |"]


# Processes --------------------------------------------------------------------------------------------------------------

ALONE = processes.Resources(jobs=1, ranks=1, workers=1, gpus=())


def tasks_of(folder, **programs):
    return [processes.Task(name, ("-c", textwrap.dedent(code)), folder / f"{name}.log") for name, code in programs.items()]


def outcomes(tasks, resources=ALONE):
    """What became of each task, in the order of their ends."""
    found = {}
    processes.run_all(tasks, resources, lambda task: None, lambda task, error, seconds: found.update({task.name: error}))
    return found


def test_a_run_that_fails_is_one_error_and_the_others_go_on(tmp_path):
    found = outcomes(tasks_of(
        tmp_path,
        wrong="import sys; print('p.py: error: the loss is nan'); print('a warning'); sys.exit(2)",
        crashed="raise RuntimeError('no room')",
        killed="import os; os.kill(os.getpid(), 9)",
        silent="import sys; sys.exit(7)",
        fine="print('done')",
    ))  # fmt: skip
    assert list(found.items()) == [
        ("wrong", "the loss is nan"), ("crashed", "RuntimeError: no room"), ("killed", "killed by SIGKILL"), ("silent", "exit code 7"),
        ("fine", None),
    ]  # fmt: skip
    assert (tmp_path / "fine.log").read_text() == "done\n"


def test_the_error_is_of_the_last_attempt(tmp_path):
    outcomes(tasks_of(tmp_path, a="import sys; sys.exit('p.py: error: first')"))
    assert outcomes(tasks_of(tmp_path, a="import sys; sys.exit(3)")) == {"a": "exit code 3"}
    assert "first" in (tmp_path / "a.log").read_text()


def test_as_many_runs_as_jobs_go_at_a_time(tmp_path):
    """Two runs that wait for each other end only if they go together; a third does not begin beside them."""
    meet = """
        import os, pathlib, sys, time
        here = pathlib.Path({folder!r})
        begun = len(list(here.glob("*.log"))) - len(list(here.glob("*.end")))
        (here / "{name}.here").touch()
        limit = time.monotonic() + 60
        while not (here / "{other}.here").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        (here / "{name}.end").touch()
        sys.exit(begun > 2)
    """
    pairs = {"a": "b", "b": "a", "c": "a", "d": "b"}
    code = {name: meet.format(folder=str(tmp_path), name=name, other=other) for name, other in pairs.items()}
    assert outcomes(tasks_of(tmp_path, **code), dataclasses.replace(ALONE, jobs=2)) == dict.fromkeys(pairs)


def test_a_signal_lets_the_runs_save_and_nothing_new_begins(tmp_path):
    saves = """
        import pathlib, signal, sys, time
        def save(*_): pathlib.Path({folder!r}, "saved").touch(); sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        pathlib.Path({folder!r}, "ready").touch()
        time.sleep(60)
    """
    begun, ended = [], []

    def begin(task):
        begun.append(task.name)
        if task.name == "b":  # `a` is at work
            while not (tmp_path / "ready").exists():
                pass
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    tasks = tasks_of(tmp_path, a=saves.format(folder=str(tmp_path)), b="import time; time.sleep(60)", c="")
    with pytest.raises(SystemExit) as stopped:
        processes.run_all(tasks, dataclasses.replace(ALONE, jobs=2), begin, lambda *args: ended.append(args))
    assert stopped.value.code == 128 + signal.SIGTERM and (tmp_path / "saved").exists()
    assert begun == ["a", "b"] and not ended and signal.getsignal(signal.SIGTERM) is before


def test_a_run_has_its_share_of_the_machine_and_nothing_of_our_own_launcher(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = processes.Resources(jobs=2, ranks=2, workers=1, gpus=("0", "1", "2", "3")).environment(slot=1)
    assert (found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("3", "2,3")
    assert not {"RANK", "MASTER_PORT"} & set(found)
    assert processes.Resources(jobs=3, ranks=1, workers=8, gpus=("5",)).environment(slot=2)["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert ALONE.environment(0)["OMP_NUM_THREADS"] == "7"


def test_several_ranks_are_started_by_the_launcher_each_run_at_its_own_port():
    resources = processes.Resources(jobs=2, ranks=4, workers=1, gpus=())
    first, second = (resources.command(["recipe.py", "run"]) for _ in range(2))
    assert first[-4:] == ["--num_gpus", "4", "recipe.py", "run"] and "deepspeed.launcher.runner" in first
    assert first[first.index("--master_port") + 1] != second[second.index("--master_port") + 1]
    assert ALONE.command(["recipe.py", "run"]) == [sys.executable, "recipe.py", "run"]


# The program ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """Runs that take no time. `made`: which were made; `broken`: those that fail."""
    monkeypatch.chdir(tmp_path)
    made, broken = [], set()

    def run_all(tasks, resources, begun, ended):
        for task in tasks:
            begun(task)
            made.append(task.name)
            config = program._run_of(list(task.words[2:]))
            if task.name not in broken:
                write_run(Path(config.run), {"loss/total": config.seed + config.objective.options.get("mu", 0)}, accuracy=0.5)
                configs.save(config, Path(config.run) / "config.json")
            ended(task, "boom" if task.name in broken else None, 1.0)

    monkeypatch.setattr(program, "run_all", run_all)
    monkeypatch.setattr(program, "check_data", lambda study: None)
    return made, broken


CONFIG = StudyConfig(name="tiny", input=configs.InputConfig(shards="x"), seeds=(0, 2))
CELLS = {"ten": {"objective.options.mu": 10.0}, "twenty": {"objective.options.mu": 20.0}}
SETS = ["--evaluation.train", "x", "--evaluation.test", "y"]


def start(*words, cells=None):
    study.main(CONFIG, lambda config: CELLS if cells is None else cells, ("loss", "std", "linear"), [*SETS, *words])


def refused(capsys, *words, **kwargs):
    """The one line that a study ends with."""
    with pytest.raises(SystemExit) as stop:
        start(*words, **kwargs)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_study_ends_with_its_table_on_the_screen_and_on_disk(faked, capsys):
    start()
    assert faked[0] == ["ten-seed0", "twenty-seed0", "ten-seed2", "twenty-seed2"]
    out = capsys.readouterr().out
    assert "twenty      2   21 ± 1.4   25.0 ± 0.0" in out and "raw pixels kNN 50.0, linear 25.0" in out
    kept = json.loads(Path("runs/tiny-001/study.json").read_text())
    assert kept["table"]["ten"]["loss"] == {"mean": 11.0, "std": pytest.approx(2**0.5)}
    assert (kept["seeds"], kept["cells"], len(kept["runs"])) == ([0, 2], CELLS, 4)
    assert "| twenty | 2 | 21 ± 1.4 | 25.0 ± 0.0 |" in Path("runs/tiny-001/table.md").read_text()
    ordinary = configs.load(Path("runs/tiny-001/ten-seed2/config.json"))
    expected = parse(CONFIG.base(), [*SETS, "--objective.options.mu", "10.0", "--seed", "2", "--run", "runs/tiny-001/ten-seed2"])
    assert ordinary == expected


def test_a_failed_run_is_an_entry_and_is_tried_again_on_resume(faked, capsys):
    made, broken = faked
    broken.add("ten-seed2")
    start()
    out = capsys.readouterr().out
    assert "ten      1 of 2" in out and "failed: ten, seed 2: boom" in out
    broken.clear()
    made.clear()
    start("--resume")
    assert made == ["ten-seed2"]
    out = capsys.readouterr().out
    assert "ten         2" in out and "failed" not in out and not Path("runs/tiny-002").exists()


def test_a_study_of_which_no_run_ends_well_is_an_error(faked, capsys):
    faked[1].update({"ten-seed0", "ten-seed2", "twenty-seed0", "twenty-seed2"})
    assert refused(capsys).endswith("no run of runs/tiny-001 could be finished; the first said: boom")


def test_a_resumed_study_may_have_got_more_cells_and_seeds(faked):
    start()
    faked[0].clear()
    start("--resume", "--seeds", "0", "1", "2", cells={**CELLS, "thirty": {"objective.options.mu": 30.0}})
    assert sorted(faked[0]) == ["ten-seed1", "thirty-seed0", "thirty-seed1", "thirty-seed2", "twenty-seed1"]


@pytest.mark.parametrize(
    "words, cells, message",
    [
        (["--batch", "64"], CELLS, "started with another configuration: batch: 2048 -> 64"),
        (["--evaluation.test", "z"], CELLS, "another study: evaluation.test: 'y' -> 'z'; repeat its options with --resume"),
        (["--input.shards", "z"], CELLS, "another study: input.shards: 'x' -> 'z'"),
        (["--seeds", "0"], CELLS, "another study: seed 2: left out"),
        ([], {"ten": {"objective.options.mu": 11.0}}, r"cell ten: {'objective.options.mu': 10.0} -> {'objective.options.mu': 11.0}; cell"),
        ([], {"ten": CELLS["ten"]}, "cell twenty: {'objective.options.mu': 20.0} -> left out"),
    ],
)
def test_another_study_is_not_mixed_with_the_runs_of_the_first(faked, capsys, words, cells, message):
    start()
    before = Path("runs/tiny-001/study.json").read_text()
    assert message in refused(capsys, "--resume", *words, cells=cells)
    assert Path("runs/tiny-001/study.json").read_text() == before


def test_a_run_of_another_configuration_in_a_cells_place_is_refused(faked, capsys):
    start()
    other = configs.load(Path("runs/tiny-001/ten-seed0/config.json"))
    configs.save(dataclasses.replace(other, batch=64), Path("runs/tiny-001/ten-seed0/config.json"))
    assert "ten-seed0 is a run of another configuration (batch: 64 -> 2048); remove it to run it again" in refused(capsys, "--resume")


def test_one_study_at_a_time_is_at_work_in_a_folder(faked, capsys):
    start()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print('held', flush=True); input()",
         "runs/tiny-001/.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    assert "runs/tiny-001 is at work: another process" in refused(capsys, "--resume")
    holder.communicate(b"\n")
    start("--resume")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "3"], "--seed has no effect on a study; give --seeds"),
        (["--objective.options.mu", "3"], "--objective.options.mu has no effect: every cell of tiny sets it"),
        (["--jobs", "0"], "jobs is 0; at least one run at a time is needed"),
        (["--job", "2"], "unknown option --job; closest: --jobs"),
    ],
)
def test_an_option_that_does_nothing_is_refused_and_leaves_nothing(faked, capsys, words, message):
    assert message in refused(capsys, *words)
    assert not Path("runs").exists()


def test_options_of_an_objective_that_no_cell_has_are_refused(faked, capsys):
    cells = {"simclr": {"objective.name": "simclr"}}
    message = "--objective.options.mu has no effect: it is of objective 'vicreg', which no cell has"
    assert message in refused(capsys, "--objective.options.mu", "3", cells=cells)
    start("--objective.options.mu", "3", cells={"vicreg": {"objective.name": "vicreg"}, **cells})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 4096}, "cell 'a': .*4,?096"),
        ({"steps": 2, "optim.warmup_epochs": 1.0}, "cell 'a': the warm-up of 46 steps is not shorter than the run of 2"),
        ({"evaluation.train": "nowhere", "evaluation.test": "elsewhere"}, "cell 'a': .*nowhere"),
    ],
)
def test_data_with_which_no_run_can_begin_are_named_before_the_first(digits, changes, message):
    base = tiny_config(digits["train"], "")
    program.check_data(Study(base, {"a": {}}, (0,), ()))
    with pytest.raises(configs.ConfigError, match=message):
        program.check_data(Study(base, {"a": changes}, (0,), ()))


def test_on_the_built_in_digits_the_users_options_act_on_the_studys_own_profile(faked, capsys):
    recipe = StudyConfig(name="tiny", seeds=(0,))
    study.main(recipe, lambda config: {"base": {}}, ("loss",), ["--batch", "16"])
    config = configs.load(Path("runs/tiny-001/base-seed0/config.json"))
    assert (config.input.shards, config.input.views, config.batch, config.smoke) == (configs.BUILTIN_DIGITS, "digits", 16, False)
    assert "| Smoke profile of tiny" in capsys.readouterr().out
    study.main(recipe, lambda config: {"base": {}}, ("loss",), ["--input.views", "crop"])
    assert configs.load(Path("runs/tiny-002/base-seed0/config.json")).input.views == "crop"


@pytest.mark.launcher
def test_a_study_makes_ordinary_runs_in_processes_of_their_own(tmp_path, digits):
    """Two cells at a time, one of which diverges."""
    base = dataclasses.replace(tiny_config(digits["train"], ""), name="tiny", steps=2)
    script = tmp_path / "tiny.py"
    script.write_text(
        "from vicreg_mm import config as configs\nfrom vicreg_mm.study import StudyConfig, main\n"
        f"base = configs.from_dict({configs.to_dict(base)!r})\n"
        "config = StudyConfig(**{**vars(base), 'seeds': (1,), 'jobs': 2})\n"
        "cells = {'fine': {}, 'wild': {'optim.lr': 1e30, 'optim.name': 'sgd'}}\n"
        "if __name__ == '__main__':\n    main(config, lambda config: cells, ('loss', 'parameters', 'seconds'))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "tiny-001"
    assert "failed: wild, seed 1: the loss is nan at step 1" in done.stdout
    assert (folder / "fine-seed1" / "encoder.safetensors").exists() and configs.load(folder / "fine-seed1" / "config.json").seed == 1
    values = json.loads((folder / "study.json").read_text())["table"]["fine"]
    assert values["loss"]["mean"] > 0 and 0.1 < values["parameters"]["mean"] < 1
