"""`make demo`: a teacher becomes a smaller student, offline, beside the student that had no teacher.

All of it is on the machine: Python's own sources as text (held out by module) and a small pretrained teacher. Each row
chooses its learning rate from the same three on validation, then runs again with another seed and the same rate.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import warnings

from datasets import disable_progress_bars
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from hf_distill.embedded.corpus import stdlib_documents
from hf_distill.evaluation.comparison import MEASURES, Comparison, Run, picture, times_longer, token_blocks
from hf_distill.methods.logit_kd import LogitKDConfig, build_objective
from hf_distill.methods.taid import TAID, TAIDConfig
from hf_distill.objectives import NextToken
from hf_distill.recipe import EMBEDDED, small_student
from hf_distill.teachers import FrozenTeacher
from hf_distill.training.callbacks import SampleCompletionsCallback

BLOCK = 64
LEARNING_RATES = (2e-3, 4e-3, 6e-3)
SEEDS = (0, 1)
BUDGET_SECONDS = 290
ALONE, ALONE_TIME, KL, TAID_ROW = "student alone", "student alone, equal time", "forward KL", "TAID"
OBJECTIVES = {
    ALONE: NextToken,
    ALONE_TIME: NextToken,
    KL: lambda: build_objective(LogitKDConfig()),
    TAID_ROW: lambda: TAID(TAIDConfig()),
}
PROMPTS = ("def __init__(self, ", "import os\nimport sys\n\ndef main(", "    if not isinstance(")


def comparison(output_dir: str) -> Comparison:
    """The demo's models and data."""
    teacher = FrozenTeacher.from_pretrained(str(EMBEDDED / "teacher"))

    def blocks(split: str, max_characters: int | None = None):
        return token_blocks(teacher.tokenizer, [d["text"] for d in stdlib_documents(split, max_characters)], BLOCK)

    return Comparison(
        teacher=teacher,
        objectives=OBJECTIVES,
        make_student=lambda seed: small_student(teacher.config, seed),
        train=blocks("train"),
        validation=blocks("validation", 60_000),
        test=blocks("test", 80_000),
        learning_rates=LEARNING_RATES,
        seeds=SEEDS,
        warmup=0.1,
        adam_beta2=0.98,  # so few steps at such rates are unsteady with the default 0.999
        output_dir=output_dir,
    )


def steps_for(seconds: float, study: Comparison) -> tuple[int, float]:
    """How many steps fit the time, and how many times longer a step with a teacher takes than one without."""
    times: dict[str, float] = {}
    for row in (ALONE, KL, KL, ALONE):
        times[row] = min(times.get(row, math.inf), study.run(row, 1e-3, 0, 16).seconds / 16)
    ratio = max(times[KL] / times[ALONE], 1.0)
    steps = seconds / (study.runs_per_row * (times[ALONE] * (1 + ratio) + 2 * times[KL]))
    return int(min(max(steps, 40), 400)), ratio


def all_rows(study: Comparison, seconds: float) -> dict[str, list[Run]]:
    """Per row one run per seed, at the row's best learning rate."""
    print("Measuring this machine's speed ...", flush=True)
    steps, ratio = steps_for(seconds, study)
    print(
        f"{steps} steps of {study.batch * BLOCK} tokens a run; a step with the teacher takes {ratio:.1f} times as long."
    )
    total = round(steps * (3 + ratio)) * study.runs_per_row
    rows: dict[str, list[Run]] = {}
    with tqdm(total=total, unit="step", dynamic_ncols=True) as study.bar:
        for row in (ALONE, KL, TAID_ROW):
            rows[row] = study.row(row, steps)
        # by the time really spent; a crowded machine must not make the demo endless
        longer = round(steps * min(times_longer(rows[KL], rows[ALONE]), 2 * ratio))
        study.bar.total = (3 * steps + longer) * study.runs_per_row
        rows[ALONE_TIME] = study.row(ALONE_TIME, longer)
    return {row: rows[row] for row in OBJECTIVES}


