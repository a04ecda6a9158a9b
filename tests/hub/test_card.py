import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from hf_distill import DistillSFTTrainer, FrozenTeacher
from hf_distill.hub.card import MARK
from hf_distill.methods.taid import TAID, TAIDConfig
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer


def test_the_card_names_teacher_method_terms_and_what_came_out_and_no_path_of_this_machine(tmp_path):
    folder = tmp_path / "big-teacher"
    tokenizer = tiny_tokenizer()
    tiny_llama(32, 2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = DistillSFTTrainer(
        tiny_llama(16, 1),
        teacher=FrozenTeacher.from_pretrained(str(folder)),
        objective=TAID(TAIDConfig(distil_ratio=0.75)),
        args=sft_arguments(tmp_path / "out", max_steps=1),
        train_dataset=text_dataset(8, seed=0),
        eval_dataset=text_dataset(4, seed=1),
        processing_class=tokenizer,
    )
    trainer.train()
    value = trainer.evaluate()["eval_teacher_kl"]
    trainer.save_model()
    trainer.create_model_card(dataset_name=str(tmp_path / "my-data"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {"hf_distill", "taid"} <= set(card.data.tags)
    for wanted in ("big-teacher", "my-data", "| taid | Interpolated | 0.75 |", "2501.16937", f"{value:.4f}"):
        assert wanted in card.content, wanted
    assert str(tmp_path) not in card.content


def saved_run(tmp_path, **more) -> DistillSFTTrainer:
    tokenizer = tiny_tokenizer()
    trainer = DistillSFTTrainer(
        tiny_llama(16, 1),
        teacher=FrozenTeacher(tiny_llama(32, 2), tokenizer, name="org/teacher"),
        args=sft_arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=text_dataset(8, seed=0),
        processing_class=tokenizer,
        **more,
    )
    trainer.card_facts = {"dataset_name": "org/texts"}
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["whole", "LoRA"])
def test_a_save_leaves_no_card(tmp_path, peft_config):
    saved_run(tmp_path, peft_config=peft_config)
    for step, folder in ((1, "checkpoint-1"), (2, "checkpoint-2"), (2, "")):
        card = ModelCard.load(tmp_path / "out" / folder / "README.md")
        assert card.data.library_name == ("transformers" if peft_config is None else "peft")
        assert card.data.datasets == "org/texts" or card.data.datasets == ["org/texts"]
        for wanted in ("org/teacher", f"| steps | {step} of", "| machine | 1 x CPU |", "Nothing was measured"):
            assert wanted in card.content, (folder, wanted)


def test_a_card_that_was_edited_is_written_over(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# My own words\n")
    trainer = saved_run(tmp_path / "elsewhere")
    trainer.save_model(str(out))
    assert (out / "README.md").read_text() == "# My own words\n"
    (out / "README.md").write_text(f"# Old\n{MARK}\n")
    trainer.save_model(str(out))
    assert "org/teacher" in (out / "README.md").read_text()
