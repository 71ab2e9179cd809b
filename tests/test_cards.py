"""Cards and headers: every field is checked by its name, and the header decides a model's shape."""

import copy
import hashlib
import json
import random
import re
import shutil
from dataclasses import dataclass, field, replace

import pytest
import ship_weights
import torch

from t2ilearn import weights
from t2ilearn.weights import Card, Leg, Weights, WeightsError, make_config, read_card
from t2ilearn.weights.card import SCHEMA, configs_of

CARDS = [
    *(weights.ASSETS / f"{name}.json" for name in weights.available()),
    *sorted(weights.ASSETS.glob("flights/*/card.json")),
]
SMALL = ("prior-tiny", "vqgan-tiny", "vqvae-tiny", "reader")  # each under 1.4 MiB


@dataclass(frozen=True)
class TinyConfig:
    """A config with a field of every kind that a card can hold."""

    channels: tuple[int, ...] = (8, 16)
    size: tuple[int, float] = (3, 0.5)
    heads: int = 2
    rate: float = 0.5
    cosine: bool = True
    name: str = "ema"
    limit: int | None = None

    def __post_init__(self):
        if self.heads < 1:
            raise ValueError(f"heads must be at least 1, not {self.heads}.")


@pytest.fixture
def card():
    """A card of weights that do not exist."""
    leg = Leg("t2ilearn train vqvae --preset tiny", 3, 0.5, "x86_64 CPU, 1 thread", "no")
    return Card(
        name="tiny",
        stage="vqvae",
        preset="tiny",
        configs=configs_of(TinyConfig()),
        data={"world": "tiny-shapes", "split": "train", "seed": 0},
        settings={"steps": 3, "loss": {"gan_loss": "hinge", "adaptive": True}},
        legs=(leg, replace(leg, steps=4, minutes=1.25, started_from="0" * 64)),
        parameters=2,
        parents={"reader": "a" * 64},
        tokenizer={"file": "tokenizer.json", "length": 28, "sha256": "b" * 64},
        metrics={
            "perplexity": 189.0,
            "share": {"value": 0.99, "half_width": 0.0045},
            "distance": {"value": 3.8, "low": 3.1, "high": 4.6},
            "by style": {"flat": 1.5, "judge": "emoji-judge"},
        },
        bars={"share": {"bar": 0.95, "measured": 0.99, "met": True}},
    )


@pytest.fixture
def values(card):
    """The same card as JSON values, as its file holds them."""
    return {**card.to_json(), "sha256": "c" * 64}


@pytest.fixture
def saved(card, tmp_path):
    """The path of weights with this card."""
    return weights.save(tmp_path, card, {"x": torch.ones(2)})


def edit(path, change):
    """Change the card beside a weights' file in place."""
    file = path.with_suffix(".json")
    facts = json.loads(file.read_text(encoding="utf-8"))
    change(facts)
    file.write_text(json.dumps(facts), encoding="utf-8")


