"""Evidence on on-policy and mixed training: paired seeds, the same student, budget and tuning, beside TRL's trainers.

    python -m benchmarks.evidence_onpolicy --data DIR --seeds 3          # DIR holds tinyshakespeare/input.txt
    python -m benchmarks.evidence_onpolicy --cards                       # rewrite the card from the results

A student that has learnt from the labels a little goes on to learn from its teacher: from the speeches themselves, from
its own, from both. Measured on test prompts: how far it is from the teacher on what it writes itself, and on the
speeches. Finished runs are kept under --work, so that a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PrinterCallback

from benchmarks.evidence_cards import CARDS
from benchmarks.evidence_lm import model
from benchmarks.evidence_onpolicy_card import ALONE, OFF, ON, write_cards
from benchmarks.harness import RESULTS, ROOT, commit, machine, versions
from hf_distill.curricula.onpolicy import Sampling, Text, prompts_of, sample
from hf_distill.demo import quiet
from hf_distill.evaluation.comparison import Run
from hf_distill.losses import LabelCrossEntropy, forward_kl, observe, reverse_kl
from hf_distill.objectives import LogitKD, NextToken
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.config import DistillSFTConfig
from hf_distill.training.trainers import DistillSFTTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
PROMPT, ANSWER, VOCABULARY, BATCH, BETA = 12, 24, 512, 16, 0.5
RATES = (1e-3, 3e-3)
TEST_PROMPTS = 256


@dataclass(frozen=True)
class Row:
    """One way of training. `options` are DistillSFTConfig's; `trl` names another trainer instead of ours."""

    note: str
    options: dict
    alone: bool = False
    trl: str | None = None
    as_long_as: str | None = None


ROWS = {
    ALONE: Row("cross-entropy with the speeches", {}, alone=True),
    OFF: Row("lmbda 0: the teacher on the speeches", {"lmbda": 0.0}),
    "mixed": Row("lmbda 0.5", {"lmbda": 0.5}),
    ON: Row("lmbda 1: the teacher on the student's samples", {"lmbda": 1.0}),
    "adaptive": Row(
        "lmbda from 0.2, raised by 0.1 as validation loss rises by 0.01, replay of 128 texts",
        {
            "lmbda": 0.2,
            "lmbda_schedule": "adaptive",
            "lmbda_tolerance": 0.01,
            "replay_capacity": 128,
            "eval_strategy": "steps",
            "eval_steps": 0.1,
        },
    ),
    "sequence-level KD": Row("seq_kd: the teacher on its own texts", {"seq_kd": True}),
    "TRL GKDTrainer": Row("lmbda 0.5, as mixed", {"lmbda": 0.5}, trl="gkd"),
    "TRL DistillationTrainer": Row("on-policy alone, as on-policy", {}, trl="distillation"),
    "off-policy, equal time": Row(
        "as off-policy, as many CPU seconds as on-policy", {"lmbda": 0.0}, as_long_as=ON
    ),
}  # fmt: skip


# ---- data and models -------------------------------------------------------------------------------------------------
def speeches(tokenizer, text: str) -> Dataset:
    """Prompts of PROMPT tokens of a speech, its speaker first, and up to ANSWER more; an end token where it ended."""
    rows = []
    for speech in tokenizer(text.split("\n\n"))["input_ids"]:
        if len(speech) > PROMPT:
            ids = [*speech, tokenizer.eos_token_id][: PROMPT + ANSWER]
            rows.append({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]})
    return Dataset.from_list(rows)


def parts_of(path: Path) -> dict[str, str]:
    text = path.read_text(encoding="utf-8")
    a, b = int(0.9 * len(text)), int(0.95 * len(text))
    return {"train": text[:a], "validation": text[a:b], "test": text[b:]}


