"""All private names of TRL, transformers and accelerate that hf_distill leans on, each with a contract test.

Written against transformers 5.23, trl 1.16, accelerate 1.15, peft 0.21. Nothing else in the package may import them.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.data import BatchSampler
from transformers import PretrainedConfig

TESTED = {"transformers": "5.23", "trl": "1.16", "accelerate": "1.15", "peft": "0.21"}


def check_versions() -> None:
    """The installed libraries are those whose private names were tested. Raises ImportError, naming them all.

    `HF_DISTILL_ANY_VERSION=1` goes on all the same.
    """
    if os.environ.get("HF_DISTILL_ANY_VERSION") == "1":
        return
    found = {name: importlib.metadata.version(name) for name in TESTED}
    wrong = {name: version for name, version in found.items() if not version.startswith(TESTED[name] + ".")}
    if wrong:
        have = ", ".join(f"{name} {version} (tested: {TESTED[name]})" for name, version in wrong.items())
        want = " ".join(f"'{name}=={TESTED[name]}.*'" for name in wrong)
        raise ImportError(
            f"hf_distill leans on internals of these libraries and was not tested with {have}: pip install {want}, "
            "or set HF_DISTILL_ANY_VERSION=1 to go on at your own risk"
        )


check_versions()


class ForwardRedirection:
    """Run any function of a wrapped model inside its wrapper's forward, so that DDP's and FSDP's hooks fire.

    The wrapped module's `forward` is swapped for the length of one call, as TRL's `_ForwardRedirection` does. What
    `function` returns passes through the wrapper as the forward's output, so it must hold the loss.
    """

    def __call__(self, wrapper: nn.Module, original: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
        own = "forward" in original.__dict__
        before = original.forward

        def restore() -> None:
            if own:
                original.forward = before
            else:
                original.__dict__.pop("forward", None)

        def redirected(*inner_args, **inner_kwargs):
            restore()
            return function(*inner_args, **inner_kwargs)

        original.forward = redirected
        try:
            return wrapper(*args, **kwargs)
        finally:
            restore()


def require_bitsandbytes() -> None:
    """Raises ImportError with the remedy where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "8-bit and 4-bit loading need bitsandbytes, which is not installed: pip install bitsandbytes, "
            "or load the model without quantisation (dtype bfloat16 halves float32's memory)"
        )


