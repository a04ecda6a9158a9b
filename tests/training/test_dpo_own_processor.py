"""A teacher of another family reads the pairs with its own tokenizer, template and image processor."""

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference, DataCollatorForVisionPreference

from hf_distill import FrozenTeacher, cache_teacher
from hf_distill.curricula.preference import DataCollatorForPreferenceDistillation, add_reference_ids, same_processor
from hf_distill.losses import preference_loss
from tests.helpers import SGD, tiny_llama, tiny_tokenizer
from tests.training.test_dpo import HELD_OUT, PAIRS, log_probability, losses, make_trainer, pairs
from tests.training.test_inputs import TEMPLATE, llava_processor, tiny_llava

LETTERS = ["[end]", "[pad]", "?", "<image>", "w", " ", *"0123456789"]
OWN = dict(teacher_own_processor=True, beta=0.2)


def letters() -> PreTrainedTokenizerFast:
    """Single characters, other special tokens, another vocabulary."""
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="[end]", pad_token="[pad]", unk_token="?")


def speller(seed: int = 3) -> FrozenTeacher:
    return FrozenTeacher(tiny_llama(32, 2, vocabulary=len(LETTERS), seed=seed), letters())


def spelled(model, prompt: str, answer: str) -> torch.Tensor:
    start, rest = ([LETTERS.index(c) for c in text] for text in (prompt, answer))
    ids = torch.tensor([start + rest + [0]])
    with torch.no_grad():
        log_probs = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, ids[0, 1:, None])[len(start) - 1 :].sum()


def test_the_teacher_reads_the_student_s_tokens(tmp_path):
    teacher, student = speller(), tiny_llama()
    ours = torch.tensor([[log_probability(student, p, a) for a in (c, r)] for p, c, r in PAIRS]).T
    theirs = torch.tensor([[spelled(teacher.model, p, a) for a in (c, r)] for p, c, r in PAIRS]).T
    trainer = make_trainer(tmp_path, teacher, student=student, **OWN)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(preference_loss(*ours, *theirs, 0.2)[0].item(), rel=1e-4)
    chosen = trainer.state.log_history[0]["rewards/chosen"]
    assert chosen == pytest.approx(0.2 * (ours - theirs)[0].mean().item(), rel=1e-4), "a prompt counts as an answer"
    assert trainer.evaluate(pairs(HELD_OUT))["eval_loss"] > 0
    with pytest.raises(ValueError, match="tokenizers differ.*teacher_own_processor"):
        make_trainer(tmp_path / "b", teacher, teacher_own_processor=False)


def test_a_cached_reference_of_another_family_is_another(tmp_path):
    found, teacher = [], speller()
    settings = SGD | OWN | dict(learning_rate=0.02, per_device_train_batch_size=2, max_steps=4)
    live = make_trainer(tmp_path / "live", teacher, eval_dataset=pairs(HELD_OUT), **settings)
    cached = cache_teacher(teacher, live, tmp_path / "cache", mode="scores", batch_size=3)
    again = make_trainer(tmp_path / "cached", cached, eval_dataset=pairs(HELD_OUT), **settings)
    for trainer in (live, again):
        trainer.train()
        found.append(losses(trainer) + [trainer.evaluate()["eval_rewards/margins"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][0] != found[0][-2]


def test_equal_tokenizers_make_a_second_set_of_tensors(tmp_path):
    trainer = make_trainer(tmp_path, FrozenTeacher(tiny_llama(32, seed=1), tiny_tokenizer()), **OWN)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    assert not [key for key in batch if key.startswith("teacher_")]
    with pytest.raises(ValueError, match="came without one: pass FrozenTeacher"):
        make_trainer(tmp_path, tiny_llama(seed=1), **OWN)
    with pytest.raises(ValueError, match="precompute_ref_log_probs reads the student's tokens"):
        make_trainer(tmp_path, speller(), precompute_ref_log_probs=True, **OWN)


# ---- pictures -------------------------------------------------------------------------------------------------------
def wide_processor() -> LlavaProcessor:
    """24 pixels in patches of 8: nine image tokens a picture, where the student has four; and another tokenizer."""
    size = {"height": 24, "width": 24}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=letters_with_picture(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def letters_with_picture() -> PreTrainedTokenizerFast:
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def wide_llava() -> LlavaForConditionalGeneration:
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    vision = CLIPVisionConfig(image_size=24, patch_size=8, **vision)
    text = tiny_llama(32, 2, vocabulary=len(LETTERS)).config
    torch.manual_seed(4)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=9)
    )


def pictures(rejected: str = "w6") -> Dataset:
    return Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (16, 16), (60 * i, 10, 200 - 50 * i))],
                "prompt": [{"role": "user", "content": "w1 w2"}],
                "chosen": [{"role": "assistant", "content": "w3 w4"}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for i in range(4)
        ]
    )


def picture_trainer(folder, teacher, data=None, **settings):
    more = dict(train_dataset=pictures() if data is None else data, processing_class=llava_processor())
    return make_trainer(folder, teacher, student=tiny_llava(16, 1), **dict(max_length=None) | more | settings)


