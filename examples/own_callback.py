"""A callback of your own that sees both models: what Hugging Face's callbacks cannot.

    python examples/own_callback.py

It logs how sure of itself the teacher is on the training batches. Any trainer takes it
(`callbacks=[TeacherConfidence()]`).
"""

from hf_distill import DistillCallback, DistillSFTConfig, DistillSFTTrainer
from hf_distill.losses import TeacherEntropy, observe
from hf_distill.recipe import embedded_setup


class TeacherConfidence(DistillCallback):
    """Logs the teacher's mean entropy, in nats per token, beside each logged loss."""

    total, rows = 0.0, 0

    def on_distill_loss(self, args, state, control, *, student, teacher, terms, **kwargs):
        entropy = observe(student.logits, teacher.logits, {"entropy": TeacherEntropy()})["entropy"]
        self.total, self.rows = self.total + entropy.sum(), self.rows + len(entropy)

    def on_distill_log(self, args, state, control, *, logs, accelerator, **kwargs):
        logs["teacher_entropy"] = float(self.total) / max(self.rows, 1)
        self.total, self.rows = 0.0, 0


def main(output_dir: str = "runs/own_callback", steps: int = 20, **settings) -> DistillSFTTrainer:
    setup = embedded_setup()
    args = DistillSFTConfig(output_dir, max_steps=steps, max_length=64, logging_steps=5, save_strategy="no", **settings)
    trainer = DistillSFTTrainer(
        setup.student,
        teacher=setup.teacher,
        args=args,
        train_dataset=setup.train.select(range(256)),
        processing_class=setup.teacher.tokenizer,
        callbacks=[TeacherConfidence()],
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
