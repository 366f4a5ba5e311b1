"""Settings of eval/judge.py: the questions, the models to judge and the judge."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.distributed import default_dtype
from kd.recipe import check_ranges, mistake, require_file, require_given, setting
from kd.settings.evaluation import parse_models
from kd.settings.model_paths import check_path


@dataclass
class JudgeSettings:
    """Settings of eval/judge.py.

    Raises ValueError for missing questions, judge or models, for duplicate names, and for an
    unknown baseline.
    """

    questions: str = setting("", "File of questions, in the format of MT-Bench or AlpacaEval.")
    references: str | None = setting(
        None, "File of reference answers to some of the questions, in the same format."
    )
    judge_prompts: str | None = setting(
        None,
        "Judge prompts in the format of FastChat's judge_prompts.jsonl; they replace the built-in "
        "prompts of the same names.",
    )
    benchmark: str = setting(
        "mt_bench", "Name of the benchmark, used for the folder of its answers and results."
    )
    models: list[str] = setting([], "Models that answer the questions first, as NAME=PATH.")
    answers: list[str] = setting([], "Files of existing answers to judge, as NAME=FILE.")
    mode: Literal["score", "pair"] = setting(
        "score",
        "Mode score grades each answer from 1 to 10; mode pair compares it with the baseline's.",
    )
    baseline: str | None = setting(
        None, "Name of the model or answers that pair mode compares all others with."
    )
    verdict: Literal["token", "text"] = setting(
        "token",
        "Verdict in pair mode: token reads the log-probabilities of one token, text an explanation "
        "that ends with the verdict.",
    )
    orders: Literal["both", "seeded"] = setting(
        "both",
        "Order of the two answers in pair mode. both judges every pair twice, which cancels "
        "position bias; seeded judges it once, in an order derived from the question.",
    )
    instruction_difficulty: str | None = setting(
        None,
        "AlpacaEval's CSV file of instruction difficulties, for the length-controlled win rate.",
    )
    judge: str = setting(
        "", "The judge: its model name on the server, or without a server a model's path."
    )
    server: str | None = setting(
        None, "URL of the judge's OpenAI-compatible server, such as https://api.openai.com/v1."
    )
    key_variable: str = setting("OPENAI_API_KEY", "Environment variable with the API key.")
    concurrency: int = setting(16, "Maximum number of concurrent requests to the judge.", least=1)
    request_timeout: float = setting(
        600.0, "Timeout of one request to the judge, in seconds.", above=0
    )
    retries: int = setting(
        8,
        "Maximum number of retries per request, after rate limits (429), server errors (5xx), "
        "timeouts and malformed responses.",
        least=0,
    )
    judge_max_new_tokens: int = setting(
        2048, "Maximum number of tokens per verdict of the judge.", least=1
    )
    max_new_tokens: int = setting(1024, "Maximum number of tokens per answer of a model.", least=1)
    batch_size: int = setting(8, "Number of answers generated at a time by each process.", least=1)
    seed: int = setting(0, "Seed of the models' sampled answers.", least=0)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "Data type of the models and of a local judge; auto selects bfloat16 on a GPU, float16 "
        "on a GPU that lacks it, and float32 on a CPU.",
    )
    out_dir: str = setting("results", "Folder of the results; writes judge/BENCHMARK in it.")

    def __post_init__(self) -> None:
        check_ranges(self)
        require_given(self, "questions", "judge")
        for key in ("questions", "references", "judge_prompts", "instruction_difficulty"):
            require_file(key, getattr(self, key) or None)
        self.named_models = parse_models(self.models) if self.models else {}
        self.named_answers = dict(item.partition("=")[::2] for item in self.answers)
        names = [*self.named_models, *self.named_answers]
        if len(names) != len(self.models) + len(self.answers) or not names:
            mistake(f"models, answers: found {names}; wanted at least one NAME=..., each name once")
        if self.mode == "pair" and self.baseline not in names:
            mistake(f"baseline: {self.baseline}; wanted one of {', '.join(names)}")
        if self.server is None and self.judge:
            check_path("judge", self.judge)
        for name, file in self.named_answers.items():
            require_file(f"answers: {name}", file)
        self.folder = Path(self.out_dir) / "judge" / self.benchmark

    @property
    def weights_dtype(self) -> str:
        """The data type of the weights, with auto resolved for this machine."""
        return default_dtype() if self.dtype == "auto" else self.dtype
