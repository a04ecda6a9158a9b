# /// script
# dependencies = ["hf-distill"]
# ///
"""LELP, for classifiers of few classes.

python recipes/lelp.py
accelerate launch recipes/lelp.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...
"""

from hf_distill.methods.lelp import LELPConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(LELPConfig, "lelp", argv, task="text")
    if recipe.tiny:
        config.lelp_num_subclasses = 1  # two examples of a class do not split into more
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
