"""Runs many cases in one pair of processes and writes what each found; started by torchrun, read by the tests.

torchrun --nproc_per_node 2 tests/training/distributed_worker.py OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import IterableDataset
from safetensors.torch import save_file
from torch import nn

from hf_distill import DistillSFTTrainer, FeatureKD, FrozenTeacher, LogitKD
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.training.scaling_cases import Case, before_trainer, build, by_trainer, mixed_objective, plain, whole

FSDP2 = dict(
    fsdp=True,
    fsdp_config={
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
)
NO_CHECKPOINTING = dict(gradient_checkpointing=False)
BETWEEN = dict(eval_strategy="steps", eval_steps=1)

CASES = {
    "full": Case(per_device=4, eval_size=4),
    "full_split": Case(per_device=1, accumulation=4, eval_size=1, settings=NO_CHECKPOINTING),
    "ragged": Case(rows=7, per_device=4, eval_size=4),
    "ragged_split": Case(rows=7, per_device=1, accumulation=4, eval_size=3),
    "ragged_pairs": Case(rows=5, per_device=2, accumulation=2, eval_size=4),
    "evaluated_first": Case(rows=7, per_device=4, eval_size=4, evaluate_first=True, settings=BETWEEN),
    "lora": Case(part="lora", rows=7, per_device=2, accumulation=2, eval_size=2),
    "head": Case(part="head", per_device=4, eval_size=4),
    "packed": Case(packing=True, per_device=1, accumulation=4, eval_size=2),
    "t5": Case("t5", rows=7, per_device=2, accumulation=2, eval_size=2),
    "bert": Case("bert", rows=7, per_device=2, accumulation=2, eval_size=2),
    "bert_one_rank_has_only_repeats": Case("bert", rows=5, per_device=2, accumulation=2, eval_size=4),
    "fsdp2": Case(per_device=4, eval_size=4, strategy="fsdp2", settings=FSDP2 | NO_CHECKPOINTING),
    "fsdp2_ragged": Case(
        rows=7, per_device=2, accumulation=2, eval_size=2, strategy="fsdp2", settings=FSDP2 | NO_CHECKPOINTING
    ),
    "fsdp2_evaluated_first": Case(
        per_device=4, eval_size=4, evaluate_first=True, strategy="fsdp2", settings=FSDP2 | NO_CHECKPOINTING | BETWEEN
    ),
    "fsdp2_checkpointing": Case(per_device=4, eval_size=4, strategy="fsdp2", settings=FSDP2),
    "fsdp2_lora": Case(part="lora", per_device=4, eval_size=4, strategy="fsdp2", settings=FSDP2 | NO_CHECKPOINTING),
    "fsdp2_head": Case(part="head", per_device=4, eval_size=4, strategy="fsdp2", settings=FSDP2 | NO_CHECKPOINTING),
    "adapter_off": Case(part="lora", adapter_off=True, rows=7, per_device=4, eval_size=4, settings=NO_CHECKPOINTING),
    "fsdp2_adapter_off": Case(
        part="lora",
        adapter_off=True,
        per_device=4,
        eval_size=4,
        strategy="fsdp2",
        settings=FSDP2 | NO_CHECKPOINTING,
    ),
    "fsdp2_tied": Case(part="tied", per_device=4, eval_size=4, strategy="fsdp2", settings=FSDP2 | NO_CHECKPOINTING),
}


def fresh_state() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def trained(case: Case, objective, teacher_layers: int = 3, dtype=torch.float32, steps: int = 3, **settings):
    """A trainer after a few Adam steps; ranks may have made different objectives, which must end equal."""
    args = sft_arguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=2,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **case.settings | settings,
    )
    before_trainer(case)
    trainer = DistillSFTTrainer(
        tiny_llama(16, 2, seed=1).to(dtype),
        teacher=FrozenTeacher(tiny_llama(32, teacher_layers, seed=2)),
        objective=objective,
        args=args,
        train_dataset=text_dataset(12, seed=6),
        processing_class=tiny_tokenizer(),
    )
    torch.manual_seed(trainer.accelerator.process_index)
    for parameter in objective.parameters():
        nn.init.normal_(parameter)  # ranks disagree on purpose: training starts from rank 0's
    return trainer


def of_objective(trainer) -> dict:
    own = {plain(n): whole(p) for n, p in trainer.model.named_parameters() if "distill_objective" in n}
    every = [trainer.accelerator.gather(p[None].contiguous()) for p in own.values()]
    apart = max((e[0] - e[1]).abs().max().item() for e in every)
    rates = {round(g["lr"], 6) for g in trainer.optimizer.param_groups}
    loss = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"between_ranks": apart, "rates": sorted(rates), "losses": loss, "steps": trainer.state.global_step}


def projectors(case: Case) -> dict:
    trainer = trained(case, LogitKD() + FeatureKD(), objective_learning_rate=0.05)
    trainer.train()
    return of_objective(trainer)


def features_only(case: Case) -> dict:
    """Reads the first layer alone: the head and the second layer get no gradient."""
    trainer = trained(case, FeatureKD(layers=((1, 1),)))
    trainer.train()
    return of_objective(trainer)


def low_precision_student(case: Case) -> dict:
    trainer = trained(case, LogitKD() + FeatureKD(), dtype=torch.bfloat16)
    trainer.train()
    dtypes = {plain(n): str(p.dtype) for n, p in trainer.model.named_parameters()}
    return (
        of_objective(trainer)
        | {"dtypes": sorted({v for k, v in dtypes.items()})}
        | {"projector": next(v for k, v in dtypes.items() if "distill_objective" in k)}
    )


def stream(case: Case) -> dict:
    """An IterableDataset: eight rows in two steps, on one rank or two."""
    data = text_dataset(8, seed=4).to_iterable_dataset()
    assert isinstance(data, IterableDataset)
    trainer = build_stream(case, data)
    trainer.train()
    return {"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]}


def build_stream(case: Case, data, **settings):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = sft_arguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=4 // world,
        max_steps=2,
        dataloader_drop_last=True,
        learning_rate=1e-2,
        **settings,
    )
    before_trainer(case)
    return DistillSFTTrainer(
        tiny_llama(16, 2, seed=1),
        teacher=FrozenTeacher(tiny_llama(32, 3, seed=2)),
        objective=mixed_objective(),
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )


def refusals(case: Case) -> dict:
    """What several ranks cannot count exactly, and the name of the setting in the error."""
    told = {}
    data = text_dataset(8, seed=4)
    tries = {
        "split_batches": dict(settings={"accelerator_config": {"split_batches": True}}),
        "dispatch_batches": dict(settings={"accelerator_config": {"dispatch_batches": True}}),
        "even_batches": dict(settings={"accelerator_config": {"even_batches": False}}),
    }
    for name, changes in tries.items():
        told[name] = error_of(lambda changes=changes: build(Case(**changes), tempfile.mkdtemp()))
        fresh_state()
    told["dataloader_drop_last"] = error_of(
        lambda: DistillSFTTrainer(
            tiny_llama(),
            teacher=FrozenTeacher(tiny_llama(32)),
            args=sft_arguments(tempfile.mkdtemp(), max_steps=1),
            train_dataset=data.to_iterable_dataset(),
            processing_class=tiny_tokenizer(),
        )
    )
    fresh_state()
    return told


def error_of(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def resumed_ragged(case: Case) -> dict:
    """Killed inside an epoch whose last batch is filled up with repeated rows; the rest must not count them."""
    losses = []
    folder = f"{sys.argv[1]}/resumed"
    for resume in (False, True):
        trainer = build(case, f"{folder}-{resume}" if not resume else f"{folder}-False")
        trainer.train(resume_from_checkpoint=f"{folder}-False/checkpoint-2" if resume else None)
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        fresh_state()
    return {"losses": losses}


DDP, SHARDED = Case(), Case(strategy="fsdp2", settings=FSDP2 | NO_CHECKPOINTING)
OTHERS = {
    "projectors": (projectors, DDP),
    "projectors_fsdp2": (projectors, SHARDED),
    "features_only": (features_only, DDP),
    "features_only_fsdp2": (features_only, SHARDED),
    "low_precision_fsdp2": (low_precision_student, SHARDED),
    "stream": (stream, DDP),
    "refusals": (refusals, DDP),
    "resumed_ragged": (
        resumed_ragged,
        Case(rows=7, per_device=1, settings=dict(save_strategy="steps", save_steps=2, num_train_epochs=1)),
    ),
}


def main(output: str, only: list[str]) -> None:
    facts: dict[str, dict] = {}
    for name in only or [*CASES, *OTHERS]:
        fresh_state()
        try:
            if name in CASES:
                tensors, facts[name] = by_trainer(CASES[name], tempfile.mkdtemp())
                if PartialState().is_main_process:
                    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{output}/{name}.safetensors")
            else:
                function, case = OTHERS[name]
                facts[name] = function(case)
        except Exception:
            facts[name] = {"error": traceback.format_exc()[-3000:]}
            print(name, facts[name]["error"], flush=True)
    if os.environ["RANK"] == "0":
        with open(f"{output}/facts.json", "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
