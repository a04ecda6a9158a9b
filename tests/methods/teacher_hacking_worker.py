"""Runs that watch for hacking on several ranks, one of them killed and restarted, each in a process of its own.

teacher_hacking_worker.py FOLDER      one rank of those that torchrun has started
"""

import json
import os
import signal
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from datasets import Dataset
from transformers import TrainerCallback

from hf_distill import FrozenTeacher
from hf_distill.methods.teacher_hacking import TeacherHackingConfig, build_trainer
from hf_distill.training.hacking import TeacherHackingCallback
from tests.helpers import sft_arguments, tiny_llama, tiny_tokenizer
from tests.launching import in_a_process

STEPS = 7


class Kill(TrainerCallback):
    """No clean-up of any kind: as a machine that loses its power."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5 and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGKILL)


def prompts(n: int, first: int) -> Dataset:
    texts = [f"w{(7 * i + first) % 61} w{(11 * i + 3) % 61}" for i in range(n)]
    return Dataset.from_dict({"prompt": texts, "completion": [" w1 w2"] * n})


def train(folder: Path, name: str, batch: int, *, kill: bool = False, resume: bool = False) -> dict:
    """Three steps an epoch, new answers of the teacher in each; evaluations at 1, 2, ... and checkpoints at 4 and 7."""
    tokenizer = tiny_tokenizer()
    oracle = folder / f"oracle-{os.environ.get('RANK', 0)}"
    tiny_llama(24, 1, seed=7).save_pretrained(oracle)
    tokenizer.save_pretrained(oracle)
    config = TeacherHackingConfig(
        data_source="online_teacher", answer_tokens=5, oracle_model_name_or_path=str(oracle), eval_answers=True,
        eval_sequences=5, skip_steps=0, tolerance=0.0, min_rel_increase=0.0,
    )  # fmt: skip
    args = sft_arguments(
        folder / name, max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=1e-2, save_strategy="steps",
        save_steps=4, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer = build_trainer(
        tiny_llama(16, 1),
        FrozenTeacher(tiny_llama(24, 1, seed=1), tokenizer),
        prompts(12, 0),
        config,
        args,
        eval_dataset=prompts(6, 5),
        processing_class=tokenizer,
        callbacks=[Kill()] if kill else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TeacherHackingCallback))
    logs = [{k: v for k, v in e.items() if k.startswith("hacking/")} for e in trainer.state.log_history]
    facts = {"ranks": trainer.accelerator.num_processes, "history": watch.history, "summary": watch.summary()}
    facts |= {"logs": [e for e in logs if e], "flag": watch.flag_step, "round": trainer.train_dataset.round}
    (folder / f"{name}-{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))
    return facts


if __name__ == "__main__":
    root = Path(sys.argv[1])
    in_a_process(train, batch=2, folder=root, name="whole")
    in_a_process(train, batch=2, folder=root, name="killed", kill=True)
    in_a_process(train, batch=2, folder=root, name="killed", resume=True)
