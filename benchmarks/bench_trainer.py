"""What a trainer costs over a loop written by hand, on the same tokens: Trainer, SFTTrainer, GKDTrainer and ours.

    python -m benchmarks.bench_trainer        # CPU, about four minutes

Toy models on purpose: a step is short, so that what is not the models' own work shows. Milliseconds per step are the
slope between two steps of a run, so that start-up is out; it is given apart.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.harness import Absent, Report, Variant, interleave, keep_memory, parser
from benchmarks.toy import PLAIN, Stamps, quiet, stamped, student, teacher, token_ids, tokenizer
from hf_distill import (
    DistillConfig,
    DistillSFTConfig,
    DistillSFTTrainer,
    DistillTrainer,
    FrozenTeacher,
    HeadLogits,
    LogitKD,
)
from hf_distill.losses import ForwardKL, run_terms

CLOCK = "process CPU time per step, one thread"
BATCH, LENGTH = 8, 128
BARE, BARE_OURS = "bare KD loop", "bare KD loop, our loss"
GKD, GKD_CHAT = "TRL GKDTrainer", "TRL GKDTrainer, from messages"
BASES = {"cross-entropy": ["bare loop"], "distillation": [BARE, BARE_OURS, GKD]}


# ---- by hand --------------------------------------------------------------------------------------------------------
def bare_loop(loss_of: Callable, ids: torch.Tensor, stamps: Stamps) -> None:
    """What Trainer does by default and no more: shuffled batches, fused AdamW, clipping, a linear schedule."""
    model, steps = student().train(), stamps.last
    optimizer = torch.optim.AdamW(model.parameters(), lr=PLAIN["learning_rate"], weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loader = DataLoader(TensorDataset(ids), batch_size=BATCH, shuffle=True)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for step, (batch,) in enumerate(itertools.islice(epochs, steps), start=1):
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        stamps.stamp(step)


def cross_entropy(model, batch):
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def dense_kd(model, batch, taught_by):
    """Forward KL of full logits, as users write it."""
    with torch.no_grad():
        target = taught_by(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1).softmax(-1)
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def our_kd(model, batch, taught_by):
    """The same through the loss core."""

    def rows(m):
        hidden = m.model(input_ids=batch, use_cache=False).last_hidden_state
        return HeadLogits(hidden[:, :-1].flatten(0, 1), m.lm_head.weight)

    with torch.no_grad():
        target = rows(taught_by)
    return run_terms(rows(model), target, {"kd": (ForwardKL(), 1.0)})["kd"]


def bare_kd(loss_of: Callable, ids: torch.Tensor, stamps: Stamps) -> None:
    taught_by = teacher()
    bare_loop(lambda model, batch: loss_of(model, batch, taught_by), ids, stamps)


# ---- trainers -------------------------------------------------------------------------------------------------------
def settings(folder: str, steps: int) -> dict:
    return PLAIN | dict(output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH)


def hf_trainer(folder: str, steps: int, data: dict) -> Trainer:
    return Trainer(student(), TrainingArguments(**settings(folder, steps)), train_dataset=data["labelled"])


def sft_trainer(folder: str, steps: int, data: dict) -> SFTTrainer:
    args = SFTConfig(**settings(folder, steps), max_length=LENGTH)
    return SFTTrainer(student(), args=args, train_dataset=data["tokens"], processing_class=tokenizer())


def gkd_trainer(folder: str, steps: int, data: dict, dataset: str = "gkd") -> Trainer:
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise Absent(f"this trl has no GKDTrainer ({error})") from error
    args = GKDConfig(**settings(folder, steps), lmbda=0.0, beta=0.0, max_length=LENGTH)
    return GKDTrainer(student(), teacher(), args, train_dataset=data[dataset], processing_class=tokenizer())


def distill_trainer(folder: str, steps: int, data: dict) -> DistillTrainer:
    args = DistillConfig(**settings(folder, steps))
    return DistillTrainer(
        student(), teacher=FrozenTeacher(teacher()), objective=LogitKD(), args=args, train_dataset=data["labelled"]
    )


def distill_sft_trainer(folder: str, steps: int, data: dict) -> DistillSFTTrainer:
    args = DistillSFTConfig(**settings(folder, steps), max_length=LENGTH)
    return DistillSFTTrainer(
        student(),
        teacher=FrozenTeacher(teacher()),
        objective=LogitKD(),
        args=args,
        train_dataset=data["tokens"],
        processing_class=tokenizer(),
    )


TABLES: dict[str, dict[str, Callable]] = {
    "cross-entropy": {
        "bare loop": lambda folder, data, stamps: bare_loop(cross_entropy, data["ids"], stamps),
        "HF Trainer": hf_trainer,
        "TRL SFTTrainer": sft_trainer,
    },
    "distillation": {
        BARE: lambda folder, data, stamps: bare_kd(dense_kd, data["ids"], stamps),
        BARE_OURS: lambda folder, data, stamps: bare_kd(our_kd, data["ids"], stamps),
        GKD: gkd_trainer,
        GKD_CHAT: lambda folder, steps, data: gkd_trainer(folder, steps, data, "messages"),
        "DistillTrainer": distill_trainer,
        "DistillSFTTrainer": distill_sft_trainer,
    },
}


def make_data(samples: int) -> dict:
    """The same tokens in the form each trainer reads. The first token is the prompt GKDTrainer asks for."""
    ids = token_ids([LENGTH] * samples)
    mask = [0] + [1] * (LENGTH - 1)
    words = [[f"w{i}" for i in row] for row in ids]
    chats = [
        [{"role": "user", "content": row[0]}, {"role": "assistant", "content": " ".join(row[1:])}] for row in words
    ]
    return {
        "ids": torch.tensor(ids),
        "tokens": Dataset.from_dict({"input_ids": ids}),
        "labelled": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "gkd": Dataset.from_dict(
            {"input_ids": ids, "completion_mask": [mask] * samples, "prompt": [row[0] for row in words]}
        ),
        "messages": Dataset.from_dict({"messages": chats}),
    }


# ---- measuring ------------------------------------------------------------------------------------------------------
def variant(name: str, make: Callable, first: int, last: int, data: dict, start_ups: dict) -> Variant:
    def run() -> float:
        stamps = Stamps(first, last)
        with tempfile.TemporaryDirectory() as folder:
            if name.startswith("bare"):
                make(folder, data, stamps)
            else:
                stamped(lambda: make(folder, last, data), stamps)
        start_ups.setdefault(name, []).append(stamps.start_up)
        return stamps.seconds_per_step

    return Variant(name, run, required=not name.startswith("TRL"))


def measure(report: Report, *, rounds: int, first: int = 10, last: int = 40) -> None:
    """All variants of both tables, in turns."""
    data, start_ups = make_data(BATCH * 10), {}
    todo = {name: make for table in TABLES.values() for name, make in table.items()}
    rows = interleave(
        [variant(name, make, first, last, data, start_ups) for name, make in todo.items()], rounds=rounds, warm_up=False
    )
    for table, names in TABLES.items():
        own = {name: rows[name] for name in names}
        for name, row in own.items():
            if "absent" not in row:
                row["start_up_seconds"] = statistics.median(start_ups[name])
        report.add({"table": table, "batch": BATCH, "length": LENGTH, "steps": [first, last]}, own, BASES[table])


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, nargs=2, default=(10, 40), help="the steps of the slope")
    options = options.parse_args(argv)
    torch.set_num_threads(1)
    quiet()
    first, last = options.steps
    config = {"rounds": options.rounds, "keeps_memory": keep_memory()}
    report = Report("trainer", CLOCK, config)
    measure(report, rounds=options.rounds, first=first, last=last)
    report.write(options.results)


if __name__ == "__main__":
    main()
