"""What a teacher costs in a training step, alive and from a cache, and what is lost: time, FLOPs, bytes, fidelity.

    python -m benchmarks.bench_teacher        # CPU, under five minutes

Four tables. The step: one student on the same tokens, with labels only, a live teacher, and every mode of cache. The
ensemble: a step with 1, 2 and 4 live teachers. Keeping: writing and reading a cache at the shapes of Qwen2.5-7B. What
is said: the embedded trained teacher against what is left of it (see teacher_fidelity).

Sizes: the teacher's backbone is most of the live step, as in life (about 55 % of its matrix products here, 75 % for
Qwen2.5 7B to 0.5B at a vocabulary of 152,064), and a step stays at a few seconds on one CPU thread.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks import teacher_fidelity
from benchmarks.harness import Report, Variant, interleave, keep_memory, parser, slope
from benchmarks.report import facts_table
from benchmarks.toy import PLAIN, llama, quiet, token_ids, tokenizer
from hf_distill import (
    CachedTeacher,
    DataCollatorForDistillation,
    DistillSFTConfig,
    DistillSFTTrainer,
    EnsembleTeacher,
    FrozenTeacher,
    HeadLogits,
    LogitKD,
    NextToken,
    Signals,
    Teacher,
    cache_teacher,
)
from hf_distill.heads import rows_of

CLOCK = "process CPU time per step, one thread"
LABELS, LIVE, TOPK, WIDE = "labels only", "live", "topk 64", "topk 64, teacher twice as wide"
CACHES = {
    "hidden bfloat16": dict(mode="hidden", dtype="bfloat16"),
    "hidden int8": dict(mode="hidden", dtype="int8"),
    TOPK: dict(mode="topk", k=64),
    "sampled 12": dict(mode="sampled", draws=12),
    "sampled 50": dict(mode="sampled", draws=50),
}
STEP = dict(
    vocabulary=32768,
    student=(256, 4),
    teacher=(768, 8),
    wide=(1536, 2),
    member=(384, 4),
    batch=4,
    length=256,
    batches=3,
)
KEPT = dict(hidden=3584, vocabulary=152064, documents=4, length=256)  # Qwen2.5-7B's
FIDELITY = dict(documents=32, length=128, steps=60, draws=8)
SMALL = dict(  # to see whether it runs
    step=dict(
        vocabulary=512, student=(32, 1), teacher=(64, 1), wide=(128, 1), member=(32, 1), batch=2, length=16, batches=1
    ),
    kept=dict(hidden=32, vocabulary=512, documents=2, length=16),
    fidelity=dict(documents=2, length=32, steps=0, draws=2),
)
HALF_BYTES = {"topk 64 bfloat16": CACHES[TOPK] | dict(dtype="bfloat16")}
DEVIATION = 4.2  # of logits: an entropy of about 2 nats, as a trained model's, which decides how many draws coincide


def model_of(size: tuple[int, int], vocabulary: int, seed: int):
    """(hidden, layers) of a Llama with a random head; a feed-forward layer is four times as wide."""
    hidden, layers = size
    heads = max(hidden // 64, 1)
    widths = dict(intermediate_size=4 * hidden, num_attention_heads=heads, num_key_value_heads=heads)
    model = llama(hidden, layers, seed, vocab_size=vocabulary, **widths)
    torch.nn.init.normal_(model.lm_head.weight, std=DEVIATION * hidden**-0.5)
    return model


# ---- a step ---------------------------------------------------------------------------------------------------------
class Steps:
    """A trainer, one step at a time: data loader, cache look-up, forward, backward, clipping, AdamW."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.batches = itertools.chain.from_iterable(itertools.repeat(trainer.get_train_dataloader()))
        trainer.create_optimizer()

    def __call__(self) -> None:
        trainer = self.trainer
        (batch,), count = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        trainer.training_step(trainer.model, batch, count)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.zero_grad()

    def flops(self) -> int:
        """Of the matrix products of one step."""
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()


