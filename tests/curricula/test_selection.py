"""Scores of a corpus: streamed in flat memory, shared by ranks, and a kill costs one shard."""

import gc
import os
import signal
import tracemalloc

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_distill import FrozenTeacher
from hf_distill.curricula.corpus import Corpus, Unit
from hf_distill.curricula.selection import score, write_units
from tests.helpers import text_dataset, tiny_llama, tiny_tokenizer


def teacher(**changes) -> FrozenTeacher:
    return FrozenTeacher(tiny_llama(8, 1, **changes), tiny_tokenizer(), name="some/teacher")


def corpus_of(data, **changes) -> Corpus:
    return Corpus(data, tiny_tokenizer(), **dict(length=16) | changes)


def stream(documents: int) -> IterableDataset:
    def rows():
        for i in range(documents):
            yield {"text": " ".join(f"w{(7 * i + j * j) % 61}" for j in range(16))}

    return IterableDataset.from_generator(rows)


def counting(model: FrozenTeacher, at_call=lambda calls: None) -> list:
    calls: list[int] = []

    def hook(*_):
        calls.append(1)
        at_call(len(calls))

    model.model.base_model.register_forward_hook(hook)
    return calls


# ---- memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["chunks", "documents"])
def test_memory_grows_with_the_corpus(tmp_path, unit):
    shard, alive, peaks = 32, [], {}
    model = teacher()
    counting(model, lambda _: alive.append(sum(type(o) is Unit for o in gc.get_objects())))
    for times in (1, 1, 10):  # the first fills caches
        gc.collect()
        tracemalloc.start()
        place = tmp_path / f"{times}-{len(peaks)}"
        made = score(model, corpus_of(stream(128 * times), unit=unit), place, shard_units=shard, batch_size=16)
        peaks[times] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert made.done["units"] == len(made.sums) == 128 * times and made.done["tokens_per_second"] > 0
    assert max(alive) <= shard + 1, max(alive)
    assert peaks[10] < peaks[1] + 100_000, peaks  # 1,152 more units: texts and ids would be far more than a megabyte


