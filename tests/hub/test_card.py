from huggingface_hub import ModelCard

from hf_distill import DistillSFTTrainer, FrozenTeacher
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