class Bench:
    """One student's trainers on the same tokens."""

    def __init__(self, folder: Path, sizes: dict):
        self.folder, self.sizes = folder, sizes
        self.ids = token_ids([sizes["length"]] * sizes["batch"] * sizes["batches"], vocabulary=sizes["vocabulary"])
        self.settings = PLAIN | dict(
            output_dir=str(folder / "run"),
            per_device_train_batch_size=sizes["batch"],
            train_sampling_strategy="sequential",
        )

    def frozen(self, which: str, seed: int = 2) -> FrozenTeacher:
        return FrozenTeacher(model_of(self.sizes[which], self.sizes["vocabulary"], seed))

    def trainer(self, teacher: Teacher | None) -> DistillSFTTrainer:
        return DistillSFTTrainer(
            model_of(self.sizes["student"], self.sizes["vocabulary"], seed=1),
            teacher=teacher,
            objective=NextToken() if teacher is None else LogitKD(),
            args=DistillSFTConfig(**self.settings, max_length=self.sizes["length"]),
            train_dataset=Dataset.from_dict({"input_ids": self.ids}),
            processing_class=tokenizer(),
        )

    def hf_trainer(self) -> Trainer:
        """Cross-entropy as transformers has it, of full logits."""
        data = Dataset.from_dict({"input_ids": self.ids, "labels": self.ids})
        student = model_of(self.sizes["student"], self.sizes["vocabulary"], seed=1)
        return Trainer(student, TrainingArguments(**self.settings), train_dataset=data)

    def cached(self, name: str, live: DistillSFTTrainer, options: dict) -> DistillSFTTrainer:
        cache_teacher(live.teacher, live, self.folder / name, batch_size=self.sizes["batch"], **options)
        return self.trainer(CachedTeacher(self.folder / name))


def measure_steps(report: Report, *, rounds: int, **sizes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sizes)
        live = bench.trainer(bench.frozen("teacher"))
        trainers = {LABELS: bench.trainer(None), "labels only, HF Trainer": bench.hf_trainer(), LIVE: live}
        trainers |= {name: bench.cached(name, live, options) for name, options in CACHES.items()}
        trainers[WIDE] = bench.cached(WIDE, bench.trainer(bench.frozen("wide")), CACHES[TOPK])
        rows, flops = _measured(trainers, rounds)
    for name, row in rows.items():
        row["gigaflops"] = flops[name] / 1e9
    report.add({"table": "step"} | _shown(sizes, ("student", "teacher", "wide")), rows, [LABELS, LIVE])


