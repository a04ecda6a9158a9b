"""Small runs in which the student, or its teacher, writes what is learnt from; and the same losses in a slow loop."""

from __future__ import annotations

import random

import torch
from datasets import Dataset
from torch import Tensor

from hf_distill import DistillSFTTrainer, FrozenTeacher, LogitKD
from hf_distill.training.callbacks import DistillCallback
from tests.helpers import SGD, sft_arguments, tiny_llama, tiny_tokenizer


def questions(rows: int, seed: int = 4) -> Dataset:
    """Prompts of 1 to 5 words and completions of 2 to 9."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(61)}" for _ in range(draw.randrange(low, high + 1)))

    return Dataset.from_list([{"prompt": words(1, 5), "completion": " " + words(2, 9)} for _ in range(rows)])


class Seen(DistillCallback):
    """What of each micro-batch the student met: per row its tokens and labels, and the texts that were announced."""

    def __init__(self):
        self.batches: list[dict] = []
        self.losses: list[float] = []
        self.logs: list[dict] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.texts: list[tuple[list[str], list[str]]] = []

    def on_distill_loss(self, args, state, control, *, student, **kwargs):
        keys = ("input_ids", "attention_mask", "loss_rows", "row_labels")
        self.batches.append({k: student.batch[k].tolist() for k in keys} | {"step": state.global_step})

    def on_generate(self, args, state, control, *, prompts, completions, **kwargs):
        self.texts.append((prompts, completions))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.logs.append(dict(logs))


def trainer_of(folder, *, rows: int = 8, same: bool = False, peft_config=None, callbacks=(), **settings):
    """Plain SGD, so that a gradient of a wrong size shows. `same`: every row is the first one."""
    defaults = SGD | dict(max_steps=2, max_length=32, max_completion_length=6, per_device_train_batch_size=4)
    tokenizer = tiny_tokenizer()
    student = tiny_llama(16, 2, seed=1, attention_dropout=settings.pop("dropout", 0.0))
    data = questions(rows)
    trainer = DistillSFTTrainer(
        student,
        teacher=FrozenTeacher(tiny_llama(32, 3, seed=2), tokenizer),
        objective=settings.pop("objective", None) or LogitKD("reverse_kl"),
        args=sft_arguments(folder, **defaults | settings),
        train_dataset=data.select([0] * rows) if same else data,
        eval_dataset=questions(5, seed=9),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    return trainer


def loop_loss(batches: list[dict], student, teacher) -> tuple[Tensor, int]:
    """Mean reverse KL over every loss row of these micro-batches, row by row without padding, in float64; their count.

    Graph-connected to the student, which must be float64.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        width = len(batch["input_ids"][0])
        for index, label in zip(batch["loss_rows"], batch["row_labels"], strict=True):
            row, position = divmod(index, width)
            ids = batch["input_ids"][row]
            assert ids[position + 1] == label and batch["attention_mask"][row][position + 1] == 1
            seen = torch.tensor([ids[: position + 1]])
            q = student(seen).logits[0, -1].log_softmax(-1)
            with torch.no_grad():
                p = teacher(seen).logits[0, -1].log_softmax(-1)
            total, count = total + (q.exp() * (q - p)).sum(), count + 1
    return total / count, count
