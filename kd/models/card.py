"""The model card of a merged student: how it was made, what was measured, whose terms it is under."""

import json
from pathlib import Path

from kd.recipe import parse_json_list

SHOWN = (
    *("teacher", "student", "model", "data", "quantization", "lora_rank", "lora_alpha"),
    *("divergence", "soft_weight", "temperature", "max_length", "learning_rate"),
    *("lr_scheduler_type", "num_train_epochs", "max_steps", "global_batch_size", "seed"),
)


def read_run(adapter: str) -> dict:
    """The recipe of run.json beside an adapter or above its checkpoint; {} where there is none."""
    for folder in (Path(adapter), Path(adapter).resolve().parent):
        file = folder / "run.json"
        if file.is_file():
            return json.loads(file.read_text())["recipe"]
    return {}


def model_card(
    folder: str, base: str, run: dict, measured: dict[str, dict], results: str | None
) -> str:
    """README.md: with a table of what the files in `results` say of this folder's model."""
    teacher = run.get("teacher")
    data = [source["path"] for source in parse_json_list("data", run.get("data"))]
    recipe = [f"| {key} | {run[key]} |" for key in SHOWN if run.get(key) not in (None, "")]
    unknown = "Not known: there is no run.json beside the adapter."
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: transformers",
        "tags: [distillation]" if teacher else "tags: [fine-tuning]",
        "---",
        f"# {Path(folder).name}",
        f"`{base}` with a LoRA adapter merged into its unquantised weights"
        + (f", distilled from `{teacher}`." if teacher else "."),
        "## Training",
        "\n".join(["| key | value |", "| --- | --- |", *recipe]) if recipe else unknown,
        "## Measured",
        results_table(folder, results) if results else "Not run.",
        *(part["text"] for part in measured.values()),
        "## Licence",
        licence_line(base, teacher, data),
    ]
    return "\n\n".join(lines).replace("---\n\n", "---\n", 1) + "\n"


def licence_line(base: str, teacher: str | None, data: list[str]) -> str:
    """What binds the user; the terms themselves are on each one's own page."""
    sources = [f"its base `{base}`"]
    if teacher:
        sources.append(
            f"its teacher `{teacher}` (some forbid to train other models on what theirs say)"
        )
    sources += [f"its data `{path}`" for path in dict.fromkeys(data)]
    return (
        "This model is under the terms of "
        + ", ".join(sources)
        + ". Read them before you share it."
    )


def results_table(folder: str, results: str) -> str:
    """Overall figures of every file of which this folder is the model, with the file."""
    rows = ["| figure | value | from |", "| --- | --- | --- |"]
    for file in sorted(Path(results).rglob("*.json")):
        found = json.loads(file.read_text())
        model = found.get("settings", {}).get("model") if isinstance(found, dict) else None
        if model is None or Path(model).resolve() != Path(folder).resolve():
            continue
        figures = dict(found.get("overall", {}))
        for task, result in found.get("tasks", {}).items():
            figures |= {f"{task} {name}": value for name, value in result["metrics"].items()}
        for name, value in figures.items():
            if isinstance(value, int | float):
                rows.append(f"| {name} | {value:.4g} | {file} |")
    return "\n".join(rows) if len(rows) > 2 else f"Not run: nothing in {results} is of this model."
