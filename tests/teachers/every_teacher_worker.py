"""Every teacher with every trainer: two steps on eight examples, or a refusal; run by test_every_teacher.py.

torchrun --nproc_per_node 2 tests/teachers/every_teacher_worker.py OUTPUT
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    ViTConfig,
    ViTForImageClassification,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill import (
    AdapterOffTeacher,
    DataCollatorForDistillation,
    DistillDPOTrainer,
    DistillSFTTrainer,
    DistillTrainer,
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    GatedKD,
    LocalTextTeacher,
    LogitKD,
    MutualKD,
    PeerTeacher,
    PrivilegedTeacher,
    RemoteTeacher,
    RoutedTeacher,
    TeacherInputs,
    cache_teacher,
)
from tests.helpers import SGD, dpo_arguments, plain_arguments, sft_arguments, tiny_llama, tiny_tokenizer
from tests.teachers.local_endpoint import MODEL, local_endpoint

ROWS = 8
SIZES = dict(num_hidden_layers=2, num_attention_heads=2, num_labels=3, initializer_range=0.2)


# ---- tasks -----------------------------------------------------------------------------------------------------------
def bert(width: int, seed: int):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, hidden_size=width, intermediate_size=2 * width, max_position_embeddings=32)
    return BertForSequenceClassification(
        BertConfig(**SIZES, **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def vit(width: int, seed: int):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=width, intermediate_size=2 * width, image_size=8, patch_size=4)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return ViTForImageClassification(ViTConfig(**SIZES, **sizes, **dropout))


def llama(width: int, seed: int):
    return tiny_llama(width, 2, seed=seed)


def words(i: int, salt: int) -> list[int]:
    return [3 + (7 * i + 5 * j + salt) % 60 for j in range(3 + (i + salt) % 4)]


def sentences(i: int) -> dict:
    return {"input_ids": words(i, 0), "labels": i % 3, "teacher_input_ids": words(i, 9), "teacher": i % 2}


def pictures(i: int) -> dict:
    draw = torch.Generator().manual_seed(i)
    shown = {name: torch.randn(3, 8, 8, generator=draw).tolist() for name in ("pixel_values", "teacher_pixel_values")}
    return shown | {"labels": i % 3, "teacher": i % 2}


def texts(i: int) -> dict:
    answer = words(i, 2)
    hint = words(i, 5)
    return {
        "input_ids": [5, 6, *answer],
        "labels": [-100, -100, *answer],
        "teacher_input_ids": [*hint, 5, 6, *answer],
        "teacher_labels": [-100] * (len(hint) + 2) + answer,
        "teacher": i % 2,
    }


def pairs(i: int) -> dict:
    prompt, *answers = (" ".join(f"w{token - 3}" for token in words(i, salt)) for salt in (0, 2, 7))
    return {"prompt": prompt, "chosen": " " + answers[0], "rejected": " " + answers[1]}


def stack(features: list[dict]) -> dict:
    return {key: torch.tensor([f[key] for f in features]) for key in ("pixel_values", "labels") if key in features[0]}


@dataclass(frozen=True)
class Task:
    """What one trainer is run on.

    Attributes:
        model: (width, seed) -> a tiny model.
        rows: example number -> example.
        collator: pads or stacks; None leaves it to the trainer.
        reads: what a privileged teacher reads.
        lora: which modules of an adapter-off student have adapters.
    """

    model: Callable
    rows: Callable
    collator: Callable[[], Callable] | None
    reads: str
    lora: tuple[str, ...]


TASKS = {
    "bert": Task(bert, sentences, lambda: DataCollatorWithPadding(tiny_tokenizer()), "input_ids", ("query",)),
    "vit": Task(vit, pictures, lambda: stack, "pixel_values", ("query", "q_proj")),
    "sft": Task(llama, texts, lambda: DataCollatorForLanguageModeling(pad_token_id=0), "input_ids", ("q_proj",)),
    "dpo": Task(llama, pairs, None, "input_ids", ("q_proj",)),
}


# ---- teachers --------------------------------------------------------------------------------------------------------
class Cell:
    """One teacher under one trainer."""

    def __init__(self, teacher: str, task: str, folder: Path):
        self.name, self.task_name, self.task, self.folder = teacher, task, TASKS[task], folder
        self.opened = contextlib.ExitStack()

    def frozen(self, seed: int = 2) -> FrozenTeacher:
        tokenizer = None if self.task_name == "vit" else tiny_tokenizer()
        return FrozenTeacher(self.task.model(32, seed), tokenizer, name=f"frozen {seed}")

    def quantised(self, bits: int) -> FrozenTeacher:
        if int(os.environ.get("RANK", 0)) == 0:
            self.task.model(64, 2).save_pretrained(self.folder / "teacher")  # 4 bit on a CPU needs blocks of 64
            tiny_tokenizer().save_pretrained(self.folder / "teacher")
        PartialState().wait_for_everyone()
        return FrozenTeacher.from_pretrained(str(self.folder / "teacher"), **{f"load_in_{bits}bit": True})

    def cached(self, mode: str):
        teacher = self.frozen()
        options = dict(k=3, draws=8, shard_examples=3, batch_size=2)
        return cache_teacher(teacher, self.trainer(teacher), self.folder / "cache", mode=mode, **options)

    def several(self) -> dict[str, FrozenTeacher]:
        return {"a": self.frozen(2), "b": self.frozen(3)}

    def remote(self) -> RemoteTeacher:
        server = self.opened.enter_context(local_endpoint(llama(32, 2), tiny_tokenizer()))
        return RemoteTeacher(server.url, MODEL, k=64, store=self.folder / "answers")  # all that there are

    TEACHERS = {
        "frozen": lambda cell: cell.frozen(),
        "8bit": lambda cell: cell.quantised(8),
        "4bit": lambda cell: cell.quantised(4),
        "adapter_off": lambda cell: AdapterOffTeacher(),
        "cached_hidden": lambda cell: cell.cached("hidden"),
        "cached_topk": lambda cell: cell.cached("topk"),
        "cached_sampled": lambda cell: cell.cached("sampled"),
        "cached_scores": lambda cell: cell.cached("scores"),
        "cached_logits": lambda cell: cell.cached("logits"),
        "privileged": lambda cell: PrivilegedTeacher(cell.frozen(), (cell.task.reads,)),
        "ema": lambda cell: EMATeacher(0.5),
        "peer": lambda cell: PeerTeacher(cell.task.model(32, 2)),
        "ensemble": lambda cell: EnsembleTeacher(cell.several(), [0.3, 0.7]),
        "routed": lambda cell: RoutedTeacher(cell.several()),
        "gated": lambda cell: EnsembleTeacher(cell.several()),
        "remote": lambda cell: cell.remote(),
        "text": lambda cell: LocalTextTeacher(llama(32, 2), tiny_tokenizer()),
    }

    # ---- the run -----------------------------------------------------------------------------------------------------
    def trainer(self, teacher):
        settings = SGD | dict(max_steps=2, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)))
        student = self.task.model(16, 1)
        shared = dict(teacher=teacher, train_dataset=Dataset.from_list([self.row(i) for i in range(ROWS)]))
        if self.name == "adapter_off":
            saved = [n for n, _ in student.named_children() if n == "classifier"]
            shared["peft_config"] = LoraConfig(r=2, target_modules=list(self.task.lora), modules_to_save=saved or None)
        if self.task_name == "dpo":
            args = dpo_arguments(self.folder / "run", **settings)
            return DistillDPOTrainer(student, args=args, processing_class=tiny_tokenizer(), **shared)
        shared |= dict(objective=self.objective(), data_collator=self.collator())
        if self.task_name == "sft":
            args = sft_arguments(self.folder / "run", **settings)
            return DistillSFTTrainer(student, args=args, processing_class=tiny_tokenizer(), **shared)
        own = {} if self.task_name == "vit" else dict(processing_class=tiny_tokenizer())
        return DistillTrainer(student, args=plain_arguments(self.folder / "run", **settings), **own, **shared)

    def objective(self):
        kinds = {"peer": MutualKD, "gated": GatedKD}
        return kinds.get(self.name, LogitKD)(label_weight=0.5)

    def row(self, i: int) -> dict:
        """Without the columns that only another teacher reads."""
        read = {"privileged": self.task.rows(i).keys(), "routed": {"teacher"}}.get(self.name, set())
        return {k: v for k, v in self.task.rows(i).items() if not k.startswith("teacher") or k in read}

    def collator(self):
        base = self.task.collator()
        if self.name == "privileged" and self.task_name != "sft":
            return TeacherInputs(base, base)
        if self.name == "routed":
            own = {} if self.task_name == "sft" else dict(labels_of="samples")
            return DataCollatorForDistillation(base, example_columns=("teacher",), **own)
        return base

    def run(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """(facts, the student's weights): the losses of two steps, or what was refused."""
        trainer = None
        try:
            trainer = self.trainer(self.TEACHERS[self.name](self))
            before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
            trainer.train()
        except (ValueError, TypeError) as error:
            return {"refused": f"{type(error).__name__}: {error}", "built": trainer is not None}, {}
        finally:
            self.opened.close()
        student = {k: v.clone() for k, v in trainer.student().state_dict().items()}
        facts = {
            "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
            "moved": max((v - before[k]).abs().max().item() for k, v in student.items()),
            "steps": trainer.state.global_step,
            "ranks": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
        }
        return facts, student


def run_all(folder: Path) -> tuple[dict, dict]:
    """Facts and students' weights of every cell, by "teacher-task", one after another in this process."""
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()  # every Trainer collects garbage, which takes longer than a cell while all imports are looked through
    facts, weights = {}, {}
    for teacher in Cell.TEACHERS:
        for task in TASKS:
            name = f"{teacher}-{task}"
            (folder / name).mkdir(exist_ok=True)
            try:
                facts[name], weights[name] = Cell(teacher, task, folder / name).run()
            except Exception:
                facts[name], weights[name] = {"error": traceback.format_exc(limit=-6)}, {}
    gc.unfreeze()
    return facts, weights


def main(output: Path) -> None:
    rank = int(os.environ["RANK"])
    facts, weights = run_all(output)
    (output / f"facts-{rank}.json").write_text(json.dumps(facts))
    if rank == 0:
        flat = {f"{cell}/{name}": value.contiguous() for cell, own in weights.items() for name, value in own.items()}
        save_file(flat, output / "weights.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
