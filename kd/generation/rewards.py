"""A reward model scores answers; the scores are records, so that a run that was killed goes on."""

import torch
from transformers import AutoModelForSequenceClassification

from kd.data.template import render
from kd.data.tokenizer import load_tokenizer


class RewardModel:
    """A sequence classifier with one output, on the chat-templated prompt and answer.

    Raises ValueError where it has more outputs, or no chat template.
    """

    def __init__(self, name: str, dtype: str, device: str) -> None:
        self.tokenizer = load_tokenizer(name)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"reward_model {name}: its tokenizer has no chat template, so it is not known how "
                "it reads a conversation; put chat_template.jinja into its folder"
            )
        self.model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, dtype), device_map=device
        ).eval()
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"reward_model {name}: {self.model.config.num_labels} outputs; wanted a model "
                "with one, the reward"
            )
        # The classifier reads at the last id that is not padding: where pad is also an end token,
        # it would read too early. Then rows go one by one, unpadded.
        pad = self.tokenizer.pad_token_id
        self.alone = pad == self.tokenizer.eos_token_id
        self.model.config.get_text_config().pad_token_id = None if self.alone else pad

    @torch.inference_mode()
    def score(self, conversations: list[list[dict]]) -> list[float]:
        """The reward of each conversation's last answer."""
        texts = [render(conversation, self.tokenizer) for conversation in conversations]
        groups = [[text] for text in texts] if self.alone else [texts]
        scores: list[float] = []
        for group in groups:
            batch = self.tokenizer(
                group,
                add_special_tokens=False,  # the template wrote them
                padding=not self.alone,
                padding_side="right",
                return_tensors="pt",
            ).to(self.model.device)
            out = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits  # (B, 1)
            scores += out[:, 0].float().tolist()
        return scores
