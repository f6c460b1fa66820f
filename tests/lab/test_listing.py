"""`narses list` leaves out no entry and no field, and says what is true of them."""

import dataclasses
import io
import math
import subprocess
import sys

import pytest
from rich.console import Console

from narses.datasets import DATASETS, Mnist
from narses.errors import ConfigError
from narses.models import MODELS
from narses.partition import PARTITIONS
from narses.rules import RULES, check
from narses_adversary.attacks import ATTACKS
from narses_lab import listing
from narses_lab.errors import OptionError
from narses_lab.listing import FILES, KINDS, SHAPES, USUAL, entries, first_sentence, show

REGISTRIES = {
    "rules": RULES,
    "attacks": ATTACKS,
    "models": MODELS,
    "datasets": DATASETS,
    "partitions": PARTITIONS,
}


def shown(kind, width=80, **options):
    out = io.StringIO()
    show(kind, Console(file=out, width=width, **options))
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_and_every_field_is_there(kind):
    found = {entry.name: entry for entry in entries(kind)}

    assert list(found) == list(REGISTRIES[kind])
    for name, cls in REGISTRIES[kind].items():
        assert [field.name for field in found[name].fields] == [field.name for field in dataclasses.fields(cls)]
        assert found[name].sentence[:-1] in " ".join(cls.__doc__.split())
        assert found[name].sentence.endswith(".")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [80, 160])
def test_it_is_printed_whole_within_the_width_and_without_trailing_blanks(kind, width):
    lines = shown(kind, width).splitlines()

    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    words = " ".join(" ".join(lines).split())
    assert "…" not in words
    for entry in entries(kind):
        assert any(line.startswith(f"{entry.name} ") for line in lines)
        if width == 160:
            for field in entry.fields:
                default = {"-": "optional", "required": "required"}.get(field.default, f"default {field.default}")
                assert f"{field.name} {field.type} {default}" in words


def test_a_terminal_gets_the_same_words():
    plain = " ".join(shown("rules").split())

    assert " ".join(shown("rules", force_terminal=True, color_system=None).split()) == plain


def test_types_and_defaults_are_in_the_words_of_a_configuration_file():
    fields = {
        (kind, entry.name, field.name): (field.type, field.default)
        for kind in KINDS
        for entry in entries(kind)
        for field in entry.fields
    }

    assert fields["rules", "krum", "p"] == ('number >= 1 or "inf"', "2.0")
    assert fields["rules", "krum", "power"] == ("1 or 2", "2")
    assert fields["rules", "bulyan", "inner"] == ("name or table", '"krum"')
    assert fields["rules", "multi-krum", "m"] == ("integer > 0", "-")
    assert fields["attacks", "alie", "z"] == ('number or "auto"', '"auto"')
    assert fields["attacks", "ipm", "epsilon"] == ("number", "required")
    assert fields["attacks", "label-flip", "classes"] == ("integer >= 2", "-")
    assert fields["models", "wrn-40-4", "dropout"] == ("number >= 0 and < 1", "0.0")
    assert fields["datasets", "mnist", "download"] == ("true or false", "false")
    assert fields["datasets", "synthetic", "shape"] == ("list of integer > 0", "-")
    assert fields["partitions", "dirichlet", "alpha"] == ("number > 0", "required")


def test_the_least_number_of_updates_is_the_one_that_the_rule_accepts():
    for entry in entries("rules"):
        needs = any(field.default == "required" for field in entry.fields)
        assert needs == ("least n for f = 1, 2, 3" not in entry.more)
        if needs:
            continue
        least = [int(word) for word in entry.more["least n for f = 1, 2, 3"].split(", ")]
        for f, n in enumerate(least, start=1):
            rule = RULES[entry.name]()
            check(rule, n, f)
            with pytest.raises(ConfigError):
                check(rule, n - 1, f)


def test_what_a_rule_claims_is_said():
    claims = {entry.name: entry.more["claims"] for entry in entries("rules")}
    assert claims["krum"] == "input-range, is-input, permutation, scaling, translation"
    assert claims["arc"] == "nothing"


def test_parameters_are_those_of_the_model_on_its_data_set():
    for entry in entries("models"):
        assert entry.name in USUAL
        shape, classes = SHAPES[USUAL[entry.name]]
        module = MODELS[entry.name]().build(shape, classes, 0)
        count = sum(math.prod(parameter.shape) for parameter in module.parameters())
        assert entry.more["parameters"] == f"{count:,} on {USUAL[entry.name]}"


def test_files_are_looked_for_and_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("NARSES_DATA_DIR", str(tmp_path))

    def files():
        return {entry.name: entry.more["files"] for entry in entries("datasets")}

    absent = files()
    assert absent["mnist"] == f"absent from {tmp_path}"
    assert absent["digits"] == absent["synthetic"] == "needs none"
    for name in FILES["mnist"][:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files()["mnist"] == f"absent from {tmp_path}"
    (tmp_path / FILES["mnist"][-1]).touch()
    assert files()["mnist"] == f"in {tmp_path}"
    assert set(FILES) == {name for name, source in DATASETS.items() if hasattr(source(), "download")}
    assert isinstance(DATASETS["mnist"](), Mnist)


def test_the_files_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100, MNIST

    assert {name.rpartition("/")[2] for name in FILES["mnist"]} == {
        url.rpartition("/")[2].removesuffix(".gz") for url, _ in MNIST.resources
    }
    for name, reader in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        parts = [part for part, _ in reader.train_list + reader.test_list] + [reader.meta["filename"]]
        assert sorted(FILES[name]) == sorted(f"{reader.base_folder}/{part}" for part in parts)


def test_attacks_say_what_they_attack_and_when_they_may():
    found = {entry.name: entry.more["attacks"] for entry in entries("attacks")}

    assert found["label-flip"] == "training data"
    assert found["alie"] == "updates"
    assert "start_round integer >= 0 default 0" in " ".join(shown("attacks").split())


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One. Two.", "One."),
        ("By Xie et al. Two", "By Xie et al. Two"),
        ("The value 0.5 of\n    it.\n\n    More.", "The value 0.5 of it."),
        ("No end", "No end"),
        ("", ""),
    ],
)
def test_the_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match="list colours: expected one of rules, attacks, models, datasets, partitions"):
        entries("colours")


def test_importing_it_does_not_import_torch():
    code = (
        f"import sys, {listing.__name__}, narses_lab.reporting; assert not {{'torch', 'matplotlib'}} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
