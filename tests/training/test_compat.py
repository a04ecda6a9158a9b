"""Contracts with the installed libraries: each private name or hook that the trainers lean on must still be there."""

import inspect

import pytest
import torch
import trl.models.utils
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, DataLoaderStateMixin, SkipBatchSampler
from accelerate.state import GradientState
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin, fsdp_utils
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from trl import DPOTrainer, SFTTrainer

from hf_distill.training import compat
from hf_distill.training.trainers import DistillDPOTrainer, DistillSFTTrainer, DistillTrainer
from tests.helpers import tiny_llama

# hooks whose parent must call them: an override of a name that is gone would silently do nothing
OVERRIDDEN = {
    Trainer: (
        "get_batch_samples",
        "compute_loss",
        "create_optimizer",
        "log",
        "prediction_step",
        "evaluation_loop",
        "train",
        "_set_signature_columns_if_needed",
        "_save",
        "_save_checkpoint",
        "_save_rng_state",
        "_load_from_checkpoint",
        "_load_best_model",
    ),
    SFTTrainer: ("_reject_skip_prepare_without_labels",),
}
# read or called, not overridden
READ = ("get_tp_size", "_prepare_inputs", "_inner_training_loop", "_wrap_model", "_prepare_for_training")
SOURCES = {
    "get_batch_samples(epoch_iterator, num_batches, self.args.device)": Trainer,
    "self.loss_is_scaled_for_ga": Trainer,
    "self._signature_columns": Trainer,
    "self._globalstep_last_logged": Trainer,
    "self._tr_loss": Trainer,
    "self.accelerator.gather": Trainer,
    "self._skip_prepare_dataset": SFTTrainer,
}


@pytest.mark.parametrize("parent", OVERRIDDEN)
def test_every_overridden_hook_exists(parent):
    for name in OVERRIDDEN[parent]:
        assert callable(getattr(parent, name, None)), f"{parent.__name__}.{name} is gone"


@pytest.mark.parametrize(
    "ours, parent", [(DistillTrainer, Trainer), (DistillSFTTrainer, SFTTrainer), (DistillDPOTrainer, DPOTrainer)]
)
def test_every_override_takes_what_its_parent_is_given(ours, parent):
    checked = set()
    for cls in ours.__mro__[: ours.__mro__.index(parent)]:
        for name, function in vars(cls).items():
            above = getattr(parent, name, None)
            if name == "__init__" or not inspect.isfunction(function) or not callable(above):
                continue
            mine, theirs = inspect.signature(function).parameters, inspect.signature(above).parameters
            takes_rest = any(p.kind is p.VAR_KEYWORD for p in mine.values())
            missing = [
                n
                for n in theirs
                if n not in mine and not takes_rest and theirs[n].kind is not inspect.Parameter.VAR_KEYWORD
            ]
            assert not missing, f"{cls.__name__}.{name} does not take {missing}"
            if name not in OVERRIDDEN[Trainer]:
                continue
            common = [n for n in mine if n in theirs]
            assert common == [n for n in theirs if n in mine], f"{cls.__name__}.{name}: another order of arguments"
            checked.add(name)
    assert set(OVERRIDDEN[Trainer]) <= checked


def test_names_that_are_only_read_exist():
    for name in READ:
        assert callable(getattr(Trainer, name, None)), name
    for text, cls in SOURCES.items():
        source = "".join(
            inspect.getsource(c) for c in cls.__mro__[:-1] if c.__module__.startswith(("transformers.trainer", "trl"))
        )
        assert text in source, f"{cls.__name__} no longer has {text}"


def test_the_window_is_fetched_before_its_first_forward():
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("self.get_batch_samples(") < source.index("self.training_step(")


def test_a_scaled_loss_is_not_divided_by_the_accumulation_steps():
    source = inspect.getsource(Trainer.training_step)
    assert "loss_is_scaled" in source and DistillTrainer.loss_is_scaled_for_ga is True
    assert DistillSFTTrainer.loss_is_scaled_for_ga is True and DistillDPOTrainer.loss_is_scaled_for_ga is False


