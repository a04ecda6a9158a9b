"""`hf-distill evaluate` of every task on one set, with several batch sizes; rank 0 prints what it found."""

import json
import sys
from pathlib import Path

from hf_distill.recipe_evaluate import main

FLAGS = {
    "language": ["--generate", "--answer_extractor", "exact", "--answer_tokens", "4", "--fidelity", "--topk", "1", "3"],
    "vlm": ["--generate", "--answer_tokens", "3"],
    "image": ["--fidelity"],
    "text": ["--fidelity"],
}


def run(folder: Path, batches: list[int]) -> dict:
    found = {}
    for task, more in FLAGS.items():
        models = folder / task
        named = [
            "--model_name_or_path",
            str(models / "student"),
            "--teacher_model_name_or_path",
            str(models / "teacher"),
        ]
        for batch in batches:
            out = folder / f"out-{task}-{batch}"
            flags = ["--task", task, *named, "--dataset_name", str(models / "data"), "--output_dir", str(out), *more]
            flags += ["--speed_rows", "0", "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]
            metrics = main([*flags, "--per_device_eval_batch_size", str(batch)])
            if metrics:
                report = out / "fidelity.json"
                scores = json.loads(report.read_text())["student"] if report.exists() else {}
                found[f"{task} {batch}"] = metrics | {f"fidelity {name}": value for name, value in scores.items()}
    return found


if __name__ == "__main__":
    found = run(Path(sys.argv[1]), [int(batch) for batch in sys.argv[2].split(",")])
    if found:
        print("FOUND " + json.dumps(found))
