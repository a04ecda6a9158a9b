"""Baselines in DistillTrainer: every one on every family, resumed runs, clean students."""

from functools import reduce
from operator import add

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_distill.baselines import OBJECTIVES
from hf_distill.training.saving import FILE
from tests.baselines.models import FAMILIES, labels, resnet, trainer, vit

NAMES = [name for name in OBJECTIVES if name not in ("next_token", "feature_kd")]


def objective(name: str, n: int = 8, **options):
    return OBJECTIVES[name](**options | ({"classes": labels(n), "negatives": 4} if name == "crd" else {}))


def everything(n: int = 8):
    """All baselines in one run: each gives its terms and trains its parts."""
    quick = {"dkd": {"warmup": 0.0}, "review": {"warmup": 0.0}}
    return reduce(add, (1e-3 * objective(name, n, **quick.get(name, {})) for name in NAMES))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baseline_does_not_train_or_leaves_something_in_the_student(family, tmp_path):
    both = everything()
    done = trainer(tmp_path, family, both, n=7)  # the last batch is ragged
    before = {k: v.clone() for k, v in both.state_dict().items() if v.is_floating_point()}
    done.train()
    terms = {k.removeprefix("loss/").split("/")[0] for k in done.state.log_history[0] if k.startswith("loss/")}
    assert terms == {type(leaf).__name__.lower() for leaf in both.parts}
    assert len(before) > 10
    still = [name for name, value in both.state_dict().items() if name in before and torch.equal(value, before[name])]
    # a bias before BatchNorm has no effect
    assert all(name.endswith(".map.0.bias") for name in still), still
    metrics = done.evaluate()
    assert metrics["eval_hintonkd/kd"] > 0 and metrics["eval_loss"] < float("inf")
    done.save_model(tmp_path / "out")
    student = done.student().eval()
    loaded, info = type(student).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    hooks = [h for m in student.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in hooks if h.__module__.startswith("hf_distill")], "transformers keeps some of its own"
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), loaded.parameters(), strict=True))


def resumable():
    return objective("crd") + 0.01 * objective("fitnet", layers=[[1, 1]]) + objective("cc")


def test_a_resumed_run_differs_from_the_uninterrupted_one(tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)
    trainer(tmp_path / "a", "resnet", resumable(), **settings).train()
    whole = tmp_path / "a" / "checkpoint-4"
    trainer(tmp_path / "b", "resnet", resumable(), **settings).train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
    )
    found = tmp_path / "b" / "checkpoint-4"
    for file in ("model.safetensors", FILE):
        ours, expected = load_file(found / file), load_file(whole / file)
        assert ours.keys() == expected.keys()
        assert [k for k in ours if not torch.equal(ours[k], expected[k])] == []
    names = load_file(whole / FILE).keys()
    assert {"state.crd/student_bank", "state.crd/z", "parameter.parts.1.projectors.0.map.0.weight"} <= set(names)
    half = load_file(tmp_path / "a" / "checkpoint-2" / FILE)
    assert not torch.equal(half["state.crd/student_bank"], load_file(whole / FILE)["state.crd/student_bank"])


def test_an_adapter_student_reads_no_taps(tmp_path):
    student = get_peft_model(vit(seed=1), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    both = objective("rkd") + objective("fitnet", layers=[["vit.layers.0", "vit.layers.1"]])
    done = trainer(tmp_path, "vit", both, student=student)
    before = {n: p.clone() for n, p in student.named_parameters() if "lora_B" in n}
    done.train()
    trained = dict(student.named_parameters())
    assert any(not torch.equal(p, trained[n]) for n, p in before.items())
    done.save_model(tmp_path / "out")
    assert not [k for k in load_file(tmp_path / "out" / "adapter_model.safetensors") if "distill" in k]


def test_a_batch_size_of_one_trains_on_nothing(tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size to at least 2"):
        trainer(tmp_path, "resnet", objective("sp"), per_device_train_batch_size=1, student=resnet()).train()