@dataclass
class Study:
    """Teacher, tokenizer and data, and the students' start; models are trained once and kept."""

    options: argparse.Namespace

    def __post_init__(self):
        texts = parts_of(self.options.data / "tinyshakespeare" / "input.txt")
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
        self.tokenizer = tokenizer.train_new_from_iterator([texts["train"]], VOCABULARY, show_progress=False)
        self.sets = {name: speeches(self.tokenizer, text) for name, text in texts.items()}
        size = self.options.teacher_size
        teacher = self._kept("teacher", lambda: model(self.tokenizer, *size, 0), self.options.teacher_steps)
        self.teacher = FrozenTeacher(teacher, self.tokenizer, name="teacher")

    def student(self, seed: int) -> LlamaForCausalLM:
        fresh = partial(model, self.tokenizer, *self.options.student_size, seed)
        return self._kept(f"student-{seed}", fresh, self.options.student_steps, seed)

    def _kept(self, name: str, fresh: Callable, steps: int, seed: int = 0) -> LlamaForCausalLM:
        """Trained on the labels of the speeches, whole speeches counted."""
        folder = self.options.work / name
        if not (folder / "config.json").is_file():
            whole = self.sets["train"].map(lambda row: {"labels": row["input_ids"]})
            trainer = ours(fresh(), None, self.tokenizer, whole, None, self.arguments(steps, 2e-3, seed), NextToken())
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.student().save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder)

    def arguments(self, steps: int, rate: float, seed: int, **more) -> dict:
        """Settings that every trainer takes, TRL's too."""
        settings = dict(
            output_dir=str(self.options.work / "run"),
            max_steps=steps,
            learning_rate=rate,
            seed=seed,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        return settings | more


# ---- trainers --------------------------------------------------------------------------------------------------------
def ours(student, teacher, tokenizer, train, validation, settings: dict, objective) -> DistillSFTTrainer:
    args = DistillSFTConfig(
        max_length=PROMPT + ANSWER,
        max_completion_length=ANSWER,
        per_device_eval_batch_size=64,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    return DistillSFTTrainer(
        student,
        teacher=teacher,
        objective=objective,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )


def gkd(study: Study, student, settings: dict, lmbda: float):
    """TRL's GKDTrainer on the same rows; its collator reads chats, so ours gives it what it would."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        batch = study.tokenizer.pad(
            [{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt", padding_side="right"
        )
        width = batch["input_ids"].shape[1]
        labels = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
        prompts = batch["input_ids"][:, :PROMPT]
        return dict(batch) | {
            "labels": labels,
            "prompts": prompts,
            "prompt_attention_mask": torch.ones_like(prompts),
        }

    args = GKDConfig(lmbda=lmbda, beta=BETA, temperature=1.0, max_new_tokens=ANSWER, **settings)
    return GKDTrainer(
        student,
        study.teacher.model,
        args,
        data_collator=collate,
        train_dataset=study.sets["train"],
        processing_class=study.tokenizer,
    )


def distillation(study: Study, student, settings: dict):
    """TRL's DistillationTrainer on the same prompts as text, which it tokenises anew."""
    from trl import DistillationConfig, DistillationTrainer

    prompts = study.tokenizer.batch_decode([row["input_ids"][:PROMPT] for row in study.sets["train"]])
    return DistillationTrainer(
        student,
        study.teacher.model,
        args=DistillationConfig(beta=BETA, max_completion_length=ANSWER, **settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=study.tokenizer,
    )


def trainer_of(study: Study, row: Row, rate: float, seed: int, steps: int):
    student = study.student(seed)
    if row.trl == "gkd":
        return gkd(study, student, study.arguments(steps, rate, seed), **row.options)
    if row.trl == "distillation":
        return distillation(study, student, study.arguments(steps, rate, seed))
    objective = NextToken() if row.alone else LogitKD("generalized_jsd", options={"beta": BETA})
    settings = study.arguments(steps, rate, seed, **row.options)
    if row.options.get("seq_kd"):
        settings["seq_kd_store"] = str(study.options.work / "teacher_texts" / f"{seed}-{steps}-{rate:g}")
    validation = study.sets["validation"].select(range(min(128, len(study.sets["validation"]))))
    teacher = None if row.alone else study.teacher
    return ours(student, teacher, study.tokenizer, study.sets["train"], validation, settings, objective)


# ---- measuring -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(study: Study, student: nn.Module, rows: Dataset) -> dict[str, float]:
    """Means over tokens: KLs on the student's own samples and on the speeches, and their cross-entropy."""
    student.eval()
    sampling = Sampling(ANSWER, 1.0, 1.0, 0, (study.tokenizer.eos_token_id,), study.tokenizer.pad_token_id)
    pad = partial(padded, padding=study.tokenizer.pad_token_id)
    totals = torch.zeros(4, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(rows), 64):
        own = [rows[i] for i in range(start, min(start + 64, len(rows)))]
        prompts = prompts_of(pad(own))
        completions = sample(student, prompts, sampling, ("measured", start))
        batch = pad([Text(*pair).feature for pair in zip(prompts, completions, strict=True)])
        q, p, labels = on_rows(student, study.teacher.model, batch)
        totals[0] += reverse_kl(q, p, reduction="sum").double()
        counts[0] += len(labels)
        totals[3] += len(prompts)
        q, p, labels = on_rows(student, study.teacher.model, pad(own))
        totals[1] += forward_kl(q, p, reduction="sum").double()
        totals[2] += observe(q, None, {"ce": LabelCrossEntropy()}, labels=labels)["ce"].sum().double()
        counts[1] += len(labels)
    return {
        "own_kl": (totals[0] / counts[0]).item(),
        "teacher_kl": (totals[1] / counts[1]).item(),
        "cross_entropy": (totals[2] / counts[1]).item(),
        "length": (counts[0] / totals[3]).item(),
    }


def padded(rows: list[dict], padding: int) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def table(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": table("input_ids", padding),
        "labels": table("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def on_rows(student: nn.Module, teacher: nn.Module, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides' logits (N, V) where there is a label, and the labels."""
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    q, p = (m(**inputs).logits[:, :-1][kept] for m in (student, teacher))
    return q, p, labels[kept]


# ---- runs ------------------------------------------------------------------------------------------------------------
class Records:
    """Finished runs of a folder, by name."""

    def __init__(self, folder: Path):
        self.path = folder / "runs.json"
        self.runs = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def add(self, key: str, run: Run) -> None:
        self.runs[key] = run.record()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(self.runs, indent=1))
        os.replace(scratch, self.path)


def train_once(study: Study, name: str, rate: float, seed: int, steps: int, *, tuning: bool) -> Run:
    trainer = trainer_of(study, ROWS[name], rate, seed, steps)
    trainer.remove_callback(PrinterCallback)
    start, busy = time.perf_counter(), time.process_time()
    trainer.train()
    run = Run(name, rate, seed, steps, time.perf_counter() - start, time.process_time() - busy)
    kind = "validation" if tuning else "test"
    rows = study.sets[kind].select(range(min(TEST_PROMPTS, len(study.sets[kind]))))
    student = trainer.student() if isinstance(trainer, DistillSFTTrainer) else trainer.model
    run.test = measure(study, student, rows)
    run.validation = run.test["own_kl"] + run.test["teacher_kl"]
    if hasattr(trainer, "lmbda") and ROWS[name].options.get("lmbda_schedule") == "adaptive":
        run.test["lmbda at the end"] = trainer.lmbda
    return run


def seconds_per_step(runs: list[Run]) -> float:
    return sum(run.cpu_seconds for run in runs) / sum(run.steps for run in runs)


def run_all(options) -> None:
    study, records = Study(options), Records(options.work)

    def once(name: str, rate: float, seed: int, steps: int, *, tuning: bool) -> Run:
        key = f"{name} {rate:g} {seed} {steps} {'tuning' if tuning else 'run'}"
        if key not in records.runs:
            records.add(key, train_once(study, name, rate, seed, steps, tuning=tuning))
        bar.update(1)
        return Run(**records.runs[key])

    found: dict[str, list[Run]] = {}
    tuned = max(round(0.4 * options.steps), 1)
    with tqdm(total=len(ROWS) * (len(RATES) + len(options.seed_list)), unit="run", disable=None) as bar:
        for name, row in ROWS.items():
            bar.set_description(name)
            steps, part = options.steps, tuned
            if row.as_long_as:
                longer = seconds_per_step(found[row.as_long_as]) / seconds_per_step(found[OFF])
                kept = records.runs.setdefault("times longer", round(max(longer, 1.0), 1))
                steps, part = round(kept * steps), round(kept * part)
            tries = [once(name, rate, options.seed_list[0], part, tuning=True) for rate in RATES]
            rate = min(tries, key=lambda run: run.validation).learning_rate
            found[name] = [once(name, rate, seed, steps, tuning=False) for seed in options.seed_list]
            print(f"{name}: {[{k: round(v, 4) for k, v in run.test.items()} for run in found[name]]}", flush=True)
    test = study.sets["test"].select(range(min(TEST_PROMPTS, len(study.sets["test"]))))
    result = {
        "steps": options.steps,
        "batch": BATCH,
        "rates": RATES,
        "prompt": PROMPT,
        "answer": ANSWER,
        "student_steps": options.student_steps,
        "teacher_steps": options.teacher_steps,
        "teacher_parameters": study.teacher.model.num_parameters(),
        "student_parameters": study.student(options.seed_list[0]).num_parameters(),
        "examples": {name: len(rows) for name, rows in study.sets.items()},
        "teacher": measure(study, study.teacher.model, test),
        "start": [measure(study, study.student(seed), test) for seed in options.seed_list],
        "notes": {name: row.note for name, row in ROWS.items()},
        "rows": {name: [run.record() for run in runs] for name, runs in found.items()},
        "command": f"python -m benchmarks.evidence_onpolicy --data DIR --seeds {len(options.seed_list)}",
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "evidence_onpolicy.json").write_text(json.dumps(result, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with tinyshakespeare/input.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed_list", type=int, nargs="+", help="these instead of 0 to SEEDS - 1")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--teacher_steps", type=int, default=700)
    parser.add_argument("--student_steps", type=int, default=150)
    parser.add_argument("--teacher_size", type=int, nargs=2, default=(128, 3), help="width and layers")
    parser.add_argument("--student_size", type=int, nargs=2, default=(64, 2), help="width and layers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence" / "onpolicy")
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    options.seed_list = options.seed_list or list(range(options.seeds))
    torch.set_num_threads(1)
    quiet()
    if not options.cards:
        if options.data is None or not (options.data / "tinyshakespeare" / "input.txt").is_file():
            parser.error(f"--data must name a folder that holds tinyshakespeare/input.txt, got {options.data}")
        run_all(options)
    if options.cards or options.results == RESULTS:
        write_cards(options.results, CARDS)


if __name__ == "__main__":
    main()
