"""Fidelity to the teacher at every evaluation of a run."""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

from hf_distill.baselines.probe import model_of
from hf_distill.evaluation.extraction import Extractor, extractor_of
from hf_distill.evaluation.fidelity import text_fidelity, token_measures
from hf_distill.evaluation.generated import greedy_texts, questions_of
from hf_distill.teachers import load_teacher
from hf_distill.training import compat
from hf_distill.training.callbacks import DistillCallback


class FidelityCallback(DistillCallback):
    """Logs `eval_fidelity/*` with every evaluation of our trainers: tokens, and the answers to questions.

    Token measures run in the evaluation's own projection: (sum, count) on the device, a few rows at a time, exact over
    batches and ranks. Answers are written once per evaluated step, each rank its share.

    Args:
        teacher: whose answers the student's are compared with; needed with generate.
        eval_dataset: the questions, see `questions_of`; needed with generate.
        topk: shares of the k likeliest tokens in common, for each k above 1.
        generate: also compare answers.
        answer_extractor: see `extractor_of`.
        answer_tokens: most new tokens of an answer.
        batch_size: answers written at once.

    Raises:
        ValueError: generate without a teacher that writes, or without questions; a student sharded over ranks, at its
            first evaluation.
    """

    def __init__(
        self,
        teacher=None,
        eval_dataset: Dataset | None = None,
        *,
        topk: Sequence[int] = (1, 5),
        generate: bool = False,
        answer_extractor: str | Extractor = "exact",
        answer_tokens: int = 64,
        batch_size: int = 16,
    ):
        if generate and (teacher is None or eval_dataset is None):
            raise ValueError("generate compares answers to questions: give FidelityCallback a teacher and eval_dataset")
        self.eval_observed = {f"fidelity/{name}": value for name, value in token_measures(topk).items()}
        self.extract = extractor_of(answer_extractor)
        self.settings = {"batch_size": batch_size, "max_new_tokens": answer_tokens}
        self.teacher = load_teacher(teacher) if generate else None
        self.questions = questions_of(eval_dataset) if generate else None
        if generate and model_of(self.teacher) is None:
            raise ValueError(f"{type(self.teacher).__name__} writes no answers: give FidelityCallback a model")
        self._theirs: list[str] | None = None
        self._found: tuple[int, dict[str, float]] | None = None

    def on_distill_evaluate(
        self, args, state, control, *, metrics, prefix, model, processing_class, accelerator, **kwargs
    ):
        if self.questions is None:
            return
        if compat.is_sharded(accelerator):
            raise ValueError("FidelityCallback cannot generate with a student sharded over ranks: leave generate off")
        if self._found is None or self._found[0] != state.global_step:  # several evaluation sets: once a step
            self._found = state.global_step, self._answers(model, processing_class)
        metrics |= {f"{prefix}_fidelity/{name}": value for name, value in self._found[1].items()}

    def _answers(self, model, processing_class) -> dict[str, float]:
        asked, images = self.questions.prompts, self.questions.images
        ours = greedy_texts(model, processing_class, asked, images=images, **self.settings)
        if self._theirs is None:
            own = self.teacher.tokenizer or processing_class
            self._theirs = greedy_texts(model_of(self.teacher), own, asked, images=images, **self.settings)
        self.dispatch("on_generate", prompts=asked, completions=ours)
        return text_fidelity(ours, self._theirs, self.questions.references, self.extract)


__all__ = ["FidelityCallback"]
