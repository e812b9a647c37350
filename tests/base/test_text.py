"""Tables, and numbers as people write them."""

from __future__ import annotations

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.base.text import decision, duration, gib, markdown_table, parse_size, parse_sizes, table


def test_a_table_aligns_numbers_to_the_right_and_words_to_the_left() -> None:
    rows = [("b0", 1234, "81.50", "3 %"), ("tf_efficientnet_l2", 5, None, "100 %"), ("x", "1,000", "-0.1", "2e-3")]
    assert table(("model", "n", "top-1", "share"), rows).splitlines() == [
        "model                   n  top-1  share",
        "b0                   1234  81.50    3 %",
        "tf_efficientnet_l2      5         100 %",
        "x                   1,000   -0.1   2e-3",
    ]


def test_a_decision_is_a_line_without_the_keys_of_its_file() -> None:
    speeds = {"memory_format": "contiguous", "compile": False, "ms_per_image": {"contiguous": 3.1912}}
    assert (
        decision("trunk at 64 px", speeds) == "trunk at 64 px: memory format contiguous; ms per image: contiguous 3.19"
    )
    assert (
        decision("engine of fix", {"engine": "stream", "why": "new pictures"}) == "engine of fix: stream; new pictures"
    )
    assert decision("batch per device", {"largest that fits": 96, "of use": 128}) == (
        "batch per device: largest that fits 96, of use 128"
    )
    assert decision("trunk", {"memory_format": "channels_last", "compile": True}) == (
        "trunk: memory format channels_last, compile"
    )


def test_a_column_with_a_word_among_its_numbers_is_text() -> None:
    assert table(("res", "eta"), [(224, "2h14m"), (96, "?")]).splitlines() == ["res  eta", "224  2h14m", " 96  ?"]


def test_a_table_without_rows_is_its_head() -> None:
    assert table(("name", "state"), []) == "name  state"


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(("name", "state"), [("b0",)])


def test_a_markdown_table() -> None:
    text = "| run | top-1 |\n|-|-|\n| b0 | 81.5 |\n| a\\|b |  |"
    assert markdown_table(("run", "top-1"), [("b0", 81.5), ("a|b", None)]) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.4, "41s"), (185, "3m05s"), (8040, "2h14m"), (59.6, "1m00s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(2**30, "1.0 GiB"), (3 * 2**19, "1.5 MiB"), (2**42, "4,096.0 GiB")])
def test_sizes_in_bytes(size: float, text: str) -> None:
    assert gib(size) == text


def test_resolutions() -> None:
    assert parse_sizes("224,256") == [224, 256]
    assert parse_size("224") == 224
    assert parse_size(None) is None


@pytest.mark.parametrize(
    ("text", "words"), [("a", "whole numbers"), ("", "whole numbers"), ("31", "32 or more"), ("224,16", "32 or more")]
)
def test_resolutions_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_sizes(text)


def test_several_resolutions_where_one_is_meant_name_the_sweep() -> None:
    with pytest.raises(UserError, match=r"one resolution here\. Next: .*sweep for several"):
        parse_size("224,256")
