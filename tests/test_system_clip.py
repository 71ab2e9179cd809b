"""The trainings of CLIP, what they are measured by, CLIP as a scorer, and the system VQGAN-CLIP."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from t2ilearn import weights
from t2ilearn.data import Emoji, Shapes, TinyShapes, WordTokenizer, parse
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.grammar import ReadCaption
from t2ilearn.data.pixels import bytes_from_pictures
from t2ilearn.drawing import draw, redraw
from t2ilearn.judging import clip as measures
from t2ilearn.models.clip import CLIP, ImageTowerConfig, TextTowerConfig
from t2ilearn.models.tokens import END, PAD
from t2ilearn.models.vqgan_clip import spherical_distance
from t2ilearn.systems import PLANS, STAGES, Candidates, Prompt, Request, rank, registry, reranking
from t2ilearn.systems import clip as trainings
from t2ilearn.systems import train_system as train_plan
from t2ilearn.systems.clip import distinct_scenes, without_padding
from t2ilearn.systems.token_training import both_worlds
from t2ilearn.systems.vqgan_clip import VQGANCLIPOptions, VQGANCLIPSystem
from t2ilearn.training import TrainingError
from t2ilearn.weights import WeightsError

WORDS = WordTokenizer()
RED, BLUE = "a large red circle on a white background", "a small blue star on a black background"


def small(recipe):
    """A recipe of a few cheap steps."""
    text = replace(recipe.model, dim=16, num_layers=1, num_heads=2, embed_dim=8)
    image = replace(recipe.other_configs[0], dim=16, num_layers=1, num_heads=2, embed_dim=8)
    train = replace(recipe.train, steps=3, batch_size=16)
    return replace(recipe, model=text, train=train, other_configs=(image,))


@pytest.fixture(autouse=True, scope="module")
def few():
    """Small test sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "RETRIEVED", 100)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, few):
    """A folder with `clip` and `clip-score`, small and hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for stage in PLANS["clip"]:
            changed = replace(stage, presets={p: small(r) for p, r in stage.presets.items()})
            patch.setitem(STAGES, stage.name, changed)
            train_plan("clip", "tiny", folder, stage=stage.name, progress=False)
    return folder


@pytest.fixture(scope="module")
def system(runs):
    """VQGAN-CLIP of the VQGAN that ships and the CLIP of this folder."""
    return registry.load(runs / "clip-tiny")


def file_of(runs, name="clip-tiny"):
    return runs / name / f"{name}.safetensors"


# ---------------------------------------------------------------- recipes and batches


def test_both_stages_have_the_sizes_that_were_planned():
    assert [stage.name for stage in PLANS["clip"]] == ["clip", "clip-score"]
    for stage in PLANS["clip"]:
        for preset, least, most in (("tiny", 0.1e6, 0.4e6), ("book", 1.3e6, 1.7e6)):
            recipe = stage.presets[preset]
            model = CLIP(recipe.other_configs[0], recipe.model)
            assert least < sum(p.numel() for p in model.parameters()) < most
    clip, score = (stage.presets["book"] for stage in PLANS["clip"])
    assert clip.train.seed != score.train.seed and clip.model.dim != score.model.dim
    assert clip.other_configs[0].resolution == 64 and clip.other_configs[0].patch == 8
    assert clip.world is both_worlds
    tokenizer = clip.text_tokenizer()
    assert (tokenizer.vocabulary, tokenizer.length) == (
        clip.model.vocabulary,
        clip.model.text_length,
    )


def test_nothing_but_measuring_uses_the_score_model():
    for stage in STAGES.values():
        assert "clip-score" not in (*stage.needs, stage.init_from)
    assert reranking.STAGE == "clip"


def test_a_batch_has_no_scene_twice(generator):
    scenes = distinct_scenes(TinyShapes(), 64, "train", generator)
    assert len(scenes) == 64 == len(scenes.unique(dim=0))
    everything = distinct_scenes(TinyShapes(), 200, "train", generator)
    assert len(everything) == len(everything.unique(dim=0)) <= 112


def test_captions_are_cut_to_the_longest():
    ids = torch.tensor([[5, END, PAD, PAD], [5, 6, END, PAD]])
    assert without_padding(ids).tolist() == [[5, END, PAD], [5, 6, END]]


def test_the_temperature_is_clamped_after_every_step(tmp_path, monkeypatch):
    calls = []
    real = CLIP.clamp_logit_scale
    monkeypatch.setattr(CLIP, "clamp_logit_scale", lambda m: calls.append(1) or real(m))
    stage = trainings.CLIP_STAGE
    presets = {"tiny": small(stage.presets["tiny"])}
    monkeypatch.setitem(STAGES, "clip", replace(stage, presets=presets))
    monkeypatch.setattr(CLIP, "__init__", saturated(CLIP.__init__))
    path = train_plan("clip", "tiny", tmp_path, stage="clip", progress=False)
    assert len(calls) == 4  # three steps, and the average
    scale = weights.load(path).state["logit_scale"]
    assert scale.item() <= math.log(100) + 2e-3  # stored in half precision


def saturated(init):
    """A model whose temperature is at its bound from the start."""

    def changed(model, *configs):
        init(model, *configs)
        model.logit_scale.data.fill_(math.log(100))

    return changed


def test_cards_carry_figures_with_intervals(runs):
    for name in ("clip-tiny", "clip-score-tiny"):
        card = weights.load(file_of(runs, name)).card
        assert set(card.configs) == {"TextTowerConfig", "ImageTowerConfig"}
        assert 100 >= card.metrics["candidates, test-full"] > 80
        found = card.metrics["R@1, caption of a picture, test-full"]
        assert 0 <= found["value"] <= 1 and found["half_width"] > 0
        assert "R@1, picture of a caption, composition" in card.metrics


def test_own_pictures_train_it(tmp_path, monkeypatch):
    from PIL import Image

    folder = tmp_path / "mine"
    folder.mkdir()
    lines = ["file,caption"]
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 0, 90)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,picture number {number}")
    (folder / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    stage = trainings.CLIP_STAGE
    presets = {"tiny": small(stage.presets["tiny"])}
    monkeypatch.setitem(STAGES, "clip", replace(stage, presets=presets))
    path = train_plan("clip", "tiny", tmp_path / "runs", stage="clip", data=folder, progress=False)
    card = weights.load(path).card
    assert card.tokenizer and "R@1, picture of a caption, test" in card.metrics
    trained = reranking.load_clip(path)
    assert trained.text_tokenizer.length == card.configs["TextTowerConfig"]["text_length"]


# ---------------------------------------------------------------- measures


class Oracle(torch.nn.Module):
    """A CLIP that knows: pictures and captions become their facts, or a bag of them.

    Pictures are looked up among those that were rendered, by their bytes.
    """

    def __init__(self, world, facts_of_caption, width=4096):
        super().__init__()
        self.facts_of, self.width, self.known = facts_of_caption, width, {}
        self.image_tower = torch.nn.Module()
        self.image_tower.config = ImageTowerConfig(world.resolution, 8)
        real = world.pictures
        self.captions = []

        def pictures(scenes, generator):
            drawn = real(scenes, generator)
            rows = zip(drawn, scenes.tolist(), strict=True)
            self.known.update({p.numpy().tobytes(): tuple(s) for p, s in rows})
            return drawn

        world.pictures = pictures

    def vector(self, facts):
        generator = torch.Generator()
        rows = [
            torch.randn(self.width, generator=generator.manual_seed(hash(f) % 2**31)) for f in facts
        ]
        return torch.stack(rows).sum(0)

    def encode(self, captions):
        self.captions += captions
        first = len(self.captions) - len(captions)
        return torch.arange(first, len(self.captions))[:, None]

    def encode_text(self, ids):
        found = [self.vector(self.facts_of(self.captions[i])) for i in ids[:, 0].tolist()]
        return F.normalize(torch.stack(found), dim=1)

    def encode_image(self, pictures):
        scenes = [self.known[p.numpy().tobytes()] for p in pictures]
        return F.normalize(torch.stack([self.vector(self.picture_facts(s)) for s in scenes]), dim=1)


def shape_facts(bag):
    """Facts of a caption of shapes; as a bag, without saying which object has which."""

    def of(caption):
        return of_pairs(Shapes.facts(parse(caption)))

    def of_pairs(facts):
        if not bag:
            return facts
        return [(c if c < 3 else (c - 3) % 4 + 3, v) for c, v in facts if c != 1]

    return of, of_pairs


@pytest.mark.parametrize("bag", [False, True])
def test_retrieval_and_hard_negatives_tell_a_reader_from_a_bag_of_words(bag, unchecked):
    world = Shapes(16)
    of, of_pairs = shape_facts(bag)
    model = Oracle(world, of)
    model.picture_facts = lambda scene: of_pairs([(c, v) for c, v in enumerate(scene) if v >= 0])
    found = measures.retrieval(model, model.encode, world, "test-full", n=60)
    r1 = found["R@1, caption of a picture, test-full"]["value"]
    assert found["candidates, test-full"] == 60 and (r1 == 1 or bag)
    negatives = measures.hard_negatives(model, model.encode, world, n=60)
    values = [v["value"] for v in negatives.values()]
    assert set(negatives) == {
        "right before relation exchanged, test-full",
        "right before attributes exchanged, test-full",
    }
    assert all(v == 1 for v in values) if not bag else all(v < 0.8 for v in values)


def test_exchanged_captions_state_something_else():
    stated = parse("a small red star above a large blue ring on a white background")
    other = measures.exchanged(stated, "relation")
    assert other == parse("a small red star below a large blue ring on a white background")
    other = measures.exchanged(stated, "attributes")
    assert other == parse("a large blue star above a small red ring on a white background")
    for caption, what in [
        ("a red star", "relation"),
        ("a red star above a red star", "relation"),
        ("a red star above a red ring", "attributes"),
    ]:
        assert measures.exchanged(parse(caption), what) is None
    with pytest.raises(ValueError, match="'relation' or 'attributes', not 'order'"):
        measures.exchanged(stated, "order")


def test_the_first_row_of_each_scene_is_kept():
    scenes = torch.tensor([[3, 1], [2, 2], [3, 1], [0, 0], [2, 2]])
    assert measures.first_of_each(scenes).tolist() == [0, 1, 3]


def test_zero_shot_recognition_is_among_all_concepts_and_by_pair(unchecked, monkeypatch):
    monkeypatch.setattr(measures, "_PROMPTS", (2,))
    world = Emoji(16)
    names = {phrases[0]: number for number, phrases in enumerate(world.phrases)}
    by_length = sorted(names, key=len, reverse=True)

    def of(caption):
        return [next(names[name] for name in by_length if caption.endswith(name))]

    model = Oracle(world, of, width=64)
    model.picture_facts = lambda scene: [scene[0]]
    found = measures.zero_shot(model, model.encode, world, n=40)
    assert found["emoji, zero-shot concept, held-out"]["value"] == 1
    model.picture_facts = lambda scene: [scene[0] + 1]
    wrong = measures.zero_shot(model, model.encode, world, n=40)
    first = wrong["emoji, zero-shot concept, held-out"]
    five = wrong["emoji, zero-shot concept in the first five, held-out"]
    assert first["value"] == 0 and five["value"] < 0.5
    pairs = len(world.groups("held-out", 40).unique(dim=0))
    half = 1.96**2 / 2 / (pairs + 1.96**2)  # Wilson's, of so many pairs and not of 40 pictures
    assert first["half_width"] == pytest.approx(half, abs=2e-3)


# ---------------------------------------------------------------- ranking


def test_pictures_are_ranked_by_similarity(runs, generator):
    world = TinyShapes()
    pictures = world.sample(6, generator=generator).pictures
    found = rank(pictures, RED, file_of(runs))
    trained = reranking.load_clip(file_of(runs))
    text = trained.model.encode_text(WORDS.encode([RED]))
    cosine = (trained.model.encode_image(pictures) * text).sum(1)
    assert torch.allclose(found.similarity, cosine, atol=1e-6)
    assert torch.equal(found.order, cosine.argsort(descending=True))
    bigger = F.interpolate(pictures, (64, 64))
    assert rank(bigger, RED, file_of(runs)).similarity.shape == (6,)


def test_ranking_refuses_what_it_cannot_read(runs, generator, unchecked):
    pictures = TinyShapes().sample(2, generator=generator).pictures
    with pytest.raises(ValueError, match="Pixels go from −1 to 1"):
        rank(3 * pictures, RED, file_of(runs))
    with pytest.raises(CaptionError, match="Unknown word 'strar'"):
        rank(pictures, "a red strar", file_of(runs))
    with pytest.raises(CaptionError, match="at most 23 are allowed"):
        rank(pictures, "red " * 30, file_of(runs))
    with pytest.raises(WeightsError, match="holds VQVAE of stage vqgan, no CLIP"):
        rank(pictures, RED, "vqgan-tiny")
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        reranking.load_clip(file_of(runs)).similarity(pictures, [RED])


def test_without_weights_nothing_offers_to_rerank(monkeypatch):
    monkeypatch.setattr(reranking.weights, "available", lambda: ())
    with pytest.raises(WeightsError, match="t2ilearn train clip"):
        reranking.shipped_clip()
    assert "clip" not in registry.load("vqvae-tiny").scorers()


def test_with_weights_every_token_system_can_be_reranked(runs, monkeypatch):
    shipped, find = weights.available(), weights.find
    monkeypatch.setattr(reranking.weights, "available", lambda: (*shipped, "clip-tiny"))
    monkeypatch.setattr(
        reranking.weights, "find", lambda n: file_of(runs) if n == "clip-tiny" else find(n)
    )
    system = registry.load("vqvae-tiny")
    assert list(system.scorers())[-1] == "clip"
    drawing = draw("a red star", system="vqvae-tiny", count=2, best_of=2, scorer="clip")
    every = draw("a red star", system="vqvae-tiny", count=4).pictures
    found = reranking.load_clip("clip-tiny").similarity(every, ["a red star"] * 4).view(2, 2)
    kept = found.argmax(1) + torch.tensor([0, 2])
    assert torch.equal(drawing.pictures, every[kept])
    with pytest.raises(WeightsError, match="No weights of clip for emoji ship"):
        reranking.shipped_clip(("emoji",))
    other = registry.load("vqvae")  # of other worlds
    assert "clip" not in other.scorers()


# ---------------------------------------------------------------- the system


def test_it_is_built_on_weights_of_other_stages(system, runs):
    assert isinstance(system, VQGANCLIPSystem) and system.name == "vqgan-clip"
    assert system.worlds == ("tiny-shapes",) and system.resolution == 32
    assert [stage.name for stage in PLANS["vqgan-clip"]] == ["vqgan", "clip"]
    digests = [weights.load(name).card.sha256[:8] for name in ("vqgan-tiny", file_of(runs))]
    assert system.weights_id == "-".join(digests)
    assert not any(p.requires_grad for part in system.parts.values() for p in part.parameters())


def test_a_vqgan_beside_the_run_comes_before_the_one_that_ships(runs, tmp_path):
    import shutil

    shutil.copytree(runs / "clip-tiny", tmp_path / "clip-tiny")
    (tmp_path / "vqgan-tiny").mkdir()
    shipped = weights.find("vqgan-tiny")
    for suffix in (".safetensors", ".json"):
        shutil.copy(shipped.with_suffix(suffix), tmp_path / "vqgan-tiny")
    found = registry.find(tmp_path / "clip-tiny")
    assert found.files["vqgan"] == tmp_path / "vqgan-tiny" / "vqgan-tiny.safetensors"


def test_without_a_vqgan_it_says_what_to_train(runs, monkeypatch):
    monkeypatch.setattr(registry.weights, "available", lambda: ())
    with pytest.raises(WeightsError, match="no weights of vqgan-tiny beside this run.*Train them"):
        registry.find(runs / "clip-tiny")


def drawn(runs, caption=RED, **how):
    how = {"count": 2, "steps": 3, "cutouts": 2} | how
    return draw(caption, system=runs / "clip-tiny", **how)


def test_it_draws_and_a_file_is_redrawn_pixel_for_pixel(runs, tmp_path):
    drawing = drawn(runs, seed=3)
    assert drawing.pictures.shape == (2, 3, 32, 32) and len(drawing.aligned) == 2
    assert not torch.equal(drawing.pictures[0], drawing.pictures[1])
    again = redraw(drawing.save(tmp_path / "a.png"))
    assert torch.equal(again.pictures, drawing.pictures)
    assert not torch.equal(drawn(runs, seed=4).pictures, drawing.pictures)


def test_weighted_prompts_steer_and_are_remembered(runs, system, tmp_path):
    caption = (Prompt(RED), Prompt(BLUE, -0.5))
    drawing = drawn(runs, caption)
    assert drawing.aligned == []  # no judge reads weights
    stored = redraw(drawing.save(tmp_path / "a.png"))
    assert torch.equal(stored.pictures, drawing.pictures)
    assert stored.request.captions == (caption, caption)
    prompts = system.prompts([caption, RED])
    assert prompts.weights.tolist() == [[1.0, -0.5], [1.0, 0.0]]
    assert torch.allclose(prompts.embeddings[0, 0], prompts.embeddings[1, 0])


def test_every_step_is_shown_and_the_prompt_comes_nearer(system, generator):
    request = Request((RED,) * 2, options=system.make_options(steps=12, cutouts=2, augment=False))
    frames = list(system.steps(request, generator))
    assert len(frames) == 13
    target = system.prompts([RED]).embeddings[0]
    model = system.clip.model
    distances = [spherical_distance(model.encode_image(p), target).mean() for p in frames]
    assert distances[-1] < distances[0]


@pytest.mark.parametrize("form", ["latents", "logits"])
def test_it_starts_from_a_picture_or_from_another_system_s_drawing(system, generator, form):
    picture = TinyShapes().sample(1, generator=generator).pictures
    options = system.make_options(steps=0, form=form)
    request = Request((RED,), options=options, start=bytes_from_pictures(picture))
    back = system.ceiling(bytes_from_pictures(picture).float() / 127.5 - 1)
    assert torch.allclose(system.generate(request, generator), back, atol=1e-4)
    options = system.make_options(steps=0, form=form, start_from="vqvae-tiny")
    request = Request((RED,) * 2, options=options)
    other = registry.load("vqvae-tiny")
    first = other.generate(
        Request((RED,) * 2, options=other.make_options()), torch.Generator().manual_seed(2)
    )
    found = system.generate(request, torch.Generator().manual_seed(2))
    assert torch.allclose(found, system.ceiling(first), atol=1e-4)


def test_candidates_are_reranked_by_clip_or_the_reader(runs, system, generator):
    drawing = drawn(runs, count=1, best_of=3)
    every = drawn(runs, count=3).pictures
    best = system.clip.similarity(every, [RED] * 3).argmax()
    assert torch.equal(drawing.pictures[0], every[best])
    assert list(system.scorers()) == ["clip", "reader"]
    options = system.make_options(steps=0)
    request = Request(((Prompt(RED, 0.5),),), best_of=2, options=options)
    candidates = system.candidates(request, generator)
    assert isinstance(candidates, Candidates) and candidates.captions == [f"{RED}: 0.5"] * 2


def test_any_words_that_its_tokenizer_knows_are_a_prompt(system, runs):
    assert isinstance(system.read(RED), ReadCaption)
    assert system.read("red on red") is None
    assert drawn(runs, "red red star").aligned == []
    with pytest.raises(CaptionError, match="empty: say what to draw"):
        drawn(runs, " ")
    with pytest.raises(CaptionError, match="Unknown word 'dodo'"):
        drawn(runs, "a dodo")
    with pytest.raises(CaptionError, match="A prompt is empty"):
        drawn(runs, (Prompt(RED), Prompt("", 0.3)))
    with pytest.raises(ValueError, match="other than 0"):
        drawn(runs, (Prompt(RED, 0.0),))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"steps": -1}, "number of steps must be 0 … 5000, not -1"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"learning_rate": 0}, "learning rate must be"),
        ({"cutouts": 0}, "number of cutouts"),
        ({"smallest_cutout": 0}, "smallest cutout"),
        ({"form": "pixels"}, "latents or logits, not 'pixels'"),
        ({"patience": 0}, "patience must be"),
        ({"augment": "perhaps"}, "augment must be true or false"),
        ({"guidance_scale": 3}, "no option 'guidance_scale'; its options are: steps, learn"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        VQGANCLIPSystem.make_options(**options)
    assert len(dataclasses.fields(VQGANCLIPOptions)) == 8


def test_what_it_cannot_start_from_is_refused(system, generator):
    start = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    options = system.make_options(steps=0)
    request = Request((RED,), options=options, start=start, rows=4)
    with pytest.raises(ValueError, match="rows of it cannot stay"):
        system.generate(request, generator)
    options = system.make_options(steps=0, start_from="vqave")
    with pytest.raises(ValueError, match="Unknown system 'vqave'"):
        system.generate(Request((RED,), options=options), generator)
    other = registry.load("vqvae-tiny").make_options()
    with pytest.raises(ValueError, match="takes VQGANCLIPOptions, not TokenOptions"):
        system.generate(Request((RED,), options=other), generator)


def test_a_clip_without_its_folder_cannot_be_trained_on(tmp_path):
    with pytest.raises((ValueError, TrainingError)):
        train_plan("vqgan-clip", "tiny", tmp_path, stage="nothing")


def test_text_tower_configs_fit_the_tokenizers():
    recipe = trainings.CLIP_STAGE.presets["tiny"]
    assert isinstance(recipe.model, TextTowerConfig)
    assert (recipe.model.vocabulary, recipe.model.text_length) == (WORDS.vocabulary, WORDS.length)
    assert recipe.model.end_token == END
