"""Each score on literal replies, right ones and wrong ones."""

from __future__ import annotations

from fractions import Fraction

import pytest

from arpo_trl.generate import scores
from arpo_trl.generate.scores import Reply, describe_scores, find_answer, score_replies, to_number
from arpo_trl.generate.tags import find_calls

PYTHON = "<think>I compute it.</think>\n<python>\nprint(2 + 3)\n</python>"
TOOL_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
MISTRAL = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}]'
LLAMA = '{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}'
BOXED = "<think>It prints 5.</think>\n<answer>The final answer is \\[ \\boxed{5} \\]</answer>"
PLAIN = "Oslo is in Norway."


def reply(predict: str, label: str = "", stopped: bool = True) -> Reply:
    return Reply(predict, label, stopped, tokens=len(predict.split()), label_tokens=len(label.split()))


def test_stopped_is_by_the_end_of_turn_and_not_by_the_length() -> None:
    assert scores.stopped(reply("an answer", stopped=True)) is True
    assert scores.stopped(reply("an answer that goes on and on", stopped=False)) is False


@pytest.mark.parametrize(
    ("predict", "label", "right"),
    [
        (PYTHON, PYTHON, True),
        (BOXED, PYTHON, True),  # another form, well made
        ("<think>a</think><search>b</search> <result>\nc\n</result><answer>d</answer>", BOXED, True),
        ("I compute it.", PYTHON, False),  # no tags where the label has them
        ("<think>I compute it.<python>print(2)</python>", PYTHON, False),  # opened inside another
        ("<think>I compute it.</think>\n<python>print(2 + 3)", PYTHON, False),  # never closed
        ("I compute it.</think>\n<python>print(2)</python>", PYTHON, False),  # closed without being opened
        ("<think>a</answer>", PYTHON, False),
        ("<python>print('<b>1 < 2</b>')</python>", PYTHON, True),  # no tags of ours
        (PLAIN, PLAIN, None),  # the label has no tags
        (PYTHON, "Write <python> to open and </answer> to close.", None),  # prose about tags
        (
            "I compute it.</think>\n<answer>5</answer>",
            "It is 5.</think><answer>5</answer>",
            True,
        ),  # opened by the prompt
        ("<think>I compute it.</think>\n<answer>5</answer>", "It is 5.</think><answer>5</answer>", False),
    ],
)
def test_well_formed_tags_open_and_close_in_order(predict: str, label: str, right: bool | None) -> None:
    assert scores.well_formed(reply(predict, label)) is right


