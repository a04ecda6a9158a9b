"""What is read from a cache's files is what was written, or an error."""

import hashlib
import itertools
import pickle

import pytest
import torch

from hf_distill.losses import forward_kl
from hf_distill.signals import HeadLogits, Signals
from hf_distill.teachers.cache import store
from hf_distill.teachers.cache.codecs import (
    FullLogits,
    Hidden,
    Sampled,
    Scores,
    TopK,
    bits_of,
    codec_from_json,
    codec_to_json,
    decode,
    encode,
    join,
    pack_bits,
    unpack_bits,
)
from hf_distill.teachers.cache.keys import Document
from hf_distill.teachers.cache.sampling import sample_logits
from hf_distill.teachers.cache.store import CorruptCacheError, Store, shard_facts, write_shard

V, H = 37, 6


def document(*positions: int, name: bytes = b"k") -> Document:
    return Document(name.ljust(16, b"\0"), torch.tensor(positions), 0, max(positions) + 2)


def head_signals(rows: int, dtype=torch.float32) -> Signals:
    weight = torch.randn(V, H)
    return Signals(HeadLogits(torch.randn(rows, H).to(dtype), weight.to(dtype)), labels=torch.randint(V, (rows,)))


def through(codec, signals: Signals, documents: list[Document]) -> list[tuple]:
    """Written and read again, document by document."""
    rows = codec.rows(signals, documents)
    found, begin = [], 0
    for i, one in enumerate(documents):
        end = begin + len(one.positions)
        own = slice(begin, end) if codec.per == "token" else slice(i, i + 1)
        data = encode(codec, one, {k: v[own] for k, v in rows.items()})
        found.append(decode(codec, torch.frombuffer(bytearray(data), dtype=torch.uint8)))
        begin = end
    return found


