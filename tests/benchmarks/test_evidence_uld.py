"""The evidence across tokenizers: a tiny run of every row, what a second call does again, and the card."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import evidence_uld as evidence
from benchmarks.evidence_cards import END, START
from tests.helpers import tiny_llama

SIZES = evidence.Sizes(vocabulary=300, hidden=16, layers=1, steps=2, batch=2, piece=20, limit=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "data" / "tinyshakespeare").mkdir(parents=True)
    lines = [f"Line {i} of a play that nobody has seen, and the {i % 7} kings in it." for i in range(400)]
    (folder / "data" / "tinyshakespeare" / "input.txt").write_text("\n".join(lines))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder / "teacher")
    tiny_llama(vocabulary=len(fast)).save_pretrained(folder / "teacher")
    run(folder)
    return folder


def run(folder) -> None:
    names = ("data", "teacher", "work", "results")
    paths = [str(word) for name in names for word in (f"--{name}", folder / name)]
    evidence.main([*paths, "--seeds", "2"], SIZES)


def test_a_second_call_trains_again_or_a_lost_run_is_not_made_anew(folder):
    records = {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*-*-*-*.json")}
    assert len(records) == len(evidence.ROWS) * (2 + 2)
    lost = next(path for path in records if path.name.startswith("hybrid"))
    lost.unlink()
    run(folder)
    assert {path for path, when in records.items() if path.stat().st_mtime_ns != when} == {lost}


def test_the_card_lacks_a_row_or_a_path_is_printed(folder, tmp_path):
    (tmp_path / "uld.md").write_text(f"{START}\n{END}\n")
    evidence.write_cards(folder / "results", tmp_path)
    text = (tmp_path / "uld.md").read_text()
    assert all(f"| {row} |" in text for row in evidence.ROWS)
    assert "--data DIR" in text and str(folder) not in text and (tmp_path / "evidence_uld.png").is_file()
    result = json.loads((folder / "results" / "evidence_uld.json").read_text())
    assert {"command", "machine", "versions", "commit", "teacher"} <= result.keys()
    assert 0 < result["matched"] < 1 and result["teacher"]["nats_per_byte"] > 1
