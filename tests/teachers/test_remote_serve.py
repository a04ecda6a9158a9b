"""A text teacher behind a real `transformers serve` process; it needs the packages of transformers' extra `serving`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from transformers.utils.import_utils import is_serve_available

from hf_distill import LocalTextTeacher, RemoteTeacher, RemoteTextTeacher
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers.endpoint import TeacherError, TeacherProtocolError, TeacherUnavailable
from tests.launching import free_port

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="transformers serve needs transformers[serving]")

MODEL = str(EMBEDDED / "teacher")
PROMPTS = ["def main(", "import os\n", "class Node:\n    def __init__(self"]
GREEDY = dict(max_new_tokens=8, temperature=0)


def start(port: int, cache: Path) -> subprocess.Popen:
    program = Path(sys.executable).with_name("transformers")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [str(program), "serve", MODEL, "--device", "cpu", "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        assert server.poll() is None, "transformers serve ended at once"
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                return server
        except httpx2.HTTPError:
            time.sleep(0.2)
    server.kill()
    raise AssertionError("transformers serve did not start")


def test_a_real_server_says_something_else_or_a_kill_loses_texts(tmp_path):
    port, url, store = free_port(), None, tmp_path / "texts"
    url = f"http://127.0.0.1:{port}"
    server = start(port, tmp_path)
    try:
        local = LocalTextTeacher(MODEL).generate(PROMPTS, **GREEDY)
        teacher = RemoteTextTeacher(url, MODEL, store=store, max_retries=1, backoff=0.05)
        texts = teacher.generate(PROMPTS, **GREEDY)
        assert [t.text for t in texts] == [t.text for t in local]
        assert [t.prompt_tokens for t in texts] == [t.prompt_tokens for t in local]
        assert [t.completion_tokens for t in texts] == [t.completion_tokens for t in local]

        stopped = dict(max_new_tokens=12, temperature=0, stop_strings=[local[0].text[2:4]])
        there = teacher.generate(PROMPTS[:1], **stopped)
        assert there[0].text == LocalTextTeacher(MODEL).generate(PROMPTS[:1], **stopped)[0].text == local[0].text[:2]

        # what it drops in silence: log-probabilities, several choices, schemas
        with pytest.raises(TeacherProtocolError, match="`logprobs` was dropped"):
            teacher.generate(PROMPTS[:1], **GREEDY, log_probs=True)
        several = RemoteTextTeacher(url, MODEL, choices_per_request=2)
        with pytest.raises(TeacherProtocolError, match="1 choices came where 2 were asked for"):
            several.generate(PROMPTS[:1], max_new_tokens=4, num_return_sequences=2)
        with pytest.raises(TeacherError, match="422.*response_format"):
            teacher.generate(PROMPTS[:1], **GREEDY, response_schema={"type": "object"})
        with pytest.raises(TeacherError, match="prompt_logprobs"):
            RemoteTeacher(url, MODEL, tokenizer=LocalTextTeacher(MODEL).tokenizer).check()

        server.kill()
        server.wait()
        with pytest.raises(TeacherUnavailable, match=f"127.0.0.1:{port}"):
            teacher.generate([*PROMPTS, "while True:"], **GREEDY)
        server = start(port, tmp_path)
        resumed = RemoteTextTeacher(url, MODEL, store=store)
        assert resumed.generate([*PROMPTS, "while True:"], **GREEDY)[:3] == texts
        assert (resumed.usage.requests, resumed.usage.cache_hits) == (1, 3)
    finally:
        server.kill()
        server.wait()
