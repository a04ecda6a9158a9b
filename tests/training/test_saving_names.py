"""Families whose files have other names than their modules: what a checkpoint holds is what training goes on from."""

import torch
from safetensors.torch import load_file

from hf_distill.baselines import HintonKD
from tests.baselines.models import trainer


def test_weights_of_a_renamed_family_stay_as_they_were_when_loaded(tmp_path):
    """transformers saves a ViT under the Hub's names and gives these to load_state_dict(strict=False)."""
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    done = trainer(tmp_path, "vit", HintonKD(), load_best_model_at_end=True, learning_rate=30.0, **settings)
    done.train()
    assert done.state.best_model_checkpoint.endswith("checkpoint-1"), "the second step of this rate is a bad one"
    own = done.student().state_dict()
    saved = load_file(f"{done.state.best_model_checkpoint}/model.safetensors")
    assert not saved.keys() <= own.keys(), "this family has the same names in files: choose another"
    best = type(done.student()).from_pretrained(done.state.best_model_checkpoint).state_dict()
    assert [name for name in own if not torch.equal(own[name], best[name])] == []
