"""`--tiny`: the same configuration on random 2-layer models of the same families and eight made-up rows."""

from __future__ import annotations

import os

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_distill.teachers.cached import is_cache

# families of ids whose config cannot be read without a network, by the start of the id
FAMILIES = {
    "Qwen/Qwen1.5": "qwen2",
    "MiniLLM/": "qwen2",
    "Qwen/Qwen2.5": "qwen2",
    "Qwen/Qwen3": "qwen3",
    "meta-llama/": "llama",
    "HuggingFaceTB/SmolLM2": "llama",
    "mistralai/": "mistral",
    "google/gemma-2": "gemma2",
    "google/gemma-3": "gemma3_text",
    "microsoft/Phi-3": "phi3",
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def tiny_arguments(args, model) -> None:
    """Two steps on whatever machine this is; everything else stays as configured."""
    changed = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": min(args.gradient_accumulation_steps, 2),
        "max_length": 128,
        "logging_steps": 1,
        "report_to": [],
        "push_to_hub": False,
        "dataloader_num_workers": 0,
        "dataset_num_proc": None,
        "teacher_model_server_url": None,  # its stand-in is in this process
    }
    if not torch.accelerator.is_available():
        changed |= {"bf16": False, "fp16": False}
        model.attn_implementation = None
        if str(args.optim).startswith(("paged", "adamw_8bit", "adamw_bnb")):
            changed["optim"] = "adamw_torch"
    for name, value in changed.items():
        setattr(args, name, value)


def tiny_models(args, model, embedded_tokenizer: str) -> None:
    """Write the stand-ins under `<output_dir>/tiny` and point the settings at them.

    The teacher's vocabulary is padded further than the student's, as Qwen2.5's are.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_tokenizer)
    folder = os.path.join(args.output_dir, "tiny")
    if not args.teacher_adapter_off:
        path = args.teacher_model_name_or_path
        if path is not None and is_cache(path):
            raise ValueError(f"--tiny makes up its own teacher and data, and {path} is a cache of others: drop one")
        args.teacher_model_name_or_path = _write(path, os.path.join(folder, "teacher"), tokenizer, 64, seed=1)
        args.teacher_model_revision = None
    path = model.model_name_or_path or args.teacher_model_name_or_path
    model.model_name_or_path = _write(path, os.path.join(folder, "student"), tokenizer, 0, seed=2)
    model.model_revision = "main"


def tiny_oracle(args, config) -> None:
    """Stand in for the oracle of a `TeacherHackingConfig`, and ask for answers that fit."""
    config.answer_tokens = min(config.answer_tokens, 16)
    if config.oracle_model_name_or_path is not None:
        folder = os.path.join(args.output_dir, "tiny", "oracle")
        tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
        config.oracle_model_name_or_path = _write(config.oracle_model_name_or_path, folder, tokenizer, 64, seed=3)


def _write(named: str | None, folder: str, tokenizer, padding: int, seed: int) -> str:
    tiny_model(model_type_of(named), len(tokenizer) + padding, tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_type_of(named: str | None) -> str:
    """The family of an id or folder.

    Raises:
        ValueError: it cannot be told without a network.
    """
    if named is None:
        return "llama"
    if os.path.isdir(named):
        return AutoConfig.from_pretrained(named).model_type
    for start, family in FAMILIES.items():
        if named.startswith(start):
            return family
    try:
        return AutoConfig.from_pretrained(named).model_type
    except (OSError, ValueError) as error:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"--tiny cannot tell the family of {named!r} offline; it knows ids that start with {known}"
        ) from error


def tiny_model(model_type: str, vocabulary: int, tokenizer, seed: int) -> PreTrainedModel:
    """A random 2-layer causal model of a family."""
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **SHAPE, **tokens)
    if getattr(config, "use_sliding_window", None) is False:
        config.sliding_window = None
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def made_up_rows() -> Dataset:
    """Eight chats."""
    rows = []
    for i in range(8):
        question = {"role": "user", "content": f"What does range({i}) give?"}
        answer = {"role": "assistant", "content": " ".join(map(str, range(i))) or "nothing"}
        rows.append({"messages": [question, answer]})
    return Dataset.from_list(rows)
