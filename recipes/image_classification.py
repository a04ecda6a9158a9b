# /// script
# dependencies = ["hf-distill"]
# ///
"""Image classification with any baseline. Without flags: scikit-learn's digits and a teacher trained on the spot.

python recipes/image_classification.py --objective dkd
accelerate launch recipes/image_classification.py --config recipes/configs/vit_large_to_tiny_imagenet.yaml
"""

from hf_distill.recipe_classification import load_classification_setup, parse, run
from hf_distill.recipe_objectives import ObjectiveConfig, build_trainer


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(ObjectiveConfig, "image_classification", argv, task="image")
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
