"""An OpenAI-compatible server: requests at once, retries with back-off, and every misbehaviour an error that names it.

Plain httpx2, which huggingface_hub rests on. `InferenceClient` has no `/v1/completions`, takes 200 with an error body
for an answer, and rewrites a JSON schema into TGI's form, which vLLM does not enforce.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import httpx2

from hf_distill.teachers.usage import Account, Budget, TeacherBudgetExceeded, Usage

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

LONGEST_WAIT = 30.0  # seconds of back-off
LONGEST_ASKED = 300.0  # seconds that a server may ask for with Retry-After
BUSY = frozenset({408, 425, 429})  # and all from 500 on
SHOWN = 200  # characters of what a server said


class TeacherError(RuntimeError):
    """An endpoint did not answer as asked. What it answered before is kept: run again to go on."""


class TeacherUnavailable(TeacherError):
    """It cannot be reached, is too slow or too busy, also after all retries."""


class TeacherRequestError(TeacherError):
    """It refuses the request: wrong model name, token, or settings."""


class TeacherProtocolError(TeacherError):
    """It said yes, but not what was asked for."""


class BadReply(Exception):
    """What a reader of replies raises; `again` tries once more."""

    def __init__(self, problem: str, *, again: bool = False):
        super().__init__(problem)
        self.again = again


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        path: below /v1.
        body: without the model.
        most: prompt and completion tokens it can take.
        choices: answers asked for.
    """

    path: str
    body: dict
    most: tuple[int, int]
    choices: int = 1


class _Failed(Exception):
    """One try; how many more may follow, and the seconds before the next that the server asked for."""

    def __init__(self, error: TeacherError, retries: int = 0, wait: float | None = None):
        self.error, self.retries, self.wait = error, retries, wait