# ---- bits -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocabulary", [2, 3, 255, 256, 257, 32_000, 151_936, 2**25])
def test_packed_ids_lose_a_bit(vocabulary):
    bits = bits_of(vocabulary)
    assert 2**bits >= vocabulary > 2 ** (bits - 1) or vocabulary == 2
    for count in (0, 1, 7, 8, 100):
        ids = torch.randint(vocabulary, (count,))
        ids[:2] = torch.tensor([0, vocabulary - 1])[: len(ids[:2])]
        packed = pack_bits(ids, bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
        assert torch.equal(unpack_bits(packed, count, bits), ids)


def test_packed_bits_match_a_loop():
    ids, bits = torch.tensor([5, 0, 7, 3, 6]), 3
    number = sum(int(i) << (bits * place) for place, i in enumerate(ids))
    assert bytes(pack_bits(ids, bits).tolist()) == number.to_bytes(2, "little")


# ---- modes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_rows_change_on_their_way(dtype):
    signals = head_signals(7, getattr(torch, dtype))
    codec = Hidden(H, dtype, dtype)
    (first, a), (second, b) = through(codec, signals, [document(3, 4, 5), document(0, 2, 4, 9)])
    assert first.tolist() == [3, 4, 5] and second.tolist() == [0, 2, 4, 9]
    logits = codec.logits(join([a, b]), signals.logits)
    assert torch.equal(logits.hidden, signals.logits.hidden) and logits.weight is signals.logits.weight


def test_int8_rows_are_off_by_more_than_half_a_step():
    signals = head_signals(64)
    codec = Hidden(H, "int8", "float32")
    ((_, tensors),) = through(codec, signals, [document(*range(64))])
    ours, exact = codec.logits(tensors, signals.logits), signals.logits
    step = exact.hidden.abs().amax(-1, keepdim=True) / 127
    assert ((ours.hidden - exact.hidden).abs() <= step * 0.5001).all()
    error = (ours.dense() - exact.dense()).abs().max() / (exact.dense().max() - exact.dense().min())
    assert 0 < error < 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_most_likely_ids_or_the_rest_s_mass_differ(dtype, tolerance, temperature):
    signals = head_signals(5)
    codec = TopK(V, 4, temperature, dtype)
    ((_, tensors),) = through(codec, signals, [document(0, 1, 2, 3, 4)])
    sparse = codec.logits(tensors, None)
    log_p = (signals.logits.dense() / temperature).log_softmax(-1)
    expected, ids = log_p.topk(4)
    assert torch.equal(sparse.ids, ids)
    torch.testing.assert_close(sparse.log_probs, expected, rtol=tolerance, atol=tolerance)
    mass = expected.exp().sum(-1)
    torch.testing.assert_close(sparse.log_probs.exp().sum(-1), mass, rtol=1e-6, atol=1e-6)
    if dtype == "float32":
        assert torch.equal(sparse.log_probs, expected)


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_draws_that_are_read_are_not_those_that_were_made(alpha):
    signals = head_signals(9)
    codec = Sampled(V, 20, alpha, 1.0, "float32", seed=3)
    documents = [document(1, 2, name=b"a"), document(0, 1, 2, 3, 4, 5, 6, name=b"b")]
    parts = [tensors for _, tensors in through(codec, signals, documents)]
    read = codec.logits(join(parts), None)
    assert read.ids.shape[0] == 9 and read.ids.shape[1] < 20, "unused places are not stored"
    log_p = signals.logits.dense().log_softmax(-1)
    log_z = (alpha * log_p).logsumexp(-1, keepdim=True)
    used = read.weights > 0
    counts = read.weights * 20 / ((1 - alpha) * log_p.gather(-1, read.ids) + log_z).exp()
    torch.testing.assert_close(counts.where(used, 0.0).sum(-1), torch.full((9,), 20.0))
    torch.testing.assert_close(read.log_probs[used], log_p.gather(-1, read.ids)[used])
    assert (read.log_probs[~used] == -torch.inf).all()
    alone = Signals(HeadLogits(signals.logits.hidden[2:], signals.logits.weight))
    again = codec.logits(through(codec, alone, documents[1:])[0][1], None)
    assert torch.equal(again.ids[again.weights > 0], read.ids[2:][used[2:]]), "draws depend on the batch"
    other = Sampled(V, 20, alpha, 1.0, "float32", seed=4)
    other = other.logits(through(other, alone, documents[1:])[0][1], None)
    assert not torch.equal(other.ids[other.weights > 0], again.ids[again.weights > 0])


def test_scores_per_token_and_per_document():
    values = {"margin": torch.randn(5), "embedding": torch.randn(5, 3, dtype=torch.bfloat16)}
    documents = [document(0, 1), document(4, 5, 6)]
    codec = Scores({"margin": ("float32", ()), "embedding": ("bfloat16", (3,))}, "token", "f")
    read = join([t for _, t in through(codec, Signals(features=values), documents)])
    assert all(torch.equal(read[k], v) for k, v in values.items())
    codec = Scores(codec.values, "sample", "f")
    values = {k: v[:2] for k, v in values.items()}
    read = join([t for _, t in through(codec, Signals(features=values), documents)])
    assert all(torch.equal(read[k], v) for k, v in values.items())


def test_settings_survive_the_manifest():
    for codec in (
        Hidden(4, "int8", "bfloat16"),
        FullLogits(3, "float32"),
        TopK(9, 2, 1.0, "bfloat16"),
        Sampled(9, 5, 0.9, 2.0, "float32", 1),
        Scores({"x": ("float32", (2,))}, "sample", "m.f"),
    ):
        assert codec_from_json(codec_to_json(codec)) == codec


# ---- draws ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_the_mean_of_the_draws_is_not_the_teacher(alpha):
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.02, 0.01])
    repeats = 2000
    sampled = sample_logits(p.log().expand(repeats, -1), 8, alpha, torch.Generator().manual_seed(1))
    total = torch.zeros(repeats, 6).scatter_add_(-1, sampled.ids, sampled.weights)
    standard_error = total.std(0) / repeats**0.5
    assert ((total.mean(0) - p).abs() < 3 * standard_error).all()
    for row in range(3):  # merged: no id stands twice
        used = sampled.ids[row][sampled.weights[row] > 0]
        assert len(used.unique()) == len(used)


