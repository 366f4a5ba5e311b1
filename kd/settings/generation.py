"""The keys of a generation recipe: who answers which prompts, and which answers are kept."""

from dataclasses import dataclass, field
from typing import Any, Literal

from kd.recipe import parse_json_list, parse_json_object, setting


def several(default: Any, help: str) -> Any:
    """A field that takes one value or a list."""
    return field(default_factory=lambda: [default], metadata={"help": help})


@dataclass
class GenerationSettings:
    """Who answers which prompts, and how the answers are drawn."""

    model: str = setting(
        "", "hub name or folder of the teacher or of a LoRA adapter; with server: its name there"
    )
    prompts: str = setting("", "JSON list of sources; of chat rows, what precedes the first answer")
    system_prompt: list[str] | None = setting(
        None,
        "hidden: the teacher sees it, in place of the prompt's own; train.jsonl does not. A list "
        "has one for each source, '' for none",
    )
    samples_per_prompt: int = setting(
        1, "answers to each prompt; the i-th takes the i-th temperature, top_p and seed, in turn"
    )
    temperature: list[float] = several(1.0, "0: greedy; the model's own temperature is not used")
    top_p: list[float] = several(1.0, "nucleus sampling; the model's own top_p is not used")
    seed: list[int] = several(0, "draws the answers")
    max_new_tokens: int = setting(512, "an answer cut there is no training row")
    batch_size: int = setting(16, "answers at a time in each process")
    template_arguments: str | None = setting(
        None, "variables of the chat template, such as {enable_thinking: false}"
    )
    mixture_seed: int = setting(0, "draws the prompts of a source with count, as in training")
    dtype: Literal["bfloat16", "float16", "float32"] = setting("bfloat16", "of the weights")
    output_dir: str = setting("", "folder of raw.jsonl and train.jsonl")

    def __post_init__(self) -> None:
        self.sources = parse_json_list("prompts", self.prompts)
        self.arguments = parse_json_object("template_arguments", self.template_arguments)
        if not self.sources:
            raise ValueError("prompts: no source given; wanted a list such as [{path: rows.jsonl}]")
        for key in ("model", "output_dir"):
            if not getattr(self, key):
                raise ValueError(f"{key}: not given; --help says what it means")
        for key in ("samples_per_prompt", "max_new_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted 1 or more")
        if min(self.temperature) < 0.0:
            raise ValueError(f"temperature: {self.temperature}; wanted 0 (greedy) or more")
        if not all(0.0 < top_p <= 1.0 for top_p in self.top_p):
            raise ValueError(f"top_p: {self.top_p}; wanted more than 0, and 1 at most")
        for key in ("temperature", "top_p", "seed"):
            if len(getattr(self, key)) > self.samples_per_prompt:
                raise ValueError(
                    f"{key}: {getattr(self, key)} with samples_per_prompt: "
                    f"{self.samples_per_prompt}, so that some are never used; raise the latter"
                )
        greedy = [top_p for t, top_p, _ in map(self.drawing, self.indices) if t == 0.0]
        if len(greedy) > 1 or any(top_p < 1.0 for top_p in greedy):
            raise ValueError(
                f"temperature: 0 for {len(greedy)} of the samples_per_prompt, with top_p: "
                f"{greedy}. Greedy decoding has one answer and draws nothing: let one sample "
                "have it, with top_p 1, or take a temperature above 0"
            )
        hidden = self.system_prompt or []
        if len(hidden) not in (0, 1, len(self.sources)):
            raise ValueError(
                f"system_prompt: {len(hidden)} for {len(self.sources)} sources; wanted one, or "
                "one for each source ('' for none)"
            )

    @property
    def indices(self) -> range:
        return range(self.samples_per_prompt)

    def drawing(self, index: int) -> tuple[float, float, int]:
        """(temperature, top_p, seed) of the index-th sample of a prompt."""
        lists = (self.temperature, self.top_p, self.seed)
        temperature, top_p, seed = (values[index % len(values)] for values in lists)
        return temperature, top_p, seed

    def hidden_prompt(self, source: int) -> str | None:
        """The system prompt that is shown to the teacher alone, for the source-th source."""
        if not self.system_prompt:
            return None
        one = len(self.system_prompt) == 1
        return self.system_prompt[0 if one else source] or None


