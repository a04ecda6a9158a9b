"""Answers to prompts: the model's own draws, once or in every epoch, and the same after a resume."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from hf_distill import FrozenTeacher
from hf_distill.curricula.responses import FreshResponses, RenewResponses, answered, prompts_of, writer_of
from tests.helpers import text_dataset, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def asked_of(n: int) -> list[str]:
    return [f"w{7 * i % 61} w{11 * i % 61}" for i in range(n)]


def test_answers_are_other_than_the_models_own_draws_or_lose_prompts_and_ends(tmp_path):
    writer = writer_of(FrozenTeacher(tiny_llama(24, 1, seed=1), TOKENIZER), TOKENIZER, torch.device("cpu"))
    asked = asked_of(5)
    rows = answered(writer, asked, samples=3, max_new_tokens=6, seed=4)
    assert len(rows) == 15 and rows[0]["input_ids"] != rows[1]["input_ids"]
    texts = writer.generate(asked, num_return_sequences=3, max_new_tokens=6, seed=4)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        prompt = TOKENIZER(asked[i // 3])["input_ids"]
        assert row["input_ids"] == prompt + text.token_ids and len(text.token_ids) <= 6
        assert row["labels"] == [-100] * len(prompt) + text.token_ids
    assert rows[:] == answered(writer, asked, samples=3, max_new_tokens=6, seed=4)[:]
    assert rows[:] != answered(writer, asked, samples=3, max_new_tokens=6, seed=5)[:]
    with pytest.raises(ValueError, match="a prompt of 2 tokens and an answer of up to 6 do not fit into max_length 7"):
        answered(writer, asked, max_new_tokens=6, max_length=7)


def test_a_padded_head_writes_ids_that_are_no_tokens():
    padded = FrozenTeacher(tiny_llama(24, 1, vocabulary=200, seed=1), TOKENIZER)
    rows = answered(writer_of(padded, TOKENIZER, torch.device("cpu")), asked_of(9), max_new_tokens=9)
    assert max(max(row) for row in rows["input_ids"]) < 64


def test_prompts_are_taken_from_conversations_with_their_answers():
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "c"}],
    ]
    found = prompts_of(Dataset.from_dict({"messages": chats}))
    assert found == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "c"}]]
    with pytest.raises(ValueError, match="a column prompt or messages, the data has text"):
        prompts_of(text_dataset(2))
    with pytest.raises(ValueError, match="conversation 0 has nothing before its answer"):
        prompts_of(Dataset.from_dict({"messages": [[{"role": "assistant", "content": "b"}]]}))


def test_rows_are_written_anew_in_every_epoch_or_differ_after_a_resume():
    written = []

    def write(round_):
        written.append(round_)
        return Dataset.from_dict({"input_ids": [[round_]], "labels": [[round_]]})

    rows = FreshResponses(write(0), write, every=2)
    move = RenewResponses(rows)
    seen = []
    for epoch in (None, 0.0, 1.0, 1.9999999, 2.0, 3.0, 4.0):  # the epoch as the trainer counts it, resumed ones too
        move.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        seen.append(rows[0]["input_ids"][0])
    assert seen == [0, 0, 0, 1, 1, 1, 2] and written == [0, 1, 2]
    resumed = FreshResponses(write(0), write, every=2)
    RenewResponses(resumed).on_epoch_begin(None, SimpleNamespace(epoch=4.4), None)
    assert resumed[0] == rows[0]
