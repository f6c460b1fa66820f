"""server.toml and the program's command line: validated whole before anything starts, every mistake in one sentence."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narses import rules
from narses.errors import ConfigError
from narses_server import app
from narses_server.config import ServerConfig

LEGAL: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "insecure": True,
    "task": {"model": "softmax", "dataset": "digits", "batch": 16},
    "round": {"n": 12, "f": 2, "rule": "krum", "rounds": 5},
    "optimizer": {"learning_rate": 0.5},
}


def tree(*changes: tuple[str, Any]) -> dict[str, Any]:
    """LEGAL with dotted keys set, or removed where the value is `...`."""
    changed = copy.deepcopy(LEGAL)
    for key, value in changes:
        *sections, last = key.split(".")
        table = changed
        for section in sections:
            table = table.setdefault(section, {})
        if value is ...:
            del table[last]
        else:
            table[last] = value
    return changed


def test_the_smallest_configuration() -> None:
    config = ServerConfig.of(LEGAL)
    (run,) = config.resolved
    assert (run.name, run.task.partition, run.task.seed, run.evaluate) == ("run", {"name": "shards"}, 1, None)
    assert (run.round.quorum_required, run.round.deadline) == (12, 60.0)
    assert (run.round.absent, run.round.on_deadline) == ("refuse", "wait")
    assert run.round.built_rule == rules.Krum()


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "an unknown key": ("listne", "a:1", "unknown key listne (value 'a:1')"),
    "an unknown key in a section": ("round.quorom", 3, "unknown key round.quorom (value 3)"),
    "an unknown section": ("tls", {}, "unknown key tls (value {})"),
    "a wrong type": ("round.n", "twelve", "round.n = 'twelve': input should be a valid integer"),
    "a number as text": ("optimizer.learning_rate", "0.5", "optimizer.learning_rate = '0.5'"),
    "a value for a section": ("task", 3, "task = 3"),
    "no task": ("task", ..., "task is required"),
    "no rounds": ("round.rounds", ..., "round.rounds is required"),
    "zero rounds": ("round.rounds", 0, "round.rounds = 0"),
    "nobody": ("round.n", 0, "round.n = 0"),
    "too many": ("round.n", 4097, "round.n = 4097: input should be less than or equal to 4096"),
    "a negative f": ("round.f", -1, "round.f = -1"),
    "f over n": ("round.f", 13, "Krum: f = 13 Byzantine updates of n = 12, expected f <= n"),
    "f too large for n": (
        "round.f",
        5,
        "Krum with f = 5 needs n >= 13 updates but has n = 12: add 1 or declare f <= 4",
    ),
    "an unknown rule": ("round.rule", "krumm", "unknown rule 'krumm': expected one of arc, brute"),
    "an unknown field of a rule": (
        "round.rule",
        {"name": "krum", "q": 2},
        "rule 'krum': unknown key q (value 2)",
    ),
    "a rule without a name": ("round.rule", {"p": 2}, "rule: expected a table with a name"),
    "a rule of another type": ("round.rule", 3, "round.rule = 3"),
    "an absent import": ("round.rule", "no_such_module:Rule", "there is no module 'no_such_module' to import"),
    "an import that is no rule": ("round.rule", "pathlib:Path", "rule"),
    "an unknown model": ("task.model", "resnet", "unknown model 'resnet': expected one of cnn-l, cnn-s, ipm-cnn, mlp"),
    "an unknown field of a model": (
        "task.model",
        {"name": "mlp", "width": 3},
        "model 'mlp': unknown key width (value 3)",
    ),
    "an unknown data set": ("task.dataset", "imagenet", "unknown dataset 'imagenet': expected one of"),
    "an unknown field of a data set": ("task.dataset", {"name": "digits", "size": 3}, "unknown key size (value 3)"),
    "another partition": ("task.partition", "sorted", "unknown partition 'sorted'"),
    "no batch": ("task.batch", 0, "task.batch = 0"),
    "a negative seed": ("task.seed", -1, "task.seed = -1"),
    "a seed over 63 bits": ("task.seed", 2**63, "task.seed"),
    "tiny chunks": ("task.chunk_bytes", 100, "task.chunk_bytes = 100"),
    "huge chunks": ("task.chunk_bytes", 8 << 20, "task.chunk_bytes = 8388608"),
    "another digest": ("task.digest", "md5", "task.digest = 'md5': input should be 'blake3' or 'sha256'"),
    "a quorum over n": ("round.quorum", 13, "quorum = 13 is more than n = 12"),
    "a rule impossible at the quorum": (
        "round.quorum",
        6,
        "krum with f = 2 needs 7 updates, but a round may close with quorum = 6; raise the quorum, lower f, or set",
    ),
    "no deadline": ("round.deadline", 0.0, "round.deadline = 0.0"),
    "an infinite deadline": ("round.deadline", float("inf"), "round.deadline = inf"),
    "another policy": ("round.on_deadline", "retry", "round.on_deadline = 'retry'"),
    "no learning rate": ("optimizer.learning_rate", 0.0, "optimizer.learning_rate = 0.0"),
    "an infinite learning rate": ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate = inf"),
    "a learning rate that is none": ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate = nan"),
    "momentum 1": ("optimizer.momentum", 1.0, "optimizer.momentum = 1.0: input should be less than 1"),
    "negative l2": ("optimizer.l2", -0.1, "optimizer.l2 = -0.1"),
    "evaluation never": ("evaluate", {"every": 0}, "evaluate.every = 0"),
    "plaintext by accident": ("insecure", False, "set insecure = true"),
    "plaintext to everybody": ("listen", "0.0.0.0:50051", "set insecure_remote = true"),
    "no port": ("listen", "127.0.0.1", "address '127.0.0.1': expected host:port"),
    "a metrics address that is none": ("metrics", {"listen": "9100"}, "address '9100': expected host:port"),
    "a name that leaves the folder": ("name", "../../etc", "name"),
    "a name that is a path": ("name", "/etc", "name"),
    "an empty name": ("name", "", "name"),
    "two runs of one name": ("runs", [{"name": "a"}, {"name": "a"}], "names must differ, 'a' is there twice"),
    "runs without names": ("runs", [{}, {}], "names must differ, 'run' is there twice"),
    "an unknown key in a run": ("runs", [{"rounds": 3}], "runs[0]: unknown key rounds (value 3)"),
    "an impossible run": (
        "runs",
        [{"name": "a"}, {"name": "b", "round": {"n": 5}}],
        "runs[1]: round: Krum with f = 2 needs",
    ),
    "a run that is none": ("runs", [3], "runs.0 = 3"),
    "a device it does not know": ("device", "tpu", "device = 'tpu'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake(case: str) -> None:
    key, value, sentence = MISTAKES[case]
    with pytest.raises(ConfigError) as error:
        ServerConfig.of(tree((key, value)), "server.toml")
    assert str(error.value).startswith("server.toml: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("n", "f", "quorum", "legal"),
    [(11, 2, 9, True), (11, 2, 8, False), (7, 2, 5, True), (7, 2, 6, True), (7, 0, 6, False), (7, 1, 7, True)],
)
def test_a_quorum_where_absent_workers_count_as_liars(n: int, f: int, quorum: int, legal: bool) -> None:
    changed = tree(("round.n", n), ("round.f", f), ("round.quorum", quorum), ("round.absent", "byzantine"))
    if legal:
        ServerConfig.of(changed)
        return
    with pytest.raises(ConfigError, match=f"cannot spare the {n - quorum} updates that quorum = {quorum} of n = {n}"):
        ServerConfig.of(changed)


@given(
    rule=st.sampled_from(["mean", "median", "krum", "bulyan", "trimmed-mean"]),
    n=st.integers(1, 20),
    f=st.integers(0, 5),
    quorum=st.none() | st.integers(1, 20),
    absent=st.sampled_from(["refuse", "byzantine"]),
)
def test_no_legal_round_can_break_its_rules_precondition(
    rule: str, n: int, f: int, quorum: int | None, absent: str
) -> None:
    changed = tree(("round.rule", rule), ("round.n", n), ("round.f", f), ("round.absent", absent))
    if quorum is not None:
        changed["round"]["quorum"] = quorum
    try:
        round_ = ServerConfig.of(changed).resolved[0].round
    except ConfigError:
        return
    for present in range(round_.quorum_required, n + 1):
        given_f = f if absent == "refuse" else f - (n - present)
        assert given_f >= 0
        assert present >= round_.built_rule.min_updates(given_f)


def test_a_rule_without_slack_is_worth_a_warning() -> None:
    def warnings(*changes: tuple[str, Any]) -> list[str]:
        return ServerConfig.of(tree(*changes)).resolved[0].round.warnings()

    assert warnings() == []
    tight = [("round.n", 7), ("round.f", 2)]
    sentence = 'krum with f = 2 needs 7 of n = 7 updates: 1 silent workers stop this run under absent = "refuse"'
    assert warnings(*tight) == [sentence]
    assert warnings(*tight, ("round.absent", "byzantine")) == []


def test_runs_are_laid_over_the_base() -> None:
    runs = [
        {"name": "a"},
        {"name": "b", "task": {"seed": 5}, "round": {"rule": {"name": "mean"}, "f": 0}},
        {"name": "c/d", "task": {"model": {"name": "mlp", "hidden": 8}}, "evaluate": {"every": 2}},
    ]
    base = tree(
        ("runs", runs), ("task.model", {"name": "mlp", "hidden": 3}), ("round.rule", {"name": "krum", "p": 1.0})
    )
    a, b, c = ServerConfig.of(base).resolved
    assert (a.name, a.task.seed, a.round.rule, a.round.f) == ("a", 1, {"name": "krum", "p": 1.0}, 2)
    assert (b.task.seed, b.task.model, b.round.rule, b.round.f) == (
        5,
        {"name": "mlp", "hidden": 3},
        {"name": "mean"},
        0,
    )
    assert (c.name, c.task.model, c.task.batch) == ("c/d", {"name": "mlp", "hidden": 8}, 16)
    assert (a.evaluate, c.evaluate and c.evaluate.every) == (None, 2)


def test_paths() -> None:
    config = ServerConfig.of(tree(("output", "out"), ("data_dir", "data")))
    assert (config.output, config.data_dir) == (Path("out"), Path("data"))


# -- the program -----------------------------------------------------------------------------------------------------------

TOML = """
listen = "127.0.0.1:0"
insecure = true
[task]
model = "softmax"
dataset = "digits"
batch = 16
[round]
n = 12
f = 2
rule = "krum"
rounds = 5
[optimizer]
learning_rate = 0.5
"""


@pytest.fixture
def toml(tmp_path: Path) -> str:
    """A legal server.toml."""
    path = tmp_path / "server.toml"
    path.write_text(TOML)
    return str(path)


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["narses-server", *arguments])
    monkeypatch.setattr(app, "prepare", lambda config: None)  # the tests' own logs and threads stay as they are
    with pytest.raises(SystemExit) as end:
        app.main()
    return int(end.value.code or 0)


def test_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], toml: str) -> None:
    assert _main(monkeypatch, "--config", toml, "--check", "--set", "name=first") == 0
    assert capsys.readouterr() == ("ok: 1 run(s), first 'first'\n", "")


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["round.rule=krumm"], "unknown rule 'krumm'"),
        (["round.f=5"], "add 1 or declare f <= 4"),
        (["rounds=3"], "unknown key rounds (value 3)"),
        (["round.n=true"], "round.n = True"),
        (['task.dataset={ name = "mnist" }', "data_dir=nowhere"], "nowhere"),
        (["memory_limit_bytes=1000"], "more than memory_limit_bytes (0 MB); use fewer workers or a smaller model"),
        (["device=cuda"], "device 'cuda': torch finds no CUDA device here"),
        (["task.model=cnn-s", "task.dataset=digits"], "cnn-s"),
    ],
)
def test_what_a_user_can_do_wrong_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    toml: str,
    assignments: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sets = [item for assignment in [*assignments, "evaluate.every=1"] for item in ("--set", assignment)]
    assert _main(monkeypatch, "--config", toml, *sets) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
