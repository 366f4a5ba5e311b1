"""The model card of a merged student: training recipe, measured results and licence terms."""

from pathlib import Path

from kd.recipe import parse_json_list
from kd.run.finished import read_json

RECIPE_KEYS = (
    *("teacher", "student", "model", "data", "quantization", "lora_rank", "lora_alpha"),
    *("divergence", "soft_weight", "temperature", "max_length", "learning_rate"),
    *("lr_scheduler_type", "global_batch_size", "seed"),
)
EPOCHS, STEPS = "epochs trained", "optimizer steps"
REMEDY = "restore the file, or give another adapter"


def read_run(adapter: str) -> dict:
    """The recipe in run.json, in the adapter's folder or its parent, and how long it was trained.

    {} without a run.json. Raises ValueError for a damaged file.
    """
    for folder in (Path(adapter), Path(adapter).resolve().parent):
        recipe = read_json(folder / "run.json", REMEDY).get("recipe")
        if recipe:
            best = bool(recipe.get("load_best_model_at_end")) and folder == Path(adapter)
            return recipe | trained_length(Path(adapter), best)
    return {}


def trained_length(adapter: Path, best: bool) -> dict[str, float]:
    """The epochs and optimizer steps that an adapter was trained for; {} if that is unknown.

    `best`: it is that of the best step, not that of the last one.
    """
    state = read_json(adapter / "trainer_state.json", REMEDY)
    last = state.get("global_step")
    if not last:
        return {}
    steps = (best and state.get("best_global_step")) or last
    return {EPOCHS: round(state["epoch"] * steps / last, 4), STEPS: steps}


def model_card(
    folder: str, base: str, run: dict, measured: dict[str, dict], results: str | None
) -> str:
    """The text of README.md, with a table of the files in `results` that measured this model."""
    teacher = run.get("teacher")
    data = [source["path"] for source in parse_json_list("data", run.get("data"))]
    length = (EPOCHS, STEPS) if EPOCHS in run else ("num_train_epochs", "max_steps")
    keys = (*RECIPE_KEYS, *length)
    recipe = [f"| {key} | {run[key]} |" for key in keys if run.get(key) not in (None, "")]
    unknown = "Unknown: the adapter's folder has no run.json."
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: transformers",
        "tags: [distillation]" if teacher else "tags: [fine-tuning]",
        "---",
        f"# {Path(folder).name}",
        f"`{base}` with a LoRA adapter merged into its unquantized weights"
        + (f", distilled from `{teacher}`." if teacher else "."),
        "## Training",
        "\n".join(["| key | value |", "| --- | --- |", *recipe]) if recipe else unknown,
        "## Results",
        results_table(folder, results) if results else "Not measured.",
        *(part["text"] for part in measured.values()),
        "## Licence",
        licence_line(base, teacher, data),
    ]
    return "\n\n".join(lines).replace("---\n\n", "---\n", 1) + "\n"


def licence_line(base: str, teacher: str | None, data: list[str]) -> str:
    """One sentence that names everything whose terms bind the user."""
    sources = [f"its base `{base}`"]
    if teacher:
        sources.append(
            f"its teacher `{teacher}` (some licences forbid training other models on the outputs)"
        )
    sources += [f"its data `{path}`" for path in dict.fromkeys(data)]
    return f"This model is subject to the terms of {', '.join(sources)}. Read them before sharing."


def results_table(folder: str, results: str) -> str:
    """A table of the overall metrics in all files of `results` about this folder's model."""
    rows = ["| metric | value | file |", "| --- | --- | --- |"]
    for file in sorted(Path(results).rglob("*.json")):
        found = read_json(file, "remove it and measure again")
        model = found.get("settings", {}).get("model")
        if model is None or Path(model).resolve() != Path(folder).resolve():
            continue
        metrics = dict(found.get("overall", {}))
        for task, result in found.get("tasks", {}).items():
            metrics |= {f"{task} {name}": value for name, value in result["metrics"].items()}
        for name, value in metrics.items():
            if isinstance(value, int | float):
                rows.append(f"| {name} | {value:.4g} | {file} |")
    return "\n".join(rows) if len(rows) > 2 else f"Not measured: no file in {results} names it."
