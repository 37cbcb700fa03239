"""The {% generation %} blocks of a chat template, compared with what the model has to generate."""

from dft.data.conversations.faults import BadLine
from dft.data.templates.completion import Completion
from dft.data.templates.rendering import Rendering
from dft.data.templates.template import AdaptedChat

TAGS_DIFFER = (
    "the {% generation %} blocks of the chat template mark other text than the model generates, and are "
    "ignored (--use_generation_tags True uses them)"
)
QUOTED = 60
"""Number of characters of a text that an example quotes."""


class GenerationTags:
    """Reads the blocks around the turns of one conversation.

    Args:
        chat: the conversation.
        are_used: whether the blocks decide what is supervised. Otherwise they are only compared.
    """

    def __init__(self, chat: AdaptedChat, are_used: bool) -> None:
        self.chat = chat
        self.are_used = are_used

    def span(self, index: int, completion: Completion, sequence: Rendering) -> tuple[int, int]:
        """Return the supervised [start, end) range of a turn in `completion.prompt + completion.text`.

        Args:
            index: index of the turn.
            completion: the turn.
            sequence: the sequence of the turn, which receives a remark if the blocks mark other text.

        Raises:
            BadLine: the blocks are used, and they mark nothing of the turn.
        """
        shift = len(completion.prompt) - completion.start
        whole = completion.start, completion.start + len(completion.text)
        text, blocks = self.chat.render_tagged(index + 1)
        marked = [block for block in blocks if block[1] > whole[0]]
        tagged = (min(block[0] for block in marked), max(block[1] for block in marked)) if marked else None
        if self.are_used:
            if tagged is None:
                raise BadLine(
                    f"{self.chat.place(index)}: no {{% generation %}} block of the chat template marks any "
                    "of this turn; leave out --use_generation_tags, or mark it in the template",
                    "no {% generation %} block",
                )
            # The header and what follows the end-of-turn token are never generated.
            start, end = max(whole[0], tagged[0]), min(whole[1], tagged[1])
            return start + shift, max(start, end) + shift
        if tagged is None or text[tagged[0] : tagged[1]].strip() != completion.text.strip():
            shown = "nothing" if tagged is None else _quote(text[tagged[0] : tagged[1]])
            sequence.remarks[TAGS_DIFFER] = (
                f"{self.chat.place(index)}: the blocks mark {shown}, the model generates "
                f"{_quote(completion.text)}"
            )
        return whole[0] + shift, whole[1] + shift


def _quote(text: str) -> str:
    return repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...")
