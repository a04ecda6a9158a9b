"""The set-ups for image and text classifiers: baselines of every kind go through every promise on them."""

import sys

import pytest

from hf_distill.methods import MethodCard
from hf_distill.testing import PROMISES, check_methods

METHOD = '''
"""A baseline as a method."""

from dataclasses import dataclass, field

from hf_distill import DistillTrainer
from hf_distill.baselines import OBJECTIVES


@dataclass
class BaselineConfig:
    """One number."""

    weight: float = field(default=2.0, metadata={"help": "Weight of the terms."})

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


def build_trainer(student, teacher, train_dataset, config, args, **more):
    objective = OBJECTIVES["NAME"](weight=config.weight, label_weight=1.0)
    return DistillTrainer(student, teacher=teacher, objective=objective, args=args, train_dataset=train_dataset, **more)


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **more):
    trainer = build_trainer(student, teacher, train_dataset, config, args, **more)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
'''
# logits with a warm-up, a trained regressor, relations within a batch; and texts
BASELINES = {
    "image": {"dkd": None, "fitnet": None, "rkd": "compares the examples of a batch"},
    "text-classification": {"kd": None},
}


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    cards = []
    for modality, names in BASELINES.items():
        for name, couples in names.items():
            module = f"baseline_{modality.split('-')[0]}_{name}"
            (folder / f"{module}.py").write_text(METHOD.replace("NAME", name))
            own = dict(slug=module, title="", arxiv="", year=2026, kind="logits", modality=modality)
            cards.append(MethodCard(**own, couples_batch=couples, module=module))
    sys.path.insert(0, str(folder))
    yield cards
    sys.path.remove(str(folder))


@pytest.mark.parametrize("promise", PROMISES)
def test_a_baseline_breaks_a_promise(promise, methods):
    check_methods(methods, promises=[promise])
