"""Does the gradient depend on how the same rows are split? TRL's GKD trainer beside DistillSFTTrainer.

    python -m benchmarks.trl_gkd_scaling            # from the repository's root; CPU, about a minute

Each trainer takes one optimizer step over the same eight (or seven) conversations with the same models and the same
divergence (generalized JSD, beta 0.5), split in several ways. The reference of each trainer is its own run on one
process with all rows in one batch. Printed: the factor by which the whole gradient grew or shrank, its relative error
after that factor is taken out, and the evaluation loss at that batch size.

With trl 1.16 the figures show known errors of GKDTrainer: with n processes its gradient is n times too small (its loss
is divided by the count of all ranks, and DDP then averages), rows repeated to even out the ranks count twice, and its
evaluation loss depends on the batch size. A run of DistillSFTTrainer differs from its reference by rounding alone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
# rows, processes, rows per device, accumulation steps; the first of each number of rows is the reference
SPLITS = [
    (8, 1, 8, 1),
    (8, 1, 4, 2),
    (8, 1, 1, 8),
    (8, 2, 4, 1),
    (8, 2, 1, 4),
    (7, 1, 7, 1),
    (7, 1, 2, 4),
    (7, 2, 4, 1),
]
TRAINERS = ("GKDTrainer", "DistillSFTTrainer")


def trainer_of(name: str, rows: int, per_device: int, accumulation: int):
    from datasets import Dataset

    from tests.helpers import SGD, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompts = [{"role": "user", "content": "w1 w2"}]
    answers = [[{"role": "assistant", "content": text}] for text in text_dataset(rows, seed=4)["text"]]
    settings = SGD | dict(
        max_steps=1,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_length=32,
    )
    student, teacher = tiny_llama(16, 2, seed=1), tiny_llama(32, 3, seed=2)
    folder = tempfile.mkdtemp()
    if name == "DistillSFTTrainer":
        from hf_distill import DistillSFTTrainer, FrozenTeacher, LogitKD

        data = Dataset.from_list([{"prompt": prompts, "completion": answer} for answer in answers])
        return DistillSFTTrainer(
            student,
            teacher=FrozenTeacher(teacher),
            objective=LogitKD("generalized_jsd", options={"beta": 0.5}),
            args=sft_arguments(folder, **settings),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
        )
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    data = Dataset.from_list([{"messages": prompts + answer} for answer in answers])
    args = GKDConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        lmbda=0.0,
        beta=0.5,
        **settings,
    )
    return GKDTrainer(student, teacher, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def worker(output: str) -> None:
    """All splits of this number of processes; rank 0 writes {"trainer rows size steps": [gradient, eval loss]}."""
    from transformers import TrainerCallback

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.flat = [x for p in model.parameters() if p.grad is not None for x in p.grad.flatten().tolist()]

    processes, found = int(os.environ.get("WORLD_SIZE", "1")), {}
    for name in TRAINERS:
        for rows, ranks, per_device, accumulation in SPLITS:
            if ranks != processes:
                continue
            trainer, gradient = trainer_of(name, rows, per_device, accumulation), Gradient()
            assert trainer.accelerator.num_processes == processes
            trainer.add_callback(gradient)
            loss = trainer.evaluate()["eval_loss"]
            trainer.train()
            found[f"{name} {rows} {per_device} {accumulation}"] = (gradient.flat, loss)
    if os.environ.get("RANK", "0") == "0":
        with open(output, "w") as file:
            json.dump(found, file)


def run(processes: int) -> dict:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    output = os.path.join(tempfile.mkdtemp(), "found.json")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)]
    command += [os.path.abspath(__file__), output]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    with open(output) as file:
        return json.load(file)


def main() -> None:
    import torch

    found = {ranks: run(ranks) for ranks in (1, 2)}
    print(
        f"{'trainer':18} {'rows':>4} {'processes × batch × steps':>26} {'gradient ×':>11} {'rest':>9} {'eval_loss':>10}"
    )
    for name in TRAINERS:
        reference = {}
        for rows, ranks, per_device, accumulation in SPLITS:
            flat, loss = found[ranks][f"{name} {rows} {per_device} {accumulation}"]
            gradient = torch.tensor(flat, dtype=torch.float64)
            whole = reference.setdefault(rows, gradient)
            factor = (gradient @ whole / (whole @ whole)).item()
            rest = ((gradient / factor - whole).norm() / whole.norm()).item()
            split = f"{ranks} × {per_device} × {accumulation}"
            print(f"{name:18} {rows:4} {split:>26} {factor:11.6f} {rest:9.1e} {loss:10.6f}")


if __name__ == "__main__":
    worker(sys.argv[1]) if len(sys.argv) > 1 else main()
