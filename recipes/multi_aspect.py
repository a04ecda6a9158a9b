# /// script
# dependencies = ["hf-distill"]
# ///
"""MaKD: yes/no questions about each picture as further targets. Without flags: the embedded digits, whose answers are
made from a table of what each digit looks like; for your own data run recipes/multi_aspect_annotate.py first.

python recipes/multi_aspect.py
accelerate launch recipes/multi_aspect.py --dataset_name annotated --model_name_or_path ...
"""

from hf_distill.curricula.annotation import COLUMN, templated_answers
from hf_distill.methods.multi_aspect import MultiAspectConfig, build_trainer
from hf_distill.recipe_classification import load_classification_setup, parse, run

DIGITS = {
    "Does it have a closed loop?": ("0", "6", "8", "9"),
    "Does it have two closed loops?": ("8",),
    "Is it drawn with straight strokes only?": ("1", "4", "7"),
    "Does it have a horizontal stroke at the top?": ("5", "7"),
    "Does it have a horizontal stroke at the bottom?": ("2",),
    "Is its lower half open to the left?": ("3", "5", "9"),
    "Is it mirror-symmetric from top to bottom?": ("0", "3", "8"),
}


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(MultiAspectConfig, "multi_aspect", argv, task="image")
    setup = load_classification_setup(script, recipe, args, model, keep=(COLUMN,))
    if setup.embedded:
        setup.train, setup.eval = (templated_answers(x, DIGITS, setup.names) for x in (setup.train, setup.eval))
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
