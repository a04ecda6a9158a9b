"""Taps: the right tensor, once, whatever wraps the model; nothing left behind."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_distill import FrozenTeacher, LogitKD, Objective
from hf_distill.heads import base_model_of, collect
from hf_distill.taps import Gives, classifier_of, find, tap
from hf_distill.teachers import AdapterOffTeacher, EnsembleTeacher
from hf_distill.training.saving import KEY
from tests.baselines.models import bert, resnet, trainer, vit

PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
TEXT = {"input_ids": torch.arange(1, 13).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def read(model, batch, *paths, needs=("logits",)) -> dict[str, torch.Tensor]:
    return collect(model, batch, frozenset({*needs, *map(tap, paths)}), None).features


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- the right tensor -----------------------------------------------------------------------------------------------
def test_a_path_gives_another_tensor_than_the_module_made():
    model = vit(layers=3).eval()
    found = read(model, PIXELS, "vit.layers.0", "vit.layers.2:input", 1, -2, "classifier")
    hidden = model(**PIXELS, output_hidden_states=True).hidden_states
    assert torch.equal(found["vit.layers.0"], hidden[1]) and torch.equal(found["hidden_states.1"], hidden[1])
    assert torch.equal(found["vit.layers.2:input"], hidden[2]) and torch.equal(found["hidden_states.-2"], hidden[2])
    assert torch.equal(found["classifier"], model(**PIXELS).logits)


@pytest.mark.parametrize(("make", "batch"), [(vit, PIXELS), (resnet, PIXELS), (bert, TEXT)])
def test_the_embedding_is_not_what_the_classifier_reads(make, batch):
    model = make().eval()
    head = classifier_of(model)
    found = read(model, batch, "embedding")["embedding"]
    assert found.dim() == 2
    torch.testing.assert_close(head(found), model(**batch).logits)


def test_a_tap_in_the_head_needs_no_logits():
    signals = collect(bert().eval(), TEXT, frozenset({tap("embedding")}), None)
    assert signals.features["embedding"].shape == (2, 8)


def test_a_stage_that_returns_a_model_output_gives_its_first_tensor():
    model = resnet().eval()
    found = read(model, PIXELS, "resnet.encoder", "resnet.encoder.stages.1")
    assert torch.equal(found["resnet.encoder"], found["resnet.encoder.stages.1"])


# ---- nothing left behind, nothing stored twice ----------------------------------------------------------------------
def test_a_hook_stays_after_the_forward_or_after_an_error():
    model, before = vit(), hooks(vit())
    read(model, PIXELS, "vit.layers.0", "vit.layers.1:input")
    assert hooks(model) == before
    with pytest.raises(ValueError, match="image size"):
        read(model, {"pixel_values": torch.zeros(1, 3, 7, 7)}, "vit.layers.0")
    assert hooks(model) == before and hooks(copy.deepcopy(model)) == before


def gradients(model, batch, paths=("vit.layers.0", "vit.layers.1.mlp.fc1")) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = read(model, batch, *paths)
    sum(x.square().mean() for x in found.values()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_changes_a_gradient_or_fires_a_tap_again():
    model = vit().train()
    expected = gradients(model, PIXELS)
    model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    handle = model.vit.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, PIXELS)
    assert len(calls) == 2, "the layer was not recomputed, so this shows nothing"
    handle.remove()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_reentrant_checkpointing_cuts_the_gradient_silently():
    model = vit().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="'vit.layers.0.mlp' has no gradient.*use_reentrant"):
        read(model, PIXELS, "vit.layers.0.mlp")
    with torch.no_grad():
        read(model, PIXELS, "vit.layers.0.mlp")
    assert read(model, PIXELS, "vit.layers.0")["vit.layers.0"].requires_grad, "the layer itself is not inside"


def test_a_compiled_backbone_loses_a_tap_or_its_gradient():
    torch._dynamo.reset()
    model = vit()
    expected = gradients(model, PIXELS)
    model.base_model.compile(backend="aot_eager")
    for step in range(3):
        batch = {"pixel_values": PIXELS["pixel_values"] + step}
        found = gradients(model, batch)
        if step == 0:
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    model = vit().eval()
    model.base_model.compile(backend="aot_eager")
    model(**PIXELS)
    with pytest.raises(ValueError, match="compiled before it was tapped"):
        read(model, PIXELS, "vit.layers.0")


# ---- adapters and teachers ------------------------------------------------------------------------------------------
def test_paths_need_peft_prefix_or_miss_the_trained_head():
    model = get_peft_model(vit(), LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
    plain, prefixed = "vit.layers.0.mlp.fc1", "base_model.model.vit.layers.0.mlp.fc1"
    found = read(model, PIXELS, plain, prefixed, "embedding", "classifier:input")
    assert torch.equal(found[plain], found[prefixed]) and torch.equal(found["embedding"], found["classifier:input"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    teacher = AdapterOffTeacher()
    teacher.attach(model)
    model.train()
    off = teacher(PIXELS, frozenset({tap("embedding"), tap(plain)})).features
    on = read(model, PIXELS, "embedding", plain)
    assert not torch.allclose(on[plain], off[plain]) and on[plain].requires_grad and not off[plain].requires_grad
    torch.testing.assert_close(off[plain], read(vit().eval(), PIXELS, plain)[plain])


def test_only_a_teacher_that_has_layers_gives_taps():
    needs = frozenset({"logits", tap("vit.layers.0")})
    assert needs - FrozenTeacher.gives == frozenset()
    assert needs - frozenset({"logits"}) == {tap("vit.layers.0")}
    assert needs - (frozenset({"logits"}) | Gives({"features"})) == frozenset()
    assert needs - EnsembleTeacher.gives == {tap("vit.layers.0")}
    members = {name: FrozenTeacher(vit(seed=i)) for i, name in enumerate("ab")}
    found = EnsembleTeacher(members, features_from="b")(PIXELS, needs).features
    expected = read(members["b"].model, PIXELS, "vit.layers.0")
    assert torch.equal(found["vit.layers.0"], expected["vit.layers.0"])


class Hint(Objective):
    """One tap of each side, by path."""

    needs = frozenset({"student.logits", tap("vit.layers.0", "student"), tap("vit.layers.2", "teacher")})
    per = "sample"

    def other_terms(self, student, teacher, progress):
        assert student.features.keys() == {"vit.layers.0"} and teacher.features.keys() == {"vit.layers.2"}
        hint = (student.features["vit.layers.0"] - teacher.features["vit.layers.2"]).square().mean()
        return {"hint": hint + 0.0 * student.logits.sum()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_does_not_deliver_what_was_declared(tmp_path, checkpointing):
    done = trainer(tmp_path, "vit", Hint(), teacher=vit(8, 3, seed=2), gradient_checkpointing=checkpointing)
    done.train()
    assert done.state.log_history[0]["loss/hint"] > 0
    assert hooks(done.student()) == hooks(vit()) and not hasattr(base_model_of(done.model), KEY)


def test_names_of_signals_are_read_as_paths():
    class Both(Objective):
        needs = frozenset({"student.logits", "hidden_states", "teacher.attentions", tap("a.b.logits", "teacher")})

    assert Both().needs_of("student") == {"logits", "hidden_states"}
    assert Both().needs_of("teacher") == {"hidden_states", "attentions", "features:a.b.logits"}
    assert (LogitKD() + Both()).needs_of("student") == {"logits", "hidden_states"}


# ---- errors ---------------------------------------------------------------------------------------------------------
def test_a_wrong_path_gets_no_help():
    with pytest.raises(ValueError, match="no module 'vit.layer.0'; near matches: vit.layers.0.*embedding"):
        find(vit(), "vit.layer.0")
    with pytest.raises(ValueError, match="no module 'zzz'; near matches: "):
        read(vit(), PIXELS, "zzz")
    with pytest.raises(ValueError, match="hidden_states.9 does not exist: the model gives 3 hidden states"):
        read(vit(), PIXELS, 9)
    with pytest.raises(ValueError, match='no linear layer with 3 outputs.*"classifier:input"'):
        classifier_of(vit().vit)


def test_a_module_that_runs_not_at_all_or_twice_passes():
    model = bert().eval()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' did not run in this forward of BertFor"):
        read(model, TEXT, "unused")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.0' runs more than once.*hidden_states.<i>"):
        read(model, TEXT, "bert.encoder.layer.0")
    assert read(model, TEXT, 1, 2)["hidden_states.2"].shape == (2, 6, 8)
