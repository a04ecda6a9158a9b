"""Evidence for teacher hacking: a controlled chain oracle -> teacher -> student, on fixed and on fresh answers.

    python -m benchmarks.evidence_hacking --data DIR --seeds 3          # DIR holds tinyshakespeare/input.txt
    python -m benchmarks.evidence_hacking --seed_list 3 4 --data DIR    # more seeds beside those that are there
    python -m benchmarks.evidence_hacking --cards                       # rewrite model_cards/ from the results

Every row trains the same first student of a seed on the same teacher for as many steps; the learning rate is chosen
from the same list by the proxy on validation prompts, with the first seed and fewer steps. Finished runs are kept under
runs/evidence/teacher_hacking/, so that a killed command goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PrinterCallback

from benchmarks.evidence_cards import CARDS, begun, fill
from benchmarks.harness import RESULTS, ROOT, commit, machine, rounded, versions
from hf_distill import DistillSFTConfig, FrozenTeacher, LocalTextTeacher
from hf_distill.curricula.responses import ROUND, FreshResponses, RenewResponses, answered, prompts_of
from hf_distill.demo import quiet
from hf_distill.embedded.hacking_chain import Chain, Shape, character_tokenizer, make_chain, make_oracle
from hf_distill.evaluation.comparison import Run, paired
from hf_distill.evaluation.hacking import fit_power_law, hacking_verdict, picture, sequence_divergence
from hf_distill.methods.teacher_hacking import TeacherHackingConfig, build_trainer
from hf_distill.training.hacking import TeacherHackingCallback

SLUG = "teacher_hacking"
OFFLINE, TEACHER, STUDENT = "offline", "online teacher", "online student"
ROWS = {
    OFFLINE: "one fixed answer of the teacher to each prompt",
    TEACHER: "a new answer of the teacher to each prompt in every epoch",
    STUDENT: "a new answer of the student, as it is then, to each prompt in every epoch",
}
WORK = ROOT / "runs" / "evidence" / SLUG


class Study:
    """One chain per seed, and the runs on it, kept as they come."""

    def __init__(self, options):
        self.options, self.shape = options, replace(Shape(), **options.shape)
        text = (Path(options.data) / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
        self.text, self.work = text[: options.characters], options.work
        self.tokenizer = character_tokenizer(text)
        self.chains: dict[int, Chain] = {}
        self.work.mkdir(parents=True, exist_ok=True)
        self._check_owner()
        self.oracle = self._oracle()

    def _check_owner(self) -> None:
        """Runs of other settings are not gone on with. Raises ValueError."""
        names = ("steps", "evaluate", "rates", "tune_share", "characters")
        owner = json.dumps(
            asdict(self.shape) | {name: getattr(self.options, name) for name in names}, sort_keys=True, indent=1
        )
        path = self.work / "settings.json"
        if not path.exists():
            path.write_text(owner)
        if path.read_text() != owner:
            raise ValueError(f"{self.work} holds runs of other settings: remove it, or give another --work")

    def _oracle(self) -> FrozenTeacher:
        folder = self.work / "oracle"
        if not (folder / "config.json").exists():
            oracle = make_oracle(self.text[: int(0.9 * len(self.text))], self.tokenizer, self.shape)
            part = folder.with_suffix(".part")
            oracle.model.save_pretrained(part)
            self.tokenizer.save_pretrained(part)
            part.rename(folder)
        return FrozenTeacher.from_pretrained(str(folder))

    def chain(self, seed: int) -> Chain:
        if seed not in self.chains:
            self.chains[seed] = make_chain(self.text, self.tokenizer, self.oracle, self.shape, seed)
        return self.chains[seed]

    def teacher_distance(self, seed: int) -> float:
        """Of the teacher itself from the oracle, per token, along the oracle's answers."""
        chain, shape = self.chain(seed), self.shape
        writer = LocalTextTeacher(chain.oracle, batch_size=512)
        rows = answered(writer, chain.validation["prompt"], max_new_tokens=shape.answer_tokens, seed=7919 + seed)
        rows = [row for row in rows["input_ids"] if len(row) == shape.prompt_tokens + shape.answer_tokens]
        ids = torch.tensor(rows)
        mask = torch.ones_like(ids[:, 1:])
        mask[:, : shape.prompt_tokens - 1] = 0
        with torch.no_grad():
            theirs, ours = (m.model(ids).logits[:, :-1] for m in (chain.oracle, chain.teacher))
        return sequence_divergence(theirs, ours, mask)["per_token"].item()

    def trainer(self, row: str, rate: float, seed: int, steps: int):
        chain = self.chain(seed)
        config = TeacherHackingConfig(
            data_source="online_teacher" if row == TEACHER else "offline",
            num_generations_per_prompt=1,
            answer_tokens=self.shape.answer_tokens,
            oracle_model_name_or_path=str(self.work / "oracle"),
            eval_answers=True,
            eval_sequences=self.shape.eval_prompts,
        )
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        args = DistillSFTConfig(
            output_dir=str(folder), max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", seed=seed,
            per_device_train_batch_size=32, per_device_eval_batch_size=512, weight_decay=0.0, max_length=None,
            eval_strategy="steps", eval_steps=self.options.evaluate, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = build_trainer(
            copy.deepcopy(chain.student), chain.teacher, chain.train, config, args,
            eval_dataset=chain.validation, processing_class=self.tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if row == STUDENT:
            self._learn_from_itself(trainer, prompts_of(chain.train), seed)
        return trainer

    def _learn_from_itself(self, trainer, prompts: list[str], seed: int) -> None:
        def write(round_: int):
            writer = LocalTextTeacher(trainer.model, self.tokenizer, batch_size=512)
            return answered(writer, prompts, max_new_tokens=self.shape.answer_tokens, seed=seed + ROUND * round_)

        trainer.train_dataset = FreshResponses(write(0), write)
        trainer.add_callback(RenewResponses(trainer.train_dataset))

    def run(self, row: str, rate: float, seed: int, steps: int) -> dict:
        """History of a run: {"row", "rate", "seed", "steps", "cpu_seconds", "history"}."""
        path = self.work / f"{row.replace(' ', '_')}-{rate:g}-{seed}-{steps}.json"
        if path.exists():
            return json.loads(path.read_text())
        trainer = self.trainer(row, rate, seed, steps)
        watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TeacherHackingCallback))
        trainer.evaluate()  # of the student as it starts
        first, busy = watch.history, time.process_time()
        trainer.train()
        history = {name: [*first[name], *values] for name, values in watch.history.items()}
        record = {"row": row, "rate": rate, "seed": seed, "steps": steps, "history": history}
        record["cpu_seconds"] = time.process_time() - busy
        path.with_suffix(".part").write_text(json.dumps(record))
        path.with_suffix(".part").rename(path)
        print(f"{row}, {rate:g}, seed {seed}, {steps} steps: {watch.summary()}", flush=True)
        return record

    def rate_of(self, row: str) -> float:
        """The rate whose student comes closest to the teacher on validation prompts, with fewer steps."""
        steps = max(round(self.options.tune_share * self.options.steps), 1)
        found = {rate: self.run(row, rate, self.options.first, steps) for rate in self.options.rates}
        return min(found, key=lambda rate: found[rate]["history"]["proxy"][-1])

    def result(self) -> dict:
        rates = {row: self.rate_of(row) for row in ROWS}
        runs = {row: [] for row in ROWS}
        for seed in self.options.seeds:
            for row, rate in rates.items():
                runs[row].append(self.run(row, rate, seed, self.options.steps))
        return {
            "steps": self.options.steps,
            "evaluate": self.options.evaluate,
            "rates": list(self.options.rates),
            "tune_share": self.options.tune_share,
            "shape": asdict(self.shape),
            "parameters": {
                name: model.num_parameters()
                for name, model in (
                    ("oracle", self.oracle.model),
                    ("teacher", self.chain(self.options.seeds[0]).teacher.model),
                    ("student", self.chain(self.options.seeds[0]).student),
                )
            },
            "teacher_golden": {str(seed): self.teacher_distance(seed) for seed in self.options.seeds},
            "command": "python -m benchmarks.evidence_hacking " + " ".join(_without_paths(self.options.argv)),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "rows": runs,
        }


