# /// script
# dependencies = ["hf-distill"]
# ///
"""A student, its control that learns from the labels alone, and how closely both imitate the teacher.

python recipes/fidelity.py
accelerate launch recipes/fidelity.py --config recipes/configs/qwen2.5_7b_to_0.5b_fidelity.yaml
"""

import copy
import os
from dataclasses import replace

from hf_distill.methods.fidelity import FidelityConfig, build_trainer, evaluate, markdown_table
from hf_distill.recipe import load_language_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(FidelityConfig, "fidelity", argv)
    setup = load_language_setup(script, recipe, args, model)
    alone, alone_args, shared = copy.deepcopy(setup.student), copy.copy(args), setup.trainer_arguments
    alone_args.output_dir = os.path.join(args.output_dir, "control")
    labels = replace(config, fidelity_loss="labels", teacher_logit_noise_std=0.0)
    control = build_trainer(alone, setup.teacher, setup.train, labels, alone_args, **shared)
    control.train(resume_from_checkpoint=args.resume_from_checkpoint)
    control.save_model(alone_args.output_dir)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **shared)
    run(setup, trainer, args, script.dataset_name)
    rows, own = setup.train if setup.eval is None else setup.eval, {"processing_class": setup.processing_class}
    report = evaluate(trainer.student(), setup.teacher, rows, config, args, control=control.student(), **own)
    if trainer.is_world_process_zero():
        print(markdown_table(report))


if __name__ == "__main__":
    main()
