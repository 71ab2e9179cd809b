"""From a recipe to weights and a card: written is what was trained, and what was measured."""

import json
import math
import signal

import pytest
import torch

from t2ilearn import evaluation, recipes, weights
from t2ilearn.dalle import DALLE, DVAE, kl_weight_at, temperature_at
from t2ilearn.data import Emoji, Shapes, TinyShapes, parse
from t2ilearn.data.bpe import SHARED_LENGTH
from t2ilearn.drawing import complete, draw, load_players, load_prior, load_system, load_vqvae
from t2ilearn.prior import PixelCNN, TransformerPrior
from t2ilearn.reader import Reader, ReaderConfig, Reading, facts_of
from t2ilearn.recipes import RECIPES, degrade, encode_world, train_system
from t2ilearn.vqgan import VQGAN, Critic
from t2ilearn.vqvae import VQVAE

QUIET = {"progress": False}


@pytest.fixture
def quick(monkeypatch):
    """Recipes with a little less to render and to measure; returns what evaluation was asked."""
    asked = []

    def small(name):
        real = getattr(evaluation, name)

        def measured(*args, **options):
            asked.append(args)
            return real(*args, **options, n=24)

        return measured

    for name in ("evaluate_reader", "evaluate_vqvae", "evaluate_prior"):
        monkeypatch.setattr(recipes, name, small(name))
    monkeypatch.setattr(evaluation, "TEST_PICTURES", 60)
    monkeypatch.setitem(recipes.CODES_PER_WORLD, "tiny-shapes", 200)
    return asked


@pytest.mark.parametrize(
    "system", ["vqvae", "prior", "pixelcnn", "vqgan", "vqgan-prior", "dvae", "dalle", "dalle-dvae"]
)
def test_each_system_has_both_presets_within_their_budgets(system):
    builders = {"vqvae": VQVAE, "vqgan": VQGAN, "pixelcnn": PixelCNN}
    builders = {"prior": TransformerPrior, "vqgan-prior": TransformerPrior, **builders}
    builders |= {"dvae": DVAE, "dalle": DALLE, "dalle-dvae": DALLE}
    # 0.2 M of a prior's embed words; a VQGAN's critic does not draw, and is counted apart. A dVAE's
    # encoder says a number for each of the codes.
    most = dict.fromkeys(builders, 2.7e6) | {"vqvae": 1.6e6, "vqgan": 1.6e6, "dvae": 1.8e6}
    sizes = {
        preset: sum(p.numel() for p in builders[system](RECIPES[system, preset].model).parameters())
        for preset in ("tiny", "book")
    }
    assert sizes["tiny"] < 0.5e6 and sizes["tiny"] < sizes["book"] <= most[system]


def test_nothing_but_judges_trains_on_held_out_pairs():
    assert {key for key, recipe in RECIPES.items() if recipe.split != "train"} == {
        ("judge", "book"),
        ("emoji-judge", "book"),
    }


