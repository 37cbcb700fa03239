"""The model card (README.md) written with every saved model."""

import torch
import yaml
from safetensors.torch import load_file

from tests.launching import eval_records, train_records


def test_every_saved_model_has_a_card(example, forks, tmp_path):
    flags = {"dft_alpha": 0.7, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "report": True}
    flags |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 32}
    flags |= {"data_files": [example.train, example.other]}
    (code,), printed = forks.run(example.words(tmp_path, **flags))
    assert code == 0, printed
    for folder, step in ((tmp_path, 4), (tmp_path / "checkpoint-2", 2)):
        _, head, text = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(head) == {
            "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dft", "fine-tuned"]
        }, "a path on this machine is no base model of the hub"  # fmt: skip
        assert "by 0.7 p + 0.3, where p is the model's own" in text
        assert f"Saved after step {step} of 4." in text and "300 conversations" in text
        assert "            other.json: 3 conversations" in text and str(example.folder) not in text
        assert "| learning_rate | 0.002 |" in text and "torch 2" in text
        assert "![Curves of training and evaluation](report.png)" in text
        assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    train, evaluation = train_records(tmp_path)[-1], eval_records(tmp_path)[-1]
    text = (tmp_path / "README.md").read_text()
    assert "| | train, step 4 | eval, step 4 |" in text
    assert f"| nll | {train['nll']:.4g} | {evaluation['eval_nll']:.4g} |" in text


def test_the_card_of_adapters_names_their_base_model(example, forks, tmp_path):
    flags = {"max_steps": 1, "lora_r": 2, "dft_alpha": 0, "eval_data_files": None}
    flags |= {"add_tokens": ["<|a|>", "<b>"]}
    # The card of this run is replaced by that of the next one.
    assert forks.run(example.words(tmp_path, **{**flags, "lora_r": None}))[0] == [0]
    (code,), printed = forks.run(example.words(tmp_path, **flags))
    assert code == 0, printed
    text = (tmp_path / "README.md").read_text()
    assert "These are LoRA adapters of rank 2" in text and "by plain SFT" in text and "report.png" not in text
    # Within a table, Markdown ends a cell at each | that is not escaped.
    assert "| add_tokens | `<\\|a\\|>`, `<b>` |" in text


def test_a_readme_that_the_user_wrote_is_kept(example, forks, tmp_path):
    (tmp_path / "README.md").write_text("# My notes\n")
    (code,), printed = forks.run(example.words(tmp_path, max_steps=1, eval_data_files=None))
    assert code == 0 and "was not written by this program" in printed
    assert (tmp_path / "README.md").read_text() == "# My notes\n"


def test_the_card_of_the_best_model_describes_its_weights_and_not_the_last_step(example, forks, tmp_path):
    """With a learning rate that destroys the model, the first evaluation is the best one."""
    flags = {"max_steps": 6, "learning_rate": 0.5, "per_device_train_batch_size": 32}
    flags |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    flags |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_nll"}
    (code,), printed = forks.run(example.words(tmp_path, **flags))
    assert code == 0, printed
    saved, best = (load_file(tmp_path / name / "model.safetensors") for name in (".", "checkpoint-2"))
    assert all(torch.equal(saved[name], best[name]) for name in best)
    nll = {record["step"]: record["eval_nll"] for record in eval_records(tmp_path)}
    assert min(nll, key=nll.get) == 2 and nll[6] > 1.1 * nll[2]
    text = (tmp_path / "README.md").read_text()
    assert f"The weights are those after step 2 of 6, the best of the run (eval_nll {nll[2]:.4g})." in text
    assert "| | train, step 2 | eval, step 2 |" in text
    assert f"| nll | {train_records(tmp_path)[1]['nll']:.4g} | {nll[2]:.4g} |" in text
    assert f"model       {tmp_path}, with the weights of step 2 (AutoModelForCausalLM" in printed
    last = (tmp_path / "checkpoint-6/README.md").read_text()
    assert "Saved after step 6 of 6." in last and f"| {nll[6]:.4g} |" in last


def test_the_card_of_a_resumed_run_names_the_flags_that_changed(example, forks, tmp_path):
    flags = {"per_device_train_batch_size": 32, "eval_data_files": None, "save_strategy": "steps"}
    flags |= {"save_steps": 2}
    assert forks.run(example.words(tmp_path, **flags, max_steps=4))[0] == [0]
    resume = {"resume_from_checkpoint": tmp_path / "checkpoint-2", "learning_rate": 1e-5, "max_steps": 6}
    resume |= {"dft_alpha": 0.5}
    (code,), printed = forks.run(example.words(tmp_path, **flags, **resume))
    assert code == 0, printed
    text = (tmp_path / "README.md").read_text()
    changes = (
        "Changed after step 2: `--learning_rate` from 0.002 to 1e-05, `--max_steps` from 4 to 6, `objective` "
        "from DFT, alpha 1 to DFT, alpha 0.5."
    )
    assert "| learning_rate | 1e-05 |" in text and changes in text
    assert "Changed after" not in (tmp_path / "checkpoint-2/README.md").read_text()
    # The record is part of the state, so it outlives the next checkpoint.
    resume |= {"resume_from_checkpoint": tmp_path / "checkpoint-4", "learning_rate": 1e-4}
    assert forks.run(example.words(tmp_path, **flags, **resume))[0] == [0]
    text = (tmp_path / "README.md").read_text()
    assert changes in text and "Changed after step 4: `--learning_rate` from 1e-05 to 0.0001." in text