def table(rows: dict[str, list[Run]], teacher_ce: float, teacher_parameters: int) -> str:
    """The comparison on held-out modules, mean over the seeds ± half their range."""
    columns = (
        ("cross-entropy", 18),
        ("KL to teacher", 18),
        ("agreement", 18),
        ("parameters", 12),
        ("tokens/s", 10),
        ("rate", 8),
    )
    head = " " * 28 + "".join(f"{name:>{width}s}" for name, width in columns)
    lines = [
        head,
        f"{'teacher':28s}" + "".join(f"{v:9.4f}{'':9s}" for v in (teacher_ce, 0, 1)) + f"{teacher_parameters:12,d}",
    ]
    for row, runs in rows.items():
        cells = []
        for key in MEASURES:
            values = [run.test[key] for run in runs]
            cells.append(f"{statistics.mean(values):9.4f} ±{(max(values) - min(values)) / 2:7.4f}")
        speed = statistics.mean(run.tokens_per_second for run in runs)
        parameters = runs[0].student.num_parameters()
        lines.append(
            f"{row:28s}"
            + "".join(f"{c:>18s}" for c in cells)
            + f"{parameters:12,d}{speed:10,.0f}{runs[0].learning_rate:8g}"
        )
    return "\n".join(lines)


def verdicts(rows: dict[str, list[Run]]) -> list[str]:
    """Where distillation helped and where it did not, seed by seed."""
    lines = []
    for row in (KL, TAID_ROW):
        for baseline in (ALONE, ALONE_TIME):
            for key, label, sign in (
                ("cross_entropy", "cross-entropy", 1),
                ("agreement", "agreement with the teacher", -1),
            ):
                gains = [sign * (b.test[key] - r.test[key]) for r, b in zip(rows[row], rows[baseline], strict=True)]
                word = "helps" if min(gains) > 0 else "does not help" if max(gains) <= 0 else "is not clear"
                shown = ", ".join(f"{gain:+.4f}" for gain in gains)
                at = "equal steps" if baseline == ALONE else "equal time"
                lines.append(f"{row} {word} in {label} at {at} (gain per seed: {shown})")
    return lines


def completions(rows: dict[str, list[Run]], study: Comparison) -> str:
    """What the teacher and the students write, side by side."""
    sampler = SampleCompletionsCallback(list(PROMPTS), max_new_tokens=32)
    models = {"teacher": study.teacher.model} | {row: rows[row][-1].student for row in (ALONE, KL, TAID_ROW)}
    texts = {name: sampler.complete(model, study.teacher.tokenizer) for name, model in models.items()}
    lines = []
    for i, prompt in enumerate(PROMPTS):
        lines.append(f"prompt {prompt!r}")
        lines += [f"  {name:14s} {texts[name][i]!r}" for name in models]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_distill.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=os.path.join("runs", "demo"))
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="Time for all runs together.")
    options = parser.parse_args()
    quiet()
    os.makedirs(options.output_dir, exist_ok=True)
    print("hf_distill demo: a small language model of Python source learns from a larger one. Everything is local.")
    study = comparison(options.output_dir)
    teacher_ce = study.teacher_cross_entropy()
    rows = all_rows(study, options.seconds)
    print(table(rows, teacher_ce, study.teacher.model.num_parameters()), end="\n\n")
    print("\n".join(verdicts(rows)), end="\n\n")
    ratio = math.exp(teacher_ce - statistics.mean(run.test["cross_entropy"] for run in rows[ALONE]))
    print(f"The teacher's perplexity is {ratio:.2f} times the student alone's.", end="\n\n")
    print(completions(rows, study), end="\n\n")
    save(rows, options.output_dir, teacher_ce, ratio)
    print(f"In {options.output_dir}: student/ (a folder for from_pretrained, with its card), demo.png, results.json")


def quiet() -> None:
    """One bar instead of every library's own."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("hf_distill").setLevel(logging.ERROR)


def save(rows: dict[str, list[Run]], output_dir: str, teacher_ce: float, ratio: float) -> None:
    """The better distilled student with its card, the picture and all figures."""
    best = min((KL, TAID_ROW), key=lambda row: statistics.mean(run.validation for run in rows[row]))
    trainer = rows[best][-1].trainer
    trainer.save_model()
    trainer.create_model_card(model_name="demo student", dataset_name="the Python standard library's sources")
    path, title = os.path.join(output_dir, "demo.png"), "Held-out modules of Python's standard library"
    picture(rows, {"cross_entropy": teacher_ce}, path, title)
    results = {
        "teacher_cross_entropy": teacher_ce,
        "perplexity_ratio": ratio,
        "rows": {row: [run.record() for run in runs] for row, runs in rows.items()},
    }
    with open(os.path.join(output_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
