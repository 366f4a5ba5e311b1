"""Run one implementation of benchmarks/step.py: ours, TRL's trainers, or the plain loop."""

import json
import tempfile
from typing import Any

import torch
from step_cases import Case
from step_watch import Watch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.profiler import profile
from torch.utils.data import DataLoader
from transformers import set_seed

from kd.data.encoding import IGNORE_INDEX
from kd.data.packing import Collator
from kd.losses.divergences import DIVERGENCES
from kd.models.frozen import load_teacher
from kd.models.heads import head_of, target_positions
from kd.models.load import load_trained
from kd.planning.device_rates import matrix_rate
from kd.planning.throughput import operations_per_token
from kd.recipe import as_flags
from kd.settings.training_arguments import RunArguments
from kd.settings.training_recipe import parse_distillation, parse_sft
from kd.training.resume import find_resume_point
from kd.training.run_plan import Run, plan_run
from kd.training.run_training import load_student, make_trainer, set_up_teacher
from kd.training.settle import settle
from kd.training.tokenizers import load_tokenizers
from kd.training.training_rows import load_rows

TRL_MIXTURE = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}


def measured(case: Case, implementation: str, folder: str, steps: int) -> dict:
    """Seconds, targets, positions, losses and peak memory of one implementation."""
    run = prepared(case, folder, steps + (implementation == "ours"))
    training = run.recipe.training
    watch = Watch(training.device, case.accumulation, steps)
    set_seed(training.seed)
    run_it = {"ours": ours, "naive": naive, "trl": trl_distil if case.teacher else trl_sft}
    work = run_it[implementation](case, folder, run, watch)
    found = watch.metrics()
    if implementation == "ours" and training.device.type == "cuda":
        planned = (size for part, size in run.plan.parts.items() if "allowance" not in part)
        found["planned_mib"] = sum(planned) / 2**20
    if work:  # last, because measuring the rate allocates memory
        position, target = work
        operations = position * found["positions"] + target * found["targets"]
        rate = matrix_rate(training.device.type, getattr(torch, run.plan.layout.half or "float32"))
        found["matrix_peak_share"] = operations / found["seconds"] / rate
    return found


