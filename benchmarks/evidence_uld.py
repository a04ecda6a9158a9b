"""Evidence for distillation across tokenizers: a byte-level BPE teacher, a student with Unigram tokens of its own.

    python -m benchmarks.evidence_uld --data DIR --seeds 3        # DIR holds tinyshakespeare/input.txt
    python -m benchmarks.evidence_uld --cards                     # rewrite model_cards/uld.md from the results

The teacher is that of evidence_lm. Every row trains the same student on the same pieces of text in the same order, with
cross-entropy beside its distance. Finished runs are kept under runs/evidence/uld/, so that a killed command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed

from benchmarks.evidence_cards import CARDS, fill
from benchmarks.evidence_lm import texts
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from hf_distill import ULD, DistillSFTConfig, DistillSFTTrainer
from hf_distill.curricula.alignment import align_answers
from hf_distill.demo import quiet
from hf_distill.evaluation.comparison import Run, paired, picture
from hf_distill.losses.cross_tokenizer import matched_ids
from hf_distill.objectives import NextToken
from hf_distill.teachers import FrozenTeacher

FORMAT = 1  # of the records: another one runs everything again
TEACHER = ROOT / "runs" / "evidence" / "tinyshakespeare" / "teacher"
WORK = ROOT / "runs" / "evidence" / "uld"
RATES = (4e-3, 8e-3)
ALONE, PLAIN, HYBRID = "student alone", "ULD", "hybrid ULD"
ROWS: dict[str, dict | None] = {ALONE: None, PLAIN: {}, HYBRID: {"hybrid": True, "beta": 0.0, "weight": 2.0}}
MEASURE = "nats_per_byte"
LABELS = {MEASURE: "cross-entropy (nats per byte), lower"}


@dataclass(frozen=True)
class Sizes:
    """Of the study; the tests' are smaller."""

    vocabulary: int = 1024
    hidden: int = 96
    layers: int = 2
    steps: int = 150
    batch: int = 8
    piece: int = 130  # characters, at least
    tune_share: float = 0.4
    limit: int | None = None  # pieces of each part


def pieces(parts: dict[str, list[str]], sizes: Sizes) -> dict[str, list[str]]:
    """Whole lines up to `sizes.piece` characters and more."""
    found: dict[str, list[str]] = {}
    for name, chunks in parts.items():
        piece, own = "", []
        for line in "".join(chunks).splitlines():
            piece = f"{piece}\n{line}".strip()
            if len(piece) >= sizes.piece:
                own.append(piece)
                piece = ""
        found[name] = own[: sizes.limit]
    return found


