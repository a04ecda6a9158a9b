"""Evidence for DDK: perplexities of four domains under different mixtures, at equal tokens, over paired seeds.

    python -m benchmarks.evidence_ddk --data DIR --seeds 3     # DIR holds wikitext2/, tinyshakespeare/ and gsm8k/
    python -m benchmarks.evidence_ddk --cards                  # rewrite model_cards/ddk.md from the results

A teacher is trained on all domains, evenly mixed; students first on two of them only. Every row then trains the same
student on the same data with the same number of steps; rows differ in the mixture, and the first in having no teacher.
Finished runs are kept under runs/evidence/ddk/, so that a killed command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PrinterCallback

from benchmarks.classification import Records
from benchmarks.evidence_ddk_card import write_cards
from benchmarks.evidence_lm import model
from benchmarks.evidence_lm import texts as texts_of_set
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from hf_distill import DistillSFTConfig
from hf_distill.curricula.domains import with_domains
from hf_distill.demo import quiet
from hf_distill.embedded.corpus import stdlib_documents
from hf_distill.evaluation.comparison import Run, token_blocks
from hf_distill.methods.ddk import DDK, DDKConfig
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.domains import DomainMixtureTrainer

FORMAT = 1  # of the records: another one runs everything again
WORK = ROOT / "runs" / "evidence" / "ddk"
RATES = (1e-3, 2e-3, 4e-3)
ALONE, NATURAL, UNIFORM, OURS = "labels alone, natural", "KD, natural mixing", "KD, uniform mixing", "DDK"
ROWS: dict[str, dict] = {
    ALONE: {"mixing": "natural", "distil_gamma": 0.0},
    NATURAL: {"mixing": "natural"},
    UNIFORM: {"mixing": "uniform"},
    OURS: {},
}
CASES = {  # what a student does not know before -> what it does
    "wikitext2 and tinyshakespeare": ("gsm8k", "stdlib"),
    "wikitext2 and stdlib": ("gsm8k", "tinyshakespeare"),  # stdlib is what the teacher itself finds hardest
}
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sizes:
    """What is run; the tests take a smaller one."""

    teacher: tuple[int, int] = (128, 3)
    student: tuple[int, int] = (64, 2)
    teacher_steps: int = 1000
    pretrain_steps: int = 400
    known: tuple[str, ...] = ("gsm8k", "stdlib")
    steps: int = 240
    interval: int = 24
    batch: int = 16
    block: int = 64
    vocabulary: int = 1024
    validation: int = 48
    test: int = 150
    tune_share: float = 0.4
    characters: dict[str, int] = field(default_factory=lambda: {"stdlib": 1_500_000})


def wikitext(path: Path) -> dict[str, list[str]]:
    """Pieces of 2000 characters: first 90 % train, then 5 % validation and 5 % test."""
    text = path.read_text(encoding="utf-8")
    pieces = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    a, b = int(0.9 * len(pieces)), int(0.95 * len(pieces))
    return {"train": pieces[:a], "validation": pieces[a:b], "test": pieces[b:]}


def texts(folder: Path, sizes: Sizes) -> dict[str, dict[str, list[str]]]:
    """Per domain its train, validation and test texts."""
    limit = sizes.characters["stdlib"]
    stdlib = {
        part: [d["text"] for d in stdlib_documents(part, limit if part == "train" else limit // 10)] for part in PARTS
    }
    return {
        "gsm8k": texts_of_set("gsm8k", folder),
        "stdlib": stdlib,
        "tinyshakespeare": texts_of_set("tinyshakespeare", folder),
        "wikitext2": wikitext(folder / "wikitext2" / "valid.txt"),
    }


class Fixed(DDK):
    """A mixture that stays as it is; perplexities are measured all the same, for the picture."""

    def __init__(self, config: DDKConfig, domains: tuple[str, ...], mixing: str):
        super().__init__(config, domains)
        self.mixing = mixing

    def first_weights(self, natural: torch.Tensor) -> torch.Tensor:
        self.fixed = natural if self.mixing == "natural" else torch.full_like(natural, 1 / len(natural))
        return self.fixed

    def next_weights(self) -> torch.Tensor:
        return self.fixed


class Study:
    """Data, teacher, students and records of one size."""

    def __init__(self, data: Path, work: Path, sizes: Sizes):
        self.sizes, self.work, self.records = sizes, work, Records(work / "records")
        found = texts(data, sizes)
        start = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
        sample = [text for parts in found.values() for text in parts["train"][:200]]
        self.tokenizer = start.train_new_from_iterator(sample, sizes.vocabulary, show_progress=False)
        blocks = {
            name: {part: token_blocks(self.tokenizer, parts[part], sizes.block) for part in PARTS}
            for name, parts in found.items()
        }
        self.train = {name: parts["train"] for name, parts in blocks.items()}
        self.validation = {name: first(parts["validation"], sizes.validation) for name, parts in blocks.items()}
        self.test = {name: first(parts["test"], sizes.test) for name, parts in blocks.items()}
        self.teacher = FrozenTeacher.from_pretrained(str(self._teacher()))

    def trainer(
        self, settings: dict, student, teacher, steps: int, rate: float, seed: int, domains=None, interval=None
    ):
        """A trainer of a row, on all domains or on some."""
        sizes, domains = self.sizes, tuple(domains or self.train)
        settings = dict(settings)
        mixing = settings.pop("mixing", None)
        config = DDKConfig(ddk_interval=interval or sizes.interval, **settings)
        trainer = DomainMixtureTrainer(
            student,
            teacher=teacher,
            objective=DDK(config, domains) if mixing is None else Fixed(config, domains, mixing),
            domain_column="domain",
            train_dataset=with_domains({name: self.train[name] for name in domains}, "domain"),
            eval_dataset={name: self.validation[name] for name in domains},
            processing_class=self.tokenizer,
            args=DistillSFTConfig(
                output_dir=str(self.work / "runs"),
                max_steps=steps,
                learning_rate=rate,
                seed=seed,
                per_device_train_batch_size=sizes.batch,
                per_device_eval_batch_size=64,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                weight_decay=0.1,
                gradient_checkpointing=False,
                max_length=sizes.block,
                dataset_kwargs={"skip_prepare_dataset": True},
                save_strategy="no",
                logging_steps=config.ddk_interval,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _on_labels(self, folder: Path, shape: tuple[int, int], steps: int, rate: float, seed: int, domains) -> Path:
        """A model trained on the labels of some domains, evenly mixed; kept."""
        if not (folder / "config.json").exists():
            fresh, watcher = model(self.tokenizer, *shape, seed), model(self.tokenizer, 32, 1, 0)
            teacher = FrozenTeacher(watcher, self.tokenizer)  # only measured beside, never learnt from
            settings = {"mixing": "uniform", "distil_gamma": 0.0}
            trainer = self.trainer(settings, fresh, teacher, steps, rate, seed, domains, interval=steps)
            trainer.train()
            trainer.save_model(str(folder))
        return folder

    def _teacher(self) -> Path:
        sizes = self.sizes
        return self._on_labels(
            self.work / f"teacher-{sizes.teacher_steps}",
            sizes.teacher,
            sizes.teacher_steps,
            2e-3,
            100,
            tuple(self.train),
        )

    def student(self, seed: int) -> LlamaForCausalLM:
        """The student of a seed, trained on what it knows."""
        sizes = self.sizes
        folder = self.work / f"student-{'-'.join(sizes.known)}-{sizes.pretrain_steps}-{seed}"
        self._on_labels(folder, sizes.student, sizes.pretrain_steps, 4e-3, seed, sizes.known)
        return LlamaForCausalLM.from_pretrained(folder)

    def measured(self, trainer, data: dict[str, Dataset], *, teacher: bool = False) -> torch.Tensor:
        """Perplexities (N,) on these sets, of both models (2, N) where asked."""
        own, trainer.eval_dataset = trainer.eval_dataset, data
        try:
            return trainer.perplexities(teacher=teacher)
        finally:
            trainer.eval_dataset = own

    def run(self, row: str, rate: float, seed: int, *, tuning: bool = False) -> dict:
        """One student, or its record: Run's fields, and the weights and ratios of each round."""
        sizes = self.sizes
        steps = max(round(sizes.steps * (sizes.tune_share if tuning else 1)), 1)
        asked = {"format": FORMAT, "sizes": repr(sizes), "settings": ROWS[row], "steps": steps, "rate": rate}
        asked["seed"] = seed
        if found := self.records.read(row, asked):
            return found
        student = self.student(seed)
        trainer = self.trainer(ROWS[row], student, self.teacher, steps, rate, seed)
        begin, busy = time.perf_counter(), time.process_time()
        trainer.train()
        run = Run(row, rate, seed, steps, time.perf_counter() - begin, time.process_time() - busy)
        run.validation = self.measured(trainer, self.validation).log().mean().item()
        if not tuning:
            run.test = summary(list(self.train), *self.measured(trainer, self.test, teacher=True).tolist())
        logs = [log for log in trainer.state.log_history if "ddk/interval" in log]
        path = [{k: v for k, v in log.items() if k.startswith("ddk/")} for log in logs]
        found = {"run": run.record(), "rounds": path}
        self.records.write(row, asked, found)
        return found

    def chosen(self, row: str) -> float:
        """The learning rate that is best on validation, shortened, with the first seed."""
        return min(RATES, key=lambda rate: self.run(row, rate, 0, tuning=True)["run"]["validation"])

    def before(self, seed: int) -> dict[str, float]:
        """What a student has before the rows train it."""
        trainer = self.trainer(ROWS[UNIFORM], self.student(seed), self.teacher, 1, 0.0, seed)
        return summary(list(self.train), *self.measured(trainer, self.test, teacher=True).tolist())


