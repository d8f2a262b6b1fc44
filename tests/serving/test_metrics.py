"""Prometheus' text format."""

from qcompile.serving.metrics import Metrics


def test_counters_histogram_gauges() -> None:
    metrics = Metrics()
    metrics.add("qcompile_requests_total", path="/v1/models", status="200")
    metrics.add("qcompile_requests_total", path="/v1/models", status="200")
    metrics.first_token(0.03)
    lines = metrics.text(running=2).splitlines()
    assert 'qcompile_requests_total{path="/v1/models",status="200"} 2' in lines
    assert 'qcompile_first_token_seconds_bucket{le="0.025"} 0' in lines
    assert 'qcompile_first_token_seconds_bucket{le="+Inf"} 1' in lines
    assert "qcompile_running 2" in lines
