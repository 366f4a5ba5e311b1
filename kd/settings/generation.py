"""The keys of a generation recipe: the teacher, its prompts, how it samples, and the filters."""

from dataclasses import dataclass
from typing import Literal

from kd.distributed import default_dtype
from kd.recipe import (
    AUTO,
    check_ranges,
    mistake,
    parse_json_list,
    parse_json_object,
    require_given,
    setting,
)


@dataclass
class GenerationSettings:
    """The teacher, its prompts, and how its answers are sampled."""

    model: str = setting(
        "",
        "Teacher: a hub name, a model folder or the folder of a LoRA adapter; with server, the "
        "model's name on that server.",
    )
    prompts: str = setting(
        "",
        "JSON list of sources. A chat row contributes the messages before its first assistant "
        "turn.",
    )
    system_prompt: list[str] | None = setting(
        None,
        "Hidden system prompt: the teacher sees it instead of the row's own system prompt, and "
        "train.jsonl does not contain it. Give one for all sources, or one per source ('' for "
        "none).",
    )
    samples_per_prompt: int = setting(
        1,
        "Number of answers sampled per prompt. Sample i uses the i-th temperature, top_p and seed; "
        "shorter lists are cycled.",
        least=1,
    )
    temperature: list[float] = setting(
        [1.0],
        "Sampling temperature. Overrides the model's generation config.",
        least=0,
        note="0: greedy decoding",
    )
    top_p: list[float] = setting(
        [1.0],
        "Nucleus sampling threshold; 1 disables it. Overrides the model's generation config.",
        above=0,
        most=1,
    )
    seed: list[int] = setting([0], "Seed of the sampled answers.", least=0)
    max_new_tokens: int = setting(
        512,
        "Maximum number of tokens per answer. A truncated answer is not used for training.",
        least=1,
    )
    batch_size: int = setting(16, "Number of answers generated at a time by each process.", least=1)
    template_arguments: str | None = setting(
        None, "JSON object of chat template variables, such as {enable_thinking: false}."
    )
    mixture_seed: int = setting(
        0, "Seed that draws the prompts of each source with a count, as in training.", least=0
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "Data type of the weights of the teacher and of the reward model. auto: bfloat16 on a GPU "
        "that has it, else float16; float32 on a CPU.",
    )
    output_dir: str = setting("", "Folder for raw.jsonl and train.jsonl.")

    def __post_init__(self) -> None:
        self.sources = parse_json_list("prompts", self.prompts)
        self.arguments = parse_json_object("template_arguments", self.template_arguments)
        if not self.sources:
            mistake('prompts: no source given; wanted a list such as [{"path": "rows.jsonl"}]')
        require_given(self, "model", "output_dir")
        check_ranges(self)
        for key in ("temperature", "top_p", "seed"):
            if len(getattr(self, key)) > self.samples_per_prompt:
                mistake(
                    f"{key}: {getattr(self, key)} with samples_per_prompt: "
                    f"{self.samples_per_prompt}; wanted at most one value per sample, since "
                    "the others are never used. Raise samples_per_prompt"
                )
        if not (self.temperature and self.top_p and self.seed and self.samples_per_prompt > 0):
            return
        greedy = [top_p for t, top_p, _ in map(self.sampling, self.indices) if t == 0.0]
        if len(greedy) > 1 or any(top_p < 1.0 for top_p in greedy):
            mistake(
                f"temperature: 0 for {len(greedy)} of the samples_per_prompt, with top_p: "
                f"{greedy}; wanted at most one such sample, with top_p 1, because greedy decoding "
                "has one answer. Use temperatures above 0 for the others"
            )
        hidden = self.system_prompt or []
        if len(hidden) not in (0, 1, len(self.sources)):
            mistake(
                f"system_prompt: {len(hidden)} for {len(self.sources)} sources; wanted one, or "
                "one per source ('' for none)"
            )

    @property
    def indices(self) -> range:
        """The indices of the samples of one prompt."""
        return range(self.samples_per_prompt)

    @property
    def weights_dtype(self) -> str:
        """The data type of the weights, with auto resolved for this machine."""
        return default_dtype() if self.dtype == AUTO else self.dtype

    def sampling(self, index: int) -> tuple[float, float, int]:
        """Temperature, top_p and seed of the index-th sample of a prompt."""
        lists = (self.temperature, self.top_p, self.seed)
        temperature, top_p, seed = (values[index % len(values)] for values in lists)
        return temperature, top_p, seed

    def hidden_prompt(self, source: int) -> str | None:
        """The system prompt that only the teacher sees, for the source-th source."""
        if not self.system_prompt:
            return None
        single = len(self.system_prompt) == 1
        return self.system_prompt[0 if single else source] or None


