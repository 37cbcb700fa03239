"""Columns that change what a row means, renamed and ignored columns, conditions, and preference pairs."""

import pytest

from dft.data.conversations.column_meanings import MEANINGS
from dft.data.conversations.faults import BadLine
from dft.data.conversations.row_rules import NO_RULES, RowLeftOut, RowRules, TurnNames
from tests.data.conversations.parsing import error_of, parse

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TALK = {"messages": [USER, ANSWER]}
BAD = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        (
            "label",
            False,
            "'label' is false: it says whether an answer is good, and this trainer learns every answer; "
            "--keep_rows label=true trains on the good ones, --ignore_columns label on all",
        ),
        (
            "kto_tag",
            "bad",
            "'kto_tag' is 'bad': it says whether an answer is good, and this trainer learns every answer; "
            "--keep_rows kto_tag=VALUE trains on the good ones, --ignore_columns kto_tag on all",
        ),
        (
            "images",
            ["1.jpg"],
            "'images' holds an image, and this trainer reads only text; --on_bad_data skip leaves such "
            "rows out, --ignore_columns images trains on their text alone",
        ),
        (
            "reward",
            0.5,
            "'reward' is 0.5: it says how good an answer is, and this trainer learns every answer; remove "
            "the bad ones and pass --ignore_columns reward",
        ),
        (
            "rejected",
            "b",
            "'rejected' makes this a preference pair; --use_chosen True trains on the chosen answer, or "
            "--ignore_columns leaves out the columns of the pair",
        ),
        (
            "split",
            "test",
            "'split' is 'test', so the row belongs to another part of the data; --keep_rows split=VALUE "
            "takes the rows of one part, --ignore_columns split takes all",
        ),
    ],
)
def test_a_column_that_changes_the_meaning_is_an_error_unless_it_is_ignored(column, value, reason):
    row = {**TALK, column: value}
    assert error_of(row) == reason
    assert parse(row, ignored=(column,)).messages == TALK["messages"]
    assert parse({**TALK, "x": value}, columns=(("y", "x"),)).unread == ("y",)


@pytest.mark.parametrize("column", [column for meaning in MEANINGS for column in meaning.columns])
def test_every_column_with_a_meaning_is_refused_in_every_form(column):
    for row in (TALK, {"instruction": "q", "output": "a"}, {"response": "a"}):
        with pytest.raises(BadLine):
            parse({**row, column: False if column in ("correct", "is_correct", "train", "loss") else "x"})


@pytest.mark.parametrize(
    ("column", "value"),
    [("images", []), ("image", ""), ("split", "train"),
     ("split", "train_sft"), ("rejected", ""),
     ("chosen", []), ("label", None), ("is_correct", True), ("correct", "4")],
)  # fmt: skip
def test_values_that_mean_nothing_are_no_errors(column, value):
    assert parse({**TALK, column: value}).messages == TALK["messages"]


@pytest.mark.parametrize("column", ["weight", "loss_weight", "loss_scale", "sample_weight"])
def test_the_weight_of_a_row_is_that_of_its_turns(column):
    for value in (0.5, 2, "0.5"):  # the cells of .csv files are texts
        conversation = parse({**TALK, column: value})
        assert conversation.weights == (float(value),) * len(TALK["messages"])
        assert conversation.messages == TALK["messages"] and conversation.unread == ()
        assert parse({"response": "a", column: value}).weights == (float(value),)
    for value in (1, 1.0, "1", None):
        assert parse({**TALK, column: value}).weights == ()
    assert parse({**TALK, column: 0.5}, ignored=(column,)).weights == ()
    assert parse({**TALK, "quality": 3}, columns=((column, "quality"),)).weights[0] == 3
    mapped = {"columns": (("messages", "messages"),), "mapped_only": True}
    assert parse({**TALK, "w": 1, column: 0.5}, **mapped).weights[0] == 0.5


def test_weights_of_a_row_and_of_its_turns_are_multiplied():
    talk = {"messages": [USER, {**ANSWER, "weight": 0.5}, USER, {**ANSWER, "loss_weight": 0}, USER, ANSWER]}
    conversation = parse({**talk, "weight": 3})
    assert conversation.supervised == (False, True, False, False, False, True)
    assert [conversation.weight(index) for index in (1, 5)] == [1.5, 3]


