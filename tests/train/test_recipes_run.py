"""The small variants of the experiments and the rehearsals run by their real command lines."""

import json
import re
import shutil

import pytest
from chat_server import ChatServer
from processes import ROOT, start
from small import save_reward_model
from transformers import AutoTokenizer

DATA = ROOT / "runs" / "quickstart" / "data"
SMALL = ROOT / "runs" / "small"
D_DISTILL = "recipes/small/d_distill.yaml"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("docstrings")]


def run(profile: str, script: str, recipe: str, *flags) -> str:
    """The output of a small recipe, which must finish."""
    job = start(f"launch/{profile}.sh", f"train/{script}.py", "--config", recipe, *flags)
    assert f"saved to runs/small/{recipe.split('/')[-1][:-5]}" in job.stdout, job.stdout[-6000:]
    return job.stdout


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"step \d+ of \d+: loss ([^,]+)", printed)]


def test_experiment_a_trains_a_teacher_and_a_student_on_its_answers():
    shutil.rmtree(SMALL, ignore_errors=True)
    printed = run("cpu", "sft", "recipes/small/a_teacher.yaml")
    assert "rows: 128 read, 128 kept" in printed and losses(printed)
    run("cpu", "generate", "recipes/small/a_answers.yaml")
    rows = (SMALL / "a_answers" / "train.jsonl").read_text()
    assert "You are a careful expert" not in rows and len(rows.splitlines()) > 1
    assert "You are a careful expert" in (SMALL / "a_answers" / "run.json").read_text()
    run("cpu", "sft", "recipes/small/a_student.yaml", "--global_batch_size", "2")


def rows_of(name: str) -> list[dict]:
    lines = (SMALL / name / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["imitation", "expansion", "reward"])
def test_experiment_b_trains_a_student_on_the_teachers_answers(kind):
    shutil.rmtree(SMALL / f"b_{kind}", ignore_errors=True)
    shutil.rmtree(SMALL / "b_student", ignore_errors=True)
    if kind == "reward":
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/quickstart/teacher")
        save_reward_model(SMALL / "reward_model", tokenizer)
    printed = run("cpu", "generate", f"recipes/small/b_{kind}.yaml")
    rows = rows_of(f"b_{kind}")
    prompts = [row["messages"][-2]["content"] for row in rows]
    assert rows and (kind == "expansion" or len(set(prompts)) == len(prompts))
    if kind == "reward":
        told = re.search(r"(\d+) ranked below their prompt's keep_best", printed)
        scores = (SMALL / "b_reward").glob("rewards*.jsonl")
        scored = sum(len(file.read_text().splitlines()) for file in scores)
        assert told and int(told.group(1)) + len(rows) <= scored
    data = json.dumps([{"path": f"runs/small/b_{kind}/train.jsonl"}])
    assert losses(run("cpu", "sft", "recipes/small/b_student.yaml", "--data", data))


def test_experiment_b_checks_rationales_against_the_gold_answers():
    """The small teacher cannot reason, so a server answers; about half of its answers are wrong."""
    shutil.rmtree(SMALL / "b_rationales", ignore_errors=True)
    chat = [json.loads(x) for x in (DATA / "chat_train.jsonl").read_text().splitlines()]
    gold = {row["messages"][-2]["content"]: row["messages"][-1]["content"] for row in chat}
    asked: list[str] = []

    def answer(request: dict) -> dict:
        question = request["messages"][-1]["content"]
        asked.append(question)
        right = len(question) % 2 == 0
        said = gold[question] if right else "something else"
        text = f"First this, then that, for {question} Answer: {said}"
        return {"message": {"content": text}, "finish_reason": "stop"}

    with ChatServer(answer) as server:
        flags = ("--server", server.url, "--request_timeout", "60")
        job = start(
            *("python", "train/generate.py", "--config", "recipes/small/b_rationales.yaml"), *flags
        )
    assert "saved to runs/small/b_rationales" in job.stdout, job.stdout[-4000:]
    tasks: dict[str, list] = {"[label] ": [], "[rationale] ": []}
    for row in rows_of("b_rationales"):
        question, found = (message["content"] for message in row["messages"][-2:])
        task = next(task for task in tasks if question.startswith(task))
        tasks[task].append((question.removeprefix(task), found))
    rationales, labels = tasks["[rationale] "], tasks["[label] "]
    right = {question for question in asked if len(question) % 2 == 0}
    assert 0 < len(rationales) < len(asked) and {q for q, _ in rationales} == right
    assert all("Answer:" not in found for _, found in rationales)
    assert sorted(set(labels)) == sorted((q, gold[q]) for q in set(asked))
    assert len(labels) == 2 * len(set(asked))  # label_copies


