"""Chat completions from any OpenAI-compatible server: GPT-4o, vllm serve, llama-server, SGLang.

The key comes from an environment variable alone; no file and no message has it. Rate limits (429),
server errors (5xx), time-outs, broken connections and torn bodies are asked again with growing
pauses; what a server refuses for good is a Failure of that one request.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from openai.types.chat import ChatCompletion
from tqdm import tqdm

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds, as in the openai package


@dataclass(frozen=True)
class Completion:
    """One answer of a server, with what it was billed by."""

    text: str
    finish: str  # stop, length (cut at the limit of new tokens), content_filter, ...
    prompt_tokens: int
    completion_tokens: int
    served_by: str  # the model as the server calls it, such as gpt-4o-2024-08-06
    top_log_probabilities: list[dict[str, float]] | None  # of each token, where asked for


@dataclass(frozen=True)
class Failure:
    """A request that got no answer, after all its tries."""

    message: str
    status: int | None  # of HTTP; None: no answer, or none that could be read


class ChatServer:
    """Asks many requests at once; every one of them ends as a Completion or a Failure.

    `retries` are tries beyond the first. Raises ValueError where the URL or the key is not usable.
    """

    def __init__(
        self,
        url: str,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 8,
    ) -> None:
        self.url, self.key_variable = url, key_variable
        self.host = check_url(url)
        self.key = os.environ.get(key_variable, "")
        if not self.key and self.host == "api.openai.com":
            raise ValueError(
                f"{key_variable}: not in the environment, and {self.host} wants a key; "
                f"export {key_variable}=... (keys are read from there alone)"
            )
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.failures_in_a_row = 0

    def ask(
        self,
        requests: list[dict],
        record: Callable[[int, Completion | Failure], None],
        progress: bool = True,
    ) -> None:
        """Send all `requests`, the arguments of a chat completion each: model, messages, ...

        `record(i, result)` is called for each as it ends, in this thread. `max_new_tokens` is
        spelt as the host wants it. Raises ValueError where no request can succeed.
        """
        asyncio.run(self._ask(requests, record, progress))

    async def _ask(self, requests, record, progress) -> None:
        # Only inside a running loop: the client's connections belong to it.
        client = AsyncOpenAI(
            base_url=self.url,
            api_key=self.key or "none",
            timeout=self.timeout,
            max_retries=self.retries,
        )
        waiting = iter(enumerate(requests))
        with tqdm(total=len(requests), desc="asking", unit="answer", disable=not progress) as bar:
            workers = [
                self._work(client, waiting, record, bar)
                for _ in range(min(self.concurrency, len(requests)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                await client.close()

    async def _work(self, client: AsyncOpenAI, waiting: Iterator, record, bar) -> None:
        for i, request in waiting:  # the iterator is shared by all workers
            result = await self.complete(client, request)
            record(i, result)
            bar.update()
            failed = isinstance(result, Failure)
            self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0
            if self.failures_in_a_row >= max(self.concurrency, 4):
                raise ValueError(
                    f"{self.url}: {self.failures_in_a_row} requests in a row failed, the last "
                    f"with: {result.message}. What was answered is kept: the same command goes on"
                )

    async def complete(self, client: AsyncOpenAI, request: dict) -> Completion | Failure:
        """One request. Raises ValueError for what would fail for every other one, too."""
        request = dict(request)
        limit = request.pop("max_new_tokens", None)
        if limit is not None:
            # OpenAI's newer models refuse the old name, and some servers know no other.
            openai = self.host == "api.openai.com"
            request["max_completion_tokens" if openai else "max_tokens"] = limit
        pause, unreadable = FIRST_PAUSE, ""
        for _ in range(self.retries + 1):
            try:
                return read_completion(await client.chat.completions.create(**request))
            except APIStatusError as error:
                return self._refused(error)
            except APIConnectionError as error:  # time-outs, too; the client has tried again
                cause = f" ({error.__cause__!r})" if error.__cause__ else ""
                return Failure(self.redacted(f"{error}{cause}"), None)
            except (json.JSONDecodeError, UnreadableAnswer) as error:
                unreadable = f"the answer is no chat completion: {error}"
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return Failure(self.redacted(unreadable), None)

    def _refused(self, error: APIStatusError) -> Failure:
        message = self.redacted(error.message)
        if error.status_code in (401, 404) or error.code == "insufficient_quota":
            raise ValueError(
                f"{self.url}: {message}. Wanted a model that the server has, and a key in "
                f"{self.key_variable} that may use it"
            ) from None  # the original has the request's headers
        return Failure(message, error.status_code)

    def redacted(self, text: str) -> str:
        """The first 500 characters, without the key: some servers quote what they refuse."""
        return (text.replace(self.key, "***") if self.key else text)[:500]


class UnreadableAnswer(Exception):
    """An answer with HTTP status 200 that is not what was asked for."""


def check_url(url: str) -> str:
    """The host of a server's URL. Raises ValueError where it is none, or has a password in it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"server: {url}; wanted a URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "server: the URL has a user, a password or a query in it, and would be written into "
            "run.json; put the key into an environment variable and name that (key_variable)"
        )
    return parts.hostname


def read_completion(answer: ChatCompletion) -> Completion:
    """Raises UnreadableAnswer for what a proxy, or a torn body, may put in a completion's place."""
    if not isinstance(answer, ChatCompletion) or not answer.choices:
        raise UnreadableAnswer(str(answer)[:200])
    choice, usage = answer.choices[0], answer.usage
    if choice.message is None or choice.finish_reason is None:
        raise UnreadableAnswer(str(answer)[:200])
    tops = None
    if choice.logprobs and choice.logprobs.content:
        tops = [{t.token: t.logprob for t in c.top_logprobs} for c in choice.logprobs.content]
    return Completion(
        choice.message.content or "",
        choice.finish_reason,
        usage.prompt_tokens if usage else 0,
        usage.completion_tokens if usage else 0,
        answer.model or "",
        tops,
    )
