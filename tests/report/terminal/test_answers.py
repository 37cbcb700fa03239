"""How a chat prints tokens with their probabilities."""

import io

import pytest

from dft.evaluation.chat import Piece
from dft.report.terminal.answers import Style, format_piece, legend, probability_style


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (Piece(" four", (0.997,)), " four[0.99]"),
        (Piece("x", (1.0,)), "x[1.00]"),
        (Piece("x", (0.29,)), "x[0.29]"),
        (Piece("x", (0.0009,)), "x[0.00]"),
        (Piece("🙂", (0.5, 0.25, 0.999)), "🙂[0.50 0.25 0.99]"),
        (Piece(".\n\n", (0.5,)), ".[0.50]\n\n"),
        (Piece("<|im_end|>", (0.75,), is_stop=True), "<|im_end|>[0.75]"),
    ],
)
def test_numbers_follow_their_token_and_are_rounded_down(piece, text):
    assert format_piece(piece, Style.NUMBERS) == text


def test_the_least_probable_token_of_a_character_colors_it():
    improbable, probable = "\x1b[30;48;5;209m{}\x1b[0m", "{}"
    for p, form in (((0.99, 0.05), improbable), ((0.95, 0.9), probable)):
        assert format_piece(Piece("🙂", p), Style.COLORS) == form.format("🙂")


def test_a_colored_line_break_does_not_color_the_line_after_it():
    assert format_piece(Piece("a\n\n", (0.5,)), Style.COLORS) == "\x1b[30;48;5;229ma↵↵\x1b[0m\n\n"


def test_without_probabilities_an_answer_is_its_text():
    assert format_piece(Piece(" four", (0.1,)), Style.HIDDEN) == " four"
    assert format_piece(Piece("<|im_end|>", (0.1,), is_stop=True), Style.HIDDEN) == ""


@pytest.mark.parametrize("style", Style)
def test_escape_sequences_of_a_model_are_not_sent_to_the_terminal(style):
    text = format_piece(Piece("a\x1b[2J\u202eb\r\t\n", (1.0,)), style)
    assert text.startswith(r"a\x1b[2J\u202eb\r" + "\t")


@pytest.mark.parametrize(
    ("stream", "environment", "style"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, Style.COLORS),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, Style.NUMBERS),
        (Terminal(), {"TERM": "dumb"}, Style.NUMBERS),
        (Terminal(), {}, Style.NUMBERS),
        (io.StringIO(), {"TERM": "xterm-256color"}, Style.NUMBERS),
    ],
)
def test_colors_are_for_terminals_that_have_them(stream, environment, style):
    assert probability_style(stream, environment) is style


def test_the_legend_explains_every_color():
    assert legend(Style.COLORS).count("\x1b[30;48;5;") == 4
    assert "before temperature and top_p" in legend(Style.NUMBERS) and "\x1b" not in legend(Style.NUMBERS)
