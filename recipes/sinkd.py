# /// script
# dependencies = ["hf-distill"]
# ///
"""SinKD, for classifiers of texts (and, with --task image, of images).

python recipes/sinkd.py
accelerate launch recipes/sinkd.py --config recipes/configs/bert_to_distilbert_rte.yaml
"""

from hf_distill.methods.sinkd import SinKDConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(SinKDConfig, "sinkd", argv, task="text")
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
