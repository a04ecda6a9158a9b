"""Answers in the tokens of two tokenizers."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill.curricula.alignment import (
    ALIGNMENT,
    AlignedCollator,
    align_answers,
    groups_of,
    render,
    tokenise,
)

TEXTS = [
    "The naïve café served crème brûlée.",
    "Two cups 👍🏽 of tea, please 🙂!",
    "漢字 and かな, mixed 你好世界 words",
    "line one\n\nline  two",
    " leading and trailing ",
]


def made(model, trainer, pre, decoder, **special) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(size: int = 300) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pre, decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made(models.BPE(), trainer, pre, decoder, eos_token="<end>", pad_token="<end>")


def wordpiece() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    model, pre = models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer()
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]")
    tokenizer = made(model, trainer, pre, decoders.WordPiece(), **names)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    pre, decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made(models.Unigram(), trainer, pre, decoder, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


KINDS = {"bytes": byte_level, "merged bytes": lambda: byte_level(420), "wordpiece": wordpiece, "unigram": unigram}


def covered(tokenizer, tokens, text: str) -> list[int]:
    """Where each compared token of a lossless byte-level tokenizer ends, from what it decodes to."""
    own = tokens.ids[tokens.first : tokens.first + len(tokens.ends)]
    names = tokenizer.convert_ids_to_tokens(own)
    return torch.tensor([len(name) for name in names]).cumsum(0).tolist()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [257, 300, 420])
def test_byte_level_tokens_end_at_their_own_bytes_inside_a_character_too(text, size):
    tokenizer = byte_level(size)
    tokens = tokenise(render({"text": text}, tokenizer), tokenizer)
    ends = [end for end in tokens.ends if end]
    expected = covered(tokenizer, tokens, text)
    # spaces that close a text are given no place by the byte-level offsets; everything else must be exact
    assert ends == expected or (text.endswith(" ") and ends[:-1] == expected[:-1])


@pytest.mark.parametrize("other", ["merged bytes", "wordpiece", "unigram"])
@pytest.mark.parametrize("text", TEXTS)
def test_groups_of_two_tokenizers_cover_the_same_bytes(text, other):
    ours, theirs = byte_level(), KINDS[other]()
    student, teacher = (tokenise(render({"text": text}, t), t) for t in (ours, theirs))
    groups = groups_of(student, teacher)
    assert len(groups) >= 2
    for _, s_end, _, t_end in groups[:-1]:
        assert student.ends[s_end - 1 - student.first] == teacher.ends[t_end - 1 - teacher.first]
    for (_, s_end, _, t_end), (s_next, _, t_next, _) in zip(groups, groups[1:], strict=False):
        assert s_end == s_next and t_end == t_next  # nothing inside the answer is left out
    shared = set(student.ends) & set(teacher.ends)
    assert len(groups) >= len(shared) - 1  # each common byte closes a group; the first one may hold position 0


def test_one_tokenizer_twice_is_token_by_token():
    tokenizer = byte_level()
    for text in TEXTS:
        tokens = tokenise(render({"prompt": "ask: ", "completion": text}, tokenizer), tokenizer)
        last = tokens.first + len(tokens.ends)
        assert groups_of(tokens, tokens) == [(i, i + 1, i, i + 1) for i in range(tokens.first, last)]
        with_end = groups_of(tokens, tokens, skip_eos=False)
        assert with_end[-1] == (last, last + 1, last, last + 1) and tokens.ids[last] == tokenizer.eos_token_id


def test_prompt_and_completion_learn_and_compare_the_answer_alone():
    ours, theirs = byte_level(), wordpiece()
    row = {"prompt": "Two cups of", "completion": " tea 🙂, please"}
    student, teacher = (tokenise(render(row, t), t) for t in (ours, theirs))
    assert ours.decode([i for i in student.labels if i >= 0]) == " tea 🙂, please<end>"
    kept = [i for i in teacher.labels if i >= 0]
    assert kept[-1] == theirs.eos_token_id and kept.count(theirs.eos_token_id) == 1 and teacher.ids[0] == 2
    assert all(s >= student.first and t >= teacher.first for s, _, t, _ in groups_of(student, teacher))
    assert student.ends[-1] == teacher.ends[-1] == len(row["completion"].encode())


def test_each_side_reads_a_conversation_in_its_own_template():
    ours, theirs = byte_level(), unigram()
    ours.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}"
        "<assistant>{% endif %}"
    )
    theirs.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}"
        "[assistant] {% endif %}"
    )
    turns = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "Two cups of tea, please"}]
    for row in ({"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}):
        student, teacher = (tokenise(render(row, t), t) for t in (ours, theirs))
        assert student.ids[student.closing] == ours.eos_token_id
        assert student.ends[-1] == teacher.ends[-1] == len("Two cups of tea, please")
        assert ours.decode([i for i in student.labels if i >= 0]) == "Two cups of tea, please<end>"
        assert len(groups_of(student, teacher)) > 3
    with pytest.raises(ValueError, match="no chat template"):
        render({"messages": turns}, byte_level())
    theirs.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="changes the answer"):
        render({"messages": turns}, theirs)


def test_a_dataset_is_aligned_once_and_cut_to_its_lengths(tmp_path):
    ours, theirs = byte_level(), unigram()
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "data")
    data = Dataset.load_from_disk(tmp_path / "data")
    aligned = align_answers(data, ours, theirs)
    again = align_answers(Dataset.load_from_disk(tmp_path / "data"), *copy.deepcopy((ours, theirs)))
    assert again._fingerprint == aligned._fingerprint and again.cache_files == aligned.cache_files
    assert align_answers(data, ours, theirs, skip_eos=False)._fingerprint != aligned._fingerprint
    cut = align_answers(data, ours, theirs, max_length=6, teacher_max_length=4)
    for row in cut:
        assert len(row["input_ids"]) <= 6 and len(row["teacher_input_ids"]) <= 4
        groups = torch.tensor(row["teacher_alignment"]).reshape(-1, 4)
        assert groups[:, 1].max() <= 6 and groups[:, 3].max() <= 4
    asked = Dataset.from_dict({"prompt": ["a", "a long prompt of many"], "completion": [" tea", " tea"]})
    assert len(align_answers(asked, ours, theirs, max_length=6)) == 1


def test_a_batch_counts_in_rows_of_either_side():
    ours, theirs = byte_level(), wordpiece()
    rows = {"prompt": ["x ", "tea: "], "completion": ["Two cups 🙂", "漢字 mixed"]}
    aligned = align_answers(Dataset.from_dict(rows), ours, theirs)
    pads = [DataCollatorForLanguageModeling(t.pad_token_id) for t in (ours, theirs)]
    features = list(aligned)
    batch = AlignedCollator(*pads)(features)
    found = []
    for document, s0, s1, t0, t1 in batch[ALIGNMENT].tolist():
        labels = batch["row_labels"][s0:s1].tolist(), batch["teacher_row_labels"][t0:t1].tolist()
        found.append((document, *labels))
        assert set(batch["row_document"][s0:s1].tolist()) == {document}
        assert set(batch["teacher_row_document"][t0:t1].tolist()) == {document}
    expected = [
        (i, row["input_ids"][a:b], row["teacher_input_ids"][c:d])
        for i, row in enumerate(features)
        for a, b, c, d in torch.tensor(row["teacher_alignment"]).reshape(-1, 4).tolist()
    ]
    assert found == expected and len(found) > 4


def test_what_cannot_be_aligned_is_said():
    ours, theirs = byte_level(), unigram()
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": [" fine", ""]})
    with pytest.raises(ValueError, match="row 1 cannot be aligned: its answer is empty"):
        align_answers(rows, ours, theirs)
    with pytest.raises(ValueError, match="input_ids: give prompt"):
        align_answers(Dataset.from_dict({"input_ids": [[1]]}), ours, theirs)
    with pytest.raises(ValueError, match="got IterableDataset"):
        align_answers(rows.to_iterable_dataset(), ours, theirs)
    with pytest.raises(ValueError, match="the teacher has no text tokenizer"):
        align_answers(rows, ours, None)

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=unigram().backend_tokenizer)
    with pytest.raises(ValueError, match="the student's tokenizer Slow is a slow one"):
        align_answers(rows, slow, theirs)
    pads = [DataCollatorForLanguageModeling(0)] * 2
    with pytest.raises(ValueError, match="prepare what is evaluated later with align_answers"):
        AlignedCollator(*pads)([{"input_ids": [1, 2], "labels": [1, 2]}])
