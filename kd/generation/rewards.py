"""Score answers with a reward model; rewards.jsonl records them, so a restart scores only the rest.

B batch.
"""

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from kd.data.control_tokens import ControlTokens
from kd.data.near_duplicates import Overlap
from kd.data.tokenizer import load_tokenizer
from kd.distributed import barrier, rank, share_of
from kd.generation.filter_report import FilterReport
from kd.generation.filters import valid_samples, with_answer
from kd.generation.records import append_record, read_records, record_file
from kd.generation.sampling import Sample
from kd.gpu import device
from kd.models.frozen import load_frozen
from kd.settings.generation import FilterSettings, GenerationSettings


class RewardModel:
    """A sequence classifier with one output, applied to the chat-templated prompt and answer.

    Raises ValueError if the model has several outputs or its tokenizer has no chat template.
    """

    def __init__(self, name: str, dtype: str, device: str) -> None:
        self.tokenizer = load_tokenizer(name)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"reward_model {name}: the tokenizer has no chat template; wanted one, because a "
                "conversation cannot be formatted without it. Put chat_template.jinja into the "
                "model's folder"
            )
        self.control_tokens = ControlTokens(self.tokenizer)
        self.model = load_frozen(
            name, dtype, device, model_class=AutoModelForSequenceClassification
        )
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"reward_model {name}: {self.model.config.num_labels} outputs; wanted a model "
                "with one, the reward"
            )
        # The classifier reads the last token that is not padding. If pad equals eos, it would skip
        # a final eos, so conversations are then scored one at a time, without padding.
        pad = self.tokenizer.pad_token_id
        self.pad_is_eos = pad == self.tokenizer.eos_token_id
        self.model.config.get_text_config().pad_token_id = None if self.pad_is_eos else pad

    @torch.inference_mode()
    def score(self, conversations: list[list[dict]]) -> list[float]:
        """The reward of the last answer of each conversation."""
        rows = [self.control_tokens.conversation_ids(messages) for messages in conversations]
        groups = [[ids] for ids in rows] if self.pad_is_eos else [rows]
        scores: list[float] = []
        for group in groups:
            batch = self.tokenizer.pad(
                {"input_ids": group}, padding_side="right", return_tensors="pt", verbose=False
            ).to(self.model.device)
            out = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits  # (B, 1)
            scores += out[:, 0].float().tolist()
        return scores


def score_missing(
    settings: GenerationSettings,
    filters: FilterSettings,
    samples: list[Sample],
    answers: dict[str, dict],
    evaluation: Overlap,
) -> dict[str, float]:
    """Collective: score the valid answers that have no reward yet; return all rewards by key.

    Batches are composed of all valid answers, so that a restart scores in the same batches. Without
    a reward model the result is empty.
    """
    if not filters.reward_model:
        return {}
    valid = list(valid_samples(samples, answers, filters, evaluation, FilterReport()))
    conversations = {s.key: with_answer(s, answers[s.key]["answer"]) for s in valid}
    ordered = sorted(conversations, key=lambda key: -len(str(conversations[key])))
    size = filters.reward_batch_size
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    known = read_rewards(settings.output_dir, filters.reward_model)
    mine = share_of([batch for batch in batches if any(key not in known for key in batch)])
    barrier()  # no rank appends before all have read
    if mine:
        model = RewardModel(filters.reward_model, settings.weights_dtype, device())
        with open(record_file(settings.output_dir, "rewards", rank()), "a") as file:
            for batch in tqdm(mine, desc="scoring", unit="batch", disable=rank() > 0):
                rewards = model.score([conversations[key] for key in batch])
                for key, reward in zip(batch, rewards, strict=True):
                    if key not in known:
                        row = {"key": key, "model": filters.reward_model, "reward": reward}
                        append_record(file, row)
    barrier()
    return read_rewards(settings.output_dir, filters.reward_model)


def read_rewards(output_dir: str, model: str) -> dict[str, float]:
    """The recorded rewards of one reward model, by sample key."""
    rows = read_records(output_dir, "rewards")
    return {row["key"]: row["reward"] for row in rows if row["model"] == model}
