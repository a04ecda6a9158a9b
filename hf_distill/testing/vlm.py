"""Tiny vision-language models, pictures and pairs that methods are checked on."""

from __future__ import annotations

from typing import Any

from hf_distill.testing.setups import TinyText, picture_of

TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }} {% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


class TinyVLM(TinyText):
    """What a vision-language method runs on: LLaVA of a CLIP tower and a Qwen2 text model, pictures of 8 x 8 pixels.

    The student's feed-forward blocks are routed already, so that a method which upcycles a dense one gives back a model
    of the same names.
    """

    auto_class = "AutoModelForImageTextToText"
    task = "image-text-to-text"
    size, patch = 8, 4
    words = (*TinyText.words, "<image>")

    def student(self, **changes):
        from hf_distill.students import upcycle_to_moe

        dense = self.dense(**changes)
        return upcycle_to_moe(dense, router_std=0.5).train(dense.training)

    def dense(self, **changes):
        """The student before its blocks are routed."""
        return self._llava(16, 2, 0, changes)

    def teacher(self, **changes):
        return self._llava(32, 3, 1, changes)

    def _llava(self, hidden: int, layers: int, seed: int, changes: dict):
        import torch
        from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

        torch.manual_seed(seed)
        text = dict(
            vocab_size=len(self.words),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.2,
        )
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        vision |= dict(image_size=self.size, patch_size=self.patch, projection_dim=16, initializer_range=0.2)
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=Qwen2Config(**text | changes),
            image_token_index=self.words.index("<image>"),
            image_seq_length=(self.size // self.patch) ** 2,
        )
        config.pad_token_id, config.eos_token_id = 0, 1
        return LlavaForConditionalGeneration(config)

    def processing_class(self):
        from transformers import CLIPImageProcessorPil, LlavaProcessor

        tokenizer = super().processing_class()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        size = {"height": self.size, "width": self.size}
        return LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
            tokenizer=tokenizer,
            patch_size=self.patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )

    @property
    def prompt(self) -> dict:
        """What `pipeline()` is asked: pixels (size, size, 3) of 0 to 255, and a text with the picture's placeholder."""
        return {"picture": self._pixels(0), "text": "<image> w1 w2"}

    def picture(self, i: int):
        return picture_of(self._pixels(i))

    def _pixels(self, i: int) -> list:
        side = range(self.size)
        return [[[(29 * y + 13 * x + 71 * c + 37 * i) % 256 for c in range(3)] for x in side] for y in side]

    def dataset(self, rows: int):
        """A picture, a question of two words, and an answer of 3 to 11."""
        from datasets import Dataset

        answers = super().dataset(rows)["text"]
        return Dataset.from_list([self._row(i, completion=answer) for i, answer in enumerate(answers)])

    def pairs(self, rows: int):
        """A picture, a question, and two answers of which the first is the better one."""
        from datasets import Dataset

        answers = super().dataset(2 * rows)["text"]
        return Dataset.from_list(
            [self._row(i, chosen=answers[i], rejected=f"w9 {answers[rows + i]}") for i in range(rows)]
        )

    def _row(self, i: int, **answers: str) -> dict:
        row = {"images": [self.picture(i)], "prompt": [{"role": "user", "content": f"w{i % 7} w2"}]}
        return row | {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}

    def arguments(self, folder: str, **settings):
        from hf_distill import DistillSFTConfig

        return DistillSFTConfig(output_dir=folder, max_length=None, **settings)

    def config(self, config_class: type) -> Any:
        return config_class(stages="sparse", sparse_learning_rate=1e-2)

    def probe(self) -> dict:
        rows = [f"<image> w{i} w5 w6" for i in range(2)]
        pictures = [self.picture(i) for i in range(2)]
        return dict(self.processing_class()(images=pictures, text=rows, return_tensors="pt"))

    def peft_config(self):
        from peft import LoraConfig

        experts = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        modules = r".*language_model.*\.(q_proj|v_proj)"
        return LoraConfig(r=4, target_modules=modules, target_parameters=experts, init_lora_weights=False)
