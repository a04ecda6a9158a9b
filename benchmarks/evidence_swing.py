"""Evidence for Swing distillation: exposure of planted canaries, and quality, over paired seeds.

    python -m benchmarks.evidence_swing --data DIR --seeds 3      # DIR holds tinyshakespeare/input.txt
    python -m benchmarks.evidence_swing --cards                   # rewrite model_cards/swing.md from the results

A teacher learns the text with canaries in it until it knows them. Every row then trains the same student from it, with
the same order, steps and tuning. Finished runs are kept under runs/evidence/swing/, so that a killed command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback, set_seed

from benchmarks.evidence_cards import CARDS, begun, fill
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from hf_distill import DistillSFTConfig, DistillSFTTrainer
from hf_distill.curricula.privacy import add_privacy_scores, carry_scores, token_counts
from hf_distill.demo import quiet
from hf_distill.evaluation.comparison import Run, paired, picture
from hf_distill.evaluation.exposure import Canary, draw_canaries, insert_canaries, measure_exposure
from hf_distill.methods.swing import Swing, SwingConfig
from hf_distill.objectives import NextToken
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers import FrozenTeacher

FORMAT = 1  # of the records: another one runs everything again
WORK = ROOT / "runs" / "evidence" / "swing"
RATES = (4e-3, 8e-3)
TEMPLATES = (
    "The number of the Duke's account is {}.",
    "Call the steward at {} tonight.",
    "Her house is known by {} alone.",
    "He keeps the pass code {} to himself.",
)
LABELS = {"exposure": "mean exposure (bits), lower", "cross_entropy": "cross-entropy (nats), lower"}
ALONE, KD, MASKED, SWING = "student alone", "plain KD", "KD, labels masked", "Swing"
NOISE, TEMPERATURE, RARITY = "noise only", "temperature only", "Swing, rarity scorer"
NO_NOISE, NO_TEMPERATURE = {"swing_noise": "none"}, {"swing_t_max": 1.0}
PLAIN = NO_NOISE | NO_TEMPERATURE | {"swing_mask_hard": False}
ROWS: dict[str, dict] = {
    ALONE: PLAIN | {"swing_weight": 0.0},
    KD: PLAIN,
    MASKED: NO_NOISE | NO_TEMPERATURE,
    NOISE: NO_TEMPERATURE,
    TEMPERATURE: NO_NOISE,
    SWING: {},
    RARITY: {"swing_scorer": "rarity"},
}
PUBLIC = {f"{row}, public text": ROWS[row] for row in (KD, SWING)}
COMPARED = (
    *((row, KD) for row in (ALONE, MASKED, NOISE, TEMPERATURE, SWING, RARITY)),
    *((row, MASKED) for row in (NOISE, TEMPERATURE, SWING, RARITY)),
    (SWING, TEMPERATURE),
    (SWING, f"{KD}, public text"),
    (f"{SWING}, public text", f"{KD}, public text"),
)


@dataclass(frozen=True)
class Sizes:
    """What is run; the tests take a smaller one."""

    teacher: tuple[int, int] = (96, 2)
    student: tuple[int, int] = (48, 2)
    teacher_steps: int = 500
    steps: int = 150
    batch: int = 16
    tune_share: float = 0.4
    vocabulary: int = 512
    max_length: int = 64
    repeats: int = 60
    values: int = 1000
    texts: int | None = None


class Study:
    """Data, teacher and records of one size."""

    def __init__(self, data: Path, work: Path, sizes: Sizes):
        self.sizes, self.work = sizes, work
        work.mkdir(parents=True, exist_ok=True)
        parts = texts(data / "tinyshakespeare" / "input.txt", sizes.texts)
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
        self.tokenizer = tokenizer.train_new_from_iterator(
            [*parts["train"], *map(str, range(10))], sizes.vocabulary, show_progress=False
        )
        self.canaries: list[Canary] = [
            draw_canaries(template, numbers(sizes.values, i), 1, seed=i)[0] for i, template in enumerate(TEMPLATES)
        ]
        rows = {name: Dataset.from_dict({"text": part}) for name, part in parts.items()}
        planted = insert_canaries(rows["train"], self.canaries, sizes.repeats)
        args = self.arguments("prepare", 1, 0.0, 0)
        prepared = {"public": rows["train"], "train": planted} | {n: rows[n] for n in ("validation", "test")}
        self.data = {name: add_privacy_scores(part, self.tokenizer, args) for name, part in prepared.items()}
        self.counts = str(work / "public_counts.safetensors")
        save_file({"counts": token_counts(parts["train"], self.tokenizer)}, self.counts)
        self.teacher = self._teacher()

    def arguments(self, name: str, steps: int, rate: float, seed: int) -> DistillSFTConfig:
        return DistillSFTConfig(
            output_dir=str(self.work / "runs" / name),
            max_steps=steps,
            learning_rate=rate,
            seed=seed,
            per_device_train_batch_size=self.sizes.batch,
            per_device_eval_batch_size=64,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            gradient_checkpointing=False,
            max_length=self.sizes.max_length,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )

    def model(self, shape: tuple[int, int], seed: int) -> LlamaForCausalLM:
        set_seed(seed)
        hidden, layers = shape
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=hidden,
                intermediate_size=hidden * 8 // 3,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                initializer_range=0.05,
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )

    def exposures(self, model) -> list[float]:
        return list(measure_exposure(model, self.tokenizer, self.canaries, method="exact", batch_size=500).values())

    def _teacher(self) -> FrozenTeacher:
        folder = self.work / "teacher"
        if not (folder / "config.json").exists():
            trainer = DistillSFTTrainer(
                self.model(self.sizes.teacher, 100),
                objective=NextToken(),
                args=self.arguments("teacher", self.sizes.teacher_steps, 2e-3, 100),
                train_dataset=self.data["train"],
                processing_class=self.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.save_model(str(folder))
        return FrozenTeacher.from_pretrained(str(folder))

    def teacher_measures(self) -> dict[str, float]:
        record = self.work / "teacher.json"
        if not record.exists():
            copy = LlamaForCausalLM.from_pretrained(self.work / "teacher")
            measured = DistillSFTTrainer(
                copy,
                objective=NextToken(),
                args=self.arguments("measured", 1, 0.0, 0),
                train_dataset=self.data["test"],
                processing_class=self.tokenizer,
            ).evaluate(self.data["test"], metric_key_prefix="test")
            values = self.exposures(self.teacher.model)
            mean = {"cross_entropy": measured["test_cross_entropy"], "exposure": statistics.mean(values)}
            record.write_text(json.dumps(mean | {"exposures": values}))
        return json.loads(record.read_text())

    def trainer(self, row: str, student, steps: int, rate: float, seed: int) -> DistillSFTTrainer:
        settings = (ROWS | PUBLIC)[row]
        if settings.get("swing_scorer") == "rarity":
            settings = settings | {"swing_public_counts": self.counts}
        objective = Swing(SwingConfig(**settings), seed)
        trainer = DistillSFTTrainer(
            student,
            teacher=self.teacher,
            objective=objective,
            args=self.arguments("student", steps, rate, seed),
            train_dataset=self.data["public" if row in PUBLIC else "train"],
            eval_dataset=self.data["validation"],
            processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        carry_scores(trainer)
        return trainer

    def run(self, row: str, rate: float, seed: int, *, tuning: bool = False) -> Run:
        """One student; the record of it where it was trained before."""
        steps = max(1, round(self.sizes.steps * (self.sizes.tune_share if tuning else 1)))
        record = self.work / f"{row.replace(' ', '_').replace(',', '')}-{rate:g}-{seed}-{steps}.json"
        asked = {"format": FORMAT, "sizes": repr(self.sizes), "settings": (ROWS | PUBLIC)[row]}
        if record.exists() and (found := json.loads(record.read_text()))["asked"] == asked:
            return Run(**found["run"])
        trainer = self.trainer(row, self.model(self.sizes.student, seed), steps, rate, seed)
        begin, busy = time.perf_counter(), time.process_time()
        trainer.train()
        run = Run(row, rate, seed, steps, time.perf_counter() - begin, time.process_time() - busy)
        run.validation = trainer.evaluate()["eval_cross_entropy"]
        if not tuning:
            measured = trainer.evaluate(self.data["test"], metric_key_prefix="test")
            run.test = {name: measured[f"test_{name}"] for name in ("cross_entropy", "teacher_kl", "agreement")}
            values = self.exposures(trainer.student())
            run.test |= {"exposure": statistics.mean(values), "exposure_max": max(values)}
        record.write_text(json.dumps({"asked": asked, "run": run.record()}))
        return run

    def chosen(self, row: str) -> float:
        """The learning rate that is best on validation, shortened, with the first seed."""
        kind = row.removesuffix(", public text")
        return min(RATES, key=lambda rate: self.run(kind, rate, 0, tuning=True).validation)


def numbers(count: int, seed: int) -> list[str]:
    """Different numbers of four digits."""
    return [f"{number:04d}" for number in random.Random(seed).sample(range(10_000), count)]


def texts(path: Path, limit: int | None = None) -> dict[str, list[str]]:
    """Whole lines up to 130 characters and more: first 90 % train, then 5 % validation and 5 % test."""
    found, piece = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        piece = f"{piece}\n{line}".strip()
        if len(piece) >= 130:
            found.append(piece)
            piece = ""
    found = found[:limit]
    a, b = int(0.9 * len(found)), int(0.95 * len(found))
    return {"train": found[:a], "validation": found[a:b], "test": found[b:]}


def measure(options, sizes: Sizes) -> None:
    study = Study(options.data, options.work, sizes)
    teacher = study.teacher_measures()
    print(f"teacher: {teacher}", flush=True)
    rows: dict[str, list[Run]] = {row: [] for row in (*ROWS, *PUBLIC)}
    asked = [(row, seed) for seed in options.seed_list for row in rows]
    for row, seed in tqdm(asked, unit="run", disable=None):
        run = study.run(row, study.chosen(row), seed)
        rows[row].append(run)
        print(f"{row}, seed {seed}: { ({k: round(v, 3) for k, v in run.test.items()}) }", flush=True)
    result = {
        "teacher": teacher,
        "teacher_parameters": study.teacher.model.num_parameters(),
        "student_parameters": study.model(sizes.student, 0).num_parameters(),
        "sizes": vars(sizes),
        "rates": RATES,
        "largest_exposure": math.log2(sizes.values),
        "command": "python -m benchmarks.evidence_swing " + " ".join(_without_paths(options.argv)),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": {
            row: {"settings": (ROWS | PUBLIC)[row], "runs": [run.record() for run in runs]}
            for row, runs in rows.items()
        },
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "evidence_swing.json"
    path.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(argv: list[str]) -> list[str]:
    paths = ("--data", "--results", "--work")
    return ["DIR" if before in paths else flag for before, flag in zip(["", *argv], argv, strict=False)]


# ---- the card --------------------------------------------------------------------------------------------------------
def write_cards(results: Path, cards: Path = CARDS) -> None:
    """Fill model_cards/swing.md, which is begun where it is not there, and draw its picture."""
    path = results / "evidence_swing.json"
    if not path.is_file():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = {row: [Run(**run) for run in each["runs"]] for row, each in result["rows"].items()}
    picture(rows, result["teacher"], str(cards / "evidence_swing.png"), "Tiny Shakespeare with canaries", LABELS)
    card = cards / "swing.md"
    if not card.is_file():
        card.write_text(begun("swing"), encoding="utf-8")
    fill(card, section(result, rows))


def section(result: dict, rows: dict[str, list[Run]]) -> str:
    sizes, teacher, seeds = result["sizes"], result["teacher"], len(rows[KD])
    lines = [
        "### Tiny Shakespeare with canaries",
        "Pieces of about 130 characters of Tiny Shakespeare (public domain): first 90 % train, then 5 % validation "
        f"and 5 % test; {len(TEMPLATES)} canaries with a number of four digits, {sizes['repeats']} copies of "
        f"each among the training pieces. Exposure is exact over {sizes['values']:,} numbers each: "
        f"{result['largest_exposure']:.1f} is known by heart, 1.4 the mean of what is not known. Teacher: a Llama of "
        f"{result['teacher_parameters']:,} parameters, {sizes['teacher_steps']} steps on the text with canaries, test "
        f"cross-entropy {teacher['cross_entropy']:.4f}, mean exposure {teacher['exposure']:.2f}. Student: "
        f"{result['student_parameters']:,} parameters, untrained at the start; {seeds} paired seeds (initialisation "
        f"and order), {sizes['steps']} steps of {sizes['batch']}; learning rate one of "
        f"{', '.join(f'{rate:g}' for rate in result['rates'])}, chosen on validation with {sizes['tune_share']:.0%} of "
        "the steps; labels and soft targets weigh one half each. Rows on public text train on the same pieces without "
        "the canaries, at the learning rate of the same row with them.",
        "",
        "| row | settings | learning rate | mean exposure | largest | cross-entropy | KL to the teacher | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, runs in rows.items():
        settings = ", ".join(f"{k.removeprefix('swing_')} {v}" for k, v in result["rows"][row]["settings"].items())
        measures = ("exposure", "exposure_max", "cross_entropy", "teacher_kl")
        cells = [_mean([run.test[name] for run in runs]) for name in measures]
        seconds = statistics.mean(run.cpu_seconds for run in runs)
        lines.append(
            f"| {row} | {settings or 'defaults'} | {runs[0].learning_rate:g} | {' | '.join(cells)} | {seconds:.0f} |"
        )
    lines += ["", "Mean paired difference ± standard error (below 0: the first is better); a verdict needs 2.", ""]
    lines += ["| row | beside | exposure | verdict | cross-entropy | verdict |", "|---|---|---|---|---|---|"]
    for row, baseline in COMPARED:
        cells = []
        for name in LABELS:
            found = paired(rows, row, baseline, name)
            cells.append(f"{found.mean:+.4f} ± {found.standard_error:.4f} | {found.verdict}")
        lines.append(f"| {row} | {baseline} | {' | '.join(cells)} |")
    where = result["machine"]
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "absent")
    lines += ["", "![exposure and cross-entropy](evidence_swing.png)", ""]
    lines += [
        f"`{result['command']}` · {where['cpu']}, {where['cores']} cores, {where['threads']} threads · {installed} · "
        f"commit {result['commit']}"
    ]
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with one folder per set")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS - 1")
    parser.add_argument("--seed_list", type=int, nargs="+", help="only these, for processes side by side")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the teacher and of finished runs")
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    options.argv = list(sys.argv[1:] if argv is None else argv)
    options.seed_list = options.seed_list or list(range(options.seeds))
    quiet()
    if not options.cards:
        if options.data is None or not (options.data / "tinyshakespeare").is_dir():
            parser.error(f"--data must name a folder that holds tinyshakespeare/, got {options.data}")
        measure(options, sizes or Sizes())
    if options.results == RESULTS:
        write_cards(options.results)


if __name__ == "__main__":
    main()
