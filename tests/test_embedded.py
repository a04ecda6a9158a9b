"""The embedded default: a corpus split by module, a tokenizer that loses nothing, a teacher that has learned."""

import collections
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.embedded import corpus
from hf_distill.embedded.corpus import SPLITS, split_of, stdlib_dataset, stdlib_documents

EMBEDDED = Path(corpus.__file__).parent


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")


def digest(documents: list[dict]) -> str:
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


def test_no_module_is_in_two_splits_and_no_split_is_empty():
    modules = {split: {d["module"] for d in stdlib_documents(split)} for split in SPLITS}
    assert all(len(names) >= 5 for names in modules.values())
    assert not modules["train"] & modules["validation"]
    assert not modules["train"] & modules["test"]
    assert not modules["validation"] & modules["test"]


def test_no_piece_of_text_is_in_two_splits():
    texts = {split: {d["text"] for d in stdlib_documents(split)} for split in SPLITS}
    assert not texts["train"] & (texts["validation"] | texts["test"])


def test_a_module_and_its_pure_python_twin_share_a_split():
    for twin, module in (
        ("_pydecimal", "decimal"),
        ("_pydatetime", "datetime"),
        ("_pyio", "io"),
        ("_strptime", "strptime"),
    ):
        assert split_of(twin) == split_of(module)


def test_documents_do_not_depend_on_the_call_or_on_the_hash_seed():
    here = digest(stdlib_documents("test"))
    assert digest(stdlib_documents("test")) == here
    program = (
        "import hashlib, json; from hf_distill.embedded.corpus import stdlib_documents;"
        "print(hashlib.sha256(json.dumps(stdlib_documents('test')).encode()).hexdigest())"
    )
    root = str(EMBEDDED.parents[1])
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root}
        there = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == here


def test_a_caller_that_changes_a_document_does_not_change_the_next_call():
    stdlib_documents("test")[0]["text"] = "changed"
    assert stdlib_documents("test")[0]["text"] != "changed"


def test_max_characters_takes_a_prefix_that_mixes_modules():
    documents = stdlib_documents("train", max_characters=100_000)
    assert 90_000 < sum(len(d["text"]) for d in documents) <= 100_000
    assert documents == stdlib_documents("train")[: len(documents)]
    assert len({d["module"] for d in documents}) > 20


def test_documents_are_whole_lines_of_at_most_two_thousand_characters():
    documents = stdlib_documents("validation")
    assert max(len(d["text"]) for d in documents) <= 2000
    sources = [source for _, source in corpus._sources(Path(corpus.sysconfig.get_paths()["stdlib"]))]
    for document in documents[:20]:
        assert any(source.startswith(document["text"]) or "\n" + document["text"] in source for source in sources)


def test_a_dataset_has_the_documents_as_rows():
    datasets = pytest.importorskip("datasets")
    dataset = stdlib_dataset("validation", max_characters=20_000)
    assert isinstance(dataset, datasets.Dataset)
    assert dataset.to_list() == stdlib_documents("validation", max_characters=20_000)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'dev'"):
        stdlib_documents("dev")


def test_a_python_without_sources_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "argparse.pyc").write_bytes(b"")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="dataset of your own"):
        stdlib_documents("train")


def test_the_tokenizer_gives_back_source_exactly(tokenizer):
    awkward = "def f(a_b):\n\tif x:\n        return 'é 漢字 😀 e\u0301'  # c\r\n\n\n   \n  end  \n\x0c"
    awkward += "\u2028 \u00a0x = 1_000_000   "
    for text in [awkward, "", " ", "\n    ", *(d["text"] for d in stdlib_documents("test", max_characters=100_000))]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_small_separates_pad_from_eos_and_knows_indentation(tokenizer):
    assert len(tokenizer) == 2048
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer("\n        ")["input_ids"]) == 1
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}
    text = "".join(d["text"] for d in stdlib_documents("test"))
    assert len(text) / len(tokenizer(text, verbose=False)["input_ids"]) > 2.5


def test_the_chat_template_marks_what_the_assistant_says(tokenizer):
    messages = [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}]
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nTwo plus two?<|im_end|>\n<|im_start|>assistant\n"
    )
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Four.<|im_end|>"


def test_the_teacher_uses_the_tokenizer_beside_it(tokenizer):
    own = AutoTokenizer.from_pretrained(EMBEDDED / "teacher")
    assert own.get_vocab() == tokenizer.get_vocab()
    assert own.chat_template == tokenizer.chat_template
    assert own("class A:\n    x = 1")["input_ids"] == tokenizer("class A:\n    x = 1")["input_ids"]


def test_the_teacher_fits_in_eight_megabytes():
    assert (EMBEDDED / "teacher" / "model.safetensors").stat().st_size <= 8_000_000


def test_the_teacher_predicts_held_out_modules_far_better_than_unigrams(tokenizer):
    documents = [tokenizer(d["text"])["input_ids"] for d in stdlib_documents("test", max_characters=30_000)]
    tokens = [token for document in documents for token in document[1:]]
    counts = collections.Counter(tokens)
    # The entropy of these very tokens: no unigram model, whatever it was fitted on, is below it.
    unigram = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())

    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher", dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for document in documents:
            for start in range(0, len(document) - 1, 512):
                ids = torch.tensor(document[start : start + 513])
                total += F.cross_entropy(teacher(ids[None, :-1]).logits[0], ids[1:], reduction="sum").item()
    assert total / len(tokens) < 0.6 * unigram


def test_the_teacher_generates_text_from_its_own_settings(tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher")
    assert teacher.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token_id in teacher.generation_config.eos_token_id
    prompt = tokenizer("import os\nimport sys\n\ndef main(", return_tensors="pt")
    written = teacher.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert prompt["input_ids"].shape[1] < written.shape[1] <= prompt["input_ids"].shape[1] + 8


def test_the_teacher_uses_its_whole_context(tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED / "teacher", dtype=torch.float32).eval()
    context = teacher.config.max_position_embeddings
    text = "".join(d["text"] for d in stdlib_documents("test", max_characters=100_000))
    windows = torch.tensor(tokenizer(text, verbose=False)["input_ids"]).unfold(0, context + 1, context)[:32]
    with torch.no_grad():
        logits = teacher(windows[:, :-1]).logits
    loss = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(0)
    assert loss[-context // 4 :].mean() < loss[: context // 4].mean() + 0.3