@dataclass
class ServerSettings:
    """An OpenAI-compatible server that answers instead of a model in this process."""

    server: str | None = setting(
        None,
        "URL of an OpenAI-compatible server, such as https://api.openai.com/v1 or "
        "http://localhost:8000/v1; without it, the model is loaded in this process.",
    )
    key_variable: str = setting(
        "OPENAI_API_KEY", "Environment variable with the API key; no other place is read."
    )
    concurrency: int = setting(
        16, "Maximum number of concurrent requests, summed over all processes.", least=1
    )
    request_timeout: float = setting(600.0, "Timeout of one request, in seconds.", above=0)
    retries: int = setting(
        8,
        "Maximum number of retries per request, after rate limits (429), server errors (5xx), "
        "timeouts and malformed responses.",
        least=0,
    )
    price_per_million_tokens: list[float] | None = setting(
        None,
        "Two prices, of a million prompt tokens and of a million answer tokens; the cost is "
        "estimated before the run starts.",
        least=0,
    )
    estimate_only: bool = setting(
        False, "Print the estimated requests, tokens and cost, then exit without any request."
    )
    skip_failed: bool = setting(
        False,
        "Write train.jsonl without the samples that the server refused; otherwise they are an "
        "error.",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.price_per_million_tokens and len(self.price_per_million_tokens) != 2:
            mistake(
                f"price_per_million_tokens: {self.price_per_million_tokens}; wanted two numbers, "
                "of prompt tokens and of answer tokens"
            )


@dataclass
class FilterSettings:
    """Filters from answers to training rows; empty, truncated and duplicate answers always go."""

    max_repetition: float | None = setting(
        None,
        "Drop an answer if a larger share of its word 4-grams than this is repeated, such as 0.3.",
        above=0,
        below=1,
    )
    near_duplicate_similarity: float | None = setting(
        None,
        "Drop a row whose Jaccard similarity of word trigrams with an earlier row, estimated by "
        "MinHash, reaches this value, such as 0.8.",
        above=0,
        below=1,
    )
    evaluation_data: str | None = setting(
        None,
        "JSON list of evaluation sources. Prompts and answers that share a 13-gram of words with "
        "their prompts are dropped.",
    )
    rationales: bool = setting(
        False,
        "Distilling Step-by-Step: write a label row with the gold answer and a rationale row per "
        "prompt. Prompts need a completion, and a rationale must conclude with the gold answer.",
    )
    answer_marker: str = setting(
        "Answer:", "Text between the reasoning and the conclusion of a teacher's rationale."
    )
    gold_marker: str | None = setting(
        None,
        "Text before the gold answer in the completion, such as ####; without it, the whole "
        "completion is the gold answer.",
    )
    label_copies: int = setting(
        1,
        "Number of copies of each label row, to balance the larger number of tokens in rationale "
        "rows.",
        least=1,
    )
    reward_model: str | None = setting(
        None,
        "Reward model that scores the answers: hub name or folder of a sequence classifier with "
        "one output.",
    )
    keep_best: int | None = setting(
        None,
        "Number of answers with the highest rewards to keep per prompt; without it, all.",
        least=1,
    )
    min_reward: float | None = setting(None, "Drop answers with a lower reward than this.")
    reward_batch_size: int = setting(
        16, "Number of answers scored at a time by the reward model.", least=1
    )

    def __post_init__(self) -> None:
        self.evaluation_sources = parse_json_list("evaluation_data", self.evaluation_data)
        check_ranges(self)
        for key in ("keep_best", "min_reward"):
            if getattr(self, key) is not None and not self.reward_model:
                mistake(f"{key}: {getattr(self, key)} without a reward_model; set one")
        if self.reward_model and self.keep_best is None and self.min_reward is None:
            mistake(
                f"reward_model: {self.reward_model}, but no filter uses its rewards; set "
                "keep_best or min_reward"
            )
        if self.rationales and not self.answer_marker.strip():
            mistake("answer_marker: empty; wanted the text before the conclusion")
