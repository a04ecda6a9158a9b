"""A server that speaks vLLM's protocol for a tiny model: completions, chat, `prompt_logprobs`, with faults to order."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

MODEL = "org/teacher"
HTML = b"<html><title>Sign in</title></html>"
ERRORS = {
    400: "prompt_logprobs must be at most 20",
    401: "invalid token {token}",
    404: "The model does not exist",
    422: "Unexpected fields",
    429: "too many",
    500: "out of memory",
    503: "starting",
}


@dataclass
class LocalEndpoint:
    """A running server.

    Attributes:
        faults: what goes wrong with the next requests, one each: a status, or a name (see `_Handler._faulty`).
        always: what goes wrong with all of them.
        requests: bodies that came, with their path.
        succeeded: prompts that were answered well and in time.
        die_after: requests answered before the server is gone.
    """

    model: torch.nn.Module
    tokenizer: object
    name: str = MODEL
    faults: list = field(default_factory=list)
    always: object = None
    requests: list[dict] = field(default_factory=list)
    succeeded: list = field(default_factory=list)
    die_after: int | None = None
    delay: float = 0.0
    running: int = 0
    most_at_once: int = 0
    token: str | None = None
    url: str = ""
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def log_probs(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad(), self.lock:
            return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def entry(self, log_probs: torch.Tensor, k: int, token: int) -> dict:
        values, ids = log_probs.topk(k)
        pairs = dict([(token, log_probs[token].item()), *zip(ids.tolist(), values.tolist(), strict=True)])
        rank = {i: int((log_probs > value).sum()) + 1 for i, value in pairs.items()}
        return {
            str(i): {"logprob": value, "rank": rank[i], "decoded_token": self.tokenizer.decode([i])}
            for i, value in pairs.items()
        }


@contextlib.contextmanager
def local_endpoint(model, tokenizer, port: int = 0, **settings) -> Iterator[LocalEndpoint]:
    endpoint = LocalEndpoint(model.eval(), tokenizer, **settings)
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"endpoint": endpoint}))
    server.daemon_threads = True
    endpoint.port = server.server_port
    endpoint.url = f"http://127.0.0.1:{endpoint.port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield endpoint
    finally:
        endpoint.die_after = 0
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    endpoint: LocalEndpoint

    def log_message(self, *_):
        pass

    def do_POST(self) -> None:
        endpoint = self.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with endpoint.lock:
            if endpoint.die_after is not None and len(endpoint.succeeded) >= endpoint.die_after:
                return self._cut()
            endpoint.requests.append({"path": self.path, **body})
            endpoint.running += 1
            endpoint.most_at_once = max(endpoint.most_at_once, endpoint.running)
            fault = endpoint.always or (endpoint.faults.pop(0) if endpoint.faults else None)
        try:
            time.sleep(endpoint.delay)
            if endpoint.token and self.headers.get("Authorization") != f"Bearer {endpoint.token}":
                return self._error(401)
            if body["model"] != endpoint.name:
                return self._error(404)
            chat = self.path == "/v1/chat/completions"
            if not chat and self.path != "/v1/completions":
                return self._error(404)
            if fault == "slow":
                time.sleep(1.0)
            if isinstance(fault, int):
                return self._error(fault)
            return self._faulty(fault, self._reply(body, chat), body)
        finally:
            with endpoint.lock:
                endpoint.running -= 1

    # ---- answering ---------------------------------------------------------------------------------------------------
    def _reply(self, body: dict, chat: bool) -> dict:
        endpoint, tokenizer = self.endpoint, self.endpoint.tokenizer
        if chat:
            ids = tokenizer(" ".join(message["content"] for message in body["messages"]))["input_ids"]
        else:
            prompt = body["prompt"]
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        choices, written = [], 0
        for i in range(body.get("n", 1)):
            generator = torch.Generator().manual_seed(body.get("seed", 0) + i)
            out, log_probs = [], []
            while len(out) < body["max_tokens"]:
                own = endpoint.log_probs(ids + out)[-1]
                if body.get("temperature", 1.0) == 0:
                    token = int(own.argmax())
                else:
                    warmed = (own / body.get("temperature", 1.0)).softmax(-1)
                    token = int(torch.multinomial(warmed, 1, generator=generator))
                out.append(token)
                log_probs.append(own[token].item())
                if token == tokenizer.eos_token_id:
                    break
            text, reason = tokenizer.decode(out, skip_special_tokens=True), "length"
            if out[-1] == tokenizer.eos_token_id:
                reason = "stop"
            for stop in body.get("stop", ()):
                if stop in text:
                    text, reason = text[: text.index(stop)], "stop"
            choice = {"index": i, "finish_reason": reason, "logprobs": None}
            written += len(out)
            if chat:
                choice["message"] = {"role": "assistant", "content": text}
                if body.get("logprobs"):
                    choice["logprobs"] = {"content": [{"token": "", "logprob": value} for value in log_probs]}
            else:
                choice["text"] = text
                if body.get("logprobs") is not None:
                    choice["logprobs"] = {"token_logprobs": log_probs}
                if body.get("prompt_logprobs") is not None:
                    told = endpoint.log_probs(ids)
                    k = body["prompt_logprobs"]
                    rest = [endpoint.entry(told[s], k, ids[s + 1]) for s in range(len(ids) - 1)]
                    choice["prompt_logprobs"] = [None, *rest]
            choices.append(choice)
        usage = {"prompt_tokens": len(ids), "completion_tokens": written, "total_tokens": len(ids) + written}
        return {"id": "x", "object": "text_completion", "model": body["model"], "choices": choices, "usage": usage}

    def _faulty(self, fault: str | None, reply: dict, body: dict) -> None:
        """The reply, or what `fault` makes of it."""
        first = reply["choices"][0]
        if fault == "error body":
            return self._json({"error": {"message": "worker died", "code": 500}})
        if fault == "error too":
            reply["error"] = {"message": "cut short"}
        if fault == "keeps stop":
            first["text"] = f"before {body['stop'][0]} after"
        if fault == "no choices":
            reply["choices"] = []
        if fault == "null content":
            first.update({"text": None, "message": {"content": None}})
        if fault == "reasoning":
            first["message"] = {"content": None, "reasoning_content": "hmm"}
        if fault == "html":
            return self._send(HTML, 200, {"Content-Type": "text/html"})
        if fault == "cut":
            return self._send(json.dumps(reply).encode(), 200, {"Content-Type": "application/json"}, cut=True)
        if fault == "other model":
            reply["model"] = "org/other"
        if fault == "no logprobs":
            first.pop("prompt_logprobs", None)
            first["logprobs"] = None
        if fault == "fewer choices":
            reply["choices"] = reply["choices"][:1]
        if fault == "fewer logprobs":
            first["prompt_logprobs"][2].popitem()
            first["prompt_logprobs"][2].popitem()
        if fault == "fewer tokens":
            first["prompt_logprobs"].pop()
        if fault == "other tokens":
            for entry in first["prompt_logprobs"][1:]:
                del entry[next(iter(entry))]  # the one that was sent
        if fault == "tempered":
            for entry in first["prompt_logprobs"][1:]:
                for told in entry.values():
                    told["logprob"] = 0.0
        if fault == "no usage":
            del reply["usage"]
        if fault in (None, "no usage"):
            with self.endpoint.lock:
                self.endpoint.succeeded.append(json.dumps(body.get("prompt", body.get("messages"))))
        return self._json(reply)

    def _error(self, status: int) -> None:
        said = ERRORS[status].format(token=(self.headers.get("Authorization") or "").removeprefix("Bearer "))
        self._json({"error": {"message": said}}, status, {"Retry-After": "0"} if status == 429 else {})

    def _json(self, value, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, data: bytes, status: int, headers: dict, cut: bool = False) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True
