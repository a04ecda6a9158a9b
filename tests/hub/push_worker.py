"""Pushes through the real client to the server that HF_ENDPOINT names. push_worker.py FOLDER FAULTS.json"""

import json
import os
import sys
import types
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillSFTTrainer, LogitKD
from hf_distill.hub.push import HubUploadError, push_run
from hf_distill.objectives import FeatureKD
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

FAULTS = {  # a request, what the server does with it, and what the error must say
    "a wrong token": ("POST /api/repos/create", 401, "answered 401 .the token is missing or wrong"),
    "a token that may not write": ("POST .*/preupload/", 403, "answered 403 .this token may not write"),
    "a repository that is gone": ("POST .*/commit/", 404, "answered 404 .there is no such repository"),
    "a broken Hub": ("POST .*/commit/", 500, "answered 500 .the Hub failed: try again"),
    "a cut line halfway": ("PUT /lfs/", None, "dropped the connection"),
}


def order(pattern: str, status: int | None, times: int) -> None:
    body = json.dumps([pattern, status, times]).encode()
    urllib.request.urlopen(urllib.request.Request(f"{constants.ENDPOINT}/fault", data=body, method="POST")).read()


def main(folder: Path) -> dict:
    facts: dict = {}
    run = folder / "student"
    trainer = DistillSFTTrainer(
        tiny_llama(),
        teacher=tiny_llama(32, 3, seed=1),
        objective=LogitKD() + FeatureKD(),
        args=sft_arguments(
            run,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            push_to_hub=True,
            hub_model_id="me/student",
            hub_strategy="checkpoint",
        ),
        train_dataset=text_dataset(8),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    facts["through the trainer"] = str(trainer.push_to_hub(dataset_name="org/texts").commit_url)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for name, (pattern, status, _) in FAULTS.items():
        order(pattern, status, 99)
        try:
            push_run(run, f"me/{name.replace(' ', '-')}")
            facts[name] = "no error"
        except HubUploadError as error:
            facts[name] = str(error)
        order(pattern, status, 0)
        push_run(run, f"me/{name.replace(' ', '-')}")
    facts["folder is whole"] = before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    loaded = AutoModelForCausalLM.from_pretrained("me/student").state_dict()
    facts["weights"] = all(torch.equal(loaded[k], v) for k, v in trainer.student().state_dict().items())
    facts["tokenizer"] = AutoTokenizer.from_pretrained("me/student").get_vocab() == tiny_tokenizer().get_vocab()
    facts["files"] = {repo: HfApi().list_repo_files(f"me/{repo}") for repo in ("student", "a-broken-Hub")}
    return facts


if __name__ == "__main__":
    _http.time = types.SimpleNamespace(**vars(_http.time) | {"sleep": lambda seconds: None})  # between its retries
    assert os.environ["HF_ENDPOINT"] == constants.ENDPOINT
    Path(sys.argv[1], "facts.json").write_text(json.dumps(main(Path(sys.argv[1]))))