@pytest.mark.parametrize(
    ("predict", "label", "called", "tool", "arguments"),
    [
        (PYTHON, PYTHON, True, True, True),
        ("<python>print(2   +\n3)</python>", PYTHON, True, True, True),  # whitespace
        ("<python>print(2 - 3)</python>", PYTHON, True, True, False),
        ("<search>2 + 3</search>", PYTHON, True, False, False),
        ("<python>print(2 + 3)", PYTHON, False, False, False),  # nothing calls the tool before </python>
        (BOXED, PYTHON, False, False, False),
        (PYTHON + PYTHON, PYTHON, True, False, False),  # twice
        (PYTHON + "<result>7</result><python>print(7)</python>", PYTHON, True, True, True),  # past its own result
        (TOOL_CALL, TOOL_CALL, True, True, True),
        ('<tool_call>{"arguments": {"days": 3.0, "city": "Oslo"}, "name": "weather"}</tool_call>', TOOL_CALL, True, True, True),
        ('<tool_call>{"name": "weather", "arguments": {"days": 3.0, "city": "Oslo"}}</tool_call>', TOOL_CALL, True, True, True),
        ('<tool_call>{"name": "weather", "arguments": "{\\"days\\": 3, \\"city\\": \\"Oslo\\"}"}</tool_call>', TOOL_CALL, True, True, True),
        ('<tool_call>{"name": "weather", "arguments": {"city": "oslo", "days": 3}}</tool_call>', TOOL_CALL, True, True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": true}}</tool_call>', TOOL_CALL, True, True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Oslo"</tool_call>', TOOL_CALL, True, True, False),
        ('<tool_call>{"name": "time", "arguments": {}}</tool_call>', TOOL_CALL, True, False, False),
        (TOOL_CALL + "\n" + TOOL_CALL, TOOL_CALL, True, False, False),
        (TOOL_CALL + "\n" + TOOL_CALL, TOOL_CALL * 2, True, True, True),
        (MISTRAL, MISTRAL, True, True, True),
        (MISTRAL.replace("3", "4"), MISTRAL, True, True, False),
        (LLAMA, LLAMA, True, True, True),
        (LLAMA.replace("weather", "time"), LLAMA, True, False, False),
        (PLAIN, LLAMA, False, False, False),
        ("<tool_call>\n<function=f>\n<parameter=x>1</parameter>\n</function></tool_call>", "<tool_call><function=f>\n\n<parameter=x>1</parameter>\n</function>\n</tool_call>", True, True, True),
        ("<tool_call>g\n<arg_key>x</arg_key></tool_call>", "<tool_call>f\n<arg_key>x</arg_key></tool_call>", True, False, False),
        (PYTHON, PLAIN, None, None, None),
        ('{"name": "Oslo"}', '{"name": "Oslo", "people": 700000}', None, None, None),  # an answer in JSON
    ],
)  # fmt: skip
def test_the_tool_is_called_by_name_with_the_arguments_of_the_label(
    predict: str, label: str, called: bool | None, tool: bool | None, arguments: bool | None
) -> None:
    one = reply(predict, label)
    assert (scores.tool_called(one), scores.right_tool(one), scores.right_arguments(one)) == (called, tool, arguments)


@pytest.mark.parametrize(
    ("predict", "label", "as_text", "as_number"),
    [
        (BOXED, BOXED, True, True),
        ("\\boxed{5.0}", BOXED, False, True),
        ("<answer>5</answer>", BOXED, True, True),
        ("\\boxed{6}", BOXED, False, False),
        ("The answer is 5.", BOXED, False, False),  # not boxed
        ("\\boxed{5", BOXED, False, False),
        ("\\boxed{6} no, \\boxed{ $5$. }", BOXED, True, True),  # the last one
        ("\\boxed{1,234}", "\\boxed{1234}", False, True),
        ("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", False, True),
        ("\\boxed{Karamont}", "\\boxed{Karamont}", True, None),
        ("\\boxed{karamont}", "\\boxed{Karamont}", False, None),
        ("\\boxed{Wednesday}", BOXED, False, False),
        (BOXED, PLAIN, None, None),
    ],
)
def test_the_answer_is_the_labels_as_text_and_as_number(
    predict: str, label: str, as_text: bool | None, as_number: bool | None
) -> None:
    one = reply(predict, label)
    assert (scores.answer_as_text(one), scores.answer_as_number(one)) == (as_text, as_number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12), ("-12.50", Fraction(-25, 2)), ("1,234,567", 1234567), ("3/4", Fraction(3, 4)), (".5", Fraction(1, 2)),
        ("\\dfrac{-3}{4}", Fraction(-3, 4)), ("50%", Fraction(1, 2)), ("50\\%", Fraction(1, 2)), ("1e-3", Fraction(1, 1000)),
        ("\u22127", -7), ("$7$.", 7), ("12 km", None), ("1,23", None), ("3/0", None), ("", None), ("1e999999999", None),
        ("9" * 100_000, None), ("x = 3", None), ("nan", None),
    ],
)  # fmt: skip
def test_a_number_is_read_exactly_or_not_at_all(text: str, number: Fraction | None) -> None:
    assert to_number(text) == number


def test_the_answer_keeps_its_inner_braces() -> None:
    assert find_answer("so \\boxed{\\frac{1}{2}} it is") == "\\frac{1}{2}"


def test_exact_match_is_of_the_whole_text_but_for_its_ends() -> None:
    assert scores.exact_match(reply(f" {PLAIN}\n", PLAIN)) is True
    assert scores.exact_match(reply(PLAIN.lower(), PLAIN)) is False


def test_hostile_text_is_scored_and_ends_soon() -> None:
    for text in ('{"name": ' * 20_000, "<tool_call>" * 20_000, "\\boxed{" * 20_000, "<python>" * 20_000 + "</search>"):
        find_calls(text), find_answer(text), scores.well_formed(reply(text, PYTHON))


def test_every_score_comes_with_the_number_of_replies_that_it_is_of() -> None:
    found = score_replies([reply(PYTHON, PYTHON), reply(BOXED, BOXED, stopped=False), reply("\\boxed{6}", BOXED)])
    assert found == {
        "replies": 3,
        "stopped": 2 / 3, "stopped_of": 3,
        "well_formed": 2 / 3, "well_formed_of": 3,
        "tool_called": 1.0, "tool_called_of": 1,
        "right_tool": 1.0, "right_tool_of": 1,
        "right_arguments": 1.0, "right_arguments_of": 1,
        "answer_as_text": 1 / 2, "answer_as_text_of": 2,
        "answer_as_number": 1 / 2, "answer_as_number_of": 2,
        "exact_match": 2 / 3, "exact_match_of": 3,
        "tokens": 19 / 3, "label_tokens": 28 / 3,
    }  # fmt: skip
    assert score_replies([]) == {"replies": 0}


def test_the_table_has_a_column_a_model() -> None:
    before, after = score_replies([reply("", PYTHON, stopped=False)]), score_replies([reply(PYTHON, PYTHON)])
    assert describe_scores({"before": before, "after": after}) == [
        "                    before   after",
        "stopped             0 of 1  1 of 1",
        "well formed         0 of 1  1 of 1",
        "tool called         0 of 1  1 of 1",
        "right tool          0 of 1  1 of 1",
        "right arguments     0 of 1  1 of 1",
        "exact match         0 of 1  1 of 1",
        "tokens (labels: 8)       0       8",
    ]
