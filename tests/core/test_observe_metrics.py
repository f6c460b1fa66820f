from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from narses.errors import ConfigError
from narses.observe.catalogue import CATALOGUE, REASONS, ROLES, Role, of_role
from narses.observe.metrics import MAX_WORKER_SERIES, Metrics


def exported(metrics: Metrics) -> dict[str, str]:
    """family -> type, as Prometheus reads them."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {family.name: family.type for family in families}


def series(metrics: Metrics, prefixes: Iterable[str] = ("narses_", "grpc_")) -> list[str]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return [line for line in lines if line.startswith(tuple(prefixes))]


@pytest.mark.parametrize("role", ROLES)
def test_a_role_exports_its_catalogue_and_nothing_else(role: Role) -> None:
    kinds = {"info": "gauge"}
    expected = {metric.name.removesuffix("_total"): kinds.get(metric.kind, metric.kind) for metric in of_role(role)}

    found = exported(Metrics(role))

    assert {name: kind for name, kind in found.items() if name.startswith(("narses_", "grpc_"))} == expected
    assert {"process_resident_memory_bytes", "python_gc_collections"} <= found.keys()


def test_closed_labels_start_at_zero() -> None:
    metrics = Metrics("server")

    for reason in REASONS:
        assert metrics.registry.get_sample_value("narses_server_pushes_rejected_total", {"reason": reason}) == 0
    assert metrics.registry.get_sample_value("narses_server_workers", {"state": "connected"}) == 0


def test_a_roster_starts_at_zero_and_the_unknown_are_counted() -> None:
    metrics = Metrics("server")

    metrics.declare("worker", range(3))

    value = metrics.registry.get_sample_value
    assert value("narses_server_worker_pushes_total", {"worker": "2", "outcome": "late"}) == 0
    assert value("narses_server_worker_push_lag_seconds", {"worker": "2"}) == 0
    assert value("narses_server_worker_pushes_total", {"worker": "unknown", "outcome": "rejected"}) == 0
    assert value("narses_server_worker_push_lag_seconds", {"worker": "unknown"}) is None
    assert (metrics.worker(2), metrics.worker("3"), metrics.worker(-1)) == ("2", "unknown", "unknown")

    metrics.inc("narses_server_worker_pushes_total", worker=metrics.worker(99), outcome="rejected")
    metrics.set("narses_server_worker_push_lag_seconds", 5.0, worker=metrics.worker(99))

    assert value("narses_server_worker_pushes_total", {"worker": "unknown", "outcome": "rejected"}) == 1
    assert value("narses_server_worker_push_lag_seconds", {"worker": "unknown"}) is None


def test_the_number_of_series_stays_within_its_budget() -> None:
    metrics = Metrics("server")
    metrics.declare("rule", ["krum"])
    without = len(series(metrics))

    metrics.declare("worker", range(10))

    assert without <= 450
    assert len(series(metrics)) - without <= 14 * 10

    metrics.declare("worker", range(10_000))
    assert len(series(metrics)) - without <= 14 * MAX_WORKER_SERIES
    assert metrics.worker(9_999) == "unknown"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: m.inc("narses_server_rounds_total", outcome="won"), "'won' is not an allowed value"),
        (lambda m: m.inc("narses_server_worker_considered_total", worker="7"), "'7' is not an allowed value"),
        (lambda m: m.observe("narses_server_aggregation_duration_seconds", 1.0, rule="krum"), "'krum'"),
        (lambda m: m.inc("narses_server_rounds_total"), "has the labels"),
        (lambda m: m.set("narses_server_round", 1, worker="1"), "has the labels"),
        (lambda m: m.set("narses_server_rounds_total", 1, outcome="failed"), "is a counter, used as a gauge"),
        (lambda m: m.observe("narses_server_round", 1), "is a gauge"),
        (lambda m: m.inc("narses_server_rounds", outcome="failed"), "no metric"),
        (lambda m: m.inc("narses_worker_samples_total"), "no metric"),
        (lambda m: m.inc("narses_server_rounds_total", -1, outcome="failed"), "non-negative"),
        (lambda m: m.declare("outcome", ["won"]), "open label"),
        (lambda m: m.declare("attack", ["alie"]), "open label"),
    ],
)
def test_what_the_catalogue_does_not_allow_raises(call, told) -> None:  # type: ignore[no-untyped-def]
    metrics = Metrics("server")

    with pytest.raises(ValueError, match=told):
        call(metrics)


def test_typed_access_reaches_the_series() -> None:
    registry = CollectorRegistry()
    metrics = Metrics("server", registry)
    metrics.declare("rule", ["krum"])

    metrics.inc("narses_server_rounds_total", outcome="completed")
    metrics.inc("narses_server_rounds_total", 2, outcome="completed")
    metrics.inc("narses_server_requests_in_progress", rpc="push")
    metrics.inc("narses_server_requests_in_progress", -1, rpc="push")
    metrics.set("narses_server_round", 7)
    metrics.observe("narses_server_aggregation_duration_seconds", 0.02, rule="krum")
    with metrics.timed("narses_server_round_phase_duration_seconds", phase="apply"):
        pass
    metrics.info("narses_server_config_info", rule="krum")
    metrics.info("narses_server_config_info", rule="bulyan(krum)")

    value = registry.get_sample_value
    assert value("narses_server_rounds_total", {"outcome": "completed"}) == 3
    assert value("narses_server_requests_in_progress", {"rpc": "push"}) == 0
    assert value("narses_server_round") == 7
    assert value("narses_server_aggregation_duration_seconds_bucket", {"rule": "krum", "le": "0.025"}) == 1
    assert value("narses_server_aggregation_duration_seconds_bucket", {"rule": "krum", "le": "0.01"}) == 0
    assert value("narses_server_round_phase_duration_seconds_count", {"phase": "apply"}) == 1
    assert value("narses_server_config_info", {"rule": "bulyan(krum)"}) == 1
    assert value("narses_server_config_info", {"rule": "krum"}) is None


def test_two_daemons_in_one_process_do_not_share() -> None:
    one, other = Metrics("server"), Metrics("server")

    one.set("narses_server_round", 3)

    assert other.registry.get_sample_value("narses_server_round") == 0


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_serve_answers_scrapes_until_stopped(host: str) -> None:
    if host == "::1":
        try:
            socket.create_server((host, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
    metrics = Metrics("worker")
    stop, port = metrics.serve(host, 0)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    try:
        metrics.set("narses_worker_round", 12)
        assert "\nnarses_worker_round 12.0\n" in get(url)
    finally:
        stop()
    with pytest.raises(OSError):
        get(url)


def test_an_occupied_port_is_a_configuration_error() -> None:
    stop, port = Metrics("worker").serve("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} cannot be used .*: choose another"):
            Metrics("worker").serve("127.0.0.1", port)
    finally:
        stop()


def test_every_metric_can_be_used_by_its_roles() -> None:
    for metric in CATALOGUE:
        for role in metric.roles:
            metrics = Metrics(role)
            labels = {label: "1" if values is None else values[-1] for label, values in metric.labels.items()}
            if metric.kind != "info":
                for label, values in metric.labels.items():
                    if values is None:
                        metrics.declare(label, ["1"])
            match metric.kind:
                case "counter":
                    metrics.inc(metric.name, **labels)
                case "gauge":
                    metrics.set(metric.name, 1, **labels)
                case "histogram":
                    metrics.observe(metric.name, 1, **labels)
                case "info":
                    metrics.info(metric.name, **labels)
            sample = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
            assert metrics.registry.get_sample_value(sample, labels) == 1
