"""scripts/evaluate.py from end to end with a tiny model: sampling, saved samples, resuming and errors."""

import json
import re
import shutil
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from dft.data.conversations.conversation import parse_conversation
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from dft.evaluation.folder import EvaluatedModel, model_fingerprint, parse_models
from dft.evaluation.problems import read_problems
from dft.evaluation.sampling import SamplingSettings, TransformersSampler, VllmSampler, resolve_backend
from dft.report.pages.evaluation import evaluation_page
from scripts import evaluate
from scripts.make_example import tiny_model

GOOD = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]}
ASKED = {
    "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2?"}],
    "answer": 2,
}


def write(folder, rows, name="test.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


@pytest.fixture
def problems(tmp_path):
    rows = [json.loads(json.dumps(GOOD).replace("1 + 1", f"{number} + 1")) for number in range(7)]
    return write(tmp_path, [*rows, ASKED])


def short(tiny, problems, output, *more):
    return (
        "--model", f"one={tiny}", "--data", problems, "--output", output, "--samples", 3,
        "--max_new_tokens", 6, "--batch_size", 6, *more,
    )  # fmt: skip


def test_results_table_page_and_samples_are_written(monkeypatch, tiny, tmp_path, problems, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    words = short(tiny, problems, tmp_path / "out")
    run(monkeypatch, *words[:2], other, *words[2:])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["one", "other"]
    (first,), (second,) = (model["files"] for model in results["models"])
    assert first["problems"] == 8 and first["samples"] == 3 and 0 < first["mean_tokens"] <= 6
    assert second["difference"]["value"] == 0 and "difference" not in first  # the same model, the same seeds
    records = [json.loads(line) for line in (tmp_path / "out/one/test.jsonl").read_text().splitlines()]
    assert [record["line"] for record in records] == list(range(1, 9)) and records[-1]["reference"] == "2"
    assert len({sample["text"] for sample in records[0]["samples"]}) > 1, "samples of a problem differ"
    assert (tmp_path / "out/table.md").read_text() in printed and "avg@3" in printed
    page = (tmp_path / "out/report.html").read_text()
    assert page.startswith("<!doctype html>") and "pass@3" in page and "&lt;script" not in page


def test_resumed_evaluation_has_the_same_results(monkeypatch, tiny, tmp_path, problems):
    run(monkeypatch, *short(tiny, problems, tmp_path / "whole"))
    whole = (tmp_path / "whole/one/test.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    contents = [whole[:cut] for cut in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1)]
    contents += [b"".join([*lines[:1], b"7\n", *lines[2:]]), b"".join([*lines[:1], *lines[:0:-1]])]
    for number, content in enumerate(contents):
        folder = tmp_path / f"cut-{number}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "one/test.jsonl").write_bytes(content)
        run(monkeypatch, *short(tiny, problems, folder))
        assert (folder / "one/test.jsonl").read_bytes() == whole
        assert (folder / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    monkeypatch.setattr(evaluate, "load_sampler", lambda *_: pytest.fail("everything is sampled already"))
    run(monkeypatch, *short(tiny, problems, tmp_path / "whole"))


def test_prompt_has_the_tokens_that_precede_the_answer_in_training(tiny, tmp_path):
    file = write(tmp_path, [GOOD])
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny))
    (problem,) = read_problems(file)
    prompt = problem.prompt_ids(encoder)
    ((example,),) = encoder.encode([parse_conversation(json.dumps(GOOD).encode())])
    start = int((example.labels != -100).argmax())
    assert prompt == example.input_ids[:start].tolist()


@pytest.fixture
def base(tiny, tmp_path):
    """Return a model that does not stop at the end-of-turn token of its template, <|im_end|>."""
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.eos_token == "<|im_end|>"
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    config = GenerationConfig.from_pretrained(tiny)
    config.eos_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder)
    return folder


def test_base_model_also_stops_at_the_end_of_turn_token_of_the_template(
    monkeypatch, tiny, base, tmp_path, problems, capsys
):
    """Otherwise, it would continue with another turn, and the last box in it would be graded."""
    samplers = []
    monkeypatch.setattr(
        evaluate,
        "TransformersSampler",
        lambda *args: samplers.append(TransformersSampler(*args)) or samplers[-1],
    )
    words = short(tiny, problems, tmp_path / "out")
    run(monkeypatch, *words[:2], f"base={base}", *words[2:])
    trained, untrained = samplers
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in trained.stops and untrained.stops == sorted({end, tokenizer.eos_token_id})
    assert "note        base: answers also end at <|im_end|>," in capsys.readouterr().out
    answer = untrained._answer([5, 6, end, 7, tokenizer.eos_token_id])
    assert (answer.tokens, answer.stopped) == (2, True)


def test_batched_answers_equal_those_of_single_prompts(tiny):
    """Left padding does not change greedy answers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    settings = SamplingSettings(samples=1, temperature=0, max_new_tokens=8)
    sampler = TransformersSampler(model, tokenizer, [tokenizer.eos_token_id], settings)
    together = sampler.sample(prompts, seed=0)
    assert together == [sampler.sample([prompt], seed=5)[0] for prompt in prompts]
    ids = torch.tensor([prompts[0]])
    for _ in range(together[0][0].tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0, 6:], skip_special_tokens=True) == together[0][0].text


def test_sampled_tokens_follow_the_softmax_distribution(tiny):
    """The sampling settings of the model's own generation_config are ignored."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.1, repetition_penalty=5.0)
    with torch.no_grad():
        model.lm_head.weight *= 3  # a distribution with some shape
        p = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double(), -1)
    settings = SamplingSettings(samples=2000, temperature=1.0, max_new_tokens=1, batch_size=2000)
    sampler = TransformersSampler(model, tokenizer, [tokenizer.eos_token_id], settings)
    seen: list[int] = []
    answer = sampler._answer
    sampler._answer = lambda ids: seen.append(ids[0]) or answer(ids)
    sampler.sample([[5, 6, 7]], seed=3)
    frequencies = torch.bincount(torch.tensor(seen), minlength=len(p)).double() / len(seen)
    assert (p > 0.002).sum() > 5
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / len(seen)).sqrt() + 2e-3).all()


