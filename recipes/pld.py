# /// script
# dependencies = ["hf-distill"]
# ///
"""PLD. Without flags: the embedded classification data and teacher.

python recipes/pld.py
python recipes/pld.py --pld_temperature 4
"""

from hf_distill.methods.pld import PLDConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(PLDConfig, "pld", argv)
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
