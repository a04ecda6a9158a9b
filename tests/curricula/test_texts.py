"""Columns of texts, and tokenizers that do not make the same of them."""

import pytest
from datasets import Dataset

from hf_distill.curricula.texts import TextColumns, same_tokens
from tests.helpers import tiny_tokenizer


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ("idx sentence label", ("sentence", None)),
        ("sentence1 sentence2 label", ("sentence1", "sentence2")),
        ("premise hypothesis", ("premise", "hypothesis")),
        ("question sentence", ("question", "sentence")),
        ("text title", ("text", None)),
    ],
)
def test_the_usual_columns_are_not_found(columns, found):
    columns = TextColumns.found(Dataset.from_dict({name: ["w1"] for name in columns.split()}))
    assert (columns.text, columns.pair) == found


def test_a_column_that_is_not_there_is_taken():
    data = Dataset.from_dict({"text": ["w1"], "x": ["w2"]})
    with pytest.raises(ValueError, match="no column y in the dataset, only text, x"):
        TextColumns.of(data, None, "y")
    assert TextColumns.of(data, "x", "text") == TextColumns("x", "text")
    with pytest.raises(ValueError, match="no column of texts among x"):
        TextColumns.of(data.remove_columns("text"), None, None)


def test_tokenizers_of_one_vocabulary_and_other_inputs_are_the_same():
    """BERT reads which text of a pair a token is of, DistilBERT does not: one batch cannot feed both."""
    texts, other = (["w1 w2"], ["w3"]), tiny_tokenizer()
    assert same_tokens(tiny_tokenizer(), other, texts)
    other.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert not same_tokens(tiny_tokenizer(), other, texts)


def test_a_text_longer_than_its_model_is_left_so():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 3
    data = Dataset.from_dict({"text": ["w1 w2 w3 w4 w5"], "labels": [0]})
    row = TextColumns("text").tokenised(data, tokenizer, tiny_tokenizer(), 4)[0]
    assert (len(row["input_ids"]), len(row["teacher_input_ids"])) == (3, 4) and "text" not in row
