"""Classifiers whose last layer has several outputs per class, and say C class logits all the same.

    student = with_subclasses(student, 5)

A class's logit is log Σ_s exp(output), so `softmax` of the logits is the sum of the subclasses' probabilities. No
linear layer with C outputs says the same, so such a student is a class of its own, `Subclasses<its class>`, made of
whatever sequence or image classifier it was. It loads with the Auto classes after `import hf_distill.students`.
"""

from __future__ import annotations

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from hf_distill.heads import base_model_of
from hf_distill.taps import EMBEDDING, classifier_of, tap, tapped

MODEL_TYPE = "subclasses"
PREFIX = "Subclasses"
TASKS = (
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
    (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
)


# ---- the layer ------------------------------------------------------------------------------------------------------
def class_logits(outputs: Tensor, num_subclasses: int) -> Tensor:
    """(..., C) class logits of outputs (..., C * S), index c * S + s: log Σ_s exp(output)."""
    return outputs.unflatten(-1, (-1, num_subclasses)).logsumexp(-1)


class SubclassHead(nn.Module):
    """Linear(width, C * S) and the class logits of its outputs.

    Attributes:
        outputs: the linear layer; its outputs are what a loss on subclasses reads.
    """

    def __init__(self, width: int, classes: int, num_subclasses: int):
        super().__init__()
        self.in_features, self.out_features, self.num_subclasses = width, classes, num_subclasses
        self.outputs = nn.Linear(width, classes * num_subclasses)

    @classmethod
    def grown_from(cls, linear: nn.Module, num_subclasses: int) -> SubclassHead:
        """A head that says what `linear` (C outputs) says: each subclass starts as its class, less log S."""
        classes, width = linear.weight.shape
        head = cls(width, classes, num_subclasses).to(linear.weight)
        bias = linear.weight.new_zeros(classes) if linear.bias is None else linear.bias
        with torch.no_grad():
            head.outputs.weight.copy_(linear.weight.repeat_interleave(num_subclasses, 0))
            head.outputs.bias.copy_((bias - torch.tensor(num_subclasses).log()).repeat_interleave(num_subclasses))
        return head

    def forward(self, embedding: Tensor) -> Tensor:
        return class_logits(self.outputs(embedding), self.num_subclasses)


# ---- the student ----------------------------------------------------------------------------------------------------
def with_subclasses(model: nn.Module, num_subclasses: int) -> nn.Module:
    """The classifier with S outputs per class; at first it says what it said before.

    The model is changed in place and returned. Adapters come after it, with its head's name in `modules_to_save`.

    Args:
        model: a sequence or image classifier of transformers, without adapters.
        num_subclasses: S, at least 1.

    Raises:
        ValueError: S below 1; fewer than two classes; a model that is no such classifier, wears an adapter, or whose
            logits are not its last linear layer's.
    """
    if not isinstance(num_subclasses, int) or num_subclasses < 1:
        raise ValueError(f"num_subclasses must be a whole number of at least 1, got {num_subclasses!r}")
    if hasattr(model, "get_base_model"):
        raise ValueError("the model wears an adapter already: give it its subclasses first, then the adapter")
    if subclass_head(model) is not None:
        raise ValueError(f"{type(model).__name__} has subclasses already: give the model it was made of")
    if model.config.num_labels < 2:
        raise ValueError(f"subclasses divide classes, and the model has num_labels={model.config.num_labels}: give 2")
    kind = subclass_type(type(model))
    name, dense = _place_of_head(model)
    check_last_layer(model, "student")
    model.set_submodule(name, SubclassHead.grown_from(dense, num_subclasses))
    settings = model.config.to_dict() | {"num_subclasses": num_subclasses, "base_model_type": model.config.model_type}
    config = kind.config_class.from_dict(settings)
    config._attn_implementation = model.config._attn_implementation
    model.config, model.__class__ = config, kind
    return model


def subclass_head(model: nn.Module) -> str | None:
    """The path of a model's SubclassHead, of the copy that trains beside adapters; None where it has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, SubclassHead)]
    return next((name for name in names if ".modules_to_save." in name), names[0] if names else None)


def _place_of_head(model: nn.Module) -> tuple[str, nn.Module]:
    head = classifier_of(model)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the last layer of {type(model).__name__} is {type(head).__name__}, not a linear one")
    return next(name for name, module in model.named_modules() if module is head), head


@torch.no_grad()
def check_last_layer(model: nn.Module, what: str) -> None:
    """A classifier's logits are those of its last linear layer, of a made-up example.

    Args:
        what: "student" or "teacher", for the message.

    Raises:
        ValueError: they are not (two heads averaged, a layer after it).
    """
    from hf_distill.baselines.probe import probe_batch
    from hf_distill.teachers.frozen import eval_mode

    base = base_model_of(model)
    weight, head = next(p for p in base.parameters() if p.is_floating_point()), classifier_of(base)
    batch = {k: v.to(weight.device) for k, v in probe_batch(base).items()}
    for name, value in batch.items():
        if value.is_floating_point():  # of pixels that are all 0 an untrained network may make nothing but 0
            batch[name] = torch.linspace(-1, 1, value.numel()).view_as(value).to(weight)
    with eval_mode(base), tapped(base, frozenset({tap(EMBEDDING)})) as features:
        said = base(**batch).logits
    own = pooled_rows(head(features[EMBEDDING]), batch, base.config)
    if own.shape != said.shape or not torch.allclose(own, said, rtol=1e-2, atol=1e-2 * said.abs().max().item()):
        raise ValueError(
            f"the logits of the {what} {type(base).__name__} are not its last linear layer's alone, so they cannot be "
            "divided into subclasses: use a model with one head"
        )


def pooled_rows(features: Tensor, batch: dict, config: PretrainedConfig) -> Tensor:
    """What a classifier's head sees or says of each example, (B, ...): of decoders, the last token that is no padding.

    Args:
        features: (B, ...), or (B, S, ...) of a head that runs over all positions.
        batch: with the `input_ids` whose padding counts.
    """
    if features.dim() < 3:
        return features
    pad = config.get_text_config().pad_token_id
    if pad is None or "input_ids" not in batch:
        return features[:, -1]
    places = torch.arange(features.shape[1], device=features.device)
    last = (places * (batch["input_ids"] != pad)).argmax(-1)
    return features[torch.arange(len(features), device=features.device), last]


# ---- classes --------------------------------------------------------------------------------------------------------
class SubclassesConfig(PretrainedConfig):
    """Stands for the configs of all families: read from a file, it becomes that of the family the file names."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        family, name = config_dict.get("base_model_type"), (config_dict.get("architectures") or [""])[0]
        dense = getattr(transformers, name.removeprefix(PREFIX), None)
        if family not in CONFIG_MAPPING or dense is None:
            raise ValueError(f"a model with subclasses of family {family!r} and class {name!r} is not known here")
        return subclass_type(dense).config_class.from_dict(config_dict, **kwargs)


class Subclasses:
    """What a class with subclasses adds to its dense one."""

    def __init__(self, config: PretrainedConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        name, dense = _place_of_head(self)
        self.set_submodule(name, SubclassHead(dense.in_features, config.num_labels, config.num_subclasses))
        self.post_init()


def subclass_type(dense: type) -> type:
    """`Subclasses<dense>`, made and registered with the Auto classes at the first call.

    Raises:
        ValueError: no sequence or image classifier of transformers.
    """
    name = PREFIX + dense.__name__
    if name not in globals():
        config = dense.config_class
        autos = [auto for mapping, auto in TASKS if dense in _classes(mapping, config)]
        if not autos:
            raise ValueError(f"{dense.__name__} is no sequence or image classifier of transformers")
        own = _config_type(config)
        globals()[name] = type(name, (Subclasses, dense), {"config_class": own, "__module__": __name__})
        autos[0].register(own, globals()[name], exist_ok=True)
    return globals()[name]


def _config_type(dense: type) -> type:
    """The family's config with `num_subclasses` and `base_model_type`; some heads build their backbone by it."""
    name = PREFIX + dense.__name__
    if name not in globals():
        fields = {"num_subclasses": int, "base_model_type": str}
        values = {"num_subclasses": 1, "base_model_type": dense.model_type, "model_type": MODEL_TYPE}
        own = strict(type(name, (dense,), values | {"__annotations__": fields, "__module__": __name__}))
        globals()[name] = own
        for backbone in _classes(MODEL_MAPPING, dense)[:1]:
            members = {"config_class": own, "__module__": __name__}
            AutoModel.register(own, type(PREFIX + backbone.__name__, (backbone,), members), exist_ok=True)
    return globals()[name]


def _classes(mapping, config: type) -> tuple[type, ...]:
    found = mapping.get(config, ())
    return tuple(found) if isinstance(found, list | tuple) else (found,)


AutoConfig.register(MODEL_TYPE, SubclassesConfig)
