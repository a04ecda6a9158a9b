"""Upcycling: the sparse student starts as the same function, is saved whole, and what cannot work is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    HfArgumentParser,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_distill.students import moe
from hf_distill.students.moe import UpcycleConfig, moe_layers, upcycle_to_moe
from hf_distill.students.routers import activated_parameters, check_lora_reaches_experts, routed_blocks
from tests.students.moe_models import FAMILIES, SHAPE, dense_model, inputs_of

ROOT = Path(__file__).parents[2]
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
for folder in sys.argv[1:]:
    known = torch.load(folder + "/expected.pt")
    auto = AutoModelForImageTextToText if "pixel_values" in known["inputs"] else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    assert type(model).__name__ == known["class"], folder
    with torch.no_grad():
        difference = (model(**known["inputs"]).logits - known["logits"]).abs().max()
    assert difference < 1e-5, (folder, difference)
    assert "hf_distill" not in sys.modules
print("loaded", len(sys.argv) - 1)
"""


def sparse_model(name: str, **settings):
    family = FAMILIES[name]
    return upcycle_to_moe(dense_model(name), **dict(layers=family.layers) | settings)


def logits_of(model, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(name)).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sparse_student_starts_as_another_function(name):
    family, dense = FAMILIES[name], dense_model(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    sparse = upcycle_to_moe(dense, layers=family.layers, native_only=family.native)
    assert type(sparse).__name__ == family.sparse
    assert sparse.config.get_text_config()._experts_implementation == "grouped_mm"
    expected = logits_of(dense, name)
    for scale in (1.0, 50.0):  # any router values: copies, and weights that sum to 1
        with torch.no_grad():
            for block in routed_blocks(sparse).values():
                block.router.weight *= scale
        torch.testing.assert_close(logits_of(sparse, name), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items()), "memory is shared"


def test_weights_that_do_not_sum_to_one_go_unnoticed():
    sparse = sparse_model("qwen3")
    for block in routed_blocks(sparse).values():
        block.router.norm_topk_prob = False
    assert (logits_of(sparse, "qwen3") - logits_of(dense_model("qwen3"), "qwen3")).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_another_dtype_is_lost(name, dtype):
    sparse = upcycle_to_moe(dense_model(name).to(dtype))
    assert {parameter.dtype for parameter in sparse.parameters()} == {dtype}


def test_ties_and_frozen_parts_are_lost():
    tied = sparse_model("tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    dense = dense_model("llava_qwen2")
    dense.model.vision_tower.requires_grad_(False)
    sparse = upcycle_to_moe(dense)
    frozen = {name for name, parameter in sparse.named_parameters() if not parameter.requires_grad}
    assert frozen and all("vision_tower" in name for name in frozen)


def test_the_seed_does_not_decide_the_routers():
    first, again, other = (sparse_model("qwen2", seed=seed, router_std=0.5) for seed in (3, 3, 4))
    weights = [next(iter(routed_blocks(model).values())).router.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.3 < weights[0].std() < 0.7


def test_the_shared_expert_of_qwen2_moe_wakes_up():
    """It is all zeros, and so are its gradients: no step of any optimizer changes it."""
    sparse = sparse_model("qwen2")
    sparse(**inputs_of("qwen2")).logits.square().mean().backward()
    shared = {name: p for name, p in sparse.named_parameters() if "shared_expert" in name}
    assert len(shared) == 8 and all((p == 0).all() and (p.grad == 0).all() for p in shared.values())
    assert all(p.numel() for p in sparse.parameters()), "FSDP cannot reduce the gradient of an empty parameter"


def test_generation_settings_are_lost_or_shared():
    dense = dense_model("qwen3")
    dense.generation_config.temperature = 0.3
    sparse = upcycle_to_moe(dense)
    dense.generation_config.temperature = 0.5
    assert sparse.generation_config.temperature == 0.3


@pytest.mark.parametrize("name", ["qwen2", "llama", "llava_llama", "gemma2"])
def test_generation_with_a_cache_differs_from_the_dense_model(name):
    inputs = inputs_of(name)
    options = dict(max_new_tokens=6, do_sample=False)
    expected = dense_model(name).generate(**inputs, **options)
    assert torch.equal(sparse_model(name).generate(**inputs, **options), expected)


# ---- saving ---------------------------------------------------------------------------------------------------------
def test_native_students_need_this_package_to_load(tmp_path):
    folders = []
    for name in (name for name, family in FAMILIES.items() if family.native):
        model, folder = sparse_model(name), tmp_path / name
        with torch.no_grad():  # experts that differ, so that their order counts
            for block in routed_blocks(model).values():
                for parameter in (*block.experts.parameters(), block.router.weight):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        known = {"inputs": inputs_of(name), "logits": logits_of(model, name), "class": type(model).__name__}
        torch.save(known, folder / "expected.pt")
        folders.append(str(folder))
    run = subprocess.run([sys.executable, "-c", RELOAD, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["loaded", str(len(folders))]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.native])
def test_a_registered_student_comes_back_different(name, tmp_path):
    model = sparse_model(name, capacity_factor=1.5)
    with torch.no_grad():
        for block in routed_blocks(model).values():
            for parameter in (*block.experts.parameters(), block.router.weight):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    again, info = FAMILIES[name].auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not any(info.values()), info
    assert again.config.get_text_config()._experts_implementation == "grouped_mm"
    torch.testing.assert_close(logits_of(again, name), logits_of(model, name))
    assert next(iter(routed_blocks(again).values())).router.capacity_factor == 1.5


def test_a_new_model_from_a_routed_config_holds_garbage():
    config = sparse_model("gemma").config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert all(p.isfinite().all() and p.abs().max() < 5 for p in model.parameters())
    assert model.model.layers[0].mlp.experts.gate_up_proj.std() > 0.1


# ---- learning -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_cannot_grow_apart(name):
    """Copies give the router no gradient at first; what each expert meets differs, so experts do not stay copies."""
    sparse = sparse_model(name)
    inputs = inputs_of(name)
    logits = sparse(**inputs).logits
    (logits.log_softmax(-1)[..., 0].mean()).backward()
    for block in routed_blocks(sparse).values():
        experts = block.experts.down_proj.grad
        assert block.router.weight.grad.abs().max() < 1e-6 * max(1.0, experts.abs().max())
        assert (experts[0] - experts[1]).abs().max() > 1e-3 * experts.abs().max()
        assert experts.abs().sum((1, 2)).gt(0).sum() >= 2


def test_a_router_of_zeros_uses_all_experts():
    """Why router_std=0 is refused."""
    sparse = sparse_model("llama")
    block = next(iter(routed_blocks(sparse).values()))
    block.router.weight.data.zero_()
    _, _, indices = block.router(torch.randn(50, 16))
    assert len(indices.unique()) == 2
    with pytest.raises(ValueError, match=r"router_std=0.*never learn"):
        sparse_model("llama", router_std=0.0)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_vl", "llava_qwen2", "llava_llama", "llama", "gemma"])
def test_an_adapter_on_experts_and_routers_is_lost(name, tmp_path):
    torch.manual_seed(0)
    base = sparse_model(name)
    config = LoraConfig(r=2, target_modules=r".*(language_)?model.*q_proj", target_parameters=TARGETS)
    check_lora_reaches_experts(base, config)
    model = get_peft_model(base, config)
    check_lora_reaches_experts(model, config)
    assert len(routed_blocks(model)) == 2 and activated_parameters(model).total > activated_parameters(base).activated
    before = logits_of(model, name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".experts." in key and "lora_B" in key:
                parameter.normal_()
    after = logits_of(model, name)
    assert (after - before).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(sparse_model(name), tmp_path)
    torch.testing.assert_close(logits_of(again, name), after)
    torch.testing.assert_close(logits_of(again.merge_and_unload(), name), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "config", "frozen"),
    [
        ("qwen2", LoraConfig(target_modules="all-linear"), "6 of 6"),
        ("llama", LoraConfig(target_modules="all-linear", target_parameters=TARGETS[:2]), "2 of 6"),
        ("llama", LoraConfig(target_modules="all-linear", target_parameters=TARGETS[2:]), "4 of 6"),
        ("llama", LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]), "4 of 6"),
        ("llama", LoraConfig(target_parameters=["gate_up", "experts.down", "gate"]), "6 of 6"),  # parts of names
    ],
)
def test_an_adapter_that_leaves_experts_frozen_is_accepted(name, config, frozen):
    model = sparse_model(name)
    with pytest.raises(ValueError, match="target_parameters=") as error:
        check_lora_reaches_experts(model, config)
    assert str(TARGETS) in str(error.value) and frozen in str(error.value)
    check_lora_reaches_experts(dense_model(name), config)  # nothing to reach


def test_the_suggested_target_parameters_do_not_satisfy_the_check():
    model = sparse_model("vit")
    with pytest.raises(ValueError, match="target_parameters=") as error:
        check_lora_reaches_experts(model, LoraConfig(target_modules="all-linear"))
    wanted = str(error.value).split("target_parameters=")[1].split("]")[0] + "]"
    config = LoraConfig(r=2, target_parameters=eval(wanted))  # a list of strings
    check_lora_reaches_experts(model, config)
    trained = {n.split(".lora_")[0] for n, p in get_peft_model(model, config).named_parameters() if p.requires_grad}
    assert len(trained) == 6


@pytest.mark.parametrize("name", ["qwen2", "llama", "vit"])
def test_activated_parameters_are_not_those_a_token_uses(name):
    model = sparse_model(name, num_experts=5, top_k=2)
    counted = activated_parameters(model)
    assert counted.total == sum(p.numel() for p in model.parameters())
    blocks = routed_blocks(model)
    idle = 0
    for block in blocks.values():  # what the experts of one token really see
        hidden = torch.randn(1, block.router.weight.shape[1])
        _, weights, indices = block.router(hidden)
        block.experts(hidden, indices, weights).sum().backward()
        for parameter in block.experts.parameters():
            idle += (parameter.grad.flatten(1).abs().sum(1) == 0).sum() * parameter[0].numel()
    assert counted.activated == counted.total - idle
    assert activated_parameters(dense_model(name))[0] == activated_parameters(dense_model(name))[1]


# ---- settings -------------------------------------------------------------------------------------------------------
def test_layer_modes_mean_other_layers():
    modes = {"alternate": [0, 2, 4], "sparse": [0, 2, 4], "first_half": [0, 1], "second_half": [2, 3, 4]}
    for mode, expected in (modes | {"all": [0, 1, 2, 3, 4]}).items():
        assert moe_layers(mode, 5) == expected
    assert moe_layers([1, 4], 5) == [1, 4]


def test_settings_cannot_be_given_on_the_command_line():
    parser = HfArgumentParser(UpcycleConfig)
    assert parser.parse_args_into_dataclasses([])[0] == UpcycleConfig()
    assert parser.parse_args_into_dataclasses(["--layers", "first_half", "--top_k", "1"])[0].layers == "first_half"
    assert parser.parse_args_into_dataclasses(["--layers", "0,2"])[0].layers == [0, 2]
    assert UpcycleConfig(layers=[1]).layers == [1]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen2", dict(num_experts=2, top_k=3), "top_k=3 active experts of num_experts=2"),
        ("qwen2", dict(top_k=0), "choose 1 to 4"),
        ("qwen2", dict(num_experts=1), "at least 2 experts"),
        ("qwen2", dict(router_std=-1.0), "router_std=-1"),
        ("qwen2", dict(router_std=float("nan")), "router_std=nan"),
        ("qwen2", dict(capacity_factor=0.0), "capacity_factor=0"),
        ("qwen2", dict(layers="every_2"), "expected alternate"),
        ("qwen2", dict(layers="0,3"), r"\[3\] out of range"),
        ("qwen3_vl", dict(capacity_factor=1.5), "cannot make qwen3_vl_text .* never drops tokens"),
        ("qwen2", dict(layers=[0, 3]), r"\[3\] out of range, the model has layers 0 to 2"),
        ("qwen2", dict(layers=[-1]), r"out of range"),
        ("qwen2", dict(layers=[2, 0]), "ascending"),
        ("qwen2", dict(layers=[0, 0]), "different"),
        ("qwen2", dict(layers=[]), "names no layer"),
        ("llama", dict(native_only=True), 'choose layers="all"'),
        ("gemma", dict(native_only=True), "native_only: gemma"),
        ("vit", dict(native_only=True), "native_only: vit"),
        ("qwen2", dict(native_only=True, capacity_factor=1.5), "never drops tokens"),
    ],
)
def test_settings_that_cannot_work_are_accepted(name, settings, message):
    with pytest.raises(ValueError, match=message):
        upcycle_to_moe(dense_model(name), **settings)


