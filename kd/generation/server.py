"""Chat completions from any OpenAI-compatible server: GPT-4o, vllm serve, llama-server, SGLang.

The API key is read from an environment variable; it never appears in a file or a message. Requests
are retried with growing pauses after rate limits (429), server errors (5xx), timeouts, broken
connections and malformed bodies. A request that the server refuses for good becomes a Failure.
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

from kd.credentials import check_key_variable

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds, as in the openai package


@dataclass(frozen=True)
class Completion:
    """One answer of a server, with the token counts that it bills."""

    text: str
    finish: str  # finish_reason: stop, length (truncated), content_filter, ...
    prompt_tokens: int
    completion_tokens: int
    served_by: str  # the server's name of the model, such as gpt-4o-2024-08-06
    top_log_probabilities: list[dict[str, float]] | None  # per token, if requested


@dataclass(frozen=True)
class Failure:
    """A request without an answer after all its retries."""

    message: str
    status: int | None  # HTTP status; None if there was no response, or a malformed one


class ChatServer:
    """Send many requests concurrently; each ends as a Completion or a Failure.

    `timeout` is in seconds. Raises ValueError if the URL is invalid or api.openai.com has no key.
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
        check_key_variable(key_variable)
        self.key = os.environ.get(key_variable, "")
        if not self.key and self.host == "api.openai.com":
            raise ValueError(
                f"{key_variable}: not in the environment, and {self.host} requires a key; "
                f"export {key_variable}=... (keys are read only from the environment)"
            )
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.failures_in_a_row = 0

    def ask(
        self,
        requests: list[dict],
        record: Callable[[int, Completion | Failure], None],
        progress: bool = True,
    ) -> None:
        """Send all requests, each the arguments of a chat completion: model, messages, ...

        `record(i, result)` is called in this thread as each request ends. `max_new_tokens` is
        renamed to the parameter that the host expects. Raises ValueError if no request can succeed.
        """
        asyncio.run(self._ask(requests, record, progress))

    async def _ask(self, requests, record, progress) -> None:
        # Created inside the running loop, which owns the client's connections.
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
        for i, request in waiting:  # all workers share the iterator
            result = await self.complete(client, request)
            record(i, result)
            bar.update()
            failed = isinstance(result, Failure)
            self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0
            if self.failures_in_a_row >= max(self.concurrency, 4):
                raise ValueError(
                    f"{self.url}: {self.failures_in_a_row} requests in a row failed, the last "
                    f"with: {result.message}. The answers so far are saved; run the same command "
                    "to continue"
                )

    async def complete(self, client: AsyncOpenAI, request: dict) -> Completion | Failure:
        """Send one request, with retries. Raises ValueError for an error that affects them all."""
        request = dict(request)
        limit = request.pop("max_new_tokens", None)
        if limit is not None:
            # OpenAI's newer models reject the old name; some servers know no other.
            openai = self.host == "api.openai.com"
            request["max_completion_tokens" if openai else "max_tokens"] = limit
        pause, unreadable = FIRST_PAUSE, ""
        for _ in range(self.retries + 1):
            try:
                return read_completion(await client.chat.completions.create(**request))
            except APIStatusError as error:
                return self._refused(error)
            except APIConnectionError as error:  # includes timeouts; the client has already retried
                cause = f" ({error.__cause__!r})" if error.__cause__ else ""
                return Failure(self.redacted(f"{error}{cause}"), None)
            except (json.JSONDecodeError, UnreadableAnswer) as error:
                unreadable = f"the response is not a chat completion: {error}"
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return Failure(self.redacted(unreadable), None)

    def _refused(self, error: APIStatusError) -> Failure:
        message = self.redacted(error.message)
        if error.status_code in (401, 404) or error.code == "insufficient_quota":
            raise ValueError(
                f"{self.url}: {message}. Wanted a model that the server has, and a key in "
                f"{self.key_variable} that may use it"
            ) from None  # the original error contains the request's headers
        return Failure(message, error.status_code)

    def redacted(self, text: str) -> str:
        """The first 500 characters without the key, which some servers quote when they refuse."""
        return (text.replace(self.key, "***") if self.key else text)[:500]


class UnreadableAnswer(Exception):
    """A response with HTTP status 200 that is not a chat completion."""


def check_url(url: str) -> str:
    """Return the host of a URL. Raises ValueError if it is not http(s) or contains a password."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"server: {url}; wanted a URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "server: the URL contains a user, a password or a query and would be written to "
            "run.json; put the key into an environment variable and set key_variable to its name"
        )
    return parts.hostname


def read_completion(answer: ChatCompletion) -> Completion:
    """Convert a response. Raises UnreadableAnswer if a proxy or a truncated body replaced it."""
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
