"""Evidence on fidelity: are students that imitate their teacher better the better students?

    python -m benchmarks.evidence_fidelity --data DIR --seeds 3     # DIR holds tinyshakespeare/input.txt

Two sets. Sums of two numbers written out digit by digit, made up here: small enough that answers can be right, so
accuracy, agreement and BLEU of generated answers. Tiny Shakespeare: tokens only. A student learns from the labels for a
while first, as the study's are pretrained: from an untrained one reverse KL gets nowhere in so few steps. From there
every row goes on with the same student in the same order, at the rate that was best for it on validation with the first
seed and half the steps. Finished runs are kept under runs/evidence/fidelity/, so a killed command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)

from benchmarks.evidence_fidelity_card import CARDS, SFT, SUMS, TOKENS, write_cards
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from hf_distill.demo import quiet
from hf_distill.evaluation.comparison import token_blocks
from hf_distill.evaluation.fidelity import measure_tokens, text_fidelity
from hf_distill.evaluation.generated import greedy_texts
from hf_distill.methods.fidelity import FidelityConfig, build_trainer, extractor_of
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.config import DistillSFTConfig

FORMAT = 1
WORK = ROOT / "runs" / "evidence" / "fidelity"
ROWS = {  # settings of FidelityConfig
    SFT: {"fidelity_loss": "labels"},
    "forward KL": {"fidelity_loss": "forward_kl"},
    "reverse KL": {"fidelity_loss": "reverse_kl"},
    "JSD (GKD's loss)": {"fidelity_loss": "gkd"},
    "forward KL, T = 2": {"fidelity_loss": "forward_kl", "temperature": 2.0},
    "forward KL, T = 5": {"fidelity_loss": "forward_kl", "temperature": 5.0},
    "forward KL, noise 5": {"fidelity_loss": "forward_kl", "teacher_logit_noise_std": 5.0},
}
RATES = (5e-3, 1e-2)


@dataclass
class Plan:
    """Sizes of a run; the defaults are those of the card."""

    warm_steps: int = 320
    token_warm_steps: int = 60
    steps: int = 200
    token_steps: int = 100
    teacher_steps: int = 300
    token_teacher_steps: int = 250
    batch: int = 32
    train: int = 1000
    teacher_train: int = 4000
    held_out: int = 300
    student: tuple[int, int] = (40, 2)
    teacher: tuple[int, int] = (64, 3)
    token_student: tuple[int, int] = (48, 2)
    token_teacher: tuple[int, int] = (96, 3)


# ---- the two sets ---------------------------------------------------------------------------------------------------
def letters() -> PreTrainedTokenizerFast:
    """A token per character."""
    names = ["<pad>", "<eos>", "<unk>", *"0123456789+= "]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def worked(a: int, b: int) -> tuple[str, str]:
    """A question and its answer, digit by digit from the right.

    Example:
        >>> worked(37, 48)
        ('37+48=', '7+8=15 3+4+1=8 85')
    """
    low, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    high = a // 10 + b // 10 + carry
    carried = "+1" if carry else ""
    return f"{a:02d}+{b:02d}=", f"{a % 10}+{b % 10}={low} {a // 10}+{b // 10}{carried}={high} {a + b}"


def sums(plan: Plan) -> dict[str, list[tuple[str, str]]]:
    """Questions with answers; no pair of numbers is in two parts, except that the student's are among the teacher's."""
    sizes = {"teacher": plan.teacher_train, "validation": plan.held_out, "test": plan.held_out}
    drawn = random.Random(0).sample(range(100 * 100), sum(sizes.values()))
    rows, at = {}, 0
    for name, size in sizes.items():
        rows[name] = [worked(i // 100, i % 100) for i in drawn[at : at + size]]
        at += size
    return rows | {"train": rows["teacher"][: plan.train]}


def rows_of(tokenizer, pairs: list[tuple[str, str]]) -> Dataset:
    """Tokens with the loss on the answers."""
    ids, labels = [], []
    for question, answer in pairs:
        asked, said = (tokenizer(text)["input_ids"] for text in (question, answer))
        said = [*said, tokenizer.eos_token_id]
        ids.append(asked + said)
        labels.append([-100] * len(asked) + said)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def model(tokenizer, size: tuple[int, int], seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    hidden, layers = size
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 16,
            num_key_value_heads=hidden // 16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass
class Task:
    """A set with its teacher."""

    name: str
    tokenizer: PreTrainedTokenizerFast
    parts: dict[str, Dataset]
    student: tuple[int, int]
    warm_steps: int
    steps: int
    batch: int
    teacher: FrozenTeacher | None = None
    questions: dict[str, list[tuple[str, str]]] | None = None  # generated answers only where there are some
    said: dict[str, list[str]] | None = None  # what the teacher answers to them


def sums_task(plan: Plan, work: Path, data: Path) -> Task:
    tokenizer, pairs = letters(), sums(plan)
    parts = {name: rows_of(tokenizer, rows) for name, rows in pairs.items()}
    task = Task(SUMS, tokenizer, parts, plan.student, plan.warm_steps, plan.steps, plan.batch, questions=pairs)
    task.teacher = taught(task, work, plan.teacher, plan.teacher_steps)
    asked = {name: [q for q, _ in pairs[name]] for name in ("validation", "test")}
    task.said = {name: written(task.teacher.model, tokenizer, questions) for name, questions in asked.items()}
    return task


def tokens_task(plan: Plan, work: Path, data: Path) -> Task:
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    a, b = int(0.9 * len(text)), int(0.95 * len(text))
    texts = {"train": text[:a], "validation": text[a:b], "test": text[b:]}
    texts = {name: [part[i : i + 2000] for i in range(0, len(part), 2000)] for name, part in texts.items()}
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    tokenizer = tokenizer.train_new_from_iterator(texts["train"], 512, show_progress=False)
    parts = {name: token_blocks(tokenizer, part, 64) for name, part in texts.items()}
    parts["teacher"] = parts["train"]
    for name in ("validation", "test"):
        parts[name] = parts[name].select(range(min(plan.held_out, len(parts[name]))))
    task = Task(TOKENS, tokenizer, parts, plan.token_student, plan.token_warm_steps, plan.token_steps, plan.batch)
    task.teacher = taught(task, work, plan.token_teacher, plan.token_teacher_steps)
    return task


TASKS = {SUMS: sums_task, TOKENS: tokens_task}


# ---- one run --------------------------------------------------------------------------------------------------------
def trainer_of(task: Task, settings: dict, student, part: str, rate: float, seed: int, steps: int, work: Path):
    args = DistillSFTConfig(
        output_dir=str(work / "student"),
        max_steps=steps,
        learning_rate=rate,
        seed=seed,
        per_device_train_batch_size=task.batch,
        per_device_eval_batch_size=100,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        gradient_checkpointing=False,
        max_length=128,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    teacher = task.teacher or FrozenTeacher(model(task.tokenizer, (16, 1), 0), task.tokenizer)  # reads, teaches nothing
    trainer = build_trainer(
        student, teacher, task.parts[part], FidelityConfig(**settings), args,
        eval_dataset=task.parts["validation"], processing_class=task.tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def taught(task: Task, work: Path, size: tuple[int, int], steps: int) -> FrozenTeacher:
    """The teacher, trained on the labels once and kept."""
    folder = on_labels(task, work, f"teacher-{task.name}-{steps}", size, "teacher", 2e-3, 1000, steps)
    return FrozenTeacher.from_pretrained(str(folder))


def started(task: Task, work: Path, seed: int) -> LlamaForCausalLM:
    """The student that every row of a seed goes on with."""
    name = f"student-{task.name}-{task.warm_steps}-{seed}"
    return LlamaForCausalLM.from_pretrained(
        on_labels(task, work, name, task.student, "train", 1e-2, seed, task.warm_steps)
    )


def on_labels(task: Task, work: Path, name: str, size, part: str, rate: float, seed: int, steps: int) -> Path:
    folder = work / name
    if not (folder / "config.json").exists():
        trainer = trainer_of(task, ROWS[SFT], model(task.tokenizer, size, seed), part, rate, seed, steps, work)
        trainer.train()
        trainer.save_model(str(folder))
    return folder


def written(writer, tokenizer, questions: list[str]) -> list[str]:
    return greedy_texts(writer, tokenizer, questions, batch_size=150, max_new_tokens=24)


def train_once(task: Task, settings: dict, rate: float, seed: int, steps: int, part: str, work: Path) -> dict:
    """What a student does on a part after training."""
    trainer = trainer_of(task, settings, started(task, work, seed), "train", rate, seed, steps, work)
    busy = time.process_time()
    trainer.train()
    busy = time.process_time() - busy
    trainer.eval_dataset = task.parts[part]
    trainer.callback_handler.eval_dataloader = None
    scores = measure_tokens(trainer, (1, 5))[0]
    if task.questions is not None:
        pairs = task.questions[part]
        texts = written(trainer.student(), task.tokenizer, [q for q, _ in pairs])
        scores |= text_fidelity(texts, task.said[part], [a for _, a in pairs], extractor_of("number"))
    return {"rate": rate, "seed": seed, "steps": steps, "cpu_seconds": busy, "scores": scores}


def quality(scores: dict) -> tuple[float, float]:
    """What the learning rate is chosen by: answers first, then likelihood."""
    return scores.get("student_accuracy", 0.0), -scores["cross_entropy"]


# ---- all runs -------------------------------------------------------------------------------------------------------
def kept(path: Path, asked: dict, make) -> dict:
    """A record of the same plan, or a new one."""
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["asked"] == json.loads(json.dumps(asked)):
            return found["record"]
    record = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"asked": asked, "record": record}), encoding="utf-8")
    return record


def measure(plan: Plan, seeds: list[int], data: Path, work: Path) -> Iterator[tuple[str, dict]]:
    """All rows, set by set."""
    for name, make in TASKS.items():
        task = make(plan, work, data)
        asked = {"format": FORMAT, "plan": asdict(plan)}
        rows, teacher = {}, teacher_scores(task)
        with tqdm(total=len(ROWS) * (len(RATES) + len(seeds)), unit="run", desc=name, disable=None) as bar:
            for row, settings in ROWS.items():
                place = work / name / "".join(c if c.isalnum() else "_" for c in row)
                own = asked | {"settings": settings}

                def run(rate, seed, steps, part, label, settings=settings, task=task, place=place, own=own, bar=bar):
                    bar.update()
                    made = partial(train_once, task, settings, rate, seed, steps, part, work)
                    return kept(place / f"{label}.json", own | {"rate": rate, "seed": seed}, made)

                tried = [run(rate, seeds[0], task.steps // 2, "validation", f"rate-{rate:g}") for rate in RATES]
                best = max(tried, key=lambda record: quality(record["scores"]))["rate"]
                rows[row] = [run(best, seed, task.steps, "test", f"seed-{seed}") for seed in seeds]
                print(name, row, best, [quality(record["scores"]) for record in rows[row]], flush=True)
        parameters = model(task.tokenizer, task.student, 0).num_parameters()
        yield (
            name,
            {
                "rows": rows,
                "teacher": teacher,
                "teacher_parameters": task.teacher.model.num_parameters(),
                "student_parameters": parameters,
                "sizes": {part: len(data) for part, data in task.parts.items()},
            },
        )


def teacher_scores(task: Task) -> dict[str, float]:
    """The teacher's own: cross-entropy on the test part, and its answers."""
    trainer = trainer_of(task, ROWS["forward KL"], task.teacher.model, "train", 1e-3, 0, 1, Path("unused"))
    trainer.eval_dataset = task.parts["test"]
    scores = {"cross_entropy": measure_tokens(trainer)[0]["cross_entropy"]}
    trainer.student()
    task.teacher = FrozenTeacher(task.teacher.model, task.tokenizer, name=task.teacher.name)
    if task.questions is not None:
        gold, extract = [a for _, a in task.questions["test"]], extractor_of("number")
        own = text_fidelity(task.said["test"], task.said["test"], gold, extract)
        scores |= {"student_accuracy": own["student_accuracy"]}
    return scores


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder that holds tinyshakespeare/input.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed_list", type=int, nargs="+", help="these seeds instead")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished runs")
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    quiet()
    if not options.cards:
        if options.data is None or not (options.data / "tinyshakespeare" / "input.txt").is_file():
            parser.error(f"--data must name a folder that holds tinyshakespeare/input.txt, got {options.data}")
        plan, seeds = Plan(), options.seed_list or list(range(options.seeds))
        result = {
            "plan": asdict(plan),
            "rates": RATES,
            "command": f"python -m benchmarks.evidence_fidelity --data DIR --seeds {len(seeds)}",
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "sets": {},
        }
        options.results.mkdir(parents=True, exist_ok=True)
        for name, found in measure(plan, seeds, options.data, options.work):
            result["sets"][name] = found
            path = options.results / "evidence_fidelity.json"
            path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    write_cards(options.results, CARDS)


if __name__ == "__main__":
    main()