class FakeVllm(types.ModuleType):
    """Stand-in for the parts of vLLM that are called."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.requests = []
        fake = self

        class SamplingParams:
            def __init__(self, **options):
                vars(self).update(options)

        class LLM:
            def __init__(self, **options):
                fake.options = options

            def generate(self, prompts, parameters, use_tqdm):
                fake.requests += list(zip(prompts, parameters, strict=True))
                output = types.SimpleNamespace
                return [
                    output(
                        outputs=[
                            output(text=f"#### {number}", token_ids=[1, 2, 3], finish_reason=reason)
                            for number, reason in zip(
                                range(parameter.n), ("stop", "length", "stop"), strict=True
                            )
                        ]
                    )
                    for parameter in parameters
                ]

        self.LLM, self.SamplingParams = LLM, SamplingParams


def test_vllm_gets_the_same_prompts_and_settings(monkeypatch, tiny):
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    settings = SamplingSettings(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=5, seed=2)
    answers = VllmSampler(str(tiny), [9, 4], settings, "float16", False).sample([[5, 6], [7]], seed=40)
    assert [[answer.text for answer in group] for group in answers] == [["#### 0", "#### 1", "#### 2"]] * 2
    assert [(answer.tokens, answer.stopped) for answer in answers[0]] == [(2, True), (3, False), (2, True)]
    (first, how), (_, next_how) = fake.requests
    assert first == {"prompt_token_ids": [5, 6]} and (how.n, how.temperature, how.top_p) == (3, 0.7, 0.9)
    assert how.top_k == -1 and how.max_tokens == 5 and how.seed != next_how.seed
    assert how.stop_token_ids == [9, 4]
    assert fake.options == {"model": str(tiny), "dtype": "float16", "seed": 2, "trust_remote_code": False}


def test_missing_vllm_is_an_error():
    with pytest.raises(UserError, match="vllm is not installed; pip install vllm"):
        resolve_backend("vllm")
    assert resolve_backend("auto") == "transformers"


BAD_LINES = {
    "broken JSON": '{"messages": [',
    "nothing to grade against": json.dumps(
        {"messages": [{"role": "user", "content": "2?"}, *GOOD["messages"][::-1]]}
    ),
    "there is no prompt": json.dumps({"messages": [{"role": "assistant", "content": "2"}]}),
    "'answer' must be a string or a number, got \\[2\\]": json.dumps({**ASKED, "answer": [2]}),
    "no assistant turn": json.dumps({"messages": ASKED["messages"]}),
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_invalid_row_is_an_error_with_file_and_line(tmp_path, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{BAD_LINES[message]}\n")
    with pytest.raises(UserError, match=f"bad.jsonl:3: .*{message}"):
        read_problems(file)


TWO = {"role": "user", "content": "2?"}
ANSWERED = [
    {"messages": [TWO]},
    {"messages": [TWO, {"role": "assistant", "content": "two"}]},
    {"conversations": [{"from": "human", "value": "2?"}]},
    {"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "two"}]},
    {"conversations": [TWO]},
    {"prompt": "2?"},
    {"prompt": "2?", "completion": "two"},
    {"prompt": [TWO]},
]


@pytest.mark.parametrize("row", ANSWERED, ids=str)
def test_row_with_an_answer_needs_no_assistant_turn(tmp_path, row):
    (problem,) = read_problems(write(tmp_path, [{**row, "answer": 2}]))
    assert (problem.question, problem.reference, problem.has_answer) == ("2?", "2", True)
    assert [turn["role"] for turn in problem.conversation.messages] == ["user", "assistant"]


REFUSED = {
    "--samples 0: must be at least 1": ["--samples", 0],
    "--temperature -1: must lie in": ["--temperature", -1],
    "--top_p 0: must be above 0": ["--top_p", 0],
    "use --samples 1": ["--temperature", 0],
    "--data .*none.jsonl: cannot be read": ["--data", "none.jsonl"],
    "--model .*nowhere.*: no such": ["--model", "./nowhere"],
    "another model is named a too; use NAME=y": ["--model", "a=x", "a=y"],
    "--seed 99999999999999999999: must lie": ["--seed", 99999999999999999999],
    "--chat_template .*none.jinja: no such file": ["--chat_template", "none.jinja"],
    "expected a JSON object": ["--chat_template_kwargs", "[]"],
    "--data .*test.jsonl:1: --grader boxed: the reference '#### 2' has no \\\\boxed": ["--grader", "boxed"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_invalid_settings_are_errors(monkeypatch, tiny, tmp_path, message):
    file = write(tmp_path, [GOOD])
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *short(tiny, file, tmp_path / "out", *REFUSED[message]))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_failed_command_can_be_corrected(monkeypatch, tiny, tmp_path, problems):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="--model .*nowhere"):
        run(monkeypatch, *short(tiny, problems, output, "--model", "one=./nowhere", "--top_p", 0.5))
    run(monkeypatch, *short(tiny, problems, output))
    with pytest.raises(UserError, match="--model .*nowhere"):
        run(monkeypatch, *short(tiny, problems, output, "--model", f"one={tiny}", "two=./nowhere"))
    run(monkeypatch, *short(tiny, problems, output, "--model", f"one={tiny}", f"two={tiny}"))
    assert len(lines(output / "two/test.jsonl")) == 8


def test_saved_samples_are_regraded_by_a_different_grader(monkeypatch, tiny, tmp_path, capsys):
    problems, output = write(tmp_path, [ASKED, GOOD]), tmp_path / "out"
    words = short(tiny, problems, output)
    run(monkeypatch, *words)
    assert (
        "problems    test: 1 by #### or \\boxed{}, whichever is there, 1 by ####" in capsys.readouterr().out
    )
    before = lines(output / "one/test.jsonl")
    before[0]["samples"][0]["text"] = "2"
    (output / "one/test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in before))
    monkeypatch.setattr(
        evaluate, "load_sampler", lambda *_: pytest.fail("nothing is sampled for another grader")
    )
    with pytest.raises(UserError, match="test.jsonl:2: --grader boxed"):
        run(monkeypatch, *words, "--grader", "boxed")
    assert not before[0]["samples"][0]["right"]
    run(monkeypatch, *words, "--grader", "exact")
    after = lines(output / "one/test.jsonl")
    assert after[0]["samples"][0] == {**before[0]["samples"][0], "right": True}
    assert [record["grader"] for record in after] == ["exact", "exact"]
    assert json.loads((output / "results.json").read_text())["settings"]["grader"] == "exact"


def test_results_include_models_and_files_of_earlier_calls(monkeypatch, tiny, tmp_path, problems):
    output, more = tmp_path / "out", write(tmp_path, [GOOD, ASKED], "more.jsonl")
    run(monkeypatch, *short(tiny, problems, output))
    run(monkeypatch, *short(tiny, more, output, "--model", f"two={tiny}"))
    run(monkeypatch, *short(tiny, problems, output, "--model", f"two={tiny}"))
    results = json.loads((output / "results.json").read_text())
    files = {model["name"]: [file["file"] for file in model["files"]] for model in results["models"]}
    assert files == {"one": ["test"], "two": ["test", "more"]}
    first, second = results["models"]
    assert "difference" not in first["files"][0] and second["files"][0]["difference"]["value"] == 0
    assert "| one | test |" in (output / "table.md").read_text()
    truncated = (output / "one/test.jsonl").read_text().splitlines(keepends=True)[:-1]
    (output / "one/test.jsonl").write_text("".join(truncated))
    run(monkeypatch, *short(tiny, problems, output, "--model", f"two={tiny}"))
    results = json.loads((output / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["two"], "incomplete samples are not included"


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "config.json", "generation_config.json"]
)
def test_fingerprint_covers_tokenizer_template_and_base_model(tiny, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "report.json").write_text("{}")
    before = model_fingerprint(str(folder))
    (folder / "report.json").write_text("[]")
    assert model_fingerprint(str(folder)) == before
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    of_adapters = model_fingerprint(str(adapters))
    with open(folder / name, "a") as stream:
        stream.write(" ")
    assert model_fingerprint(str(folder)) != before and model_fingerprint(str(adapters)) != of_adapters


def test_existing_folder_may_have_an_equals_sign_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=5e-5").mkdir()
    assert parse_models(["lr=5e-5", "b=lr=5e-5"]) == [
        EvaluatedModel("lr=5e-5", "lr=5e-5"),
        EvaluatedModel("b", "lr=5e-5"),
    ]


def test_adapters_with_vllm_are_an_error(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"merge_lora.py {tmp_path} merged"):
        evaluate.check_adapters([EvaluatedModel("one", str(tmp_path))], "vllm")
    evaluate.check_adapters([EvaluatedModel("one", str(tmp_path))], "transformers")


def test_model_without_embeddings_of_the_template_tokens_is_an_error(
    monkeypatch, tiny, tmp_path, problems, capsys
):
    """The ChatML tokens are added to the tokenizer, but the model has no embeddings for them."""
    folder, output = tmp_path / "plain", tmp_path / "out"
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, "<unk>")), eos_token="<end>"
    )
    words.save_pretrained(folder)
    tiny_model(words).save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"<\|im_(start|end)\|> .* has embeddings of 3 tokens; pass a --chat_templ"
    ):
        run(monkeypatch, *short(folder, problems, output))
    assert (
        "note        one: chat template: the tokenizer has none; plain ChatML is used\n"
        in capsys.readouterr().out
    )
    template = tmp_path / "plain.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}<end>{% endfor %}")
    run(monkeypatch, *short(folder, problems, output, "--chat_template", template))
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="holds samples with chat_template plain.jinja"):
        run(monkeypatch, *short(folder, problems, output, "--chat_template", template))


def test_truncated_weights_are_an_error(monkeypatch, tiny, tmp_path, problems):
    folder = tmp_path / "cut"
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="--model .*cut: cannot be loaded: SafetensorError"):
        run(monkeypatch, *short(folder, problems, tmp_path / "out"))


def test_out_of_memory_is_an_error_with_a_remedy(monkeypatch, tiny, tmp_path, problems):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(TransformersSampler, "_generate", full)
    with pytest.raises(
        UserError, match="out of memory: one, test: .*asked for 2.00 GiB.*smaller --batch_size"
    ):
        run(monkeypatch, *short(tiny, problems, tmp_path / "out"))
    monkeypatch.undo()
    run(monkeypatch, *short(tiny, problems, tmp_path / "out", "--batch_size", 3))
    with pytest.raises(UserError, match="holds samples with batch_size 3, and this call has 6"):
        run(monkeypatch, *short(tiny, problems, tmp_path / "out"))


def test_samples_with_different_settings_models_or_data_are_an_error(monkeypatch, tiny, tmp_path, problems):
    output = tmp_path / "out"
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    run(monkeypatch, *short(model, problems, output))
    with pytest.raises(UserError, match="holds samples with temperature 1.0, and this call has 0.5"):
        run(monkeypatch, *short(model, problems, output, "--temperature", 0.5))
    retrained = AutoModelForCausalLM.from_pretrained(model)
    retrained.save_pretrained(model)
    with pytest.raises(UserError, match="holds samples of another model named one"):
        run(monkeypatch, *short(model, problems, output))
    with pytest.raises(UserError, match="holds samples of another data file named test"):
        run(monkeypatch, *short(tiny, write(tmp_path, [GOOD]), output, "--model", f"two={tiny}"))
    (output / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json is damaged"):
        run(monkeypatch, *short(tiny, problems, output))


def test_page_shows_models_settings_and_examples():
    def share(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    numbers = {
        "file": "test", "problems": 8, "samples": 2, "avg": share(0.5), "pass": share(0.5), "stopped": 1,
        "mean_tokens": 7,
    }  # fmt: skip
    name = f"run-{'x' * 100}-seed-7"
    models = [
        {"name": "base", "path": "/models/one", "files": [numbers]},
        {"name": name, "path": "/models/two", "files": [{**numbers, "difference": share(0.25)}]},
    ]
    settings = {**vars(SamplingSettings()), "backend": "transformers", "dtype": "bfloat16", "grader": "auto"}
    settings |= {"chat_template": None, "chat_template_kwargs": {"enable_thinking": False}}
    sample = {"text": "4", "right": False, "tokens": 1, "stopped": True}
    record = {"line": 1, "question": "What is 2 < 3?", "reference": "yes", "samples": [sample]}
    page = evaluation_page({"settings": settings, "models": models}, {("base", "test"): [record]})
    assert "What is 2 &lt; 3?" in page and "/models/two" in page and "dtype bfloat16" in page
    assert "+25.0 % <small>+15.0 to +35.0</small>" in page and "enable_thinking" in page
    (shown,) = re.findall(r"<text[^>]*>([^<]*)<title>run", page)
    assert len(shown) == 60 and shown.startswith("run-") and shown.endswith("-seed-7")
    assert f"<title>{name}</title>" in page, "the tooltip shows the whole name"


def test_generated_text_is_escaped_in_the_page(monkeypatch, tiny, tmp_path, problems):
    row = {
        **GOOD,
        "messages": [GOOD["messages"][0], {"role": "assistant", "content": "<script>x</script> #### 2"}],
    }
    run(monkeypatch, *short(tiny, write(tmp_path, [row], "odd.jsonl"), tmp_path / "out"))
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;x" in page


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "2 + 2?",
            "answer": 4,
            "question": "2 + 2?",
            "split": "test",
            "label": "easy",
            "weight": 0,
        },
        {"instruction": "2 + 2?", "answer": "4", "context": "sums", "reward": 0.5},
        {"query": "2 + 2?", "answer": "4", "id": 7},
        {"conversation": [{"human": "2 + 2?"}], "answer": "4"},
    ],
)
def test_problems_may_have_any_row_form_and_other_columns(row, tmp_path):
    (tmp_path / "problems.jsonl").write_text(json.dumps(row))
    (problem,) = read_problems(tmp_path / "problems.jsonl")
    assert (problem.question, problem.reference) == ("2 + 2?", "4")
