"""DDK runs that are killed inside a round and restarted, each in a process of its own.

ddk_worker.py FOLDER      one process, or one rank of those that torchrun has started
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from peft import LoraConfig
from transformers import TrainerCallback

from hf_distill import FrozenTeacher
from hf_distill.methods import ddk
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.launching import in_a_process

STEPS = 9


class Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGKILL)


class Draws(TrainerCallback):
    """Each round's rows as this rank would draw them, once it is training."""

    def __init__(self, path: Path):
        self.path, self.trainer = path, None

    def on_epoch_begin(self, args, state, control, **kwargs):
        sampler = self.trainer.sampler
        line = {"round": int(sampler.state["interval"]), "rows": list(sampler), "r": sampler.state["weights"].tolist()}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def train(
    folder: Path, name: str, *, kill: int | None = None, resume: bool = False, interval: int, lora: bool = False, **more
) -> None:
    tokenizer = tiny_tokenizer()
    draws = Draws(folder / f"{name}-{os.environ.get('RANK', '0')}.jsonl")
    rows = text_dataset(30).add_column("domain", [("a", "b", "c")[i * i % 5 % 3] for i in range(30)])
    trainer = ddk.build_trainer(
        tiny_llama(16, attention_dropout=0.1),
        FrozenTeacher(tiny_llama(32, 3, seed=1), tokenizer),
        rows,
        ddk.DDKConfig(ddk_interval=interval, ddk_eval_samples=3),
        sft_arguments(
            folder / name,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=3,
            logging_steps=2,
            learning_rate=1e-2,
            **more,
        ),
        processing_class=tokenizer,
        callbacks=[draws, *([Kill(kill)] if kill else [])],
        peft_config=LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None,
    )
    draws.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    if trainer.accelerator.is_main_process:
        logs = [log for log in trainer.state.log_history if "loss" in log]
        facts = {"ranks": trainer.accelerator.num_processes, "wrapper": type(trainer.model_wrapped).__name__}
        (folder / f"{name}.json").write_text(json.dumps(facts | {"logs": logs}))


if __name__ == "__main__":
    root, ends = Path(sys.argv[1]), {}
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    # checkpoints at 3, 6, 9: inside a round of 4, or at the end of a round of 3; workers read ahead of both
    runs = {
        "inside": ({"interval": 4}, (5,)),
        "boundary": ({"interval": 3, "lora": True, "dataloader_num_workers": 2}, (8,)),
    }
    for name, (options, kills) in (runs if ranks == 1 else {"inside": runs["inside"]}).items():
        ends[name] = in_a_process(train, folder=root, name=name, **options)
        for step in kills:
            ends[f"{name} killed"] = in_a_process(train, folder=root, name=f"{name}-{step}", kill=step, **options)
            ends[f"{name} resumed"] = in_a_process(train, folder=root, name=f"{name}-{step}", resume=True, **options)
    (root / f"ends-{rank}.json").write_text(json.dumps(ends))
