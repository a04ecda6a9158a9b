# /// script
# dependencies = ["hf-distill"]
# ///
"""OFA-KD, for classifiers. Without flags: scikit-learn's digits.

python recipes/ofa_kd.py
accelerate launch recipes/ofa_kd.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from hf_distill.methods.ofa_kd import OFAConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(OFAConfig, "ofa_kd", argv)
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