@pytest.mark.parametrize("value", [0, 0.0, "0"])
def test_a_row_of_weight_0_is_left_out(value):
    with pytest.raises(RowLeftOut, match="^weight 0$"):
        parse({**TALK, "weight": value})


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-1, "-1"), (True, "True"), ("x", "'x'"), ("", "''"), ([1], "[1]"), (1e-9, "1e-09"), (2e6, "2000000.0"),
     ("nan", "nan")],
)  # fmt: skip
def test_a_weight_of_a_row_that_is_no_weight_is_an_error(value, shown):
    expected = f"'weight' must be a weight: 0, or a number from 1e-06 to 1,000,000, got {shown}"
    assert error_of({**TALK, "weight": value}) == expected


def test_weights_of_a_row_that_differ_are_an_error():
    row = {**TALK, "weight": 0.5, "sample_weight": 2}
    expected = "'weight' is 0.5 but 'sample_weight' is 2; leave one out with --ignore_columns"
    assert error_of(row) == expected
    assert parse({**row, "sample_weight": "0.5"}).weights[0] == 0.5


def test_the_placeholder_of_an_image_is_named():
    row = {"messages": [{"role": "user", "content": "<image>What is it?"}, ANSWER], "images": ["1.jpg"]}
    assert error_of(row).endswith("trains on their text alone, with <image> left in it")
    del row["images"]
    assert parse(row).messages == row["messages"]  # text about HTML may have such a tag


def test_keys_of_a_message_that_change_its_meaning_are_errors():
    talk = {"messages": [{**USER, "images": ["1.jpg"]}, ANSWER]}
    assert error_of(talk) == (
        "messages[0]: 'images' holds an image, and this trainer reads only text; --on_bad_data skip leaves "
        "such rows out"
    )
    assert parse({"messages": [{**USER, "images": []}, ANSWER]}).messages[0]["images"] == []
    talk = {
        "messages": [USER, {**ANSWER, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}]
    }
    assert error_of(talk) == (
        "messages[1]: 'train_detail' selects parts of a message, but only whole messages can be selected, "
        "with 'train'"
    )


def test_rows_for_evaluation_may_be_of_any_split_but_that_for_training():
    assert "'split' is 'train'" in error_of({**TALK, "split": "train"}, evaluation=True)
    assert parse({**TALK, "split": "test"}, evaluation=True).messages == TALK["messages"]


def test_other_columns_are_listed_as_unread():
    row = {**TALK, "id": 7, "tools": [], "source": "x", "nothing": None, "parallel_tool_calls": True}
    assert parse(row).unread == ("id", "source", "parallel_tool_calls")
    assert parse(TALK).unread == ()
    assert parse({**TALK, "label": True, "id": 1}, ignored=("label",)).unread == ("label", "id")


def test_columns_are_renamed():
    row = {"question": "q", "answer": "a", "persona": "s", "id": 1}
    names = (("instruction", "question"), ("output", "answer"), ("system", "persona"))
    conversation = parse(row, columns=names)
    assert conversation.messages == [{"role": "system", "content": "s"}, USER, ANSWER]
    assert conversation.unread == ("id",)
    assert conversation.named == ("question", "answer", "persona")
    swapped = parse(
        {"prompt": "a", "completion": "q"}, columns=(("prompt", "completion"), ("completion", "prompt"))
    )
    assert swapped.messages == [USER, ANSWER]


def test_a_name_that_another_column_has_is_an_error():
    row = {"instruction": "x", "question": "q", "output": "a"}
    names = (("instruction", "question"),)
    message = (
        "--columns instruction=question: the row also has a column 'instruction'; leave it out with "
        "--ignore_columns instruction"
    )
    assert error_of(row, columns=names) == message
    assert error_of(dict(reversed(row.items())), columns=names) == message
    assert parse(row, columns=names, ignored=("instruction",)).messages == [USER, ANSWER]


@pytest.mark.parametrize(
    ("value", "accepted", "is_kept"),
    [(True, "true", True), (True, "True", True), (False, "true", False), ("False", "false", True),
     ("de", "de", True), ("de", "en", False), (1, "1", True), (1.0, "1", True), (2, "1", False),
     (1, "true", False), (1, "x", False), (["de"], "de", False)],
)  # fmt: skip
def test_conditions_compare_values_with_text(value, accepted, is_kept):
    row, rules = {**TALK, "label": value}, {"kept": (("label", (accepted,)),)}
    if is_kept:
        assert parse(row, **rules).messages == TALK["messages"]
    else:
        with pytest.raises(RowLeftOut, match=f"^--keep_rows label={accepted}$"):
            parse(row, **rules)


