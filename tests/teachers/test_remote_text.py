"""Text teachers behind an endpoint: every misbehaviour is an error that names it, what was paid for is kept."""

import logging
import os
import time

import pytest

from hf_distill import LocalTextTeacher, RemoteTextTeacher
from hf_distill.teachers.endpoint import TeacherError, TeacherProtocolError, TeacherRequestError, TeacherUnavailable
from hf_distill.teachers.schemas import misfit
from hf_distill.teachers.usage import TeacherBudgetExceeded
from tests.helpers import tiny_llama, tiny_tokenizer
from tests.teachers.local_endpoint import MODEL, local_endpoint

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w1 w2", "w9 w9 w3 w4", "w7"]
CHAT = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
QUICK = dict(backoff=0.01, timeout=5.0)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=0)


@pytest.fixture
def server(model):
    with local_endpoint(model, tiny_tokenizer()) as endpoint:
        yield endpoint


def remote(server, **settings) -> RemoteTextTeacher:
    return RemoteTextTeacher(server.url, settings.pop("model", MODEL), **QUICK | settings)


def all_bytes(folder) -> bytes:
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


# ---- what it says ----------------------------------------------------------------------------------------------------
def test_greedy_texts_and_log_probs_are_not_those_of_the_model_in_this_process(server, model):
    settings = dict(max_new_tokens=8, temperature=0, log_probs=True, stop_strings=["w3"])
    local = LocalTextTeacher(model, tiny_tokenizer()).generate(PROMPTS, **settings)
    for here, there in zip(local, remote(server).generate(PROMPTS, **settings), strict=True):
        assert there.text.strip() == here.text.strip()
        assert (there.finish_reason, there.prompt_tokens) == (here.finish_reason, here.prompt_tokens)
        shared = min(len(here.log_probs), len(there.log_probs))  # the server ran on to its stop string
        assert there.log_probs[:shared] == pytest.approx(here.log_probs[:shared], abs=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS, CHAT, [[3, 4, 5], [6]]], ids=["text", "chat", "ids"])
def test_several_texts_of_a_prompt_are_the_same_or_in_another_order(server, prompts):
    settings = dict(max_new_tokens=8, num_return_sequences=3, seed=5)
    texts = remote(server).generate(prompts, **settings)
    assert len({t.text for t in texts}) == len(texts) == 3 * len(prompts)
    assert [r.get("n") for r in server.requests] == [None] * len(texts)
    again = remote(server, concurrency=1).generate(prompts[::-1], **settings)
    assert [again[i : i + 3] for i in range(0, len(again), 3)][::-1] == [
        texts[i : i + 3] for i in range(0, len(texts), 3)
    ]


def test_grouped_choices_cost_a_prompt_each(server):
    teacher = remote(server, choices_per_request=3)
    texts = teacher.generate(["w1 w2", "w4"], max_new_tokens=5, num_return_sequences=4, log_probs=True)
    assert sorted(r.get("n", 1) for r in server.requests) == [1, 1, 3, 3]
    assert len({t.text for t in texts[:4]}) == 4
    written = sum(len(t.log_probs) for t in texts)
    assert (teacher.usage.requests, teacher.usage.prompt_tokens) == (8, 2 * 2 + 2 * 1)
    assert teacher.usage.completion_tokens == written == sum(t.completion_tokens for t in texts)


def test_a_stop_string_that_the_server_leaves_in_is_passed_on(server):
    server.faults = ["keeps stop"]
    [text] = remote(server).generate(["w1"], max_new_tokens=4, stop_strings=["w3"])
    assert (text.text, text.finish_reason) == ("before ", "stop")


def test_requests_wait_for_each_other(server):
    server.delay = 0.05
    remote(server, concurrency=3).generate(PROMPTS * 2, max_new_tokens=2, temperature=0)
    assert server.most_at_once == 3