def test_a_run_writes_weights_that_load_and_a_card_measured_on_them(tmp_path, quick):
    path = train_system("vqvae", "tiny", tmp_path, steps=12, **QUIET)
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path == tmp_path / "vqvae-tiny" / "vqvae-tiny.safetensors"
    assert card["steps"] == 12 and card["precision"] == "no" and card["version"]
    assert card["command"] == "t2ilearn train vqvae --preset tiny --steps 12"
    assert card["metrics"]["judge on real pictures"]["value"] > 0.9
    # float16 on disk: what was measured is what comes back, not what was trained.
    (measured, _), loaded = quick[0], load_vqvae(path)
    for mine, theirs in zip(measured.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert sum(p.numel() for p in loaded.parameters()) == card["parameters"]


def test_a_vqgan_has_chapter_twos_sizes_so_that_bits_are_equal():
    for preset in ("tiny", "book"):
        assert RECIPES["vqgan", preset].model == RECIPES["vqvae", preset].model
        assert sum(p.numel() for p in Critic(RECIPES["vqgan", preset].critic).parameters()) < 0.3e6


def test_a_vqgan_and_its_critic_come_back_from_one_file(tmp_path, quick, monkeypatch):
    asked = []
    real = recipes.load_reader
    monkeypatch.setattr(recipes, "load_reader", lambda name: asked.append(name) or real(name))
    path = train_system("vqgan", "tiny", tmp_path, steps=12, **QUIET)
    card = weights.load(path).card
    assert asked == ["reader"]  # never a judge
    assert card["critic"] == {"width": 16, "levels": 1} and card["objective"]["start"] == 0.4
    assert card["metrics"]["judge on real pictures"]["value"] > 0.9
    (measured, _), (generator, critic) = quick[0], load_players(path)
    assert isinstance(load_vqvae(path), VQGAN) and not critic.training
    for mine, theirs in zip(measured.parameters(), generator.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    flight = json.loads((path.parent / "flight.json").read_text(encoding="utf-8"))
    assert {"weight", "critic", "real_logit", "fake_logit"} <= set(flight["curves"])
    heard = [loss != 0 for loss in flight["curves"]["critic"]]
    assert not any(heard[:4]) and all(heard[5:])  # the critic enters after 0.4 of 12 steps


def test_each_ablation_lacks_its_part(tmp_path, quick):
    whole = RECIPES["vqgan", "tiny"]
    lacking = {name: RECIPES[name, "tiny"].objective for name in recipes.ABLATIONS}
    assert lacking["vqgan-no-critic"].adversarial == 0
    assert lacking["vqgan-no-perceptual"].perceptual == 0
    assert lacking["vqgan-fixed-weight"].adaptive is False
    assert all(RECIPES[n, "tiny"].train == whole.train for n in lacking)
    path = train_system("vqgan-no-critic", "tiny", tmp_path, steps=6, **QUIET)
    assert path.parent.name == "vqgan-no-critic-tiny"


def test_a_vqgans_prior_learns_its_codes_and_draws(tmp_path, quick):
    first = train_system("vqgan", "tiny", tmp_path, steps=4, **QUIET)
    path = train_system("vqgan-prior", "tiny", tmp_path, steps=2, **QUIET)
    card = weights.load(path).card
    assert card["metrics"]["vqvae"] == weights.load(first).card["sha256"]
    system = load_system(str(path.parent))
    assert isinstance(system.vqvae, VQGAN)
    assert draw("a star", system=str(path.parent), count=2).pictures.shape == (2, 3, 32, 32)


def test_a_vqgan_goes_on_bit_for_bit(tmp_path, quick, monkeypatch):
    """A checkpoint holds both players, their optimiser and the critic's running statistics."""
    whole = train_system("vqgan", "tiny", tmp_path / "whole", steps=12, **QUIET)
    real, calls = recipes.Players.forward, []

    def stop_once(self, *args):
        calls.append(args)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(recipes.Players, "forward", stop_once)
    partial = train_system("vqgan", "tiny", tmp_path / "parts", steps=12, **QUIET)
    assert weights.load(partial).card["steps"] == 8 and "metrics" not in weights.load(partial).card
    again = train_system("vqgan", "tiny", tmp_path / "parts", steps=12, **QUIET)
    before, after = weights.load(whole).state, weights.load(again).state
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_dvae_learns_by_its_schedules_and_comes_back(tmp_path, quick, monkeypatch):
    """Temperature and KL weight are asked for by the share of the training that is behind."""
    heats, weights_of_kl = [], []
    monkeypatch.setattr(
        recipes, "temperature_at", lambda share: heats.append(share) or temperature_at(share)
    )
    monkeypatch.setattr(
        recipes,
        "kl_weight_at",
        lambda share, top: weights_of_kl.append((share, top)) or kl_weight_at(share, top),
    )
    path = train_system("dvae", "tiny", tmp_path, steps=8, **QUIET)
    card = weights.load(path).card
    top = RECIPES["dvae", "tiny"].kl_weight
    assert heats == [i / 8 for i in range(8)] and weights_of_kl == [(i / 8, top) for i in range(8)]
    assert card["system"] == "dvae" and card["steps"] == 8 and card["bars"] == {}
    assert card["metrics"]["judge on real pictures"]["value"] > 0.9
    (measured, _), loaded = quick[0], load_vqvae(path)
    assert isinstance(loaded, DVAE) and not loaded.training
    for mine, theirs in zip(measured.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert sum(p.numel() for p in loaded.parameters()) == card["parameters"]
    flight = json.loads((path.parent / "flight.json").read_text(encoding="utf-8"))
    assert {"reconstruction", "divergence", "total"} <= set(flight["curves"])
    first = [flight["curves"][term][0] for term in ("reconstruction", "divergence", "total")]
    assert first[0] == first[2] and first[1] > 0  # β is 0 at first


@pytest.mark.parametrize("system", ["dalle", "dalle-dvae"])
def test_a_dalle_learns_codes_of_either_kind_and_draws(tmp_path, quick, monkeypatch, system):
    first_stage = {"dalle": "vqgan", "dalle-dvae": "dvae"}[system]
    seen, real = [], recipes.dalle_loss
    monkeypatch.setattr(recipes, "dalle_loss", lambda *args: seen.append(args) or real(*args))
    first = train_system(first_stage, "tiny", tmp_path, steps=4, **QUIET)
    path = train_system(system, "tiny", tmp_path, steps=3, **QUIET)
    card = weights.load(path).card
    assert path.parent.name == f"{system}-tiny" and card["system"] == system
    assert card["metrics"]["vqvae"] == weights.load(first).card["sha256"]
    for count in (1, 2, 4, 8):
        chosen = card["metrics"][f"test-full, best of {count} by the reader"]
        assert 0 <= chosen["value"] <= 1 and chosen["low"] <= chosen["value"] <= chosen["high"]
    shares = [v for k, v in card["metrics"].items() if k.startswith("test-full, as")]
    assert len(shares) == 2
    flight = json.loads((path.parent / "flight.json").read_text(encoding="utf-8"))
    words, picture, total = (flight["curves"][t][0] for t in ("words", "picture", "total"))
    assert total == pytest.approx(words / 8 + 7 * picture / 8, rel=1e-6)
    _, captions, codes = seen[0]
    assert captions.shape == (32, 24) and codes.shape == (32, 64)
    assert isinstance(load_prior(path), DALLE)
    loaded = load_system(str(path.parent))
    kind = {"dalle": VQGAN, "dalle-dvae": DVAE}[system]
    assert isinstance(loaded.vqvae, kind)
    drawn = draw("a star", system=str(path.parent), count=2, best_of=2, top_k=9)
    assert drawn.pictures.shape == (2, 3, 32, 32)
    done = complete(drawn.pictures[0], system=str(path.parent), count=2, rows=5)
    assert done.pictures.shape == (2, 3, 32, 32)


def test_priors_of_other_chapters_are_not_asked_to_choose(tmp_path, quick):
    path = train_system("prior", "tiny", tmp_path, steps=1, **QUIET)
    assert not any("best of" in name for name in weights.load(path).card["metrics"])


@pytest.mark.parametrize("system", ["prior", "pixelcnn"])
def test_a_prior_learns_the_codes_of_this_folders_vqvae(tmp_path, quick, system):
    first = train_system("vqvae", "tiny", tmp_path, steps=4, **QUIET)
    path = train_system(system, "tiny", tmp_path, steps=2, **QUIET)
    card = weights.load(path).card
    assert card["metrics"]["vqvae"] == weights.load(first).card["sha256"]
    kind = {"prior": TransformerPrior, "pixelcnn": PixelCNN}[system]
    assert isinstance(load_prior(path), kind)
    shares = [v for k, v in card["metrics"].items() if k.startswith("test-full")]
    assert len(shares) == 2 and all(0 <= s["value"] <= 1 for s in shares)


def test_dalle_hears_slips_and_answers_for_the_right_codes(tmp_path, quick, monkeypatch):
    assert {name for (name, _), recipe in RECIPES.items() if recipe.slips} == {
        "dalle",
        "dalle-dvae",
    }
    heard, wanted, real = [], [], recipes.dalle_loss

    def all_zero(codes, size, most, generator):
        heard.append(codes)
        assert size == 256 and most == 0.4
        return torch.zeros_like(codes)

    monkeypatch.setattr(recipes, "slip", all_zero)
    monkeypatch.setattr(recipes, "dalle_loss", lambda s, c, q: wanted.append(q) or real(s, c, q))
    train_system("dalle", "tiny", tmp_path, steps=2, **QUIET)
    assert len(heard) == 2 and all(torch.equal(a, b) for a, b in zip(heard, wanted, strict=True))


def test_a_finished_run_is_only_measured_anew(tmp_path, quick):
    first = weights.load(train_system("vqvae", "tiny", tmp_path, steps=4, **QUIET))
    again = weights.load(train_system("vqvae", "tiny", tmp_path, steps=4, **QUIET))
    assert first.card["sha256"] == again.card["sha256"] and len(quick) == 2


def test_a_stopped_run_keeps_the_partial_model_without_figures(tmp_path, quick, monkeypatch):
    real = recipes.train

    def interrupted(model, make_batch, *args, **options):
        def make(step, generator):
            if step == 3:
                raise KeyboardInterrupt
            return make_batch(step, generator)

        return real(model, make, *args, **options)

    monkeypatch.setattr(recipes, "train", interrupted)
    card = weights.load(train_system("vqvae", "tiny", tmp_path, steps=6, **QUIET)).card
    assert card["steps"] == 3 and "metrics" not in card and not quick
    monkeypatch.setattr(recipes, "train", real)
    card = weights.load(train_system("vqvae", "tiny", tmp_path, steps=6, **QUIET)).card
    assert card["steps"] == 6 and card["metrics"]


def test_the_codebook_starts_after_the_warm_up_and_not_before(tmp_path, quick, monkeypatch):
    """Of 40 steps ten are without codes; k-means is called once, just before they start."""
    calls, quantized = [], []
    forward = VQVAE.forward
    monkeypatch.setattr(
        VQVAE, "kmeans_start", lambda self, x, generator: calls.append((len(quantized), len(x)))
    )
    monkeypatch.setattr(
        VQVAE, "forward", lambda self, x, q=True: quantized.append(q) or forward(self, x, q)
    )
    train_system("vqvae", "tiny", tmp_path, steps=40, **QUIET)
    assert quantized[:40] == [False] * 10 + [True] * 30 and calls == [(10, 256)]


def test_readers_train_on_spoiled_pictures_and_junk(tmp_path, quick, monkeypatch):
    small = recipes.replace(RECIPES["reader", "book"], model=ReaderConfig(64, (16, 16), 32))
    small = recipes.replace(small, train=recipes.replace(small.train, steps=2, batch_size=24))
    monkeypatch.setitem(RECIPES, ("reader", "book"), small)
    card = weights.load(train_system("reader", "book", tmp_path, **QUIET)).card
    assert card["data"]["split"] == "train"
    assert {"real", "jpeg 50", "floor (captions shuffled)"} <= set(card["metrics"])


def test_the_emoji_judge_learns_all_drawings_junk_included(tmp_path, monkeypatch):
    assert len(Emoji().concepts) == recipes.CONCEPTS
    recipe, seen = RECIPES["emoji-judge", "book"], []
    assert recipe.model.answers == (recipes.CONCEPTS + 1, 5, 4)
    assert sum(p.numel() for p in Reader(recipe.model).parameters()) <= 0.8e6
    small = recipes.replace(recipe.model, channels=(16, 16), features=32)
    small = recipes.replace(recipe, model=small, train=recipes.replace(recipe.train, steps=2))
    monkeypatch.setitem(RECIPES, ("emoji-judge", "book"), small)
    loss = recipes.reader_loss
    monkeypatch.setattr(recipes, "reader_loss", lambda a, b: seen.append(b) or loss(a, b))
    card = weights.load(train_system("emoji-judge", "book", tmp_path, **QUIET)).card
    assert card["data"] == {"world": "emoji", "split": "all", "seed": 0}
    assert {"concept, real", "style, real", "concept, jpeg 50"} <= set(card["metrics"])
    assert not card["bars"]["concept, real"]["met"]
    junk, real = seen[0][:10], seen[0][10:]
    assert (junk[:, 0] == recipes.CONCEPTS).all() and (junk[:, 1:] == -1).all()
    assert (real[:, 0] < recipes.CONCEPTS).all() and (real >= 0).all()


def test_cards_say_which_bars_are_missed():
    metrics = {"a": 0.5, "b": {"value": 0.9, "half_width": 0.1}, "c": 3.0}
    bars = recipes.against_bars(metrics, {"a": 0.6, "b": 0.9})
    assert bars == {
        "a": {"bar": 0.6, "measured": 0.5, "met": False},
        "b": {"bar": 0.9, "measured": 0.9, "met": True},
    }


def test_unknown_systems_and_presets_list_what_there_is(tmp_path):
    for system, preset in (("vqave", "tiny"), ("vqvae", "huge"), ("judge", "tiny")):
        with pytest.raises(ValueError, match="There are: .*vqvae tiny"):
            train_system(system, preset, tmp_path)


def test_degrade_keeps_range_and_some_pictures_untouched(generator):
    pictures = Shapes().sample(60, generator=generator).pictures
    before = pictures.clone()
    spoiled = degrade(pictures, generator)
    same = (spoiled == pictures).flatten(1).all(1).float().mean()
    assert torch.equal(pictures, before) and spoiled.abs().max() <= 1
    assert 0.05 < same < 0.35


def test_a_world_is_encoded_once_and_in_order(generator):
    vqvae, world = VQVAE(RECIPES["vqvae", "tiny"].model).eval(), TinyShapes()
    scenes, codes = encode_world(vqvae, world, 30, seed=5)
    again, same = encode_world(vqvae, world, 30, seed=5)
    assert codes.shape == (30, 64) and torch.equal(scenes, again) and torch.equal(codes, same)


@pytest.mark.slow
def test_one_model_learns_both_worlds(tmp_path, quick, monkeypatch):
    """VQ-VAE and prior of `book`, small and for a few steps: their cards have figures of both."""
    vqvae, prior = RECIPES["vqvae", "book"], RECIPES["prior", "book"]
    replace = recipes.replace
    small = replace(vqvae.model, channels=(8, 8, 8), codes=64)
    monkeypatch.setitem(RECIPES, ("vqvae", "book"), replace(vqvae, model=small))
    small = replace(prior.model, codes=64, width=16, depth=1, heads=2)
    monkeypatch.setitem(RECIPES, ("prior", "book"), replace(prior, model=small))
    monkeypatch.setitem(recipes.CODES_PER_WORLD, "shapes + emoji", 60)
    cards = [
        weights.load(train_system(system, "book", tmp_path, steps=3, **QUIET)).card
        for system in ("vqvae", "prior")
    ]
    assert [card["data"]["world"] for card in cards] == ["shapes + emoji"] * 2
    assert {"PSNR, dB", "emoji, PSNR, dB, held-out"} <= set(cards[0]["metrics"])
    assert {"test-full, as drawn", "emoji, style, seen, as drawn"} <= set(cards[1]["metrics"])
    assert not any(bar["met"] for bar in cards[1]["bars"].values())
    system = load_system(str(tmp_path / "prior-book"))
    assert system.worlds == ("shapes", "emoji") and system.tokenizer.length == SHARED_LENGTH
    for caption in ("a small red star", "a puppy, flat"):
        drawing = draw(caption, system=str(tmp_path / "prior-book"), count=2, best_of=2)
        assert len(drawing.aligned) == 2


# --- evaluation ---


def test_binding_counts_who_got_what(monkeypatch):
    """Pairs that are both there, once at their own object's place and once exchanged."""
    said = "a small solid red star above a large dotted blue star"  # one shape: nothing to exchange
    row = list(captions_facts(said))
    exchanged = row.copy()
    exchanged[5], exchanged[9] = row[9], row[5]
    other = row.copy()
    other[5] = 6  # neither of the two colours
    facts = torch.tensor([row, exchanged, other, row])
    captions = [said, said, said, "a red star"]
    reading, reader = Reading(facts, torch.ones(4, dtype=torch.bool)), Reader()
    monkeypatch.setattr(evaluation, "read", lambda reader, pictures: reading)
    found = evaluation.binding(reader, torch.zeros(4, 3, 8, 8), captions)
    assert found.tolist() == [True, False]
    both = "a small solid red star above a large dotted blue ring"
    reading = Reading(torch.tensor([captions_facts(both)]), torch.ones(1, dtype=torch.bool))
    assert evaluation.binding(reader, torch.zeros(1, 3, 8, 8), [both]).tolist() == [True, True]


def test_the_best_of_many_is_whom_the_reader_likes_and_right_is_what_the_judge_says(monkeypatch):
    """Two captions, eight drawings each; the reader likes each drawing better than the last."""
    right = torch.zeros(16, dtype=torch.bool)
    right[7] = right[8] = True  # the last of the first caption, the first of the second
    seen = {}

    def drawn(vqvae, prior, ids, how):
        seen["ids"], seen["how"] = ids, how
        return torch.zeros(len(ids), 3, 32, 32), 1.0

    def mark(reader, pictures, captions):
        seen["reader"] = reader
        return torch.arange(16.0)

    def judged(judge, pictures, captions):
        seen["judge"], seen["captions"] = judge, captions
        return right

    monkeypatch.setattr(evaluation, "draw_each", drawn)
    monkeypatch.setattr(evaluation, "score", mark)
    monkeypatch.setattr(evaluation, "aligned", judged)
    tokenizer = recipes.WordTokenizer()
    model = DALLE(RECIPES["dalle", "tiny"].model)
    found = evaluation.evaluate_choice(
        DVAE(RECIPES["dvae", "tiny"].model), model, TinyShapes(), tokenizer, n=16
    )
    values = [found[f"test-full, best of {n} by the reader"]["value"] for n in (1, 2, 4, 8)]
    assert values == [0.125, 0.125, 0.25, 0.5]
    # Of captions, not of drawings: two captions say little, and the interval says so.
    last = found["test-full, best of 8 by the reader"]
    assert last["low"] < 0.1 and last["high"] > 0.9
    captions = seen["captions"]
    assert captions[0] == captions[7] != captions[8] == captions[15] and len(captions) == 16
    assert torch.equal(seen["ids"], tokenizer.encode(captions))
    assert seen["how"] == evaluation.MANNERS["as drawn"]
    assert seen["reader"] is evaluation.load_reader("reader")
    assert seen["judge"] is evaluation.load_reader("judge")


def captions_facts(caption):
    """The eleven facts of a caption that says everything but the ground."""
    facts = [0] * 11
    for column, value in facts_of(parse(caption)):
        facts[column] = value
    return facts


@pytest.mark.parametrize("right, n", [(0, 50), (50, 50), (25, 50), (1990, 2000)])
def test_shares_have_wilsons_interval(right, n):
    value = evaluation.share(torch.arange(n) < right)
    p, z = right / n, 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    high = centre + value["half_width"]
    # Wilson's bounds are where the null hypothesis is just rejected.
    assert abs(p - high) == pytest.approx(z * math.sqrt(max(0.0, high * (1 - high)) / n), abs=2e-3)
    assert value["value"] == pytest.approx(p, abs=1e-4) and value["half_width"] > 0


def test_damage_is_ordered_and_the_floor_is_low():
    reader = Reader(ReaderConfig(64, (16, 16), 32))
    metrics = evaluation.evaluate_reader(reader, Shapes(), n=20)
    assert metrics["floor (captions shuffled)"]["value"] < 0.3


def test_blur_and_jpeg_change_little_and_nothing_in_place(generator):
    pictures = Shapes().sample(4, generator=generator).pictures
    before = pictures.clone()
    for damaged in (evaluation.blur(pictures), evaluation.jpeg(pictures, 90)):
        assert damaged.shape == pictures.shape
        assert 0 < (damaged - pictures).abs().mean() < 0.1
    assert torch.equal(pictures, before)
    flat = torch.full((1, 3, 16, 16), 0.25)
    assert torch.allclose(evaluation.blur(flat), flat)
