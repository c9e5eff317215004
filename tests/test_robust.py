"""A run can be killed at any instant and loses nothing: a sample of every row of campaign.py."""

import threading

import pytest
from cases import ROWS, run
from tqdm import tqdm
from warm import fork


@pytest.mark.parametrize("name", ROWS)
def test_row(name, tmp_path):
    row = ROWS[name]
    _, _, failures = run(row, row.sample, tmp_path)
    assert not failures, "\n\n".join(failures)


def test_forks_share_no_lock(tmp_path):
    """Or one that is killed while it writes would stop all later ones."""
    lock, held, done = tqdm.get_lock(), threading.Event(), threading.Event()
    holder = threading.Thread(target=lambda: (lock.acquire(), held.set(), done.wait(), lock.release()))
    holder.start()
    held.wait()
    result = fork(lambda: tqdm.write("written"), tmp_path).wait(20)
    done.set()
    holder.join()
    assert result.code == 0 and result.out == "written\n"