# ---- resume, account, secrets ----------------------------------------------------------------------------------------
def test_a_killed_run_pays_twice(server, tmp_path, model):
    server.die_after = 4
    teacher = remote(server, store=tmp_path, max_retries=1, concurrency=2)
    with pytest.raises(TeacherUnavailable, match=rf"127.0.0.1:{server.port}.*{MODEL}.*cut the connection"):
        teacher.generate(PROMPTS, max_new_tokens=4, num_return_sequences=2)
    assert len(server.succeeded) == 4
    server.die_after = None
    resumed = remote(server, store=tmp_path)
    texts = resumed.generate(PROMPTS, max_new_tokens=4, num_return_sequences=2)
    assert len(server.succeeded) == 12 and (resumed.usage.requests, resumed.usage.cache_hits) == (8, 4)
    free = RemoteTextTeacher("http://127.0.0.1:9", MODEL, store=tmp_path)  # another address, the same teacher
    assert free.generate(PROMPTS, max_new_tokens=4, num_return_sequences=2) == texts
    assert texts == remote(server).generate(PROMPTS, max_new_tokens=4, num_return_sequences=2)
    with pytest.raises(ValueError, match="are another teacher's.*\n  model: org/teacher in the cache, other now"):
        remote(server, model="other", store=tmp_path)


def test_the_token_is_written_somewhere(server, tmp_path, monkeypatch, caplog):
    server.token = "sk-very-secret"
    monkeypatch.setenv("TEACHER_API_KEY", "sk-wrong-secret")
    with pytest.raises(TeacherRequestError, match=r"401.*invalid token \*\*\*.*TEACHER_API_KEY is set") as refused:
        remote(server, store=tmp_path).generate(["w1"], max_new_tokens=2)
    monkeypatch.setenv("OTHER_KEY", "sk-very-secret")
    teacher = remote(server, store=tmp_path, token_variable="OTHER_KEY")
    server.faults = [500]
    with caplog.at_level(logging.DEBUG):
        teacher.generate(["w1"], max_new_tokens=2)
    written = all_bytes(tmp_path).decode() + caplog.text + str(refused.value) + str(teacher.describe())
    assert "secret" not in written and "w1" in written
    monkeypatch.delenv("TEACHER_API_KEY")
    with pytest.raises(TeacherRequestError, match="TEACHER_API_KEY holds no token"):
        remote(server).generate(["w1"], max_new_tokens=2)
    with pytest.raises(ValueError, match="holds a password"):
        RemoteTextTeacher("http://me:secret@localhost", MODEL)


def test_tokens_and_cost_are_counted_wrongly(server):
    prices = dict(price_per_1k_prompt=2.0, price_per_1k_completion=10.0)
    teacher = remote(server, **prices)
    texts = teacher.generate(PROMPTS + PROMPTS[:1], max_new_tokens=5, temperature=0)
    usage = teacher.usage
    assert (usage.requests, usage.cache_hits, usage.retries, usage.failures, usage.estimated) == (6, 1, 0, 0, 0)
    assert usage.prompt_tokens == sum(len(p.split()) for p in PROMPTS)
    assert usage.completion_tokens == sum(t.completion_tokens for t in texts[:6])
    assert usage.cost == pytest.approx((2 * usage.prompt_tokens + 10 * usage.completion_tokens) / 1000)
    assert teacher.describe()["teacher_cost"] == pytest.approx(usage.cost)
    server.always = "no usage"
    guess = remote(server)
    [text] = guess.generate(["w1 w2"], max_new_tokens=5, temperature=0)
    assert guess.usage.estimated == 1
    assert guess.usage.prompt_tokens >= 2 and 0 < text.completion_tokens <= guess.usage.completion_tokens == 5


