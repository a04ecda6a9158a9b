# /// script
# dependencies = ["hf-distill"]
# ///
"""TRG, for classifiers. Without flags: scikit-learn's digits.

python recipes/trg.py
accelerate launch recipes/trg.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from hf_distill.methods.trg import TRGConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(TRGConfig, "trg", argv)
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
