"""MiniPLM: what is kept, by which scores, and that a kill, other ratios, ranks and layouts change nothing of it."""

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_distill import FrozenTeacher
from hf_distill.methods.miniplm import (
    MiniPLMConfig,
    difference_scores,
    load_selection,
    retokenised,
    select,
    select_by_score,
    sequence_loss,
    vanilla_kd_loss,
)
from tests.helpers import WORDS, text_dataset, tiny_llama, tiny_tokenizer


def settings(**changes) -> MiniPLMConfig:
    return MiniPLMConfig(**dict(miniplm_length=16, miniplm_shard_units=4, miniplm_batch_size=3) | changes)


def models() -> tuple[FrozenTeacher, FrozenTeacher]:
    return FrozenTeacher(tiny_llama(seed=1), tiny_tokenizer()), FrozenTeacher(
        tiny_llama(8, 1, seed=2), tiny_tokenizer()
    )


def own_loss(model, ids: list[int], reduction: str = "mean") -> float:
    """By the model's own forward with labels."""
    tensor = torch.tensor([ids])
    loss = model(input_ids=tensor, labels=tensor).loss.item()
    return loss * (len(ids) - 1 if reduction == "sum" else 1)


# ---- pure functions --------------------------------------------------------------------------------------------------
def test_selection_is_not_the_highest_in_corpus_order():
    torch.manual_seed(3)
    scores = torch.randn(37)
    kept = select_by_score(scores, 0.5)
    expected = sorted(sorted(range(37), key=lambda i: -scores[i])[: int(0.5 * 37)])
    assert kept.tolist() == expected
    assert select_by_score(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 0.4).tolist() == [1, 2]  # ties: the first
    assert select_by_score(scores, 1.0).tolist() == list(range(37))
    for ratio in (0.29, 0.7, 0.999):
        assert len(select_by_score(scores, ratio)) == int(ratio * 37)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, math.nan])
def test_a_ratio_outside_its_range_is_taken(ratio):
    with pytest.raises(ValueError, match="ratio must lie in"):
        select_by_score(torch.zeros(3), ratio)
    with pytest.raises(ValueError, match="ratio must lie in"):
        MiniPLMConfig(miniplm_ratio=ratio)


def test_nan_or_nothing_is_selected():
    with pytest.raises(ValueError, match=r"hold nan, first at 1 \(1 of 3\)"):
        select_by_score(torch.tensor([0.0, math.nan, 1.0]), 0.5)
    with pytest.raises(ValueError, match="keeps none of 3"):
        select_by_score(torch.zeros(3), 0.3)


def test_the_sign_is_turned_or_zero_probability_speaks_for_a_text():
    inf = math.inf
    teacher, reference = torch.tensor([1.0, 3.0, inf, 2.0, inf]), torch.tensor([3.0, 1.0, 2.0, inf, inf])
    assert difference_scores(teacher, reference).tolist() == [2.0, -2.0, -inf, inf, -inf]
    assert difference_scores(teacher[:2].half(), reference[:2].bfloat16()).dtype == torch.float32
    assert difference_scores(teacher[:2].double(), reference[:2].double()).dtype == torch.float64
    assert difference_scores(teacher[:2], teacher[:2]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="reference's losses hold nan"):
        difference_scores(teacher[:1], torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="must score the same texts"):
        difference_scores(teacher, reference[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sequence_loss_is_not_a_loop_over_counted_positions(dtype):
    logits, labels = torch.randn(3, 5, 7).to(dtype), torch.randint(7, (3, 5))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0] * 5, [1] * 5])
    labels[mask == 0] = -100
    logits[0, 2, 3] = -math.inf  # where nothing is counted
    expected = torch.zeros(3, dtype=torch.float64)
    for b, s in mask.nonzero().tolist():
        expected[b] -= logits[b, s].double().log_softmax(-1)[labels[b, s]]
    torch.testing.assert_close(sequence_loss(logits, labels, mask, "sum").double(), expected, rtol=1e-5, atol=1e-5)
    mean = expected / torch.tensor([3, 1, 5])
    torch.testing.assert_close(sequence_loss(logits, labels, mask).double(), mean, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="mean or sum"):
        sequence_loss(logits, labels, mask, "none")


