"""Answer prompts with a model in this process: `model.generate` on left-padded batches.

B batch, T tokens, V vocabulary. kd.generation.server queries a model on a server instead.
"""

from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kd.data.control_tokens import ControlTokens
from kd.data.template import render
from kd.data.tokenizer import generation_config, load_tokenizer, set_template_arguments
from kd.models.frozen import load_frozen


@dataclass(frozen=True)
class Answer:
    """A generated answer."""

    text: str
    stopped: bool  # ended with an end token; False if truncated at max_new_tokens
    tokens: int  # generated, including the end token


def check_template(
    tokenizer: PreTrainedTokenizerBase, name: str, system_prompt: str | None
) -> None:
    """Raise ValueError if there is no chat template, or if it drops the system prompt."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name}: the tokenizer has no chat template; wanted a chat model. Use a model trained "
            "on conversations, or put chat_template.jinja into its folder"
        )
    if system_prompt is None:
        return
    roles = {"system": system_prompt, "user": "a"}
    messages = [{"role": role, "content": content} for role, content in roles.items()]
    try:
        seen = system_prompt.strip() in render(messages, tokenizer, add_generation_prompt=True)
    except TemplateError:  # some templates reject the role, others drop it silently
        seen = False
    if not seen:
        raise ValueError(
            f"system_prompt: the chat template of {name} does not render system messages; put the "
            "instruction into the prompts, or use another chat template"
        )


def sampling_processors(
    temperature: float, top_p: float, seeds: list[int], top_k: int = 0
) -> LogitsProcessorList:
    """Processors that turn greedy decoding into sampling with temperature, then top_k, then top_p.

    There is one seed per row of the batch. Temperature 0 needs no processors: it is greedy.
    """
    if temperature == 0.0:
        return LogitsProcessorList()
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(GumbelNoise(seeds))
    return processors


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise to scores (B, V), so that their argmax is an exact sample of the softmax.

    Every row has its own generator, so its samples do not depend on the rest of the batch;
    `model.generate` samples a whole batch from one generator. The Gumbel-max trick: Maddison et al.
    2014, "A* Sampling", section 2.
    """

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (B, V) plus noise, in float64."""
        if not self.generators:
            new = [torch.Generator(scores.device) for _ in self.seeds]
            self.generators = [g.manual_seed(s) for g, s in zip(new, self.seeds, strict=True)]
        # float64, since float32 noise is at most 16.6 and ties among 150k tokens are common.
        uniform = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)  # (B, V)
        for row, generator in zip(uniform, self.generators, strict=True):
            row.uniform_(generator=generator)
        return scores - uniform.log_().neg_().log_()


class LocalEngine:
    """`model.generate` in this process, with the whole model on one device.

    Raises ValueError before loading the weights if the chat template is missing or drops the
    system prompt.
    """

    def __init__(
        self,
        name: str,
        dtype: str,
        device: str,
        max_new_tokens: int,
        system_prompts: list[str] | None = None,
        template_arguments: dict | None = None,
    ) -> None:
        self.tokenizer = load_tokenizer(name)
        set_template_arguments(self.tokenizer, template_arguments or {})
        for system_prompt in system_prompts or [None]:
            check_template(self.tokenizer, name, system_prompt)
        self.name, self.control_tokens = name, ControlTokens(self.tokenizer)
        self.model = load_frozen(name, dtype, device)
        # End tokens and repetition penalty come from the model's folder; the sampling settings are
        # ours. They are cleared on the model as well, since generate fills None from there.
        self.config = generation_config(self.model, self.tokenizer)
        overridden = ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length")
        self.config.update(**dict.fromkeys(overridden), do_sample=False, num_beams=1)
        self.config.max_new_tokens = max_new_tokens
        self.model.generation_config = self.config

    def encode(self, conversations: list[list[dict]]) -> dict[str, Tensor]:
        """Tokenize conversations into left-padded input_ids and attention_mask, both (B, T).

        Raises ValueError if prompt and answer exceed the model's positions.
        """
        encode = self.control_tokens.conversation_ids
        ids = [encode(messages, add_generation_prompt=True) for messages in conversations]
        batch = self.tokenizer.pad(
            {"input_ids": ids}, padding_side="left", return_tensors="pt", verbose=False
        ).to(self.model.device)
        width, new = batch["input_ids"].shape[1], self.config.max_new_tokens
        limit = self.model.config.get_text_config().to_dict().get("max_position_embeddings")
        if limit is not None and width + new > limit:
            raise ValueError(
                f"a prompt of {width} tokens with max_new_tokens: {new} exceeds the {limit} "
                f"positions of {self.name}; shorten the prompts or lower max_new_tokens"
            )
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    @torch.inference_mode()
    def answer(
        self,
        conversations: list[list[dict]],
        seeds: list[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[Answer]:
        """Generate one answer per conversation, each from its own seed."""
        batch = self.encode(conversations)
        out = self.model.generate(
            **batch,
            generation_config=self.config,
            logits_processor=sampling_processors(temperature, top_p, seeds),
        )
        return [self.read(row) for row in out[:, batch["input_ids"].shape[1] :].tolist()]

    def read(self, ids: list[int]) -> Answer:
        """Decode generated token ids up to the first end token; padding follows it."""
        ends = (i for i, token in enumerate(ids) if token in self.config.eos_token_id)
        end = next(ends, len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Answer(text, end < len(ids), min(end + 1, len(ids)))
