"""On-policy and mixed training inside a trainer: texts are written before a window is counted."""

from __future__ import annotations

import os

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from hf_distill.curricula.collators import PREFIX
from hf_distill.curricula.onpolicy import DATA, REPLAY, STUDENT, Policy, Sampling, Text, prompts_of, sample
from hf_distill.curricula.seeded import number_of
from hf_distill.heads import base_model_of
from hf_distill.teachers import FrozenTeacher
from hf_distill.teachers.generations import GenerationStore
from hf_distill.teachers.local_text import LocalTextTeacher
from hf_distill.training import compat
from hf_distill.training.callbacks import DistillCallback

COUNTS = ("micro_batches", "fresh", "replayed", "texts", "tokens", "truncated")


class WritesText:
    """Hooks of DistillSFTTrainer: whose texts a micro-batch holds is drawn by (seed, step, micro-batch), the same on
    every rank; a sample by (seed, step, micro-batch, rank). Both are of before the step, so a resumed run repeats them.
    """

    def _attach_writing(self) -> None:
        """After `_attach`: what writes, and what is refused. Raises ValueError."""
        args = self.args
        self._policy = Policy(
            args.lmbda,
            args.lmbda_schedule,
            end=args.lmbda_end,
            step=args.lmbda_step,
            tolerance=args.lmbda_tolerance,
            capacity=args.replay_capacity,
        )
        self._sampling: Sampling | None = None  # until something is to be written
        self._writer: LocalTextTeacher | None = None
        self._vllm, self._vllm_step = None, -1
        self._read_epoch = 0  # in which a store of the teacher's texts was last read
        self._judged = -1  # the step whose evaluation moved an adaptive lmbda last
        self._new_texts: list[Text] = []
        self._written = dict.fromkeys(COUNTS, 0)  # of this window, on this rank
        self._written_since_log = torch.zeros(len(COUNTS), dtype=torch.int64, device=args.device)
        if args.writes_text:
            self._start_writing()

    def set_lmbda(self, value: float) -> None:
        """Change the chance of the student's own texts from the next step on; it is saved and resumed.

        Raises:
            ValueError: no probability; a linear schedule; a run that cannot sample (see docs/on_policy.md).
        """
        if value > 0 and self._sampling is None:
            self._start_writing()
        self._policy.set(value)

    @property
    def lmbda(self) -> float:
        """The present chance of the student's own texts."""
        return self._policy.chance(self.progress)

    # ---- what can write ----------------------------------------------------------------------------------------------
    def _start_writing(self) -> None:
        self._refuse_what_cannot_be_rewritten()
        args, base = self.args, base_model_of(self.model)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ends = getattr(base.generation_config, "eos_token_id", None)
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        ends = tuple(dict.fromkeys([*ends, *[i for i in [tokenizer.eos_token_id] if i is not None]]))
        shared, entries = self._common_vocabulary(), base.get_output_embeddings().weight.shape[0]
        self._sampling = Sampling(
            max_new_tokens=args.max_completion_length,
            temperature=args.sampling_temperature,
            top_p=args.sampling_top_p,
            top_k=args.sampling_top_k,
            ends=ends,
            padding=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*ends, 0)[0],
            vocabulary=shared if shared is not None and shared < entries else None,
            context=getattr(base.config.get_text_config(), "max_position_embeddings", None),
        )
        if args.use_vllm:
            self._vllm = compat.vllm_generation(self)
        if args.seq_kd:
            folder = args.seq_kd_store or os.path.join(args.output_dir, "teacher_texts")
            size = args.per_device_train_batch_size
            self._writer = LocalTextTeacher(self.teacher, tokenizer, batch_size=size, store=folder)

    def _refuse_what_cannot_be_rewritten(self) -> None:
        args, what = self.args, "text that is written during training (lmbda, seq_kd)"
        if args.packing or args.padding_free:
            raise ValueError(
                f"{what} does not go with packing or padding_free: every row is one prompt; set both to False"
            )
        if args.compile_options is not None:
            raise ValueError(
                f"{what} was not tried with a compiled student, whose lengths vary: leave torch_compile off"
            )
        if self._is_vlm:
            raise ValueError(f"{what} is for language models: {type(self.model).__name__} also reads images")
        if compat.is_sharded(self.accelerator):
            raise ValueError(
                f"{what} was not tried on a student in shards ({self.accelerator.distributed_type.value}): use DDP"
            )
        if self.teacher is not None and not self.teacher.answers_new_text:
            raise ValueError(
                f"{self.teacher.name} is read from a cache, which holds answers to the data set's own texts only: give "
                "the live teacher, or leave lmbda and seq_kd out"
            )
        if args.seq_kd and not isinstance(self.teacher, FrozenTeacher):
            raise ValueError(
                f"seq_kd needs a teacher that writes, a model in this process (FrozenTeacher), got "
                f"{type(self.teacher).__name__}: use it, or cache its texts with a text teacher first"
            )
        if args.lmbda_schedule == "adaptive" and (self.eval_dataset is None or isinstance(self.eval_dataset, dict)):
            raise ValueError("lmbda_schedule adaptive follows one validation loss: give one eval_dataset")
        columns = (*self.data_collator.token_columns, *self.data_collator.example_columns)
        if columns:
            raise ValueError(f"columns {', '.join(columns)} belong to the data set's own texts: {what} has none")
        labels = next(iter(self.train_dataset), {}).get("labels")
        if labels is not None and len(labels) and labels[0] != -100:
            raise ValueError(
                f"{what} answers prompts, and the first example has none, its labels begin with its first token: give "
                "prompt and completion columns (completion_only_loss on), or messages with assistant_only_loss"
            )

    # ---- one window --------------------------------------------------------------------------------------------------
    def _replaced(self, batch: dict, micro_batch: int) -> dict:
        if self._sampling is None:
            return batch
        key = (self.args.seed, self.state.global_step, micro_batch)
        source = self._policy.source(number_of("source", *key) / 2**32, self.progress)
        self._written["micro_batches"] += 1
        if source == DATA and not self.args.seq_kd:
            return batch
        if any(name.startswith(PREFIX) for name in batch):
            raise ValueError("the teacher reads inputs of its own, which hold the data set's answers: set lmbda to 0")
        own = ("text", *key, self.accelerator.process_index)
        if source == REPLAY:
            texts = self._policy.buffer.draw(len(batch["labels"]), own)
            self._written["replayed"] += 1
        else:
            prompts = prompts_of(batch)
            completions = self._by_student(prompts, own) if source == STUDENT else self._by_teacher(prompts)
            texts = [Text(*pair) for pair in zip(prompts, completions, strict=True)]
        if source == STUDENT:
            self._note(texts[: compat.real_samples(self.accelerator)])  # the others only fill up a ragged end
        return send_to_device(dict(self.data_collator([text.feature for text in texts])), self.args.device)

    def _by_student(self, prompts: list[list[int]], key: tuple) -> list[list[int]]:
        if self._vllm is None:
            with self.accelerator.autocast():
                return sample(self.model, prompts, self._sampling, key)
        if self._vllm_step != self.state.global_step:
            with self._clean_student():
                self._vllm.sync_weights()
            self._vllm_step = self.state.global_step
        return self._vllm.generate(prompts=prompts, images=None, num_generations=1)[1]

    def _by_teacher(self, prompts: list[list[int]]) -> list[list[int]]:
        """Each text is drawn by (seed, prompt) alone, so that it is the same in every epoch."""
        s, epoch = self._sampling, int(self.state.epoch or 0)
        if epoch != self._read_epoch and self.accelerator.num_processes > 1:  # what other ranks wrote in the last one
            self._writer.store = GenerationStore(self._writer.store.folder, self._writer.store.teacher)
        self._read_epoch = epoch
        written = self._writer.generate(
            prompts, max_new_tokens=s.max_new_tokens, temperature=s.temperature, top_p=s.top_p, seed=self.args.seed
        )
        completions = [text.token_ids for text in written]
        limit = base_model_of(self.model).get_input_embeddings().weight.shape[0]
        if (largest := max(map(max, completions))) >= limit:
            raise ValueError(f"{self.teacher.name} wrote token {largest}, and the student reads ids below {limit} only")
        return completions

    def _note(self, texts: list[Text]) -> None:
        """Fresh texts of the student: counted, kept for replay, and told to callbacks that listen."""
        self._written["fresh"] += 1
        self._written["texts"] += len(texts)
        self._written["tokens"] += sum(len(text.completion) for text in texts)
        self._written["truncated"] += sum(not self._sampling.finished(text.completion) for text in texts)
        self._new_texts += texts
        if any(type(c).on_generate is not DistillCallback.on_generate for c in self._distill_callbacks()):
            prompts, completions = (
                self.processing_class.batch_decode([getattr(text, part) for text in texts], skip_special_tokens=True)
                for part in ("prompt", "completion")
            )
            self._dispatch("on_generate", prompts=prompts, completions=completions)

    def _before_optimizer_step(self, batches: list[dict]) -> None:
        """All ranks' counts and new texts meet once per window."""
        if self._sampling is not None:
            counts = torch.tensor(list(self._written.values()), dtype=torch.int64, device=self.args.device)
            self._written_since_log += self.accelerator.reduce(counts, "sum")
            self._written = dict.fromkeys(COUNTS, 0)
            if self._policy.buffer is not None:
                self._policy.buffer.add(gather_object(self._new_texts))
            self._new_texts = []
        super()._before_optimizer_step(batches)

    # ---- validation, logs, resuming ----------------------------------------------------------------------------------
    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        if self.is_in_train and "eval_cross_entropy" in metrics and self._judged != self.state.global_step:
            self._judged = self.state.global_step
            self._policy.judge(metrics["eval_cross_entropy"])
        return metrics

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "loss" in logs and self._sampling is not None:
            n = dict(zip(COUNTS, self._written_since_log.tolist(), strict=True))
            self._written_since_log.zero_()
            logs["on_policy/lmbda"] = self.lmbda
            logs["on_policy/share"] = (n["fresh"] + n["replayed"]) / max(n["micro_batches"], 1)
            if self._policy.buffer is not None:
                logs["on_policy/replayed"] = n["replayed"] / max(n["micro_batches"], 1)
            if n["texts"]:
                logs["on_policy/length"] = n["tokens"] / n["texts"]
                logs["on_policy/truncated"] = n["truncated"] / n["texts"]
        super().log(logs, start_time)

    def _running_tensors(self) -> dict[str, Tensor]:
        own = self._policy.state_tensors() | {"written": self._written_since_log}
        return super()._running_tensors() | {f"text.{name}": tensor for name, tensor in own.items()}

    def _restore_running_tensors(self, tensors: dict[str, Tensor]) -> None:
        super()._restore_running_tensors(tensors)
        own = {name.removeprefix("text."): tensor for name, tensor in tensors.items() if name.startswith("text.")}
        if not own:
            return  # written before texts were
        self._policy.load_state_tensors(own)
        self._written_since_log = own["written"].to(self.args.device)
        self._judged = self.state.global_step
        if self._policy.lmbda > 0 and self._sampling is None:
            self._start_writing()


__all__ = ["WritesText"]
