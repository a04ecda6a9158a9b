# /// script
# dependencies = ["hf-distill"]
# ///
"""DDK. Without flags: the embedded teacher on three domains of text that come with Python.

python recipes/ddk.py
accelerate launch recipes/ddk.py --config recipes/configs/qwen1.5_14b_to_1.8b_ddk.yaml
"""

from hf_distill.methods.ddk import DDKConfig, build_trainer
from hf_distill.recipe import run
from hf_distill.recipe_domains import load_domain_setup, parse, perplexity_table


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(DDKConfig, "ddk", argv)
    setup = load_domain_setup(script, recipe, args, model, config)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    setup.eval = trainer.eval_dataset
    run(setup, trainer, args, script.dataset_name, table=perplexity_table)


if __name__ == "__main__":
    main()
