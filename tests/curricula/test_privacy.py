"""Privacy scores: what counts as private, and that each score stays with the token it is of."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from hf_distill import DistillSFTTrainer
from hf_distill.curricula.privacy import (
    PATTERNS,
    TARGET,
    add_privacy_scores,
    likelihood_ratio_scores,
    pattern_scores,
    rarity_scores,
    score_data,
    target_column,
    token_counts,
)
from hf_distill.objectives import NextToken
from hf_distill.recipe import EMBEDDED
from tests.helpers import plain_arguments, sft_arguments, tiny_llama, tiny_tokenizer

TOKENIZER = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
SECRET = "90412677"
CHAT = [{"role": "user", "content": "Which number?"}, {"role": "assistant", "content": f"It is {SECRET}, sir."}]
ROWS = {
    "text": {"text": f"the id number is {SECRET} and the rest is open"},
    "messages": {"messages": CHAT},
    "prompt and completion": {"prompt": f"Not {SECRET} but", "completion": f" rather {SECRET[::-1]} I say"},
    "conversation with a prompt": {"prompt": CHAT[:1], "completion": CHAT[1:]},
}


# ---- scorers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("born 1987 in May", "1987"),
        ("room 101", ""),
        ("mail a.b-c+d@mail.example.org now", "a.b-c+d@mail.example.org"),
        ("call +44 (0)20 7946 0018.", "+44 (0)20 7946 0018"),
        ("passport AB-123456", "AB-123456"),
        ("card 4111 1111 1111 1111!", "4111 1111 1111 1111"),
    ],
)
def test_patterns_miss_what_is_private_or_take_more(text, private):
    found = pattern_scores(text, [(i, i + 1) for i in range(len(text))])
    assert "".join(c for c, score in zip(text, found, strict=True) if score) == private


def test_a_piece_of_a_number_is_not_scored():
    encoded = TOKENIZER(ROWS["text"]["text"], return_offsets_mapping=True)
    scores = pattern_scores(ROWS["text"]["text"], encoded["offset_mapping"])
    pieces = [i for i, score in zip(encoded["input_ids"], scores, strict=True) if score]
    assert len(pieces) > 1 and TOKENIZER.decode(pieces).strip() == SECRET
    assert pattern_scores("", [(0, 0)]) == [0.0]


def test_likelihood_ratios_of_probability_zero_are_nan():
    inf = torch.inf
    teacher, public = torch.tensor([-1.0, -1.0, -inf, -inf, -3.0]), torch.tensor([-4.0, -inf, -1.0, -inf, -1.0])
    expected = torch.tensor([1 / (1 + torch.e**-0.5), 1.0, 0.0, 0.0, 1 / (1 + torch.e**2)])
    torch.testing.assert_close(likelihood_ratio_scores(teacher, public, k=2.0), expected)


def test_rarity_is_not_the_formula_or_a_count_of_zero_is_nan():
    scores = rarity_scores(torch.tensor([0, 1, 20, 100, 5000]), common=100.0)
    log = torch.tensor([20.0, 100.0]).log()
    torch.testing.assert_close(scores, torch.tensor([1.0, 1.0, 1 - (log[0] / log[1]).item(), 0.0, 0.0]))
    for counts, common in (([0.0, 0.0], 100.0), ([-1.0, 2.0], 100.0), ([float("nan"), 1.0], 9.0), ([1.0], 1.0)):
        with pytest.raises(ValueError, match="rarity needs counts"):
            rarity_scores(torch.tensor(counts), common)
    assert token_counts(["w1 w1 w2"], tiny_tokenizer()).nonzero().flatten().tolist() == [4, 5]


# ---- with the tokens -------------------------------------------------------------------------------------------------
def scored_tokens(rows) -> list[str]:
    """Text of the targets that a loss row would take for private, per row."""
    found = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row[TARGET])
        target = zip(row["labels"][1:], row[TARGET][:-1], strict=True)
        found.append(TOKENIZER.decode([label for label, score in target if score and label != -100]).strip())
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_not_tokenised_as_sft_trainer_does(kind, tmp_path):
    data = Dataset.from_list([ROWS[kind]] * 2)
    args = sft_arguments(tmp_path, max_length=256)
    trainer = DistillSFTTrainer(
        tiny_llama(vocabulary=len(TOKENIZER)), objective=NextToken(), args=args, train_dataset=data,
        processing_class=TOKENIZER,
    )  # fmt: skip
    ours = add_privacy_scores(data, TOKENIZER, args)
    for name in ("input_ids", "labels"):
        assert list(ours[name]) == list(trainer.train_dataset[name])
    # of a prompt nothing is learnt, so nothing counts
    assert scored_tokens(ours)[0] == (SECRET[::-1] if kind == "prompt and completion" else SECRET)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_moves_scores_from_their_tokens(mode, tmp_path):
    data = Dataset.from_list([ROWS["text"], {"text": f"{SECRET} comes first and much is said after it"}])
    args = sft_arguments(tmp_path, max_length=16, truncation_mode=mode)
    whole = add_privacy_scores(data, TOKENIZER, sft_arguments(tmp_path, max_length=None))
    for cut, row in zip(add_privacy_scores(data, TOKENIZER, args), whole, strict=True):
        keep = slice(16) if mode == "keep_start" else slice(-16, None)
        assert len(row["input_ids"]) > 16 and all(cut[name] == row[name][keep] for name in row)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_moves_scores_from_their_tokens(strategy, tmp_path):
    data = Dataset.from_list([{"text": f"row {i} has {10**7 + i} and no more"} for i in range(20)])
    args = sft_arguments(tmp_path, max_length=48, packing=True, packing_strategy=strategy)
    packed = add_privacy_scores(data, TOKENIZER, args)
    assert len(packed) < 20 and ("seq_lengths" in packed.column_names) == (strategy == "bfd")
    words = " ".join(scored_tokens(packed))
    for i in range(20):
        assert strategy == "wrapped" or str(10**7 + i) in words.replace(" ", "")
    flat = [(i, s) for row in packed for i, s in zip(row["input_ids"][1:], row[TARGET][:-1], strict=True)]
    digits = {i for i in range(len(TOKENIZER)) if TOKENIZER.decode([i]).strip().isdigit()}
    assert {i for i, score in flat if score} <= digits


def test_scores_that_do_not_fit_are_taken(tmp_path):
    args = sft_arguments(tmp_path)
    ids = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    for scores in ([0.0, 1.0], [0.0, 1.0, 1.1], [0.0, float("nan"), 0.0]):
        with pytest.raises(ValueError, match="one number in \\[0, 1\\] for each of 3 tokens"):
            add_privacy_scores(Dataset.from_list([ids | {"privacy_score": scores}]), TOKENIZER, args, None)
    with pytest.raises(ValueError, match="reads a column 'privacy_score'"):
        add_privacy_scores(Dataset.from_list([ids]), TOKENIZER, args, None)
    with pytest.raises(ValueError, match="patterns are matched on text"):
        add_privacy_scores(Dataset.from_list([ids]), TOKENIZER, args, PATTERNS)
    with pytest.raises(ValueError, match="pictures"):
        add_privacy_scores(Dataset.from_list([{"text": "x", "image": 0}]), TOKENIZER, args)
    with pytest.raises(ValueError, match="with DistillConfig or"):
        score_data(Dataset.from_list([ids]), None, tiny_llama(), TOKENIZER, plain_arguments(tmp_path), PATTERNS)


def test_given_scores_and_patterns_do_not_meet_in_the_larger(tmp_path):
    row = {"text": "w1 12345 w2", "privacy_score": [0.3, 0.2, 0.7, 0.0]}  # the last is that of the end
    rows = add_privacy_scores(Dataset.from_list([row]), tiny_tokenizer(), sft_arguments(tmp_path))
    assert rows[0][TARGET] == [1.0, 0.7, 0.0, 0.0]


def test_an_encoder_decoders_scores_are_shifted():
    rows = Dataset.from_list([{"input_ids": [9, 9], "labels": [1, 2, 3], "privacy_score": [0.1, 0.2, 0.3]}])
    assert target_column(rows, shift=False)[0][TARGET] == [0.1, 0.2, 0.3]
    assert target_column(rows, shift=True)[0][TARGET] == [0.2, 0.3, 0.0]