def _without_paths(argv: list[str]) -> list[str]:
    """Folders of this machine replaced by DIR."""
    return [
        "DIR" if b in ("--data", "--results", "--work", "--out") else a for b, a in zip(["", *argv], argv, strict=False)
    ]


# ---- the card --------------------------------------------------------------------------------------------------------
def measures_of(run: dict) -> dict[str, float]:
    """What a run's history says: distances, verdicts (0 or 1), and the law of the proxy after warm-up."""
    history = run["history"]
    verdict = hacking_verdict(history["step"], history["proxy"], history["golden"])
    kept = [(s, p) for s, p in zip(history["step"], history["proxy"], strict=True) if s > 100]
    law = fit_power_law(*zip(*kept, strict=True)) if len(kept) > 3 else {"exponent": float("nan"), "flag_step": None}
    return {
        "proxy, end": history["proxy"][-1],
        "golden, lowest": min(history["golden"]),
        "golden, end": history["golden"][-1],
        "golden, rise": verdict["final_minus_best"],
        "hacking": float(verdict["hacking"]),
        "overfitting": float(verdict["overfitting"]),
        "exponent": law["exponent"],
        "left the law": float(law["flag_step"] is not None),
    }


def write_cards(results: Path = RESULTS, cards: Path = CARDS) -> None:
    """Fill the card and draw its picture from the results, where there are some."""
    path = results / "evidence_hacking.json"
    if not path.is_file():
        return
    result = json.loads(path.read_text(encoding="utf-8"))
    first = {row: runs[0]["history"] for row, runs in result["rows"].items()}
    picture(first, cards / "evidence_hacking.png", title=f"Tiny Shakespeare chain, seed {_seeds(result)[0]}")
    card = cards / f"{SLUG}.md"
    if not card.is_file():
        card.write_text(begun(SLUG), encoding="utf-8")
    fill(card, _section(result))