def load_model(path: str, *, auto_class=None, what: str = "model", quantization_config=None, **kwargs) -> nn.Module:
    """`from_pretrained` by the class the checkpoint names; safetensors only, remote code only when asked for.

    Raises:
        ValueError: `path` is no model; names it and `what` it was meant to be.
    """
    import transformers

    trust = kwargs.get("trust_remote_code", False)
    revision = kwargs.get("revision")
    try:
        ours = transformers
        kind = _model_type(path, revision)
        if kind.startswith("routed"):  # a sparse student that transformers has no class for
            from hf_distill.students import routed as ours
        elif kind == "subclasses":
            from hf_distill.students import heads as ours
        config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust)
        if auto_class is None:
            name = (config.architectures or [""])[0]
            auto_class = getattr(ours, name, None) or transformers.AutoModelForCausalLM
        if quantization_config is not None:
            kwargs["quantization_config"] = _without_the_classifier(quantization_config, auto_class, config)
        return auto_class.from_pretrained(path, use_safetensors=True, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        remedy = "Give a folder with config.json and safetensors weights, or a Hub id"
        if "trust_remote_code" in str(error):
            remedy = "It needs code of its own: if you trust that code, set trust_remote_code" + (
                " in teacher_model_init_kwargs ('{\"trust_remote_code\": true}')" if what == "teacher" else ""
            )
        looked = "a folder" if os.path.isdir(path) else "a Hub id (there is no folder of that name)"
        raise ValueError(
            f"cannot load the {what} from {path!r}, taken as {looked}: {str(error).strip().splitlines()[0]}. {remedy}"
        ) from error


def _model_type(path: str, revision: str | None) -> str:
    from transformers import PretrainedConfig

    return PretrainedConfig.get_config_dict(path, revision=revision)[0].get("model_type") or ""


def _without_the_classifier(quantization_config, auto_class, config):
    """transformers means to leave a classifier's head as it is, and quantises those that have a bias."""
    skipped = getattr(quantization_config, "llm_int8_skip_modules", ())  # None: transformers decides
    if "Classification" not in auto_class.__name__ or skipped is not None:
        return quantization_config
    with torch.device("meta"):
        model = getattr(auto_class, "from_config", None) or auto_class._from_config
        last = list(model(config).named_parameters())[-1][0]
    quantization_config = copy.deepcopy(quantization_config)
    quantization_config.llm_int8_skip_modules = [last.rpartition(".")[0]]
    return quantization_config


def load_processing_class(path: str, **kwargs):
    """The processor or tokenizer saved at `path`, or None when there is none."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(path, **kwargs)
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def own_names(model: nn.Module, folder: str):
    """For the length of a load: a checkpoint of other names than the model's is read as `from_pretrained` reads it.

    save_pretrained writes the names that a family has on the Hub (ViT, fused experts). Trainer gives these to
    load_state_dict(strict=False), which leaves such weights as they were.
    """

    def convert(module, state_dict, *rest) -> None:
        if not state_dict.keys() <= module.state_dict().keys():
            own = type(module).from_pretrained(folder, dtype=torch.float32).state_dict()  # holds any other exactly
            state_dict.clear()
            state_dict.update(own)

    handle = model.register_load_state_dict_pre_hook(convert)
    try:
        yield
    finally:
        handle.remove()


def prepare_frozen(model: nn.Module, accelerator, *, placed: bool) -> nn.Module:
    """A frozen model sharded or moved as the run needs it.

    Args:
        placed: it already has its devices (device_map, quantised): only sharding strategies may still touch it.
    """
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    if accelerator.distributed_type == "DEEPSPEED":
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == "FSDP" and not placed:
        _shard_layers(model, accelerator)
        return prepare_fsdp(model, accelerator)
    if not placed:
        model.to(accelerator.device)
    return model.eval()


def vllm_generation(trainer):
    """TRL's vLLM engine for a trainer's model; `sync_weights()`, then `generate(prompts, images, num_generations)`.

    Raises:
        ImportError: vLLM is not installed.
    """
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.import_utils import is_vllm_available

    if not is_vllm_available():
        raise ImportError("use_vllm needs vLLM, which is not installed: pip install 'trl[vllm]', or leave use_vllm out")
    args = trainer.args
    return VLLMGeneration(
        model=trainer.model,
        accelerator=trainer.accelerator,
        processing_class=trainer.processing_class,
        mode=args.vllm_mode,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        server_timeout=args.vllm_server_timeout,
        group_port=args.vllm_group_port,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        temperature=args.sampling_temperature,
        top_p=args.sampling_top_p,
        top_k=args.sampling_top_k,
        max_completion_length=args.max_completion_length,
    )


class NoReference(nn.Module):
    """Stands where DPOTrainer wants a reference model, so that it loads none; what it would say is in the batch."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig()


def _shard_layers(model: nn.Module, accelerator) -> None:
    """FSDP2, layer by layer: TRL's `prepare_fsdp` alone gathers the whole model at once."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or isinstance(model, FSDPModule):
        return
    mesh = getattr(accelerator, "torch_device_mesh", None)
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "mesh": mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
    }
    layers = getattr(model, "_no_split_modules", None) or ()
    for module in [m for m in model.modules() if type(m).__name__ in layers]:
        fully_shard(module, **options)


@functools.cache
def close_gloo_at_exit() -> None:
    """Close the process group of CPU ranks before the interpreter ends.

    Left open, gloo's threads now and then abort a rank that has finished ("terminate called without an active
    exception"), and the launcher takes the whole run for failed.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())


def used_columns(trainer) -> frozenset[str] | None:
    """The columns that a trainer's collator gets; None: all."""
    if not trainer.args.remove_unused_columns:
        return None
    trainer._set_signature_columns_if_needed()
    return frozenset(trainer._signature_columns)


def is_sharded(accelerator) -> bool:
    """Whether parameters live in shards (FSDP, DeepSpeed): the trainer's own files then hold the objective's too."""
    return accelerator.distributed_type in ("FSDP", "DEEPSPEED")


def real_samples(accelerator) -> int | None:
    """How many samples of this rank's last batch are not repeats to even out the ranks; None: all are."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader:
        return None
    loader = state.active_dataloader
    sampler = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
    while isinstance(sampler, SkipBatchSampler):  # a run resumed inside an epoch; `state.remainder` is unknown there
        sampler = sampler.batch_sampler
    if not isinstance(sampler, BatchSamplerShard) or sampler.drop_last:
        return None
    size = sampler.batch_size
    real = len(sampler.batch_sampler.sampler) % (size * sampler.num_processes)
    return min(max(real - sampler.process_index * size, 0), size) if real else None


def check_dataloading(accelerator) -> None:
    """Several ranks each read their own, equally many batches. Raises ValueError for settings that say otherwise."""
    config = accelerator.dataloader_config
    if config.dispatch_batches is None:
        config.dispatch_batches = False  # streams would be read by one rank and cut by rows, loss rows included
    for name, refused in (("dispatch_batches", True), ("split_batches", True), ("even_batches", False)):
        if getattr(config, name) is refused:
            raise ValueError(
                f"accelerator_config {name}={refused} gives ranks parts of a batch or unequal numbers of batches, "
                f"which exact scaling cannot count: set {name}={not refused}"
            )


@contextlib.contextmanager
def before_training(trainer):
    """Evaluate a model that no `train()` has wrapped yet, and leave it so that a later one wraps it.

    Trainer alone marks it as prepared for good: on several ranks `train()` would then run without DDP, each rank on its
    own gradients, without a word; under FSDP2 it raises.
    """
    accelerator = trainer.accelerator
    if accelerator._models:
        yield
    elif accelerator.distributed_type == "FSDP" and accelerator.is_fsdp2:
        # a model is sharded only beside an optimizer; training makes its own, of the parameters as they rest
        trainer.model, _ = accelerator.prepare(trainer.model, torch.optim.SGD(trainer.model.parameters(), lr=0.0))
        trainer.model_wrapped = trainer.model
        accelerator._optimizers.clear()
        yield
        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    elif is_sharded(accelerator):
        yield
    else:
        accelerator._models.append(None)  # the model runs as it is
        try:
            yield
        finally:
            accelerator._models.remove(None)


def find_unused_parameters(accelerator) -> None:
    """Let DDP live with parameters without a gradient; Trainer reads its setting before the objective is known."""
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.find_unused_parameters = True


def shard_own_layers(accelerator, model: nn.Module) -> None:
    """Have FSDP shard the layers that this model has; to be called before training.

    accelerate keeps the classes of the process's first model, which another stage's may not have, and stops at names
    that a family lists and a model lacks (LLaVA's, of CLIP's text side).
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or accelerator.distributed_type != "FSDP":
        return
    policy = plugin.auto_wrap_policy
    plugin.auto_wrap_policy = policy.func if isinstance(policy, functools.partial) else policy
    present = {type(module).__name__ for module in model.modules()}
    asked = {*(plugin.transformer_cls_names_to_wrap or ()), *(getattr(model, "_no_split_modules", None) or ())}
    plugin.transformer_cls_names_to_wrap = sorted(asked & present)


def shard_apart(accelerator, model: nn.Module, objective: nn.Module) -> None:
    """FSDP2 shards the objective as a group of its own: one group cannot mix its dtype with the student's.

    Raises:
        ValueError: they differ in dtype and the wrapping policy knows no classes.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or not any(True for _ in objective.parameters()):
        return
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        layers = plugin.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None) or []
        plugin.transformer_cls_names_to_wrap = [*layers, type(objective).__name__]
    elif len({p.dtype for m in (model, objective) for p in m.parameters() if p.requires_grad}) > 1:
        raise ValueError(
            "FSDP2 cannot shard a student and an objective of different dtypes in one group: set "
            "fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP, or load the student in float32"
        )
