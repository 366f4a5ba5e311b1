"""Recipes of a small pipeline: a teacher, its answers, and two students."""

import json
from pathlib import Path


def write_recipes(models: Path, work: Path) -> Path:
    """Recipes of a teacher that learns short answers, because only finished answers become rows."""
    folder = work / "recipes"
    folder.mkdir(parents=True)
    words = ["lists", "keys", "files", "trees", "heaps", "loops", "rows", "names", "bytes"]
    asked = [{"role": "user", "content": f"What are {word}?"} for word in words]
    told = [{"role": "assistant", "content": f"Just {word}."} for word in words]
    rows = [{"messages": list(row)} for row in zip(asked, told, strict=True)]
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (work / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": m["content"]}) for m in asked)
    )
    train = "global_batch_size: 4\nlogging_steps: 1\nsave_steps: 500\nlearning_rate: 0.02\n"
    data = f"data:\n  - {{path: {work}/rows.jsonl}}\n"
    answers = f"data:\n  - {{path: {work}/runs/answers/train.jsonl}}\n"
    merged, student = f"{work}/runs/teacher-merged", f"{models}/student\n{answers}{train}"
    teacher = f"teacher: {merged}\n"
    recipes = {
        "1_teacher": f"model: {models}/teacher\nlora_rank: 8\n{data}{train}max_steps: 80\n"
        f"output_dir: {work}/runs/teacher\n",
        "2_answers": f"model: {merged}\nprompts:\n  - {{path: {work}/prompts.jsonl}}\n"
        f"max_new_tokens: 24\noutput_dir: {work}/runs/answers\n",
        "3_a_sft": f"model: {student}max_steps: 3\noutput_dir: {work}/runs/sft\n",
        "3_b_distill": f"student: {student}{teacher}max_steps: 20\n"
        f"output_dir: {work}/runs/distill\n",
    }
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder
