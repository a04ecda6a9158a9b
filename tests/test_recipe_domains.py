"""The recipe on domains: its embedded data, and a run of it."""

import importlib.util
from pathlib import Path

from hf_distill.embedded.domains import CHARACTERS, domain_dataset


def test_embedded_domains_are_mixed_up_or_one_is_missing():
    data = domain_dataset().to_pandas()
    sizes = data.assign(size=data["text"].str.len()).groupby("domain")["size"].agg(["sum", "max"])
    assert {"docstrings", "source"} <= set(sizes.index) and (sizes["max"] <= 2000).all()
    assert (sizes["sum"] <= CHARACTERS + 2000).all() and (sizes["sum"] > CHARACTERS / 4).all()
    share = data.assign(code=data["text"].str.contains("def ")).groupby("domain")["code"].mean()
    assert share["source"] > 2 * share["docstrings"]


def test_the_recipe_does_not_run_by_itself(tmp_path, capsys):
    path = Path(__file__).parents[1] / "recipes" / "ddk.py"
    spec = importlib.util.spec_from_file_location("recipe_ddk", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--ddk_interval", "1", "--max_length", "32"]
    module.main([*flags, "--ddk_eval_samples", "2", "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "perplexity on docstrings" in said and "perplexity on source" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| domain source | 0." in card and (tmp_path / "out" / "model.safetensors").is_file()
