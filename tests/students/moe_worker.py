"""Trains sparse students in one process or in two; started by torchrun, read by test_moe_two_ranks.py.

torchrun --nproc_per_node 2 tests/students/moe_worker.py OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_distill import BalanceLoss, DistillSFTTrainer, LogitKD, RouterTelemetryCallback, upcycle_to_moe
from tests.helpers import SGD, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

LAYER = {"qwen2": "Qwen2MoeDecoderLayer", "llama": "LlamaDecoderLayer"}
CASES = ["qwen2 ddp", "llama ddp", "qwen2 fsdp2", "llama fsdp2"]


def dense(family: str):
    llama = tiny_llama(layers=3)
    if family == "llama":
        return llama
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "pad_token_id", "eos_token_id", "initializer_range")
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**{name: getattr(llama.config, name) for name in names}, bos_token_id=None))


def train(family: str, folder: str, **settings) -> dict:
    """The logs and the trained student's first router of three steps over the same 24 rows."""
    settings = dict(per_device_train_batch_size=4, max_steps=3, gradient_checkpointing=False) | SGD | settings
    args = sft_arguments(folder, **settings)
    if args.fsdp:  # accelerate shards on GPU processes only; the test asks for the same code on the CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = DistillSFTTrainer(
        upcycle_to_moe(dense(family), router_std=0.5),
        teacher=tiny_llama(hidden=32, seed=7),
        objective=LogitKD() + 0.1 * BalanceLoss(z_weight=0.1),
        args=args,
        train_dataset=text_dataset(24),
        processing_class=tiny_tokenizer(),
        callbacks=[RouterTelemetryCallback("expert")],
    )
    trainer.train()
    weight = next(p for n, p in trainer.model.named_parameters() if n.endswith("mlp.gate.weight"))
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    logs = [
        {k: v for k, v in log.items() if "load" in k or "loss" in k or "router" in k}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    wrapper = type(trainer.model_wrapped).__name__
    return {"logs": logs, "router": weight.tolist(), "wrapper": wrapper, "processes": trainer.accelerator.num_processes}


def fsdp2(layer: str) -> dict:
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": [layer],
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    }
    return dict(fsdp=True, fsdp_config=config)


def main(folder: str) -> None:
    facts = {}
    for case in CASES:
        family, strategy = case.split()
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[name]
        try:
            settings = fsdp2(LAYER[family]) if strategy == "fsdp2" else {}
            facts[case] = train(family, os.path.join(folder, case.replace(" ", "_")), **settings)
        except Exception:
            facts[case] = {"error": traceback.format_exc()}
    if os.environ["RANK"] == "0":
        with open(os.path.join(folder, "facts.json"), "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    main(sys.argv[1])