def unigram(train: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A Unigram model over bytes: no text is out of its vocabulary, and it spells tokens as byte-level BPE does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


class Study:
    """Both sides' tokenizers, the aligned text, and one student per row, rate and seed."""

    def __init__(self, data: Path, work: Path, sizes: Sizes, teacher: FrozenTeacher):
        self.work, self.sizes, self.teacher = work, sizes, teacher
        self.work.mkdir(parents=True, exist_ok=True)
        self.texts = pieces(texts("tinyshakespeare", data), sizes)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        path = self.work / f"tokenizer-{self.sizes.vocabulary}"
        if not path.exists():  # training it twice may give two
            unigram(self.texts["train"], self.sizes.vocabulary).save_pretrained(path)
        return PreTrainedTokenizerFast.from_pretrained(path)

    @cached_property
    def data(self) -> dict[str, Dataset]:
        pair = (self.tokenizer, self.teacher.tokenizer)
        return {name: align_answers(Dataset.from_dict({"text": own}), *pair) for name, own in self.texts.items()}

    def student(self, seed: int) -> LlamaForCausalLM:
        set_seed(seed)
        size = self.sizes.hidden
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=size,
                intermediate_size=size * 8 // 3,
                num_hidden_layers=self.sizes.layers,
                num_attention_heads=max(size // 32, 1),
                num_key_value_heads=max(size // 32, 1),
                max_position_embeddings=512,
                tie_word_embeddings=True,
                initializer_range=0.05,  # learns faster at this size than the default 0.02
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )

    def trainer(self, row: str, model, tokenizer, steps: int, rate: float, seed: int) -> DistillSFTTrainer:
        args = DistillSFTConfig(
            output_dir=str(self.work / "student"),
            max_steps=steps,
            learning_rate=rate,
            seed=seed,
            per_device_train_batch_size=self.sizes.batch,
            per_device_eval_batch_size=32,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.1,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        settings = ROWS[row]
        trainer = DistillSFTTrainer(
            model,
            teacher=None if settings is None else self.teacher,
            objective=NextToken() if settings is None else ULD(**settings),
            args=args,
            train_dataset=self.part("train", settings is None),
            eval_dataset=self.part("validation", settings is None),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def part(self, name: str, alone: bool) -> Dataset:
        return self.data[name].select_columns(["input_ids", "labels"]) if alone else self.data[name]

    def per_byte(self, name: str, mean: float, column: str = "labels") -> float:
        """A mean over predicted tokens as nats per byte of the text."""
        predicted = sum(len(ids) - 1 for ids in self.data[name][column])  # nothing predicts the first
        return mean * predicted / sum(len(piece.encode()) for piece in self.texts[name])

    def run(self, row: str, rate: float, seed: int, *, tuning: bool = False) -> Run:
        """One student; the record of it where it was trained before."""
        steps = max(1, round(self.sizes.steps * (self.sizes.tune_share if tuning else 1)))
        record = self.work / f"{row.replace(' ', '_')}-{rate:g}-{seed}-{steps}.json"
        asked = {"format": FORMAT, "sizes": repr(self.sizes), "settings": ROWS[row]}
        if record.exists() and (found := json.loads(record.read_text()))["asked"] == asked:
            return Run(**found["run"])
        trainer = self.trainer(row, self.student(seed), self.tokenizer, steps, rate, seed)
        begin, busy = time.perf_counter(), time.process_time()
        trainer.train()
        run = Run(row, rate, seed, steps, time.perf_counter() - begin, time.process_time() - busy)
        measured = {}
        for name in ("validation",) if tuning else ("validation", "test"):
            mean = trainer.evaluate(self.part(name, ROWS[row] is None))["eval_cross_entropy"]
            measured[name] = self.per_byte(name, mean)
        run.validation = measured["validation"]
        run.test = {MEASURE: measured.get("test", float("nan"))}
        record.write_text(json.dumps({"asked": asked, "run": run.record()}))
        return run

    def chosen(self, row: str) -> float:
        """The learning rate that is best on validation, shortened, with the first seed."""
        return min(RATES, key=lambda rate: self.run(row, rate, 0, tuning=True).validation)

    def teacher_per_byte(self) -> float:
        own = {"input_ids": "teacher_input_ids", "labels": "teacher_labels"}
        test = self.data["test"].select_columns(list(own.values())).rename_columns({v: k for k, v in own.items()})
        trainer = self.trainer(ALONE, self.teacher.model, self.teacher.tokenizer, 1, 0.0, 0)
        mean = trainer.evaluate(test)["eval_cross_entropy"]
        trainer.student()  # takes the objective off the teacher's model again
        return self.per_byte("test", mean, "teacher_labels")

    def matched(self) -> float:
        """Share of the teacher's vocabulary that the student's holds, too."""
        theirs = self.teacher.vocabulary_size()
        vocabularies = self.tokenizer.get_vocab(), self.teacher.tokenizer.get_vocab()
        return len(matched_ids(*vocabularies, len(self.tokenizer), theirs)[0]) / theirs


def measure(options, sizes: Sizes) -> None:
    teacher = FrozenTeacher.from_pretrained(str(options.teacher))
    study = Study(options.data, options.work, sizes, teacher)
    rows: dict[str, list[Run]] = {row: [] for row in ROWS}
    for row, seed in tqdm([(row, seed) for seed in options.seed_list for row in rows], unit="run", disable=None):
        run = study.run(row, study.chosen(row), seed)
        rows[row].append(run)
        print(f"{row}, seed {seed}, rate {run.learning_rate:g}: {run.test[MEASURE]:.4f}", flush=True)
    result = {
        "teacher": {MEASURE: study.teacher_per_byte()},
        "teacher_parameters": teacher.model.num_parameters(),
        "student_parameters": study.student(0).num_parameters(),
        "vocabularies": [len(study.tokenizer), teacher.vocabulary_size()],
        "matched": study.matched(),
        "sizes": vars(sizes),
        "rates": RATES,
        "command": "python -m benchmarks.evidence_uld " + " ".join(_without_paths(options.argv)),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": {row: [run.record() for run in runs] for row, runs in rows.items()},
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "evidence_uld.json").write_text(json.dumps(rounded(result), indent=1) + "\n")


def _without_paths(argv: list[str]) -> list[str]:
    paths = ("--data", "--teacher", "--results", "--work")
    return ["DIR" if before in paths else flag for before, flag in zip(["", *argv], argv, strict=False)]


# ---- the card -------------------------------------------------------------------------------------------------------
def write_cards(results: Path, cards: Path = CARDS) -> None:
    """Put table and picture between the markers of model_cards/uld.md."""
    path = results / "evidence_uld.json"
    if not path.is_file():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = {row: [Run(**run) for run in runs] for row, runs in result["rows"].items()}
    picture(rows, result["teacher"], str(cards / "evidence_uld.png"), "Across tokenizers: Tiny Shakespeare", LABELS)
    sizes, (ours, theirs) = result["sizes"], result["vocabularies"]
    lines = [
        f"Teacher: a Llama of {result['teacher_parameters']:,} parameters with byte-level BPE ({theirs:,} tokens), "
        f"{result['teacher'][MEASURE]:.4f} nats per byte on the test text. Student: {result['student_parameters']:,} "
        f"parameters, untrained, with a Unigram tokenizer trained on the same text ({ours:,} tokens; "
        f"{result['matched']:.0%} of the teacher's tokens have a namesake). Tiny Shakespeare in pieces of "
        f"{sizes['piece']} characters and more, first 90 % train, 5 % validation, 5 % test. {len(rows[ALONE])} paired "
        f"seeds (initialisation and order), {sizes['steps']} steps of {sizes['batch']} pieces; cross-entropy with "
        f"weight 1 in every row; learning rate the best of {', '.join(f'{r:g}' for r in result['rates'])} on "
        "validation for each row (first seed, shortened).",
        "",
        "| row | settings | learning rate | nats per byte | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for row, runs in rows.items():
        values, seconds = [run.test[MEASURE] for run in runs], statistics.mean(run.cpu_seconds for run in runs)
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        settings = ", ".join(f"{name} {value}" for name, value in (ROWS[row] or {}).items())
        lines.append(
            f"| {row} | {settings or 'defaults'} | {runs[0].learning_rate:g} | {statistics.mean(values):.4f} ± "
            f"{error:.4f} | {seconds:.0f} |"
        )
    lines += ["", "Mean paired difference ± standard error (below 0: better); a verdict needs 2 standard errors.", ""]
    lines += ["| row | beside | nats per byte | verdict |", "|---|---|---|---|"]
    for row, beside in ((PLAIN, ALONE), (HYBRID, ALONE), (HYBRID, PLAIN)):
        found = paired(rows, row, beside, MEASURE)
        lines.append(f"| {row} | {beside} | {found.mean:+.4f} ± {found.standard_error:.4f} | {found.verdict} |")
    where = result["machine"]
    facts = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version != "absent")
    lines += ["", "![rows](evidence_uld.png)", ""]
    lines.append(
        f"`{result['command']}` · {where['cpu']}, {where['cores']} cores, {where['threads']} threads · {facts} · "
        f"commit {result['commit']}"
    )
    fill(cards / "uld.md", "\n".join(lines))


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder that holds tinyshakespeare/input.txt")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="made by evidence_lm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed_list", type=int, nargs="+", help="instead of the first --seeds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    options.seed_list = options.seed_list or list(range(options.seeds))
    quiet()
    if not options.cards:
        if options.data is None or not (options.data / "tinyshakespeare" / "input.txt").is_file():
            parser.error(f"--data must name a folder that holds tinyshakespeare/input.txt, got {options.data}")
        if not (options.teacher / "config.json").is_file():
            parser.error(f"no teacher in {options.teacher}: python -m benchmarks.evidence_lm makes it")
        measure(options, sizes or Sizes())
    if options.results == RESULTS:
        write_cards(options.results)


if __name__ == "__main__":
    main()
