"""The tiny set-up and the trainers that LLaVA-MoD's tests share."""

from __future__ import annotations

from hf_distill.methods.llava_mod import LlavaModConfig, build_trainer
from hf_distill.testing.vlm import TinyVLM
from tests.helpers import sft_arguments

SETUP = TinyVLM()


def trainer(folder, stage="sparse", config=None, student=None, teacher=None, data=None, rows=8, **settings):
    """The trainer of one stage; a dense student unless another is given."""
    more = {key: settings.pop(key) for key in ("callbacks", "data_collator", "peft_config") if key in settings}
    return build_trainer(
        student or SETUP.dense(),
        teacher or SETUP.teacher(),
        data or (SETUP.pairs(rows) if stage == "preference" else SETUP.dataset(rows)),
        config or LlavaModConfig(router_std=0.5),
        sft_arguments(folder, **dict(max_length=None, max_steps=2, gradient_checkpointing=False) | settings),
        stage=stage,
        processing_class=SETUP.processing_class(),
        **more,
    )


def named(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "distill" not in name}
