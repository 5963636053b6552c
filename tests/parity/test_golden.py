"""Every tensor of the golden folder, compared within the folder's own tolerances."""

from comparison import assert_equal
from producers import produce
from summary import COMPARED, OUTPUT


def test_output_equals_the_official_one(golden, output_key, record_property):
    record_property(OUTPUT, output_key)
    ours = produce(golden, output_key)
    record_property(COMPARED, output_key)
    assert_equal(golden, output_key, ours)
