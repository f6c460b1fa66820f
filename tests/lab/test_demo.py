"""The demo's plan: what it will run is what it says, and the daemons accept it."""

import subprocess
import sys
import tomllib

import pytest

from narses import rules
from narses_adversary.config import AdversaryConfig, ProxyConfig
from narses_lab import demo
from narses_lab.demo import ATTACKS, ROBUST, RULES, Cell, Demo
from narses_lab.toml import dumps
from narses_server.config import ServerConfig
from narses_worker.config import WorkerConfig, parse_ids


def read_back(tree):
    return tomllib.loads(dumps(tree))


def test_every_rule_meets_every_attack_with_every_seed_once():
    cells = list(Demo(seeds=3).cells())

    assert len(cells) == len(set(cells)) == 4 * 3 * 3
    assert {(c.rule, c.attack, c.seed) for c in cells} == {(r, a, s) for r in RULES for a in ATTACKS for s in (1, 2, 3)}
    assert cells[0] == Cell("mean", "none", 1)
    assert {c.seed for c in cells[:12]} == {1}  # a whole table before the next seed


def test_the_server_resolves_every_cell():
    config = ServerConfig.of(read_back(Demo(seeds=2, rounds=7).server()))

    assert [run.name for run in config.resolved] == [cell.name for cell in Demo(seeds=2).cells()]
    for run, cell in zip(config.resolved, Demo(seeds=2).cells(), strict=True):
        assert (run.round.rule["name"], run.task.seed) == (cell.rule, cell.seed)
        assert (run.round.n, run.round.f, run.round.rounds) == (15, 3, 7)
        assert run.evaluate is not None
        assert run.evaluate.every <= 7


def test_bulyan_has_exactly_as_many_workers_as_it_needs():
    assert rules.make("bulyan").min_updates(demo.BYZANTINE) == demo.WORKERS


def test_every_worker_is_hosted_once_and_the_adversary_hosts_the_declared_number():
    hosted = [i for ids in (*demo.HONEST.values(), demo.ADVERSARY) for i in parse_ids(ids)]

    assert sorted(hosted) == list(range(demo.WORKERS))
    assert parse_ids(demo.ADVERSARY) == tuple(demo.ADVERSARY_IDS)
    assert len(demo.ADVERSARY_IDS) == demo.BYZANTINE


@pytest.mark.parametrize("name", demo.HONEST)
def test_the_honest_daemons_know_only_the_address_they_are_given(name):
    config = WorkerConfig.of(read_back(demo.worker(name, "127.0.0.1:1234")))

    assert config.server == "127.0.0.1:1234"
    assert config.workers == parse_ids(demo.HONEST[name])


def test_each_run_is_attacked_by_the_one_that_its_name_tells():
    adversary = AdversaryConfig.of(read_back(demo.adversary("127.0.0.1:1234")))
    proxy = ProxyConfig.of(read_back(demo.proxy("127.0.0.1:1234")))

    for cell in Demo().cells():
        plans = {"adversary": adversary.plan_for(cell.name), "proxy": proxy.plan_for(cell.name)}
        mounted = {daemon: plan.name for daemon, plan in plans.items() if plan is not None}
        assert mounted == ({} if cell.attack == "none" else {ATTACKS[cell.attack].daemon: cell.attack})


def test_the_attacks_have_the_strengths_of_their_papers_and_three_liars():
    alie = AdversaryConfig.of(demo.adversary("127.0.0.1:1234")).plan_for("krum/alie/seed-1")
    ipm = ProxyConfig.of(demo.proxy("127.0.0.1:1234")).plan_for("krum/ipm/seed-1")

    assert alie.attack.z == 1.5
    assert ipm.attack.epsilon == 10.0
    assert len(alie.members_of(0, demo.ADVERSARY_IDS, len(demo.ADVERSARY_IDS), 1)) == demo.BYZANTINE
    rounds = [ipm.members_of(t, range(12), demo.BYZANTINE, 1) for t in range(20)]
    assert {len(members) for members in rounds} == {demo.BYZANTINE}
    assert len(set(rounds)) > 10


def test_the_margins_are_those_that_were_promised():
    assert demo.COLLAPSE_POINTS == 20.0
    assert demo.CLOSE_POINTS == 5.0
    assert ROBUST == ("median", "krum", "bulyan")


def test_the_command_starts_without_pytorch_or_matplotlib():
    # two seconds on each of two cores, during which no daemon would be starting
    code = "import sys, narses_lab.app; print(sorted({'torch', 'narses', 'matplotlib', 'numpy'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)

    assert done.stdout.strip() == "[]"
