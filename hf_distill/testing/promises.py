"""Promises about what a run gives. Each check yields what differs, and nothing when its promise is kept."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HfArgumentParser
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_distill.heads import has_row_labels
from hf_distill.objectives import Objective
from hf_distill.testing.runs import Case, difference, evaluation, outcome, weights

KEYWORDS = ("eval_dataset", "processing_class", "data_collator", "callbacks", "peft_config", "compute_metrics")


# ---- interface -------------------------------------------------------------------------------------------------------
def interface(case: Case) -> Iterator[str]:
    fields = dataclasses.fields(case.config_class)
    for field in fields:
        if not field.metadata.get("help"):
            yield f"{case.config_class.__name__}.{field.name} has no help"
    if not callable(getattr(case.module, case.card.entry, None)):
        yield f"its card's entry {case.card.entry!r} is no function of {case.module.__name__}"
    for name in ("build_trainer", "distill"):
        extra = {"resume_from_checkpoint"} if name == "distill" else set()
        try:
            function = getattr(case.module, name)
            inspect.signature(function).bind(*range(5), **dict.fromkeys({*KEYWORDS} | extra))
        except (AttributeError, TypeError) as error:
            yield f"{name}(student, teacher, train_dataset, config, args, *, {', '.join(KEYWORDS)}): {error}"
    yield from _config_parses(case, fields)
    yield from case.run(_distilled)


def _config_parses(case: Case, fields) -> Iterator[str]:
    default = case.setup.config(case.config_class)
    given = {f.name: value for f in fields if f.init and (value := getattr(default, f.name)) is not None}
    simple = {name: value for name, value in given.items() if isinstance(value, (bool, int, float, str))}
    try:
        parser = HfArgumentParser((case.config_class,))
        line = [word for name, value in simple.items() for word in (f"--{name}", str(value))]
        if parser.parse_args_into_dataclasses(args=line)[0] != default:
            yield "its config from the command line is not the one that was given"
        path = case.folder / "config.yaml"
        path.write_text(yaml.safe_dump(given), encoding="utf-8")
        if parser.parse_yaml_file(str(path))[0] != default:
            yield "its config from YAML is not the one that was given"
        # raises where a field has the name of one of theirs
        TrlParser((ScriptArguments, type(case.arguments("parsed")), ModelConfig, case.config_class))
    except Exception as error:
        yield f"its config does not parse beside TRL's: {type(error).__name__}: {error}"
    numbers = [name for name, value in given.items() if isinstance(value, float)]
    if numbers:
        try:
            dataclasses.replace(default, **dict.fromkeys(numbers, float("nan")))
            yield f"its config takes NaN for {', '.join(numbers)}: check values in __post_init__"
        except ValueError:
            pass


def _distilled(case: Case) -> list[str]:
    student = case.setup.student()
    names, before = list(student.state_dict()), {n: p.detach().clone() for n, p in student.named_parameters()}
    result = case.module.distill(
        student,
        case.setup.teacher(),
        case.setup.dataset(8),
        case.setup.config(case.config_class),
        case.arguments("distilled", max_steps=1),
        processing_class=case.setup.processing_class(),
    )
    if type(result) is not type(student):
        return [f"distill gave {type(result).__name__}, not {type(student).__name__}"]
    found = [name for name, module in result.named_modules() if isinstance(module, Objective)]
    if found or list(result.state_dict()) != names:
        return [f"distill left its own parts on the student: {found or sorted({*result.state_dict()} ^ {*names})}"]
    if all(torch.equal(p, before[n]) for n, p in result.named_parameters()):
        return ["distill did not train the student"]
    return []


# ---- exact scaling ---------------------------------------------------------------------------------------------------
def exact_scaling(case: Case) -> Iterator[str]:
    if case.card.couples_batch:  # only the same micro-batches compare
        reference, (first, second) = case.run(_split, 8, 4, 2, (4,)), case.run(_split, 8, 4, 1, (4,), ranks=2)
        for name, ours in (("rank 0", first), ("rank 1", second)):
            if text := difference(ours, reference, 1e-5):
                yield f"8 rows as 2 ranks x 4 differ from one process with the same micro-batches ({name}): {text}"
        return
    for rows in (8, 7):
        reference = case.run(_split, rows, 8, 1, (8,))
        splits = {"4 x 2": (4, 2, (3,)), "1 x 8": (1, 8, (1,))} if rows == 8 else {"4 x 2": (4, 2, (2,))}
        runs = {name: case.run(_split, rows, *split) for name, split in splits.items()}
        first, second = case.run(_split, rows, 4, 1, (2,), ranks=2)
        runs |= {"2 ranks x 4 x 1 (rank 0)": first, "2 ranks x 4 x 1 (rank 1)": second}
        for name, ours in runs.items():
            if text := difference(ours, reference, 1e-5):
                yield f"{rows} rows as batch x accumulation {name} differ from 8 x 1: {text}"


def _split(case: Case, rows: int, batch: int, accumulation: int, eval_sizes: tuple[int, ...]) -> dict:
    """Two steps of plain SGD, each over all rows: how far weights moved, the objective's state, losses, evaluation."""
    trainer = case.trainer(
        f"split-{rows}-{batch}-{accumulation}",
        rows=rows,
        eval_rows=rows,
        optim="sgd",
        learning_rate=0.2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    before = weights(trainer)
    trainer.train()
    values = outcome(trainer, before)
    for size in eval_sizes:
        trainer.args.per_device_eval_batch_size = size
        values |= evaluation(trainer)
    return values


# ---- no wide logits --------------------------------------------------------------------------------------------------
def no_wide_logits(case: Case) -> Iterator[str]:
    if case.setup.wide and has_row_labels(
        case.setup.student()
    ):  # else one row of class logits per example: there is no vocabulary
        yield from case.run(_wide)


def _wide(case: Case) -> list[str]:
    width, rows = case.setup.wide, 16
    student, teacher = case.setup.student(vocab_size=width), case.setup.teacher(vocab_size=width)
    trainer = case.trainer(
        "wide",
        rows=rows,
        eval_rows=rows,
        student=student,
        teacher=teacher,
        max_steps=1,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=1,
        tile_megabytes=1,
    )
    if trainer.args.dense_logits:
        return []
    own = {
        tuple(p.shape)
        for model in (student, teacher, trainer.objective)
        if model is not None
        for p in model.parameters()
    }
    found = []
    for what, run in (("a training step", trainer.train), ("an evaluation", trainer.evaluate)):
        with _Widest(width, own, rows=2**20 // (4 * width)) as mode:
            run()
        if mode.worst:
            found.append(
                f"{what} makes a {mode.worst[0]} tensor in {mode.worst[1]}: leave projecting to `logit_terms`, or set "
                "args.dense_logits = True in build_trainer if the method needs all logits"
            )
    return found


class _Widest(TorchDispatchMode):
    """Finds tensors with a vocabulary in one dimension and more entries beside it than one tile has rows."""

    def __init__(self, width: int, allowed: set[tuple], rows: int):
        super().__init__()
        self.width, self.rows, self.worst = width, rows, None
        self.allowed = {tuple(sorted(shape)) for shape in allowed}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._is_wide(tensor.shape):
                if self.worst is None or tensor.numel() > np.prod(self.worst[0]):
                    self.worst = (tuple(tensor.shape), str(function))
        return out

    def _is_wide(self, shape) -> bool:
        if not any(size and size % self.width == 0 for size in shape) or tuple(sorted(shape)) in self.allowed:
            return False
        return shape.numel() > self.rows * self.width


# ---- clean student ---------------------------------------------------------------------------------------------------
def clean_student(case: Case) -> Iterator[str]:
    yield from case.run(_save)


def _save(case: Case) -> list[str]:
    trainer = case.trainer("clean", max_steps=2, save_strategy="steps", save_steps=2)
    case.setup.student().save_pretrained(case.folder / "fresh")  # under the names that its family has in files
    expected = _saved_names(case.folder / "fresh")
    trainer.train()
    trainer.save_model()
    student = trainer.student().eval()
    inputs = case.setup.probe()
    with torch.no_grad():
        said = {"inputs": inputs, "logits": student(**inputs).logits, "scores": case.setup.scores(student)}
    torch.save(said, case.folder / "expected.pt")
    problems = []
    for folder in (case.folder / "clean", case.folder / "clean" / "checkpoint-2"):
        saved = _saved_names(folder)
        if saved - expected or not saved:
            problems.append(f"{folder.name} holds more than the student: {sorted(saved - expected) or 'no weights'}")
    left = [p.name for p in (case.folder / "clean").iterdir() if "objective" in p.name]
    return problems + [f"the exported folder holds {name}" for name in left]


def _saved_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {*file.keys()}
    return names


LOADER = """
import json, sys
listed = json.load(open(sys.argv[1]))

class Refuse:
    blocked = ()
    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in self.blocked):
            raise ModuleNotFoundError(f"the student needs {name} to load", name=name)

sys.meta_path.insert(0, Refuse())
import numpy, torch, transformers
from PIL import Image
transformers.utils.logging.set_verbosity_error()
report = {}
for slug, case in listed.items():
    problems = report[slug] = []
    Refuse.blocked = case["blocked"]
    try:
        if case["registered"]:
            import hf_distill.students
        auto = getattr(transformers, case["auto_class"])
        model, info = auto.from_pretrained(case["folder"], output_loading_info=True)
        problems += [f"loading it gives {kind}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
        expected = torch.load(case["expected"])
        with torch.no_grad():
            logits = model.eval()(**expected["inputs"]).logits
        if not torch.allclose(logits, expected["logits"], atol=1e-5):
            problems.append("loaded again, it says something else than the student that was saved")
        pipe = transformers.pipeline(case["task"], model=case["folder"], device="cpu")
        prompt, scores = case["prompt"], expected["scores"]
        picture = None
        if isinstance(prompt, dict):
            picture, prompt = prompt["picture"], prompt["text"]
        elif isinstance(prompt, list):
            picture, prompt = prompt, None
        if picture is not None:
            picture = Image.fromarray(numpy.asarray(picture, dtype=numpy.uint8))
        if scores is None:
            said = pipe(prompt, max_new_tokens=4) if picture is None else pipe(picture, text=prompt, max_new_tokens=4)
            text = said[0]["generated_text"]
            if not text.startswith(prompt):
                problems.append(f"pipeline({case['task']!r}) gave {text!r} for {prompt!r}")
        else:
            found = {entry["label"]: entry["score"] for entry in pipe(picture or prompt, top_k=len(scores))}
            if found.keys() != scores.keys() or max(abs(found[k] - scores[k]) for k in scores) > 1e-4:
                problems.append(f"pipeline({case['task']!r}) gave {found}, the student that was saved {scores}")
        if getattr(pipe.tokenizer, "chat_template", None) != case["chat_template"]:
            problems.append(f"its chat template is {pipe.tokenizer.chat_template!r}")
    except Exception as error:
        problems.append(f"does not load without {', '.join(Refuse.blocked)}: {type(error).__name__}: {error}")
json.dump(report, open(sys.argv[2], "w"))
"""


def load_clean_students(cases: list[Case], folder: Path) -> dict[str, list[str]]:
    """Load all saved students in one process that can import neither hf_distill nor the methods' packages.

    Those of `registered` classes come last, and may import `hf_distill.students`, but no method.
    """
    listed = {}
    for case in sorted(cases, key=lambda case: case.setup.registered):
        setup = case.setup
        listed[case.card.slug] = {
            "folder": str(case.folder / "clean"),
            "expected": str(case.folder / "expected.pt"),
            "auto_class": setup.auto_class,
            "task": setup.task,
            "prompt": setup.prompt,
            "chat_template": getattr(setup.processing_class(), "chat_template", None),
            "registered": setup.registered,
            "blocked": _blocked(case),
        }
    files = [folder / "students.json", folder / "loaded.json"]
    files[0].write_text(json.dumps(listed), encoding="utf-8")
    process = subprocess.run([sys.executable, "-c", LOADER, *map(str, files)], stderr=subprocess.PIPE, text=True)
    if process.returncode:
        return {slug: [f"the process that loads students failed\n{process.stderr[-2000:]}"] for slug in listed}
    return json.loads(files[1].read_text(encoding="utf-8"))


def _blocked(case: Case) -> list[str]:
    """What loading a student must do without."""
    package = case.module.__name__.split(".")[0]
    if not case.setup.registered:
        return sorted({"hf_distill", package})
    return sorted({"hf_distill.methods", case.module.__name__ if package == "hf_distill" else package})
