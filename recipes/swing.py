# /// script
# dependencies = ["hf-distill"]
# ///
"""Swing distillation: private tokens are taught softly. Without flags: the embedded teacher and Python's own sources.

python recipes/swing.py
accelerate launch recipes/swing.py --config recipes/configs/qwen2.5_7b_to_0.5b_private.yaml
"""

from hf_distill.methods.swing import SwingConfig, build_trainer
from hf_distill.recipe import load_language_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(SwingConfig, "swing", argv)
    setup = load_language_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
