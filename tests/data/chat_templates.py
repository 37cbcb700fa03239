"""Small templates, each with one habit of a model family, and the way tests state what is supervised."""

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dft.data.chat import ChatEncoder, Example

CHATML_LINES = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Tags around the turn and its end token.
TAGGED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Tags around header and newline too.
TAGGED_WIDE = """{% for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Tags spelled out in a comment only.
TAGGED_IN_A_COMMENT = "{# no {% generation %} here #}" + CHATML_LINES

# Reasoning stays only behind the last question (Qwen3).
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

# End token after every turn, eos behind the conversation (Phi-3).
EOS_BEHIND_ALL = """{% for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

# No end token: the next header ends a turn (GLM-4).
NEXT_HEADER_ENDS = """{{ '[gMASK]<sop>' }}{% for m in messages %}
{%- set role = 'observation' if m.role == 'tool' else m.role %}
{{- '<|' + role + '|>\\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Channels, and another end token for the last turn (gpt-oss).
CHANNELS = """{% for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}{% for call in m.tool_calls %}
{{- '<|start|>assistant to=' + call.function.name + '<|channel|>commentary<|message|>' }}
{{- call.function.arguments | tojson + '<|call|>' }}{% endfor %}
{%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""

# BOS, system merged into the first question, renamed role, trimmed content, strict order (Gemma).
MERGES_SYSTEM = """{{ bos_token }}{% set first = '' %}{% set turns = messages %}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}{% endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

# No generation prompt, eos behind each answer (Mistral).
BRACKETS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""

# A system turn nobody asked for (Qwen2.5).
DEFAULT_SYSTEM = (
    """{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nBe good.<|im_end|>\\n' }}{% endif %}"""
    + CHATML_LINES
)

# The question looks different once it is answered.
REWRITES_QUESTION = """{% for m in messages %}
{%- if m.role == 'user' and loop.last %}{{ '<|user|>now: ' + m.content }}
{%- elif m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- else %}{{ '<|assistant|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

NO_END = """{% for m in messages %}{{ m.role + ':\\n' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"""


class Taught(str):
    """A piece of text that is supervised."""


def expected(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of pieces tokenized one by one, with -100 for all that are not `Taught`.

    Only right where no token spans two pieces.
    """
    ids, labels = [], []
    for piece in pieces:
        tokens = tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        ids += tokens
        labels += tokens if isinstance(piece, Taught) else [-100] * len(tokens)
    return ids, [-100, *labels[1:]]


def with_template(tokenizer_json: str, template: str | None, **options: str) -> PreTrainedTokenizerFast:
    """A tokenizer of its own with that template; `options` are special tokens by name."""
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), **options)
    made.chat_template = template
    return made


def ids_of(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


def encode(encoder: ChatEncoder, *messages: tuple[str, str]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of every sequence of a conversation given as (role, content) pairs."""
    return [plain(example) for example in examples_of(encoder, *messages)]


def examples_of(encoder: ChatEncoder, *messages: tuple[str, str]) -> list[Example]:
    (examples,) = encoder.encode([[{"role": role, "content": content} for role, content in messages]])
    assert isinstance(examples, list), examples
    return examples


def plain(example: Example) -> tuple[list[int], list[int]]:
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    return example.input_ids.tolist(), example.labels.tolist()
