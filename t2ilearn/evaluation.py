"""What a trained part is measured by: the figures on its card, each between floor and ceiling.

Every share of pictures comes with the half-width of its 95 % interval, every distance with a
bootstrap interval. The *ceiling* is what the judge says of real pictures, the *floor* of pictures
under other pictures' captions, or of real pictures against other real ones.

Where a model learned several worlds together, its card has the figures of each; those of emoji
begin with "emoji".
"""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2ilearn.dalle import DALLE
from t2ilearn.data import CaptionedPictures, Emoji, Shapes, Together, Tokenizer, parse
from t2ilearn.data.emoji_files import STYLES
from t2ilearn.data.shapes import FIELDS
from t2ilearn.drawing import GUIDANCE_SCALE, TOP_P, load_reader
from t2ilearn.metrics import (
    Interval,
    bootstrap,
    codebook_usage,
    frechet_distance,
    kernel_distance,
    perplexity,
    precision_recall,
    psnr,
)
from t2ilearn.prior import Prior, sample
from t2ilearn.reader import Reader, aligned, facts_of, junk, read, read_emoji, score
from t2ilearn.tokens import null_caption
from t2ilearn.vqvae import PictureCodes

TEST_PICTURES = 5_000  # codebook usage is over so many
CHUNK = 125
MOST = 8  # drawings a caption, of which the best is kept


def share(right: Bool[Tensor, " n"]) -> dict[str, float]:
    """A share of pictures and the half-width of its 95 % interval, both in [0, 1].

    Wilson's half-width: it does not vanish when all or none are right.
    """
    n, p, z = len(right), right.float().mean().item(), 1.96
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return {"value": round(p, 4), "half_width": round(half, 4)}


def rounded(interval: Interval, digits: int = 4) -> dict[str, float]:
    """An interval as a card says it."""
    return {name: round(value, digits) for name, value in interval._asdict().items()}