def test_conditions_on_one_column_are_alternatives_and_on_several_all_hold():
    kept = (("lang", ("de", "en")), ("good", ("true",)))
    assert parse({**TALK, "lang": "en", "good": True}, kept=kept).messages == TALK["messages"]
    with pytest.raises(RowLeftOut, match="^--keep_rows lang=de,en$"):
        parse({**TALK, "lang": "fr", "good": True}, kept=kept)
    with pytest.raises(RowLeftOut, match="^--keep_rows good=true$"):
        parse({**TALK, "lang": "de", "good": False}, kept=kept)


def test_a_row_without_the_column_of_a_condition_is_an_error():
    assert error_of(TALK, kept=(("label", ("true",)),)) == (
        "--keep_rows label=true: the row has no 'label'; name the file that the condition is for, like "
        "--keep_rows FILE:label=true"
    )


def test_turns_may_use_other_names():
    names = TurnNames("speaker", "said", (("doctor", "gpt"), ("patient", "human")))
    talk = [{"speaker": "patient", "said": "q"}, {"speaker": "doctor", "said": "a", "n": 1}]
    conversation = parse({"dialog": talk}, columns=(("conversations", "dialog"),), turns=names)
    assert conversation.messages == [USER, {**ANSWER, "n": 1}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"query": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
         "rejected": {"from": "gpt", "value": "b"}},
        {"messages": [USER], "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]},
        {"prompt": "q", "chosen": [ANSWER], "rejected": [BAD]},
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, BAD]},
        {"chosen": [USER, ANSWER], "rejected": [USER, BAD]},
        {"messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, BAD], "prompt": "q"},
        {"chosen_messages": [{**USER, "loss_weight": 0.0}, {**ANSWER, "loss_weight": 1.0}],
         "rejected_messages": [{**USER, "loss_weight": 0.0}, BAD]},
        {"messages": [USER, ANSWER], "rejected_response": "b"},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [ANSWER],
         "non_preferred_output": [BAD]},
        {"conversation": [{"input": "q"}], "chosen": "a", "rejected": "b"},
        TALK,
    ],
)  # fmt: skip
def test_the_chosen_answer_of_a_pair_is_trained_on(row):
    conversation = parse(row, use_chosen=True)
    assert conversation.messages == [USER, ANSWER]
    assert conversation.supervised == (False, True)
    assert conversation.unread == ()


def test_earlier_answers_of_a_pair_are_context():
    earlier = [USER, {**BAD, "weight": 1}, USER]
    rows = [
        {"messages": earlier, "chosen": "a", "rejected": "b"},
        {"prompt": earlier, "chosen": [ANSWER], "rejected": [BAD]},
        {"chosen": [*earlier, ANSWER], "rejected": [*earlier, BAD]},
        {"chosen": [*earlier, ANSWER], "rejected": "b"},
        {"messages": [*earlier, ANSWER], "rejected_response": "b"},
        {"query": "q", "chosen": "a", "rejected": "x", "history": [["q", "b"]]},
    ]
    for row in rows:
        conversation = parse(row, use_chosen=True)
        assert conversation.messages == [USER, BAD, USER, ANSWER]
        assert conversation.supervised == (False, False, False, True)


def test_every_turn_that_only_the_chosen_conversation_has_is_trained_on():
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    result = {"role": "tool", "content": "1"}
    conversation = parse({"chosen": [USER, call, result, ANSWER], "rejected": [USER, BAD]}, use_chosen=True)
    assert conversation.supervised == (False, True, False, True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "q", "rejected": "b"},
            "a preference pair without 'chosen', so there is no answer to train on",
        ),
        (
            {"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"},
            "'chosen' is a string that cannot be joined to the other columns; expected a text or turns that "
            "follow messages, conversations, conversation, instruction, query, prompt, or a list of all "
            "turns",
        ),
        ({"instruction": "q", "chosen": 3, "rejected": "b"}, "'chosen' is a number that cannot be joined to"),
        (
            {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
            "no assistant turn is trained",
        ),
    ],
)
def test_pairs_that_cannot_be_used_are_errors(row, reason):
    assert error_of(row, use_chosen=True).startswith(reason)


def test_pairs_without_a_conversation_name_the_flag():
    message = "'chosen' makes this a preference pair; --use_chosen True trains on the chosen answer"
    assert error_of({"prompt": "q", "chosen": "a", "rejected": "b"}).startswith(message)
    assert error_of({"chosen": [USER, ANSWER]}) == message


def test_rules_compare_by_what_they_say():
    assert RowRules() == NO_RULES
    assert not NO_RULES.change_rows
    assert RowRules(ignored=("x",)).change_rows
