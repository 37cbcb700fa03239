"""Compiled chat template, rendered within the limits of the sandbox.

This is the only file in the data pipeline that uses private functions of transformers, whose version is
pinned. `tests/data/templates/test_compiled_template.py` checks their signatures.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _render_with_assistant_indices,
)

from dft.data.conversations.faults import BadLine
from dft.data.sandbox.limits import (
    EXCEEDS_TEXT,
    MAX_RENDERED_CHARACTERS,
    LimitExceeded,
    start_cpu_timer,
    stop_cpu_timer,
)

REFUSED = "the chat template refuses the conversation"
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Exceptions that expressions in a template raise on data that the template was not written for."""


class CompiledTemplate:
    """A Jinja chat template, compiled in the sandbox of transformers.

    Args:
        source: Jinja source of the template.

    Attributes:
        limited: whether a rendering that takes too long ends this process. Set it only in worker processes.
        has_generation_tags: whether the template marks supervised text by {% generation %} blocks.
    """

    def __init__(self, source: str) -> None:
        # Not the public `render_jinja_template`, which first rebuilds all values to protect templates from
        # objects with methods. That takes longer than the rendering, and here all values are plain JSON data,
        # which the sandbox keeps a template from changing.
        self.jinja = _compile_jinja_template(source)
        self._globals = dict(self.jinja.globals)
        self.has_generation_tags = has_generation_tags(source)
        self.limited = False

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the rendered text.

        Raises:
            BadLine: the template raises an error.
            LimitExceeded: the text is too long.
        """
        return self._run(lambda: (self._render(variables), []))[0]

    def _render(self, variables: Mapping[str, Any]) -> str:
        """Like `jinja2.Template.render`, which copies the globals from a chain of mappings at each call."""
        context = self.jinja.new_context({**self._globals, **variables}, shared=True)
        return "".join(self.jinja.root_render_func(context))

    def render_tagged(self, variables: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and the [start, end) character ranges of its {% generation %} blocks.

        Raises:
            BadLine: the template raises an error.
            LimitExceeded: the text is too long.
        """
        return self._run(lambda: _render_with_assistant_indices(self.jinja, **variables))

    def _run(
        self, render: Callable[[], tuple[str, list[tuple[int, int]]]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Run a rendering within the limits and convert errors of the template to `BadLine`."""
        if self.limited:
            start_cpu_timer()
        try:
            text, spans = render()
        except (jinja2.TemplateError, *FAILURES) as error:
            raise _bad_line(error) from None
        finally:
            if self.limited:
                stop_cpu_timer()
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise LimitExceeded(EXCEEDS_TEXT)
        return text, spans


def alias_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under every key that templates read."""
    (aliased,) = _alias_reasoning_fields([message])
    return aliased


def has_generation_tags(source: str) -> bool:
    """Return whether the code of a template, not a comment or a string, has a {% generation %} block."""
    tokens = [(kind, value) for _, kind, value in jinja2.Environment().lex(source) if kind != "whitespace"]
    pairs = zip(tokens, tokens[1:], strict=False)
    return any(first[0] == "block_begin" and second == ("name", "generation") for first, second in pairs)


def _bad_line(error: Exception) -> BadLine:
    """Convert an error that a template raised on a conversation."""
    if isinstance(error, jinja2.TemplateError):
        return BadLine(f"{REFUSED}: {' '.join(str(error).split())}", REFUSED)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return BadLine(f"the chat template fails on the conversation: {reason}", REFUSED)