def test_models_that_cannot_be_upcycled_are_accepted():
    llama = dense_model("llama")
    with pytest.raises(ValueError, match="sparse already"):
        upcycle_to_moe(sparse_model("qwen3"))
    with pytest.raises(ValueError, match="sparse already"):
        upcycle_to_moe(sparse_model("llama"))
    with pytest.raises(ValueError, match="merge_and_unload"):
        upcycle_to_moe(get_peft_model(dense_model("llama"), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="upcycle_to_moe takes transformers models, got Linear"):
        upcycle_to_moe(nn.Linear(2, 2))
    with torch.device("meta"), pytest.raises(ValueError, match="has no data"):
        upcycle_to_moe(LlamaForCausalLM(llama.config))
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    with pytest.raises(ValueError, match="cannot make phi3"):
        upcycle_to_moe(Phi3ForCausalLM(Phi3Config(**shape)))
    with pytest.raises(ValueError, match="cannot make bert"):
        upcycle_to_moe(BertModel(BertConfig(**shape)))
    with pytest.raises(ValueError, match="not one stack"):
        upcycle_to_moe(T5ForConditionalGeneration(T5Config(d_model=16, num_layers=2, num_heads=2, vocab_size=64)))
    biased = LlamaForCausalLM(type(llama.config)(**SHAPE, mlp_bias=True))
    with pytest.raises(ValueError, match=r"no place for down_proj\.bias"):
        upcycle_to_moe(biased)


def test_a_quantised_model_is_accepted(tmp_path):
    pytest.importorskip("bitsandbytes")
    dense_model("llama").save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    )
    with pytest.raises(ValueError, match="is quantised"):
        upcycle_to_moe(quantised)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "inv_freq would be another one"),
        ({"rms_norm_eps": 1e-8}, "its outputs differ by"),
        ({"num_key_value_heads": 4}, "k_proj.weight .* needs the same of the dense model"),
    ],
)
def test_a_student_that_is_another_function_is_handed_out(change, message, monkeypatch):
    """As when the config of another family has other defaults."""
    native = moe._native_text

    def changed(*arguments):
        config = native(*arguments)
        for name, value in change.items():
            setattr(config, name, value)
        return config

    monkeypatch.setattr(moe, "_native_text", changed)
    with pytest.raises(ValueError, match=message):
        upcycle_to_moe(dense_model("qwen2"))
