"""The kill test itself: ranks killed at some moments, through the launcher, against a run left alone."""

from tools import kill_test


def test_a_run_whose_ranks_are_killed_restarts_and_resumes_to_the_same_result(tmp_path):
    hits, differences = kill_test.run_kill_test(tmp_path, kills=1, per_run=1, epochs=4, seed=2)
    assert differences == []
    assert hits
