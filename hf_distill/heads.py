"""Reading a Hugging Face model's signals: its backbone, its head, and whether both really are its logits."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from hf_distill.signals import HeadLogits, Rows, Signals
from hf_distill.taps import add_hidden_states, kinds, tapped

logger = logging.getLogger(__name__)

# heads that are more than one projection of the backbone's last hidden state: run dense, said aloud
DENSE_FAMILIES = ("ForMaskedLM", "ForPreTraining", "LMHeadModelWithValueHead", "XLNetLMHeadModel", "XLMWithLMHeadModel")
POSITION_TASKS = ("ForMaskedLM", "ForTokenClassification")
ROW_KEYS = ("loss_rows", "row_labels", "row_document", "document_example")
NOT_INPUTS = (*ROW_KEYS, "labels", "only_repeats", "mix_lambda", "labels_hard")


def base_model_of(model: nn.Module) -> nn.Module:
    """The transformers model below a PEFT wrapper.

    Raises:
        ValueError: prompt learning, whose virtual tokens exist only in the wrapper's forward.
    """
    if not hasattr(model, "get_base_model"):
        return model
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise ValueError(
            f"{type(config).__name__} adds virtual tokens in its wrapper, which distillation does not call; "
            "use LoRA or full fine-tuning"
        )
    return model.get_base_model()


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def has_row_labels(model: nn.Module) -> bool:
    """Whether labels belong to positions (language models, token tasks) and not to whole samples."""
    base = base_model_of(model)
    return base.get_output_embeddings() is not None or getattr(base, "loss_type", None) in POSITION_TASKS


def labels_are_shifted(model: nn.Module) -> bool:
    """Whether position s predicts the label at s + 1 (causal language models), or its own."""
    base = base_model_of(model)
    unshifted = is_encoder_decoder(base) or getattr(base, "loss_type", None) in POSITION_TASKS
    return has_row_labels(base) and not unshifted


def labels_of(model: nn.Module) -> str:
    """What labels belong to: "positions" of the input, those of a "decoder" of its own, or whole "samples"."""
    if not has_row_labels(model):
        return "samples"
    return "decoder" if is_encoder_decoder(base_model_of(model)) else "positions"


def runs_dense(model: nn.Module) -> bool:
    """Whether the model has no head, or more than one projection, so that its own logits are used."""
    base = base_model_of(model)
    listed = any(family in type(base).__name__ for family in DENSE_FAMILIES)
    return base.get_output_embeddings() is None or listed


def logit_scale_of(model: nn.Module) -> float:
    """What multiplies head(hidden) in this family (Cohere, Falcon-H1, Granite, MiniCPM...)."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def full_tensor(parameter: Tensor | None) -> Tensor | None:
    """A sharded parameter gathered once for this step; a plain one as it is."""
    if parameter is None or type(parameter).__name__ != "DTensor":
        return parameter
    from torch.distributed.tensor import Partial

    # FSDP averages gradients over ranks; a plain full_tensor() would sum them and silently change the scale
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def head_logits(model: nn.Module, hidden: Tensor) -> HeadLogits:
    """HeadLogits of rows (N, H) under the model's own head. Call it inside the wrapped model's forward."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if weight.is_meta:
        weight, bias = resident_head(head)
    extra = getattr(model, "final_logits_bias", None)  # BART, Marian: a buffer (1, V)
    if extra is not None:
        bias = extra[0] if bias is None else bias + extra[0]
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return HeadLogits(hidden, full_tensor(weight), full_tensor(bias), logit_scale_of(model), softcap)


def resident_head(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weights of a head that accelerate keeps offloaded outside its forward; loaded once and kept."""
    cached = getattr(head, "_hf_distill_resident", None)
    if cached is None:
        hook = getattr(head, "_hf_hook", None)
        if hook is None or hook.weights_map is None:
            raise ValueError("the model's head has no weights in memory (meta device) and no offload hook to load them")
        device = hook.execution_device
        cached = tuple(
            hook.weights_map[name].to(device) if getattr(head, name, None) is not None else None
            for name in ("weight", "bias")
        )
        head._hf_distill_resident = cached
    return cached


def rows_of(batch: dict, prefix: str = "") -> Rows | None:
    if prefix + "loss_rows" not in batch:
        return None
    return Rows(*(batch[prefix + key] for key in ROW_KEYS))


def model_inputs(batch: dict) -> dict:
    """What of a batch a model's forward reads: no labels, rows, cached columns or teacher's inputs."""
    return {k: v for k, v in batch.items() if k not in NOT_INPUTS and not k.startswith(("teacher_", "cached_"))}


