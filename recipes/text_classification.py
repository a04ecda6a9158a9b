# /// script
# dependencies = ["hf-distill"]
# ///
"""Text classification with any baseline. Without flags: from which package of Python a snippet of source is.

python recipes/text_classification.py --objective dkd
accelerate launch recipes/text_classification.py --config recipes/configs/bert_large_to_minilm_sst2.yaml
"""

from hf_distill.recipe_classification import load_classification_setup, parse, run
from hf_distill.recipe_objectives import ObjectiveConfig, build_trainer


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(ObjectiveConfig, "text_classification", argv, task="text")
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
