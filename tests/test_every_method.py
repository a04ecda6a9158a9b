"""Every method through every promise, a plug-in package through the same, and faulty plug-ins that must be caught."""

import re

import pytest

from hf_distill.methods import METHODS, MethodCard, cards
from hf_distill.testing import PROMISES, SETUPS, check_methods

CARDS = cards()


@pytest.mark.parametrize("promise", PROMISES)
def test_a_method_breaks_a_promise(promise):
    check_methods(CARDS, promises=[promise])


# ---- another package's methods ---------------------------------------------------------------------------------------
PLUGIN = '''
"""A method of another package."""

from dataclasses import dataclass, field

import torch

from hf_distill import DistillSFTTrainer, Objective
from hf_distill.losses import ForwardKL
from hf_distill.methods import MethodCard

CARD = MethodCard(
    slug="SLUG", title="A method", arxiv="", year=2026, kind="logits", modality="text", couples_batch=COUPLES
)


@dataclass
class PluginConfig:
    """One number."""

    weight: float = field(default=1.0, metadata={"help": "Weight of the divergence."})

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


class Plugin(Objective):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.state = {"steps": torch.tensor(0.0)}
        self.seen = 0.0

    def logit_terms(self, progress):
        return {"kd": ForwardKL()}

    def weights(self, progress):
        return {"kd": self.config.weight * (1 + 0.1 * self.state["steps"])}

    def after_step(self, terms, progress):
        self.state["steps"] = self.state["steps"] + 1
        self.seen += float(terms["kd"])

    # MORE


def build_trainer(student, teacher, train_dataset, config, args, **more):
    return DistillSFTTrainer(
        student, teacher=teacher, objective=Plugin(config), args=args, train_dataset=train_dataset, **more
    )


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **more):
    trainer = build_trainer(student, teacher, train_dataset, config, args, **more)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
'''

COUPLED = """
    per = {"spread": "batch"}

    def other_terms(self, student, teacher, progress):
        return {"spread": student.logits.hidden.mean(0).pow(2).sum()}
"""

# what replaces "# MORE", and the promise it breaks
FAULTS = {
    "grows_with_the_batch": (
        "exact_scaling",
        """
    def row_weights(self, student, teacher, progress):
        return {"kd": torch.full((len(student.rows.labels),), float(len(student.rows.example)))}
""",
    ),
    "couples_silently": ("exact_scaling", COUPLED),
    "counts_micro_batches": (
        "exact_scaling",
        """
    def row_weights(self, student, teacher, progress):
        if torch.is_grad_enabled():
            self.state["steps"] = self.state["steps"] + 1
        return {}
""",
    ),
    "forgets": (
        "exact_resume",
        """
    def weights(self, progress):
        return {"kd": 1 + 0.1 * self.seen}
""",
    ),
    "makes_wide_logits": (
        "no_wide_logits",
        """
    def other_terms(self, student, teacher, progress):
        return {"entropy": -student.logits.dense().log_softmax(-1).mean()}
""",
    ),
    "does_not_start": (
        "no_wide_logits",
        """
    def setup(self, student, teacher):
        raise RuntimeError("this set-up does not work")
""",
    ),
}


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """An installed package with two sound methods and a faulty one of each kind."""
    more = {"sound": "", "coupled": COUPLED} | {k: text for k, (_, text) in FAULTS.items()}
    modules = {}
    for name, text in more.items():
        couples = '"rows of a batch meet"' if name == "coupled" else "None"
        modules[name] = PLUGIN.replace("SLUG", name).replace("COUPLES", couples).replace("    # MORE\n", text)
    package = tmp_path / "other_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text)
    installed = tmp_path / "other_methods-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other-methods\nVersion: 1.0\n")
    points = "\n".join(f"{name} = other_methods.{name}" for name in modules)
    (installed / "entry_points.txt").write_text(f"[hf_distill.methods]\n{points}\n")
    monkeypatch.syspath_prepend(tmp_path)
    return [card for card in cards() if card.slug not in METHODS]


SAID = {
    "exact_scaling": r"4 x 2 differ from 8 x 1: weight .* off; .*eval_loss(.*\n)*.*state steps: 6, not 4",
    "exact_resume": r"killed and resumed in one process, it is not the uninterrupted run: weight",
    "no_wide_logits": r"a training step makes a \(\d+, 4099\) tensor(.*\n)*.*RuntimeError: this set-up does not work",
}


@pytest.mark.parametrize("promise", SAID)
def test_the_harness_sees_no_fault_or_one_that_is_not_there(promise, plugins):
    assert {"sound", "coupled", *FAULTS} <= {card.slug for card in plugins}
    faulty = {slug for slug, (breaks, _) in FAULTS.items() if breaks == promise}
    sound = {"sound", "coupled"} if promise == "exact_scaling" else {"sound"}
    with pytest.raises(AssertionError, match=SAID[promise]) as error:
        check_methods([card for card in plugins if card.slug in sound | faulty], promises=[promise])
    found = set(re.findall(r"^(\w+) / (\w+):", str(error.value), re.MULTILINE))
    assert found == {(slug, promise) for slug in faulty}


# ---- the call itself -------------------------------------------------------------------------------------------------
def card(**changes) -> MethodCard:
    settings = dict(slug="taid", title="", arxiv="", year=2025, kind="logits", modality="text")
    return MethodCard(**settings | changes)


@pytest.mark.parametrize("changes", [{"modality": "audio"}, {"entry": "select"}])
def test_a_card_without_a_set_up_is_skipped(changes):
    with pytest.raises(LookupError, match="no set-up to check 'taid'.*add one to hf_distill.testing.SETUPS"):
        check_methods([card(**changes)])


def test_a_set_up_of_ones_own_is_not_taken(monkeypatch):
    class Asked(Exception):
        pass

    class Own:
        def __bool__(self):
            raise Asked

    monkeypatch.setitem(SETUPS, "taid", Own())
    with pytest.raises(Asked):
        check_methods([card(modality="image")])


def test_nothing_to_check_is_a_success():
    with pytest.raises(ValueError, match="at least one"):
        check_methods([])
    with pytest.raises(ValueError, match="different slugs"):
        check_methods([card(), card()])
    with pytest.raises(ValueError, match="unknown promise exact_rescaling; choose of interface, exact_scaling"):
        check_methods([card()], promises=["exact_rescaling"])
