"""Tiny models and data that methods are checked on, by kind of method."""

from __future__ import annotations

from typing import Any

from hf_distill.methods import MethodCard


class TinyText:
    """What a text method runs on: a small Llama pair, 64 whole words, texts of 3 to 11 of them.

    Subclass it and put an instance into SETUPS under your card's slug where your method needs other data, other
    arguments, or a config whose fields have no defaults.

    Attributes:
        auto_class, task, prompt: how the saved student is loaded and run in `pipeline()`; a list is pixels, a dict
            a picture's pixels and a text.
        wide: vocabulary of the models in "no_wide_logits"; no other size of theirs may be a multiple of it. Models with
            one row of class logits per example have none, and are not checked for it.
        dropout: what makes the student's forward random.
        registered: the student's class is one that hf_distill registers, so that loading it may import
            `hf_distill.students`; else it loads without hf_distill.
    """

    auto_class = "AutoModelForCausalLM"
    task = "text-generation"
    prompt = "w1 w2 w3"
    wide = 4099
    dropout = {"attention_dropout": 0.1}
    registered = False
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

    def scores(self, student) -> dict[str, float] | None:
        """What `pipeline(task)` must say of the prompt, by label; None: a text that goes on from it."""
        return None

    def peft_config(self):
        from peft import LoraConfig

        return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


class TinyImage(TinyText):
    """What a method for image classifiers runs on: a small ViT pair without dropout, 8 x 8 pixels, five classes.

    Examples are prepared pixels and a label, as an image processor and `with_format("torch")` leave them.
    """

    auto_class = "AutoModelForImageClassification"
    task = "image-classification"
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    labels = ("ant", "bee", "cat", "dog", "eel")
    size = 8

    @property
    def prompt(self) -> list:
        """Pixels (size, size, 3) of 0 to 255."""
        return [
            [[(29 * y + 13 * x + 71 * c) % 256 for c in range(3)] for x in range(self.size)] for y in range(self.size)
        ]

    def student(self, **changes):
        return self._vit(16, 2, 0, changes)

    def teacher(self, **changes):
        return self._vit(32, 3, 1, changes)

    def _vit(self, hidden: int, layers: int, seed: int, changes: dict):
        import torch
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(seed)
        settings = dict(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=self.size,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
        )
        return ViTForImageClassification(ViTConfig(**settings | changes))

    def processing_class(self):
        from transformers import ViTImageProcessorPil

        return ViTImageProcessorPil(size={"height": self.size, "width": self.size})

    def dataset(self, rows: int):
        from datasets import Dataset

        labels = [i % len(self.labels) for i in range(rows)]
        return Dataset.from_dict({"pixel_values": self._pixels(rows).numpy(), "labels": labels}).with_format("torch")

    def _pixels(self, rows: int):
        import torch

        return torch.randn(rows, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))

    def arguments(self, folder: str, **settings):
        from hf_distill import DistillConfig

        return DistillConfig(output_dir=folder, **settings)

    def probe(self) -> dict:
        return {"pixel_values": self._pixels(3)}

    def scores(self, student) -> dict[str, float]:
        return _scores(student, self.processing_class()(picture_of(self.prompt), return_tensors="pt"))

    def peft_config(self):
        from peft import LoraConfig

        modules = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        return LoraConfig(r=4, init_lora_weights=False, **modules)


class TinySequence(TinyText):
    """What a method for text classifiers runs on: a small BERT pair without dropout, three classes, tokenised texts."""

    auto_class = "AutoModelForSequenceClassification"
    task = "text-classification"
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    labels = ("bad", "good", "mixed")

    def student(self, **changes):
        return self._bert(16, 2, 0, changes)

    def teacher(self, **changes):
        return self._bert(32, 3, 1, changes)

    def _bert(self, hidden: int, layers: int, seed: int, changes: dict):
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(seed)
        settings = dict(
            vocab_size=len(self.words),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
            initializer_range=0.2,
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
        )
        return BertForSequenceClassification(BertConfig(**settings | changes))

    def processing_class(self):
        tokenizer = super().processing_class()
        tokenizer.chat_template = None
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return tokenizer

    def dataset(self, rows: int):
        texts = super().dataset(rows)
        labels = [i % len(self.labels) for i in range(rows)]
        tokenizer = self.processing_class()
        tokenised = texts.map(lambda row: dict(tokenizer(row["text"])), remove_columns="text")
        return tokenised.add_column("labels", labels)

    def arguments(self, folder: str, **settings):
        from hf_distill import DistillConfig

        return DistillConfig(output_dir=folder, **settings)

    def scores(self, student) -> dict[str, float]:
        return _scores(student, self.processing_class()(self.prompt, return_tensors="pt"))

    def peft_config(self):
        from peft import LoraConfig

        modules = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
        return LoraConfig(r=4, init_lora_weights=False, task_type="SEQ_CLS", **modules)


def picture_of(pixels: list):
    """A PIL image of nested lists (H, W, 3) of 0 to 255."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.asarray(pixels, dtype=np.uint8))


def _scores(student, inputs) -> dict[str, float]:
    import torch

    with torch.no_grad():
        probabilities = student(**inputs).logits.softmax(-1)[0].tolist()
    return {student.config.id2label[i]: p for i, p in enumerate(probabilities)}


from hf_distill.testing.aspects import TinyAspects, TinyHard  # noqa: E402
from hf_distill.testing.domains import TinyDomains  # noqa: E402
from hf_distill.testing.few_classes import TinyLELP  # noqa: E402
from hf_distill.testing.hacking import TinyAnswers  # noqa: E402
from hf_distill.testing.images import TinyMixKD, TinyNDLoss  # noqa: E402
from hf_distill.testing.preference import TinyPreference  # noqa: E402
from hf_distill.testing.privacy import TinySwing  # noqa: E402
from hf_distill.testing.selection import TinySelection  # noqa: E402
from hf_distill.testing.vlm import TinyVLM  # noqa: E402  it builds on the classes above

# by a card's slug, or by its (entry, modality)
SETUPS: dict[str | tuple[str, str], TinyText] = {
    ("distill", "text"): TinyText(),
    ("distill", "image"): TinyImage(),
    ("distill", "text-classification"): TinySequence(),
    ("distill", "vision-language"): TinyVLM(),
    "ddk": TinyDomains(),
    "fidelity": TinyText(),
    "hard_augment": TinyHard(),
    "lelp": TinyLELP(),
    "mix_kd": TinyMixKD(),
    "miniplm": TinySelection(),
    "multi_aspect": TinyAspects(),
    "nd_loss": TinyNDLoss(),
    "preference_kd": TinyPreference(),
    "swing": TinySwing(),
    "teacher_hacking": TinyAnswers(),
}


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
