"""What text teachers wrote: kept, resumed after a kill, counted, and whose it is."""

import json

import pytest

from hf_distill import TextTeacher
from hf_distill.teachers.generations import Generation, GenerationStore
from tests.helpers import tiny_tokenizer
from tests.teachers.test_text import PROMPTS, TEMPLATE, tiny_teacher

SETTINGS = dict(max_new_tokens=6, num_return_sequences=2, seed=4, log_probs=True)


class Killed(BaseException):
    pass


def test_a_killed_run_pays_twice_or_leaves_another_store(tmp_path):
    whole = tiny_teacher(store=tmp_path / "whole", batch_size=2)
    texts = whole.generate(PROMPTS, **SETTINGS)
    teacher = tiny_teacher(store=tmp_path / "killed", batch_size=2)
    write, batches = teacher._write, []

    def killed(prompts, requests):
        batches.append(len(prompts))
        if len(batches) == 4:
            raise Killed
        return write(prompts, requests)

    teacher._write = killed
    with pytest.raises(Killed):
        teacher.generate(PROMPTS, **SETTINGS)
    [file] = (tmp_path / "killed").glob("*.jsonl")
    with open(file, "ab") as torn:
        torn.write(b'{"key": "half a li')

    again = tiny_teacher(store=tmp_path / "killed", batch_size=2)
    write, seen = again._write, []
    again._write = lambda prompts, requests: seen.extend(requests) or write(prompts, requests)
    assert again.generate(PROMPTS, **SETTINGS) == texts
    assert len(seen) == 6 == len({(r.prompt, r.index) for r in seen})
    assert (again.usage.requests, again.usage.cache_hits) == (6, 6)
    assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()

    free = tiny_teacher(store=tmp_path / "killed")
    free._write = None
    assert free.generate(PROMPTS[::-1], **SETTINGS)[-2:] == texts[:2]
    assert (free.usage.requests, free.usage.cache_hits, free.usage.completion_tokens) == (0, 12, 0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 12 and {line["prompt"] for line in lines} == set(PROMPTS)


def test_other_settings_are_served_from_the_store(tmp_path):
    teacher = tiny_teacher(store=tmp_path)
    teacher.generate(["w1"], max_new_tokens=3)
    for change in (
        dict(seed=1), dict(max_new_tokens=4), dict(temperature=0.5), dict(top_p=0.5), dict(stop_strings=["w1"]),
        dict(log_probs=True),
    ):  # fmt: skip
        before = teacher.usage.requests
        teacher.generate(["w1"], **dict(max_new_tokens=3) | change)
        assert teacher.usage.requests == before + 1, change
    before = teacher.usage.requests
    greedy = [teacher.generate(["w1"], max_new_tokens=3, temperature=0, top_p=p, seed=s) for p, s in ((1, 0), (0.5, 9))]
    assert greedy[0] == greedy[1] and teacher.usage.requests == before + 1
    chat = [{"role": "user", "content": "w1"}]
    teacher.tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="chat_template: nothing in the cache"):
        GenerationStore(tmp_path, teacher.fingerprint())
    teacher.generate([chat], max_new_tokens=3)


def test_what_was_asked_is_counted_wrongly():
    teacher = tiny_teacher()
    texts = teacher.generate(["w1 w2", "w3", "w1 w2"], max_new_tokens=5, num_return_sequences=2)
    assert texts[:2] == texts[4:]
    usage = teacher.usage
    assert (usage.requests, usage.cache_hits, usage.prompt_tokens) == (4, 2, 2 * 2 + 2 * 1)
    assert usage.completion_tokens == sum(len(t.token_ids) for t in texts[:4])
    teacher.label_log_probs(["w1 w2", "w3"], ["w1", "w2"])
    assert (usage.requests, usage.prompt_tokens) == (6, 9)


def test_another_teacher_s_store_is_taken(tmp_path):
    tiny_teacher(store=tmp_path).generate(["w1"], max_new_tokens=2)
    tiny_teacher(store=tmp_path)
    with pytest.raises(ValueError, match="are another teacher's.*\n  weights: [0-9a-f]+ in the cache, [0-9a-f]+ now$"):
        tiny_teacher(seed=1, store=tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="chat_template: nothing in the cache"):
        tiny_teacher(tokenizer=tokenizer, store=tmp_path)
    (tmp_path / "generations-00000.jsonl").write_text('{"key": "a"\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="generations-00000.jsonl, line 1 is broken"):
        tiny_teacher(store=tmp_path)
    (tmp_path / "teacher.json").unlink()
    with pytest.raises(ValueError, match="no teacher.json that says whose"):
        tiny_teacher(store=tmp_path)


class Scripted(TextTeacher):
    """What a teacher behind an endpoint gives: the same records, the same store, no model."""

    name = "scripted"

    def fingerprint(self):
        return {"kind": "scripted", "model": "a"}

    def answer(self, requests):
        for i in reversed(range(len(requests))):
            yield [(i, Generation(f"{requests[i].prompt}!{requests[i].index}", "stop", 1, 1))]


def test_a_teacher_elsewhere_needs_more_than_answers(tmp_path, monkeypatch):
    teacher = Scripted(store=tmp_path)
    texts = teacher.generate(["a", "b", "a"], num_return_sequences=2)
    assert [t.text for t in texts] == ["a!0", "a!1", "b!0", "b!1", "a!0", "a!1"]
    monkeypatch.setenv("RANK", "3")  # reads all ranks' files, writes its own
    other = Scripted(store=tmp_path)
    other.generate(["c", "a"])
    assert (other.usage.requests, other.usage.cache_hits) == (1, 1)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["generations-00000.jsonl", "generations-00003.jsonl"]
    assert len(Scripted(store=tmp_path).store) == 5
    with pytest.raises(NotImplementedError, match="Scripted cannot tell log-probabilities"):
        teacher.yes_no(["a"])