def test_callbacks_run_in_the_order_of_their_list():
    seen = []

    class Named(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_step_end(self, args, state, control, **kwargs):
            seen.append(self.name)

    handler = CallbackHandler([Named("b")], None, None, None, None)
    handler.callbacks.insert(0, Named("a"))
    handler.on_step_end(None, None, None)
    assert seen == ["a", "b"]


# ---- the redirect ---------------------------------------------------------------------------------------------------
class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_the_redirect_runs_inside_the_wrapper_and_leaves_no_trace():
    inner = nn.Linear(2, 2)
    wrapper, redirect = Wrapper(inner), compat.ForwardRedirection()
    seen = redirect(wrapper, inner, lambda x, y: (x + y, "forward" in inner.__dict__), 1, y=2)
    assert seen == (3, False) and wrapper.calls == 1
    assert "forward" not in inner.__dict__ and inner(torch.ones(1, 2)).shape == (1, 2)


def test_the_redirect_puts_an_own_forward_back_also_after_an_error():
    inner = nn.Linear(2, 2)
    inner.forward = own = lambda x: "patched"

    def fails():
        raise KeyError("inside")

    with pytest.raises(KeyError):
        compat.ForwardRedirection()(Wrapper(inner), inner, fails)
    assert inner.forward is own


def test_the_redirect_is_the_construction_of_trl():
    source = inspect.getsource(trl.models.utils._ForwardRedirection)
    assert "original_module.forward = wrapped_forward" in source and "wrapper_module(" in source


# ---- accelerate -----------------------------------------------------------------------------------------------------
def loader(rows: int, size: int, rank: int, skip: int = 0, ranks: int = 2, drop_last: bool = False) -> DataLoaderShard:
    sampler = BatchSampler(SequentialSampler(range(rows)), batch_size=size, drop_last=drop_last)
    shard = BatchSamplerShard(sampler, num_processes=ranks, process_index=rank)
    return DataLoaderShard(list(range(rows)), batch_sampler=SkipBatchSampler(shard, skip) if skip else shard)


class Ranks:
    """What `real_samples` reads of an Accelerator of two processes."""

    num_processes = 2

    def __init__(self):
        self.gradient_state = GradientState()


@pytest.mark.parametrize("rows, size", [(7, 4), (7, 2), (7, 1), (5, 2), (8, 2), (1, 4), (9, 4)])
@pytest.mark.parametrize("skip", [0, 1])
def test_every_row_is_real_on_exactly_one_rank(rows, size, skip):
    if rows <= 2 * size * skip:
        skip = 0
    real = []
    for rank in (0, 1):
        for batch in loader(rows, size, rank, skip):
            keep = compat.real_samples(Ranks())
            real += batch.tolist()[: len(batch) if keep is None else keep]
    assert sorted(real) == list(range(2 * size * skip, rows))


def test_nothing_is_repeated_where_the_last_batch_is_dropped():
    for _ in loader(7, 2, rank=1, drop_last=True):
        assert compat.real_samples(Ranks()) is None


def test_accelerate_forgets_the_remainder_of_a_resumed_epoch():
    """Why `real_samples` reads the sampler; when this fails, `gradient_state.remainder` may be used again."""
    shard = loader(7, 1, rank=0, skip=1)
    assert isinstance(shard, DataLoaderStateMixin)
    next(iter(shard))
    assert shard.remainder == -1
    next(iter(fresh := loader(7, 1, rank=0)))
    assert fresh.remainder == 1


def test_accelerator_has_what_compat_sets():
    accelerator = Accelerator(cpu=True)
    assert isinstance(accelerator.dataloader_config, DataLoaderConfiguration)
    for name in ("dispatch_batches", "split_batches", "even_batches"):
        assert hasattr(accelerator.dataloader_config, name) and hasattr(Accelerator, name)
    compat.check_dataloading(accelerator)
    assert accelerator.dispatch_batches is False, "one rank would read a stream and cut the batch for the others"
    assert accelerator.ddp_handler is None or hasattr(accelerator.ddp_handler, "find_unused_parameters")
    assert compat.is_sharded(accelerator) is False
    assert "ddp_handler" in inspect.getsource(Accelerator.prepare_model)


def test_the_sharding_plugin_names_classes_to_wrap():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    for name in ("transformer_cls_names_to_wrap", "reshard_after_forward", "cpu_offload", "mixed_precision_policy"):
        assert hasattr(plugin, name), name
    assert "fsdp2_plugin.transformer_cls_names_to_wrap" in inspect.getsource(fsdp_utils.fsdp2_prepare_auto_wrap_policy)


class Sharded:
    """What `shard_apart` reads of an Accelerator with an FSDP2 plugin."""

    def __init__(self, policy):
        self.state = self
        self.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy)


def test_an_objective_is_sharded_apart_from_the_student_or_refused_by_name():
    student, objective = tiny_llama().bfloat16(), nn.Linear(2, 2)
    by_class = Sharded("TRANSFORMER_BASED_WRAP")
    compat.shard_apart(by_class, student, objective)
    assert by_class.fsdp_plugin.transformer_cls_names_to_wrap == [*student._no_split_modules, "Linear"]
    with pytest.raises(ValueError, match="TRANSFORMER_BASED_WRAP"):
        compat.shard_apart(Sharded("NO_WRAP"), student, objective)
    compat.shard_apart(Sharded("NO_WRAP"), student.float(), objective)


def test_trl_prepares_frozen_models():
    for name in ("prepare_fsdp", "prepare_deepspeed"):
        assert list(inspect.signature(getattr(trl.models.utils, name)).parameters)[:2] == ["model", "accelerator"]


def test_a_frozen_model_is_put_on_the_device_in_eval_mode():
    model = compat.prepare_frozen(tiny_llama().train(), Accelerator(cpu=True), placed=False)
    assert not model.training


def test_loading_says_what_is_wrong_with_a_path(tmp_path):
    with pytest.raises(ValueError, match="cannot load the teacher from .*taken as a folder"):
        compat.load_model(str(tmp_path), what="teacher")
    with pytest.raises(ValueError, match="no folder of that name"):
        compat.load_model("/nowhere/at/all", what="teacher")
    tiny_llama().save_pretrained(tmp_path)
    assert type(compat.load_model(str(tmp_path))).__name__ == "LlamaForCausalLM"
    assert compat.load_processing_class(str(tmp_path)) is None


def test_untested_versions_go_unnoticed(monkeypatch):
    compat.check_versions()
    real = compat.importlib.metadata.version
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda n: "1.17.0" if n == "trl" else real(n))
    with pytest.raises(ImportError, match=r"not tested with trl 1.17.0 \(tested: 1.16\): pip install 'trl==1.16.\*'"):
        compat.check_versions()
    monkeypatch.setenv("HF_DISTILL_ANY_VERSION", "1")
    compat.check_versions()
