"""Trainer hooks that upload the student: errors say what to do, and none goes unsaid."""

from __future__ import annotations

import logging
from pathlib import Path

from hf_distill.hub.push import explain, named_errors, push_run

logger = logging.getLogger(__name__)


class PublishesStudent:
    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with named_errors(self.args.output_dir, self.args.hub_model_id):
            super().init_hf_repo(token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card,
    ):
        """Save the student, write its card, and upload both; the objective and other state stay here.

        Args:
            blocking: False is refused: a failure could not be told.
            card: of `create_model_card` (model_name, dataset_name, tags).

        Raises:
            HubUploadError: the Hub could not be reached, refused, or failed; what was saved is whole.
        """
        if not blocking:
            raise ValueError("push_to_hub waits for the upload to end, or its failure would go unsaid: leave blocking")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = self.args.hub_model_id
        self.create_model_card(**{"model_name": name and name.split("/")[-1]} | card)
        self._finish_current_push()
        return push_run(
            Path(self.args.output_dir),
            name,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message or "End of training",
        )

    def _finish_current_push(self) -> None:
        """Uploads of checkpoints run beside training; one that failed is told when they are waited for."""
        super()._finish_current_push()
        push = getattr(self, "push_in_progress", None)
        for job in [] if push is None else push.jobs:
            error = job.exception()
            if error is not None:
                logger.warning("an upload failed: %s", explain(error, self.args.output_dir, self.args.hub_model_id))
        if push is not None:
            push.jobs = []
