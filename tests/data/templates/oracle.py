"""A judge of training sequences that shares no code with `dft`.

It is written from the definition: the context of assistant turn i is what `apply_chat_template(messages[:i],
add_generation_prompt=True)` gives the model at inference, and what is supervised behind it is the turn as
`apply_chat_template(messages[:i + 1])` writes it, from the end of the header to its end-of-turn token. Where
header and turn end is found by rendering placeholders.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tests.data.templates.oracle_chat import (
    FORMS,
    Form,
    Renderer,
    Turn,
    Unrenderable,
    atoms_pattern,
    holds,
    is_visible,
    read_row,
    read_tools,
    strings_in,
)

IGNORED = -100
MARK = "Zq0Mark0qZ"
ANSWER = "Zq1Answer1qZ"
THINK = re.compile(r"(?s)(?P<before>.*?)(?:<think>)?(?P<thought>(?:(?!<think>).)*?)</think>(?P<after>.*)")

# Faults of sequences.
CONTEXT = "wrong context"
CUT = "special token cut"
HEADER = "header supervised"
FOLLOWING = "text after the end of the turn supervised"
NO_END_TOKEN = "end-of-turn token not supervised"
OTHER_TEXT = "supervised text is not the turn"
OTHER_IDS = "supervised ids are not those of the text"
MISSING = "turn not supervised"
TWICE = "turn supervised twice"
NOT_TRAINED = "turn with train false supervised"
LABELS = "labels are not the ids"
# Obstacles: reasons why no exact sequence exists, so that the conversation has to be refused.
UNRENDERABLE = "the template raises an error"
LOST_CONTEXT = "text of an earlier turn or tools not in the context"
LOST_IN_TURN = "part of the turn not rendered"
ARGUMENTS = "arguments of a call written as Python or as JSON inside JSON"
NO_END = "the turn has no end-of-turn token"
CONTINUES = "the turn continues behind an end-of-turn token"
CLOSED = "the prompt closes the thinking of a turn with reasoning"
UNCLEAR = "rendering depends on more than the text of the turn"
# Doubts: reasons why a conversation may be refused, although it has an exact sequence.
NO_STOP = "the turn ends with a token at which generation does not stop"
LOST_LATER = "text of an earlier turn not in the context of a later answer"


class Fault(NamedTuple):
    """A fault of the sequences, or an obstacle of the conversation.

    Attributes:
        kind: one of the constants above.
        turn: index of the message, or None.
        detail: what differs.
    """

    kind: str
    turn: int | None = None
    detail: str = ""


class Expected(NamedTuple):
    """Expected prompt and completion of an assistant turn.

    Attributes:
        contexts: ids before the supervised ones, any of which is right.
        text: the prompt as text.
        completions: texts any of which may be supervised.
        unshared: the end of the prompt that the rendering of the turn does not have.
    """

    contexts: list[list[int]]
    text: str
    completions: list[str]
    unshared: str


@dataclass(frozen=True)
class Layout:
    """The rendering of a turn behind the text of an earlier message, with and without placeholders.

    Attributes:
        prompt: the end of the generation prompt.
        real: the rendering of the turn.
        masked: the same with placeholders for its texts.
        leaves: the placeholders.
    """

    prompt: str
    real: str
    masked: str
    leaves: tuple[str, ...]

    @property
    def first(self) -> int:
        return min(self.masked.find(leaf) for leaf in self.leaves)

    @property
    def last(self) -> int:
        return max(self.masked.rfind(leaf) + len(leaf) for leaf in self.leaves)

    @property
    def decoration(self) -> str:
        """Text of the template before the first text of the turn, header included."""
        return self.masked[: self.first]

    @property
    def tail(self) -> str:
        """Text of the template after the last text of the turn."""
        return self.masked[self.last :]


def is_same_shape(layout: Layout) -> bool:
    return layout.real.startswith(layout.decoration) and layout.real.endswith(layout.tail)


def pieces_of(content: str) -> list[str]:
    """Return the parts of a content that a template may render apart: before, in and after thinking."""
    match = THINK.fullmatch(content)
    return [match["before"], match["thought"], match["after"]] if match else [content]


def map_pieces(content: str, change: Callable[[str], str]) -> str:
    """Return a content with each of its parts changed."""
    match = THINK.fullmatch(content)
    if not match:
        return change(content)
    opening = content[match.end("before") : match.start("thought")]
    before, thought, after = (change(match[name]) for name in ("before", "thought", "after"))
    return f"{before}{opening}{thought}</think>{after}"


def masked_turn(turn: Turn) -> tuple[Turn, tuple[str, ...]]:
    """Return a turn with a placeholder for each of its texts, and the placeholders."""
    leaves: list[str] = []

    def leaf(text: str) -> str:
        if not text.strip():
            return text
        leaves.append(f"Zq{len(leaves) + 2}Leaf{len(leaves) + 2}qZ")
        return text.replace(text.strip(), leaves[-1])  # white space around it can be part of a header

    def mask(value: Any) -> Any:
        if isinstance(value, str):
            return leaf(value)
        if isinstance(value, dict):
            return {key: mask(inner) for key, inner in value.items()}
        return [mask(inner) for inner in value] if isinstance(value, list) else value

    content = map_pieces(turn.content, leaf)
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "name": leaf(call["function"]["name"]),
                "arguments": mask(call["function"]["arguments"]),
            },
        }
        for call in turn.calls
    ]
    masked = replace(turn, content=content, reasoning=leaf(turn.reasoning), calls=tuple(calls))
    return masked, tuple(leaves)


def texts_of(turn: Turn) -> Iterator[str]:
    """Yield every text that the rendering of a turn has to hold."""
    yield from pieces_of(turn.content)
    yield turn.reasoning
    for call in turn.calls:
        yield call["function"]["name"]
        yield from strings_in(call["function"]["arguments"])


class Oracle:
    """Judges the training sequences of conversations under one tokenizer.

    Args:
        tokenizer: a tokenizer with a chat template.
        stop_token_ids: ids at which generation stops, besides the eos token.
        variables: variables of the template; those of a row take precedence.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Iterable[int] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self.atoms = atoms_pattern(tokenizer)
        self.added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        visible = [content for content in self.added.values() if is_visible(content)]
        longest_first = sorted(visible, key=len, reverse=True)
        self.added_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        stop_ids = {tokenizer.eos_token_id, *stop_token_ids}
        self.stops = {self.added[index] for index in stop_ids if index in self.added}

    def judge(
        self, row: Mapping[str, Any], sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Fault]:
        """Return the faults of the training sequences of a row; an empty list if they are exact.

        Args:
            row: `messages`, and optionally `tools` and `chat_template_kwargs`.
            sequences: input ids and labels, with -100 where a token is not supervised.
        """
        verdicts = []
        for chat in self._chats(row):
            faults = chat.obstacles()
            has_obstacle = bool(faults)
            if not faults:
                faults = chat.faults(sequences)
                if not faults:
                    return []
            verdicts.append((has_obstacle, severity(faults), faults))
        return min(verdicts, key=lambda verdict: verdict[:2])[2]

    def obstacles(self, row: Mapping[str, Any], doubts: bool = False) -> list[Fault]:
        """Return why the row has to be refused; an empty list if it has an exact sequence.

        Args:
            row: the row.
            doubts: whether to return also why it may be refused.
        """
        fewest: list[Fault] = []
        for chat in self._chats(row):
            obstacles = chat.obstacles()
            if not obstacles:
                return chat.doubts() if doubts else []
            fewest = min(fewest or obstacles, obstacles, key=severity)
        return fewest

    def _chats(self, row: Mapping[str, Any]) -> Iterator["Chat"]:
        """Yield the row in each form of messages, until one has no obstacle.

        More than one form can be right, so forms with the same obstacles are all yielded.
        """
        turns = read_row(row)
        has_calls = any(turn.calls for turn in turns)
        variables = {**self.variables, **(row.get("chat_template_kwargs") or {})}
        for form in FORMS:
            if has_calls or form == Form(form.in_parts):
                yield Chat(self, turns, Renderer(self.tokenizer, read_tools(row), variables, form))

    def split(self, text: str) -> list[str]:
        return self.atoms.findall(text)

    def align(self, prompt: str, decoration: str) -> tuple[int, int, str]:
        """Return where the text that both share last ends in each, between whole tokens and tags.

        It is the text around the last token or tag of the decoration that the prompt has as well, or
        without such a token it is the longest text. The text itself is returned as well.
        """
        if decoration.startswith(prompt):
            return len(prompt), len(prompt), prompt
        left, right = self.split(prompt), self.split(decoration)
        same = len(commonprefix([left, right]))
        for column, atom in reversed([*enumerate(right)]):
            # What follows an equal beginning is not compared with it, which holds tokens of earlier turns.
            if len(atom) > 1 and atom in (left[same:] if column >= same else left):
                row = len(left) - 1 - left[::-1].index(atom)
                count = len(commonprefix([left[row:], right[column:]]))
                before = len(commonprefix([left[:row][::-1], right[:column][::-1]]))
                cut, start = len("".join(left[: row + count])), len("".join(right[: column + count]))
                return cut, start, "".join(left[row - before : row + count])
        return self._longest(left, right)

    def _longest(self, left: list[str], right: list[str]) -> tuple[int, int, str]:
        """Like `align`, for the longest text that both share; of several, the last in the prompt."""
        best, ends = 0, (0, 0)
        lengths = [0] * (len(right) + 1)
        for row, atom in enumerate(left, 1):
            before = 0
            for column, other in enumerate(right, 1):
                before, lengths[column] = lengths[column], before + len(atom) if atom == other else 0
                if lengths[column] >= best > 0 or lengths[column] > best:
                    best, ends = lengths[column], (row, column)
        cut, start = len("".join(left[: ends[0]])), len("".join(right[: ends[1]]))
        return cut, start, "".join(left[: ends[0]])[cut - best :]


