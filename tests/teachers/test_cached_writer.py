"""Caches are written by several processes that may be killed, and never mix with something else."""

import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
from filelock import FileLock
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import CachedTeacher, FrozenTeacher, Teacher, cache_teacher
from hf_distill.teachers.cache import store
from hf_distill.training.saving import DiskFullError
from tests.helpers import tiny_llama, tiny_tokenizer

COLLATE = DataCollatorForLanguageModeling(pad_token_id=0)


def examples(n: int = 30, seed: int = 0) -> list[dict]:
    torch.manual_seed(seed)
    return [{"input_ids": torch.randint(3, 64, (4 + i % 7,)).tolist()} for i in range(n)]


class Mortal(FrozenTeacher):
    """Kills its process at a call."""

    def __init__(self, *args, dies_at: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.dies_at = 0, dies_at

    def __call__(self, batch, needs=frozenset({"logits"})):
        self.calls += 1
        if self.calls == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch, needs)


def mortal(dies_at=None, seed=1) -> Mortal:
    return Mortal(tiny_llama(seed=seed), tiny_tokenizer(), name="tiny", dies_at=dies_at)


def write(folder, teacher=None, data=None, **options) -> CachedTeacher | None:
    options = dict(collator=COLLATE, batch_size=2, shard_examples=4) | options
    return cache_teacher(teacher or mortal(), data or examples(), folder, **options)


def worker(folder, rank, dies_at, dies_in_write, options):
    if dies_in_write:  # with half a shard on the disk
        written, fsync = [], os.fsync

        def die(number):
            written.append(number)
            if len(written) == dies_in_write:
                os.ftruncate(number, 1000)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(number)

        os.fsync = die
    write(folder, mortal(dies_at), rank=rank, world_size=2, **options)


