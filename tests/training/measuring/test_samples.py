"""Answers that the model generates while it is trained, compared with greedy decoding by hand."""

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen3ForCausalLM

from dft.data.batches.generation import pad_left, split_at_stop
from dft.training.measuring.samples import AnswerGenerator, GeneratedAnswer
from tests.families import FAMILIES
from tests.training.test_router import CONFIG, make
from tests.training.test_trainer import VOCAB, tiny

STOPS = [3, 7]
PROMPTS = [[5], [9, 4, 11, 2, 30, 8, 1], [12, 13], [6, 6, 6], [21, 22, 23, 24, 25]]
LENGTH = 9


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    AcceleratorState._reset_state()  # an earlier test of the process may have computed in bfloat16
    return Accelerator(cpu=True, mixed_precision="no")


def generator(accelerator, prompts=PROMPTS, stops=STOPS, batch_size=2, **more) -> AnswerGenerator:
    return AnswerGenerator(prompts, stops, LENGTH, batch_size, accelerator, **more)


def by_hand(model, prompt: list[int], stops: list[int]) -> GeneratedAnswer:
    """Return the most likely continuation, one forward pass over the whole text for each token."""
    ids = list(prompt)
    for _ in range(LENGTH):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model with larger weights, whose answers vary and end."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    return model.eval()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_are_those_of_the_most_likely_tokens(accelerator, seed):
    model = spread(tiny(seed))
    generated = generator(accelerator).generate(model, lambda: False)
    expected = [by_hand(model, prompt, STOPS) for prompt in PROMPTS]
    assert [(answer.ids, answer.ended) for answer in generated.answers] == expected
    assert [answer.prompt for answer in generated.answers] == list(range(len(PROMPTS)))
    assert generated.failure is None and not generated.is_stopped
    assert len({tuple(ids) for ids, _ in expected}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_different_lengths_do_not_change_each_other(accelerator, family):
    """Shorter prompts are padded: positions, masks and states of the model must not see it."""
    torch.manual_seed(1)
    model = FAMILIES[family](64).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    answers = generator(accelerator, stops=[62], batch_size=5).generate(model, lambda: False).answers
    assert [(answer.ids, answer.ended) for answer in answers] == [
        by_hand(model, prompt, [62]) for prompt in PROMPTS
    ]


def test_some_answers_end_and_others_are_cut_off(accelerator):
    model = spread(tiny(1))
    free = [by_hand(model, prompt, [])[0] for prompt in PROMPTS]
    stop = free[0][2]
    answers = generator(accelerator, stops=[stop]).generate(model, lambda: False).answers
    assert [answer.ids for answer in answers] == [
        ids[: ids.index(stop)] if stop in ids else ids for ids in free
    ]
    assert [answer.ended for answer in answers] == [stop in ids for ids in free]
    assert {True, False} == {answer.ended for answer in answers}


def test_the_settings_of_the_model_have_no_effect_and_stay(accelerator):
    plain = generator(accelerator).generate(spread(tiny(2)), lambda: False)
    model = spread(tiny(2))
    own = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=2, eos_token_id=1, use_cache=False
    )
    model.generation_config = own
    model.config.use_cache = False
    assert generator(accelerator).generate(model, lambda: False) == plain
    assert model.generation_config is own and own.eos_token_id == 1 and not model.config.use_cache


def test_the_model_keeps_its_mode_gradients_and_random_state(accelerator):
    model = tiny()
    model.gradient_checkpointing_enable()
    for is_training in (True, False):
        model.train(is_training)
        torch.manual_seed(4), random.seed(4), np.random.seed(4)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        generator(accelerator).generate(model, lambda: False)
        assert all(module.training == is_training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert np.array_equal(np.random.get_state()[1], states[2])
    model.train()
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_adapters_take_part(accelerator):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.9)
    model = get_peft_model(spread(tiny(2)), config).train()
    before = generator(accelerator).generate(model, lambda: False)
    own = model.get_base_model().generation_config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.normal_()
    after = generator(accelerator).generate(model, lambda: False)
    model.eval()
    assert [(answer.ids, answer.ended) for answer in after.answers] == [
        by_hand(model, prompt, STOPS) for prompt in PROMPTS
    ]
    assert before != after and model.get_base_model().generation_config is own
    assert "generation_config" not in vars(model)


def test_a_router_with_an_auxiliary_loss_generates(accelerator):
    model = make("mixtral").eval()
    assert CONFIG["output_router_logits"] and model.config.output_router_logits
    answers = generator(accelerator).generate(model, lambda: False).answers
    assert [(answer.ids, answer.ended) for answer in answers] == [
        by_hand(model, prompt, STOPS) for prompt in PROMPTS
    ]
    assert model.config.output_router_logits


def test_a_stop_ends_generation_at_the_next_token(accelerator):
    calls = []

    def is_asked() -> bool:
        calls.append(1)
        return len(calls) >= 4

    asked = generator(accelerator, stops=[VOCAB - 1], is_asked=is_asked)
    generated = asked.generate(tiny(), lambda: len(calls) >= 4)
    assert generated.is_stopped and generated.answers == [] and len(calls) == 4
    calls.clear()
    last = generator(accelerator, prompts=[[1]], stops=[VOCAB - 1], is_asked=is_asked)
    generated = last.generate(tiny(), lambda: len(calls) >= 4)
    assert generated.is_stopped and [len(answer.ids) for answer in generated.answers] == [4]


def test_a_lack_of_memory_is_a_result(accelerator, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB")

    monkeypatch.setattr(Qwen3ForCausalLM, "generate", fail)
    model = tiny()
    own = model.generation_config
    generated = generator(accelerator).generate(model, lambda: False)
    assert generated.failure == "asked for 2.50 GiB" and generated.answers == []
    assert model.generation_config is own

    def fault(*_args, **_kwargs):
        raise RuntimeError("shapes")

    monkeypatch.setattr(Qwen3ForCausalLM, "generate", fault)
    with pytest.raises(RuntimeError, match="shapes"):
        generator(accelerator).generate(model, lambda: False)


class Rank:
    """An accelerator of one of several ranks."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.process_index, self.num_processes = rank, ranks


@pytest.mark.parametrize(
    ("prompts", "ranks", "batch_size"), [(3, 2, 1), (5, 2, 8), (1, 4, 2), (9, 4, 2), (4, 1, 3)]
)
def test_prompts_are_divided_and_all_ranks_run_as_often(prompts, ranks, batch_size):
    rounds = [
        list(AnswerGenerator([[1]] * prompts, STOPS, 4, batch_size, Rank(rank, ranks)).rounds())
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in rounds}) == 1
    everyone = [index for batches in rounds for batch in batches for index in batch]
    assert sorted(everyone) == list(range(prompts))
    assert all(len(batch) <= batch_size for batches in rounds for batch in batches)


def test_progress_is_reported_for_each_token(accelerator):
    beats = []
    model = tiny()
    generator(accelerator, prompts=[[1]], stops=[VOCAB - 1], beat=lambda: beats.append(1)).generate(
        model, lambda: False
    )
    assert len(beats) == LENGTH


def test_left_padding_and_stop_tokens():
    ids, mask = pad_left([[1], [2, 3, 4]], 9)
    assert ids.tolist() == [[9, 9, 1], [2, 3, 4]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert split_at_stop([5, 6, 3, 6], {3, 4}) == ([5, 6], True)
    assert split_at_stop([5, 6], {3}) == ([5, 6], False) and split_at_stop([3], {3}) == ([], True)
