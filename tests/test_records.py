"""Protects: the format of a saved row."""

import pytest

from vlmclassifier.records import Prediction, prediction_from_line, to_line


def test_row_is_unchanged_by_saving_and_reading():
    row = Prediction("a.jpg", "colt's foot", 11, 'Q "ü"\n', ("a", "b"), "one\ntwo \u2028", (3, 1))
    line = to_line(row)
    assert line.endswith("\n") and "\n" not in line[:-1]
    assert prediction_from_line(line) == row


@pytest.mark.parametrize("line", ["", "{", "[]", '{"example_id": "a"}', "3"])
def test_line_that_is_not_a_row_is_refused(line):
    with pytest.raises(ValueError):
        prediction_from_line(line)
