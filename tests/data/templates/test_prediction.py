"""Turns of long conversations are predicted, with the same result as if all of them were rendered."""

import pytest

from dft.data.templates import prediction
from tests.data.templates.chat_templates import CHATML_LINES, FORGETS_REASONING, encoder_of, plain, talk, turn

END = "<|im_end|>"
# Renders only the last 40 messages.
WINDOW = CHATML_LINES.replace("in messages", "in messages[-40:]")
# Renders answers differently after the 60th message.
CHANGES = CHATML_LINES.replace("m.content +", "m.content + ('!' if loop.index > 60 else '') +")


def long_conversation(turns: int):
    messages = []
    for number in range(turns // 2):
        messages.append(turn("user", f"question {number} " + "?" * (number % 5 + 1)))
        messages.append(turn("assistant", f"answer {number} " * (number % 3 + 1) + "."))
    return talk(messages)


@pytest.fixture
def count_renderings(monkeypatch):
    """Return a function that counts the renderings of an encoder's template."""

    def install(encoder) -> list[int]:
        count = [0]
        render = encoder.template.compiled.render

        def counted(variables):
            count[0] += 1
            return render(variables)

        monkeypatch.setattr(encoder.template.compiled, "render", counted)
        return count

    return install


def test_conversation_of_1000_turns_needs_few_renderings(tokenizer_json, count_renderings):
    encoder = encoder_of(tokenizer_json, CHATML_LINES, eos_token=END)
    count = count_renderings(encoder)
    ((example,),) = encoder.encode([long_conversation(1000)])
    assert len(example.ends) == 500
    assert count[0] < 250


@pytest.mark.parametrize("template", [CHATML_LINES, FORGETS_REASONING, WINDOW, CHANGES])
@pytest.mark.parametrize("thinks_at", [None, 101])
def test_predicted_turns_equal_rendered_turns(tokenizer_json, monkeypatch, template, thinks_at):
    encoder = encoder_of(tokenizer_json, template, eos_token=END)
    conversation = long_conversation(240)
    if thinks_at is not None:
        conversation.messages[thinks_at]["content"] = "<think>\nhm\n</think>\n\nyes"
    predicted = encoder.encode([conversation])
    monkeypatch.setattr(prediction, "ALWAYS_VERIFIED", 1000)
    rendered = encoder_of(tokenizer_json, template, eos_token=END).encode([conversation])
    if isinstance(rendered[0], list):
        assert [plain(example) for example in predicted[0]] == [plain(example) for example in rendered[0]]
    else:
        assert str(predicted[0]) == str(rendered[0])


def test_empty_result_of_a_tool_in_a_long_conversation(tokenizer_json):
    conversation = long_conversation(300)
    messages = [*conversation.messages]
    messages[101:101] = [turn("assistant", "calling"), turn("tool", "")]
    ((example,),) = encoder_of(tokenizer_json, CHATML_LINES, eos_token=END).encode([talk(messages)])
    assert len(example.ends) == 151
