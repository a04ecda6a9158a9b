"""The example's recipe: flags, models, data, the embedded default and the table are hf_distill's.

python examples/plugin/recipe.py --last 0.2
"""

from handover_kd import HandoverConfig, build_trainer

from hf_distill.recipe import load_language_setup, parse, run


def main(argv: list[str] | None = None) -> None:
    script, recipe, args, model, config = parse(HandoverConfig, "handover_kd", argv)
    setup = load_language_setup(script, recipe, args, model)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


if __name__ == "__main__":
    main()
