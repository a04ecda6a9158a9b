# /// script
# dependencies = ["hf-distill"]
# ///
"""LLaVA-MoD, all stages. Without flags: scikit-learn's digits as questions, a teacher trained on the spot.

python recipes/llava_mod.py
accelerate launch recipes/llava_mod.py --config recipes/configs/llava_mod_1gpu.yaml
"""

from dataclasses import replace

from hf_distill.methods.llava_mod import LlavaModConfig, build_trainer, distill
from hf_distill.recipe_vlm import (
    evaluate,
    last_stage_arguments,
    load_vlm_setup,
    parse_vlm,
    rows_of_stage,
    run_last_stage,
    vlm_table,
)

EMBEDDED = {  # three to four minutes on one CPU core, the teacher's included
    "adaptor_max_steps": 60,
    "dense_max_steps": 300,
    "sparse_max_steps": 200,
    "preference_max_steps": 40,
    "adaptor_learning_rate": 2e-3,
    "dense_learning_rate": 2e-3,
    "sparse_learning_rate": 1e-3,
    "preference_learning_rate": 1e-4,
}


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse_vlm(LlavaModConfig, EMBEDDED, "llava_mod", argv)
    setup = load_vlm_setup(script, recipe, args, model)
    student, teacher, shared = setup.student, setup.teacher, {"processing_class": setup.processor}
    table = {"teacher": evaluate(teacher.model, setup), "student, untrained": evaluate(student, setup)}
    *first, last = config.stage_names()
    if first:
        mimic, resume = replace(config, stages=",".join(first)), args.resume_from_checkpoint
        data = {"caption_dataset": setup.captions, "sparse_dataset": setup.sparse}
        student = distill(student, teacher, setup.train, mimic, args, **data, **shared, resume_from_checkpoint=resume)
        table[f"student, after {first[-1]}"] = evaluate(student, setup)
    rows = rows_of_stage(last, student, setup, recipe, args)
    args = last_stage_arguments(args, config, last)
    trainer = build_trainer(student, teacher, rows, config, args, stage=last, **shared)
    student = run_last_stage(trainer, args, script.dataset_name)
    table[f"student, after {last}"] = evaluate(student, setup)
    if trainer.is_world_process_zero():
        print(vlm_table(table))


if __name__ == "__main__":
    main()
