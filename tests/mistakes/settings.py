"""Bad settings: unknown and repeated keys, wrong types, values out of range, combinations."""

from mistakes.frame import DATA, FLAGS, Case

DISTILL, SFT, SCORE = "train/distill.py", "train/sft.py", "train/cache_teacher.py"
GENERATE, INHERIT, PLAN = "train/generate.py", "train/inherit.py", "train/plan.py"
AGREE, PERPLEXITY = "eval/agreement.py", "eval/perplexity.py"
TASKS, JUDGE = "eval/benchmarks.py", "eval/judge.py"
NO_ROWS = [{"path": "no.jsonl"}]
WEIGHT = "data: [{{path: WORK/rows.jsonl, weight: {}}}]\n"
# Flags with which the other scripts pass their checks.
ANSWERS = {"model": "WORK/teacher", "prompts": DATA, "output_dir": "HERE/out"}
PARENT = {"parent": "WORK/teacher", "keep": 1, "output_dir": "HERE/out"}
QUANTIZE = {"model": "WORK/teacher", "output_dir": "HERE/out"}
MERGE = {"adapter": "WORK/adapter", "output_dir": "HERE/out"}
PLANNED = FLAGS[SFT]
MODELS = {"models": "student=WORK/student", "out_dir": "HERE/results"}
MEASURED = MODELS | {"data": DATA}
TEACHER = {"teacher": "WORK/teacher"}
JUDGED = MODELS | {"questions": "WORK/rows.jsonl", "judge": "WORK/teacher"}
CASES = [
    Case(
        "unknown key",
        DISTILL,
        "unknown key learning_rat; did you mean learning_rate",
        {"learning_rat": 1},
    ),
    Case("fine-tuning on-policy", "train/sft.py", "unknown key", {"student_fraction": 0.5}),
    Case(
        "aligned cache",
        DISTILL,
        "align_tokenizers: true with teacher_cache",
        {"align_tokenizers": True, "teacher_cache": "HERE/cache"},
    ),
    Case(
        "aligned hidden states",
        DISTILL,
        "align_tokenizers: true with hidden_weight",
        {"align_tokenizers": True, "hidden_weight": 1},
    ),
    Case(
        "aligned on-policy",
        DISTILL,
        "with align_tokenizers: generated text cannot be aligned in advance",
        {"align_tokenizers": True, "student_fraction": 0.5},
    ),
    Case(
        "aligned to itself",
        DISTILL,
        "align_tokenizers: true with teacher: self",
        {"align_tokenizers": True, "teacher": "self", "lora_rank": 2},
    ),
    Case(
        "micro-batch",
        DISTILL,
        "3 does not divide the 8 rows per process",
        {"per_device_train_batch_size": 3},
    ),
    Case(
        "shards of no teacher",
        DISTILL,
        "teacher_sharded_over: node with teacher_deepspeed: none, which shards no teacher",
        {"teacher_sharded_over": "node", "teacher_deepspeed": "none"},
    ),
    Case("no adapters", DISTILL, "teacher: self is the student without its", {"teacher": "self"}),
    Case(
        "on-policy, packed",
        DISTILL,
        "a packed row has no room for it; set packing: false",
        {"student_fraction": 0.5, "packing": True},
    ),
    Case(
        "on-policy, cached teacher",
        DISTILL,
        "remove teacher_cache, so that the teacher runs in every step",
        {"student_fraction": 0.5, "teacher_cache": "WORK"},
    ),
    Case("half weights", DISTILL, "set dtype: float32", {"dtype": "bfloat16"}),
    # Where a key may be given, and how often.
    Case(
        "unknown key in a recipe",
        SFT,
        "recipe.yaml: unknown key sed; did you mean seed",
        recipe="sed: 1\n",
    ),
    Case(
        "recipe by --config=FILE",
        SFT,
        "other.yaml: unknown key sed",
        tokens=("--config=HERE/other.yaml",),
        files={"other.yaml": "sed: 1\n"},
    ),
    Case(
        "second recipe",
        SFT,
        "config: given twice on the command line, HERE/a.yaml and HERE/b.yaml",
        tokens=("--config", "HERE/a.yaml", "--config=HERE/b.yaml"),
        files={"a.yaml": "seed: 1\n", "b.yaml": "seed: 2\n"},
    ),
    Case(
        "no such recipe", SFT, "config: no file HERE/no.yaml", tokens=("--config", "HERE/no.yaml")
    ),
    Case("--config without a file", SFT, "config: no file given", tokens=("--config",)),
    Case(
        "two files for --config",
        SFT,
        "config: a.yaml b.yaml",
        tokens=("--config", "a.yaml", "b.yaml"),
    ),
    Case("recipe in a recipe", SFT, "a recipe cannot name another", recipe="config: b.yaml\n"),
    Case(
        "hyphen beside underscore",
        SFT,
        "learning_rate: given twice on the command line, 1e-4 and 2e-4",
        tokens=("--learning-rate", "1e-4", "--learning_rate", "2e-4"),
    ),
    Case(
        "hyphen beside underscore in a recipe",
        SFT,
        "recipe.yaml: key given twice: learning_rate",
        recipe="learning-rate: 1e-4\nlearning_rate: 2e-4\n",
    ),
    Case(
        "key given twice",
        SFT,
        "seed: given twice on the command line, 1 and 2",
        tokens=("--seed=1", "--seed", "2"),
    ),
    Case(
        "key twice in a recipe", SFT, "line 1: key given twice: ['seed']", recipe="seed: 1\nseed: 1"
    ),
    Case("stray value", SFT, "output_dir: 2 values", tokens=("stray",)),
    Case("stray word", SFT, "found stray, which belongs to no key", tokens=("--seed=1", "stray")),
    Case("key without a value", SFT, "seed: no value given; wanted a whole", tokens=("--seed",)),
    Case("empty key in a recipe", SFT, "recipe.yaml: seed is empty", recipe="seed:\n"),
    Case("list as a recipe", SFT, "found list; wanted keys and values", recipe="- a\n- b\n"),
    Case("recipe that is no YAML", SFT, "recipe.yaml: while parsing", recipe="data: [{path: a\n"),
    # Types and choices.
    Case("word for a number", SFT, "seed: 'many'; wanted a whole number", {"seed": "many"}),
    Case("fraction for a whole number", SFT, "max_length: '1.5'; wanted", {"max_length": 1.5}),
    Case("word for a switch", SFT, "packing: 'maybe'; wanted true or false", {"packing": "maybe"}),
    Case("list for a number", SFT, "seed: 2 values, 1 2; wanted one", recipe="seed: [1, 2]\n"),
    Case(
        "unknown choice",
        DISTILL,
        "divergence: 'kl'; wanted one of forward_kl",
        {"divergence": "kl"},
    ),
    Case("unknown optimizer", SFT, "optim: adam; wanted one of adamw_torch", {"optim": "adam"}),
    Case("unknown schedule", SFT, "lr_scheduler_type: 'flat'", {"lr_scheduler_type": "flat"}),
    Case(
        "data, not JSON", SFT, "data: found rows.jsonl, which is not JSON", {"data": "rows.jsonl"}
    ),
    Case("data of numbers", SFT, "data: found [1]; wanted a list of objects", {"data": [1]}),
    Case(
        "schedule that is no object",
        SFT,
        "lr_scheduler_kwargs: found [1]",
        {"lr_scheduler_kwargs": [1]},
    ),
    Case(
        "word as a weight",
        SFT,
        "weight 'much'; wanted a number above 0",
        recipe=WEIGHT.format("much"),
        flags={"data": None},
    ),
    Case(
        "infinite weight",
        SFT,
        "weight inf; wanted a number above 0",
        recipe=WEIGHT.format(".inf"),
        flags={"data": None},
    ),
    # Ranges.
    *(
        Case(f"{key} {value}", script, f"{key}: {shown}; wanted {wanted}", {key: value})
        for script, key, value, shown, wanted in (
            (SFT, "learning_rate", "-1", "-1.0", "0 or more"),
            (SFT, "learning_rate", "inf", "inf", "a finite number"),
            (SFT, "learning_rate", "nan", "nan", "a finite number"),
            (SFT, "num_train_epochs", "0", "0.0", "more than 0"),
            (SFT, "num_train_epochs", "-1", "-1.0", "more than 0"),
            (SFT, "max_steps", "0", "0", "1 or more, or -1"),
            (SFT, "max_steps", "-5", "-5", "-1 or more"),
            (SFT, "max_grad_norm", "-1", "-1.0", "0 or more (0: never)"),
            (SFT, "warmup_steps", "-3", "-3.0", "0 or more"),
            (SFT, "weight_decay", "-0.1", "-0.1", "0 or more"),
            (SFT, "adam_beta2", "1", "1.0", "0 or more and less than 1"),
            (SFT, "adam_epsilon", "0", "0.0", "more than 0"),
            (SFT, "lora_alpha", "0", "0.0", "more than 0"),
            (SFT, "lora_rank", "-1", "-1", "0 or more"),
            (SFT, "lora_dropout", "1", "1.0", "0 or more and less than 1"),
            (SFT, "global_batch_size", "-8", "-8", "0 or more"),
            (SFT, "per_device_train_batch_size", "0", "0", "1 or more"),
            (SFT, "save_total_limit", "0", "0", "1 or more"),
            (SFT, "save_steps", "0", "0.0", "more than 0"),
            (SFT, "logging_steps", "-1", "-1.0", "more than 0"),
            (SFT, "gpu_memory_gb", "0", "0.0", "more than 0"),
            (SFT, "seed", "-1", "-1", "0 or more"),
            (SFT, "max_length", "1", "1", "2 or more"),
            (SFT, "data_workers", "-1", "-1", "0 or more (0: one per core)"),
            (SFT, "show_rows", "-1", "-1", "0 or more"),
            (SFT, "neftune_noise_alpha", "-5", "-5.0", "0 or more"),
            (DISTILL, "temperature", "1e-30", "1e-30", "0.001 to 1000"),
            (DISTILL, "temperature", "inf", "inf", "a finite number"),
            (DISTILL, "soft_weight", "1.5", "1.5", "0 to 1"),
            (DISTILL, "skew", "1", "1.0", "more than 0 and less than 1"),
            (DISTILL, "top_p", "0", "0.0", "more than 0 and at most 1"),
            (DISTILL, "student_fraction", "-0.5", "-0.5", "0 to 1"),
            (DISTILL, "hidden_weight", "-1", "-1.0", "0 or more"),
            (DISTILL, "cache_top_k", "-1", "-1", "0 or more (0: all)"),
            (DISTILL, "loss_workspace_mb", "0", "0", "128 or more"),
        )
    ),
    Case(
        "negative number by --key=value",
        SFT,
        "learning_rate: -1e-05; wanted 0 or more",
        tokens=("--learning_rate=-1e-5",),
    ),
    Case(
        "infinity in a recipe",
        SFT,
        "learning_rate: inf; wanted a finite number",
        recipe="learning_rate: .inf\n",
    ),
    Case(
        "batch larger than the data",
        SFT,
        "global_batch_size: 16 rows per step, but the data has 8 training rows",
        {"global_batch_size": 16, "data_cache": "HERE/rows"},
    ),
    # Keys of Transformers that would be ignored.
    *(
        Case(f"unused {key}", SFT, f"{key}: {reason}", {key: value})
        for key, value, reason in (
            ("label_smoothing_factor", 0.1, "the loss here has no label smoothing"),
            ("resume_from_checkpoint", "HERE", "a run resumes by itself"),
            ("average_tokens_across_devices", False, "the loss is always averaged"),
            ("do_train", False, "train/ always trains"),
            ("do_eval", True, "train/ always trains"),
            ("push_to_hub", True, "runs are not uploaded"),
            ("auto_find_batch_size", True, "the memory plan chooses the micro-batch"),
            ("use_liger_kernel", True, "the loss here is fused already"),
            ("fsdp", "full_shard", "models are sharded with DeepSpeed"),
            ("activation_checkpointing", True, "wanted gradient_checkpointing"),
            ("remove_unused_columns", True, "this project sets it itself"),
            ("ignore_data_skip", True, "a resumed run always goes on"),
            ("enable_jit_checkpoint", True, "SIGTERM and SIGUSR1 always save"),
            ("prediction_loss_only", True, "it is a key of Transformers that has no effect here"),
            ("skip_memory_metrics", False, "it is a key of Transformers that has no effect here"),
        )
    ),
    # Combinations that need no model.
    Case("Transformers' precision", SFT, "bf16: wanted precision: bfloat16", {"bf16": True}),
    Case("4 bits without adapters", SFT, "set lora_rank (for example 16)", {"quantization": "nf4"}),
    Case(
        "best model without evaluations",
        SFT,
        "load_best_model_at_end: needs evaluations; set eval_strategy",
        {"load_best_model_at_end": True},
    ),
    Case(
        "best model that was not saved",
        SFT,
        "save_strategy: epoch with eval_strategy: steps",
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "epoch",
            "eval_data": DATA,
        },
    ),
    Case(
        "early stopping by no metric",
        SFT,
        "early_stopping_patience: no metric_for_best_model",
        {"early_stopping_patience": 2, "eval_strategy": "epoch", "eval_data": DATA},
    ),
    Case(
        "prefetching by nobody",
        SFT,
        "dataloader_prefetch_factor: given with dataloader_num_workers: 0",
        {"dataloader_prefetch_factor": 2},
    ),
    Case(
        "hidden states of a cache",
        DISTILL,
        "a cache has distributions but no hidden states",
        {"teacher_cache": "HERE/cache", "hidden_weight": 1},
    ),
    Case("scoring without a cache", SCORE, "teacher_cache: not given", {"teacher_cache": None}),
    Case(
        "scoring the student",
        SCORE,
        "wanted a model to score with",
        {"teacher": "self", "lora_rank": 2},
    ),
    # Files and folders.
    Case("no student", DISTILL, "student: not given; wanted a hub name", {"student": None}),
    Case(
        "student that is no folder", DISTILL, "student: no folder HERE/no", {"student": "HERE/no"}
    ),
    Case("student without a model", DISTILL, "has neither config.json nor", {"student": "HERE"}),
    Case(
        "teacher that is no folder", DISTILL, "teacher: no folder HERE/no", {"teacher": "HERE/no"}
    ),
    Case("no rows", SFT, "data: no source given", {"data": None}),
    Case("no template file", SFT, "chat_template: no file no.jinja", {"chat_template": "no.jinja"}),
    Case("no DeepSpeed file", SFT, "deepspeed: no file no.json", {"deepspeed": "no.json"}),
    Case("no output folder", SFT, "output_dir: not given", {"output_dir": None}),
    Case("no batch size", SFT, "global_batch_size: not given", {"global_batch_size": None}),
    Case(
        "all mistakes at once",
        DISTILL,
        "10 mistakes",
        {"teacher": "HERE/no", "learning_rate": "-1", "do_train": False, "num_beams": 4},
        tokens=("--seed", "1", "--seed=2"),
        recipe="temperatur: 2\nmax_length: long\ndivergence: kl\n"
        "eval_data: [{path: no.jsonl}, {path: nothing.jsonl}]\n",
        lines=11,
    ),
    # A mistake that only follows from another one is not told.
    Case("only the cause", SFT, "lora_rank: 'x'", {"lora_rank": "x", "quantization": "nf4"}),
    Case(
        "only the misspelt key",
        SFT,
        "did you mean output_dir",
        {"output_dir": None, "output_dri": "HERE"},
    ),
    # The other scripts.
    *(
        Case(f"{script}: {message}", script, message, base | flags)
        for script, base, flags, message in (
            (GENERATE, ANSWERS, {"model": None}, "model: not given"),
            (GENERATE, ANSWERS, {"model": "HERE/no"}, "model: no folder HERE/no"),
            (GENERATE, ANSWERS, {"prompts": None}, "prompts: no source given"),
            (GENERATE, ANSWERS, {"temperature": "-1"}, "temperature: [-1.0]; wanted 0 or more"),
            (GENERATE, ANSWERS, {"top_p": "2"}, "top_p: [2.0]; wanted more than 0 and at most 1"),
            (GENERATE, ANSWERS, {"samples_per_prompt": 0}, "samples_per_prompt: 0; wanted 1"),
            (GENERATE, ANSWERS, {"request_timeout": 0}, "request_timeout: 0.0; wanted more than 0"),
            (
                GENERATE,
                ANSWERS,
                {"max_repetition": 1},
                "max_repetition: 1.0; wanted more than 0 and",
            ),
            (GENERATE, ANSWERS, {"keep_best": 1}, "keep_best: 1 without a reward_model"),
            (GENERATE, ANSWERS, {"learning_rate": 1}, "unknown key learning_rate"),
            (INHERIT, PARENT, {"keep": None}, "layers, keep: neither given"),
            (INHERIT, PARENT, {"keep": -1}, "keep: -1; wanted 0 or more"),
            (INHERIT, PARENT, {"choice": "middle"}, "choice: 'middle'; wanted one of even"),
            (INHERIT, PARENT, {"choice": "angular"}, "choice: angular is measured on text"),
            (INHERIT, PARENT, {"parent": None}, "parent: not given"),
            ("train/quantize.py", QUANTIZE, {"group_size": 0}, "group_size: 0; wanted 1 or more"),
            ("train/quantize.py", QUANTIZE, {"model": None}, "model: not given"),
            ("train/merge.py", MERGE, {"compared_rows": 0}, "compared_rows: 0; wanted 1 or more"),
            ("train/merge.py", MERGE, {"adapter": None}, "adapter: not given; wanted a folder"),
            (PLAN, PLANNED, {"model": None}, "model, student: wanted exactly one"),
            (PLAN, PLANNED, {"num_processes": 0}, "num_processes: 0; wanted 1 or more"),
            (PLAN, PLANNED, {"efficiency": 2}, "efficiency: 2.0; wanted more than 0 and at most 1"),
            (PLAN, PLANNED, {"do_train": True}, "do_train: train/ always trains"),
            (AGREE, MEASURED | TEACHER, {"teacher": "HERE/no"}, "teacher: no folder HERE/no"),
            (AGREE, MEASURED | TEACHER, {"batch_size": 0}, "batch_size: 0; wanted 1 or more"),
            (AGREE, MEASURED | TEACHER, {"dtype": "half"}, "dtype: 'half'; wanted one of auto"),
            ("eval/teacher_cost.py", MEASURED, {}, "teacher: not given"),
            ("eval/answers.py", MEASURED, {"count": 0}, "count: 0; wanted 1 or more"),
            ("eval/answers.py", MEASURED, {"data": NO_ROWS}, "data: no file no.jsonl"),
            (PERPLEXITY, MEASURED, {"max_length": 1}, "max_length: 1; wanted 2 or more"),
            (PERPLEXITY, MEASURED, {"models": "a b=c"}, "models: found a b=c; wanted NAME=PATH"),
            (PERPLEXITY, MEASURED, {"models": None}, "models: none given"),
            (PERPLEXITY, MEASURED, {"models": "a=HERE/no"}, "a: no folder HERE/no"),
            (PERPLEXITY, MEASURED, {"rolling": "perhaps"}, "rolling: 'perhaps'; wanted true"),
            ("eval/speed.py", MODELS, {"batch_sizes": 0}, "batch_sizes: [0]; wanted 1 or more"),
            ("eval/speed.py", MODELS, {"repeats": 0}, "repeats: 0; wanted 1 or more"),
            (TASKS, MODELS, {}, "tasks: none given"),
            (TASKS, MODELS | {"tasks": "boolq"}, {"limit": 0}, "limit: 0; wanted 1 or more"),
            (TASKS, MODELS | {"tasks": "boolq"}, {"num_fewshot": -1}, "num_fewshot: -1; wanted 0"),
            (JUDGE, JUDGED, {"questions": "no.jsonl"}, "questions: no file no.jsonl"),
            (JUDGE, JUDGED, {"concurrency": 0}, "concurrency: 0; wanted 1 or more"),
            (JUDGE, JUDGED, {"mode": "pair"}, "baseline: None; wanted one of student"),
            (JUDGE, JUDGED, {"judge": "HERE/no"}, "judge: no folder HERE/no"),
            (
                "eval/report.py",
                {},
                {"out": "report.txt"},
                "out: report.txt; wanted the name of a .md",
            ),
            ("eval/report.py", {}, {"samples": "no.jsonl"}, "samples: no file no.jsonl"),
        )
    ),
]
