# /// script
# dependencies = ["hf-distill"]
# ///
"""MiniPLM: score a corpus by a teacher and a small reference, keep what the teacher finds more likely, and pre-train
students on it. Without flags: the embedded teacher on Python's own sources, a third of them with shuffled characters,
and a student on a random half beside that on the selected one.

python recipes/miniplm.py
accelerate launch recipes/miniplm.py --config recipes/configs/qwen1.5_1.8b_miniplm_200m.yaml

Without --model_name_or_path it only selects. A killed scoring goes on where it stopped; another --miniplm_ratio or
reference takes what stands in --scores_dir.
"""

from pathlib import Path

from hf_distill.methods.miniplm import select
from hf_distill.recipe_miniplm import described, load, parse, random_part, students, train


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(argv)
    loaded = load(script, recipe, args, model)
    made = select(
        loaded.train,
        loaded.teacher,
        loaded.reference,
        config,
        Path(args.output_dir) / "miniplm",
        text_column=args.dataset_text_field,
        scores_dir=recipe.scores_dir,
    )
    print(made.summary())
    name = described(made, script.dataset_name)
    for student, tokenizer, folder in students(recipe, args, model, loaded):
        train(student, tokenizer, folder, made.dataset, loaded, args, name)
    if loaded.embedded:
        data, folder = random_part(loaded, made, config, args.seed), Path(args.output_dir) / "random"
        for student, tokenizer, _ in students(recipe, args, model, loaded):
            print(f"beside it, as many steps on {len(data)} of all chunks drawn at random:")
            train(student, tokenizer, folder, data, loaded, args, script.dataset_name)


if __name__ == "__main__":
    main()
