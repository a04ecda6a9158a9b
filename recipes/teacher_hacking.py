# /// script
# dependencies = ["hf-distill"]
# ///
"""Teacher hacking. Without flags: a small chain oracle -> teacher -> student on Python's sources, offline and online.

python recipes/teacher_hacking.py
accelerate launch recipes/teacher_hacking.py --config recipes/configs/teacher_hacking_qwen2.5.yaml
"""

import copy
import json
import os

from hf_distill.methods.teacher_hacking import TeacherHackingConfig, build_trainer
from hf_distill.recipe import EMBEDDED_DEFAULTS, RecipeArguments, is_embedded, load_language_setup, parse_as, run
from hf_distill.tiny import tiny_oracle
from hf_distill.training.config import DistillSFTConfig

CHAIN_DEFAULTS = EMBEDDED_DEFAULTS | {
    "max_steps": 500,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "eval_strategy": "steps",
    "eval_steps": 50,
    "logging_steps": 50,
    "max_length": 32,
    "disable_tqdm": True,
}


def main(argv: list[str] | None = None) -> None:
    kinds = (RecipeArguments, DistillSFTConfig)
    script, recipe, args, model, config = parse_as(kinds, CHAIN_DEFAULTS, TeacherHackingConfig, "teacher_hacking", argv)
    if is_embedded(script, args, model) and not recipe.tiny:
        return chain(args, config)
    setup = load_language_setup(script, recipe, args, model)
    if recipe.tiny:
        tiny_oracle(args, config)
    trainer = build_trainer(setup.student, setup.teacher, setup.train, config, args, **setup.trainer_arguments)
    run(setup, trainer, args, script.dataset_name)


def chain(args: DistillSFTConfig, config: TeacherHackingConfig) -> None:
    """The same student on fixed and on new answers of the same teacher; `hacking.png` shows both."""
    from hf_distill.embedded.corpus import stdlib_documents
    from hf_distill.embedded.hacking_chain import Shape, character_tokenizer, make_chain, make_oracle
    from hf_distill.evaluation.hacking import picture

    text = "\n".join(d["text"] for d in stdlib_documents("train", max_characters=400_000) if d["text"].isascii())
    shape, tokenizer, oracle_folder = (
        Shape(oracle_steps=300),
        character_tokenizer(text),
        os.path.join(args.output_dir, "oracle"),
    )
    print("training the oracle, then its imperfect teacher")
    oracle = make_oracle(text, tokenizer, shape, args.seed)
    oracle.model.save_pretrained(oracle_folder)
    tokenizer.save_pretrained(oracle_folder)
    made, found = make_chain(text, tokenizer, oracle, shape, args.seed), {}
    for source in ("offline", "online_teacher"):
        own = copy.copy(args)
        own.output_dir = os.path.join(args.output_dir, source)
        settings = dict(data_source=source, num_generations_per_prompt=1, answer_tokens=shape.answer_tokens)
        settings |= dict(eval_answers=True, oracle_model_name_or_path=oracle_folder)
        trainer = build_trainer(
            copy.deepcopy(made.student), made.teacher, made.train, TeacherHackingConfig(**vars(config) | settings), own,
            eval_dataset=made.validation, processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        found[source] = json.load(open(os.path.join(own.output_dir, "hacking.json"), encoding="utf-8"))
        print(f"{source}: {found[source]['summary']}")
    path = picture({s: f["history"] for s, f in found.items()}, os.path.join(args.output_dir, "hacking.png"))
    print(f"picture in {path}")


if __name__ == "__main__":
    main()