def blur(pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Each pixel becomes the mean of its 3×3 neighbourhood."""
    return F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)


def jpeg(pictures: Float[Tensor, "b 3 h w"], quality: int) -> Float[Tensor, "b 3 h w"]:
    """Through JPEG and back."""
    from torchvision.io import decode_jpeg, encode_jpeg

    as_bytes = pictures.add(1).mul(127.5).round().clamp(0, 255).byte()
    back = [decode_jpeg(encode_jpeg(p, quality)) for p in as_bytes]
    return torch.stack(back).float().div(127.5).sub(1)


def damaged(pictures: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b 3 _ _"]]:
    """The same pictures as they are, and spoiled in four ways: how robust is who reads them?"""
    noise = 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return {
        "real": pictures,
        "blur 3x3": blur(pictures),
        "noise 0.1": (pictures + noise).clamp(-1, 1),
        "jpeg 50": jpeg(pictures, 50),
        "at 32 px": F.interpolate(pictures, (32, 32), mode="area"),
    }


def evaluate_reader(reader: Reader, world: Shapes, n: int = 2000) -> dict[str, Any]:
    """Share of real pictures read fully right: ceiling, floor, and under damage."""
    pictures, captions = world.test_set("test-full", n)
    metrics: dict[str, Any] = {
        name: share(aligned(reader, version, captions))
        for name, version in damaged(pictures).items()
    }
    shuffled = captions[1:] + captions[:1]
    metrics["floor (captions shuffled)"] = share(aligned(reader, pictures, shuffled))
    generator = torch.Generator().manual_seed(1)
    metrics["junk called readable"] = share(read(reader, junk(pictures, generator)).readable)
    return metrics


def evaluate_emoji_judge(judge: Reader, world: Emoji, seed: int = 5000) -> dict[str, Any]:
    """Concept and style of every drawing, each once, moved and scaled anew on some background:
    ceiling, floor, and under damage. The judge knows all drawings; their places and sizes here it
    has not seen."""
    generator = torch.Generator().manual_seed(seed)
    scenes = world.each_once(generator)
    pictures = world.pictures(scenes, generator)
    metrics: dict[str, Any] = {}
    for name, version in damaged(pictures).items():
        found = _shown(judge, version, scenes)
        metrics |= {f"{what}, {name}": share(right) for what, right in found.items()}
        if name == "real":
            anyone = torch.randperm(len(scenes), generator=generator)  # a neighbour is a relative
            other = _shown(judge, version, scenes[anyone])
            metrics |= {f"{what}, floor (drawings shuffled)": share(r) for what, r in other.items()}
    readable = read_emoji(judge, junk(pictures, generator)).readable
    return metrics | {"junk called readable": share(readable)}


def _shown(
    judge: Reader, pictures: Float[Tensor, "n 3 h w"], scenes: Int[Tensor, "n 3"]
) -> dict[str, Bool[Tensor, " n"]]:
    """Which pictures show, to the emoji judge, the concept and the style of their scenes."""
    reading = read_emoji(judge, pictures)
    found = (reading.concepts == scenes[:, :1]) & reading.readable[:, None]  # (n, 5)
    return {
        "concept": found[:, 0],
        "concept in the first five": found.any(1),
        "style": (reading.styles == scenes[:, 1]) & reading.readable,
    }


def _worlds(world: CaptionedPictures) -> tuple[CaptionedPictures, ...]:
    return world.worlds if isinstance(world, Together) else (world,)


@torch.no_grad()
def evaluate_vqvae(model: PictureCodes, world: CaptionedPictures, n: int = 2000) -> dict[str, Any]:
    """Codebook usage and perplexity over test pictures of all worlds; for each world PSNR, and
    what the judge still reads where there is one."""
    generator = torch.Generator().manual_seed(0)
    pictures = world.test_set(world.test_sets[0], TEST_PICTURES).pictures
    codes = torch.cat([model.tokens(part) for part in pictures.split(CHUNK)])
    metrics: dict[str, Any] = {
        "codebook usage": round(codebook_usage(codes, model.config.codes), 4),
        "perplexity": round(perplexity(codes, model.config.codes), 1),
    }
    for each in _worlds(world):
        if isinstance(each, Emoji):
            metrics |= _emoji_copies(model, each, n)
        else:
            metrics |= _copies(model, each, n, generator)
    return metrics


def _copies(
    model: PictureCodes, world: CaptionedPictures, n: int, generator: torch.Generator
) -> dict[str, Any]:
    """PSNR on a world's first test set; of shapes also what the judge reads, and distances."""
    real = world.test_set(world.test_sets[0], n)
    back = _reconstructed(model, real.pictures)
    metrics: dict[str, Any] = {"PSNR, dB": _mean_psnr(back, real.pictures, generator)}
    if not isinstance(world, Shapes):
        return metrics
    judge = load_reader("judge")
    other = world.sample(n, "test", generator=generator).pictures
    floor = _distances(judge, real.pictures, other, generator)
    return {
        **metrics,
        "judge on reconstructions": share(aligned(judge, back, real.captions)),
        "judge on real pictures": share(aligned(judge, real.pictures, real.captions)),
        **_distances(judge, real.pictures, back, generator),
        **{f"{what}, floor (real)": v for what, v in floor.items()},
    }


def _emoji_copies(model: PictureCodes, world: Emoji, n: int) -> dict[str, Any]:
    """PSNR and the emoji judge on reconstructions, of pairs seen in training and of held-out ones,
    beside real pictures."""
    judge, generator = load_reader("emoji-judge"), torch.Generator().manual_seed(0)
    metrics: dict[str, Any] = {}
    for name in world.test_sets:
        scenes, real = world.test_scenes(name, n)[0], world.test_set(name, n).pictures
        back = _reconstructed(model, real)
        metrics[f"emoji, PSNR, dB, {name}"] = _mean_psnr(back, real, generator)
        for kind, pictures in (("reconstructions", back), ("real pictures", real)):
            for what, right in _shown(judge, pictures, scenes).items():
                metrics[f"emoji, {what} on {kind}, {name}"] = share(right)
        if name == "seen":  # each style has some hundreds there
            for number, style in enumerate(STYLES):
                own = scenes[:, 1] == number
                if own.sum() > 1:
                    far = _frechet(judge, real[own], back[own], generator)
                    metrics[f"emoji, Fréchet distance in reader features, {style}"] = far
    return metrics


def _mean_psnr(copies: Tensor, real: Tensor, generator: torch.Generator) -> dict[str, float]:
    each = psnr(copies, real)
    return rounded(bootstrap(lambda x: x.mean().item(), each, generator=generator), 2)


def _reconstructed(
    model: PictureCodes, pictures: Float[Tensor, "n 3 h w"]
) -> Float[Tensor, "n 3 h w"]:
    parts = [model.decode_tokens(model.tokens(part)) for part in pictures.split(CHUNK)]
    return torch.cat(parts).clamp(-1, 1)


MANNERS: dict[str, dict[str, float]] = {
    "as learned": {},
    "as drawn": {"guidance_scale": GUIDANCE_SCALE, "top_p": TOP_P},  # what `draw` does by default
}


@torch.no_grad()
def evaluate_prior(
    vqvae: PictureCodes, prior: Prior, world: CaptionedPictures, tokenizer: Tokenizer, n: int = 2000
) -> dict[str, Any]:
    """What is drawn, sampled as learned and as `draw` does, by the judges of the worlds; where no
    judge reads a world, likelihoods."""
    metrics: dict[str, Any] = {}
    for each in _worlds(world):
        if isinstance(each, Shapes):
            metrics |= _shapes_drawn(vqvae, prior, each, tokenizer, n)
            if isinstance(prior, DALLE):
                metrics |= evaluate_choice(vqvae, prior, each, tokenizer, n)
        elif isinstance(each, Emoji):
            metrics |= _emoji_drawn(vqvae, prior, each, tokenizer, n)
        else:
            metrics |= evaluate_likelihood(vqvae, prior, each, tokenizer, n)
    return metrics


def _shapes_drawn(
    vqvae: PictureCodes, prior: Prior, world: Shapes, tokenizer: Tokenizer, n: int
) -> dict[str, Any]:
    """Caption alignment on the three test sets, and how far the drawings are from real pictures,
    beside reconstructions (ceiling) and other real pictures (floor)."""
    judge, generator = load_reader("judge"), torch.Generator().manual_seed(1)
    metrics: dict[str, Any] = {}
    real = world.test_set("test-full", n)
    shuffled = real.captions[1:] + real.captions[:1]
    back = _reconstructed(vqvae, real.pictures)
    metrics["ceiling: real pictures"] = share(aligned(judge, real.pictures, real.captions))
    metrics["ceiling: reconstructions"] = share(aligned(judge, back, real.captions))
    for manner, how in MANNERS.items():
        for name in ("test-full", "test-partial", "composition"):
            captions = real.captions if name == "test-full" else world.test_scenes(name, n)[1]
            drawn, seconds = draw_each(vqvae, prior, tokenizer.encode(captions), how)
            metrics[f"{name}, {manner}"] = share(aligned(judge, drawn, captions))
            if name == "test-full":
                if len(bound := binding(judge, drawn, captions)):
                    metrics[f"binding, {manner}"] = share(bound)
                floor_share = share(aligned(judge, drawn, shuffled))
                metrics[f"floor: captions shuffled, {manner}"] = floor_share
                metrics[f"seconds a picture in batches, {manner}"] = round(seconds / n, 4)
                distances = _distances(judge, real.pictures, drawn, generator)
                metrics |= {f"{what}, {manner}": v for what, v in distances.items()}
    other = world.sample(n, "test", generator=generator).pictures
    floor = _distances(judge, real.pictures, other, generator)
    return metrics | {f"{what}, floor (real)": v for what, v in floor.items()}


@torch.no_grad()
def evaluate_choice(
    vqvae: PictureCodes, prior: Prior, world: Shapes, tokenizer: Tokenizer, n: int = 2000
) -> dict[str, Any]:
    """Best of 1, 2, 4 and 8: the training reader chooses among n drawings, eight a caption of
    test-full, and the judge says whether the kept ones are right. The interval is a bootstrap's
    over the captions, for eight drawings of one caption are no eight captions."""
    captions = [c for c in world.test_scenes("test-full", n // MOST)[1] for _ in range(MOST)]
    drawn, _ = draw_each(vqvae, prior, tokenizer.encode(captions), MANNERS["as drawn"])
    marks = score(load_reader("reader"), drawn, captions).view(-1, MOST)
    right = aligned(load_reader("judge"), drawn, captions).view(-1, MOST)  # (captions, 8)
    generator, metrics = torch.Generator().manual_seed(0), dict[str, Any]()
    for count in (1, 2, 4, MOST):
        best = marks.unflatten(1, (-1, count)).argmax(2, keepdim=True)
        # A caption's share of groups whose best is right.
        each = right.unflatten(1, (-1, count)).gather(2, best).double().mean((1, 2))
        value, low, high = bootstrap(lambda x: x.mean().item(), each, generator=generator)
        name = f"test-full, best of {count} by the reader"
        metrics[name] = rounded(Interval(value, max(0.0, low), min(1.0, high)))
    return metrics


def binding(
    reader: Reader, pictures: Float[Tensor, "n 3 h w"], captions: list[str]
) -> Bool[Tensor, " m"]:
    """Who got what: one answer for each pair of colours, or of shapes, that a caption gives to its
    two objects and that the picture shows. True: each is where it belongs; False: exchanged.

    A model that deals attributes by lot gets half of them right, however sharp it draws.
    """
    answers = []
    for seen, caption in zip(read(reader, pictures).facts.tolist(), captions, strict=True):
        said = dict(facts_of(parse(caption)))  # column of FIELDS → value
        for name in ("colour", "shape"):
            columns = [FIELDS.index(f"{name}_{slot}") for slot in (1, 2)]
            wanted = [said.get(column) for column in columns]
            found = [seen[column] for column in columns]
            if wanted[0] != wanted[1] and found in (wanted, wanted[::-1]):
                answers.append(found == wanted)
    return torch.tensor(answers, dtype=torch.bool)


@torch.no_grad()
def _emoji_drawn(
    vqvae: PictureCodes, prior: Prior, world: Emoji, tokenizer: Tokenizer, n: int
) -> dict[str, Any]:
    """Concept and style of what is drawn for pairs of the two that training held, and for pairs
    held out, beside reconstructions (ceiling) and other captions' drawings (floor)."""
    judge = load_reader("emoji-judge")
    metrics: dict[str, Any] = {}
    for name in world.test_sets:
        scenes, captions = world.test_scenes(name, n)
        back = _reconstructed(vqvae, world.test_set(name, n).pictures)
        for what, right in _shown(judge, back, scenes).items():
            metrics[f"emoji, ceiling: {what} on reconstructions, {name}"] = share(right)
        for manner, how in MANNERS.items():
            drawn, _ = draw_each(vqvae, prior, tokenizer.encode(captions), how)
            for what, right in _shown(judge, drawn, scenes).items():
                metrics[f"emoji, {what}, {name}, {manner}"] = share(right)
            other = _shown(judge, drawn, scenes.roll(1, dims=0))
            for what, kind in (("concept in the first five", ""), ("style", "style, ")):
                floor = f"emoji, floor: {kind}captions shuffled, {name}, {manner}"
                metrics[floor] = share(other[what])
    return metrics


@torch.no_grad()
def evaluate_likelihood(
    vqvae: PictureCodes, prior: Prior, world: CaptionedPictures, tokenizer: Tokenizer, n: int = 2000
) -> dict[str, Any]:
    """Nats a code on test pictures, under their own captions, under another picture's, and under
    none: what can be said of any world, also where no judge reads what is drawn."""
    generator = torch.Generator().manual_seed(0)
    real = world.test_set(world.test_sets[0], n)
    own = tokenizer.encode(real.captions)
    codes = torch.cat([vqvae.tokens(part) for part in real.pictures.split(CHUNK)])
    captions = {
        "nats a code": own,
        "nats a code, captions shuffled": own.roll(1, dims=0),
        "nats a code, no caption": null_caption(*own.shape),
    }
    metrics: dict[str, Any] = {"test pictures": len(codes)}
    for what, ids in captions.items():
        pairs = zip(codes.split(CHUNK), ids.split(CHUNK), strict=True)
        losses = [
            F.cross_entropy(prior.code_logits(q, c).mT, q, reduction="none").mean(1)
            for q, c in pairs
        ]
        each = torch.cat(losses)  # (n,)
        interval = bootstrap(lambda x: x.mean().item(), each, generator=generator)
        metrics[what] = rounded(interval)
    return metrics


def draw_each(
    vqvae: PictureCodes, prior: Prior, captions: Int[Tensor, "n t"], how: dict[str, float]
) -> tuple[Float[Tensor, "n 3 h w"], float]:
    """One drawing for each caption's ids, sampled by `how`, and the seconds that all took."""
    generator, began = torch.Generator().manual_seed(0), time.perf_counter()
    parts: list[Tensor] = []
    for ids in captions.split(CHUNK):
        codes: Int[Tensor, "b n"] = sample(prior, ids, generator=generator, **how)
        parts.append(vqvae.decode_tokens(codes).clamp(-1, 1))
    return torch.cat(parts), time.perf_counter() - began


def _distances(
    judge: Reader, real: Tensor, fake: Tensor, generator: torch.Generator
) -> dict[str, Any]:
    """How far two sets of pictures are apart, in the judge's features."""
    a, b = _spread_to_one(judge, real, fake)
    precision, recall = precision_recall(a, b)
    return {
        "Fréchet distance in reader features": _frechet(judge, real, fake, generator),
        "kernel distance": rounded(
            bootstrap(kernel_distance, a, b, generator=generator, rounds=20)
        ),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
    }


def _frechet(
    judge: Reader, real: Tensor, fake: Tensor, generator: torch.Generator
) -> dict[str, float]:
    features = _spread_to_one(judge, real, fake)
    return rounded(bootstrap(frechet_distance, *features, generator=generator, rounds=50))


def _spread_to_one(judge: Reader, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Features in units of their own spread: mean variance 1 over the real pictures."""
    a, b = judge.features(real), judge.features(fake)
    spread = a.var(0).mean().sqrt()
    return a / spread, b / spread
