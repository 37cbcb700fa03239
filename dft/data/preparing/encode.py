"""Encoding of data files into one Arrow file of sequences, in parallel."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO

from tqdm import tqdm

from dft.data.conversations.faults import Fault, Faults
from dft.data.preparing.chunk import EncodedChunk, RecordChunk, encode_chunk
from dft.data.preparing.conversation_counts import ConversationCounts
from dft.data.preparing.encoded_sequences import EncodedSequences, SequenceWriter
from dft.data.preparing.options import PrepareOptions
from dft.data.preparing.rejected_texts import RejectedTexts, rejected_line
from dft.data.reading.data_file import DataFile
from dft.data.reading.reader import read_batches
from dft.data.sandbox.limits import EXCEEDS_TIME
from dft.data.sandbox.workers import WorkerLost, map_in_processes, without_tokenizer_threads
from dft.data.templates.encoder import ChatEncoder
from dft.errors import UserError

SMALL = 1 << 20
"""Total size of the files, in bytes, below which starting a second process takes longer than it saves."""


def encode_sources(
    sources: list[DataFile],
    path: Path,
    encoder: ChatEncoder,
    options: PrepareOptions,
    workers: int,
    faults: Faults,
    rejects: IO[str] | None = None,
) -> tuple[EncodedSequences, list[ConversationCounts]]:
    """Encode all files, in order, into an Arrow stream of sequences.

    Args:
        sources: the files; their index here is their file number.
        path: the Arrow stream to write.
        encoder: renders, tokenizes and masks the conversations.
        options: truncation and supervision of each conversation.
        workers: number of worker processes; 0 to encode in this process.
        faults: collects the unusable records whose text is not kept.
        rejects: receives a JSON line for each unusable record whose text is kept
            (`options.keep_rejected`).

    Returns:
        The sequences, and the counts of each file.

    Raises:
        UserError: the chat template exceeds a limit, the self-check fails, or a worker process was killed.
    """
    counts = [ConversationCounts() for _ in sources]
    writer = SequenceWriter(path)
    texts = RejectedTexts(path.parent, options.keep_rejected)
    chunks = _encoded_chunks(sources, encoder, options, workers, texts)
    # Closing the generator ends its worker processes, even when writing fails.
    with texts, closing(chunks), writer:
        for source, chunk in chunks:
            counts[source] += chunk.counts
            name = sources[source].name
            for record in chunk.rejected:
                if record.text is None or rejects is None:
                    faults.add([Fault(f"{name}:{record.line}", record.kind, record.reason)])
                else:
                    rejects.write(rejected_line(source, record, record.text))
            writer.add(source, replace(chunk, rejected=[]))  # the writer holds many chunks; texts may be long
    return writer.result(), counts


def _encoded_chunks(
    sources: list[DataFile], encoder: ChatEncoder, options: PrepareOptions, workers: int, texts: RejectedTexts
) -> Generator[tuple[int, EncodedChunk], None, None]:
    """Yield (file number, encoded chunk) for all chunks in order, with a progress bar over bytes.

    Raises:
        UserError: the chat template exceeds a limit, or a worker process was killed.
    """
    size = sum(source.size for source in sources)
    tasks = (
        (
            (index, batch.consumed, spans),
            RecordChunk(source.name, number, records, source.rules, batch.unread),
        )
        for index, source in enumerate(sources)
        for number, batch in enumerate(read_batches(source))
        for records, spans in [texts.remove_from(batch.records)]
    )
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None, leave=False)
    workers = min(workers, 1) if size < SMALL else workers
    with bar, without_tokenizer_threads():
        if workers < 1:
            results = ((label, encode_chunk(encoder, options, chunk)) for label, chunk in tasks)
        else:
            encoder.prepare_for_fork()
            results = map_in_processes(tasks, encode_within_limits, (encoder, options), workers)
        try:
            with closing(results):
                for (index, consumed, spans), chunk in results:
                    bar.update(consumed)
                    rejected = [texts.restore(record, spans) for record in chunk.rejected]
                    yield index, replace(chunk, rejected=rejected)
        except WorkerLost as error:
            if error.out_of_time:
                raise error.task.limit_error(EXCEEDS_TIME) from None
            raise UserError(
                "a tokenizing process was killed, most likely for lack of memory; "
                f"lower --preprocessing_num_workers (now {workers})"
            ) from None


def encode_within_limits(encoder: ChatEncoder, options: PrepareOptions, chunk: RecordChunk) -> EncodedChunk:
    """Run `encode_chunk` under the limits of `dft.data.sandbox.limits`, which may terminate this process."""
    encoder.template.compiled.limited = True
    return encode_chunk(encoder, options, chunk)
