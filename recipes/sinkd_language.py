# /// script
# dependencies = ["hf-distill"]
# ///
"""SinKD, for language models. Without flags: the embedded teacher and Python's own sources.

python recipes/sinkd_language.py
accelerate launch recipes/sinkd_language.py --config recipes/configs/qwen2.5_7b_to_0.5b_sinkd.yaml
"""

from hf_distill.methods.sinkd import SinKDConfig, build_trainer
from hf_distill.recipe import load_language_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(SinKDConfig, "sinkd_language", argv)
    setup = load_language_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
