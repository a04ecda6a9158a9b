"""What preference methods run on."""

from __future__ import annotations

from hf_distill.testing.setups import TinyText


class TinyPreference(TinyText):
    """Prompts of two words, each with a good and a bad answer of one to six."""

    wide = 0  # TRL's tiles have 4096 rows, more than a tiny run: not checked

    def dataset(self, rows: int):
        import random

        from datasets import Dataset

        draw = random.Random(0)
        word = lambda: f"w{draw.randrange(61)}"  # noqa: E731
        made = []
        for i in range(rows):
            chosen, rejected = (" " + " ".join(word() for _ in range(draw.randrange(1, 6))) for _ in range(2))
            made.append({"prompt": f"{word()} {word()}", "chosen": chosen, "rejected": f"{rejected} w{i % 61}"})
        return Dataset.from_list(made)

    def arguments(self, folder: str, **settings):
        from hf_distill import DistillDPOConfig

        return DistillDPOConfig(output_dir=folder, disable_dropout=False, loss_type="kto_pair", **settings)