def collect(model: nn.Module, batch: dict, needs: frozenset[str], rows: Rows | None, *, dense: bool = False) -> Signals:
    """Run a model once and read its signals.

    Args:
        model: a transformers model (PEFT allowed); call it inside the wrapped model's forward when it is wrapped.
        batch: the model's inputs, with or without `labels`; row keys of the collator are ignored.
        needs: of "logits", "hidden_states", "attentions", "router_logits" (one of its `features`),
            "features:<path>" (see `taps`).
        rows: the rows that carry loss; None for models with one label per sample.
        dense: take the model's own logits instead of backbone and head.
    """
    base = base_model_of(model)
    inputs = model_inputs(batch)
    if is_encoder_decoder(base) and "decoder_input_ids" not in inputs and "labels" in batch:
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    if has_row_labels(base):
        inputs["use_cache"] = False  # with a cache, packed documents see each other
    read = kinds(needs)
    options = {f"output_{name}": True for name in ("hidden_states", "attentions", "router_logits") if name in read}
    by_head = "logits" in needs and not dense and not runs_dense(base)
    own_head = "logits" in needs or ("features" in read and runs_dense(base))  # a tap may lie in a classifier
    with tapped(base, needs) as features:
        if by_head or (not own_head and getattr(base, "base_model", base) is not base):
            out, hidden = _run_backbone(base, inputs | options)
            logits = None
            if by_head:
                logits = head_logits(base, hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows.index))
        else:
            out = base(**inputs, **options)
            logits = out.logits
            if rows is not None:
                logits = logits.reshape(-1, logits.shape[-1]).index_select(0, rows.index)
    prefix = "decoder_" if is_encoder_decoder(base) else ""
    hidden_states = tuple(getattr(out, prefix + "hidden_states", None) or ())
    add_hidden_states(features, needs, hidden_states)
    return Signals(
        logits=logits,
        labels=batch.get("labels") if rows is None else rows.labels,
        hidden_states=hidden_states,
        attentions=tuple(getattr(out, prefix + "attentions", None) or ()),
        features=features | ({"router_logits": out.router_logits} if "router_logits" in needs else {}),
        rows=rows,
        batch=batch,
    )


def _run_backbone(model: nn.Module, inputs: dict) -> tuple:
    """The backbone's output, and what it gives the head. T5 has no backbone of its own: it runs without its head."""
    if model.base_model is not model:
        out = model.base_model(**inputs)
        return out, out.last_hidden_state
    head = model.get_output_embeddings()
    own = head.__dict__.get("forward")
    head.forward = lambda hidden: hidden
    try:
        out = model(**inputs)
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    return out, out.logits


@torch.no_grad()
def check_head(model: nn.Module, what: str) -> None:
    """Compare HeadLogits of a few rows with the model's own logits.

    Args:
        what: "student" or "teacher", for the message.

    Raises:
        ValueError: they differ: this family's logits are more than its head on its backbone; or DeepSpeed ZeRO-3 holds
            the head, whose weights exist only inside its own forward.
    """
    base = base_model_of(model)
    head = base.get_output_embeddings()
    if head is not None and hasattr(head.weight, "ds_id"):
        raise ValueError(
            f"DeepSpeed ZeRO-3 gathers the {what}'s head only for its own forward: set dense_logits=True (more "
            "memory), or use FSDP2, which is tested, or ZeRO-2"
        )
    if runs_dense(base):
        if base.get_output_embeddings() is not None:
            logger.warning(
                "%s %s runs with dense logits: its head is more than one projection", what, type(base).__name__
            )
        return
    parameter = base.get_input_embeddings().weight
    if parameter.is_meta and not hasattr(base, "hf_device_map") and not hasattr(base, "_hf_hook"):
        return  # weights arrive later (another rank holds and checks them)
    vocabulary = parameter.shape[0]
    ids = (torch.arange(12, device=_input_device(base)) * 7919 % max(vocabulary - 1, 1))[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if is_encoder_decoder(base):
        batch["decoder_input_ids"] = ids
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        own = base(**batch, use_cache=False).logits[0]
        index = torch.arange(own.shape[0], device=ids.device)
        rows = Rows(index, ids[0], torch.zeros_like(index), index[:1])
        ours = collect(model, batch, frozenset({"logits"}), rows).logits.dense()
    finally:
        for module, mode in modes.items():
            module.training = mode
    own = own.to(ours.device)
    tolerance = 1e-4 if own.dtype in (torch.float32, torch.float64) and base.dtype == torch.float32 else 3e-2
    difference = (ours - own.to(ours)).abs().max() / own.abs().max().clamp(min=1e-6)
    if not difference <= tolerance:
        raise ValueError(
            f"the {what}'s logits are not its head times its last hidden state: {type(base).__name__} differs by "
            f"{difference.item():.2%} on a probe. Set dense_logits=True to use its own logits (more memory)"
        )


def _input_device(model: nn.Module) -> torch.device:
    embeddings = model.get_input_embeddings()
    if not embeddings.weight.is_meta:
        return embeddings.weight.device
    hooks = (getattr(module, "_hf_hook", None) for module in (embeddings, model))  # offloaded by accelerate
    device = next((d for d in (getattr(hook, "execution_device", None) for hook in hooks) if d is not None), "cpu")
    return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
