"""The one list of metrics, as data. Code sets what stands here, docs/metrics.md is made from it, tests compare.

    python -m narses.observe.catalogue > docs/metrics.md

Labels are closed: a peer never chooses a label value, else it could create series without end.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]
Role = Literal["server", "worker", "adversary", "proxy"]
ROLES: tuple[Role, ...] = ("server", "worker", "adversary", "proxy")

# 14 steps from 1 ms to 60 s, enough to tell a fast pull from a round that runs into its deadline
LATENCY_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0, 10.0, 30.0, 60.0)

SERVICE = "narses.rpc.v1.ParameterServerService"
OTHER = "other"
METHODS = (*(f"{SERVICE}/{rpc}" for rpc in ("Join", "Pull", "Push", "Leave")), OTHER)
STATUSES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED"),
    *("INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
# lower case of the refusal reasons in narses.rpc.status
REASONS = (
    *("unknown_run", "unknown_worker", "no_session", "wrong_round", "round_not_open", "conflicting_push"),
    *("wrong_length", "wrong_dtype", "wrong_base", "non_finite", "checksum", "too_large", "protocol", "incomplete"),
    *("superseded", "draining", "overloaded", "internal"),
)
PUSH_OUTCOMES = ("accepted", "rejected", "late", "duplicate")
RPCS = ("join", "pull", "push", "leave")
TRANSFERS = ("pull", "push")
SIDES = ("downstream", "upstream")
UNKNOWN = "unknown"  # the `worker` of everything that is not on the roster

Labels = Mapping[str, tuple[str, ...] | None]


@dataclass(frozen=True)
class Metric:
    """One metric family.

    labels: name -> every allowed value, or None where the values come from this process's own roster or configuration
    (Metrics.declare; for kind "info" whatever our own code sets). help: what it means and when to worry.
    preset: all label combinations are exported as zero from the start; false where that makes hundreds of series.
    """

    name: str
    kind: Kind
    help: str
    roles: tuple[Role, ...]
    labels: Labels = field(default_factory=dict)
    preset: bool = True


def _all_roles() -> tuple[Metric, ...]:
    served: tuple[Role, ...] = ("server", "proxy")
    calling: tuple[Role, ...] = ("worker", "adversary", "proxy")
    return (
        Metric(
            "narses_build_info",
            "info",
            "What runs here, always 1; worry when replicas of one deployment disagree.",
            ROLES,
            {"version": None, "revision": None, "python": None, "torch": None},
        ),
        Metric(
            "narses_event_loop_lag_seconds",
            "histogram",
            "How much later than due the event loop ran a callback, sampled at a fixed rate; worry when p99 passes "
            "0.1 s: something blocks the loop. About 1 ms is the timer's own resolution.",
            ROLES,
        ),
        Metric(
            "grpc_server_call_started_total",
            "counter",
            "RPCs received, finished or not (gRFC A66); worry when method `other` grows: somebody probes.",
            served,
            {"grpc_method": METHODS},
        ),
        Metric(
            "grpc_server_call_duration_seconds",
            "histogram",
            "Time from the start of an RPC's handler to its end (gRFC A66), so Join lasts as long as its session and "
            "Pull as its long poll; worry at any INTERNAL: that is our bug. A series appears with its first call.",
            served,
            {"grpc_method": METHODS, "grpc_status": STATUSES},
            preset=False,
        ),
        Metric(
            "grpc_client_attempt_started_total",
            "counter",
            "RPC attempts made, retries included (gRFC A66); worry when it outruns the rounds.",
            calling,
            {"grpc_method": METHODS},
        ),
        Metric(
            "grpc_client_attempt_duration_seconds",
            "histogram",
            "Time from the start of an RPC attempt to its status (gRFC A66); worry at UNAVAILABLE and "
            "DEADLINE_EXCEEDED. A series appears with its first call.",
            calling,
            {"grpc_method": METHODS, "grpc_status": STATUSES},
            preset=False,
        ),
    )


def _server() -> tuple[Metric, ...]:
    def metric(name: str, kind: Kind, help_: str, **labels: tuple[str, ...] | None) -> Metric:
        return Metric(f"narses_server_{name}", kind, help_, ("server",), labels)

    return (
        metric("config_info", "info", "The aggregation rule in force, always 1.", rule=None),
        metric(
            "runs_total",
            "counter",
            "Training runs that ended; worry at any `failed`.",
            outcome=("completed", "failed"),
        ),
        metric("round", "gauge", "The current round, counted from 0; worry when it stands still while workers push."),
        metric(
            "rounds_total",
            "counter",
            "Rounds closed; quorum_timeout: the deadline passed with too few updates and the round closed without a "
            "step; worry when anything but `completed` grows.",
            outcome=("completed", "quorum_timeout", "failed"),
        ),
        metric(
            "round_duration_seconds",
            "histogram",
            "Time from opening a round to publishing the next parameters; worry when it nears the round's deadline.",
        ),
        metric(
            "round_phase_duration_seconds",
            "histogram",
            "Where a round's time goes; worry when `collect` is not the longest: the server has become the bottleneck.",
            phase=("publish", "collect", "aggregate", "apply", "checkpoint", "evaluate"),
        ),
        metric(
            "round_last_completed_timestamp_seconds",
            "gauge",
            "Unix time when the last round completed, 0 before the first; worry when time() minus it passes the "
            "deadline.",
        ),
        metric(
            "round_participants",
            "gauge",
            "Updates that entered the last aggregate; worry when it is below the number of registered workers.",
        ),
        metric("quorum_required", "gauge", "Updates a round needs before it may close at its deadline."),
        metric(
            "byzantine_workers_assumed",
            "gauge",
            "f, the declared number of liars to survive; more real ones than this void every guarantee.",
        ),
        metric(
            "workers",
            "gauge",
            "Logical workers on the roster and those with an open session; worry when connected is below the quorum.",
            state=("registered", "connected"),
        ),
        metric(
            "pulls_total",
            "counter",
            "Pulls answered; not_modified: the long poll ran out before a new round; worry when `denied` grows.",
            outcome=("ok", "not_modified", "denied"),
        ),
        metric(
            "pushes_total",
            "counter",
            "Updates by their verdict, counted when it is given; late: for a round already closed; worry when the "
            "share of `accepted` falls.",
            outcome=PUSH_OUTCOMES,
        ),
        metric(
            "pushes_rejected_total",
            "counter",
            "Why updates were not accepted (outcomes `rejected` and `late`); worry at conflicting_push, non_finite and "
            "checksum: a worker lies or a link corrupts.",
            reason=REASONS,
        ),
        metric("received_bytes_total", "counter", "Payload bytes received, without framing.", rpc=TRANSFERS),
        metric("sent_bytes_total", "counter", "Payload bytes sent, without framing.", rpc=TRANSFERS),
        metric(
            "requests_in_progress",
            "gauge",
            "RPCs being served now; `join` is the number of open sessions; worry when one never returns to rest.",
            rpc=RPCS,
        ),
        metric(
            "update_buffer_bytes",
            "gauge",
            "Memory that the current round's updates hold; worry when it nears "
            "narses_server_update_buffer_limit_bytes.",
        ),
        metric("update_buffer_limit_bytes", "gauge", "The budget for update memory; beyond it pushes are refused."),
        metric(
            "aggregation_duration_seconds",
            "histogram",
            "Time the rule took; worry when it nears the round's duration.",
            rule=None,
        ),
        metric(
            "aggregation_selected_workers",
            "gauge",
            "Updates that the rule kept in the last round (all of them for rules that weigh every row).",
        ),
        metric(
            "aggregate_norm",
            "gauge",
            "Euclidean norm of the last aggregate; worry when it jumps or sticks near 0.",
        ),
        metric(
            "worker_distance_ratio",
            "gauge",
            "Distance of the worker's last update to the aggregate over the median of all such distances ([diagnostics]); "
            "about 1 is normal, worry at several times that, and at exact copies of somebody else's value.",
            worker=None,
        ),
        metric(
            "worker_norm_ratio",
            "gauge",
            "Norm of the worker's last update over the median of all norms ([diagnostics]); about 1 is normal.",
            worker=None,
        ),
        metric(
            "worker_cosine",
            "gauge",
            "Cosine between the worker's last update and the aggregate ([diagnostics]); worry when one worker's stays "
            "below 0 while the others' do not.",
            worker=None,
        ),
        metric(
            "resilience_inner_product_ratio",
            "gauge",
            "Inner product of the aggregate and g over g's own square ([diagnostics]), where g is the mean of the honest "
            "updates if the configuration knows who lies (`honest_oracle`), else of the updates nearest the aggregate "
            "(`estimate`); (alpha, f)-resilience wants its mean at 1 - sin alpha or more, worry at 0 or below.",
            reference=("honest_oracle", "estimate"),
        ),
        metric(
            "resilience_angle_radians",
            "gauge",
            "Angle between the aggregate and g, as above; worry at pi / 2: the step is no descent.",
            reference=("honest_oracle", "estimate"),
        ),
        metric(
            "gradient_deviation_ratio",
            "gauge",
            "Root mean square distance of the updates to g over the norm of g ([diagnostics]): how noisy they are beside what "
            "they agree on; grows late in training.",
        ),
        metric(
            "resilience_sin_alpha_bound",
            "gauge",
            "The deviation ratio over what the rule's theorem allows ([diagnostics]; 0 where no bound is known); at 1 or above "
            "nothing is guaranteed, which is usual in practice.",
        ),
        metric(
            "worker_pushes_total",
            "counter",
            "Verdicts per logical worker of the roster; `unknown` is everybody else; worry when one worker's verdicts "
            "differ from the others'.",
            worker=None,
            outcome=PUSH_OUTCOMES,
        ),
        metric(
            "worker_last_push_timestamp_seconds",
            "gauge",
            "Unix time of a worker's last accepted update, 0 if there was none; worry when it falls behind the others.",
            worker=None,
        ),
        metric(
            "worker_push_lag_seconds",
            "gauge",
            "How long after the round opened a worker's last accepted update arrived; worry about the slowest: it "
            "sets the pace.",
            worker=None,
        ),
        metric(
            "worker_considered_total", "counter", "Rounds in which the rule was given the worker's update.", worker=None
        ),
        metric(
            "worker_selected_total",
            "counter",
            "Rounds in which the rule kept the worker's update; its rate over that of considered estimates how often "
            "the worker is believed: low is a hint of a liar or of unusual data, not a proof.",
            worker=None,
        ),
        metric(
            "model_test_accuracy_ratio",
            "gauge",
            "Share of the server's test data classified rightly at the last evaluation (an estimate from that sample; "
            "0 before the first); worry when it falls.",
        ),
        metric(
            "model_test_loss",
            "gauge",
            "Mean loss on the server's test data at the last evaluation (an estimate from that sample; 0 before the "
            "first); worry when it rises or is not finite.",
        ),
        metric(
            "model_evaluated_timestamp_seconds",
            "gauge",
            "Unix time of the last evaluation, 0 before the first; worry when it is old: accuracy and loss are as old.",
        ),
        metric(
            "checkpoint_writes_total",
            "counter",
            "Checkpoints by outcome; worry at any `failed`: the run has stopped because its state cannot be made durable.",
            outcome=("ok", "failed"),
        ),
        metric(
            "checkpoint_duration_seconds",
            "histogram",
            "Time to make one checkpoint durable, fsync included; worry when it rivals the round's duration.",
        ),
        metric(
            "checkpoint_last_success_timestamp_seconds",
            "gauge",
            "Unix time of the last durable checkpoint, 0 if there is none; worry when it is older than a few rounds.",
        ),
        metric("checkpoint_size_bytes", "gauge", "Bytes of the last checkpoint."),
        metric("checkpoint_round", "gauge", "The last round that a restarted server would not play again."),
        metric("learning_rate", "gauge", "The learning rate of the current round."),
        metric("model_parameters", "gauge", "D, the number of parameters in the flat vector."),
    )


def _worker() -> tuple[Metric, ...]:
    def metric(name: str, kind: Kind, help_: str, **labels: tuple[str, ...] | None) -> Metric:
        # an adversary daemon runs the worker's own trainer and client
        return Metric(f"narses_worker_{name}", kind, help_, ("worker", "adversary"), labels)

    return (
        metric("round", "gauge", "The round of the last parameters pulled; worry when it trails the server's."),
        metric(
            "rounds_total",
            "counter",
            "Updates of this daemon's logical workers by how they ended; worry when anything but `pushed` grows.",
            outcome=("pushed", "rejected", "late", "failed"),
        ),
        metric(
            "step_duration_seconds",
            "histogram",
            "Where this daemon's time goes, once per round; worry when `push` or `pull` rivals `compute`.",
            phase=("pull", "compute", "encode", "push"),
        ),
        metric(
            "rpc_retries_total",
            "counter",
            "RPCs tried again, by what went wrong; worry when it keeps growing.",
            rpc=RPCS,
            reason=("unreachable", "deadline", "session_lost", "refused", "damaged"),
        ),
        metric("sent_bytes_total", "counter", "Payload bytes sent, without framing.", rpc=TRANSFERS),
        metric("received_bytes_total", "counter", "Payload bytes received, without framing.", rpc=TRANSFERS),
        metric(
            "train_loss",
            "gauge",
            "Mean loss over this daemon's last batches (an estimate from those batches); worry when it is not finite.",
        ),
        metric(
            "gradient_norm",
            "gauge",
            "Mean Euclidean norm of this daemon's last honest updates; worry when it is 0 or not finite.",
        ),
        metric("samples_total", "counter", "Training samples used; worry when it stops."),
        metric(
            "model_staleness_rounds",
            "gauge",
            "Rounds the server had moved on when the last verdict came; worry when above 0: this daemon is too slow.",
        ),
        metric("connected", "gauge", "Logical workers of this daemon with an open session; worry at 0."),
        metric(
            "last_accepted_timestamp_seconds",
            "gauge",
            "Unix time when the server last accepted an update, 0 if never; worry when it is older than a round.",
        ),
    )


def _adversary() -> tuple[Metric, ...]:
    def metric(name: str, kind: Kind, help_: str, **labels: tuple[str, ...] | None) -> Metric:
        return Metric(f"narses_adversary_{name}", kind, help_, ("adversary",), labels)

    return (
        metric("info", "info", "The attack this daemon runs, always 1.", attack=None),
        metric("active", "gauge", "1 while the attack's rounds last, else 0."),
        metric(
            "updates_total",
            "counter",
            "Forged updates by verdict; many `accepted` is a success of the attack only if the rule also kept them.",
            attack=None,
            outcome=("accepted", "rejected", "late"),
        ),
        metric("forge_duration_seconds", "histogram", "Time to craft one round's forged updates.", attack=None),
        metric("strength", "gauge", "The attack's factor in the last round (ALIE's z, IPM's epsilon, ...)."),
        metric("observed_updates", "gauge", "Updates seen before crafting; fewer than expected weakens the attack."),
        metric("colluders", "gauge", "Logical workers that this daemon lies for."),
        metric(
            "forged_distance_ratio",
            "gauge",
            "Distance of the forged update from the observed mean over the median distance of the observed ones (an "
            "estimate from what was seen); about 1 is hard to tell from honest.",
        ),
    )


def _proxy() -> tuple[Metric, ...]:
    def metric(name: str, kind: Kind, help_: str, **labels: tuple[str, ...] | None) -> Metric:
        return Metric(f"narses_proxy_{name}", kind, help_, ("proxy",), labels)

    return (
        metric(
            "connections",
            "gauge",
            "Sessions held on each side; worry when they differ.",
            side=SIDES,
        ),
        metric(
            "messages_total",
            "counter",
            "What became of intercepted messages; `forwarded` is untouched.",
            rpc=RPCS,
            action=("forwarded", "rewritten", "dropped", "delayed", "replayed", "duplicated"),
        ),
        metric(
            "rewritten_outcomes_total",
            "counter",
            "Verdicts on rewritten updates; rejected ones mean that the server noticed.",
            outcome=("accepted", "rejected"),
        ),
        metric("rewrite_duration_seconds", "histogram", "Time to craft one round's rewritten updates.", attack=None),
        metric(
            "received_bytes_total",
            "counter",
            "Payload bytes received, by where they go.",
            direction=SIDES,
        ),
        metric("sent_bytes_total", "counter", "Payload bytes sent, by where they go.", direction=SIDES),
        metric(
            "injected_delay_seconds", "histogram", "How long updates were held back; worry near the round's deadline."
        ),
        metric(
            "upstream_failures_total", "counter", "RPCs that failed between proxy and server.", grpc_status=STATUSES[1:]
        ),
    )


CATALOGUE: tuple[Metric, ...] = (*_all_roles(), *_server(), *_worker(), *_adversary(), *_proxy())


def of_role(role: Role) -> tuple[Metric, ...]:
    """The metrics that a daemon of `role` exports, in catalogue order."""
    return tuple(metric for metric in CATALOGUE if role in metric.roles)


def _row(metric: Metric) -> str:
    labels = []
    for label, values in metric.labels.items():
        if label in ("grpc_method", "grpc_status") or values is None:
            labels.append(f"`{label}`")
        else:
            labels.append(f"`{label}` = {', '.join(values)}")
    return (
        f"| `{metric.name}` | {metric.kind} | {'; '.join(labels) or '-'} | {', '.join(metric.roles)} | {metric.help} |"
    )


def markdown() -> str:
    """docs/metrics.md, whole."""
    return "\n".join(
        [
            "# Metrics",
            "",
            "Made from `narses.observe.catalogue` by `python -m narses.observe.catalogue > docs/metrics.md`; do not "
            "edit.",
            "",
            f"Every daemon also exports `process_*` and `python_gc_*`. Histograms of durations have buckets at "
            f"{', '.join(f'{edge:g}' for edge in LATENCY_SECONDS)} s.",
            "",
            f"`grpc_method` is one of {', '.join(f'`{method}`' for method in METHODS)}; `grpc_status` is a canonical "
            f"status name. `worker` comes from the server's own roster (or is `{UNKNOWN}`), `rule` and `attack` from "
            "the daemon's own configuration, the labels of an info metric from the daemon itself: a peer never "
            "chooses a label value.",
            "",
            "| name | type | labels | roles | meaning |",
            "|---|---|---|---|---|",
            *map(_row, CATALOGUE),
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(markdown())
