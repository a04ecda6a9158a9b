"""The command `hf-distill`."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field


def methods(flags: list[str]) -> None:
    """Print every method, those of installed packages included."""
    parser = argparse.ArgumentParser(prog="hf-distill methods", description=methods.__doc__)
    parser.add_argument("--markdown", action="store_true", help="as the table of docs/papers.md")
    options = parser.parse_args(flags)
    from hf_distill.methods import cards

    if options.markdown:
        return print(paper_table(cards()))
    for card in cards():
        paper = f"arXiv {card.arxiv}" if card.arxiv else str(card.year)
        origin = "" if not card.module else f"  [{card.module.split('.')[0]}]"
        print(f"{card.slug:18s} {card.kind:10s} {card.modality:12s} {paper:18s} {card.title}{origin}")
    return None


def paper_table(found) -> str:
    """An index of papers, by modality and year."""
    lines = ["| method | paper | year | of | runs | depends on the batch |", "|---|---|---|---|---|---|"]
    for card in sorted(found, key=lambda c: (c.modality, c.year, c.slug)):
        paper = f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title
        code, evidence = f"../hf_distill/methods/{card.slug}.py", f"../model_cards/{card.slug}.md"
        links = f"[`{card.slug}`]({code}), [card]({evidence})"
        coupled = "no" if card.couples_batch is None else card.couples_batch
        lines.append(f"| {links} | {paper} | {card.year} | {card.modality}, {card.kind} | `{card.entry}` | {coupled} |")
    return "\n".join(lines)


@dataclass
class CacheArguments:
    """What `hf-distill cache` adds to a recipe's flags; see `cache_teacher`."""

    mode: str = field(
        default="hidden",
        metadata={
            "help": "hidden: exact for every divergence and temperature. topk, sampled: smaller, one temperature. "
            "logits: all of them. scores: log p(label) of every loss row."
        },
    )
    k: int = field(default=64, metadata={"help": "Ids kept per row in mode topk."})
    draws: int = field(default=50, metadata={"help": "Draws per row in mode sampled."})
    alpha: float = field(default=1.0, metadata={"help": "Draws come from p^alpha / Z in mode sampled."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of the softmax in modes topk and sampled; training must use the same."}
    )
    cache_dtype: str = field(
        default="auto", metadata={"help": "Of stored floats: auto, bfloat16, float32, float16; int8 in mode hidden."}
    )
    positions: str = field(
        default="loss", metadata={"help": "Rows kept: loss (those that carry loss with these flags) or all."}
    )
    shard_examples: int = field(default=128, metadata={"help": "Examples per file: what a kill can cost."})


def cache(flags: list[str]) -> None:
    """Run a teacher once over the data that a recipe with the same flags would train on, and keep what it says."""
    from hf_distill.recipe import load_language_setup, parse
    from hf_distill.teachers import cache_teacher
    from hf_distill.training.trainers import DistillSFTTrainer

    script, recipe, args, model, settings = parse(CacheArguments, "cache", flags)
    if not recipe.tiny and (args.teacher_model_name_or_path is None or script.dataset_name is None):
        raise ValueError("say whose answers to keep, on which data: --teacher_model_name_or_path and --dataset_name")
    push, args.push_to_hub = args.push_to_hub, False
    if args.teacher_model_server_url is not None:
        args.teacher_top_k = settings.k
        args.teacher_store = args.teacher_store or os.path.join(args.output_dir, ".teacher_answers")
    setup = load_language_setup(script, recipe, args, model, make_student=stand_in)
    trainer = DistillSFTTrainer(
        setup.student,
        teacher=setup.teacher,
        args=args,
        train_dataset=setup.train,
        eval_dataset=setup.eval,
        processing_class=setup.processing_class,
    )
    folder = os.path.join(args.output_dir, "cache") if recipe.tiny else args.output_dir  # beside its stand-in models
    cached = cache_teacher(
        trainer.teacher,
        trainer,
        folder,
        mode=settings.mode,
        k=settings.k,
        draws=settings.draws,
        alpha=settings.alpha,
        temperature=settings.temperature,
        dtype=settings.cache_dtype,
        seed=args.seed,
        positions=settings.positions,
        batch_size=args.per_device_eval_batch_size,
        shard_examples=settings.shard_examples,
        num_workers=args.dataloader_num_workers,
    )
    if trainer.is_world_process_zero():
        size = sum(shard["bytes"] for shard in cached.manifest["shards"]) / 1e6
        print(f"{len(cached.store):,} documents, {size:,.1f} MB in {folder}")
        print(f"train with --teacher_model_name_or_path {folder}")
        if push:
            print(cached.push_to_hub(args.hub_model_id or args.output_dir.rstrip("/").split("/")[-1]))


def evaluate(flags: list[str]) -> None:
    """Measure a student beside its teacher on held-out data; takes a recipe's flags."""
    from hf_distill.recipe_evaluate import main

    main(flags)


def report(flags: list[str]) -> None:
    """Write report.html and report.png into a run's folder, finished or not."""
    parser = argparse.ArgumentParser(prog="hf-distill report", description=report.__doc__)
    parser.add_argument("run", help="the output folder of a run")
    from hf_distill.hub.report import write_report

    for path in write_report(parser.parse_args(flags).run):
        print(path)


def push(flags: list[str]) -> None:
    """Upload a run's student, also after an upload that failed."""
    parser = argparse.ArgumentParser(prog="hf-distill push", description=push.__doc__)
    parser.add_argument("run", help="the output folder of a run")
    parser.add_argument("--hub_model_id", help="default: the folder's name under your own account")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository does not exist yet")
    parser.add_argument("--revision", help="branch, created if need be; default main")
    options = parser.parse_args(flags)
    from hf_distill.hub.push import push_run

    done = push_run(options.run, options.hub_model_id, private=options.private, revision=options.revision)
    print(done.commit_url)


def stand_in(recipe, args, model, teacher) -> tuple:
    """A small student in place of the real one, whose tokenizer prepares the data and whose weights no one needs."""
    from transformers import AutoConfig, ProcessorMixin

    from hf_distill.recipe import named_student, small_student
    from hf_distill.training import compat

    if model.model_name_or_path is None and teacher.tokenizer is None:
        raise ValueError("say whose tokenizer prepares the data of a remote teacher: --model_name_or_path")
    processing_class = teacher.tokenizer
    if model.model_name_or_path is not None:
        processing_class = compat.load_processing_class(model.model_name_or_path, revision=model.model_revision)
    if isinstance(processing_class, ProcessorMixin):  # pictures are prepared as the student's own family does
        return named_student(recipe, args, model, teacher)
    config = teacher.config
    if config is None:  # behind an endpoint
        config = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    return small_student(config), processing_class


def main(argv: list[str] | None = None) -> None:
    from hf_distill import __version__

    parser = argparse.ArgumentParser(prog="hf-distill", description="Knowledge distillation for Hugging Face models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="list the methods", add_help=False).set_defaults(run=methods)
    commands.add_parser(
        "cache", help="keep what a teacher says of a dataset; takes a recipe's flags", add_help=False
    ).set_defaults(run=cache)
    commands.add_parser(
        "evaluate", help="measure a student beside its teacher; takes a recipe's flags", add_help=False
    ).set_defaults(run=evaluate)
    commands.add_parser("report", help="draw what a run did", add_help=False).set_defaults(run=report)
    commands.add_parser("push", help="upload a run's student", add_help=False).set_defaults(run=push)
    options, flags = parser.parse_known_args(argv)
    options.run(flags)


if __name__ == "__main__":
    main()
