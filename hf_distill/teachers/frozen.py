"""Teachers that are a frozen model in this process: any dtype, 8- or 4-bit, offloaded, or the student's own base."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace

import torch
from torch import nn

from hf_distill.heads import base_model_of, check_head, collect, rows_of, runs_dense
from hf_distill.signals import HeadLogits, Signals
from hf_distill.teachers.base import Teacher, teacher_batch
from hf_distill.teachers.cached import is_cache, load_cached
from hf_distill.training import compat

logger = logging.getLogger(__name__)


class FrozenTeacher(Teacher):
    """A model that does not learn.

    Args:
        model: a transformers model. It is put in eval mode and its parameters are frozen.
        tokenizer: its tokenizer or processor, to compare with the student's; None skips the comparison.
        name, revision: for cards and messages.
        dense_logits: take the model's own logits instead of its backbone and head.

    Example:
        >>> teacher = FrozenTeacher.from_pretrained("Qwen/Qwen2.5-7B-Instruct", load_in_4bit=True)  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, tokenizer=None, *, name=None, revision=None, dense_logits: bool = False):
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._tokenizer = tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.revision = revision or getattr(model.config, "_commit_hash", None)
        self.dense_logits = dense_logits
        self.quantised_from: dict | None = None
        if getattr(model, "is_quantized", False):  # int8 warns once per layer and call otherwise
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        self.wrapped: nn.Module = model
        self.sharded = False
        self._redirect = compat.ForwardRedirection()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        auto_class=None,
        revision: str | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        quantization_config=None,
        dense_logits: bool = False,
        trust_remote_code: bool = False,
        **init_kwargs,
    ) -> FrozenTeacher:
        """Load a teacher from a Hub id or a folder; safetensors only.

        Args:
            auto_class: which `AutoModel…` loads it; None reads the class from the checkpoint's own config.
            load_in_8bit, load_in_4bit: through bitsandbytes (nf4). `quantization_config` for other settings. In 8 bit
                what is said of a row depends slightly on its batch (outlier columns; not at llm_int8_threshold=0).
            init_kwargs: dtype (default: the checkpoint's; float32 on a CPU, where bfloat16 is several times slower),
                device_map, attn_implementation, max_memory…

        Raises:
            ValueError: the path is not a model; both or conflicting quantisations.
            ImportError: quantisation without bitsandbytes.
        """
        if load_in_8bit and load_in_4bit:
            raise ValueError("the teacher can be loaded in 8 or in 4 bit, not both")
        if quantization_config is None and (load_in_8bit or load_in_4bit):
            quantization_config = bitsandbytes_config(load_in_4bit)
        given = dict(
            auto_class=auto_class,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **({"dtype": default_dtype()} | init_kwargs),
        )
        model = compat.load_model(path, quantization_config=quantization_config, what="teacher", **given)
        tokenizer = compat.load_processing_class(path, revision=revision, trust_remote_code=trust_remote_code)
        teacher = cls(model, tokenizer, name=str(path), revision=revision, dense_logits=dense_logits)
        if quantization_config is not None:
            teacher.quantised_from = {"path": path, "dense_logits": dense_logits} | given
        return teacher

    def full_precision(self) -> FrozenTeacher:
        """The same teacher, loaded again without quantisation. Raises ValueError when that is not known."""
        if self.quantised_from is None:
            raise ValueError(f"{self.name} was not loaded quantised from a path: its full precision is not known")
        return type(self).from_pretrained(**self.quantised_from)

    @property
    def config(self):
        return self.model.config

    @property
    def tokenizer(self):
        return self._tokenizer

    def vocabulary_size(self) -> int | None:
        head = base_model_of(self.model).get_output_embeddings()
        return None if head is None else head.weight.shape[0]

    def check(self) -> None:
        if not self.dense_logits and not self.sharded:  # by an earlier stage, which checked it
            check_head(self.model, "teacher")

    def prepare(self, accelerator) -> None:
        quantised = getattr(self.model, "is_quantized", False)
        placed = quantised or getattr(self.model, "hf_device_map", None) or hasattr(self.model, "_hf_hook")
        self.sharded = compat.is_sharded(accelerator) and not placed
        self.wrapped = compat.prepare_frozen(self.model, accelerator, placed=bool(placed))

    @torch.no_grad()
    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        return self._say(batch, needs)

    def check_input_gradient(self) -> None:
        """Raises ValueError where `with_input_gradient` is not to be trusted: sharded or (untested) 4-bit weights."""
        how = "is sharded" if self.sharded else None
        if getattr(self.model, "is_loaded_in_4bit", False):
            how = "is loaded in 4 bit, through which gradients are untested"
        if how is not None:
            raise ValueError(
                f"a gradient through {self.name} is needed, and it {how}: load it whole, in 8 bit or full precision"
            )

    def with_input_gradient(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        """As the call, but differentiable by float inputs of the batch that need a gradient; weights stay constants.

        Raises:
            ValueError: see `check_input_gradient`.
        """
        self.check_input_gradient()
        with torch.enable_grad():
            return self._say(batch, needs)

    def _say(self, batch: dict, needs: frozenset[str]) -> Signals:
        own = teacher_batch(batch)
        device = _device_type(own)
        # its own dtype: the student's autocast must not change what the teacher says
        with torch.autocast(device, enabled=False):
            # through the module's own call, also where it is not wrapped: FSDP2 shards in place
            return self._redirect(self.wrapped, self.model, self._collect, own, needs)

    def _collect(self, own: dict, needs: frozenset[str]) -> Signals:
        own = self._cast(own)
        signals = collect(self.model, own, needs, rows_of(own), dense=self.dense_logits or runs_dense(self.model))
        if self.sharded and isinstance(signals.logits, HeadLogits):  # the gathered head is freed when this forward ends
            bias = None if signals.logits.bias is None else signals.logits.bias.clone()
            head = replace(signals.logits, weight=signals.logits.weight.clone(), bias=bias)
            signals = replace(signals, logits=head)
        return signals

    def _cast(self, batch: dict) -> dict:
        """Float inputs (pixels, features) in the teacher's dtype."""
        dtype = getattr(self.model, "dtype", None)
        if dtype is None or not dtype.is_floating_point:
            return batch
        return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}

    def describe(self) -> dict:
        quantised = getattr(self.model, "is_quantized", False)
        bits = None
        if quantised:
            bits = 4 if getattr(self.model, "is_loaded_in_4bit", False) else 8
        return super().describe() | {
            "teacher_parameters": self.model.num_parameters(),
            "teacher_dtype": str(self.model.dtype).removeprefix("torch."),
            "teacher_bits": bits,
        }


