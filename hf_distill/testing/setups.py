"""Tiny models and data that methods are checked on, by kind of method."""

from __future__ import annotations

from typing import Any

from hf_distill.methods import MethodCard


class TinyText:
    """What a text method runs on: a small Llama pair, 64 whole words, texts of 3 to 11 of them.

    Subclass it and put an instance into SETUPS under your card's slug where your method needs other data, other
    arguments, or a config whose fields have no defaults.

    Attributes:
        auto_class, task, prompt: how the saved student is loaded and run in `pipeline()`.
        wide: vocabulary of the models in "no_wide_logits"; no other size of theirs may be a multiple of it.
        dropout: what makes the student's forward random.
    """

    auto_class = "AutoModelForCausalLM"
    task = "text-generation"
    prompt = "w1 w2 w3"
    wide = 4099
    dropout = {"attention_dropout": 0.1}
    words = ("<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61)))

    def student(self, **changes):
        """Two layers of width 16. Weights are larger than usual, so that gradients are far from rounding noise."""
        return self._llama(16, 2, 0, changes)

    def teacher(self, **changes):
        return self._llama(32, 3, 1, changes)

    def _llama(self, hidden: int, layers: int, seed: int, changes: dict):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        settings = dict(
            vocab_size=len(self.words),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(LlamaConfig(**settings | changes))

    def processing_class(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(self.words)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
        )
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
        return tokenizer

    def dataset(self, rows: int):
        import random

        from datasets import Dataset

        draw = random.Random(0)
        texts = [" ".join(f"w{draw.randrange(61)}" for _ in range(draw.randrange(3, 12))) for _ in range(rows)]
        return Dataset.from_dict({"text": texts})

    def arguments(self, folder: str, **settings):
        """The run's settings; `settings` are the promise's."""
        from hf_distill import DistillSFTConfig

        return DistillSFTConfig(output_dir=folder, max_length=16, **settings)

    def config(self, config_class: type) -> Any:
        return config_class()

    def probe(self) -> dict:
        """Inputs on which the saved student must say what it said before."""
        import torch

        return {"input_ids": torch.arange(10)[None]}

    def peft_config(self):
        from peft import LoraConfig

        return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


# by a card's slug, or by its (entry, modality)
SETUPS: dict[str | tuple[str, str], TinyText] = {("distill", "text"): TinyText()}


def setup_of(card: MethodCard) -> TinyText:
    """The tiny set-up a card is checked on.

    Raises:
        LookupError: there is none for its slug, entry and modality.
    """
    card.load()  # a plug-in's module may bring its own
    setup = SETUPS.get(card.slug) or SETUPS.get((card.entry, card.modality))
    if setup is None:
        raise LookupError(
            f"no set-up to check {card.slug!r} on (entry {card.entry!r}, modality {card.modality!r}): add one to "
            f"hf_distill.testing.SETUPS under {card.slug!r} or {(card.entry, card.modality)}"
        )
    return setup
