"""What measures play: figures of its samples, and a short soak of the real server."""

import csv
import math

import pytest

pytest.importorskip("websocket", reason="websocket-client is not installed (extra [pages])")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra [play])")

from harness.bench import codecs, soak
from harness.bench.play_client import percentile


def test_the_slope_is_of_what_came_after_memory_had_settled():
    early = [(float(t), 1000.0 - t, 4, 8, 0) for t in range(0, 600, 10)]
    late = [(float(t), 700 + 2 * t / 3600, 4, 8, 0) for t in range(600, 3600, 10)]
    assert soak.slope(early + late) == pytest.approx(2)
    assert math.isnan(soak.slope(early))


def test_a_percentile_is_a_value_that_was_measured():
    assert percentile([3.0, 1.0, 2.0], 50) == 2
    assert percentile([3.0, 1.0, 2.0], 99) == 3
    assert math.isnan(percentile([], 50))


def test_a_better_quality_takes_more_bytes_and_loses_less(capsys):
    assert codecs.main(["--frames", "2", "model=smoke"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    jpeg = {int(row[1]): [float(x) for x in row[2:]] for row in rows if row[0] == "jpeg"}
    assert jpeg[80][3] < jpeg[90][3] < jpeg[95][3]
    assert jpeg[80][5] < jpeg[90][5] < jpeg[95][5]


@pytest.mark.slow
def test_a_short_soak_plays_and_samples_the_server(tmp_path, capsys):
    out = tmp_path / "soak.csv"
    assert soak.main(["--minutes", "0.1", "--out", str(out), "model=smoke", "quant=mxfp4_all"]) == 0
    rows = list(csv.DictReader(out.open()))
    assert float(rows[0]["rss_mib"]) > 100
    assert int(rows[-1]["frames"]) > 0
    assert "MiB an hour" in capsys.readouterr().out