@pytest.mark.parametrize("limit", [dict(max_tokens_total=130), dict(max_cost=0.130)])
def test_a_budget_is_overrun_or_loses_what_was_paid(server, tmp_path, limit):
    prices = dict(price_per_1k_prompt=1.0, price_per_1k_completion=1.0)
    teacher = remote(server, store=tmp_path, **prices, **limit)
    with pytest.raises(TeacherBudgetExceeded, match="are spent|is spent"):
        teacher.generate(PROMPTS * 3, max_new_tokens=20, num_return_sequences=4, seed=3)
    assert 40 < teacher.usage.tokens <= 130
    paid = len(server.succeeded)
    assert paid == teacher.usage.requests == all_bytes(tmp_path).count(b'"key"') > 0
    richer = remote(server, store=tmp_path)
    richer.generate(PROMPTS * 3, max_new_tokens=20, num_return_sequences=4, seed=3)
    assert len(server.succeeded) == 24 and richer.usage.requests == 24 - paid


# ---- misbehaviour ----------------------------------------------------------------------------------------------------
FATAL = {
    "html": (TeacherProtocolError, r"no JSON \(text/html\).*Sign in", 1),
    "error body": (TeacherProtocolError, "no choices.*worker died", 2),
    "error too": (TeacherProtocolError, "an error or no choices", 2),
    "no choices": (TeacherProtocolError, "0 choices came where 1 were asked for", 2),
    "null content": (TeacherProtocolError, "holds no text", 2),
    "reasoning": (TeacherProtocolError, "all of the text is reasoning.*raise max_new_tokens", 2),
    "other model": (TeacherProtocolError, "another model answered, 'org/other'", 1),
    "no logprobs": (TeacherProtocolError, "`logprobs` was dropped", 1),
    "cut": (TeacherUnavailable, "cut the connection", 3),
    "slow": (TeacherUnavailable, "did not answer within 0.3 s", 3),
    400: (TeacherRequestError, "400.*must be at most 20", 1),
    404: (TeacherRequestError, "404.*does not exist", 1),
    422: (TeacherRequestError, "422.*Unexpected fields", 1),
    429: (TeacherUnavailable, "429, and to wait 0 s.*too many", 3),
    500: (TeacherUnavailable, "500.*out of memory", 3),
    503: (TeacherUnavailable, "503.*starting", 3),
}


@pytest.mark.parametrize("fault", FATAL)
def test_a_misbehaving_server_is_believed_or_not_named(server, tmp_path, fault):
    kind, message, asked = FATAL[fault]
    teacher = remote(server, store=tmp_path, max_retries=2, concurrency=1, timeout=0.3 if fault == "slow" else 5.0)
    chat = dict(max_new_tokens=3, temperature=0, log_probs=True)
    teacher.generate(CHAT[:1], **chat)
    server.always = fault
    with pytest.raises(kind, match=message) as error:
        teacher.generate(CHAT[:3], **chat)
    assert f"{server.url}/v1 (model {MODEL})" in str(error.value)
    assert len(server.requests) == 1 + asked
    assert (teacher.usage.requests, teacher.usage.retries, teacher.usage.failures) == (1, asked - 1, 1)
    assert all_bytes(tmp_path).count(b'"key"') == 1
    server.always = None
    server.succeeded.clear()
    assert len(remote(server, store=tmp_path).generate(CHAT[:3], **chat)) == 3 == len(server.succeeded) + 1


@pytest.mark.parametrize("fault", ["error body", "no choices", "null content", "cut", 429, 500, 503])
def test_a_passing_fault_ends_the_run(server, fault):
    server.faults = [fault]
    teacher = remote(server)
    [text] = teacher.generate(PROMPTS[:1], max_new_tokens=3, temperature=0)
    assert text.completion_tokens and teacher.usage.retries == 1 and teacher.usage.failures == 0


def test_a_wrong_name_or_address_is_found_out_late(server, tmp_path):
    with pytest.raises(TeacherRequestError, match="is 'org/typo' the name in .*/v1/models"):
        remote(server, model="org/typo").generate(PROMPTS, max_new_tokens=2)
    assert len(server.requests) <= 4
    nobody = RemoteTextTeacher("http://127.0.0.1:9", MODEL, max_retries=1, backoff=0.01)
    with pytest.raises(TeacherUnavailable, match="127.0.0.1:9.*cannot be reached"):
        nobody.generate(PROMPTS, max_new_tokens=2)


