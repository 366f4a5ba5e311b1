"""A saved student generates and stops with plain Transformers."""

import json

import pytest
from processes import succeed
from small import small_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

QUESTION = [{"role": "user", "content": "Say something about list."}]


@pytest.fixture(scope="module")
def student(models, tmp_path_factory):
    """Train with the real command until the student has memorized two answers."""
    output = tmp_path_factory.mktemp("sft")
    rows = output / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in 40 * small_rows(3)[::2]))
    printed = succeed(
        *("python", "train/sft.py", "--model", models / "student", "--use_cpu", "true"),
        *("--data", json.dumps([{"path": str(rows)}]), "--global_batch_size", "8"),
        *("--learning_rate", "1e-2", "--num_train_epochs", "4", "--output_dir", output / "run"),
        *("--save_strategy", "no"),
    )
    assert "parameters: " in printed and "rows per step: 8 = 1 processes x 8 rows x 1" in printed
    return output / "run"


def test_a_saved_student_stops_at_the_end_of_its_answer(student):
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student)
    inputs = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=200, do_sample=False)[0].tolist()
    answer = ids[inputs["input_ids"].shape[1] :]
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(answer[:-1]) == small_rows(1)[0]["messages"][1]["content"]


def test_a_saved_folder_has_the_template_and_every_end_token(student):
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokenizer.chat_template
    ends = GenerationConfig.from_pretrained(student).eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (
        [ends] if isinstance(ends, int) else ends
    )


def test_a_run_records_its_recipe_command_commit_and_versions(student):
    record = json.loads((student / "run.json").read_text())
    assert record["recipe"]["learning_rate"] == 1e-2 and "torch" in record["versions"]
    assert record["recipe"]["model"].endswith("student") and record["recipe"]["lora_rank"] == 0
    assert record["command"][0] == "train/sft.py" and list((student / "tensorboard").iterdir())
