"""What recipes on data of several domains share: the embedded default, made-up rows, and the table at the end."""

from __future__ import annotations

import math
import sys

from hf_distill import recipe as language
from hf_distill.recipe import Setup, language_table, load_language_setup

MADE_UP = ("first", "second")


def parse(config_class: type, method: str, argv: list[str] | None = None) -> tuple:
    """`recipe.parse`; intervals and validation sets are small where the run is."""
    script, recipe, args, model, config = language.parse(config_class, method, argv)
    given = {flag.split("=")[0] for flag in (sys.argv[1:] if argv is None else argv)}
    small = {}
    if recipe.tiny:
        small, given = {"ddk_interval": 1, "ddk_eval_samples": 1}, set()
    elif language.is_embedded(script, args, model):
        small = {"ddk_interval": 25, "ddk_eval_samples": 16}
    for name, value in small.items():
        if f"--{name}" not in given:
            setattr(config, name, value)
    return script, recipe, args, model, config


def load_domain_setup(script, recipe, args, model, config) -> Setup:
    """Models, tokenizer and data with the column `config.ddk_domain_column`.

    No validation set is cut from the whole: the method holds out rows of each domain itself, unless the data have a
    test split.
    """
    recipe.eval_examples = 0
    embedded = not recipe.tiny and language.is_embedded(script, args, model)
    setup = load_language_setup(script, recipe, args, model)
    if embedded:
        from hf_distill.embedded.domains import domain_dataset

        setup.train, setup.eval = domain_dataset(), None
    elif recipe.tiny:
        names = [MADE_UP[i % 2] for i in range(len(setup.train))]
        setup.train, setup.eval = setup.train.add_column("domain", names), None
    if (embedded or recipe.tiny) and config.ddk_domain_column != "domain":
        setup.train = setup.train.rename_column("domain", config.ddk_domain_column)
    return setup


def perplexity_table(setup: Setup, before: dict[str, float], after: dict[str, float]) -> str:
    """Each domain's perplexity before and after, below what all language models' runs print."""
    lines = [language_table(setup, before, after)]
    for key in sorted(k for k in after if k.startswith("eval_") and k.endswith("_cross_entropy")):
        start = f"{math.exp(before[key]):10.2f}" if key in before else " " * 10
        name = key.removeprefix("eval_").removesuffix("_cross_entropy")
        lines.append(f"{'perplexity on ' + name:34s} {start} -> {math.exp(after[key]):8.2f}")
    return "\n".join(lines)