def test_fewer_choices_than_asked_are_filled_up(server):
    server.always = "fewer choices"
    with pytest.raises(TeacherProtocolError, match="1 choices came where 3 were asked for"):
        remote(server, choices_per_request=3).generate(["w1"], num_return_sequences=3, max_new_tokens=2)


def test_one_failure_throws_away_what_was_on_its_way(server, tmp_path):
    server.delay, server.faults = 0.1, [422]
    with pytest.raises(TeacherRequestError, match="422"):
        remote(server, store=tmp_path, concurrency=4).generate(PROMPTS, max_new_tokens=2, temperature=0)
    assert len(server.succeeded) == 3 == all_bytes(tmp_path).count(b'"key"')


def test_a_failure_waits_for_another_request_to_be_tried_again(server):
    server.faults = [503, 422]
    begin = time.monotonic()
    with pytest.raises(TeacherError, match="503|422"):
        remote(server, concurrency=2, backoff=20.0).generate(PROMPTS, max_new_tokens=2)
    assert time.monotonic() - begin < 5 and len(server.requests) == 2


def test_schemas_are_not_sent_or_not_checked(server):
    schema = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}
    sent = {
        "openai": {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        "vllm": {"structured_outputs": {"json": schema}},
        "tgi": {"response_format": {"type": "json_object", "value": schema}},
    }
    for mode, expected in sent.items():
        with pytest.raises(TeacherProtocolError, match=f"does not fit the response_schema .no JSON.*{mode}"):
            remote(server, schema_mode=mode).generate(
                ["w1"], response_schema=schema, stop_strings=["w"], max_new_tokens=9
            )
        body = server.requests[-1]
        for name in ("name", "strict"):
            (body.get("response_format") or {}).get("json_schema", {}).pop(name, None)
        assert expected.items() <= body.items()
    remote(server, schema_mode="none").generate(["w1"], response_schema=schema, stop_strings=["w"], max_new_tokens=9)
    assert not {"response_format", "structured_outputs"} & server.requests[-1].keys()
    with pytest.raises(ValueError, match="LocalTextTeacher cannot hold to a response_schema"):
        LocalTextTeacher(server.model, tiny_tokenizer()).generate(["w1"], response_schema=schema)


def test_a_misfit_is_accepted():
    schema = {"type": "array", "items": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}
    assert misfit(schema, '[{"n": 1}, {"n": 2, "more": []}]') is None
    assert misfit(schema, '[{"n": 1}, {"n": true}]') == "[1].n is no integer"
    assert misfit(schema, '[{"n": 1}, {}]') == "[1].n is missing"
    assert misfit({"enum": ["a", "b"]}, '"c"') == "the whole is none of ['a', 'b']"
    assert misfit(schema, "[") == "no JSON"


def test_bad_settings_are_taken():
    for settings, message in {
        "url": (dict(url="localhost:8000"), "must be a URL"),
        "model": (dict(model=""), "the name that"),
        "n": (dict(choices_per_request=0), "choices_per_request must be at least 1"),
        "schema": (dict(schema_mode="guided"), "schema_mode must be one of openai, vllm, tgi, none"),
        "timeout": (dict(timeout=0), "timeout must be positive"),
        "concurrency": (dict(concurrency=0), "concurrency must be at least 1"),
        "prices": (dict(max_cost=3.0), "max_cost needs prices"),
        "price": (dict(price_per_1k_prompt=float("nan")), "price_per_1k_prompt must be 0 or positive"),
        "unknown": (dict(max_token_total=3), "no setting max_token_total"),
    }.values():
        with pytest.raises(ValueError, match=message):
            RemoteTextTeacher(**dict(url="http://localhost:8000", model="m") | settings)
    assert "TEACHER_API_KEY" not in os.environ
