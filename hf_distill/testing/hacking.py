"""What teacher hacking is checked on: prompts, to which the teacher writes new answers in every epoch."""

from __future__ import annotations

from typing import Any

from hf_distill.testing.setups import TinyText


class TinyAnswers(TinyText):
    """Prompts of two words with completions of one to eight."""

    def teacher(self, **changes):
        # a mean of means moves weights less: far enough, all the same, for rounding of a weight near 1 not to show
        return super().teacher(**{"initializer_range": 0.4} | changes)

    def dataset(self, rows: int):
        def asked(row: dict) -> dict:
            words = row["text"].split()
            return {"prompt": " ".join(words[:2]), "completion": " " + " ".join(words[2:])}

        return super().dataset(rows).map(asked, remove_columns=["text"])

    def config(self, config_class: type) -> Any:
        return config_class(data_source="online_teacher", answer_tokens=8)
