"""Pairs from a student's own answers: what is wrong, what is left out, and drawn once."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from hf_distill import LocalTextTeacher
from hf_distill.curricula.pairs import contrastive_pairs
from tests.helpers import tiny_llama, tiny_tokenizer
from tests.training.test_dpo import make_trainer
from tests.training.test_inputs import llava_processor, tiny_llava

GREEDY = dict(temperature=0.0, max_new_tokens=3)
DRAWN = dict(samples=3, max_new_tokens=3, seed=5)


def writer(store=None, seed: int = 0) -> LocalTextTeacher:
    return LocalTextTeacher(tiny_llama(seed=seed), tiny_tokenizer(), store=store, batch_size=2)


def rows(completions=("w1", "w2 w3", "w4", "w5")) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"w{i} w7", "completion": " " + c, "id": i} for i, c in enumerate(completions)]
    )


def said(prompt: str) -> str:
    return writer().generate([prompt], **GREEDY)[0].text.strip()


def test_a_right_answer_is_rejected_or_a_wrong_one_missed():
    data = rows(("w1", said("w1 w7"), "w4", "w5"))
    pairs, counts = contrastive_pairs(data, writer(), **GREEDY)
    assert counts == (3, 1, 0) and pairs.column_names == ["prompt", "chosen", "rejected"]
    assert pairs["prompt"] == ["w0 w7", "w2 w7", "w3 w7"] and pairs["chosen"] == [" w1", " w4", " w5"]
    assert pairs["rejected"] == [" " + said(prompt) for prompt in pairs["prompt"]]


def test_the_judge_is_not_asked_or_an_equal_pair_is_kept():
    data = rows(("w1", said("w1 w7"), "w4", "w5"))
    asked = []

    def judge(answer, row):
        asked.append((answer, row["id"]))
        return row["id"] < 2

    pairs, counts = contrastive_pairs(data, writer(), is_wrong=judge, **GREEDY)
    assert counts == (1, 2, 1) and pairs["prompt"] == ["w0 w7"]
    assert asked == [(said(f"w{i} w7"), i) for i in range(4)]
    with pytest.raises(ValueError, match="none of 4 rows made a pair: 4 were answered right and 0 wrong"):
        contrastive_pairs(data, writer(), is_wrong=lambda answer, row: False, **GREEDY)


def test_the_first_wrong_draw_is_not_taken():
    texts = [g.text.strip() for g in writer().generate(["w0 w7"], num_return_sequences=3, max_new_tokens=3, seed=5)]
    assert texts[0] != texts[1]
    pairs, _ = contrastive_pairs(rows((texts[0],)), writer(), **DRAWN)
    assert pairs["rejected"] == [" " + next(text for text in texts if text != texts[0])]


def test_draws_depend_on_the_other_rows_or_not_on_the_seed():
    alone = contrastive_pairs(rows().select([2]), writer(), **DRAWN)[0]
    among = contrastive_pairs(rows(), writer(), **DRAWN)[0]
    assert alone["rejected"][0] == among["rejected"][2]
    assert contrastive_pairs(rows(), writer(), **DRAWN | {"seed": 6})[0]["rejected"] != among["rejected"]


def test_a_teacher_s_answers_are_not_chosen():
    pairs, _ = contrastive_pairs(rows(), writer(), teacher=writer(seed=1), **GREEDY)
    texts = [g.text for g in writer(seed=1).generate(pairs["prompt"], **GREEDY)]
    assert pairs["chosen"] == [" " + text for text in texts], "plain prompts are gone on from"


def test_a_killed_call_starts_over(tmp_path):
    contrastive_pairs(rows().select([0, 1]), writer(tmp_path), **DRAWN)
    again = writer(tmp_path)
    pairs, _ = contrastive_pairs(rows(), again, **DRAWN)
    assert again.usage.cache_hits == 6 and again.usage.requests == 6
    assert pairs["rejected"] == contrastive_pairs(rows(), writer(), **DRAWN)[0]["rejected"]


def test_rows_without_completions_are_taken():
    with pytest.raises(ValueError, match="completion is missing: the columns are prompt"):
        contrastive_pairs(rows().remove_columns("completion"), writer())


# ---- pictures -------------------------------------------------------------------------------------------------------
def seen(n: int = 5) -> Dataset:
    """One question about different pictures."""
    pixels = [np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8) for i in range(n)]
    question, answer = [{"role": "user", "content": "w1 w2"}], [{"role": "assistant", "content": "w3"}]
    return Dataset.from_list([{"prompt": question, "completion": answer, "image": Image.fromarray(p)} for p in pixels])


def test_answers_to_one_question_do_not_depend_on_the_picture(tmp_path):
    model, data = tiny_llava(16, 1), seen()
    model.model.multi_modal_projector.linear_2.weight.data.mul_(30)  # so that a random model looks at its picture
    student = LocalTextTeacher(model, llava_processor(), store=tmp_path / "texts", batch_size=2)
    pairs, counts = contrastive_pairs(data, student, max_new_tokens=4, temperature=0.0)
    assert counts.made == 5 and pairs.column_names == ["prompt", "image", "chosen", "rejected"]
    texts = [row["rejected"][0]["content"] for row in pairs]
    assert len(set(texts)) > 1
    processor = llava_processor()
    for row, text in zip(pairs, texts, strict=True):
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]}]
        shown = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=shown, images=[row["image"]], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(out, skip_special_tokens=True).strip() == text
    again = LocalTextTeacher(model, llava_processor(), store=tmp_path / "texts")
    contrastive_pairs(data, again, max_new_tokens=4, temperature=0.0)
    assert again.usage.requests == 0 and again.usage.cache_hits == 5 and not again._pictures
    shared = dict(student=tiny_llava(16, 1), processing_class=llava_processor(), max_length=None)
    teacher = tiny_llava(32, 2)
    from hf_distill import FrozenTeacher

    make_trainer(tmp_path / "run", FrozenTeacher(teacher, llava_processor()), train_dataset=pairs, **shared).train()


def test_pictures_need_a_processor_and_conversations():
    student = LocalTextTeacher(tiny_llava(16, 1), llava_processor())
    with pytest.raises(ValueError, match="prompts with images must be conversations"):
        student.generate(["w1"], images=[Image.new("RGB", (16, 16))])
    with pytest.raises(ValueError, match="has no processor to read them"):
        writer().generate(["w1"], images=[Image.new("RGB", (16, 16))])
