"""Router logits reach every output and the objective, with adapters and checkpointing; balance spreads the load."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils import ModelOutput

from hf_distill import DistillSFTTrainer, DistillTrainer, LogitKD
from hf_distill.heads import collect
from hf_distill.losses import balance_loss
from hf_distill.students import BalanceLoss, attach_router_outputs, routed_blocks, upcycle_to_moe
from hf_distill.students.routers import _Kept
from tests.helpers import SGD, plain_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.students.moe_models import FAMILIES, IMAGE, dense_model, inputs_of

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
NAMES = ["qwen2", "qwen3_vl", "llama_all", "llava_qwen2", "llava_llama_all", "llava_llama", "llama", "gemma2", "vit"]


def sparse_model(name: str, **settings):
    family = FAMILIES[name]
    return upcycle_to_moe(dense_model(name), **dict(layers=family.layers, router_std=1.0) | settings)


def checkpointed(model, reentrant: bool):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model.train()


def router_gradients(model, name: str) -> list[torch.Tensor]:
    """Of the balance loss alone."""
    model.zero_grad()
    inputs = inputs_of(name)
    out = model(**inputs, output_router_logits=True)
    mask = inputs.get("attention_mask")
    balance_loss(out.router_logits, attention_mask=mask).backward()
    return [
        p.grad.clone() for n, p in model.named_parameters() if ".gate." in n and p.requires_grad and p.grad is not None
    ]


@pytest.mark.parametrize("name", NAMES)
def test_router_logits_are_dropped_by_a_model_around_the_routers(name):
    model, inputs = sparse_model(name), inputs_of(name)
    attach_router_outputs(model)
    with torch.no_grad():
        whole = model(**inputs, output_router_logits=True)
        backbone = model.base_model(**inputs, output_router_logits=True)
        plain = model(**inputs)
    rows = [block.router.weight.shape[0] for block in routed_blocks(model).values()]
    assert len(whole.router_logits) == len(backbone.router_logits) == len(rows)
    for ours, same in zip(whole.router_logits, backbone.router_logits, strict=True):
        assert ours.dim() == 2 and torch.equal(ours, same)
    assert getattr(plain, "router_logits", None) is None
    with torch.no_grad():
        signals = collect(model, inputs, frozenset({"router_logits"}), None)
    assert torch.equal(signals.features["router_logits"][0], whole.router_logits[0])


def test_attaching_twice_adds_hooks():
    model = sparse_model("llava_qwen2")
    count = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before = count()
    attach_router_outputs(model)
    once = count()
    attach_router_outputs(model)
    attach_router_outputs(get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj")))
    assert before < once == count()


def test_logits_of_one_forward_outlive_it():
    """A kept graph would hold memory, and the next forward could give the last one's."""
    model, inputs = sparse_model("llava_qwen2"), inputs_of("llava_qwen2")
    attach_router_outputs(model)
    kept = [hook.__self__ for hook in model.model.language_model._forward_hooks.values() if hasattr(hook, "__self__")]
    kept = next(k for k in kept if isinstance(k, _Kept))
    text = {"input_ids": inputs["input_ids"] % IMAGE}
    for module, arguments in ((model, inputs), (model.model, inputs), (model.model.language_model, text)):
        module(**arguments, output_router_logits=True)
        assert kept.logits is None and kept.depth == 0
    with pytest.raises(ValueError, match="Image features and image tokens"):
        model(input_ids=inputs["input_ids"][:1], pixel_values=inputs["pixel_values"], output_router_logits=True)
    assert kept.logits is None and kept.depth == 0
    assert getattr(model(**inputs), "router_logits", None) is None


def test_an_output_with_router_logits_stops_ddp():
    """DDP takes outputs apart and makes them again, class by class."""
    model = sparse_model("llava_qwen2")
    attach_router_outputs(model)
    output = model(**inputs_of("llava_qwen2"), output_router_logits=True)
    assert len(output.router_logits) == 2
    leaves, tree = tree_flatten(output)
    assert torch.equal(tree_unflatten(leaves, tree).logits, output.logits)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_vl", "llava_qwen2", "llama", "vit"])
def test_checkpointing_or_an_adapter_changes_the_balance_gradient(name):
    plain = sparse_model(name).train()
    attach_router_outputs(plain)
    expected = router_gradients(plain, name)
    assert len(expected) == 2 and all(g.abs().sum() > 0 for g in expected)
    model = checkpointed(sparse_model(name), reentrant=False)
    attach_router_outputs(model)
    for ours, other in zip(router_gradients(model, name), expected, strict=True):
        torch.testing.assert_close(ours, other)
    targets = ["mlp.experts.up_proj", *TARGETS[1:]] if name == "vit" else TARGETS
    adapted = get_peft_model(checkpointed(sparse_model(name), False), LoraConfig(r=2, target_parameters=targets))
    attach_router_outputs(adapted)
    gradients = router_gradients(adapted, name)
    assert len(gradients) == 4 and sum(g.abs().sum() for g in gradients) > 0  # A and B of two routers


@pytest.mark.parametrize("name", ["qwen2", "llava_qwen2", "llama"])
def test_reentrant_checkpointing_loses_the_gradient_in_silence(name):
    with pytest.raises(ValueError, match="reentrant gradient checkpointing"):
        attach_router_outputs(checkpointed(sparse_model(name), reentrant=True))
    model = sparse_model(name)
    attach_router_outputs(model)
    checkpointed(model, reentrant=True)  # later, as trainers do
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**inputs_of(name), output_router_logits=True)
    with torch.no_grad():
        assert model.eval()(**inputs_of(name), output_router_logits=True).router_logits


