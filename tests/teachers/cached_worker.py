"""One of two ranks that write a cache together and train from it; started by torchrun, read by the test.

torchrun --nproc_per_node 2 tests/teachers/cached_worker.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_distill import DistillSFTTrainer, FrozenTeacher, LogitKD, cache_teacher
from tests.helpers import SGD, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

MODES = {"hidden": {}, "topk": {"k": 64}}


def live_teacher() -> FrozenTeacher:
    return FrozenTeacher(tiny_llama(32, seed=1), tiny_tokenizer(), name="tiny")


def make_trainer(folder: Path, teacher, per_device: int) -> DistillSFTTrainer:
    """23 rows on batches of 6: the last one is ragged."""
    settings = SGD | dict(num_train_epochs=2, per_device_train_batch_size=per_device, per_device_eval_batch_size=2)
    return DistillSFTTrainer(
        tiny_llama(),
        teacher=teacher,
        objective=LogitKD(label_weight=0.5),
        args=sft_arguments(folder / "run", **settings),
        train_dataset=text_dataset(23),
        eval_dataset=text_dataset(7, seed=7),
        processing_class=tiny_tokenizer(),
    )


def cache(folder: Path, teacher, per_device: int) -> dict:
    trainer = make_trainer(folder, teacher, per_device)
    options = dict(shard_examples=4, batch_size=2)
    return {
        mode: cache_teacher(teacher, trainer, folder / mode, mode=mode, **options, **own) for mode, own in MODES.items()
    }


def run(folder: Path, teacher, per_device: int) -> tuple[dict[str, torch.Tensor], dict]:
    trainer = make_trainer(folder, teacher, per_device)
    trainer.train()
    facts = {
        "wrapper": type(trainer.model_wrapped).__name__,
        "ranks": trainer.accelerator.num_processes,
        "eval_loss": trainer.evaluate()["eval_loss"],
    }
    return {k: v.clone() for k, v in trainer.student().state_dict().items()}, facts


def main(folder: Path) -> None:
    found = {}
    for mode, cached in cache(folder, live_teacher(), per_device=3).items():
        weights, found[mode] = run(folder, cached, per_device=3)
        if torch.distributed.get_rank() == 0:
            save_file(weights, folder / f"{mode}.safetensors")
    if torch.distributed.get_rank() == 0:
        (folder / "facts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
