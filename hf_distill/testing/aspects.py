"""Tiny set-ups of image methods whose data or settings are their own."""

from __future__ import annotations

from hf_distill.testing.setups import TinyImage


class TinyAspects(TinyImage):
    """Pictures with answers to four questions, one of which tells nothing."""

    def dataset(self, rows: int):
        import torch

        draw = torch.Generator().manual_seed(1)
        answers = torch.rand(rows, 4, generator=draw)
        answers[:, 2] = 0.9
        return super().dataset(rows).with_format(None).add_column("aspect_probs", answers.tolist()).with_format("torch")


class TinyHard(TinyImage):
    """The augmenter learns from the second step on."""

    def config(self, config_class: type):
        return config_class(hard_start_step=1, hard_grid_steps=0)