def measure_ensembles(report: Report, *, rounds: int, members: tuple[int, ...] = (1, 2, 4), **sizes) -> None:
    """Time and FLOPs should be a + b · M, with a the step without a teacher."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), sizes)
        teachers = [bench.frozen("member", seed=2 + m) for m in range(max(members))]
        trainers = {LABELS: bench.trainer(None)}
        trainers |= {f"{m} live": bench.trainer(EnsembleTeacher(teachers[:m])) for m in members}
        rows, flops = _measured(trainers, rounds)
    for name, row in rows.items():
        row["gigaflops"] = flops[name] / 1e9
    times = [rows[f"{m} live"]["min"] for m in members]
    each = slope(list(members), times)
    start = sum(times) / len(times) - each * sum(members) / len(members)
    error = max(abs(start + each * m - t) / t for m, t in zip(members, times, strict=True))
    fit = {"each_teacher": each, "without": start, "without_over_labels_only": start / rows[LABELS]["min"]}
    report.add({"table": "ensemble"} | _shown(sizes, ("student", "member")), rows, [LABELS], fit=fit | {"error": error})


def _measured(trainers: dict[str, Trainer], rounds: int) -> tuple[dict, dict]:
    steps = {name: Steps(trainer) for name, trainer in trainers.items()}
    flops = {name: step.flops() for name, step in steps.items()}  # warms up, too
    variants = [Variant(name, step, required=True) for name, step in steps.items()]
    return interleave(variants, rounds=rounds, warm_up=False), flops


def _shown(sizes: dict, models: tuple[str, ...]) -> dict:
    own = {name: f"H{sizes[name][0]} × {sizes[name][1]} layers" for name in models}
    return own | {name: sizes[name] for name in ("vocabulary", "batch", "length")}


# ---- keeping --------------------------------------------------------------------------------------------------------
class Repeats(Teacher):
    """Says the same random rows of every document: what is left to time is the cache."""

    def __init__(self, logits: torch.Tensor | HeadLogits):
        self.logits, self.name = logits, "random rows"

    def __call__(self, batch, needs=frozenset({"logits"})) -> Signals:
        rows = rows_of(batch)
        return Signals(logits=self.logits, labels=rows.labels, rows=rows, batch=batch)


def measure_kept(report: Report, *, rounds: int, hidden: int, vocabulary: int, documents: int, length: int) -> None:
    """Bytes, and the CPU time of writing and reading beyond the teacher's own forward."""
    count = length - 1
    draw = torch.Generator().manual_seed(0)
    width = torch.randn(count, hidden, generator=draw).bfloat16()
    by_head = Repeats(HeadLogits(width, torch.zeros(1, hidden, dtype=torch.bfloat16)))  # rows before any head
    by_logits = Repeats(torch.randn(count, vocabulary, generator=draw) * DEVIATION)
    ids = token_ids([length] * documents, vocabulary=vocabulary)
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    collator = DataCollatorForDistillation(DataCollatorForLanguageModeling(pad_token_id=0))
    features = [data[i] for i in range(documents)]
    batch = collator(features)
    caches: dict[str, CachedTeacher] = {}
    tokens = documents * count

    with tempfile.TemporaryDirectory() as folder:

        def write(name: str, options: dict) -> None:
            teacher = by_head if options["mode"] == "hidden" else by_logits
            path = Path(tempfile.mkdtemp(dir=folder)) / "cache"
            caches[name] = cache_teacher(teacher, data, path, collator=collator, batch_size=1, **options)

        def read(name: str) -> None:
            caches[name].reader(batch, features, "positions")

        modes = CACHES | HALF_BYTES
        written = _seconds({name: partial(write, name, options) for name, options in modes.items()}, rounds)
        found = _seconds({name: partial(read, name) for name in modes}, max(rounds, 3))
        facts = {"all logits, bfloat16": {"bytes_per_token": 2.0 * vocabulary}}
        facts |= {
            name: {
                "bytes_per_token": teacher_fidelity.bytes_per_token(caches[name], tokens),
                "written_tokens_per_second": tokens / written[name],
                "read_tokens_per_second": tokens / found[name],
            }
            for name in modes
        }
    case = {"table": "keeping", "hidden": hidden, "vocabulary": vocabulary, "tokens": tokens}
    add_facts(report, case, facts)


def _seconds(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    rows = interleave([Variant(name, run, required=True) for name, run in runs.items()], rounds=rounds, warm_up=False)
    return {name: row["min"] for name, row in rows.items()}


# ---- all ------------------------------------------------------------------------------------------------------------
def add_facts(report: Report, case: dict, facts: dict[str, dict[str, float]]) -> None:
    entry = {"case": case, "facts": facts}
    report.append(entry, "\n" + facts_table(entry))


def measure_fidelity(report: Report, **sizes) -> None:
    modes = {"hidden float32": dict(mode="hidden")} | CACHES | HALF_BYTES | {"topk 256": dict(mode="topk", k=256)}
    case, facts = teacher_fidelity.measure(modes, **sizes)
    add_facts(report, {"table": "what is said"} | case, facts)


def measure_all(report: Report, *, rounds: int, step: dict, kept: dict, fidelity: dict) -> None:
    measure_steps(report, rounds=rounds, **step)
    measure_ensembles(report, rounds=rounds, **step)
    measure_kept(report, rounds=min(rounds, 2), **kept)
    measure_fidelity(report, **fidelity)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    quiet()
    sizes = dict(step=STEP, kept=KEPT, fidelity=FIDELITY)
    report = Report("teacher", CLOCK, {"rounds": options.rounds, "keeps_memory": keep_memory(), **sizes})
    measure_all(report, rounds=options.rounds, **sizes)
    report.write(options.results)


if __name__ == "__main__":
    main()