def prepared(case: Case, folder: str, steps: int) -> Run:
    """Prepare a run like train/distill.py and train/sft.py do."""
    cuda = torch.cuda.is_available()
    flags = {
        "data": json.dumps([{"path": f"{folder}/rows.jsonl"}]),
        "data_cache": f"{folder}/cache",
        "packing": case.packing,
        "max_length": case.max_length,
        "lora_rank": case.lora_rank,
        "quantization": case.quantization,
        "output_dir": tempfile.mkdtemp(dir=folder),
        "global_batch_size": case.rows,
        "per_device_train_batch_size": case.micro,
        "max_steps": steps,
        "learning_rate": 1e-3 if case.lora_rank else 1e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": case.checkpointing,
        "precision": "bfloat16" if cuda else "float32",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if case.teacher:
        flags |= {"teacher": f"{folder}/teacher", "divergence": case.divergence}
        recipe = parse_distillation(argv=as_flags(flags | {"student": f"{folder}/student"}))
    else:
        recipe = parse_sft(argv=as_flags(flags | {"model": f"{folder}/student"}))
    recipe = settle(recipe)
    tokenizers, resume = load_tokenizers(recipe), find_resume_point(recipe)
    return plan_run(recipe, tokenizers, load_rows(recipe, tokenizers, resume), resume)


def ours(case, folder, run: Run, watch: Watch) -> tuple[float, float]:
    student = load_student(run)
    teacher = set_up_teacher(run, student) if case.teacher else None
    trainer = make_trainer(run, student, teacher)
    watch.times, watch.profile = trainer.times, profile()
    watch.train(trainer)
    return operations_per_token(run.plan.layout)


def trl_distil(case, folder, run: Run, watch: Watch) -> None:
    """Off-policy: answers from the data. TRL's loss is the mean over the step's target tokens."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    recipe, tokenizer = run.recipe, run.tokenizers.student
    student = load_trained(recipe.model_name, recipe.model, tokenizer)
    whole = load_teacher(recipe.teacher, recipe.model, recipe.training.device)
    del whole.forward  # restores the forward that returns logits
    mixture = {"lmbda": 0.0, "seq_kd": False, "beta": TRL_MIXTURE[case.divergence]}
    args = GKDConfig(**shared(case, recipe.training), **mixture, temperature=1.0)
    rows = rows_for_trl(folder)
    watch.train(GKDTrainer(student, whole, args, train_dataset=rows, processing_class=tokenizer))


def trl_sft(case, folder, run: Run, watch: Watch) -> None:
    """TRL packs with best-fit decreasing and joins a micro-batch into one long row."""
    from trl import SFTConfig, SFTTrainer

    recipe, tokenizer = run.recipe, run.tokenizers.student
    student = load_trained(recipe.model_name, recipe.model, tokenizer)
    args = SFTConfig(**shared(case, recipe.training), packing=True, assistant_only_loss=True)
    rows = rows_for_trl(folder)
    watch.train(SFTTrainer(student, args, train_dataset=rows, processing_class=tokenizer))


def rows_for_trl(folder: str):
    from datasets import Dataset  # only TRL needs it here

    return Dataset.from_json(f"{folder}/rows.jsonl", cache_dir=f"{folder}/datasets")


def shared(case: Case, training: RunArguments) -> dict[str, Any]:
    """Arguments of TRL's trainers that make their run equal to ours."""
    names = ["output_dir", "per_device_train_batch_size", "gradient_accumulation_steps"]
    names += ["learning_rate", "lr_scheduler_type", "train_sampling_strategy", "bf16", "seed"]
    names += ["gradient_checkpointing", "save_strategy", "report_to", "disable_tqdm", "optim"]
    names += ["max_steps", "logging_steps", "dataloader_num_workers"]
    return {name: getattr(training, name) for name in names} | {
        "max_length": case.max_length,
        "use_cpu": training.device.type == "cpu",
    }


def naive(case, folder, run: Run, watch: Watch) -> None:
    """Logits of both models at all positions, float32 at the targets, and autograd."""
    recipe, training, tokenizer = run.recipe, run.recipe.training, run.tokenizers.student
    student = load_trained(recipe.model_name, recipe.model, tokenizer).to(training.device)
    if case.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
        student.enable_input_require_grads()
    teacher = recipe.teacher
    whole = load_teacher(teacher, recipe.model, training.device) if teacher else None
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, training.learning_rate, weight_decay=0.0, fused=True)
    collate = Collator(tokenizer.pad_token_id)
    batches = iter(DataLoader(run.rows.train, case.micro, collate_fn=collate))
    half = getattr(torch, run.plan.layout.half or "float32")
    student.train()
    for step in range(watch.steps):
        step_batches = [next(batches) for _ in range(case.accumulation)]
        count = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in step_batches)
        for batch in step_batches:
            batch = {name: value.to(training.device) for name, value in batch.items()}
            watch.count(batch)
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            with torch.autocast(training.device.type, half, enabled=half != torch.float32):
                logits = student(**inputs, use_cache=False).logits  # (B, T, V)
                positions, labels = target_positions(batch["labels"])
                loss = naive_loss(logits[positions].float(), labels, whole, inputs, positions, case)
            loss = loss / count
            loss.backward()
            watch.losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        watch.step_done(step + 1)


def naive_loss(
    student: Tensor, labels: Tensor, teacher, inputs: dict, positions: Tensor, case: Case
) -> Tensor:
    """The loss summed over target tokens, from the student's logits (N, V)."""
    if teacher is None:
        return cross_entropy(student, labels, reduction="sum")
    with torch.no_grad():
        hidden = teacher(**inputs)  # (B, T, H)
        logits = head_of(teacher).logits(hidden, student.shape[1])[positions].float()  # (N, V)
    if case.divergence == "forward_kl":
        log_q, log_p = log_softmax(student, -1), log_softmax(logits, -1)
        return kl_div(log_q, log_p, log_target=True, reduction="sum")
    return DIVERGENCES[case.divergence](logits, student).sum()