def first(dataset: Dataset, count: int) -> Dataset:
    return dataset.select(range(min(count, len(dataset))))


def summary(names: list[str], student: list[float], teacher: list[float]) -> dict[str, float]:
    """Perplexities by domain, the worst and the mean, and the worst ratio to the teacher's."""
    ratios = [a / b for a, b in zip(student, teacher, strict=True)]
    own = {f"perplexity {name}": value for name, value in zip(names, student, strict=True)}
    own |= {f"teacher {name}": value for name, value in zip(names, teacher, strict=True)}
    return own | {"worst": max(student), "mean": statistics.mean(student), "worst_ratio": max(ratios)}


def measure(options, sizes: Sizes) -> None:
    cases = {}
    for case, known in CASES.items():
        study = Study(options.data, options.work, replace(sizes, known=known))
        rows: dict[str, list[dict]] = {row: [] for row in ROWS}
        asked = [(row, seed) for seed in options.seed_list for row in ROWS]
        for row, seed in tqdm(asked, unit="run", disable=None, desc=case):
            rows[row].append(study.run(row, study.chosen(row), seed))
            print(f"{case}, {row}, seed {seed}: {rows[row][-1]['run']['test']}", flush=True)
        made = {row: {"settings": ROWS[row], "runs": runs} for row, runs in rows.items()}
        cases[case] = {"known": known, "before": study.before(options.seed_list[0]), "rows": made}
    result = {
        "domains": list(study.train),
        "rows_of_domains": [len(part) for part in study.train.values()],
        "teacher_parameters": study.teacher.model.num_parameters(),
        "student_parameters": study.student(options.seed_list[0]).num_parameters(),
        "sizes": vars(sizes),
        "rates": RATES,
        "command": "python -m benchmarks.evidence_ddk " + " ".join(_without_paths(options.argv)),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "cases": cases,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "evidence_ddk.json"
    path.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(argv: list[str]) -> list[str]:
    paths = ("--data", "--results", "--work")
    return ["DIR" if before in paths else flag for before, flag in zip(["", *argv], argv, strict=False)]


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with one folder per set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed_list", type=int, nargs="+", help="these seeds instead of the first --seeds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    options.argv = list(sys.argv[1:] if argv is None else argv)
    options.seed_list = options.seed_list or list(range(options.seeds))
    quiet()
    if not options.cards:
        needed = ("wikitext2", "tinyshakespeare", "gsm8k")
        if options.data is None or not all((options.data / name).is_dir() for name in needed):
            parser.error(f"--data must name a folder that holds {', '.join(needed)}, got {options.data}")
        measure(options, sizes or Sizes())
    write_cards(options.results)


if __name__ == "__main__":
    main()
