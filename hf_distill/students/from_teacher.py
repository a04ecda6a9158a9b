"""Students cut from their teacher: some of its layers, all of its embeddings, norms and heads."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

Layers = str | int | list[int]

ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
# Lists in a config that hold numbers of layers; other lists named after layers hold one entry per layer.
LAYER_NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "global_attention_blocks",
    "attn_layer_indices",
)
PER_LAYER_HINTS = ("layer", "pattern", "attention_window", "block_configs", "intermediate_size")
# What a layer may know about its own place. T5 gives its position bias to the first layer only.
POSITION_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number", "has_relative_attention_bias")
FIRST_LAYER_ONLY = "relative_attention_bias"


def from_teacher(teacher: PreTrainedModel, layers: Layers, *, decoder_layers: Layers | None = None) -> PreTrainedModel:
    """A smaller model of the teacher's class, made of some of its layers.

    Embeddings, chosen layers, norms and heads are copied; the config is the teacher's with fewer layers, so the saved
    student loads with `from_pretrained` like any other. Vision-language models lose layers of their text model only.
    The teacher is not changed and shares no memory with the student. `config.name_or_path` is empty: save the student
    before training an adapter on it, or the adapter would not know its base.

    Args:
        teacher: a model loaded unquantised, without adapters and without offloading.
        layers: which layers to keep. "all"; "every_2" (layers 0, 2, 4, ...); "first_6"; "last_6"; an int (that many,
            evenly spaced, the first and the last included); or a list of layer numbers in ascending order.
        decoder_layers: the same for the decoder of an encoder-decoder, whose `layers` are then the encoder's. None
            applies the rule of `layers` to both.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> teacher = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4))
        >>> from_teacher(teacher, "every_2").config.num_hidden_layers
        2
    """
    _check_teacher(teacher)
    config = copy.deepcopy(teacher.config)
    config.name_or_path = ""
    chosen = _cut_config(teacher, config, layers, decoder_layers)
    with torch.device("meta"):
        student = type(teacher)(config)
    stacks = _stacks(teacher, student, chosen)
    _check_layers_alike(teacher, student, stacks)
    _copy_tensors(teacher, student, stacks)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = _cut_generation_config(teacher.generation_config, chosen)
    return student.eval()


def choose_layers(layers: Layers, count: int, what: str = "layers") -> list[int]:
    """The layer numbers that a rule means for a stack of `count` layers.

    Example:
        >>> choose_layers("every_2", 6), choose_layers(3, 12), choose_layers("last_2", 6)
        ([0, 2, 4], [0, 6, 11], [4, 5])
    """
    if isinstance(layers, str):
        return _named_rule(layers, count, what)
    if isinstance(layers, bool):
        raise ValueError(f"{what} must be a rule, a number or a list of layer numbers, got {layers}")
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise ValueError(f"{what}={layers}: the teacher has {count} layers, choose 1 to {count}")
        return [(2 * i * (count - 1) + layers - 1) // (2 * (layers - 1)) if layers > 1 else 0 for i in range(layers)]
    chosen = list(layers)
    if not chosen:
        raise ValueError(f"{what}={layers}: an empty list leaves no layers; name at least one")
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
        raise ValueError(f"{what}={layers}: layer numbers must be integers")
    outside = [i for i in chosen if not 0 <= i < count]
    if outside:
        raise ValueError(f"{what}={layers}: {outside} out of range, the teacher has layers 0 to {count - 1}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{what}={layers}: a layer is named twice; each layer can be kept once")
    if chosen != sorted(chosen):
        raise ValueError(f"{what}={layers}: layer numbers must ascend, e.g. {sorted(chosen)}")
    return chosen


def _named_rule(rule: str, count: int, what: str) -> list[int]:
    if rule == "all":
        return list(range(count))
    match = re.fullmatch(r"(every|first|last)_(\d+)", rule)
    if not match:
        raise ValueError(
            f"{what}={rule!r}: expected 'all', 'every_N', 'first_N', 'last_N', a number or a list of numbers"
        )
    name, n = match[1], int(match[2])
    if not 1 <= n <= count:
        raise ValueError(f"{what}={rule!r}: the teacher has {count} layers, choose N from 1 to {count}")
    return {"every": list(range(0, count, n)), "first": list(range(n)), "last": list(range(count - n, count))}[name]


def _check_teacher(teacher: PreTrainedModel) -> None:
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"from_teacher cuts transformers models, got {type(teacher).__name__}; give merge_and_unload() of a PEFT "
            "model, and the model itself instead of a wrapper"
        )
    if getattr(teacher, "hf_quantizer", None) is not None or getattr(teacher.config, "quantization_config", None):
        raise ValueError(
            "the teacher is quantised, and its packed weights cannot become a student's; load it without "
            "quantization_config, cut the student, then load the quantised teacher for training"
        )
    offloaded = [name for name, value in _tensors(teacher).items() if value.is_meta]
    if offloaded:
        raise ValueError(f"{offloaded[0]} of the teacher has no data (meta device); load it without offloading")


def _cut_config(
    teacher: PreTrainedModel, config: PretrainedConfig, layers: Layers, decoder_layers: Layers | None
) -> dict[str, list[int]]:
    """Cuts `config` in place. The chosen layers of what gets shorter: the "stack", or "encoder" and "decoder"."""
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False) or (config.is_encoder_decoder and text is not config):
        raise _unsupported(teacher, "it is composed of several configs")
    if not text.is_encoder_decoder:
        if decoder_layers is not None:
            raise ValueError(
                f"decoder_layers={decoder_layers!r}, but {_family(teacher)} is no encoder-decoder: give layers only"
            )
        parts = {"stack": _cut_counts(teacher, text, ("num_hidden_layers",), layers, "layers")}
    else:
        if decoder_layers is None:
            decoder_layers = layers
        parts = {
            "encoder": _cut_counts(teacher, text, ENCODER_COUNTS, layers, "layers"),
            "decoder": _cut_counts(teacher, text, DECODER_COUNTS, decoder_layers, "decoder_layers"),
        }
    return {part: chosen for part, (count, chosen) in parts.items() if len(chosen) < count}


def _cut_counts(
    teacher: PreTrainedModel, config: PretrainedConfig, names: tuple[str, ...], layers: Layers, what: str
) -> tuple[int, list[int]]:
    """How many layers there were, and the chosen ones."""
    name = next((name for name in names if isinstance(getattr(config, name, None), int)), None)
    if name is None:
        raise _unsupported(teacher, f"its config has none of {', '.join(names)}")
    count = getattr(config, name)
    chosen = choose_layers(layers, count, what)
    setattr(config, name, len(chosen))
    if not config.is_encoder_decoder:
        for key, value in list(vars(config).items()):
            if key in LAYER_NUMBERS and value:
                setattr(config, key, [chosen.index(i) for i in value if i in chosen])
            elif (
                isinstance(value, list | tuple) and len(value) == count and any(hint in key for hint in PER_LAYER_HINTS)
            ):
                setattr(config, key, type(value)(value[i] for i in chosen))
        if isinstance(getattr(config, "first_k_dense_replace", None), int):
            config.first_k_dense_replace = sum(i < config.first_k_dense_replace for i in chosen)
    return count, chosen


def _stacks(teacher: nn.Module, student: nn.Module, chosen: dict[str, list[int]]) -> dict[str, list[int]]:
    """Path of every list of layers that became shorter, with the teacher's layers it keeps."""
    stacks: dict[str, list[int]] = {}
    found = set()
    for path, module in teacher.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(stack + ".") for stack in stacks):
            continue
        length = len(student.get_submodule(path))
        if length == len(module):
            continue
        part = "stack" if "stack" in chosen else "decoder" if "decoder" in path.split(".") else "encoder"
        kept = chosen.get(part, [])
        if length != len(kept) or kept[-1] >= len(module):
            raise _unsupported(
                teacher, f"{path} went from {len(module)} to {length} entries, layers to keep are {kept}"
            )
        stacks[path] = kept
        found.add(part)
    for part in chosen.keys() - found:
        which = "its layers are" if part == "stack" else f"its {part}'s layers are"
        raise _unsupported(teacher, f"{which} not a list of modules that follows the config")
    return stacks