def test_experiment_e_trains_a_student_on_answers_of_an_api():
    for name in ("e_answers", "e_student"):
        shutil.rmtree(SMALL / name, ignore_errors=True)
    with ChatServer(faulty=0.3, slow=0.1) as server:
        job = start(
            *("python", "train/generate.py", "--config", "recipes/small/e_answers.yaml"),
            *("--server", server.url),
        )
    assert "saved to runs/small/e_answers" in job.stdout, job.stdout[-4000:]
    assert "to ask: 36 requests of small" in job.stdout and "price: at most" in job.stdout
    assert losses(run("cpu", "sft", "recipes/small/e_student.yaml"))


def test_experiment_d_trains_a_student_from_a_cache_of_its_teacher():
    """With 64 of 4 096 ids, the difference from the live loss is measured and printed."""
    cache = ("--teacher_cache", "runs/small/cache", "--output_dir", "runs/small/d_cached")
    for folder in ("cache", "d_cached"):
        shutil.rmtree(SMALL / folder, ignore_errors=True)
    job = start("launch/cpu.sh", "train/cache_teacher.py", "--config", D_DISTILL, *cache)
    told = re.search(
        r"forward_kl ([\d.]+) from the cache, ([\d.]+) live \((.*)%\); gradients differ by (.*)%",
        job.stdout,
    )
    assert told, job.stdout[-6000:]
    cached, live = float(told.group(1)), float(told.group(2))
    assert 0.5 * live < cached <= live * 1.01
    job = start("launch/cpu.sh", "train/distill.py", "--config", D_DISTILL, *cache)
    assert "saved to runs/small/d_cached" in job.stdout, job.stdout[-6000:]
    assert "teacher (1/2 per process)" not in job.stdout and ", agreement " in job.stdout
    steps = losses(job.stdout)
    assert steps[-1] < steps[0]


@pytest.mark.parametrize("student", ["sft", "distill", "distill_sft"])
def test_experiment_d_trains_three_students_with_the_teacher_in_the_step(student):
    script = "sft" if student == "sft" else "distill"
    shutil.rmtree(SMALL / f"d_{student}", ignore_errors=True)
    printed = run("cpu", script, f"recipes/small/d_{student}.yaml")
    assert "rows per step: 16 = 2 processes x 8 rows x 1" in printed
    assert "<|im_start|>, <|im_end|> look untrained" in printed  # LoRA does not train them
    steps = losses(printed)
    assert steps[-1] < steps[0]
    if student != "sft":
        assert "teacher (1/2 per process)" in printed and ", agreement " in printed


def test_three_stages_run_by_one_command_that_repeats_nothing():
    stages = ("f_hidden", "f_logits", "f_on_policy")
    for name in stages:
        shutil.rmtree(SMALL / name, ignore_errors=True)
    whole = ("recipes/small/f_stages.sh", "--max_steps", "2")
    job = start(*whole)
    assert all((SMALL / name / "done.json").exists() for name in stages), job.stdout[-6000:]
    for stage, term in (("f_hidden", "hidden"), ("f_on_policy", "on_policy_divergence")):
        state = json.loads((SMALL / stage / "trainer_state.json").read_text())
        assert term in state["log_history"][0]
    for before, after in zip(stages, stages[1:], strict=False):
        record = json.loads((SMALL / after / "run.json").read_text())
        assert record["recipe"]["student"] == f"runs/small/{before}"
    (SMALL / "f_on_policy" / "done.json").unlink()
    again = start(*whole)
    assert again.stdout.count("is finished already") == 2
    assert "resuming from runs/small/f_on_policy/checkpoint-2" in again.stdout, again.stdout
    assert (SMALL / "f_on_policy" / "done.json").exists()


@pytest.mark.parametrize("profile", ["2xa100", "h100"])
def test_profile_rehearses_two_steps_on_two_cpu_processes(profile):
    """tests/training/test_float16.py rehearses the third, 2xt4, in float16."""
    shutil.rmtree(SMALL / "d_distill_sft", ignore_errors=True)
    job = start(
        *(f"launch/{profile}.sh", "--cpu", "train/distill.py"),
        *("--config", "recipes/small/d_distill_sft.yaml", "--max_steps", "2"),
    )
    done = json.loads((SMALL / "d_distill_sft" / "done.json").read_text())
    assert done["train_loss"] > 0.0, job.stdout[-6000:]
    assert "= 2 processes x" in job.stdout
    assert ("teacher (1/2 per process)" in job.stdout) == (profile != "h100")
