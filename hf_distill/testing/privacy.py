"""What privacy methods run on."""

from __future__ import annotations

from hf_distill.testing.setups import TinyText


class TinySwing(TinyText):
    """Every word has a score of its own (its end has 0), and the noise is large enough to be seen."""

    def dataset(self, rows: int):
        import random

        draw, texts = random.Random(1), super().dataset(rows)
        scores = [[*(draw.random() for _ in text.split()), 0.0] for text in texts["text"]]
        return texts.add_column("privacy_score", scores)

    def config(self, config_class: type):
        return config_class(swing_scorer="given", swing_sigma=0.02)