def _in_teacher(name: str, stacks: dict[str, list[int]]) -> str:
    """The teacher's name of what is called `name` in the student."""
    for stack, chosen in stacks.items():
        if name.startswith(stack + "."):
            index, _, rest = name[len(stack) + 1 :].partition(".")
            return ".".join(filter(None, (stack, str(chosen[int(index)]), rest)))
    return name


def _check_layers_alike(teacher: nn.Module, student: nn.Module, stacks: dict[str, list[int]]) -> None:
    """A layer whose kind hangs on its number (every 4th sparse, every 2nd sliding) must stay what it was."""
    modules = dict(teacher.named_modules())
    for name, module in student.named_modules():
        if not any(name.startswith(stack + ".") for stack in stacks):
            continue
        if FIRST_LAYER_ONLY in name:
            continue
        original = modules.get(_in_teacher(name, stacks))
        if type(original) is not type(module):
            was = "missing" if original is None else type(original).__name__
            raise _unsupported(teacher, f"{name} would be {type(module).__name__}, in the teacher's layer it is {was}")
        for key, value in vars(module).items():
            if key.startswith("_") or key in (*POSITION_ATTRIBUTES, "training"):
                continue
            if isinstance(value, bool | int | float | str | None) and getattr(original, key, value) != value:
                was = getattr(original, key)
                raise _unsupported(teacher, f"{name}.{key} would be {value!r}, in the teacher's layer it is {was!r}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not saved and every name of tied ones included."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _copy_tensors(teacher: nn.Module, student: nn.Module, stacks: dict[str, list[int]]) -> None:
    source = _tensors(teacher)
    devices = {tensor.device for tensor in source.values()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    copies: dict[int, Tensor] = {}  # a tensor that the teacher ties is one tensor in the student too
    used = set()
    for name, empty in _tensors(student).items():
        original_name = _in_teacher(name, stacks)
        if FIRST_LAYER_ONLY in name and original_name not in source:
            original_name = name  # both are in layer 0
        original = source.get(original_name)
        if original is None or original.shape != empty.shape:
            found = "nothing" if original is None else f"shape {tuple(original.shape)}"
            raise _unsupported(
                teacher, f"{name} {tuple(empty.shape)} needs the teacher's {original_name}, which is {found}"
            )
        used.add(original_name)
        if id(original) not in copies:
            value = original.detach().to(device, copy=True)
            is_parameter = isinstance(empty, nn.Parameter)
            copies[id(original)] = nn.Parameter(value, requires_grad=empty.requires_grad) if is_parameter else value
        path, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(path), leaf, copies[id(original)])
    unused = [name for name in teacher.state_dict() if name not in used and not _is_dropped(name, stacks)]
    if unused:
        raise _unsupported(teacher, f"the student has no place for {', '.join(unused[:3])} ({len(unused)} tensors)")
    _copy_plain_tensors(teacher, student, stacks, device)


def _copy_plain_tensors(
    teacher: nn.Module, student: nn.Module, stacks: dict[str, list[int]], device: torch.device
) -> None:
    """Tensors that are plain attributes of a module, such as the original frequencies of scaled rotary embeddings."""
    modules = dict(teacher.named_modules())
    for name, module in student.named_modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, key, getattr(modules[_in_teacher(name, stacks)], key).detach().to(device, copy=True))


def _is_dropped(name: str, stacks: dict[str, list[int]]) -> bool:
    for stack, chosen in stacks.items():
        if name.startswith(stack + "."):
            return int(name[len(stack) + 1 :].partition(".")[0]) not in chosen
    return False


def _cut_generation_config(generation_config, chosen: dict[str, list[int]]):
    generation_config = copy.deepcopy(generation_config)
    heads = getattr(generation_config, "alignment_heads", None)  # Whisper's (decoder layer, head) pairs for time stamps
    if heads and "decoder" in chosen:
        kept = chosen["decoder"]
        generation_config.alignment_heads = [
            [kept.index(layer), head] for layer, head in heads if layer in kept
        ] or None
    return generation_config


def _family(teacher: PreTrainedModel) -> str:
    return f"{teacher.config.model_type} ({type(teacher).__name__})"


def _unsupported(teacher: PreTrainedModel, why: str) -> ValueError:
    return ValueError(
        f"cannot cut layers out of {_family(teacher)}: {why}. Choose other layers, or build the smaller config "
        "yourself and copy the weights"
    )