def _seeds(result: dict) -> list[int]:
    return [run["seed"] for run in result["rows"][OFFLINE]]


def _section(result: dict) -> str:
    rows = {
        row: [Run(row, r["rate"], r["seed"], r["steps"], test=measures_of(r)) for r in runs]
        for row, runs in result["rows"].items()
    }
    shape, seeds, sizes = result["shape"], _seeds(result), result["parameters"]
    epochs = result["steps"] * 32 / shape["prompts"]
    distance = _mean(list(result["teacher_golden"].values()))
    shown = ("proxy, end", "golden, lowest", "golden, end", "golden, rise", "exponent")
    counted = ("hacking", "overfitting", "left the law")
    lines = [
        "### A chain on Tiny Shakespeare, characters",
        f"Oracle: a Llama of {sizes['oracle']:,} parameters trained on the text; from then on it is the truth. "
        f"Teacher: {sizes['teacher']:,} parameters, {shape['teacher_steps']} steps on {shape['oracle_answers']:,} of "
        f"its answers ({shape['answer_tokens']} characters to {shape['prompt_tokens']}), at {distance} from the "
        f"oracle. Student: {sizes['student']:,}, begun by {shape['student_steps']} steps on the same answers. "
        f"{len(seeds)} paired seeds (teacher, student, prompts, draws), {result['steps']:,} steps of 32 answers to "
        f"{shape['prompts']:,} prompts ({epochs:.0f} epochs), forward KL, constant learning rate, one of "
        f"{', '.join(f'{rate:g}' for rate in result['rates'])}, chosen for every row by the proxy with the first "
        f"seed and {result['tune_share']:.0%} of the steps. Distances are nats per token along "
        f"{shape['eval_prompts']} fixed answers (the teacher's for the proxy, the oracle's for golden) to prompts "
        f"of the last tenth of the text, every {result['evaluate']} steps.",
        "",
        *(f"- {row}: {what}." for row, what in ROWS.items()),
        "",
        "| row | learning rate | "
        + " | ".join(shown)
        + " | "
        + " | ".join(f"{c}, runs" for c in counted)
        + " | CPU s |",
        "|---" * (3 + len(shown) + len(counted)) + "|",
    ]
    for row, runs in rows.items():
        cells = [_mean([run.test[m] for run in runs]) for m in shown]
        cells += [f"{sum(run.test[m] for run in runs):.0f} of {len(runs)}" for m in counted]
        seconds = statistics.mean(r["cpu_seconds"] for r in result["rows"][row])
        lines.append(f"| {row} | {runs[0].learning_rate:g} | {' | '.join(cells)} | {seconds:.0f} |")
    lines += ["", f"**In short.** {_in_short(rows)}", ""]
    lines += [
        "Mean paired difference ± standard error (below 0: the first row is closer); a verdict needs 3 seeds and 2",
        "standard errors.",
        "",
        "| row | beside | golden, end | verdict | golden, rise | verdict | proxy, end | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, baseline in ((TEACHER, OFFLINE), (STUDENT, OFFLINE)):
        cells = []
        for measure in ("golden, end", "golden, rise", "proxy, end"):
            found = paired(rows, row, baseline, measure)
            cells.append(f"{found.mean:+.4f} ± {found.standard_error:.4f} | {found.verdict}")
        lines.append(f"| {row} | {baseline} | {' | '.join(cells)} |")
    installed = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v != "absent")
    where = result["machine"]
    lines += [
        "",
        "![proxy and golden over steps, and golden over proxy](evidence_hacking.png)",
        "",
        f"`{result['command']}` · {where['cpu']}, {where['cores']} cores, {where['threads']} threads · {installed} · "
        f"commit {result['commit']}",
    ]
    return "\n".join(lines)


