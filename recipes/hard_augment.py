# /// script
# dependencies = ["hf-distill"]
# ///
"""HARD: an augmenter learns what the student cannot do yet. Without flags: the embedded pictures and teacher.

python recipes/hard_augment.py --hard_start_step 40
python recipes/hard_augment.py --hard_family pixel_mix
"""

from hf_distill.methods.hard_augment import HardAugmentConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(HardAugmentConfig, "hard_augment", argv, task="image")
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
