# /// script
# dependencies = ["hf-distill"]
# ///
"""BD-KD: the teacher learns too. Without flags: the embedded classification data and teacher.

python recipes/bdkd.py
python recipes/bdkd.py --bdkd_emphasis 2
"""

from hf_distill.methods.bdkd import BDKDConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(BDKDConfig, "bdkd", argv)
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
