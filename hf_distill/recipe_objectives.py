"""`--objective NAME`: the baselines of classification as a recipe's method."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field

from hf_distill.baselines import OBJECTIVES, Baseline, StudentAlone
from hf_distill.objectives import Objective
from hf_distill.training.labels import class_counts

CHOICES: dict[str, type[Objective]] = {"none": StudentAlone}
CHOICES |= {name: kind for name, kind in OBJECTIVES.items() if issubclass(kind, Baseline)}


@dataclass
class ObjectiveConfig:
    """Which baseline, and its options; defaults are those of its paper."""

    objective: str = field(
        default="kd", metadata={"help": f"One of {', '.join(CHOICES)}; none is the student alone, without its teacher."}
    )
    objective_options: str = field(
        default="{}", metadata={"help": "The objective's arguments as JSON, for example '{\"temperature\": 2}'."}
    )

    def __post_init__(self):
        if self.objective not in CHOICES:
            raise ValueError(f"unknown objective {self.objective!r}; choose of {', '.join(CHOICES)}")
        if isinstance(self.objective_options, dict):  # YAML
            self.objective_options = json.dumps(self.objective_options)
        try:
            given = json.loads(self.objective_options)
        except json.JSONDecodeError as error:
            raise ValueError(f"objective_options must be JSON, got {self.objective_options!r}: {error}") from error
        allowed = options_of(CHOICES[self.objective])
        if not isinstance(given, dict) or given.keys() - allowed.keys():
            raise ValueError(
                f"objective_options of {self.objective} are "
                f"{', '.join(f'{name}={value!r}' for name, value in allowed.items()) or 'none'}; got {given!r}"
            )


def options_of(kind: type[Objective]) -> dict:
    """Names and defaults of an objective's arguments, those that its bases take on included."""
    found: dict = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base) or not issubclass(base, Objective):
            continue
        own = inspect.signature(base.__init__).parameters.values()
        named = {p.name: p.default for p in own if p.name != "self" and p.kind is not p.VAR_KEYWORD}
        found = {name: None if value is inspect.Parameter.empty else value for name, value in named.items()} | found
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def build_objective(config: ObjectiveConfig, train_dataset) -> Objective:
    """The baseline; CRD gets its examples' classes."""
    options = json.loads(config.objective_options)
    if config.objective == "crd":
        labels = [int(label) for label in train_dataset["labels"]]
        class_counts(labels, max(labels) + 1)
        options = {"classes": labels} | options
    return CHOICES[config.objective](**options)


def build_trainer(student, teacher, train_dataset, config: ObjectiveConfig, args, **trainer_arguments):
    """A DistillTrainer for the named baseline."""
    from hf_distill.training.trainers import DistillTrainer

    objective = build_objective(config, train_dataset)
    return DistillTrainer(
        student, teacher=teacher, objective=objective, args=args, train_dataset=train_dataset, **trainer_arguments
    )
