"""A run can be killed at any instant and loses nothing: a sample of every row of campaign.py."""

import pytest
from cases import ROWS, run


@pytest.mark.parametrize("name", ROWS)
def test_row(name, tmp_path):
    row = ROWS[name]
    _, _, failures = run(row, row.sample, tmp_path)
    assert not failures, "\n\n".join(failures)
