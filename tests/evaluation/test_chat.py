"""A conversation with a model: prompts as in training, and honest probabilities of streamed tokens."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dft.data.conversations.conversation import parse_conversation
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError
from dft.evaluation.chat import AnswerStream, Chat, End, Piece
from dft.evaluation.sampling import SamplingSettings


def chat_with(folder, limit: int | None = None, **settings) -> Chat:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chosen = SamplingSettings(
        samples=1, **{"temperature": 0.5, "top_p": 0.8, "max_new_tokens": 12, **settings}
    )
    return Chat(model, ChatEncoder(tokenizer), [tokenizer.eos_token_id], chosen, limit)


@pytest.fixture(scope="module")
def chat(tiny) -> Chat:
    return chat_with(tiny)


@pytest.fixture(autouse=True)
def empty(chat):
    chat.clear()
    chat.system = ""
    torch.manual_seed(0)


def test_p_is_the_probability_of_a_forward_pass_whatever_the_temperature(chat):
    pieces: list[Piece] = []
    reply = chat.ask("1 + 1?", pieces.append)
    prompt = chat.prompt_ids([{"role": "user", "content": "1 + 1?"}])
    stop = chat.stops if reply.end is End.STOP_TOKEN else []
    ids = torch.tensor([prompt + reply.ids + stop])
    with torch.inference_mode():
        p = chat.model(ids).logits[0].softmax(-1)
    expected = [p[place - 1, ids[0, place]].item() for place in range(len(prompt), ids.shape[1])]
    assert len(expected) >= 8 and reply.p == pytest.approx(expected, rel=1e-4)
    assert [value for piece in pieces for value in piece.p] == reply.p
    assert "".join(piece.text for piece in pieces if not piece.is_stop) == reply.text


def test_a_prompt_has_the_tokens_that_precede_the_answer_in_training(chat):
    chat.system = "Be short."
    reply = chat.ask("1 + 1?", lambda piece: None)
    prompt = chat.prompt_ids([*chat.turns, {"role": "user", "content": "2?"}])
    turns = [("system", "Be short."), ("user", "1 + 1?"), ("assistant", reply.text or "-"), ("user", "2?")]
    rows = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "4")]]
    (example,) = chat.encoder.encode([parse_conversation(json.dumps({"messages": rows}).encode())])[0]
    start = int(example.ends[-1]) - 1  # the answer is one token and its stop token
    assert prompt == example.input_ids[:start].tolist()


def test_greedy_answers_equal_those_of_generate(tiny):
    chat = chat_with(tiny, temperature=0)
    chat.model.generation_config.repetition_penalty = 5.0  # must not be used
    reply = chat.ask("1 + 1?", lambda piece: None)
    ids = chat.prompt_ids([{"role": "user", "content": "1 + 1?"}])
    with torch.inference_mode():
        for expected in reply.ids:
            assert int(chat.model(torch.tensor([ids])).logits[0, -1].argmax()) == expected
            ids.append(expected)
    assert len(reply.ids) == 12 and reply.end is End.MAX_NEW_TOKENS


@pytest.fixture
def stream(tiny):
    tokenizer, pieces = AutoTokenizer.from_pretrained(tiny), []
    stream = AnswerStream(tokenizer, [tokenizer.eos_token_id], pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt

    def push(token_id: int, p: float) -> None:
        rest = torch.full((1, len(tokenizer)), (1 - p) / (len(tokenizer) - 1))
        rest[0, token_id] = p
        stream(torch.tensor([[0]]), rest.log())
        stream.put(torch.tensor([token_id]))

    return tokenizer, stream, push, pieces


def test_a_character_of_several_tokens_is_one_piece_with_all_probabilities(stream):
    tokenizer, answer, push, pieces = stream
    ids = tokenizer("1🙂", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5, "an emoji takes four tokens"
    for index, token_id in enumerate(ids):
        push(token_id, 0.5 + index / 10)
        assert len(pieces) == (1 if index < 4 else 2), "a character must not be shown before it is complete"
    push(tokenizer.eos_token_id, 0.25)
    assert [piece.text for piece in pieces] == ["1", "🙂", tokenizer.eos_token]
    assert pieces[1].p == pytest.approx((0.6, 0.7, 0.8, 0.9)) and pieces[2].p == pytest.approx((0.25,))
    assert answer.stopped and answer.ids == ids


def test_a_character_that_the_answer_does_not_complete_is_shown_at_its_end(stream):
    tokenizer, answer, push, pieces = stream
    for token_id in tokenizer("🙂", add_special_tokens=False)["input_ids"][:2]:
        push(token_id, 0.5)
    assert not pieces
    answer.flush()
    assert [(piece.text, len(piece.p)) for piece in pieces] == [("\ufffd", 2)]


def test_the_conversation_stops_where_the_model_has_no_further_positions(tiny):
    chat = chat_with(tiny, limit=30)
    length = len(chat.prompt_ids([{"role": "user", "content": "1 + 1?"}]))
    chat.limit = length + 3
    reply = chat.ask("1 + 1?", lambda piece: None)
    assert len(reply.ids) == 3 and reply.end is End.CONTEXT
    before = list(chat.messages)
    message = (
        rf"the conversation has [\d,]+ tokens with this question, and the model has {length + 3} positions"
    )
    with pytest.raises(UserError, match=message):
        chat.ask("2?", lambda piece: None)
    assert chat.messages == before


def test_ctrl_c_keeps_what_was_generated(chat):
    seen: list[Piece] = []

    def show(piece: Piece) -> None:
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    reply = chat.ask("1 + 1?", show)
    assert reply.end is End.INTERRUPTED and reply.text == "".join(piece.text for piece in seen)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] and chat.unended == 1


def test_a_question_that_ctrl_c_stops_before_any_text_is_not_part_of_the_conversation(chat, monkeypatch):
    def interrupt(**kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.model, "generate", interrupt)
    assert chat.ask("1 + 1?", lambda piece: None).end is End.INTERRUPTED
    assert chat.messages == [] and chat.unended == 0


def test_a_question_that_the_template_refuses_is_an_error(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no questions') }}")
    with pytest.raises(UserError, match="the chat template cannot render this conversation: .*no questions"):
        chat_with(folder).ask("1?", lambda piece: None)


def test_a_question_that_is_not_utf8_is_an_error(chat):
    with pytest.raises(UserError, match="not valid UTF-8"):
        chat.ask("\udcff", lambda piece: None)