def with_header(path, header):
    """Replace the header's own facts, and make the card agree with the new file's SHA-256."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    entries.pop("__metadata__")
    if header is not None:
        text = header if isinstance(header, str) else json.dumps(header)
        entries = {"__metadata__": {"t2ilearn": text}, **entries}
    text = json.dumps(entries).encode()
    data = len(text).to_bytes(8, "little") + text + data[end:]
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(path, lambda facts: facts.update(sha256=digest))


# ---------------------------------------------------------------- what ships


@pytest.mark.parametrize("path", CARDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_cards_are_of_todays_schema_and_keep_every_field(path):
    shipped = read_card(path)
    assert shipped.to_json() == json.loads(path.read_text(encoding="utf-8"))
    assert shipped.schema == SCHEMA and shipped.steps > 0 and shipped.minutes > 0
    assert shipped.command.startswith(f"t2ilearn train {shipped.stage} --preset {shipped.preset}")
    assert shipped.metrics and all(weights.figure(value) for value in shipped.metrics.values())
    assert shipped.settings["seed"] == shipped.data["seed"]


def test_shipped_parents_are_the_weights_that_ship():
    by_digest = {weights.load(name).card.sha256: name for name in weights.available()}
    parents = {
        path.stem if path.parent == weights.ASSETS else path.parent.name: {
            role: by_digest[digest] for role, digest in read_card(path).parents.items()
        }
        for path in CARDS
    }
    perceptual = {"reader": "reader"}
    assert {name: roles for name, roles in parents.items() if roles} == {
        "prior-tiny": {"vqvae": "vqvae-tiny"},
        "prior-book": {"vqvae": "vqvae-book"},
        "vqgan-prior-book": {"vqgan": "vqgan-book"},
        "dalle-book": {"vqgan": "vqgan-book"},
        "dalle-dvae-book": {"dvae": "dvae-book"},
        "vqgan-tiny": perceptual,
        "vqgan-book": perceptual,
        "vqgan-no-discriminator-tiny": perceptual,
        "vqgan-fixed-weight-tiny": perceptual,
    }


def test_shipped_configs_are_those_of_the_classes():
    from t2ilearn.judging.reader import ReaderConfig
    from t2ilearn.models.dvae import DVAEConfig
    from t2ilearn.models.transformer import PriorConfig
    from t2ilearn.models.vqgan import DiscriminatorConfig
    from t2ilearn.models.vqvae import VQVAEConfig

    kinds = (ReaderConfig, DVAEConfig, PriorConfig, DiscriminatorConfig, VQVAEConfig)
    by_name = {kind.__name__: kind for kind in kinds}
    for name in weights.available():
        loaded = weights.load(name)
        configs = [make_config(by_name[kind], loaded) for kind in loaded.card.configs]
        # JSON has no tuples.
        assert json.loads(json.dumps(configs_of(*configs))) == loaded.card.configs


# ---------------------------------------------------------------- a card


def test_a_card_survives_its_file(card, saved):
    loaded = weights.load(saved).card
    assert loaded.to_json() == {**card.to_json(), "sha256": loaded.sha256}
    assert loaded.legs == card.legs and loaded.metrics == card.metrics


def test_steps_and_minutes_are_sums_and_the_rest_is_of_the_last_leg(card):
    last = replace(card.legs[-1], command="t2ilearn train x", device="GPU", precision="bf16")
    card = replace(card, legs=(card.legs[0], last))
    assert (card.steps, card.minutes) == (7, 1.8)
    assert (card.command, card.device, card.precision) == ("t2ilearn train x", "GPU", "bf16")


def at(values, path):
    """The object or list that holds the last step of a path."""
    for step in path[:-1]:
        values = values[step]
    return values


@pytest.mark.parametrize(
    "path, value, said",
    [
        (["legs", 0, "minutes"], "abc", 'field legs[0].minutes is "abc", expected a number'),
        (["legs", 0, "minutes"], float("nan"), "field legs[0].minutes is NaN, expected a finite"),
        (["legs", 1, "minutes"], -1, "field legs[1].minutes is -1.0, expected a number from 0"),
        (["legs", 1, "steps"], 1.5, "field legs[1].steps is 1.5, expected a whole number"),
        (["legs", 1, "steps"], True, "field legs[1].steps is true, expected a whole number"),
        (["legs", 1, "steps"], 10**400, "field legs[1].steps is 1000000"),
        (["legs", 1, "minutes"], 10**400, "expected a finite number"),
        (["legs", 0, "precision"], "fp8", 'field legs[0].precision is "fp8"'),
        (["legs", 0, "device"], " ", 'field legs[0].device is " ", expected a line of text'),
        (["legs", 0, "started_from"], "abc", "field legs[0].started_from is"),
        (["legs", 0, "versions"], {"torch": 2}, "field legs[0].versions.torch is 2"),
        (["legs", 0, "speed"], 1, "field legs[0].speed is unknown; the fields are command, de"),
        (["legs"], [], "field legs is [], expected at least one leg"),
        (["legs"], {}, "field legs is {}, expected a list"),
        (["legs", 0], None, "field legs[0] is null, expected an object with the fields command"),
        (["name"], "a/b", 'field name is "a/b", expected a file name'),
        (["stage"], "", 'field stage is "", expected a name'),
        (["configs"], {}, "field configs is {}, expected at least one config"),
        (["configs"], {"A": 3}, "field configs.A is 3, expected an object"),
        (["data", "seed"], "0", 'field data.seed is "0", expected a whole number'),
        (["data", "seed"], 2**63, "field data.seed is 9223372036854775808, expected a number"),
        (["data", "world"], 7, "field data.world is 7, expected a string"),
        (["settings"], [1], "field settings is [1], expected an object"),
        (["settings", "loss", "x y"], float("inf"), 'field settings.loss["x y"] is Infinity'),
        (["parameters"], "many", 'field parameters is "many", expected a whole number'),
        (["parameters"], -2, "field parameters is -2, expected a number from 0"),
        (["parents", "reader"], "", 'field parents.reader is "", expected a SHA-256'),
        (["parents"], {"reader": 5}, "field parents.reader is 5, expected a string"),
        (["tokenizer"], 5, "field tokenizer is 5, expected an object"),
        (["tokenizer"], {}, "field tokenizer.file is missing"),
        (["tokenizer", "file"], "../x.json", 'field tokenizer.file is "../x.json"'),
        (["tokenizer", "length"], 0, "field tokenizer.length is 0, expected a number from 1"),
        (["tokenizer", "more"], 0, "field tokenizer.more is unknown"),
        (["metrics", "perplexity"], True, "field metrics.perplexity is true, expected a number"),
        (["metrics", "perplexity"], "189", 'field metrics.perplexity is "189"'),
        (["metrics", "share"], {"half_width": 0.1}, "field metrics.share.value is missing"),
        (["metrics", "share", "half_width"], 5, "field metrics.share.half_width is 5"),
        (["metrics", "share", "value"], "x", 'field metrics.share.value is "x"'),
        (["metrics", "distance", "low"], 9, "field metrics.distance.low is 9, expected at most"),
        (["metrics", "distance"], {"value": 1.0, "low": 0.5}, "metrics.distance.high is missing"),
        (["metrics", "by style", "flat"], [1], 'field metrics["by style"].flat is [1]'),
        (["bars", "share", "met"], 1, "field bars.share.met is 1, expected true or false"),
        (["bars", "other"], {"bar": 0.9}, "field bars.other is unknown"),
        (["bars", "share"], {"bar": 0.9}, "field bars.share.measured is missing"),
        (["note"], None, "field note is null, expected a string"),
        (["sha256"], "C" * 64, "expected a SHA-256 of 64 hexadecimal digits"),
        (["colour"], 1, "field colour is unknown; the fields are bars, configs"),
        (["settings"], {"a": [[[[[[[[1]]]]]]]]}, "expected at most 6 levels of nesting"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(values, path, value, said):
    at(values, path)[path[-1]] = value
    with pytest.raises(WeightsError) as caught:
        Card.from_json(values, "tiny")
    assert str(caught.value).startswith("card tiny: ") and said in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(Card.__dataclass_fields__)))
def test_a_missing_field_is_named(values, name):
    del values[name]
    with pytest.raises(WeightsError, match=f"card tiny: field {name} is missing"):
        Card.from_json(values, "tiny")


def test_configs_are_dataclasses():
    assert configs_of(TinyConfig(heads=3))["TinyConfig"]["heads"] == 3
    for wrong in ({"heads": 3}, TinyConfig, None):
        with pytest.raises(TypeError, match="instance of a dataclass"):
            configs_of(wrong)


# ---------------------------------------------------------------- other editions


def test_cards_of_the_first_edition_say_so(saved):
    old = {"system": "vqvae", "config": {"codes": 256}, "steps": 6000, "sha256": "0" * 64}
    saved.with_suffix(".json").write_text(json.dumps(old), encoding="utf-8")
    said = "tiny.json: field schema is missing: it was made by the first edition.*Train again"
    with pytest.raises(WeightsError, match=said):
        weights.load(saved)


@pytest.mark.parametrize("header", [None, {"schema": 1, "stage": "vqvae", "configs": {}}])
def test_weights_of_the_first_edition_say_so(saved, header):
    with_header(saved, header)
    with pytest.raises(WeightsError, match=r"header of .*tiny.safetensors.*made by the first edit"):
        weights.load(saved)


def test_files_of_a_newer_edition_say_so(saved):
    edit(saved, lambda facts: facts.update(schema=SCHEMA + 1))
    with pytest.raises(WeightsError, match="field schema is 3, expected 2: .*newer.*update"):
        weights.load(saved)


# ---------------------------------------------------------------- the header


@pytest.mark.parametrize(
    "path, value, said",
    [
        (["stage"], "dalle", "field stage is \"dalle\", expected 'vqvae' as in the header"),
        (["configs", "TinyConfig", "heads"], 4, "field configs.TinyConfig.heads is 4, expected 2"),
        (["configs", "TinyConfig", "cosine"], 1, "configs.TinyConfig.cosine is 1, expected true"),
        (["configs", "TinyConfig", "rate"], None, "configs.TinyConfig.rate is null, expected 0.5"),
        (["configs", "TinyConfig", "channels", 1], 17, "channels is [8, 17], expected [8, 16]"),
        (["configs", "TinyConfig", "more"], 1, "configs.TinyConfig.more is unknown"),
        (["configs", "OtherConfig"], {}, "field configs.OtherConfig is unknown"),
        (["configs", "TinyConfig"], {}, "configs.TinyConfig.channels is missing"),
        (["parameters"], 3, "field parameters is 3, expected at most 2, as many numbers as the"),
    ],
)
def test_an_edited_card_that_contradicts_the_header_is_refused(saved, path, value, said):
    def change(facts):
        at(facts, path)[path[-1]] = value

    edit(saved, change)
    with pytest.raises(WeightsError) as caught:
        weights.load(saved)
    assert "tiny.json: " in str(caught.value) and said in str(caught.value)


def test_the_config_of_a_model_is_the_headers(saved):
    config = make_config(TinyConfig, weights.load(saved))
    assert config == TinyConfig() and isinstance(config.channels, tuple)


@pytest.mark.parametrize(
    "header, said",
    [
        ("{", "is not readable as JSON"),
        ("[1]", "the whole is [1], expected an object with the fields configs, schema, stage"),
        ({"schema": 2, "stage": "vqvae"}, "field configs is missing"),
        ({"schema": 2, "stage": 5, "configs": {}}, "field stage is 5, expected a string"),
        ({"schema": 2, "stage": "vqvae", "configs": {}, "a": 1}, "field a is unknown"),
        ({"schema": True, "stage": "vqvae", "configs": {}}, "field schema is true, expected 2"),
    ],
)
def test_a_damaged_header_is_refused_although_the_card_matches(saved, header, said):
    with_header(saved, header)
    with pytest.raises(WeightsError) as caught:
        weights.load(saved)
    assert "header of " in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("metadata", ["text", ["t2ilearn"], 5, {"t2ilearn": 5}, {}])
def test_metadata_of_a_wrong_type_are_refused(saved, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    data = len(text).to_bytes(8, "little") + text
    saved.write_bytes(data)
    edit(saved, lambda facts: facts.update(sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(WeightsError, match=r"tiny.safetensors"):
        weights.load(saved)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"channels": [8, "a"]}, 'field configs.TinyConfig.channels[1] is "a", expected a whole'),
        ({"channels": 8}, "field configs.TinyConfig.channels is 8, expected a list"),
        ({"size": [3]}, "field configs.TinyConfig.size is [3], expected a list of length 2"),
        ({"heads": 2.0}, "field configs.TinyConfig.heads is 2.0, expected a whole number"),
        ({"heads": 0}, "no TinyConfig (field configs.TinyConfig): heads must be at least 1, not 0"),
        ({"rate": "0.5"}, 'field configs.TinyConfig.rate is "0.5", expected a number'),
        ({"cosine": 1}, "field configs.TinyConfig.cosine is 1, expected true or false"),
        ({"limit": "x"}, 'field configs.TinyConfig.limit is "x", expected a whole number'),
        ({"codes": 3}, "field configs.TinyConfig.codes is unknown; the fields are channels"),
        ({"name": None}, "field configs.TinyConfig.name is null, expected a string"),
    ],
)
def test_a_config_with_a_wrong_field_is_refused_by_its_name(card, changes, said):
    config = {**card.to_json()["configs"]["TinyConfig"], **changes}
    loaded = Weights({}, replace(card, configs={"TinyConfig": config}), weights.ASSETS)
    with pytest.raises(WeightsError) as caught:
        make_config(TinyConfig, loaded)
    assert said in str(caught.value) and "header of" in str(caught.value)


def test_configs_and_fields_that_are_missing_are_named(card):
    config = dict(card.to_json()["configs"]["TinyConfig"])
    del config["rate"]
    loaded = Weights({}, replace(card, configs={"TinyConfig": config}), weights.ASSETS)
    with pytest.raises(WeightsError, match=r"configs.TinyConfig.rate is missing"):
        make_config(TinyConfig, loaded)
    with pytest.raises(WeightsError, match=r"configs.Leg is missing; there is TinyConfig"):
        make_config(Leg, loaded)


def test_whole_numbers_may_stand_for_floats_and_other_annotations_are_an_error_of_ours(card):
    config = {**card.to_json()["configs"]["TinyConfig"], "rate": 2, "limit": 7}
    loaded = Weights({}, replace(card, configs={"TinyConfig": config}), weights.ASSETS)
    made = make_config(TinyConfig, loaded)
    assert (type(made.rate), made.rate, made.limit) == (float, 2.0, 7)

    @dataclass
    class Odd:
        when: bytes = field(default=b"")

    loaded = Weights({}, replace(card, configs={"Odd": {"when": "x"}}), weights.ASSETS)
    with pytest.raises(TypeError, match="annotation that no card can hold"):
        make_config(Odd, loaded)


# ---------------------------------------------------------------- random edits

DEEP = json.loads(50 * '{"a": [' + "1" + 50 * "]}")
WRONG = (None, True, False, 0, -1, 7, 1.5, 1e308, -1e308, float("nan"), float("inf"), 10**400)
ODD = ("", "abc", "../../etc/x", "\ud800", "0" * 64, [], {}, [[]], {"value": "x"}, DEEP)


def nodes(values, path=()):
    """The paths of all values within JSON, except the whole."""
    if path:
        yield path
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        if isinstance(value, dict | list):
            yield from nodes(value, (*path, key))
        else:
            yield (*path, key)


def random_edit(values, rng):
    """One edit in place; returns the top-level fields that an error may name."""
    path = rng.choice(list(nodes(values)))
    holder, key = at(values, path), path[-1]
    kind = rng.choice(("delete", "replace", "replace", "replace", "rename", "add", "swap"))
    top = {str(path[0])}
    if kind == "delete":
        del holder[key]
    elif kind == "replace":
        holder[key] = copy.deepcopy(rng.choice(WRONG + ODD))
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif kind == "swap":  # with a value from elsewhere in the card
        other = rng.choice(list(nodes(values)))
        holder[key] = copy.deepcopy(at(values, other)[other[-1]])
    elif isinstance(holder, dict):
        holder["num_heads"] = rng.choice(WRONG)
    else:
        holder.append(rng.choice(WRONG))
    return top | ({f"{key}_", "num_heads"} if len(path) == 1 else set())


@pytest.mark.parametrize("name", SMALL)
def test_random_edits_are_refused_by_name_or_change_nothing_that_matters(name, tmp_path):
    source = weights.ASSETS / f"{name}.safetensors"
    path = tmp_path / source.name
    shutil.copyfile(source, path)
    before = weights.load(source)
    facts = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    rng, refused = random.Random(name), 0
    for _ in range(100):
        edited = copy.deepcopy(facts)
        top = random_edit(edited, rng)
        path.with_suffix(".json").write_text(json.dumps(edited), encoding="utf-8")
        try:
            after = weights.load(path)
        except WeightsError as error:
            named = re.search(r"field (\w+)", str(error))
            assert named and named[1] in top, (top, str(error))
            refused += 1
            continue
        assert after.card.configs == before.card.configs and after.card.stage == before.card.stage
        assert all(torch.equal(after.state[key], value) for key, value in before.state.items())
        assert Card.from_json(after.card.to_json(), name) == after.card
        assert after.card.command and after.card.device and after.card.minutes >= 0
        assert all(isinstance(weights.figure(m), str) for m in after.card.metrics.values())
    assert refused > 50


# ---------------------------------------------------------------- shipping


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A folder with one finished run, and an empty folder in the place of the assets."""
    runs, assets, name = tmp_path / "runs", tmp_path / "assets", "vqgan-tiny"
    (runs / name).mkdir(parents=True)
    for file in (f"{name}.safetensors", f"{name}.json"):
        shutil.copyfile(weights.ASSETS / file, runs / name / file)
    shutil.copytree(weights.ASSETS / "flights" / name, runs / name, dirs_exist_ok=True)
    assets.mkdir()
    for file in ("reader.safetensors", "reader.json"):
        shutil.copyfile(weights.ASSETS / file, assets / file)
    monkeypatch.setattr(weights.files, "ASSETS", assets)
    monkeypatch.setattr(weights, "ASSETS", assets)
    return runs, assets, name


