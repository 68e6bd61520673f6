"""The simulation behind the choice of intervals, small."""

from harness.bench.intervals import main, misses


def test_percentile_bootstraps_miss_too_often_with_four_clips_and_the_gates_intervals_do_not():
    found = misses("normal", 4, 300)
    assert min(found["percentile"]) > 8
    assert min(found["BCa"]) > 8
    assert max(found["gates"]) < 9


def test_the_gates_upper_end_is_safer_than_students_where_a_few_clips_lose_much():
    found = misses("very skewed (exponential)", 12, 300)
    assert found["gates"][0] < found["t"][0]


def test_the_command_prints_a_table_and_names_wrong_sizes(capsys):
    assert main(["--samples", "2", "--clips", "3"]) == 0
    assert "| normal | 3 |" in capsys.readouterr().out
    assert main(["--clips", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
