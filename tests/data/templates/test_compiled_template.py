"""Compiled chat templates, and the private functions of transformers that they use."""

import inspect

import pytest
from transformers.utils import chat_template_utils

from dft.data.templates.compiled_template import alias_reasoning, has_generation_tags
from tests.data.templates.chat_templates import TAGGED, TAGGED_IN_A_COMMENT


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_alias_reasoning_fields", ["chat"]),
        ("_compile_jinja_template", ["chat_template"]),
        (
            "_render_with_assistant_indices",
            [
                "compiled_template", "messages", "tools", "documents", "add_generation_prompt",
                "template_kwargs",
            ],
        ),
    ],
)  # fmt: skip
def test_private_functions_of_transformers_have_the_expected_parameters(name, parameters):
    function = getattr(chat_template_utils, name)
    assert [*inspect.signature(function).parameters] == parameters, (
        f"transformers changed {name}, which dft/data/templates/compiled_template.py calls"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_stored_under_the_keys_that_templates_read(key):
    message = alias_reasoning({"role": "assistant", "content": "a", key: "hm"})
    assert message["reasoning_content"] == message["thinking"] == "hm"


def test_generation_tags_count_only_in_code():
    assert has_generation_tags(TAGGED)
    assert has_generation_tags("{%-  generation -%}x{%- endgeneration -%}")
    assert not has_generation_tags(TAGGED_IN_A_COMMENT)
    assert not has_generation_tags("{{ '{% generation %}' }}")
