"""The promises as far as they speak of a method that selects data: it asks two models and leaves a data set.

What is promised of students (`clean_student`) and of evaluations (`quiet_evaluation`) is not asked of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
from collections.abc import Iterator

import torch
from accelerate import PartialState
from datasets import load_from_disk

from hf_distill.testing.promises import _config_parses, _Widest
from hf_distill.testing.runs import Case

ROWS = 17


def interface(case: Case) -> Iterator[str]:
    fields = dataclasses.fields(case.config_class)
    for field in fields:
        if not field.metadata.get("help"):
            yield f"{case.config_class.__name__}.{field.name} has no help"
    try:
        keywords = dict.fromkeys(("processing_class", "text_column", "teacher_options", "reference_options"))
        inspect.signature(case.module.select).bind(*range(5), **keywords)
    except (AttributeError, TypeError) as error:
        yield f"select(data, teacher, reference, config, output_dir, *, {', '.join(keywords)}): {error}"
    yield from _config_parses(case, fields)
    found = case.run(_selected, "interface")
    if not 0 < len(found["rows"]) < ROWS or found["saved"] != found["rows"]:
        yield f"select kept {len(found['rows'])} of {ROWS} texts and saved {len(found['saved'])}"


def exact_scaling(case: Case) -> Iterator[str]:
    reference = case.run(_selected, "scaling")
    for ranks, layout in ((1, case.setup.other_layout), (2, {})):
        found = case.run(_selected, f"scaling-{ranks}", layout, ranks=ranks)
        for ours in found if ranks > 1 else [found]:
            if ours["rows"] != reference["rows"] or not torch.allclose(ours["scores"], reference["scores"], atol=1e-5):
                yield f"what is selected depends on the layout {layout or ''} or on {ranks} ranks"


def exact_resume(case: Case) -> Iterator[str]:
    whole = case.run(_selected, "whole")
    if case.run(_selected, "killed", kill=3) is not None:
        yield "the run was to be killed while the teacher scores, but went on"
        return
    for text, resumed in (
        ("killed and run again", case.run(_selected, "killed")),
        ("again", case.run(_selected, "killed")),
    ):
        if resumed["rows"] != whole["rows"] or not torch.equal(resumed["scores"], whole["scores"]):
            yield f"{text}, it does not select what the uninterrupted run does"
        if resumed["calls"] >= whole["calls"]:
            yield f"{text}, it asks the teacher as often as if nothing stood: {resumed['calls']} times"


def distributed(case: Case) -> Iterator[str]:
    first, second = case.run(_selected, "two", ranks=2)
    if first["rows"] != second["rows"]:
        yield "two ranks select different rows"
    if 0 in (first["calls"], second["calls"]):
        yield "one of two ranks does nothing"


def frozen_teacher(case: Case) -> Iterator[str]:
    if case.run(_selected, "frozen")["moved"]:
        yield "a model that is only asked has moved, or has a gradient"


def no_wide_logits(case: Case) -> Iterator[str]:
    widest = case.run(_selected, "wide", case.setup.wide_layout, wide=case.setup.wide)["widest"]
    if widest:
        yield f"scoring makes a {widest[0]} tensor in {widest[1]}: read log-likelihoods through `losses.observe`"


CHECKS = {
    check.__name__: check
    for check in (interface, exact_scaling, exact_resume, distributed, frozen_teacher, no_wide_logits)
}


def _selected(case: Case, run: str, changes: dict | None = None, *, kill: int | None = None, wide: int = 0) -> dict:
    """What one call selects, and what it did to the models."""
    PartialState(cpu=True)
    size = {"vocab_size": wide} if wide else {}
    models = case.setup.teacher(**size), case.setup.student(**size)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    calls = []

    def count(module, inputs, output):
        calls.append(1)
        if kill is not None and len(calls) > kill:
            os.kill(os.getpid(), signal.SIGKILL)

    models[0].base_model.register_forward_hook(count)
    data, config = case.setup.dataset(64 if wide else ROWS), case.setup.config(case.config_class, **changes or {})
    folder = case.folder / run
    own = {tuple(p.shape) for model in models for p in model.parameters()}
    with _Widest(wide or 2**40, own, rows=2**20 // (4 * (wide or 1))) as mode:
        made = case.module.select(
            data, *models, config, folder, processing_class=case.setup.processing_class(), tile_megabytes=1
        )
    moved = any(
        not torch.equal(value, old[name])
        for m, old in zip(models, before, strict=True)
        for name, value in m.state_dict().items()
    ) or any(p.grad is not None for model in models for p in model.parameters())
    return {
        "rows": made.dataset[:],
        "saved": load_from_disk(str(folder / "selected"))[:],
        "scores": made.scores,
        "calls": len(calls),
        "moved": moved,
        "widest": mode.worst,
    }
