"""scripts/evaluate.py from end to end, on a tiny model: what it draws, keeps, goes on from and refuses."""

import json
import shutil
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dft.data.chat import ChatEncoder
from dft.data.conversation import parse_conversation
from dft.errors import UserError
from dft.evaluation.problems import read_problems
from dft.evaluation.sampling import Settings, TransformersSampler, VllmSampler, choose_backend
from scripts import evaluate

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


def test_results_table_page_and_samples(monkeypatch, tiny, tmp_path, problems, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    words = short(tiny, problems, tmp_path / "out")
    run(monkeypatch, *words[:2], other, *words[2:])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [one["name"] for one in results["models"]] == ["one", "other"]
    (first,), (second,) = (one["files"] for one in results["models"])
    assert first["problems"] == 8 and first["samples"] == 3 and 0 < first["mean_tokens"] <= 6
    assert second["difference"]["value"] == 0 and "difference" not in first  # the same model, the same seeds
    records = [json.loads(line) for line in (tmp_path / "out/one/test.jsonl").read_text().splitlines()]
    assert [one["line"] for one in records] == list(range(1, 9)) and records[-1]["reference"] == "2"
    assert len({one["text"] for one in records[0]["samples"]}) > 1, "drawn, and not the same each time"
    assert (tmp_path / "out/table.md").read_text() in printed and "avg@3" in printed
    page = (tmp_path / "out/report.html").read_text()
    assert page.startswith("<!doctype html>") and "pass@3" in page and "&lt;script" not in page


def test_a_killed_evaluation_ends_as_it_would_have(monkeypatch, tiny, tmp_path, problems):
    run(monkeypatch, *short(tiny, problems, tmp_path / "whole"))
    whole = (tmp_path / "whole/one/test.jsonl").read_bytes()
    for cut in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "one/test.jsonl").write_bytes(whole[:cut])
        run(monkeypatch, *short(tiny, problems, folder))
        assert (folder / "one/test.jsonl").read_bytes() == whole
        assert (folder / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    monkeypatch.setattr(evaluate, "load", lambda *_: pytest.fail("there is nothing left to do"))
    run(monkeypatch, *short(tiny, problems, tmp_path / "whole"))


def test_the_prompt_is_what_precedes_the_answer_in_training(tiny, tmp_path):
    file = write(tmp_path, [GOOD])
    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny))
    (problem,) = read_problems(file)
    prompt = problem.prompt_ids(encoder)
    ((example,),) = encoder.encode([parse_conversation(json.dumps(GOOD).encode())])
    start = int((example.labels != -100).argmax())
    assert prompt == example.input_ids[:start].tolist()


@pytest.fixture
def base(tiny, tmp_path):
    """A model that names `<|endoftext|>` alone as its end, though its template ends turns with <|im_end|>."""
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


def test_a_base_model_stops_where_a_trained_one_does(monkeypatch, tiny, base, tmp_path, problems, capsys):
    """Else it would go on to a turn of its own making, whose last box would be graded."""
    made = []
    monkeypatch.setattr(
        evaluate, "TransformersSampler", lambda *how: made.append(TransformersSampler(*how)) or made[-1]
    )
    words = short(tiny, problems, tmp_path / "out")
    run(monkeypatch, *words[:2], f"base={base}", *words[2:])
    trained, untrained = made
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in trained.stops and untrained.stops == sorted({end, tokenizer.eos_token_id})
    assert "note        base: answers also end at <|im_end|>," in capsys.readouterr().out
    answer = untrained._answer([5, 6, end, 7, tokenizer.eos_token_id])
    assert (answer.tokens, answer.stopped) == (2, True)


def test_a_batch_gives_what_single_prompts_give(tiny):
    """Left padding changes nothing: greedy answers of a batch are those of each prompt alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    settings = Settings(samples=1, temperature=0, max_new_tokens=8)
    sampler = TransformersSampler(model, tokenizer, [tokenizer.eos_token_id], settings)
    together = sampler.sample(prompts, seed=0)
    assert together == [sampler.sample([one], seed=5)[0] for one in prompts]
    ids = torch.tensor([prompts[0]])
    for _ in range(together[0][0].tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0, 6:], skip_special_tokens=True) == together[0][0].text


def test_tokens_are_drawn_from_the_distribution_itself(tiny):
    """Nothing is left of the model's own settings of sampling: frequencies are those of softmax."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.1, repetition_penalty=5.0)
    with torch.no_grad():
        model.lm_head.weight *= 3  # a distribution with some shape
        p = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double(), -1)
    settings = Settings(samples=2000, temperature=1.0, max_new_tokens=1, batch_size=2000)
    made = TransformersSampler(model, tokenizer, [tokenizer.eos_token_id], settings)
    seen: list[int] = []
    monkey = made._answer
    made._answer = lambda ids: seen.append(ids[0]) or monkey(ids)
    made.sample([[5, 6, 7]], seed=3)
    found = torch.bincount(torch.tensor(seen), minlength=len(p)).double() / len(seen)
    assert (p > 0.002).sum() > 5
    assert ((found - p).abs() <= 5 * (p * (1 - p) / len(seen)).sqrt() + 2e-3).all()


