"""The README.md of an exported model, made from its run directory: what it is, how to load it, what it was measured at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vicreg_mm import checkpoint
from vicreg_mm import config as configs
from vicreg_mm.evaluation.pairs import image_text_table
from vicreg_mm.evaluation.report import evaluation_table

# totals; those of a view or an edge have one more slash
SHOWN = ("epoch", "lr", "loss/", "stats/std_mean", "stats/rank", "stats/collapsed_dims", "stats/batch_accuracy")


def model_card(run: Path, library: str, usage: str) -> str:
    """Markdown. usage: Python that loads and applies the model.

    Raises ValueError for a file of the run that is damaged; what a run has not is left out.
    """
    config = configs.load(run / "config.json")
    named = (("evaluation.json", evaluation_table), ("image_text.json", image_text_table))
    tables = [_table(run / name, table) for name, table in named if (run / name).exists()]
    texts = f" and a text {config.text.encoder}" if library == "open_clip" else ""
    sections = [
        f"---\nlibrary_name: {library}\ntags: [vicreg, self-supervised]\n---",
        f"# {config.name}",
        f"Image encoder `{config.encoder.name}`{texts}, pretrained with the objective `{config.objective.name}` by vicreg_mm.",
        f"## Use\n\n```python\n{usage}\n```\n\nFOLDER is where this file lies.",
        "## Training\n\n| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in _facts(run, config).items()),
    ]
    if tables:
        sections.append("## Evaluation\n\n" + "\n\n".join(f"```\n{table}\n```" for table in tables))
    return "\n\n".join(sections) + "\n"


def _facts(run: Path, config: configs.RunConfig) -> dict[str, Any]:
    """Rows of the table: name -> value."""
    facts: dict[str, Any] = {"recipe": config.name + (" (smoke profile)" if config.smoke else "")}
    saved = checkpoint.existing(run)
    data = checkpoint.read_state(saved[-1])["data"] if saved else {}
    if "num_samples" in data:
        facts["images"] = f"{data['num_samples']:,}"
    facts |= {
        "views": f"{config.input.views}, {config.input.image_size} px",
        "objective": ", ".join([config.objective.name, *(f"{key} {value}" for key, value in config.objective.options.items())]),
        "batch": f"{config.batch:,}",
        "precision": config.engine.precision,
        "seed": config.seed,
    }
    last = _last_metrics(run / "metrics.jsonl")
    if last:
        facts["steps"] = f"{last['step']:,}"
        facts |= {
            key: f"{value:.6g}"
            for key, value in last.items()
            if key.startswith(SHOWN) and key.count("/") < 2 and isinstance(value, int | float)
        }
    return facts


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last line of metrics.jsonl that is whole; a kill may have cut one."""
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    try:
        return json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"the last line of {path} is no metrics: {error}; remove that line") from error


def _table(path: Path, table: Callable[[Any], str]) -> str:
    try:
        return table(json.loads(path.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"cannot make a table of {path}: {error!r}; remove it to export without it") from error
