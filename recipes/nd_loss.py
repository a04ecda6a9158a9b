# /// script
# dependencies = ["hf-distill"]
# ///
"""ND loss (KD++, DKD++, DIST++). Without flags: the embedded classification data and teacher.

python recipes/nd_loss.py
python recipes/nd_loss.py --base dkd --dkd_alpha 2 --nd_weight 0.5
"""

from hf_distill.methods.nd_loss import NDLossConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(NDLossConfig, "nd_loss", argv)
    setup = load_classification_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