def test_a_teacher_with_another_patch_size_reads_the_student_s_pixels(tmp_path):
    model, processor = wide_llava(), wide_processor()
    trainer = picture_trainer(tmp_path, FrozenTeacher(model, processor), **OWN)
    features = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(features)
    assert batch["teacher_pixel_values"].shape[-1] == 24 and batch["pixel_values"].shape[-1] == 16
    alone = DataCollatorForVisionPreference(processor)([dict(f) for f in features])
    with torch.no_grad():
        logits = model(**{k: v for k, v in alone.items() if k != "completion_mask"}).logits[:, :-1].log_softmax(-1)
    said = logits.gather(-1, alone["input_ids"][:, 1:, None])[..., 0] * alone["completion_mask"][:, 1:]
    heard = trainer._with_reference(batch)
    torch.testing.assert_close(heard["ref_chosen_logps"], said.sum(1)[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heard["ref_rejected_logps"], said.sum(1)[4:], rtol=1e-4, atol=1e-4)
    trainer.train()
    assert losses(trainer)[1] < losses(trainer)[0]


def test_other_pictures_are_found_in_the_middle_of_a_run(tmp_path):
    other = llava_processor()
    other.image_processor = CLIPImageProcessorPil(
        size={"height": 24, "width": 24}, crop_size={"height": 24, "width": 24}
    )
    assert not same_processor(other, llava_processor()) and same_processor(llava_processor(), llava_processor())
    with pytest.raises(
        ValueError, match=r"read a pair with pictures otherwise \(input_ids .*: set teacher_own_processor"
    ):
        picture_trainer(tmp_path, FrozenTeacher(tiny_llava(32, 2), other))
    config = tiny_llava(32, 2).config
    config.vision_config.image_size = 24
    unknown = FrozenTeacher(LlavaForConditionalGeneration(config), llava_processor().tokenizer)
    with pytest.raises(
        ValueError, match="cannot read a batch as the student's .* doesn't match model .*give it its own"
    ):
        picture_trainer(tmp_path, unknown).train()


# ---- refusals -------------------------------------------------------------------------------------------------------
def test_equal_answers_are_trained_on(tmp_path):
    rows = [*PAIRS[:2], ("w1", " w5", " w5")]
    with pytest.raises(ValueError, match=r"row 2 of the train dataset has equal answers.*w5"):
        make_trainer(tmp_path, tiny_llama(seed=1), train_dataset=pairs(rows))
    with pytest.raises(ValueError, match="row 0 of the train dataset has equal answers"):
        picture_trainer(tmp_path, FrozenTeacher(tiny_llava(32, 2), llava_processor()), pictures("w3 w4"))
    collator = DataCollatorForPreferenceDistillation(DataCollatorForPreference(0))
    row = {"prompt_ids": [3], "chosen_ids": [4, 1], "rejected_ids": [5, 1]}
    with pytest.raises(ValueError, match="row 1 of a batch has equal answers"):
        collator([row, row | {"rejected_ids": [4, 1]}])


def test_an_id_that_the_reference_does_not_know_is_an_index_error(tmp_path):
    tokenizer = tiny_tokenizer()
    teacher = FrozenTeacher(tiny_llama(vocabulary=60, seed=1))
    with pytest.raises(ValueError, match="cannot be compared"):
        make_trainer(tmp_path, teacher, processing_class=tokenizer)
    collator = DataCollatorForPreferenceDistillation(DataCollatorForPreference(0), vocabulary=60)
    row = {"prompt_ids": [3], "chosen_ids": [4, 1], "rejected_ids": [5, 1]}
    with pytest.raises(ValueError, match="row 1 of a batch holds token id 61, but .* share only ids 0 to 59"):
        collator([row, row | {"chosen_ids": [61, 1]}])


def test_a_cut_picture_or_answer_is_passed_on(tmp_path):
    teacher = FrozenTeacher(tiny_llava(32, 2), llava_processor())
    with pytest.raises(ValueError, match="max_length=3 cuts image tokens of row 0 of a batch .*w1 w2"):
        picture_trainer(tmp_path, teacher, max_length=3).train()
    whole = picture_trainer(tmp_path, teacher).train_dataset
    base = DataCollatorForVisionPreference(llava_processor())
    width = base([dict(whole[0])])["completion_mask"].argmax(1)[0].item()
    with pytest.raises(ValueError, match="leaves nothing of an answer of row 0"):
        picture_trainer(tmp_path, teacher, max_length=width).train()
    trainer = picture_trainer(tmp_path / "cut", teacher, max_length=width + 1)
    trainer.train()
    assert trainer.data_collator([whole[0]])["input_ids"].shape[1] == width + 1
    own = FrozenTeacher(wide_llava(), wide_processor())
    with pytest.raises(ValueError, match="cannot be cut at the same text"):
        picture_trainer(tmp_path / "own", own, max_length=width + 1, **OWN).train()
    with pytest.raises(ValueError, match="row . of a batch .*has .* tokens, max_length=4 would cut it"):
        make_trainer(tmp_path / "text", speller(), max_length=4, **OWN).train()


def test_text_pairs_without_the_teacher_s_tokens_are_collated():
    row = {"prompt_ids": [3], "chosen_ids": [4, 1], "rejected_ids": [5, 1]}
    collator = DataCollatorForPreferenceDistillation(DataCollatorForPreference(0), DataCollatorForPreference(0))
    with pytest.raises(ValueError, match="add_reference_ids"):
        collator([row])
    messages = [[{"role": role, "content": text}] for role, text in (("user", "w1"), ("assistant", "w2"))]
    chats = Dataset.from_list([{"prompt": messages[0], "chosen": messages[1], "rejected": messages[0]}])
    tokenizer = letters()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    ids = add_reference_ids(chats, tokenizer)[0]
    assert tokenizer.decode(ids["reference_prompt_ids"]).replace(" ", "") == "w1"
    assert [LETTERS[i] for i in ids["reference_chosen_ids"]] == ["w", "2"]