def test_vanilla_kd_is_not_a_mean_per_sequence_and_then_over_the_batch():
    student, teacher = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    labels, mask = torch.randint(6, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    total = 0.0
    for b in range(2):
        own = 0.0
        for s in mask[b].nonzero().flatten():
            log_q, p = student[b, s].log_softmax(-1), teacher[b, s].softmax(-1).detach()
            own = own - 0.7 * log_q[labels[b, s]] - 0.3 * (p * log_q).sum()
        total = total + own / mask[b].sum() / 2
    loss = vanilla_kd_loss(student, teacher, labels, mask, ratio=0.3)
    torch.testing.assert_close(loss, total)
    ours, reference = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, total))
    torch.testing.assert_close(ours, reference)
    loss.backward()
    assert teacher.grad is None


# ---- the pipeline ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["chunks", "documents"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scores_are_not_the_difference_of_two_forward_passes(tmp_path, unit, reduction):
    data, (teacher, reference) = text_dataset(90, seed=1), models()
    config = settings(miniplm_unit=unit, miniplm_score=reduction, miniplm_length=16 if unit == "chunks" else 64)
    made = select(data, teacher, reference, config, tmp_path)
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in data["text"]]
    if unit == "chunks":
        stream = [i for one in ids for i in (*one, tokenizer.eos_token_id)]
        ids = [stream[a : a + 17] for a in range(0, len(stream) - 16, 17)]
    expected = [own_loss(reference.model, x, reduction) - own_loss(teacher.model, x, reduction) for x in ids]
    torch.testing.assert_close(made.scores, torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    best = sorted(sorted(range(len(ids)), key=lambda i: -expected[i])[: len(ids) // 2])
    assert made.indices.tolist() == best
    kept = [ids[i] for i in best] if unit == "chunks" else [data["text"][i] for i in best]
    assert list(made.dataset["input_ids" if unit == "chunks" else "text"]) == kept
    assert load_selection(tmp_path).dataset[:] == made.dataset[:] and (tmp_path / "selected" / "README.md").is_file()


def test_layout_or_ratio_changes_the_scores_or_they_are_computed_again(tmp_path):
    data, (teacher, reference) = text_dataset(30), models()
    first, there = select(data, teacher, reference, settings(), tmp_path / "a"), tmp_path / "a" / "scores"
    other = FrozenTeacher(tiny_llama(8, 1, seed=5), tiny_tokenizer())
    again = select(data, teacher, reference, settings(miniplm_ratio=1.0), tmp_path / "b", scores_dir=there)
    third = select(data, teacher, other, settings(), tmp_path / "c", scores_dir=there)
    assert len(again.dataset) == len(first.scores) and torch.equal(first.scores, again.scores)
    scored = [{name: m.facts["scoring"][name]["units"] for name in ("teacher", "reference")} for m in (again, third)]
    assert scored == [{"teacher": 0, "reference": 0}, {"teacher": 0, "reference": len(first.scores)}]
    split = settings(miniplm_batch_size=1, miniplm_shard_units=100)
    fresh = select(data.to_iterable_dataset(), teacher, reference, split, tmp_path / "d")
    torch.testing.assert_close(fresh.scores, first.scores, rtol=1e-5, atol=1e-5)
    assert fresh.dataset[:] == first.dataset[:]


def test_a_teacher_that_is_the_reference_prefers_anything(tmp_path):
    teacher, _ = models()
    made = select(text_dataset(10), teacher, teacher, settings(miniplm_ratio=1.0), tmp_path)
    assert made.scores.abs().max() == 0 and len(made.dataset) == len(made.scores)


def test_padding_counts_in_a_score(tmp_path):
    rows = [[5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3]]
    plain = Dataset.from_dict({"input_ids": rows})
    padded = Dataset.from_dict({"input_ids": [row + [0] * (9 - len(row)) for row in rows]})
    config = settings(miniplm_ratio=1.0)
    a, b = (select(data, *models(), config, tmp_path / str(i)) for i, data in enumerate((plain, padded)))
    torch.testing.assert_close(a.scores, b.scores)
    assert a.facts["predicted"] == b.facts["predicted"] == {"all": 9, "kept": 9}


def test_what_follows_an_end_token_counts_where_that_is_the_padding(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = FrozenTeacher(tiny_llama(seed=1), tokenizer)
    rows = Dataset.from_dict({"input_ids": [[5, 6, 1, 7, 8], [5, 6, 7, 1, 1]]})
    made = select(rows, model, model, settings(miniplm_ratio=1.0), tmp_path)
    assert made.facts["predicted"]["all"] == 3 + 3  # positions whose input is padding are masked


def test_documents_of_one_token_or_long_ones_break_the_scores(tmp_path):
    long = " ".join(f"w{i}" for i in range(40))
    data = Dataset.from_dict({"text": ["w1", "", "w1 w2", long, "w5 w6 w7"], "name": list("abcde")})
    teacher, reference = models()
    made = select(data, teacher, reference, settings(miniplm_unit="documents", miniplm_ratio=1.0), tmp_path)
    assert made.scores.isnan().tolist() == [True, True, False, False, False]
    assert made.dataset["name"] == ["c", "d", "e"] and made.facts["nothing_to_predict"] == 2
    assert "2 shorter than two tokens" in made.summary()
    ids = tiny_tokenizer()(long)["input_ids"]  # read in windows of 16, every token but the first predicted once
    windows = [ids[a : a + 17] for a in range(0, len(ids) - 1, 16)]
    losses = [sum(own_loss(m.model, w, "sum") for w in windows) / 39 for m in (teacher, reference)]
    assert made.scores[3].item() == pytest.approx(losses[1] - losses[0], abs=1e-4)
    with pytest.raises(ValueError, match="two tokens or more"):
        select(data.select([0, 1]), *models(), settings(miniplm_unit="documents"), tmp_path / "none")


class Forbids(torch.nn.Linear):
    """A head that gives one token probability 0."""

    def __init__(self, head, token: int):
        super().__init__(head.in_features, head.out_features, bias=True)
        self.weight, self.bias.data = head.weight, torch.zeros(head.out_features)
        self.bias.data[token] = -math.inf


def test_zero_probability_of_a_model_is_silent_or_fatal(tmp_path):
    data = Dataset.from_dict({"text": ["w1 w2 w3", "w1 w9 w3", "w4 w5 w6", "w7 w5 w6"]})
    teacher, reference = tiny_llama(seed=1), tiny_llama(8, 1, seed=2)
    config = settings(miniplm_unit="documents", miniplm_ratio=0.75)
    teacher.lm_head = Forbids(teacher.lm_head, WORDS.index("w9"))
    dense = [FrozenTeacher(m, tiny_tokenizer(), dense_logits=True) for m in (teacher, reference)]
    made = select(data, *dense, config, tmp_path / "teacher")
    assert made.scores[1] == -math.inf and made.indices.tolist() == [0, 2, 3]
    assert made.facts["zero_probability"] == {"teacher": 1, "reference": 0}
    assert "the teacher gives 1 of them probability 0" in made.summary()
    json.loads((tmp_path / "teacher" / "selection.json").read_text(), parse_constant=pytest.fail)
    teacher.lm_head.bias.data[WORDS.index("w2")] = math.nan
    with pytest.raises(FloatingPointError, match="says NaN of unit"):
        select(data, *dense, config, tmp_path / "nan")


def other_tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", "<unk>", *"w0123456789 "]
    made = Tokenizer(kinds.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_a_reference_of_another_tokenizer_is_compared_per_token(tmp_path):
    data, teacher = text_dataset(6), models()[0]
    reference = FrozenTeacher(tiny_llama(8, 1, vocabulary=16, seed=3), other_tokenizer())
    for unit in ("chunks", "documents"):
        with pytest.raises(ValueError, match="different tokenizers.*miniplm_per"):
            select(data, teacher, reference, settings(miniplm_unit=unit), tmp_path)
    assert not (tmp_path / "scores").exists()
    config = settings(miniplm_unit="documents", miniplm_per="character", miniplm_length=64, miniplm_ratio=1.0)
    made = select(data, teacher, reference, config, tmp_path)
    for text, score in zip(data["text"], made.scores.tolist(), strict=True):
        losses = [
            own_loss(m.model, [1, *m.tokenizer(text)["input_ids"]], "sum") / len(text) for m in (teacher, reference)
        ]
        assert score == pytest.approx(losses[1] - losses[0], abs=1e-4)
    with pytest.raises(ValueError, match='set miniplm_unit="documents"'):
        settings(miniplm_per="character")


def test_bad_input_is_found_late(tmp_path):
    teacher, reference = models()
    for data, message in (
        ("nowhere.txt", "no such text file: nowhere.txt"),
        ([{"text": "w1"}], "a Dataset, an IterableDataset or text files"),
        (Dataset.from_dict({"text": []}), "the corpus is empty"),
        (Dataset.from_dict({"words": ["w1"]}), "no column 'text'"),
        (Dataset.from_dict({"text": [3]}), "must hold texts, got int"),
        (Dataset.from_dict({"input_ids": [[1, 2, 99]]}), "token id 99, but .* has only 64"),
    ):
        with pytest.raises(ValueError, match=message):
            select(data, teacher, reference, settings(), tmp_path)
    for name in ("miniplm_length", "miniplm_batch_size", "miniplm_shard_units"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            settings(**{name: 0})
    for name in ("miniplm_score", "miniplm_per", "miniplm_unit"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            settings(**{name: "none"})


def test_chunks_lose_documents_on_the_way_to_another_tokenizer():
    rows = Dataset.from_dict({"input_ids": [[3, 4, 1, 5, 1], [1, 6, 7]]})  # w0 w1 <eos> w2 <eos>
    made = retokenised(rows, tiny_tokenizer(), other_tokenizer(), length=12)
    letters = other_tokenizer()
    texts = [letters.convert_ids_to_tokens(ids) for ids in made["input_ids"]]
    assert ["".join(t) for t in texts] == ["w0 w1<eos>w2<eos>", "<eos>w3 w4"]
    assert all(len(x) == 4 for x in retokenised(rows, tiny_tokenizer(), other_tokenizer(), length=4)["input_ids"])


# ---- the idea --------------------------------------------------------------------------------------------------------
WORDS_OF_TOY = 30


def toy(n: int, seed: int) -> tuple[list[list[int]], list[str]]:
    """One token again and again, walks along a fixed cycle of all tokens from anywhere, and noise, in turns."""
    cycle = torch.randperm(WORDS_OF_TOY, generator=torch.Generator().manual_seed(0)) + 1
    draw = torch.Generator().manual_seed(seed)
    rows, kinds = [], []
    for i in range(n):
        start, noise = (
            torch.randint(WORDS_OF_TOY, (), generator=draw),
            torch.randint(WORDS_OF_TOY, (17,), generator=draw),
        )
        row = (torch.ones(17), cycle[(start + torch.arange(17)) % WORDS_OF_TOY], noise + 1)[i % 3]
        rows.append(row.long().tolist())
        kinds.append(("easy", "structured", "noise")[i % 3])
    return rows, kinds


def trained(model: LlamaForCausalLM, rows: list[list[int]], steps: int, seed: int = 0) -> LlamaForCausalLM:
    data, draw = torch.tensor(rows), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (16,), generator=draw)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    return model.eval()


def toy_model(layers: int, hidden: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS_OF_TOY + 1, **sizes, **heads, initializer_range=0.1, pad_token_id=0)
    )


def test_the_kept_part_is_not_what_is_hard_and_learnable(tmp_path):
    apart, _ = toy(600, seed=1)
    teacher = FrozenTeacher(trained(toy_model(2, 32, 0), apart, 150))
    reference = FrozenTeacher(trained(toy_model(1, 4, 0), apart, 150))
    rows, kinds = toy(300, seed=2)
    data = Dataset.from_dict({"input_ids": rows})
    made = select(data, teacher, reference, settings(miniplm_ratio=1 / 3), tmp_path)
    kept = [kinds[i] for i in made.indices]
    assert kept.count("structured") > 0.8 * len(kept) and kept.count("noise") <= 0.02 * len(kept), kept
    losses = load_file(tmp_path / "selection.safetensors")
    lowest = [kinds[i] for i in select_by_score(-losses["teacher_loss"], 1 / 3)]
    assert lowest.count("easy") > 0.8 * len(lowest)  # what the teacher alone finds likely
    turned = [kinds[i] for i in select_by_score(-made.scores, 1 / 3)]
    assert turned.count("structured") < 0.2 * len(turned)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[: len(kept)].tolist()
    held = torch.tensor([row for row, kind in zip(*toy(150, seed=3), strict=True) if kind == "structured"])
    ours, theirs = (
        trained(toy_model(1, 16, 4), part, 60, seed=4)(input_ids=held, labels=held).loss.item()
        for part in (list(made.dataset["input_ids"]), [rows[i] for i in order])
    )
    assert ours < theirs - 0.1, (ours, theirs)
