"""A text teacher behind an OpenAI-compatible endpoint: vLLM, TGI, llama.cpp, `transformers serve`, a paid API."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby

from hf_distill.teachers.endpoint import BadReply, Call, Endpoint
from hf_distill.teachers.generations import Generation, Request
from hf_distill.teachers.schemas import misfit
from hf_distill.teachers.text import Prompt, TextTeacher

SCHEMA_MODES = ("openai", "vllm", "tgi", "none")
AROUND = 32  # tokens that a chat template may put around a message


class RemoteTextTeacher(TextTeacher):
    """A model behind a URL that writes. Texts go to /v1/completions, conversations to /v1/chat/completions.

    The server's own sampling defaults stay in force where a request does not say otherwise (of vLLM: start it with
    `--generation-config vllm`, or give `extra_body={"top_k": -1}`). Whether a seed repeats a text is the server's
    matter; what is in the store is never asked for again.

    Args:
        url, model: of the server, and the name it serves the model under.
        store: see TextTeacher. The model's name, schema_mode and extra_body are the teacher's fingerprint; the URL is
            not. A server that changes the model under the same name is not found out.
        choices_per_request: texts of one prompt asked for at once (`n`): the prompt is paid for once, but the texts
            then depend on how they were grouped. 1 works with every server.
        schema_mode: how a response_schema is sent: "openai" (response_format json_schema), "vllm"
            (structured_outputs), "tgi" (response_format json_object), or "none" (not at all, and not checked).
        connection: to `Endpoint`: timeout, max_retries, concurrency, max_cost…

    Raises:
        ValueError: settings out of range; a store of another teacher.

    Example:
        >>> teacher = RemoteTextTeacher("http://localhost:8000", "Qwen/Qwen2.5-7B-Instruct")  # doctest: +SKIP
        >>> teacher.generate([[{"role": "user", "content": "Name a bird."}]])[0].text  # doctest: +SKIP
    """

    holds_to_schemas = True

    def __init__(
        self,
        url: str,
        model: str,
        *,
        store: str | os.PathLike | None = None,
        choices_per_request: int = 1,
        schema_mode: str = "openai",
        **connection,
    ):
        if choices_per_request < 1:
            raise ValueError(f"choices_per_request must be at least 1, got {choices_per_request}")
        if schema_mode not in SCHEMA_MODES:
            raise ValueError(f"schema_mode must be one of {', '.join(SCHEMA_MODES)}, got {schema_mode!r}")
        self.endpoint = Endpoint(url, model, **connection)
        self.choices_per_request, self.schema_mode, self.name = choices_per_request, schema_mode, model
        super().__init__(store)
        self.usage = self.endpoint.usage

    def fingerprint(self) -> dict:
        return {
            "kind": "endpoint",
            "model": self.endpoint.model,
            "schema_mode": self.schema_mode,
            "extra_body": self.endpoint.extra_body,
        }

    def count(self, generation: Generation) -> None:
        """The endpoint counted it when it answered."""

    def answer(self, requests: list[Request]) -> Iterator[list[tuple[int, Generation]]]:
        groups = []
        for _, same in groupby(range(len(requests)), lambda i: json.dumps(requests[i].prompt)):
            places = list(same)
            step = self.choices_per_request
            groups += [places[first : first + step] for first in range(0, len(places), step)]
        calls = [self._call([requests[i] for i in group]) for group in groups]

        def read(at: int, reply: dict) -> list[Generation]:
            return self._generations(requests[groups[at][0]], calls[at], reply)

        for at, generations in self.endpoint.answers(calls, read):
            yield list(zip(groups[at], generations, strict=True))

    def describe(self) -> dict:
        return super().describe() | self.usage.describe()

    # ---- asking ------------------------------------------------------------------------------------------------------
    def _call(self, requests: list[Request]) -> Call:
        first, count = requests[0], len(requests)
        chat = _is_conversation(first.prompt)
        body = {"messages" if chat else "prompt": first.prompt, "max_tokens": first.max_new_tokens}
        body |= {"temperature": first.temperature}
        if first.temperature:
            body |= {"top_p": first.top_p, "seed": _seed(first)}
        if first.stop_strings:
            body["stop"] = list(first.stop_strings)
        if first.log_probs:
            body["logprobs"] = True if chat else 1
        if count > 1:
            body["n"] = count
        if first.response_schema is not None:
            body |= _schema_entries(self.schema_mode, first.response_schema)
        most = _most_tokens(first.prompt), count * first.max_new_tokens
        return Call("chat/completions" if chat else "completions", body, most, count)

    # ---- reading -----------------------------------------------------------------------------------------------------
    def _generations(self, request: Request, call: Call, reply: dict) -> list[Generation]:
        choices = sorted(reply["choices"], key=lambda choice: choice.get("index") or 0)[: call.choices]
        texts = [_text_of(choice, call.path.startswith("chat")) for choice in choices]
        usage = reply["usage"] if isinstance(reply.get("usage"), dict) else {}
        prompt = usage.get("prompt_tokens")
        counts = _shares(usage.get("completion_tokens"), texts, request.max_new_tokens)
        return [
            self._generation(request, choice, text, call.most[0] if prompt is None else prompt, count, len(texts) == 1)
            for choice, text, count in zip(choices, texts, counts, strict=True)
        ]

    def _generation(
        self, request: Request, choice: dict, text: str, prompt: int, completion: int, alone: bool
    ) -> Generation:
        reason = choice.get("finish_reason")
        cuts = [at for s in request.stop_strings if (at := text.find(s)) >= 0]
        if cuts:  # some servers leave the stop string in
            text, reason = text[: min(cuts)], "stop"
        if not isinstance(reason, str):
            raise BadReply(f"it does not say why the text ended (finish_reason {reason!r})", again=True)
        schema = request.response_schema
        if schema is not None and self.schema_mode != "none" and reason == "stop":
            if wrong := misfit(schema, text):
                raise BadReply(
                    f"its text does not fit the response_schema ({wrong}), so schema_mode={self.schema_mode!r} is not "
                    f"enforced there: {text[:200]!r}. Try another of {', '.join(SCHEMA_MODES)}"
                )
        log_probs = _log_probs_of(choice, completion if alone else 0) if request.log_probs else None
        return Generation(text, reason, prompt, completion, log_probs=log_probs)


def _is_conversation(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and isinstance(prompt[0], dict)


def _seed(request: Request) -> int:
    """Other draws for each text: a seed alone is the same draws for every prompt, and for the next choice the next."""
    prompt = json.dumps(request.prompt, sort_keys=True)
    digest = hashlib.sha256(f"{request.seed} {request.index} {prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _most_tokens(prompt: Prompt) -> int:
    """A token holds a byte at least."""
    if isinstance(prompt, str):
        return len(prompt.encode()) + AROUND
    if not _is_conversation(prompt):
        return len(prompt)
    return sum(len(json.dumps(m, ensure_ascii=False).encode()) + AROUND for m in prompt)


def _schema_entries(mode: str, schema: dict) -> dict:
    if mode == "openai":
        named = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    if mode == "vllm":
        return {"structured_outputs": {"json": schema}}
    return {"response_format": {"type": "json_object", "value": schema}} if mode == "tgi" else {}


def _text_of(choice: dict, chat: bool) -> str:
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text = message.get("content") if chat else choice.get("text")
    if isinstance(text, str):
        return text
    if any(message.get(name) for name in ("reasoning", "reasoning_content")):
        raise BadReply("all of the text is reasoning and there is no answer: raise max_new_tokens", again=True)
    raise BadReply(f"a choice holds no text: {json.dumps(choice)[:200]}", again=True)


def _shares(total: int | None, texts: Sequence[str], most: int) -> list[int]:
    """Tokens of each text, of those that were counted together; from above where they were not counted."""
    sizes = [len(text.encode()) for text in texts]
    if total is None:
        return [min(most, size + 1) for size in sizes]
    if len(texts) == 1:
        return [total]
    ends = [round(total * sum(sizes[: i + 1]) / max(sum(sizes), 1)) for i in range(len(sizes))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _log_probs_of(choice: dict, completion: int) -> list[float]:
    told = choice.get("logprobs")
    told = told if isinstance(told, dict) else {}
    if isinstance(told.get("content"), list):
        values = [entry.get("logprob") for entry in told["content"]]
    else:
        values = told.get("token_logprobs")
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
        raise BadReply(
            "log-probabilities were asked for and none came (`logprobs` was dropped): use a server that has them, such "
            "as vLLM"
        )
    if completion > 1 and len(values) < completion - 1:  # the end of the text is counted by some
        raise BadReply(f"log-probabilities of {len(values)} tokens came, but the text has {completion}")
    return [float(value) for value in values]


__all__ = ["SCHEMA_MODES", "RemoteTextTeacher"]