class Chat:
    """A row in one form of messages.

    Args:
        oracle: the oracle.
        turns: the messages.
        renderer: renders them.
    """

    def __init__(self, oracle: Oracle, turns: list[Turn], renderer: Renderer) -> None:
        self.oracle, self.turns, self.renderer = oracle, turns, renderer
        self.answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        self.trained = [index for index in self.answers if turns[index].trained]
        self._obstacles: list[Fault] | None = None
        self.expected: dict[int, Expected] = {}

    def obstacles(self) -> list[Fault]:
        """Return why the row has to be refused. Fills `expected` if there is nothing."""
        if self._obstacles is None:
            try:
                self._obstacles = [*self._lost_context(), *self._lost_tools()]
                for index in self.trained:
                    self._obstacles += self._expect(index)
            except Unrenderable as error:
                self._obstacles = [Fault(UNRENDERABLE, None, str(error)[:300])]
        return self._obstacles

    def doubts(self) -> list[Fault]:
        """Return why a row without obstacles may be refused."""
        doubts = []
        for answer in self.trained:
            prompt = self.renderer.text(self.turns[:answer], True) if answer else ""
            doubts += [
                Fault(LOST_LATER, index, turn.content[:60])
                for index, turn in enumerate(self.turns[:answer])
                if turn.role != "assistant" and not holds(prompt, turn.content)
            ]
            end = self._plain_end()
            completions = self.expected[answer].completions
            endings = {
                token for text in completions for token in self.oracle.added_pattern.findall(text)[-1:]
            }
            if not endings & {*end[:1], *self.oracle.stops}:
                doubts.append(Fault(NO_STOP if end else NO_END, answer, " ".join(endings)))
            expected = self.expected[answer]
            closes = bool(expected.unshared.strip()) or expected.text.rstrip().endswith("</think>")
            if has_reasoning(self.turns[answer]) and closes:
                doubts.append(Fault(CLOSED, answer, expected.text[-60:]))
        return doubts

    # Context.

    def _lost_context(self) -> Iterator[Fault]:
        """Find turns whose text is missing in the prompt of the answer that follows them."""
        for index, turn in enumerate(self.turns[: self.trained[-1]]):
            answer = next(answer for answer in self.answers if answer > index)
            earlier = self.turns[:answer]
            visible = pieces_of(turn.content)[-1] if turn.role == "assistant" else turn.content
            masked = replace(turn, content=MARK) if visible.strip() else None
            if masked and MARK not in self.renderer.text(
                [*earlier[:index], masked, *earlier[index + 1 :]], True
            ):
                yield Fault(LOST_CONTEXT, index, turn.content[:60])
            elif not holds(self.renderer.text(earlier, True), visible):
                yield Fault(LOST_CONTEXT, index, f"{turn.content[:60]!r} is changed")
            for call in turn.calls:
                if not holds(self.renderer.text(earlier, True), call["function"]["name"]):
                    yield Fault(LOST_CONTEXT, index, f"call of {call['function']['name']}")

    def _lost_tools(self) -> Iterator[Fault]:
        if not self.renderer.tools:
            return
        without = Renderer(self.renderer.tokenizer, None, self.renderer.variables, self.renderer.form)
        prompts = [index for index in self.answers if index and index <= self.trained[-1]]
        try:
            is_shown = any(
                self.renderer.text(self.turns[:index], True) != without.text(self.turns[:index], True)
                for index in prompts
            )
        except Unrenderable:  # the template demands tools
            return
        if not is_shown:
            yield Fault(LOST_CONTEXT, None, "tools")

    # The turn.

    def _expect(self, index: int) -> Iterator[Fault]:
        """Find out what is right for a turn, or yield why nothing is."""
        turn = self.turns[index]
        masked, leaves = masked_turn(turn)
        layout = self._layout(index, masked, leaves)
        lost = [leaf for leaf in leaves if leaf not in layout.masked]
        if lost or not leaves:
            yield Fault(LOST_IN_TURN, index, f"{len(lost)} of {len(leaves)} texts")
            return
        if turn.calls and self._has_wrong_arguments(turn, layout.real):
            yield Fault(ARGUMENTS, index)
        if not is_same_shape(layout):
            yield Fault(UNCLEAR, index, f"{layout.real[-300:]!r} against {layout.masked[-300:]!r}")
            return
        cut, start, shared = self.oracle.align(layout.prompt, layout.decoration)
        if index == 0 and not shared.strip():
            # There is no header, so the turn begins behind the first token of the text.
            tokens = list(self.oracle.added_pattern.finditer(layout.decoration))
            start = tokens[-1].end() if tokens else 0
        unshared = layout.prompt[cut:]
        if has_reasoning(turn) and "</think>" in unshared:
            yield Fault(CLOSED, index, unshared)
        inside = layout.masked[start : layout.last]
        end = self._plain_end()
        stop = next((token for token in {*end[:1], *self.oracle.stops} if token in inside), None)
        if stop is not None:
            yield Fault(CONTINUES, index, f"{stop} in {inside!r}")
            return
        body = layout.real[start : len(layout.real) - len(layout.tail)]
        bodies = [body, body[self._behind_shared(unshared, layout.decoration[start:]) :]]
        endings = list(self._endings(index, masked, layout, *end))
        completions = [text + ending for text in dict.fromkeys(bodies) for ending in endings]
        if not completions:
            yield Fault(NO_END, index, layout.tail)
            return
        missing = [text for text in texts_of(turn) if not holds(max(completions, key=len), text)]
        if missing:
            yield Fault(LOST_IN_TURN, index, f"{missing[0]!r} is changed")
        self.expected[index] = self._expected(index, layout, start, completions)._replace(unshared=unshared)

    def _behind_shared(self, unshared: str, opening: str) -> int:
        """Return where a text ends that a turn has in common with the end of its prompt, 0 if there is none.

        The turn may have other text of the template before it, as if the prompt was answered twice.
        """
        for token in reversed([atom for atom in self.oracle.split(unshared) if len(atom) > 1]):
            if token in opening:
                position = opening.find(token) + len(token)
                behind = unshared[unshared.rfind(token) + len(token) :]
                return position + len(commonprefix([behind, opening[position:]]))
        return 0

    def _expected(self, index: int, layout: Layout, start: int, completions: list[str]) -> Expected:
        if index:
            text = self.renderer.text(self.turns[:index], True)
            return Expected([self.renderer.prompt_ids(self.turns[:index])], text, completions, "")
        # There is no prompt at inference. The context is what the template writes before the turn, or what it
        # writes for an empty conversation, if that has the same header.
        text = layout.real[:start]
        contexts = [self.renderer.ids(text)]
        empty = self.renderer.empty_prompt()
        if empty and self.oracle.align(empty, layout.decoration)[1] == start:
            contexts.append(self.renderer.ids(empty))
        return Expected(contexts, text, completions, "")

    def _layout(self, index: int, masked: Turn, leaves: tuple[str, ...]) -> Layout:
        """Render a turn behind the nearest earlier message whose text shows in prompt and rendering."""
        render = self.renderer.text
        for near in reversed(range(index)):
            if not self.turns[near].content.strip():
                continue
            earlier = list(self.turns[:index])
            earlier[near] = replace(earlier[near], content=MARK)
            prompt = render(earlier, True)
            real, shown = render([*earlier, self.turns[index]]), render([*earlier, masked])
            if MARK in prompt and MARK in real and MARK in shown:
                behind = [text[text.rfind(MARK) + len(MARK) :] for text in (prompt, real, shown)]
                return Layout(*behind, leaves)
        earlier = self.turns[:index]
        prompt = render([Turn("user", MARK)], True)
        real, shown = render([*earlier, self.turns[index]]), render([*earlier, masked])
        return Layout(prompt[prompt.rfind(MARK) + len(MARK) :], real, shown, leaves)

    def _has_wrong_arguments(self, turn: Turn, text: str) -> bool:
        keys = [key for call in turn.calls for key in call["function"]["arguments"]]
        return any(f"'{key}':" in text or f'\\"{key}\\"' in text for key in keys)

    # Its end.

    def _plain_end(self) -> tuple[str, bool] | tuple[()]:
        """Return the token that ends a plain answer, and whether it is the beginning of the next header.

        The result is empty if the template ends no turn by a token.
        """
        question, answer = Turn("user", "Hi"), Turn("assistant", ANSWER)

        def render(turns: list[Turn]) -> str:
            try:
                return self.renderer.text(turns)
            except Unrenderable:  # the template requires a system turn
                return self.renderer.text([Turn("system", "Hi"), *turns])

        tail = after(render([question, answer]), ANSWER)
        matches = list(self.oracle.added_pattern.finditer(tail))
        if matches:
            # A template may write several tokens at the end of a turn. Generation stops at a stop token.
            closing = tail[: len(tail) - len(tail.lstrip())] + (tail.split() or [""])[0]
            in_closing = self.oracle.added_pattern.finditer(closing)
            stops = [match for match in in_closing if match.group() in self.oracle.stops]
            match = (stops or matches)[0]
            behind = tail[match.end() :]
            if not behind or behind[0].isspace() or self.oracle.added_pattern.match(behind):
                return match.group(), False
        tail = after(render([question, answer, question]), ANSWER).lstrip()
        match = self.oracle.added_pattern.match(tail)
        return (match.group(), True) if match and match.group() in self.oracle.stops else ()

    def _endings(
        self, index: int, masked: Turn, layout: Layout, end: str = "", is_header: bool = False
    ) -> Iterator[str]:
        """Yield what may follow the last text of a turn up to the end of its end-of-turn token."""
        tail = layout.tail
        if not end:  # what the template writes behind the turn may be taught or not
            blank = len(tail) - len(tail.lstrip())
            yield from (tail[:size] for size in range(blank + 1))
            if any(text.startswith(tail.rstrip()) for text in self._following(index, masked, layout)):
                yield from (tail.rstrip(), tail)
            return
        following = list(self._following(index, masked, layout))
        if is_header:
            for text in following:
                matches = self.oracle.added_pattern.finditer(text)
                stops = (match.end() for match in matches if match.group() in self.oracle.stops)
                yield from (text[:position] for position in islice(stops, 1))
            return
        matches = list(self.oracle.added_pattern.finditer(tail))
        stops = [match for match in matches if match.group() in {end, *self.oracle.stops}]
        if stops:
            yield from self._stable(tail[: stops[0].start()], stops[0].group(), following)
        elif matches and not tail[matches[-1].end() :].strip():
            yield from self._stable(tail[: matches[-1].start()], matches[-1].group(), following)

    def _stable(self, before: str, end: str, following: list[str]) -> Iterator[str]:
        """Yield an ending, unless the text before its token vanishes when the conversation goes on.

        The token itself can be another one then, and have other white space before it. The text before it can
        be longer, for example by the id of a call.
        """
        shared = before.rstrip()
        for text in following:
            behind = text[len(shared) :].lstrip()
            longer = text[: max(text.find(end), 0)]
            if (text.startswith(shared) and self.oracle.added_pattern.match(behind)) or is_inserted(
                shared, longer
            ):
                yield before + end
                return
        if not following:
            yield before + end

    def _following(self, index: int, masked: Turn, layout: Layout) -> Iterator[str]:
        """Yield what follows the last text of a turn when the conversation goes on."""
        rendered = layout.masked[: layout.last]
        leaf = next(leaf for leaf in layout.leaves if rendered.endswith(leaf))
        count = rendered.count(leaf)  # the result of a call can repeat its name
        call_id = next((call["id"] for call in masked.calls if "id" in call), None)
        result = Turn("tool", "ok", extra={"tool_call_id": call_id} if call_id else {})
        replies = [result] if masked.calls else [Turn("user", "Hi")]
        replies += self.turns[index + 1 : index + 2]
        for reply in replies:
            try:
                text = self.renderer.text([*self.turns[:index], masked, reply])
            except Unrenderable:
                continue
            pieces = text.split(leaf, count)
            if len(pieces) == count + 1:
                yield pieces[-1]

    # Sequences.

    def faults(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Fault]:
        faults: list[Fault] = []
        counts = dict.fromkeys(self.trained, 0)
        for ids, labels in sequences:
            ids, labels = list(ids), list(labels)
            if len(ids) != len(labels) or any(
                label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)
            ):
                faults.append(Fault(LABELS))
                continue
            faults += self._cut_tokens(ids)
            for start, stop in self._runs(ids, labels):
                index, fault = self._judge_run(ids, start, stop)
                if index is not None:
                    counts[index] = counts.get(index, 0) + 1
                faults += [fault] if fault else []
        faults += [Fault(MISSING, index) for index, count in counts.items() if count == 0]
        faults += [Fault(TWICE, index) for index, count in counts.items() if count > 1]
        return faults

    def _runs(self, ids: list[int], labels: list[int]) -> Iterator[tuple[int, int]]:
        """Yield [start, end) of each run of supervised tokens, cut where another turn begins at once."""
        for start, stop in runs(labels):
            bounds = sorted({len(context) for context in self._contexts_in(ids)})
            inside = [bound for bound in bounds if start < bound < stop] if start in bounds else []
            yield from pairwise([start, *inside, stop])

    def _contexts_in(self, ids: list[int]) -> Iterator[list[int]]:
        for expected in self.expected.values():
            yield from (
                context for context in expected.contexts if context and ids[: len(context)] == context
            )

    def _cut_tokens(self, ids: list[int]) -> Iterator[Fault]:
        text = self.renderer.decode(ids)
        # Runs of white space can be added tokens too. A prompt may end within one.
        visible = {token for token, content in self.oracle.added.items() if is_visible(content)}
        whole = [token for token in self.renderer.ids(text) if token in visible]
        actual = [token for token in ids if token in visible]
        if whole != actual:
            cut = [self.oracle.added[token] for token in whole if whole.count(token) != actual.count(token)]
            yield Fault(CUT, None, " ".join(dict.fromkeys(cut)))

    def _judge_run(self, ids: list[int], start: int, stop: int) -> tuple[int | None, Fault | None]:
        """Return the turn that supervised ids belong to, and what is wrong with them."""
        for index, expected in self.expected.items():
            begin = start - 1 if start == 1 and [] in expected.contexts else start
            if ids[:begin] in expected.contexts:
                return index, self._judge_completion(index, expected, ids[:begin], ids[begin:stop])
        text, before = self.renderer.decode(ids[start:stop]), self.renderer.decode(ids[:start])
        for index in self.answers:
            if (
                index not in self.expected
                and index
                and self.renderer.prompt_ids(self.turns[:index]) == ids[:start]
            ):
                return index, Fault(NOT_TRAINED, index, text)
        for index, expected in self.expected.items():
            for completion in expected.completions:
                header = text.removesuffix(completion)
                if header and header != text and expected.text.endswith(header):
                    return index, Fault(HEADER, index, text)
                if text.strip() and (text in completion or completion in text):
                    return index, Fault(CONTEXT, index, f"{before!r} instead of {expected.text!r}")
        return None, Fault(OTHER_TEXT, None, f"{before!r} + {text!r}")

    def _judge_completion(
        self, index: int, expected: Expected, context: list[int], ids: list[int]
    ) -> Fault | None:
        text = self.renderer.decode(ids)
        for completion in expected.completions:
            if self._are_ids_of(ids, completion, context, expected.text):
                return None
        for completion in expected.completions:
            if text == completion:
                return Fault(OTHER_IDS, index, f"{self.oracle.tokenizer.convert_ids_to_tokens(ids)}")
            if text.startswith(completion):
                return Fault(FOLLOWING, index, text[len(completion) :])
            for end in self.oracle.added_pattern.findall(completion)[-1:]:
                with_end = [*ids, self.oracle.tokenizer.convert_tokens_to_ids(end)]
                if self._are_ids_of(with_end, completion, context, expected.text):
                    return Fault(NO_END_TOKEN, index, end)
        return Fault(OTHER_TEXT, index, f"{text!r} instead of {expected.completions!r}")

    def _are_ids_of(self, ids: list[int], completion: str, context: list[int], text: str) -> bool:
        """Return whether ids are those that the tokenizer gives to a completion behind its prompt."""
        whole = self.renderer.ids(text + completion)
        if whole[: len(context)] == context and ids == whole[len(context) :]:
            return True
        # The tokens at the border depend on both, so the completion is tokenized behind the prompt as it is.
        anchor = next(iter(self.oracle.added.values()))
        anchored = self.renderer.ids(anchor + completion)[1:]
        alone = self.renderer.ids(completion)
        if ids in (anchored, alone):
            return True
        # The prompt ends within a token, for example with a space that is part of the first word.
        is_within = whole[: len(context)] != context
        same_text = self.renderer.decode([*context, *ids]) == self.renderer.decode(whole)
        return is_within and same_text and self._added(ids) == self._added(alone)

    def _added(self, ids: list[int]) -> list[int]:
        return [token for token in ids if is_visible(self.oracle.added.get(token, ""))]


def severity(faults: Sequence[Fault]) -> tuple[bool, int]:
    """Return a key that is larger the less a form of the messages suits the template."""
    return any(fault.kind == UNRENDERABLE for fault in faults), len(faults)


def has_reasoning(turn: Turn) -> bool:
    match = THINK.fullmatch(turn.content)
    return bool(turn.reasoning.strip() or (match and match["thought"].strip()))


def is_inserted(text: str, longer: str) -> bool:
    """Return whether a text becomes another one if something is inserted somewhere inside."""
    longer = longer.rstrip()
    common = len(commonprefix([text, longer])), len(commonprefix([text[::-1], longer[::-1]]))
    return all(common) and len(text) <= min(sum(common), len(longer))


def after(text: str, mark: str) -> str:
    return text[text.rfind(mark) + len(mark) :] if mark in text else ""


def runs(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of each run of supervised tokens."""
    start = None
    for position, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and start is None:
            start = position
        elif label == IGNORED and start is not None:
            yield start, position
            start = None