def test_the_gradient_of_the_draws_is_biased():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, requires_grad=True), torch.randn(6)
    forward_kl(student[None], teacher[None]).backward()
    sampled = sample_logits(teacher.log_softmax(0).expand(2000, -1), 8, 0.8, torch.Generator().manual_seed(2))
    dense = torch.zeros(2000, 6).scatter_add_(-1, sampled.ids, sampled.weights)
    slopes = dense.sum(-1, keepdim=True) * student.detach().softmax(0) - dense
    assert ((slopes.mean(0) - student.grad).abs() < 3 * slopes.std(0) / 2000**0.5).all()


@pytest.mark.parametrize(("draws", "alpha"), [(0, 1.0), (2**15, 1.0), (5, 0.0), (5, -1.0)])
def test_no_draws_at_all_are_accepted(draws, alpha):
    with pytest.raises(ValueError, match="draws must lie|alpha must be positive"):
        sample_logits(torch.zeros(1, 2).log_softmax(-1), draws, alpha)


# ---- shards ---------------------------------------------------------------------------------------------------------
def written(folder, sizes=((3, 40), (2, 17))) -> tuple[dict, list[dict]]:
    numbers, content, names = itertools.count(), {}, []
    for shard, lengths in enumerate(sizes):
        documents = [(bytes([next(numbers)] * 15) + b"\0", torch.randint(256, (n,)).tolist()) for n in lengths]
        documents = [(key, bytes(data)) for key, data in documents]
        content |= dict(documents)
        names.append(write_shard(folder, shard, documents))
    return content, [shard_facts(folder / name) for name in names]


def test_bytes_that_are_read_are_not_those_written(tmp_path):
    content, facts = written(tmp_path)
    shards = Store(tmp_path, facts)
    for again in (shards, pickle.loads(pickle.dumps(shards))):
        assert len(again) == 4 and again.read(b"?" * 16) == []
        for key, data in content.items():
            (read,) = again.read(key)
            assert bytes(read.tolist())[: len(data)] == data and len(read) % 8 == 0
    assert sorted(shards.keys()) == sorted(content)


def test_an_empty_shard_cannot_be_read(tmp_path):
    facts = [shard_facts(tmp_path / write_shard(tmp_path, 0, []))]
    assert Store(tmp_path, facts).read(b"?" * 16) == []


def test_two_documents_under_one_key_are_one(tmp_path):
    key = b"k" * 16
    facts = [shard_facts(tmp_path / write_shard(tmp_path, 0, [(key, b"12345678"), (key, b"87654321")]))]
    assert [bytes(x.tolist()) for x in Store(tmp_path, facts).read(key)] == [b"12345678", b"87654321"]


def test_a_flipped_byte_is_not_found(tmp_path):
    content, facts = written(tmp_path)
    path = tmp_path / facts[0]["file"]
    whole = path.read_bytes()
    assert store.stands(path)
    for place in range(0, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptCacheError, match="is damaged .* only the damaged shard is computed anew"):
            shards = Store(tmp_path, facts)
            for key in content:
                shards.read(key)
        if place % 50 == 0:
            assert not store.stands(path)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_shard_cut_short_or_gone_is_not_found(tmp_path, cut):
    _, facts = written(tmp_path)
    path = tmp_path / facts[1]["file"]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptCacheError, match="is damaged"):
        Store(tmp_path, facts)
    path.unlink()
    with pytest.raises(CorruptCacheError, match="it is missing"):
        Store(tmp_path, facts)


def test_a_shard_s_name_is_not_its_checksum(tmp_path):
    _, facts = written(tmp_path)
    path = tmp_path / facts[0]["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.split("-")[2])
    assert facts[0]["documents"] == 2
