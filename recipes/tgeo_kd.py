# /// script
# dependencies = ["hf-distill"]
# ///
"""TGeo-KD: a controller weighs teacher and label, example by example. Without flags: the embedded data and teacher.

python recipes/tgeo_kd.py
python recipes/tgeo_kd.py --tgeo_controller_lr 5e-3 --tgeo_controller_weight_decay 0
"""

from hf_distill.methods.tgeo_kd import TGeoKDConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(TGeoKDConfig, "tgeo_kd", argv)
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