class StandIn(types.ModuleType):
    """What of vLLM is called, with the shape of its answers."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.asked = []
        stand_in = self

        class SamplingParams:
            def __init__(self, **given):
                vars(self).update(given)

        class LLM:
            def __init__(self, **given):
                stand_in.made = given

            def generate(self, prompts, parameters, use_tqdm):
                stand_in.asked += list(zip(prompts, parameters, strict=True))
                output = types.SimpleNamespace
                return [
                    output(
                        outputs=[
                            output(text=f"#### {number}", token_ids=[1, 2, 3], finish_reason=reason)
                            for number, reason in zip(range(one.n), ("stop", "length", "stop"), strict=True)
                        ]
                    )
                    for one in parameters
                ]

        self.LLM, self.SamplingParams = LLM, SamplingParams


def test_vllm_is_asked_for_the_same(monkeypatch, tiny):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    settings = Settings(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=5, seed=2)
    made = VllmSampler(str(tiny), [9, 4], settings, "float16", False).sample([[5, 6], [7]], seed=40)
    assert [[one.text for one in some] for some in made] == [["#### 0", "#### 1", "#### 2"]] * 2
    assert [(one.tokens, one.stopped) for one in made[0]] == [(2, True), (3, False), (2, True)]
    (first, how), (_, next_how) = stand_in.asked
    assert first == {"prompt_token_ids": [5, 6]} and (how.n, how.temperature, how.top_p) == (3, 0.7, 0.9)
    assert how.top_k == -1 and how.max_tokens == 5 and how.seed != next_how.seed
    assert how.stop_token_ids == [9, 4]
    assert stand_in.made == {"model": str(tiny), "dtype": "float16", "seed": 2, "trust_remote_code": False}


def test_vllm_that_is_not_there_is_told():
    with pytest.raises(UserError, match="vllm is not installed; pip install vllm"):
        choose_backend("vllm")
    assert choose_backend("auto") == "transformers"


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
def test_a_bad_line_is_named(tmp_path, message):
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
def test_an_answer_needs_no_turn_of_the_assistant(tmp_path, row):
    (problem,) = read_problems(write(tmp_path, [{**row, "answer": 2}]))
    assert (problem.question, problem.reference, problem.has_answer) == ("2?", "2", True)
    assert [one["role"] for one in problem.conversation.messages] == ["user", "assistant"]


REFUSED = {
    "--samples 0: must be at least 1": ["--samples", 0],
    "--temperature -1: must lie in": ["--temperature", -1],
    "--top_p 0: must be above 0": ["--top_p", 0],
    "give --samples 1": ["--temperature", 0],
    "--data .*none.jsonl: cannot be read": ["--data", "none.jsonl"],
    "--model .*nowhere.*: no such": ["--model", "./nowhere"],
    "another model is named a too; give NAME=y": ["--model", "a=x", "a=y"],
    "expected a JSON object": ["--chat_template_kwargs", "[]"],
    "has no #### *; give another|has no \\\\boxed": ["--grader", "boxed"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_settings_are_refused(monkeypatch, tiny, tmp_path, message):
    file = write(tmp_path, [GOOD])
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *short(tiny, file, tmp_path / "out", *REFUSED[message]))


def test_samples_of_something_else_are_not_gone_on_from(monkeypatch, tiny, tmp_path, problems):
    output = tmp_path / "out"
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    run(monkeypatch, *short(model, problems, output))
    with pytest.raises(UserError, match="holds samples with temperature 1.0, and this is 0.5"):
        run(monkeypatch, *short(model, problems, output, "--temperature", 0.5))
    retrained = AutoModelForCausalLM.from_pretrained(model)
    retrained.save_pretrained(model)
    with pytest.raises(UserError, match="holds samples of another model named one"):
        run(monkeypatch, *short(model, problems, output))
    with pytest.raises(UserError, match="holds samples of another data named test"):
        run(monkeypatch, *short(tiny, write(tmp_path, [GOOD]), output, "--model", f"two={tiny}"))
    (output / "settings.json").write_text("{")
    with pytest.raises(UserError, match="settings.json is damaged"):
        run(monkeypatch, *short(tiny, problems, output))


def test_generated_text_is_escaped_in_the_page(monkeypatch, tiny, tmp_path, problems):
    row = {
        **GOOD,
        "messages": [GOOD["messages"][0], {"role": "assistant", "content": "<script>x</script> #### 2"}],
    }
    run(monkeypatch, *short(tiny, write(tmp_path, [row], "odd.jsonl"), tmp_path / "out"))
    page = (tmp_path / "out/report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;x" in page