class AdapterOffTeacher(Teacher):
    """The student's own base: one set of weights, the adapter switched off while it speaks. Needs a PEFT student."""

    def __init__(self, *, dense_logits: bool = False):
        self.student: nn.Module | None = None
        self.dense_logits = dense_logits

    def attach(self, student: nn.Module) -> None:
        if not hasattr(student, "disable_adapter"):
            raise ValueError(
                "teacher_adapter_off needs a PEFT student (its base is the teacher); give peft_config / --use_peft, "
                "or name a teacher with teacher_model_name_or_path"
            )
        self.student = student
        self.name = "the student's base, adapter off"

    @property
    def config(self):
        return None if self.student is None else self.student.config

    def vocabulary_size(self) -> int | None:
        head = None if self.student is None else base_model_of(self.student).get_output_embeddings()
        return None if head is None else head.weight.shape[0]

    def detach(self) -> None:
        self.student = None

    @torch.no_grad()
    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        if self.student is None:
            raise ValueError(
                "the adapter-off teacher has no student: none was attached, or its adapter was merged and the base is "
                "gone (evaluate before student(merge=True))"
            )
        own = teacher_batch(batch)
        with torch.autocast(_device_type(own), enabled=False), eval_mode(self.student), _adapter_off(self.student):
            dense = self.dense_logits or runs_dense(self.student)
            return collect(self.student, own, needs, rows_of(own), dense=dense)


@contextlib.contextmanager
def _adapter_off(model: nn.Module):
    """PEFT thaws every adapter weight when it switches the adapter back on: what was frozen stays frozen."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Eval mode for a model whose modules the student shares: each module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def load_teacher(teacher, **options) -> Teacher:
    """A Teacher from a Teacher, a model, or a Hub id / folder of a model or a cache; `options` go to its loader."""
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        path = getattr(teacher.config, "_name_or_path", "")
        tokenizer = compat.load_processing_class(path) if path else None
        return FrozenTeacher(teacher, tokenizer, dense_logits=options.get("dense_logits", False))
    if isinstance(teacher, (str, os.PathLike)) and is_cache(teacher):
        return load_cached(teacher, **options)
    if isinstance(teacher, (str, os.PathLike)):
        return FrozenTeacher.from_pretrained(os.fspath(teacher), **options)
    raise TypeError(f"teacher must be a Hub id, a folder, a model or a Teacher, got {type(teacher).__name__}")


def default_dtype():
    """The checkpoint's own dtype; float32 on a CPU."""
    return "auto" if torch.accelerator.is_available() else torch.float32


def bitsandbytes_config(four_bit: bool):
    """8-bit, or 4-bit nf4; computes in bfloat16 on a GPU and in float32 on a CPU.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    compat.require_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if not four_bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _device_type(batch: dict) -> str:
    return next((v.device.type for v in batch.values() if torch.is_tensor(v)), "cpu")