def _in_short(rows: dict[str, list[Run]]) -> str:
    """In words: where hacking showed, and which remedy beats fixed answers."""
    said = []
    for row, runs in rows.items():
        hacked, overfitted = (sum(run.test[m] for run in runs) for m in ("hacking", "overfitting"))
        said.append(f"{row}: hacking in {hacked:.0f} and ordinary overfitting in {overfitted:.0f} of {len(runs)} runs")
    words = {"beats": "beats {}", "loses to": "**loses to** {}", "not told apart": "**is not told apart from** {}"}
    for row in (TEACHER, STUDENT):
        found = paired(rows, row, OFFLINE, "golden, end")
        said.append(
            f"in the golden distance at the end, {row} {words[found.verdict].format(OFFLINE)} ({found.mean:+.4f} ± "
            f"{found.standard_error:.4f})"
        )
    return "; ".join(said) + "."


def _mean(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder that holds tinyshakespeare/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed_list", type=int, nargs="+", help="these seeds, beside those that are in the results")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--evaluate", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3])
    parser.add_argument("--tune_share", type=float, default=0.2)
    parser.add_argument("--characters", type=int, default=None, help="of the text; default: all")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON of changed sizes of the chain")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=CARDS, help="folder of the cards")
    parser.add_argument("--cards", action="store_true", help="only rewrite the card from the results")
    options = parser.parse_args(argv)
    options.argv = list(sys.argv[1:] if argv is None else argv)
    seeds = list(range(options.seeds)) if options.seed_list is None else options.seed_list
    path = options.results / "evidence_hacking.json"
    if options.seed_list is not None and path.is_file():
        seeds = sorted({*seeds, *_seeds(json.loads(path.read_text(encoding="utf-8")))})
    options.seeds, options.first = seeds, min(seeds)
    if not options.cards and (options.data is None or not (Path(options.data) / "tinyshakespeare").is_dir()):
        parser.error(f"--data must name a folder that holds tinyshakespeare/, got {options.data!r}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    quiet()
    if not options.cards:
        options.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rounded(Study(options).result()), indent=1, ensure_ascii=False)
        (options.results / "evidence_hacking.json").write_text(text + "\n", encoding="utf-8")
    write_cards(options.results, options.out)


if __name__ == "__main__":
    main()