def test_a_dense_student_is_accepted():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routed layers"):
        attach_router_outputs(dense_model("llama"))
    with pytest.raises(ValueError, match="form must be one of"):
        BalanceLoss("switch")
    with pytest.raises(ValueError, match="z_weight"):
        BalanceLoss(z_weight=-1)


# ---- in a trainer ---------------------------------------------------------------------------------------------------
def moe_student(seed: int = 0):
    return upcycle_to_moe(tiny_llama(layers=2, seed=seed), layers="all", router_std=0.5)


def trainer(folder, objective, student=None, teacher=None, callbacks=None, **settings):
    return DistillSFTTrainer(
        student or moe_student(),
        teacher=teacher or tiny_llama(hidden=32, seed=7),
        objective=objective,
        args=sft_arguments(folder, gradient_checkpointing=False, **SGD | settings),
        train_dataset=text_dataset(8),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def test_the_trainers_balance_is_not_that_of_the_attended_tokens(tmp_path):
    run = trainer(tmp_path, LogitKD() + 0.01 * BalanceLoss(z_weight=0.5), max_steps=1, per_device_train_batch_size=8)
    start = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    logged = run.state.log_history[0]
    model = moe_student().train()
    model.load_state_dict({k: v for k, v in start.items() if not k.startswith("distill")})
    batch = run.data_collator([run.train_dataset[i] for i in range(8)])
    assert (batch["attention_mask"] == 0).any()
    out = model.model(batch["input_ids"], batch["attention_mask"], output_router_logits=True)
    keep = batch["attention_mask"].flatten().bool()
    expected = balance_loss([x[keep] for x in out.router_logits])
    assert logged["loss/balanceloss/balance"] == pytest.approx(expected.item(), rel=1e-5)
    parts = logged["loss/logitkd/kd"] + 0.01 * (
        logged["loss/balanceloss/balance"] + 0.5 * logged["loss/balanceloss/router_z"]
    )
    assert logged["loss"] == pytest.approx(parts, rel=1e-4)


def test_a_window_of_micro_batches_is_not_their_mean(tmp_path):
    values = []
    run = trainer(tmp_path, BalanceLoss(), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    run.objective.after_step = lambda terms, progress: values.append(terms["balance"].item())
    own = run.objective.other_terms
    parts = []

    def other_terms(*arguments):
        terms = own(*arguments)
        parts.append(terms["balance"].item())
        return terms

    run.objective.other_terms = other_terms
    run.train()
    assert len(parts) == 4 and values[0] == pytest.approx(sum(parts) / 4, rel=1e-6)
    assert run.state.log_history[0]["loss"] == pytest.approx(values[0], rel=1e-4)


def test_reentrant_checkpointing_trains_without_balance(tmp_path):
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, max_steps=1)
    run = DistillSFTTrainer(
        moe_student(),
        teacher=tiny_llama(hidden=32, seed=7),
        objective=LogitKD() + 0.01 * BalanceLoss(),
        args=sft_arguments(tmp_path, **SGD | options),
        train_dataset=text_dataset(8),
        processing_class=tiny_tokenizer(),
    )
    with pytest.raises(ValueError, match="use_reentrant"):
        run.train()


@pytest.mark.parametrize(("form", "choices"), [("gshard", 1), ("hf", 2)])
def test_balance_leaves_the_largest_load_as_it_was(form, choices, tmp_path):
    """The largest share that an expert has of what the form balances, first choices or all, after 60 steps."""
    rows = tiny_tokenizer()(list(text_dataset(64, seed=3)["text"]), padding=True, return_tensors="pt")

    def largest_load(model) -> float:
        with torch.no_grad():
            logits = model.model(**_inputs(rows), output_router_logits=True).router_logits
        keep = rows["attention_mask"].flatten().bool()
        chosen = [x[keep].topk(choices).indices.flatten() for x in logits]
        return max((indices.bincount(minlength=4) / len(indices)).max().item() for indices in chosen)

    teacher = tiny_llama(hidden=32, seed=7)
    loads = {}
    for weight in (0.0, 0.1):
        folder = tmp_path / f"{form}{weight}"
        settings = dict(max_steps=60, per_device_train_batch_size=8, optim="adamw_torch", learning_rate=3e-3)
        run = trainer(folder, LogitKD() + weight * BalanceLoss(form), teacher=teacher, **settings, logging_steps=60)
        start = largest_load(run.model)
        run.train()
        loads[weight] = largest_load(run.student())
    assert loads[0.1] < min(loads[0.0], start) - 0.01, (start, loads)


def _inputs(rows) -> dict:
    return {key: rows[key] for key in ("input_ids", "attention_mask")}


def test_a_vision_student_gets_no_balance(tmp_path):
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 5} for i in range(8)]
    run = DistillTrainer(
        sparse_model("vit"),
        teacher=dense_model("vit", seed=5),
        objective=LogitKD() + 0.01 * BalanceLoss(),
        args=plain_arguments(tmp_path, max_steps=2, remove_unused_columns=False, **SGD),
        train_dataset=rows,
    )
    run.train()
    assert run.state.log_history[0]["loss/balanceloss/balance"] > 0
    student = run.student()
    assert not any("distill" in name for name in student.state_dict())
    assert isinstance(student(torch.randn(1, 3, 8, 8)), ModelOutput)
