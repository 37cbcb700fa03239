"""Comparisons of rendered texts cut no special token and no tag in two."""

import random

import pytest

from dft.data.templates.markers import Markers, common_prefix_length, compile_any


def test_pattern_matches_the_longest_text():
    pattern = compile_any(["<a", "<ab>", "<a|b>", "[X]", "<a.c>"])
    assert [match.group() for match in pattern.finditer("<ab><a|b><abc[X]<axc><a.c>")] == [
        "<ab>", "<a|b>", "<a", "[X]", "<a", "<a.c>",
    ]  # fmt: skip
    assert compile_any([]).search("anything") is None


def test_pattern_of_many_texts_equals_an_alternation():
    generator = random.Random(0)
    texts = {"".join(generator.choices("<a|b>.", k=generator.randint(1, 6))) for _ in range(200)}
    pattern = compile_any(texts)
    for _ in range(200):
        text = "".join(generator.choices("<a|b>.x", k=12))
        at = [match.span() for match in pattern.finditer(text)]
        for start, end in at:
            longest = max((item for item in texts if text.startswith(item, start)), key=len)
            assert text[start:end] == longest


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (("a<think>b", "a</think>b"), "a"),
        (("a<think>b", "a<think>c"), "a<think>"),
        (("x<|im_end|>\n<|im_start|>user", "x<|im_end|>\n<|endoftext|>"), "x<|im_end|>\n"),
        (
            ("x<|im_end|>\n<|im_start|>user", "x<|im_end|>\n<|im_start|>assistant"),
            "x<|im_end|>\n<|im_start|>",
        ),
        (("same", "same"), "same"),
        (("", "a"), ""),
        (("[INST] a", "[INST]b", "[INSTANT]"), ""),
    ],
)
def test_shared_prefix_cuts_no_marker(texts, shared):
    markers = Markers(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<think> </think> [INST] {{ '[INSTANT]' }}"
    )
    assert texts[0][: markers.shared_prefix(*texts)] == shared


def test_common_prefix_length_of_long_texts():
    text = "ab" * 50_000
    assert common_prefix_length((text, text)) == 100_000
    assert common_prefix_length((text, text[:77_777] + "x", text + "y")) == 77_777


@pytest.mark.parametrize(
    ("text", "opens", "closes"),
    [
        ("<think>\n", True, False),
        ("<think>\n\n</think>\n\n", False, True),
        ("<|channel>thought\n", True, False),
        ("<|channel>thought\n<channel|>", False, True),
        ("[THINK]", True, False),
        ("[/THINK]", False, True),
        ("no tag", False, False),
    ],
)
def test_last_tag_of_a_prompt_opens_or_closes_a_block(text, opens, closes):
    markers = Markers(["<|channel>", "<channel|>"], "<think></think>[THINK][/THINK]")
    assert (markers.ends_open(text), markers.ends_closed(text)) == (opens, closes)


def test_tokens_of_white_space_are_no_markers():
    assert not Markers(["\n\n", "  "], "").occur_in("a\n\nb  c")
