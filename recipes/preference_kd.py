# /// script
# dependencies = ["hf-distill"]
# ///
"""Preference distillation. Without flags: how Python's own sources go on, against lines of another place.

python recipes/preference_kd.py
python recipes/preference_kd.py --pairs student --sample_max_new_tokens 24
accelerate launch recipes/preference_kd.py --config recipes/configs/qwen2.5_7b_to_0.5b_preference.yaml
"""

from hf_distill.methods.preference_kd import PreferenceKDConfig, build_trainer
from hf_distill.recipe_preference import load_preference_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(PreferenceKDConfig, "preference_kd", argv)
    setup = load_preference_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