class Endpoint:
    """A model behind a URL.

    Args:
        url: of the server, with or without /v1.
        model: the name it is served under.
        timeout: seconds of silence after which a request is given up. The longest answer must fit.
        max_retries: of a request that was not answered.
        backoff: seconds before the first retry; doubled for each further one, at most 30, shortened at random.
            A server's Retry-After goes before.
        concurrency: requests on their way at once.
        token_variable: environment variable with the token, where the server wants one. It is written nowhere.
        extra_body: entries added to every request, such as vLLM's {"top_k": -1}.
        budget: `Budget` settings by name: max_cost, max_tokens_total, price_per_1k_prompt, price_per_1k_completion.

    Raises:
        ValueError: a URL that is none or holds a password, settings out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 60.0,
        max_retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 4,
        token_variable: str = "TEACHER_API_KEY",
        extra_body: dict | None = None,
        **budget,
    ):
        self.url, self.model = _checked_url(url), model
        if not model or not isinstance(model, str):
            raise ValueError(f"model must be the name that {self.url} serves it under, got {model!r}")
        if not timeout > 0 or not backoff >= 0:
            raise ValueError(f"timeout must be positive and backoff not negative, got {timeout} and {backoff}")
        if concurrency < 1 or max_retries < 0:
            raise ValueError(f"concurrency must be at least 1 and max_retries 0, got {concurrency} and {max_retries}")
        self.max_retries, self.backoff, self.concurrency = max_retries, backoff, concurrency
        self.token_variable, self.extra_body = token_variable, dict(extra_body or {})
        self.account = Account(_budget(budget))
        self._jitter = random.Random()  # the global generator is the training's
        limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx2.Client(timeout=timeout, limits=limits)

    def __str__(self) -> str:
        return f"{self.url} (model {self.model})"

    @property
    def usage(self) -> Usage:
        return self.account.usage

    def answers(self, calls: Sequence[Call], read: Callable[[int, dict], Answer]) -> Iterator[tuple[int, Answer]]:
        """What `read(place in calls, reply)` makes of each reply, as they come.

        The first failure stops what has not been sent; what is on its way is still given, then the failure is raised.

        Raises:
            TeacherError: see its kinds.
            TeacherBudgetExceeded: the next request could cost more than is left.
        """
        stop, failure = threading.Event(), None
        waiting, running = list(enumerate(calls))[::-1], {}
        with ThreadPoolExecutor(self.concurrency, "teacher") as pool:
            try:
                while running or (waiting and failure is None):
                    while waiting and failure is None and len(running) < self.concurrency:
                        i, call = waiting[-1]
                        short = self.account.reserve(call.most)
                        if short is None:
                            waiting.pop()
                            running[pool.submit(self._ask, i, call, read, stop)] = i
                        elif running:
                            break  # what runs may cost less than it could
                        else:
                            failure = TeacherBudgetExceeded(
                                f"{self}: {short}. What was answered is kept; raise the limit to go on"
                            )
                    for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                        i = running.pop(future)
                        if future.exception() is not None:
                            failure = failure or future.exception()
                            stop.set()
                        else:
                            yield i, future.result()
            finally:
                stop.set()
        if failure is not None:
            raise failure

    def answer(self, call: Call, read: Callable[[int, dict], Answer]) -> Answer:
        """Of a single call; see `answers`."""
        [(_, answer)] = self.answers([call], read)
        return answer

    # ---- one request, in a thread ------------------------------------------------------------------------------------
    def _ask(self, i: int, call: Call, read: Callable, stop: threading.Event):
        started, spent, counts = time.monotonic(), None, {"retries": 0, "failures": 1}
        try:
            while True:
                try:
                    reply = self._send(call)
                    spent, estimated = self._tokens(reply, call, spent)
                    answer = self._read(i, call, reply, read)
                    counts |= {"failures": 0, "requests": call.choices, "estimated": estimated}
                    return answer
                except _Failed as failed:
                    if counts["retries"] >= min(failed.retries, self.max_retries):
                        raise failed.error from failed.__cause__
                    delay = self._delay(counts["retries"]) if failed.wait is None else failed.wait
                    logger.warning("%s; again in %.1f s", failed.error, delay)
                    if stop.wait(delay):  # another request failed for good
                        raise failed.error from failed.__cause__
                    counts["retries"] += 1
        finally:
            self.account.settle(call.most, spent, seconds=time.monotonic() - started, **counts)

    def _delay(self, retries: int) -> float:
        return min(LONGEST_WAIT, self.backoff * 2**retries) * self._jitter.uniform(0.5, 1.0)

    def _send(self, call: Call) -> dict:
        token = os.environ.get(self.token_variable)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        address = f"{self.url}/{call.path}"
        try:
            body = {"model": self.model, **call.body, **self.extra_body}
            response = self._client.post(address, json=body, headers=headers)
        except httpx2.TimeoutException as error:
            seconds = f"{self._client.timeout.read:g} s"
            problem = f"{self} did not answer within {seconds}: raise timeout, or lower concurrency"
            raise _Failed(TeacherUnavailable(problem), self.max_retries) from error
        except httpx2.HTTPError as error:
            problem = f"{self} cannot be reached or cut the connection ({type(error).__name__}: {error})"
            raise _Failed(TeacherUnavailable(problem), self.max_retries) from error
        status = response.status_code
        if status in BUSY or status >= 500:
            wait = _retry_after(response)
            retries = self.max_retries if (wait or 0) <= LONGEST_ASKED else 0
            asked = "" if wait is None else f", and to wait {wait:g} s"
            raise _Failed(
                TeacherUnavailable(f"{self} answered {status}{asked}: {_shown(response, token)}"), retries, wait
            )
        if status >= 400:
            hint = self._hint(status, token)
            problem = f"{self} refused the request to {address} with {status}: {_shown(response, token)}{hint}"
            raise _Failed(TeacherRequestError(problem))
        try:
            reply = json.loads(response.content)
        except ValueError as error:
            kind = response.headers.get("content-type", "no content type")
            problem = f"{self} answered {status} with no JSON ({kind}): {_shown(response, token)}"
            raise _Failed(TeacherProtocolError(problem)) from error
        if not isinstance(reply, dict) or reply.get("error") or not isinstance(reply.get("choices"), list):
            problem = f"{self} answered {status}, but with an error or no choices: {_shown(response, token)}"
            raise _Failed(TeacherProtocolError(problem), retries=1)
        return reply

    def _read(self, i: int, call: Call, reply: dict, read: Callable):
        try:
            named = reply.get("model")
            if isinstance(named, str) and not named.startswith(self.model):
                raise BadReply(f"another model answered, {named!r}: if that is meant, ask for it by this name")
            choices = reply["choices"]
            if len(choices) < call.choices or not all(isinstance(choice, dict) for choice in choices):
                again = not choices
                raise BadReply(f"{len(choices)} choices came where {call.choices} were asked for", again=again)
            return read(i, reply)
        except BadReply as bad:
            raise _Failed(TeacherProtocolError(f"{self} answered, but {bad}"), retries=int(bad.again)) from None

    @staticmethod
    def _tokens(reply: dict, call: Call, before: tuple[int, int] | None) -> tuple[tuple[int, int], int]:
        """Prompt and completion tokens spent with those of a first try, and whether they had to be estimated."""
        usage = reply["usage"] if isinstance(reply.get("usage"), dict) else {}
        told = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        spent = [most if count is None else int(count) for count, most in zip(told, call.most, strict=True)]
        before = before or (0, 0)
        return (before[0] + spent[0], before[1] + spent[1]), int(None in told)

    def _hint(self, status: int, token: str | None) -> str:
        if status in (401, 403):
            return f" (the environment variable {self.token_variable} {'is set' if token else 'holds no token'})"
        return f" (is {self.model!r} the name in {self.url}/models?)" if status == 404 else ""


def _checked_url(url: str) -> str:
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"the endpoint must be a URL such as http://localhost:8000, got {url!r}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"the endpoint must be a URL such as http://localhost:8000, got {url!r}")
    if parsed.userinfo or parsed.query:
        raise ValueError("the endpoint's URL holds a password or a query: give the token by the environment only")
    return url.rstrip("/").removesuffix("/v1") + "/v1"


def _budget(settings: dict) -> Budget:
    try:
        return Budget(**settings)
    except TypeError:
        unknown = ", ".join(sorted(settings.keys() - Budget.__dataclass_fields__.keys()))
        raise ValueError(f"an endpoint has no setting {unknown}: see hf_distill.teachers.endpoint.Endpoint") from None


def _shown(response: httpx2.Response, token: str | None) -> str:
    """How an answer begins, without a token that the server repeats."""
    text = response.text[: 5 * SHOWN]
    text = text.replace(token, "***") if token else text
    return repr(text[:SHOWN] + ("..." if len(text) > SHOWN else ""))


def _retry_after(response: httpx2.Response) -> float | None:
    asked = response.headers.get("retry-after", "")
    return float(asked) if asked.isdigit() else None


__all__ = [
    "BadReply",
    "Call",
    "Endpoint",
    "TeacherError",
    "TeacherProtocolError",
    "TeacherRequestError",
    "TeacherUnavailable",
]
