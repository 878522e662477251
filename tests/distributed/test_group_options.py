"""Groups of an axis are made with the options that the backend has for it."""

from tests.distributed.ranks import run_ranks


def test_each_axis_gets_the_options_of_its_backend():
    expected = {"pp": "pp", "ep": "ep", "ep_backward": "ep", "dp": "dp", "edp": None}
    assert run_ranks(1, "tests.distributed.group_options_case") == [expected]
