"""Evidence for the language-model methods: paired seeds, the same budget and the same tuning for every row.

    python -m benchmarks.evidence_lm --data DIR --set tinyshakespeare      # DIR holds tinyshakespeare/input.txt
    python -m benchmarks.evidence_lm --data DIR --set gsm8k                # DIR holds gsm8k/train_1000.jsonl
    python -m benchmarks.evidence_lm --cards                               # rewrite model_cards/ from the results

A teacher is trained on the set first. Every row trains the same student: learning rate chosen from the same three on
validation with the first seed, then run with all seeds. Results go to benchmarks/results/, pictures beside the cards.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from benchmarks.evidence_cards import CARDS, fill
from hf_distill.demo import quiet
from hf_distill.evaluation.comparison import MEASURES, Comparison, Run, paired, picture, times_longer, token_blocks
from hf_distill.methods.logit_kd import LogitKDConfig, build_objective
from hf_distill.methods.taid import TAID, TAIDConfig
from hf_distill.objectives import NextToken
from hf_distill.recipe import EMBEDDED
from hf_distill.teachers import FrozenTeacher

BLOCK = 64
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ALONE, ALONE_TIME, KL = "student alone", "student alone, equal time", "forward KL"
ROWS = {
    ALONE: NextToken,
    KL: lambda: build_objective(LogitKDConfig()),
    "reverse KL": lambda: build_objective(LogitKDConfig(divergence="reverse_kl")),
    "Hinton (T=2, labels 0.5)": lambda: build_objective(
        LogitKDConfig(temperature=2.0, t_squared=True, kd_weight=0.5, label_weight=0.5)
    ),
    "TAID": lambda: TAID(TAIDConfig()),
    ALONE_TIME: NextToken,
}
METHOD_ROWS = {"logit_kd": [KL, "reverse KL", "Hinton (T=2, labels 0.5)"], "taid": ["TAID"]}
BASELINES = {"logit_kd": [ALONE, ALONE_TIME], "taid": [KL, ALONE, ALONE_TIME]}
SETS = {
    "tinyshakespeare": "Tiny Shakespeare (plays, public domain): first 90 % train, then 5 % validation and 5 % test",
    "gsm8k": "GSM8K, 1,000 training problems with solutions (MIT): 800 train, 100 validation, 100 test",
}


def texts(name: str, folder: Path) -> dict[str, list[str]]:
    """Train, validation and test texts of a set."""
    if name == "tinyshakespeare":
        text = (folder / name / "input.txt").read_text(encoding="utf-8")
        a, b = int(0.9 * len(text)), int(0.95 * len(text))
        parts = {"train": text[:a], "validation": text[a:b], "test": text[b:]}
        return {k: [v[i : i + 2000] for i in range(0, len(v), 2000)] for k, v in parts.items()}
    lines = (folder / name / "train_1000.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [f"{r['question']}\n{r['answer']}" for r in map(json.loads, lines)]
    return {"train": rows[:800], "validation": rows[800:900], "test": rows[900:]}


def model(tokenizer, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.05,  # learns faster at this size than the default 0.02
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def study_of(name: str, options) -> Comparison:
    """Tokenizer, teacher and data of a set; the teacher is trained once and kept in runs/."""
    parts = texts(name, Path(options.data))
    folder = ROOT / "runs" / "evidence" / name
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tokenizer")
    tokenizer = tokenizer.train_new_from_iterator(parts["train"], 1024, show_progress=False)
    blocks = {k: token_blocks(tokenizer, v, BLOCK) for k, v in parts.items()}
    if not (folder / "teacher" / "config.json").exists():
        _train_teacher(tokenizer, blocks, folder, options)
    teacher = FrozenTeacher.from_pretrained(str(folder / "teacher"))
    return Comparison(
        teacher=teacher,
        objectives=ROWS,
        make_student=lambda seed: _student(tokenizer, blocks, folder, options, seed),
        **blocks,
        learning_rates=(5e-4, 1e-3, 2e-3) if options.pretrain else (1e-3, 2e-3, 4e-3),
        seeds=tuple(range(options.seeds)),
        output_dir=str(folder),
    )


def _student(tokenizer, blocks, folder: Path, options, seed: int) -> LlamaForCausalLM:
    """The small student; with --pretrain trained on the labels first, once per seed, at the rate best for it."""
    if not options.pretrain:
        return model(tokenizer, 96, 2, seed)
    path = folder / f"student-{options.pretrain}-{seed}"
    if not (path / "config.json").exists():
        study = Comparison(
            FrozenTeacher(model(tokenizer, 32, 1, 0), tokenizer), {"student": NextToken},
            lambda seed: model(tokenizer, 96, 2, seed), **blocks,
            learning_rates=(4e-3,), seeds=(seed,), output_dir=str(folder),
        )  # fmt: skip
        study.run("student", 4e-3, seed, options.pretrain).trainer.save_model(str(path))
    return LlamaForCausalLM.from_pretrained(path)


def _train_teacher(tokenizer, blocks, folder: Path, options) -> None:
    """A larger model on the labels alone, stopped at the best of a few lengths on validation."""
    seed_teacher = FrozenTeacher(model(tokenizer, 32, 1, 0), tokenizer)  # only measured beside, never learnt from
    best: Run | None = None
    for steps in options.teacher_steps:
        study = Comparison(
            seed_teacher, {"teacher": NextToken}, lambda seed: model(tokenizer, 192, 4, seed), **blocks,
            learning_rates=(2e-3,), seeds=(0,), output_dir=str(folder),
        )  # fmt: skip
        study.bar = tqdm(total=steps, unit="step")
        run = study.run("teacher", 2e-3, 0, steps)
        print(f"teacher, {steps} steps: validation {run.validation:.4f}", flush=True)
        if best is None or run.validation < best.validation:
            best = run
    best.trainer.save_model(str(folder / "teacher"))


def measure(name: str, options) -> None:
    study = study_of(name, options)
    teacher_ce = study.teacher_cross_entropy()
    print(f"teacher cross-entropy on test: {teacher_ce:.4f}", flush=True)
    rows: dict[str, list[Run]] = {}
    chosen = [ALONE, KL, "TAID", ALONE_TIME] if options.pretrain else list(ROWS)
    with tqdm(total=len(chosen) * study.runs_per_row * options.steps, unit="step") as study.bar:
        for row in chosen:
            longer = times_longer(rows[KL], rows[ALONE]) if row == ALONE_TIME else 1
            rows[row] = study.row(row, round(options.steps * longer))
            print(f"{row}: {[round(run.test['cross_entropy'], 4) for run in rows[row]]}", flush=True)
    result = {
        "set": name,
        "pretrained_steps": options.pretrain,
        "teacher_cross_entropy": teacher_ce,
        "teacher_parameters": study.teacher.model.num_parameters(),
        "student_parameters": rows[ALONE][0].student.num_parameters(),
        "command": "python -m benchmarks.evidence_lm " + " ".join(_without_paths(sys.argv[1:])),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "trl")},
        "rows": {row: [run.record() for run in runs] for row, runs in rows.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"evidence_{_label(result)}.json").write_text(json.dumps(result, indent=1) + "\n")


def _without_paths(argv: list[str]) -> list[str]:
    return ["DIR" if before == "--data" else arg for before, arg in zip(["", *argv], argv, strict=False)]


# ---- cards ----------------------------------------------------------------------------------------------------------
def write_cards() -> None:
    """Put the tables between the markers of each card; what stands around them is written by hand."""
    paths = (RESULTS / f"evidence_{name}{kind}.json" for name in sorted(SETS) for kind in ("", "_pretrained"))
    found = [json.loads(path.read_text()) for path in paths if path.is_file()]
    for result in found:
        rows = {row: [Run(**run) for run in runs] for row, runs in result["rows"].items()}
        path = str(CARDS / f"evidence_{_label(result)}.png")
        title = SETS[result["set"]].split(":")[0] + (", pretrained student" if result.get("pretrained_steps") else "")
        picture(rows, {"cross_entropy": result["teacher_cross_entropy"]}, path, title)
    for method, rows in METHOD_ROWS.items():
        fill(CARDS / f"{method}.md", "\n\n".join(_section(result, rows, BASELINES[method]) for result in found))


def _label(result: dict) -> str:
    return result["set"] + ("_pretrained" if result.get("pretrained_steps") else "")


def _section(result: dict, own: list[str], baselines: list[str]) -> str:
    rows = {row: [Run(**run) for run in runs] for row, runs in result["rows"].items()}
    own = [row for row in own if row in rows]
    seeds, name, before = len(rows[ALONE]), result["set"], result.get("pretrained_steps")
    start = f"trained on the labels for {before} steps before" if before else "untrained at the start"
    ratio = result["teacher_parameters"] / result["student_parameters"]
    lines = [
        f"### {name}" + (", pretrained student" if before else ""),
        f"{SETS[name]}. Teacher: a Llama trained on the same text, {result['teacher_parameters']:,} parameters, test "
        f"cross-entropy {result['teacher_cross_entropy']:.4f}. Student: {result['student_parameters']:,} parameters "
        f"({ratio:.1f} times smaller), {start}. {seeds} paired seeds (initialisation and data order), "
        f'{rows[KL][0].steps} steps of 16 × {BLOCK} tokens; "equal time": {rows[ALONE_TIME][0].steps} steps.',
        "",
        "| row | learning rate | cross-entropy | KL(teacher \\|\\| student) | agreement | tokens per CPU second |",
        "|---|---|---|---|---|---|",
    ]
    for row in dict.fromkeys([*baselines, *own]):
        cells = []
        for key in MEASURES:
            values = [run.test[key] for run in rows[row]]
            error = statistics.stdev(values) / len(values) ** 0.5
            cells.append(f"{statistics.mean(values):.4f} ± {error:.4f}")
        speed = statistics.mean(run.steps * 16 * BLOCK / run.cpu_seconds for run in rows[row])
        lines.append(f"| {row} | {rows[row][0].learning_rate:g} | {' | '.join(cells)} | {speed:,.0f} |")
    lines += [
        "",
        "Mean paired difference ± standard error (below 0: the method is better); a verdict needs 2 standard errors.",
        "",
    ]
    lines += [
        "| method | beside | cross-entropy | verdict | KL to the teacher | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in own:
        for baseline in baselines:
            ce, kl = paired(rows, row, baseline), paired(rows, row, baseline, "teacher_kl")
            lines.append(
                f"| {row} | {baseline} | {ce.mean:+.4f} ± {ce.standard_error:.4f} | {ce.verdict} "
                f"| {kl.mean:+.4f} ± {kl.standard_error:.4f} | {kl.verdict} |"
            )
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    lines += [
        "",
        f"![rows on {name}](evidence_{_label(result)}.png)",
        "",
        f"`{result['command']}` · {result['machine']} · {versions}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder with one folder per set")
    parser.add_argument("--set", choices=list(SETS), default="tinyshakespeare")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher_steps", type=int, nargs="+", default=[1500])
    parser.add_argument("--pretrain", type=int, default=0, help="train the student on the labels first, so many steps")
    parser.add_argument("--cards", action="store_true", help="only rewrite the cards from the results")
    options = parser.parse_args()
    quiet()
    if not options.cards:
        if options.data is None or not (Path(options.data) / options.set).is_dir():
            parser.error(f"--data must name a folder that holds {options.set}/, got {options.data!r}")
        measure(options.set, options)
    write_cards()


if __name__ == "__main__":
    main()
