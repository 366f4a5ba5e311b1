"""Settings of the evaluation scripts: models, held-out rows, benchmarks, speed and the report."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.distributed import default_dtype
from kd.gpu import device
from kd.recipe import (
    check_ranges,
    mistake,
    parse_json_list,
    parse_json_object,
    require_file,
    setting,
)
from kd.settings.model_paths import check_path, require_model

SPLITS = ("train", "validation", "test")


@dataclass
class ModelSelection:
    """The models to measure, and how to load them."""

    models: list[str] = setting(
        [], "Models as NAME=PATH; PATH is a hub name, a folder or a PEFT adapter."
    )
    batch_size: int = setting(8, "Rows per forward pass; the results do not depend on it.", least=1)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "Data type of the weights; auto selects bfloat16 on a GPU, float16 on a GPU that lacks it, "
        "and float32 on a CPU.",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = setting(
        "sdpa", "Attention implementation of every model."
    )
    chat_template: str | None = setting(
        None, "File with a Jinja chat template that replaces the template of every tokenizer."
    )

    def __post_init__(self) -> None:
        self.named_models = parse_models(self.models)
        check_ranges(self)
        require_file("chat_template", self.chat_template)

    @property
    def device(self) -> str:
        """The kind of device of this process: cuda or cpu."""
        return device().split(":")[0]

    @property
    def weights_dtype(self) -> str:
        """The data type of the weights, with auto resolved for this machine."""
        return default_dtype() if self.dtype == "auto" else self.dtype


@dataclass
class HeldoutSettings(ModelSelection):
    """The models to measure, and the rows to measure them on."""

    data: str = setting("", "JSON list of data sources: [{path, split, count, columns, ...}, ...].")
    mixture_seed: int = setting(
        0, "Seed that selects the rows of every source with a count.", least=0
    )
    control_tokens_in_text: Literal["split", "keep"] = setting(
        "split",
        "How to encode control tokens of the tokenizer, such as <|im_end|>, in the text of a row. "
        "split: as ordinary text; keep: as control tokens. Set it as in the training.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sources = parse_json_list("data", self.data)
        if not self.sources:
            mistake('data: no source given; wanted a list such as [{"path": "rows.jsonl"}]')

    @property
    def rows_read(self) -> dict[str, object]:
        """Everything that decides which tokens are read from the rows."""
        return {
            "data": self.sources,
            "mixture_seed": self.mixture_seed,
            "control_tokens_in_text": self.control_tokens_in_text,
        }


@dataclass
class EvaluationSettings(HeldoutSettings):
    """The models to measure, and the held-out rows whose tokens they predict."""

    max_length: int = setting(
        1024, "Maximum tokens per row; longer rows are truncated at the end.", least=2
    )

    @property
    def rows_read(self) -> dict[str, object]:
        """Everything that decides which tokens are read from the rows."""
        return super().rows_read | {"max_length": self.max_length}


@dataclass
class PerplexitySettings:
    """Settings of eval/perplexity.py."""

    out_dir: str = setting("results", "Folder of the results; writes perplexity/NAME.json in it.")
    rolling: bool = setting(
        False,
        "Count text as lm-evaluation-harness does: predict every token, and split long texts into "
        "windows instead of truncating them at max_length.",
    )


@dataclass
class AgreementSettings:
    """Settings of eval/agreement.py."""

    teacher: str = setting("", "Hub name or folder of the teacher.")
    teacher_name: str = setting("teacher", "Name of the teacher in the perplexity results.")
    out_dir: str = setting("results", "Folder of the results; writes agreement/NAME.json in it.")

    def __post_init__(self) -> None:
        require_model("teacher", self.teacher)


@dataclass
class TeacherCostSettings:
    """Settings of eval/teacher_cost.py."""

    teacher: str = setting("", "Hub name or folder of the unquantized teacher.")
    out_dir: str = setting("results", "Folder of the results; writes teacher_cost/NAME.json in it.")

    def __post_init__(self) -> None:
        require_model("teacher", self.teacher)


@dataclass
class BenchmarkSettings:
    """Settings of eval/benchmarks.py."""

    tasks: list[str] = setting(
        [], "Tasks or task groups of lm-evaluation-harness, such as boolq piqa."
    )
    task_data: str | None = setting(
        None,
        "Local rows that replace the hub's data set: JSON object {task: file} or "
        "{task: {split: file}}.",
    )
    num_fewshot: int | None = setting(
        None, "Number of few-shot examples per question; by default the task's own number.", least=0
    )
    limit: int | None = setting(
        None, "Measure only the first N documents of each task, for a trial run.", least=1
    )
    apply_chat_template: bool = setting(
        False, "Format prompts with the chat template; scores with and without do not compare."
    )
    out_dir: str = setting("results", "Folder of the results; writes benchmarks/TASK/NAME.json.")

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.tasks:
            mistake("tasks: none given; wanted names such as boolq winogrande piqa")
        files = parse_json_object("task_data", self.task_data)
        self.files = {
            task: {"test": found} if isinstance(found, str) else found
            for task, found in files.items()
        }
        for task, splits in self.files.items():
            for split, file in splits.items():
                if split not in SPLITS:
                    mistake(f"task_data: {task}: split {split}; wanted {', '.join(SPLITS)}")
                if not Path(file).is_file():
                    mistake(f"task_data: {task}: no file {file}; wanted JSON lines")


@dataclass
class SpeedSettings:
    """Settings of eval/speed.py."""

    batch_sizes: list[int] = setting(
        [1, 8], "Batch sizes to measure, one measurement for each.", least=1
    )
    prompt_tokens: int = setting(128, "Number of tokens per prompt.", least=1)
    new_tokens: int = setting(64, "Number of tokens to generate per prompt.", least=2)
    repeats: int = setting(5, "Number of timed repetitions; the median is reported.", least=1)
    out_dir: str = setting("results", "Folder of the results; writes speed/NAME.json in it.")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class AnswerSettings:
    """Settings of eval/answers.py."""

    count: int = setting(8, "Number of prompts, the first ones of the data.", least=1)
    max_new_tokens: int = setting(64, "Maximum number of tokens per answer.", least=1)
    out: str = setting("results/answers.jsonl", "File to write the answers to.")
    out_dir: str | None = setting(
        None,
        "Folder of the results; if set, also match the answers with the references and write "
        "open_answers/NAME.json in it.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class ReportSettings:
    """Settings of eval/report.py."""

    results: list[str] = setting(
        ["results"], "Folders that the evaluation scripts wrote as their out_dir."
    )
    out: str | None = setting(
        None, "Markdown file to write; by default report.md in the first folder of results."
    )
    runs: list[str] = setting([], "Output folders of the training runs, for their training curves.")
    samples: str | None = setting(None, "File of sample answers that eval/answers.py wrote.")
    teacher: str = setting("teacher", "Name of the teacher in the results.")
    start: str = setting("start", "Name of the untrained student in the results.")
    trade_off: str | None = setting(
        None,
        "Metric of the plot of quality against size and speed; by default the first that was "
        "measured.",
    )
    expected_order: list[str] = setting(
        [], "Expected order of the students, best first; the report checks it."
    )

    def __post_init__(self) -> None:
        self.out = self.out or f"{self.results[0]}/report.md"
        if not self.out.endswith(".md"):
            mistake(f"out: {self.out}; wanted the name of a .md file")
        require_file("samples", self.samples)


def parse_models(items: list[str]) -> dict[str, str]:
    """Parse NAME=PATH items into {name: path}.

    A name that cannot name a file, a duplicate name, a folder without a model and an empty list are
    mistakes. Raises ValueError outside of `all_mistakes`.
    """
    named: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (equals and path and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name)):
            mistake(f"models: found {item}; wanted NAME=PATH, NAME of letters, digits and . _ + -")
        elif name in named:
            mistake(f"models: {name} is given twice; give every model a different name")
        else:
            check_path(name, path)
            named[name] = path
    if not items:
        mistake("models: none given; wanted NAME=PATH, such as student=runs/student")
    return named
