"""A judge in this process instead of a server, with the same requests and results.

V vocabulary.
"""

from collections.abc import Callable

import torch
from tqdm import tqdm

from kd.generation.engines import LocalEngine
from kd.generation.server import Completion


class LocalJudge:
    """Answers judge requests with a model on `device`, one request at a time."""

    def __init__(self, path: str, dtype: str, device: str, max_new_tokens: int) -> None:
        self.engine = LocalEngine(path, dtype, device, max_new_tokens)

    def ask(self, requests: list[dict], record: Callable[[int, Completion], None]) -> None:
        """Answer all requests; `record(i, completion)` is called after each.

        There are no batches, so padding cannot change a verdict.
        """
        for i, request in enumerate(tqdm(requests, desc="judging", unit="answer")):
            token = request.get("logprobs", False)
            record(i, self.next_token(request) if token else self.text(request))

    def text(self, request: dict) -> Completion:
        """Answer a request by greedy decoding."""
        (answer,) = self.engine.answer([request["messages"]], [0], 0.0)
        finish = "stop" if answer.stopped else "length"
        return Completion(answer.text, finish, 0, answer.tokens, self.engine.name, None)

    @torch.inference_mode()
    def next_token(self, request: dict) -> Completion:
        """The most probable tokens after the prompt, with their log-probabilities."""
        batch = self.engine.encode([request["messages"]])
        logits = self.engine.model(**batch).logits[0, -1].float()  # (V,)
        best = logits.log_softmax(-1).topk(min(request["top_logprobs"], len(logits)))
        tokens = [self.engine.tokenizer.decode([i]) for i in best.indices.tolist()]
        top: dict[str, float] = {}
        for token, value in zip(tokens, best.values.tolist(), strict=True):
            top.setdefault(token, value)
        return Completion(tokens[0], "length", 0, 1, self.engine.name, [top])
