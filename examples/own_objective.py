"""An objective of your own: a class in your project, no registration.

    python examples/own_objective.py

It trains the package's small offline student on its offline teacher for twenty steps. What the frame does with it: the
projector is built before the optimizer and trained at its own learning rate, synchronised over ranks, saved for
resuming and left out of the saved student; the term is scaled exactly for any split of the batch.
"""

import torch
from torch import nn

from hf_distill import DistillSFTConfig, DistillSFTTrainer, LogitKD, Objective
from hf_distill.objectives import hidden_size
from hf_distill.recipe import embedded_setup


class CosineFeatures(Objective):
    """1 - cosine of the last hidden states, where there is loss; its weight rises over the first half of training."""

    needs = frozenset({"hidden_states"})

    def setup(self, student, teacher):
        self.project = nn.Linear(hidden_size(student), hidden_size(teacher), bias=False)

    def other_terms(self, student, teacher, progress):
        ours, theirs = (s.hidden_states[-1].flatten(0, 1)[student.rows.index] for s in (student, teacher))
        return {"cosine": 1 - torch.cosine_similarity(self.project(ours), theirs, dim=-1).mean()}

    def weights(self, progress):
        return {"cosine": min(1.0, 2 * progress)}


def main(output_dir: str = "runs/own_objective", steps: int = 20, **settings) -> DistillSFTTrainer:
    setup = embedded_setup()
    args = DistillSFTConfig(
        output_dir,
        max_steps=steps,
        max_length=64,
        learning_rate=2e-3,
        objective_learning_rate=1e-2,
        save_strategy="no",
        **settings,
    )
    trainer = DistillSFTTrainer(
        setup.student,
        teacher=setup.teacher,
        objective=LogitKD() + 0.5 * CosineFeatures(),
        args=args,
        train_dataset=setup.train.select(range(256)),
        processing_class=setup.teacher.tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
