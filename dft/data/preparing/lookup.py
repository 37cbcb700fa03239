"""The conversations of single lines of data files."""

from collections.abc import Collection, Sequence

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import RowLeftOut
from dft.data.reading.data_file import DataFile
from dft.data.reading.reader import read_batches
from dft.data.reading.records import BOM


def read_conversations(
    sources: Sequence[DataFile], origins: Collection[tuple[int, int]]
) -> dict[tuple[int, int], Conversation]:
    """Return the conversations at some lines.

    Args:
        sources: the files.
        origins: (index of the file, line) of each conversation.
    """
    conversations: dict[tuple[int, int], Conversation] = {}
    for index, source in enumerate(sources):
        lines = {line for file, line in origins if file == index}
        for batch in read_batches(source):
            if not lines:
                break
            for record in batch.records:
                if record.line in lines and record.flaw is None:
                    text = record.text.removeprefix(BOM) if record.line == 1 else record.text
                    try:
                        conversations[index, record.line] = parse_conversation(text, source.rules)
                    except (BadLine, RowLeftOut):
                        continue  # an array may have several elements on a line, one of them unusable
                    lines.discard(record.line)
    return conversations