@dataclass
class ServerSettings:
    """An OpenAI-compatible server that answers in place of a model in this process."""

    server: str | None = setting(
        None, "its URL, such as https://api.openai.com/v1 or http://localhost:8000/v1"
    )
    key_variable: str = setting(
        "OPENAI_API_KEY", "environment variable with the key: it is read from there alone"
    )
    concurrency: int = setting(16, "requests under way at a time, over all processes")
    request_timeout: float = setting(600.0, "seconds for one answer")
    retries: int = setting(8, "further tries of a request: 429, 5xx, time-outs, torn answers")
    price_per_million_tokens: list[float] | None = setting(
        None, "two numbers, of prompt and of answer tokens: an estimate is printed before the run"
    )
    estimate_only: bool = setting(False, "print the estimate, ask nothing")
    skip_failed: bool = setting(
        False, "make train.jsonl without the samples that the server refuses; else an error"
    )

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or not self.request_timeout > 0:
            raise ValueError(
                f"concurrency: {self.concurrency}, retries: {self.retries}, request_timeout: "
                f"{self.request_timeout}; wanted 1 or more, 0 or more, more than 0"
            )
        if self.price_per_million_tokens and len(self.price_per_million_tokens) != 2:
            raise ValueError(
                f"price_per_million_tokens: {self.price_per_million_tokens}; wanted two numbers, "
                "of prompt tokens and of answer tokens"
            )


@dataclass
class FilterSettings:
    """Which answers become training rows. Empty, cut and repeated ones never do."""

    max_repetition: float | None = setting(
        None, "largest share of an answer's word 4-grams that it has had before (0.3, say)"
    )
    near_duplicate_similarity: float | None = setting(
        None, "of word trigrams (Jaccard, by MinHash): from it on the later row goes (0.8, say)"
    )
    evaluation_data: str | None = setting(
        None, "JSON list of sources: what shares 13 words in a row with a prompt of them goes"
    )
    rationales: bool = setting(
        False,
        "Distilling Step-by-Step: a label row (the gold answer) and a rationale row an example; "
        "prompts need a completion, and what the teacher concludes must be that",
    )
    answer_marker: str = setting("Answer:", "what stands before the conclusion of a rationale")
    gold_marker: str | None = setting(
        None, "what stands before the answer in the completion (####, say); else it is the answer"
    )
    label_copies: int = setting(1, "of each label row: long rationales have most of the tokens")
    reward_model: str | None = setting(
        None, "hub name or folder of a sequence classifier with one output: it scores the answers"
    )
    keep_best: int | None = setting(None, "of a prompt's answers, by reward; without: all")
    min_reward: float | None = setting(None, "an answer that scores less is no training row")
    reward_batch_size: int = setting(16, "answers that are scored at a time")

    def __post_init__(self) -> None:
        self.evaluation_sources = parse_json_list("evaluation_data", self.evaluation_data)
        for key in ("max_repetition", "near_duplicate_similarity"):
            value = getattr(self, key)
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"{key}: {value}; wanted more than 0 and less than 1")
        for key in ("label_copies", "keep_best", "reward_batch_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}; wanted 1 or more")
        for key in ("keep_best", "min_reward"):
            if getattr(self, key) is not None and not self.reward_model:
                raise ValueError(f"{key}: {getattr(self, key)} without reward_model, which scores")
        if self.reward_model and self.keep_best is None and self.min_reward is None:
            raise ValueError(
                f"reward_model: {self.reward_model}, but nothing depends on its scores; set "
                "keep_best or min_reward"
            )
        if self.rationales and not self.answer_marker.strip():
            raise ValueError("answer_marker: empty; wanted what stands before the conclusion")
