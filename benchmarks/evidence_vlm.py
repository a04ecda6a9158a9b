"""Evidence for LLaVA-MoD: all stages beside what they are judged against, paired seeds, on two sets of real images.

    python -m benchmarks.evidence_vlm --set digits --seeds 0 1 2               # scikit-learn's digits as questions
    python -m benchmarks.evidence_vlm --set nlvr --data DIR --seeds 0 1 2      # DIR holds images.npz, statements.jsonl
    python -m benchmarks.evidence_vlm --cards                                  # rewrite model_cards/ from the results

Each row of each seed is written to runs/evidence_vlm/<set>/ when it is done. The same command again goes on with what
is missing; two processes may take different seeds at once. Results go to benchmarks/results/, pictures beside the card.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from transformers import LlavaForConditionalGeneration, PrinterCallback

from benchmarks.evidence_vlm_card import (
    ALONE,
    ALONE_ON,
    DENSE,
    DENSE_ON,
    PAIR_LABELS,
    PREFERENCE,
    RESULTS,
    ROWS,
    SPARSE,
    TEACHER,
    WIDE,
    mean,
    write_cards,
)
from benchmarks.evidence_vlm_tasks import ASKED, TASKS, Task
from hf_distill.demo import quiet
from hf_distill.embedded import small_vlm
from hf_distill.evaluation.answers import evaluate_pairs, generate_answers, prompt_inputs, score_answers
from hf_distill.evaluation.comparison import Run
from hf_distill.evaluation.hallucination import chair_scores
from hf_distill.evaluation.speed import tokens_per_second
from hf_distill.methods._llava_mod_stages import train_only
from hf_distill.methods.llava_mod import LlavaModConfig, build_trainer
from hf_distill.objectives import NextToken
from hf_distill.recipe_vlm import wrong_answers
from hf_distill.students import activated_parameters
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.config import DistillSFTConfig
from hf_distill.training.routers import FILE
from hf_distill.training.trainers import DistillSFTTrainer

RUNS = Path(__file__).parent.parent / "runs" / "evidence_vlm"


@dataclass(frozen=True)
class Plan:
    """Steps and learning rates, the same for every row that has the stage; rates are not tuned per row."""

    adaptor: int = 60
    dense: int = 250
    sparse: int = 200
    preference: int = 60
    teacher: int = 600
    language: int = 100
    batch: int = 32
    adaptor_rate: float = 2e-3
    dense_rate: float = 2e-3
    sparse_rate: float = 1e-3
    preference_rate: float = 1e-4
    pair_rows: int = 3000


PLANS = {"digits": Plan(), "nlvr": Plan(teacher=1000)}

# The sparse student's layers 0 and 2 of 4 use two experts of 128 each: 6 blocks in all, as 4 dense ones of 192.
WIDTHS = {"start": 128, "wide start": 192}


# ---- one seed -------------------------------------------------------------------------------------------------------
class Seed:
    """All rows of one seed. A row's student and record lie in `folder/<row>`; what is there is not made again."""

    def __init__(self, task: Task, plan: Plan, folder: Path, seed: int):
        self.task, self.plan, self.seed, self.folder = task, plan, seed, folder / f"seed{seed}"
        both = concatenate_datasets([task.train.select_columns(ASKED), task.captions.select_columns(ASKED)])
        known = both if task.known is None else task.known
        teacher, self.processor = small_vlm.trained_teacher(
            str(folder / "teacher"), task.texts, known, pixels=task.pixels, patch=task.patch, steps=plan.teacher
        )
        self.teacher = FrozenTeacher(teacher, self.processor)
        self.train = both  # the stages after the adaptor see captions too

    def run(self) -> None:
        for row in ROWS:
            self.record(row)
        if not (self.folder / "speed.json").exists():
            write(self.folder / "speed.json", self.speed())

    def record(self, row: str) -> None:
        path = self.folder / f"{slug(row)}.json"
        if path.exists():
            return
        start, busy = time.perf_counter(), time.process_time()
        student, steps = self.student(row), self.steps_of(row)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        run = Run(row, self.rate_of(row), self.seed, steps, seconds, busy)
        run.test = self.measure(student, row)
        write(path, run.record())
        shown = {key: round(run.test[key], 4) for key in ("error", "teacher_kl", "hallucination")}
        print(f"seed {self.seed}, {row}: {shown}, {busy:.0f} s to train", flush=True)

    # ---- students ----
    def student(self, row: str) -> LlavaForConditionalGeneration:
        """The trained student of a row, from its folder or trained from the row that it goes on from."""
        if row == TEACHER:
            return self.teacher.model
        path = self.folder / slug(row)
        if not (path / "config.json").exists():
            self._train(row, path)
        return LlavaForConditionalGeneration.from_pretrained(path).eval()

    def _train(self, row: str, path: Path) -> None:
        p = self.plan
        if row in ("start", "wide start"):
            student = small_vlm.small_student(
                self.teacher.model,
                self.processor,
                self.train,
                seed=self.seed,
                feed_forward=WIDTHS[row],
                steps=p.language,
            )
            trainer = self._stage(student, "adaptor", self.task.captions, p.adaptor, p.adaptor_rate, path)
        elif row == ALONE:
            trainer = self._labels(self.student("start"), "dense", self.train, p.dense, p.dense_rate, path)
        elif row == ALONE_ON:
            trainer = self._labels(self.student(ALONE), "sparse", self.train, p.sparse, p.sparse_rate, path)
        elif row in (DENSE, "wide start, mimic"):
            start = self.student("start" if row == DENSE else "wide start")
            trainer = self._stage(start, "dense", self.train, p.dense, p.dense_rate, path)
        elif row in (DENSE_ON, WIDE):
            start = self.student(DENSE if row == DENSE_ON else "wide start, mimic")
            trainer = self._stage(start, "dense", self.train, p.sparse, p.sparse_rate, path, dense_loss="kd_lm")
            train_only(trainer.model, "sparse")  # what stage 2 trains
        elif row == SPARSE:
            trainer = self._stage(self.student(DENSE), "sparse", self.train, p.sparse, p.sparse_rate, path)
        elif row == PREFERENCE:
            pairs = self.pairs("train")
            trainer = self._stage(self.student(SPARSE), "preference", pairs, p.preference, p.preference_rate, path)
        else:
            right = self.pairs("train").remove_columns("rejected").rename_column("chosen", "completion")
            trainer = self._labels(self.student(SPARSE), "sparse", right, p.preference, p.preference_rate, path)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(path))

    def _stage(self, student, stage: str, rows: Dataset, steps: int, rate: float, path: Path, **config):
        return build_trainer(
            student,
            self.teacher,
            rows,
            LlavaModConfig(**config),
            self._arguments(path, steps, rate),
            stage=stage,
            processing_class=self.processor,
        )

    def _labels(self, student, stage: str, rows: Dataset, steps: int, rate: float, path: Path):
        """The next token alone, training what the stage trains."""
        train_only(student, stage)
        args = self._arguments(path, steps, rate)
        return DistillSFTTrainer(
            student, objective=NextToken(), args=args, train_dataset=rows, processing_class=self.processor
        )

    def _arguments(self, path: Path, steps: int, rate: float) -> DistillSFTConfig:
        return DistillSFTConfig(
            output_dir=str(path),
            max_steps=steps,
            learning_rate=rate,
            seed=self.seed,
            per_device_train_batch_size=self.plan.batch,
            per_device_eval_batch_size=100,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.0,
            gradient_checkpointing=False,
            max_length=None,
            save_strategy="no",
            logging_steps=max(steps // 20, 1),
            report_to="none",
            disable_tqdm=True,
        )

    def steps_of(self, row: str) -> int:
        p = self.plan
        dense, sparse = p.adaptor + p.dense, p.adaptor + p.dense + p.sparse
        steps = {TEACHER: p.teacher, ALONE: dense, DENSE: dense, ALONE_ON: sparse, DENSE_ON: sparse, WIDE: sparse}
        return steps.get(row, sparse + (p.preference if row != SPARSE else 0))

    def rate_of(self, row: str) -> float:
        p = self.plan
        rates = {
            ALONE: p.dense_rate,
            DENSE: p.dense_rate,
            PREFERENCE: p.preference_rate,
            PAIR_LABELS: p.preference_rate,
        }
        return rates.get(row, p.sparse_rate)

    def pairs(self, split: str) -> Dataset:
        """The sparse mimic's own wrong answers, those on test rows to measure rewards."""
        path = self.folder / f"pairs-{split}"
        if not path.exists():
            rows = self.task.train if split == "train" else self.task.validation
            rows = rows.select_columns(ASKED).select(range(min(self.plan.pair_rows, len(rows))))
            made = wrong_answers(self.student(SPARSE), self.processor, rows, max_new_tokens=4)
            made.save_to_disk(str(path) + ".part")
            os.replace(str(path) + ".part", path)
        return Dataset.load_from_disk(str(path))

    # ---- measuring ----
    def measure(self, student, row: str) -> dict[str, float]:
        task, test = self.task, self.task.validation
        answers = generate_answers(student, self.processor, test, batch_size=100, max_new_tokens=4)
        references = [completion[-1]["content"] for completion in test["completion"]]
        asked = {kind: score_answers(answers, references, test["kind"], kind) for kind in task.object_kinds}
        rates = {f"hallucination/{kind}": scores["pope/hallucination_rate"] for kind, scores in asked.items()}
        scores = asked[task.object_kinds[0]]
        captions = generate_answers(
            student, self.processor, task.validation_captions, batch_size=100, max_new_tokens=task.caption_tokens
        )
        count = activated_parameters(student)
        result = {
            "error": 1 - scores["accuracy"],
            "hallucination": mean(list(rates.values())),
            **rates,
            **{key: value for key, value in scores.items() if key.startswith("accuracy/")},
            **{key: scores[f"pope/{key}"] for key in ("f1", "yes_ratio")},
            **chair_scores(captions, task.objects, task.synonyms),
            **self.fidelity(student),
            "parameters": count.total,
            "activated": count.activated,
        }
        if row in (SPARSE, PREFERENCE, PAIR_LABELS):
            result |= evaluate_pairs(student, self.teacher.model, self.processor, self.pairs("test"), batch_size=100)
        return result

    def fidelity(self, student) -> dict[str, float]:
        """Cross-entropy, KL(teacher || student) and top-1 agreement on the answers of the test rows."""
        trainer = DistillSFTTrainer(
            student,
            teacher=self.teacher,
            objective=NextToken(),
            args=self._arguments(self.folder / "measured", 1, 1e-3),
            train_dataset=self.task.train.select_columns(ASKED).select(range(1)),
            processing_class=self.processor,
        )
        trainer.remove_callback(PrinterCallback)
        values = trainer.evaluate(self.task.validation.select_columns(ASKED))
        return {key: values[f"eval_{key}"] for key in ("cross_entropy", "teacher_kl", "agreement")}

    def speed(self) -> dict[str, dict[str, float]]:
        """Tokens per CPU second of the dense, wide and sparse student beside each other."""
        models = {row: self.student(row) for row in (DENSE, WIDE, SPARSE)}
        rows = self.task.validation.select(range(min(32, len(self.task.validation))))
        inputs = prompt_inputs(self.processor, [dict(row) for row in rows])
        return tokens_per_second(models, inputs)


def slug(row: str) -> str:
    return row.replace(",", "").replace(" ", "_")


def write(path: Path, value: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


# ---- all seeds ------------------------------------------------------------------------------------------------------
def measure(name: str, task: Task, plan: Plan, seeds: list[int], runs: Path = RUNS) -> None:
    """Make what is missing of some seeds.

    Raises:
        ValueError: the folder holds rows of another plan.
    """
    folder = runs / name
    path = folder / "plan.json"
    if path.exists() and json.loads(path.read_text()) != asdict(plan):
        raise ValueError(f"{folder} holds rows of another plan, {path.read_text()}: move it away, or use its numbers")
    write(path, asdict(plan))
    for seed in seeds:
        Seed(task, plan, folder, seed).run()


def gathered(name: str, runs: Path = RUNS, argv: list[str] | None = None) -> dict | None:
    """The result of a set from all seeds whose rows are all there; None while there is none."""
    folder = runs / name
    seeds = sorted(p for p in folder.glob("seed*") if all((p / f"{slug(row)}.json").exists() for row in ROWS))
    if not seeds:
        return None
    loads = seeds[0] / slug(SPARSE) / FILE
    return {
        "set": name,
        "plan": json.loads((folder / "plan.json").read_text()),
        "rows": {row: [json.loads((seed / f"{slug(row)}.json").read_text()) for seed in seeds] for row in ROWS},
        "speed": [json.loads((seed / "speed.json").read_text()) for seed in seeds if (seed / "speed.json").exists()],
        "pairs": [
            {split: len(Dataset.load_from_disk(str(seed / f"pairs-{split}"))) for split in ("train", "test")}
            for seed in seeds
        ],
        "expert_load": [json.loads(line) for line in loads.read_text().splitlines()],
        "command": "python -m benchmarks.evidence_vlm " + " ".join(argv or []),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", choices=list(TASKS), default="digits")
    parser.add_argument("--data", help="folder of nlvr's images.npz and statements.jsonl, or of the set's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    quiet()
    torch.set_num_threads(1)
    if options.cards:
        return write_cards()
    if options.data and Path(options.data, "nlvr").is_dir():
        options.data = str(Path(options.data, "nlvr"))
    if options.set == "nlvr" and not (options.data and Path(options.data, "images.npz").is_file()):
        print(f"skipped: nlvr needs --data with images.npz and statements.jsonl, got {options.data!r}")
        return None
    measure(options.set, TASKS[options.set](options.data), PLANS[options.set], options.seeds)
    said = [
        f"--set {options.set}",
        *(["--data DIR"] if options.data else []),
        "--seeds " + " ".join(map(str, options.seeds)),
    ]
    result = gathered(options.set, argv=said)
    if result is not None:
        write(RESULTS / f"evidence_vlm_{options.set}.json", result)
        write_cards()
    return None


if __name__ == "__main__":
    main()
