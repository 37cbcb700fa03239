"""Small chat templates that behave like those of model families, and helpers to state what is supervised."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder, Example

CHATML_LINES = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# {% generation %} around the turn and its end token.
TAGGED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# {% generation %} around header and newline as well.
TAGGED_WIDE = """{% for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# {% generation %} in a comment only.
TAGGED_IN_A_COMMENT = "{# no {% generation %} here #}" + CHATML_LINES

# Keeps reasoning only after the last question (Qwen3).
FORGETS_REASONING = """{% set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set answer = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- if loop.index0 > last.user %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ answer }}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The prompt opens a think tag that a turn without reasoning does not have (R1).
OPENS_THINKING = """{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}
{%- else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""

# End token after every turn, eos token after the conversation (Phi-3).
EOS_BEHIND_ALL = """{% for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# No end token: the next header ends a turn (GLM-4).
NEXT_HEADER_ENDS = """{{ '[gMASK]<sop>' }}{% for m in messages %}
{%- set role = 'observation' if m.role == 'tool' else m.role %}
{{- '<|' + role + '|>\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name + '()' }}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Channels, and a different end token for the last turn (gpt-oss).
CHANNELS = """{% for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{% for call in m.tool_calls %}
{{- '<|start|>assistant to=' + call.function.name + '<|channel|>commentary<|message|>' }}
{{- call.function.arguments | tojson + '<|call|>' }}{% endfor %}
{%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# BOS token, system prompt merged into the first question, renamed role, trimmed content, strict order
# (Gemma).
MERGES_SYSTEM = """{{ bos_token }}{% set first = '' %}{% set turns = messages %}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# No generation prompt, eos token after each answer (Mistral).
BRACKETS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""

# Adds a default system turn (Qwen2.5).
DEFAULT_SYSTEM = (
    """{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}"""
    + CHATML_LINES
)

# Renders a question differently once it is answered.
REWRITES_QUESTION = """{% for m in messages %}
{%- if m.role == 'user' and loop.last %}{{ '<|user|>now: ' + m.content }}
{%- elif m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- else %}{{ '<|assistant|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

NO_END = """{% for m in messages %}{{ m.role + ':\\n' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"""


# ChatML with tool calls and results as in Qwen2.5 and Hermes: tools in the system turn, which is always
# present, calls in tags, consecutive results in one user turn.
HERMES = """{% set system = messages[0].content if messages[0].role == 'system' else 'Be good.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}{{ '\\n<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools>' }}{% endif %}{{ '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}
{%- if m.content %}{{ '\\n' + m.content }}{% endif %}
{%- for call in m.tool_calls %}{% set call = call.function %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Reasoning in its own field, kept only after the last question; an empty think block in the last turn, and
# in the prompt if thinking is off (Qwen3).
THINKS = """{% set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > last.user and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content.lstrip('\\n') if m.role == 'assistant' else m.content }}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

# Headers with the date, two end tokens, tool calls as {"name", "parameters"} (Llama 3).
LLAMA = """{{ bos_token }}{% set date = date_string or strftime_now('%d %b %Y') %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date }}
{{- '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in rest %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and tools and m.role == 'user' %}
{%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}{% endif %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{ m.content | tojson + '<|eot_id|>' }}
{%- else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Tool calls with ids of nine characters, tools before the last question, strict order (Mistral v3 to v7).
MISTRAL = """{{ bos_token }}{% set rest = messages %}
{%- if messages[0].role == 'system' %}{{ '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
{%- set rest = messages[1:] %}{% endif %}
{%- set questions = namespace(count=0) %}
{%- for m in rest if m.role == 'user' %}{% set questions.count = questions.count + 1 %}{% endfor %}
{%- set asked = namespace(count=0) %}
{%- for m in rest %}
{%- if m.role == 'user' %}{% set asked.count = asked.count + 1 %}
{%- if tools and asked.count == questions.count %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls %}{{ '[TOOL_CALLS][' }}
{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception('ids have length 9!') }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user, assistant and tool roles are supported!') }}
{%- endif %}{% endfor %}"""

# Arguments are concatenated as a string; tool calls only if the content is null (DeepSeek).
STRING_ARGUMENTS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- elif m.role == 'assistant' and m.content is none %}{% for call in m.tool_calls %}
{{- '<|assistant|>' if loop.first else '\\n' }}
{{- call.type + ' ' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}{% endfor %}
{{- eos_token }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + eos_token }}
{%- elif m.role == 'tool' %}{{ '<|observation|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# Arguments written by name (Qwen3-Coder, GLM-4.5).
XML_ARGUMENTS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '<arg_key>' + key + '</arg_key><arg_value>' + (value if value is string else value | tojson) }}
{{- '</arg_value>' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The prompt opens a think tag; the last turn keeps its reasoning, earlier turns lose it (R1 and derivatives).
OPENS_AND_KEEPS_THINKING = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<|assistant|>' + (m.content if loop.last else m.content.split('</think>')[-1]) + '<|end|>' }}
{%- else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""

# Header and content in one line, separated by a token (Phi-4).
SEPARATOR = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

# Command-R.
TURN_TOKENS = """{{ bos_token }}{% for m in messages %}
{%- set name = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM', 'tool': 'SYSTEM'}[m.role] %}
{{- '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' + m.content | trim }}
{{- '<|END_OF_TURN_TOKEN|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

# eos token after answers only, a newline after all answers but the last (OLMo, Tulu).
EOS_BEHIND_ANSWERS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>\\n' + m.content + eos_token }}
{%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# No end token, a newline and a think block before answers, /nothink after questions (GLM-4.5).
NOTHINK = """{{ '[gMASK]<sop>' }}{% set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\\n' + m.content }}
{%- if enable_thinking is defined and not enable_thinking and not m.content.endswith('/nothink') %}
{{- '/nothink' }}{% endif %}
{%- elif m.role == 'assistant' %}
{%- if loop.index0 > last.user and m.reasoning_content %}
{{- '<|assistant|>\\n<think>' + m.reasoning_content.strip() + '</think>' }}
{%- else %}{{ '<|assistant|>\\n<think></think>' }}{% endif %}
{%- if m.content.strip() %}{{ '\\n' + m.content.strip() }}{% endif %}
{%- else %}{{ '<|observation|>\\n' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '\\n<think></think>' }}{% endif %}
{%- endif %}"""

# Channels with reasoning (gpt-oss).
ANALYSIS = """{% for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking and (loop.last or m.tool_calls) %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{%- if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# Content as a list of parts (vision families).
PARTS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# The prompt ends in a space that belongs to the first word of the answer (Vicuna).
COLON_SPACE = """{% for m in messages %}
{%- if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}
{%- else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""

# Headers in plain words, two newlines before the answer (Alpaca).
BLANK_LINE = """{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '### Response:\\n\\n' + m.content + eos_token }}
{%- else %}{{ '### Instruction:\\n\\n' + m.content + '\\n\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n\\n' }}{% endif %}"""


class Family(NamedTuple):
    """A template with its stop tokens and its special tokens by name."""

    template: str
    stops: tuple[str, ...]
    names: dict[str, str]


IM = {"eos_token": "<|im_end|>"}
EOT = {"eos_token": "<|endoftext|>"}
GLM = ("<|user|>", "<|observation|>")
S = {"bos_token": "<s>", "eos_token": "</s>"}
FAMILIES = {
    "chatml": Family(CHATML_LINES, (), IM),
    "tagged": Family(TAGGED, (), IM),
    "tagged_wide": Family(TAGGED_WIDE, (), IM),
    "tagged_in_a_comment": Family(TAGGED_IN_A_COMMENT, (), IM),
    "forgets_reasoning": Family(FORGETS_REASONING, (), IM),
    "opens_thinking": Family(OPENS_THINKING, ("<|end|>",), EOT),
    "opens_and_keeps_thinking": Family(OPENS_AND_KEEPS_THINKING, ("<|end|>",), {**EOT, "bos_token": "<bos>"}),
    "eos_behind_all": Family(EOS_BEHIND_ALL, ("<|end|>",), EOT),
    "next_header_ends": Family(NEXT_HEADER_ENDS, GLM, EOT),
    "nothink": Family(NOTHINK, GLM, EOT),
    "channels": Family(CHANNELS, ("<|return|>", "<|call|>"), {"eos_token": "<|return|>"}),
    "analysis": Family(ANALYSIS, ("<|return|>", "<|call|>"), {"eos_token": "<|return|>"}),
    "merges_system": Family(MERGES_SYSTEM, (), {"bos_token": "<bos>", "eos_token": "<end_of_turn>"}),
    "brackets": Family(BRACKETS, (), S),
    "mistral": Family(MISTRAL, (), S),
    "string_arguments": Family(STRING_ARGUMENTS, (), S),
    "default_system": Family(DEFAULT_SYSTEM, (), IM),
    "hermes": Family(HERMES, (), IM),
    "thinks": Family(THINKS, (), IM),
    "llama": Family(LLAMA, ("<|eot_id|>",), {**EOT, "bos_token": "<bos>"}),
    "xml_arguments": Family(XML_ARGUMENTS, (), IM),
    "separator": Family(SEPARATOR, (), IM),
    "turn_tokens": Family(TURN_TOKENS, (), {"bos_token": "<bos>", "eos_token": "<|END_OF_TURN_TOKEN|>"}),
    "eos_behind_answers": Family(EOS_BEHIND_ANSWERS, (), {**EOT, "bos_token": "<bos>"}),
    "rewrites_question": Family(REWRITES_QUESTION, ("<|end|>",), EOT),
    "no_end": Family(NO_END, (), EOT),
    "parts": Family(PARTS, (), IM),
    "colon_space": Family(COLON_SPACE, (), S),
    "blank_line": Family(BLANK_LINE, (), S),
}


class Supervised(str):
    """A piece of text that is supervised."""


def expected(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> tuple[list[int], list[int]]:
    """Return input_ids and labels of pieces tokenized one by one, with -100 except in `Supervised` pieces.

    Only correct if no token spans two pieces.
    """
    ids, labels = [], []
    for piece in pieces:
        tokens = tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        ids += tokens
        labels += tokens if isinstance(piece, Supervised) else [-100] * len(tokens)
    return ids, [-100, *labels[1:]]


def with_template(tokenizer_json: str, template: str | None, **options: str) -> PreTrainedTokenizerFast:
    """Return a new tokenizer with a template; `options` are special tokens by name."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), **options)
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


def encoder_of(tokenizer_json: str, template: str, *stops: str, **options: str) -> ChatEncoder:
    tokenizer = with_template(tokenizer_json, template, **options)
    return ChatEncoder(tokenizer, ids_of(tokenizer, *stops))


def encoder_for(tokenizer_json: str, family: str, variables: dict[str, Any] | None = None) -> ChatEncoder:
    """Return the encoder of one of `FAMILIES`, adding its tokens to the vocabulary."""
    template, stops, names = FAMILIES[family]
    backend = Tokenizer.from_str(tokenizer_json)
    vocabulary = backend.get_vocab()
    backend.add_special_tokens([token for token in (*stops, *names.values()) if token not in vocabulary])
    tokenizer = with_template(backend.to_str(), template, **names)
    return ChatEncoder(tokenizer, ids_of(tokenizer, *stops), variables)


def talk(
    messages: Sequence[dict[str, Any]], supervised: Sequence[bool] | None = None, **fields: Any
) -> Conversation:
    """Return a conversation; by default all assistant turns are supervised."""
    if supervised is None:
        supervised = [message["role"] == "assistant" for message in messages]
    return Conversation(list(messages), tuple(supervised), **fields)


def read(messages: Sequence[dict[str, Any]], **columns: Any) -> Conversation:
    """Return the conversation of a row of any supported form."""
    return parse_conversation(json.dumps({"messages": messages, **columns}).encode())


def turn(role: str, content: str = "", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(name: str, arguments: dict[str, Any], **fields: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def encode(encoder: ChatEncoder, *messages: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    """Return input_ids and labels of every sequence of a conversation, given as (role, content) pairs."""
    return [plain(example) for example in examples_of(encoder, *messages)]


def examples_of(encoder: ChatEncoder, *messages: tuple[str, str]) -> list[Example]:
    return examples_in(encoder, talk([turn(role, content) for role, content in messages]))


def examples_in(encoder: ChatEncoder, conversation: Conversation) -> list[Example]:
    (examples,) = encoder.encode([conversation])
    assert isinstance(examples, list), examples
    return examples


def sequences(encoder: ChatEncoder, conversation: Conversation) -> list[tuple[list[int], list[int]]]:
    """Return input_ids and labels of every sequence of a conversation."""
    return [plain(example) for example in examples_in(encoder, conversation)]


def error_of(encoder: ChatEncoder, conversation: Conversation) -> BadLine:
    (error,) = encoder.encode([conversation])
    assert isinstance(error, BadLine), error
    return error


def plain(example: Example) -> tuple[list[int], list[int]]:
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    # Every run of supervised tokens ends at the last token of a turn.
    assert len(example.ends) == len(example.endings) and (np.diff(example.ends) > 0).all()
    supervised = example.labels != -100
    assert supervised[example.ends[example.ends > 0]].all()
    assert set(np.flatnonzero(supervised & ~np.append(supervised[1:], False))) <= set(example.ends.tolist())
    return example.input_ids.tolist(), example.labels.tolist()