def test_a_finished_run_ships_with_weights_card_and_record(run):
    runs, assets, name = run
    ship_weights.ship(runs, name)
    assert weights.load(name).card == weights.load(runs / name / f"{name}.safetensors").card
    record = assets / "flights" / name
    assert (record / "flight.json").is_file() and list((record / "frames").glob("*.webp"))
    assert not (record / "card.json").exists()


def test_of_an_ablation_only_card_and_record_ship(run, monkeypatch):
    runs, assets, name = run
    monkeypatch.setattr(ship_weights, "RECORDS_ONLY", {name})
    ship_weights.ship(runs, name)
    assert weights.available() == ("reader",)
    assert read_card(assets / "flights" / name / "card.json").name == name


@pytest.mark.parametrize(
    "change, said",
    [
        ({"metrics": {}, "bars": {}}, "was not measured: let its training end"),
        ({"parents": {"reader": "0" * 64}}, "on top of a reader .00000000. that does not ship"),
    ],
)
def test_stopped_runs_and_runs_without_their_parents_do_not_ship(run, change, said):
    runs, assets, name = run
    edit(runs / name / f"{name}.safetensors", lambda facts: facts.update(change))
    with pytest.raises(ValueError, match=said):
        ship_weights.ship(runs, name)
    assert not (assets / "flights").exists()
