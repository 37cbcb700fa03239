"""The section of a run's page with generated samples."""

import pytest

from dft.report.pages.run import run_page
from dft.report.pages.samples import MAX_ANSWERS, MAX_PROMPTS, MAX_TEXT, sample_views, show_text
from dft.report.samples_file import SAMPLES, append_samples
from tests.report.reports import Page, run_report
from tests.report.test_samples_file import row

ATTACK = "</pre><script>alert('1')</script>"
HINT = "--generate_samples 4 lets the model continue the first four prompts"


def section(folder) -> str:
    """Return the HTML of the section."""
    html = run_page(run_report(), folder)
    return html[html.index("<h2>Samples</h2>") : html.index("<h2>Conversations, token by token</h2>")]


def test_each_prompt_has_its_reference_and_its_answers_the_newest_first(tmp_path):
    append_samples(tmp_path / SAMPLES, [row(0, ended=False, tokens=128), row(0, 2, prompt="other", line=9)])
    append_samples(
        tmp_path / SAMPLES, [row(1500, answer="r\n", tokens=1), row(1500, 2, prompt="other", line=9)]
    )
    page = Page(section(tmp_path))
    words = " ".join(page.text.split())
    assert words.startswith("Samples What the model writes after prompts")
    assert (
        "1. a.jsonl:1 p q reference r step 1,500, 1 token, as the reference r step 0, 128 tokens, cut off "
        "answer of 0 2. a.jsonl:9 other reference r step 1,500, 3 tokens answer of 1500 step 0, 3 tokens "
        "answer of 0"
    ) in words
    assert HINT not in words


@pytest.mark.parametrize("field", ["prompt", "reference", "answer", "file"])
def test_texts_are_escaped(tmp_path, field):
    append_samples(tmp_path / SAMPLES, [row(0, **{field: f"a {ATTACK}\x1b[2J\u202e\x00 b"})])
    html = section(tmp_path)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and ATTACK in page.text
    if field != "file":
        assert f"a {ATTACK}\\x1b[2J\\u202e\\x00 b" in page.text


def test_leading_newlines_of_a_text_are_shown(tmp_path):
    """A browser drops the first newline of <pre>."""
    append_samples(tmp_path / SAMPLES, [row(0, answer="\n\nanswer\twith\n tabs")])
    assert '<pre class="text">\n\n\nanswer\twith\n tabs</pre>' in section(tmp_path)


def test_runs_without_samples_have_a_hint(tmp_path):
    assert HINT in Page(section(tmp_path)).text and "<pre" not in section(tmp_path)
    (tmp_path / SAMPLES).write_text("{broken\n")
    assert HINT in Page(section(tmp_path)).text


def test_many_evaluations_are_thinned_evenly_from_the_first_to_the_last():
    (view,) = sample_views([row(10 * number) for number in range(45)])
    steps = [answer.step for answer in view.answers]
    assert len(steps) == MAX_ANSWERS and steps == sorted(steps, reverse=True) and view.total == 45
    assert steps[0] == 440 and steps[-1] == 0
    assert {before - after for before, after in zip(steps, steps[1:], strict=False)} == {40}


def test_many_prompts_and_long_texts_are_limited(tmp_path):
    rows = [row(0, number, prompt=f"prompt {number}") for number in range(1, MAX_PROMPTS + 5)]
    assert [view.prompt for view in sample_views(rows)] == [f"prompt {n}" for n in range(1, MAX_PROMPTS + 1)]
    assert show_text("a" * MAX_TEXT + "b") == "a" * MAX_TEXT + "[...]"
    assert show_text("b" + "a" * MAX_TEXT, from_end=True) == "[...]" + "a" * MAX_TEXT


def test_prompts_of_other_data_after_resuming_are_shown_apart():
    views = sample_views(
        [row(0), row(20), row(40, prompt="another", reference="r2"), row(60, prompt="another")]
    )
    assert [(view.prompt, view.reference, view.total) for view in views] == [
        ("p q", "r", 2), ("another", "r2", 1), ("another", "r", 1),
    ]  # fmt: skip


def test_the_file_is_listed(tmp_path):
    append_samples(tmp_path / SAMPLES, [row(0)])
    html = run_page(run_report(), tmp_path)
    assert Page(html).row(SAMPLES) == [
        "what the model wrote after prompts of the evaluation data, at each evaluation"
    ]