# ---- what stands -----------------------------------------------------------------------------------------------------
def killed(function) -> None:
    """Run in a child that must die of SIGKILL."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_kill_costs_more_than_a_shard(tmp_path):
    corpus = corpus_of(text_dataset(40), unit="documents")
    whole = score(teacher(), corpus, tmp_path / "whole", shard_units=4, batch_size=2)

    def dies():  # in the middle of the sixth shard, and once more in the eighth
        model = teacher()
        counting(model, lambda calls: os.kill(os.getpid(), signal.SIGKILL) if calls > 2 + 5 * 2 else None)
        score(model, corpus, tmp_path / "killed", shard_units=4, batch_size=2)

    killed(dies)
    (place,) = (p for p in (tmp_path / "killed").iterdir())
    assert len(list(place.glob("shard-*.safetensors"))) == 5
    model = teacher()
    calls = counting(model)
    resumed = score(model, corpus, tmp_path / "killed", shard_units=4, batch_size=2)
    assert resumed.done["units"] == 20 and len(calls) == 2 + 5 * 2  # two by the check of the head
    assert torch.equal(resumed.sums, whole.sums) and torch.equal(resumed.counts, whole.counts)
    assert resumed.content == whole.content
    assert score(model, corpus, tmp_path / "killed", shard_units=4).done["units"] == 0


def test_a_damaged_shard_is_believed_or_costs_the_others(tmp_path):
    corpus = corpus_of(text_dataset(12), unit="documents")
    whole = score(teacher(), corpus, tmp_path, shard_units=4)
    (path,) = tmp_path.glob("*/shard-000001.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    again = score(teacher(), corpus, tmp_path, shard_units=4)
    assert again.done["units"] == 4 and torch.equal(again.sums, whole.sums)


def test_ranks_score_a_shard_twice_or_none(tmp_path):
    corpus = corpus_of(stream(40))
    whole = score(teacher(), corpus, tmp_path / "one", shard_units=4)
    options = dict(shard_units=4, world_size=3)
    assert score(teacher(), corpus, tmp_path / "some", rank=1, **options) is None
    assert score(teacher(), corpus, tmp_path / "some", rank=0, **options) is None
    last = score(teacher(), corpus, tmp_path / "some", rank=2, **options)
    assert last.done["units"] == 12 and torch.equal(last.sums, whole.sums)
    assert score(teacher(), corpus, tmp_path / "one", rank=1, **options | {"world_size": 2}).done["units"] == 0


def test_two_processes_write_one_rank(tmp_path):
    corpus, found = corpus_of(text_dataset(8), unit="documents"), []

    def second(calls):
        if calls == 4:
            with pytest.raises(ValueError, match="another process is writing") as error:
                score(teacher(), corpus, tmp_path, shard_units=2)
            found.append(error)

    model = teacher()
    counting(model, second)
    score(model, corpus, tmp_path, shard_units=2)
    assert found


def test_scores_of_another_model_or_corpus_are_taken(tmp_path):
    data = text_dataset(12)
    score(teacher(), corpus_of(data), tmp_path)
    moved = Dataset.from_dict({"text": data["text"][::-1]})
    for model, corpus in (
        (teacher(seed=5), corpus_of(data)),
        (teacher(), corpus_of(moved)),
        (teacher(), corpus_of(data, length=8)),
        (teacher(), corpus_of(data, unit="documents")),
    ):
        made = score(model, corpus, tmp_path)
        assert made.done["units"] == len(made.sums) > 0
    assert len(list(tmp_path.iterdir())) == 5


def test_what_is_written_is_not_what_was_scored(tmp_path):
    data = text_dataset(200)
    made = score(teacher(), corpus_of(data, unit="documents"), tmp_path / "scores", shard_units=8)
    other = list(data["text"])
    other[101] = "w1 w2 w3"  # none of the rows that the key looks at
    changed = corpus_of(Dataset.from_dict({"text": other}), unit="documents")
    options = dict(content=made.content, shard_units=8)
    write_units(changed, torch.tensor([3, 90]), tmp_path / "kept", shown=[4], **options)
    with pytest.raises(ValueError, match="units 96 to 103 of the corpus are not those that were scored"):
        write_units(changed, torch.tensor([3, 97]), tmp_path / "kept", **options)
    assert Dataset.load_from_disk(tmp_path / "kept")["text"] == [other[3], other[90]]  # what stood before stands


def test_text_files_are_other_documents_than_their_paragraphs(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    paths[0].write_text("w1 w2\nw3\n\nw4 w5\n")
    paths[1].write_text("w6 w7 w8\n")
    corpus = corpus_of(paths, unit="documents")
    units = corpus.first()
    assert [u.text.split() for u in units] == [["w1", "w2", "w3"], ["w4", "w5"], ["w6", "w7", "w8"]]
    made = score(teacher(), corpus, tmp_path / "scores")
    assert made.counts.tolist() == [2, 1, 2] and corpus.count is None
    write_units(corpus, torch.tensor([0, 2]), tmp_path / "kept", content=made.content, shard_units=512)
    assert [text.split()[0] for text in Dataset.load_from_disk(tmp_path / "kept")["text"]] == ["w1", "w6"]
    corpus = corpus_of(stream(5), unit="documents")  # a stream that does not say what its columns hold
    made = score(teacher(), corpus, tmp_path / "scores")
    write_units(corpus, torch.tensor([1, 4]), tmp_path / "kept", content=made.content, shard_units=512)
    assert Dataset.load_from_disk(tmp_path / "kept")["text"] == [units.text for units in corpus.first()[1::3]]


def test_wrong_settings_start_a_run(tmp_path):
    corpus = corpus_of(text_dataset(4))
    for settings, message in (
        ({"per": "word"}, "per token or character"),
        ({"per": "character"}, "need documents that are texts"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shard_units": 0}, "shard_units must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            score(teacher(), corpus, tmp_path, **settings)
    with pytest.raises(ValueError, match="a unit must be one of"):
        corpus_of(text_dataset(4), unit="words")
    with pytest.raises(ValueError, match="length must be at least 1"):
        corpus_of(text_dataset(4), length=0)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Corpus(text_dataset(4))
    assert not list(tmp_path.iterdir())
