"""What trains beside the student: the objective's own parameters, and a teacher that learns."""

from __future__ import annotations

import torch

from hf_distill.objectives import Objective
from hf_distill.teachers import Teacher
from hf_distill.training import compat
from hf_distill.training.inner import InnerObjective, Run

PEER = "distill_peer"  # on the objective


class TrainsParts:
    """Trainer hooks that hang a peer on the objective, give each part its learning rate, and step what steps itself."""

    def _hang_peer(self, objective: Objective, teacher: Teacher | None) -> None:
        """What of a teacher learns by gradients becomes a part of the objective: trained, synchronised and saved so."""
        objective._modules.pop(PEER, None)  # an earlier trainer's
        peer = None if teacher is None else teacher.trained_module()
        if peer is None:
            return
        objective.add_module(PEER, peer)
        if "logits" not in objective.needs_of("teacher") and self.args.ddp_find_unused_parameters is None:
            compat.find_unused_parameters(self.accelerator)

    def _inner_objectives(self) -> list[InnerObjective]:
        leaves = [] if self.objective is None else [leaf for _, _, leaf in self.objective.leaves()]
        return [leaf for leaf in leaves if isinstance(leaf, InnerObjective)]

    def _check_inner(self) -> None:
        names = ", ".join(type(leaf).__name__ for leaf in self._inner_objectives())
        if names and compat.is_sharded(self.accelerator):
            raise ValueError(
                f"{names} runs the whole student outside its wrapper, which {self.accelerator.distributed_type.value} "
                "keeps in shards: launch without sharding"
            )

    def _before_optimizer_step(self, batches: list[dict]) -> None:
        """Parts with an optimizer of their own take their step, on the window that the student is about to learn."""
        inner = self._inner_objectives() if batches else []
        if not inner:
            return
        run = Run(
            student=self.model,
            teacher=self.teacher,
            step=self.state.global_step,
            progress=self.progress,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seed=self.args.seed,
            accelerator=self.accelerator,
        )
        real = [batch for batch in batches if not batch.get("only_repeats")]
        for objective in inner:
            objective.before_step(real, run)

    def _check_peer_learns(self) -> None:
        """Before the first optimizer step. Raises ValueError where no term trains the peer."""
        peer = None if self.objective is None else self.objective._modules.get(PEER)
        if peer is not None and all(p.grad is None for p in peer.parameters()):
            raise ValueError(
                f"{type(self.teacher).__name__} gets no gradient: terms on the logits take the teacher as a constant, "
                "so its own loss must be among the objective's other_terms (see MutualKD). If it shall not learn, use "
                "FrozenTeacher"
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        for rate, own in self._own_rates() if fresh else ():
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if id(p) in own]
                if mine:
                    group["params"] = [p for p in group["params"] if id(p) not in own]
                    optimizer.add_param_group(
                        {**{k: v for k, v in group.items() if k != "params"}, "params": mine, "lr": rate}
                    )
        return optimizer

    def _own_rates(self) -> list[tuple[float, set[int]]]:
        """Learning rates that differ from the student's, and the ids of the parameters they hold for."""
        if self.objective is None:
            return []
        peer = self.objective._modules.get(PEER)
        peers = set() if peer is None else {id(p) for p in peer.parameters()}
        rates = [(self.args.objective_learning_rate, {id(p) for p in self.objective.parameters()} - peers)]
        if peer is not None:
            rates.append((self.teacher.learning_rate, peers))
        return [(rate, own) for rate, own in rates if rate is not None]
