"""Runs that are killed and restarted, each in a process of its own, forked before anything has trained.

resume_worker.py FOLDER      one process, or one rank of those that torchrun has started
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from hf_distill import DistillSFTTrainer, FeatureKD, FrozenTeacher, LogitKD, TeacherAgreementCallback
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.launching import in_a_process

STEPS = 11


class Paced(LogitKD):
    """An objective whose weight follows the loss it has seen: one lost or repeated step changes all that come after."""

    def __init__(self):
        super().__init__(label_weight=0.3)
        self.state = {"pace": torch.tensor(0.5, dtype=torch.float64)}

    def weights(self, progress):
        return super().weights(progress) | {"kd": self.state["pace"].float()}

    def after_step(self, terms, progress):
        self.state["pace"] = 0.7 * self.state["pace"] + 0.3 * terms["kd"].double() * (1 + progress)


class Kill(TrainerCallback):
    """No clean-up of any kind: as a machine that loses its power."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, name: str, *, kill: int | None = None, resume: bool = False, lora: bool, **settings) -> None:
    tokenizer = tiny_tokenizer()
    callbacks = [TeacherAgreementCallback()] + ([Kill(kill)] if kill else [])
    args = sft_arguments(
        folder / name,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=3,
        logging_steps=2,
        learning_rate=1e-2,
        objective_learning_rate=5e-3,
        **settings,
    )
    trainer = DistillSFTTrainer(
        tiny_llama(16, attention_dropout=0.1),
        teacher=FrozenTeacher(tiny_llama(32, 3, seed=1), tokenizer),
        objective=Paced() + 0.3 * FeatureKD(),
        args=args,
        train_dataset=text_dataset(
            23 * int(os.environ.get("WORLD_SIZE", 1))
        ),  # six steps an epoch, the last one ragged
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.accelerator.is_main_process:
        facts = {
            "ranks": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
            "logs": [log for log in trainer.state.log_history if "loss" in log],
        }
        (folder / f"{name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    root, ends = Path(sys.argv[1]), {}
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    # checkpoints at 3, 6, 9: a kill in mid-epoch and between two logs; one after a checkpoint at an epoch's end
    kills = {"lora": (5, 8), "full": (4,)} if ranks == 1 else {"full": (5,)}
    for kind, steps in kills.items():
        options = {"lora": True} if kind == "lora" else {"lora": False, "bf16": ranks == 1}
        ends[kind] = in_a_process(train, folder=root, name=kind, **options)
        for step in steps:
            name = f"{kind}-{step}"
            ends[f"{name} killed"] = in_a_process(train, folder=root, name=name, kill=step, **options)
            ends[f"{name} resumed"] = in_a_process(train, folder=root, name=name, resume=True, **options)
    (root / f"ends-{rank}.json").write_text(json.dumps(ends))