def two_processes(folder, dies_at=(None, None), dies_in_write=(None, None), **options) -> list[int]:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=worker, args=(folder, rank, dies_at[rank], dies_in_write[rank], options))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def content(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


# ---- killed ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["hidden", "sampled"])
def test_a_killed_and_resumed_cache_differs_from_an_uninterrupted_one(tmp_path, mode):
    write(tmp_path / "whole", mode=mode)
    whole = content(tmp_path / "whole")
    assert sum(name.startswith("shard-") for name in whole) == 8

    killed = tmp_path / "killed"
    assert two_processes(killed, dies_at=(6, 4), mode=mode) == [-signal.SIGKILL] * 2  # within the second shards
    finished = {name: (killed / name).stat().st_mtime_ns for name in content(killed) if name.startswith("shard-")}
    assert len(finished) == 3 and finished.keys() < whole.keys()
    with pytest.raises(ValueError, match="is not finished"):
        CachedTeacher(killed)

    assert two_processes(killed, dies_in_write=(2, 3), mode=mode) == [-signal.SIGKILL] * 2  # half a shard written
    assert list(killed.glob(".shard-*.unfinished"))
    assert two_processes(killed, mode=mode) == [0, 0]
    assert content(killed) == whole
    assert all((killed / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert not list(killed.glob("*unfinished*")) and not list(killed.glob(".shard-*"))


def test_one_process_goes_on_where_two_stopped(tmp_path):
    write(tmp_path / "whole")
    two_processes(tmp_path / "killed", dies_at=(4, 6))
    write(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_rank_that_is_done_first_gets_an_unfinished_cache(tmp_path):
    assert write(tmp_path / "cache", rank=1, world_size=2) is None
    assert isinstance(write(tmp_path / "cache", rank=0, world_size=2), CachedTeacher)


def test_workers_or_batches_change_what_is_found(tmp_path):
    one, other = write(tmp_path / "one"), write(tmp_path / "other", batch_size=3, shard_examples=7, num_workers=1)
    assert one.store.keys() == other.store.keys()


# ---- damaged ---------------------------------------------------------------------------------------------------------
def test_more_than_the_damaged_shard_is_computed_anew(tmp_path):
    write(tmp_path / "cache")
    whole = content(tmp_path / "cache")
    shards = store.shards_in(tmp_path / "cache")
    damaged = bytearray(shards[3].read_bytes())
    damaged[-20] ^= 4
    shards[3].write_bytes(damaged)
    shards[5].unlink()
    teacher = mortal()
    write(tmp_path / "cache", teacher)
    assert teacher.calls == 1 + 2 + 2  # the probe, and two batches per shard
    assert content(tmp_path / "cache") == whole


def test_a_complete_cache_runs_the_teacher_again(tmp_path):
    write(tmp_path / "cache")
    teacher = mortal()
    write(tmp_path / "cache", teacher)
    assert teacher.calls == 1


def test_a_full_disk_loses_finished_shards(tmp_path):
    write(tmp_path / "whole", data=examples(12))
    whole, folder = content(tmp_path / "whole"), tmp_path / "cache"
    largest = max(len(data) for name, data in whole.items() if name.startswith("shard-"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        with pytest.raises(DiskFullError, match="finished shards are kept: free some space"):
            write(folder, data=examples(12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(folder.glob(".*unfinished"))
    write(folder, data=examples(12))
    assert content(folder) == whole


# ---- something else --------------------------------------------------------------------------------------------------
def test_two_writers_work_on_one_cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    with FileLock(folder / ".lock-0"), pytest.raises(ValueError, match="another process is writing the cache"):
        write(folder)
    write(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(teacher=lambda: mortal(seed=2)), r"teacher.weights: [0-9a-f]+ in the cache, [0-9a-f]+ now"),
        (dict(data=examples(29)), "data.examples: 30 in the cache, 29 now"),
        (dict(data=examples(seed=1)), r"data.sample: [0-9a-f]+ in the cache, [0-9a-f]+ now"),
        (dict(mode="topk", k=4), "codec.k: nothing in the cache, 4 now.*codec.mode: hidden in the cache, topk now"),
        (dict(dtype="bfloat16"), "codec.dtype: float32 in the cache, bfloat16 now"),
        (dict(positions="all"), "positions: loss in the cache, all now"),
        (dict(shard_examples=5), "data.shard_examples: 4 in the cache, 5 now"),
    ],
    ids=["teacher", "fewer", "data", "mode", "dtype", "positions", "shards"],
)
def test_another_cache_is_mixed_in(tmp_path, change, message):
    write(tmp_path / "cache")
    before = content(tmp_path / "cache")
    change = {k: v() if callable(v) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"holds another cache: .*{message}"):
        write(tmp_path / "cache", **change)
    assert content(tmp_path / "cache") == before


def test_another_tokenizer_s_data_are_mixed_in(tmp_path):
    write(tmp_path / "cache")
    other = tiny_tokenizer()
    other.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="holds another cache: tokenizer.chat_template: nothing in the cache"):
        write(tmp_path / "cache", processing_class=other)


def test_a_folder_with_other_files_is_filled(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\): choose an empty one"):
        write(tmp_path)


class Learning(Teacher):
    learns = True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="all"), "mode must be one of hidden, logits, topk, sampled, scores, got 'all'"),
        (dict(mode="topk", k=65), "k must lie between 1 and the vocabulary's 64, got 65"),
        (dict(mode="topk", dtype="int8"), "dtype must be one of auto, .* in mode 'topk', got 'int8'"),
        (dict(mode="topk", temperature=0.0), "temperature must be positive"),
        (dict(mode="sampled", draws=0), "draws .* and alpha must be positive, got 0 and 1.0"),
        (dict(mode="scores", per="row"), 'per must be "token" or "sample"'),
        (dict(positions="some"), 'positions must be "loss" or "all"'),
        (dict(collator=None), "give the collator that training uses"),
        (dict(data=[{"input_ids": [5]}]), "no example has a label"),
        (dict(data=iter([])), "datasets with a length, got list_iterator"),
        (dict(data=[[]]), "the dataset is empty"),
        (dict(teacher=Learning()), "changes while the student trains"),
        (dict(shard_examples=0), "shard_examples and batch_size must be at least 1, got 0 and 2"),
    ],
)
def test_bad_settings_start_long_work(tmp_path, options, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("*"))
    assert time.monotonic() - start < 5
