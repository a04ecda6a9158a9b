# /// script
# dependencies = ["hf-distill"]
# ///
"""Mixup in KD. Without flags: the embedded classification data and teacher.

python recipes/mix_kd.py
python recipes/mix_kd.py --mixup_fraction 0.5
"""

from hf_distill.methods.mix_kd import MixKDConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(MixKDConfig, "mix_kd", argv)
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
