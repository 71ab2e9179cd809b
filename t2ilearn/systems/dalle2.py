"""DALL·E 2: a caption, an image embedding, a picture (chapter 10).

    t2ilearn train dalle2 --preset tiny
    t2ilearn draw "a large red star" --with dalle2-tiny
    t2ilearn vary picture.png
    t2ilearn blend one.png other.png

| stage | starts from | trained on top of |
|---|---|---|
| `clip` (chapter 6), `diffusion` (chapter 9) | random weights | – |
| `dalle2-decoder` (`dalle2_decoder`) | random weights | `clip`, `diffusion` |
| `dalle2-prior` | random weights | `clip`; measured with the decoder |

Letters: B pictures, T tokens of a caption, E dimension of CLIP's space.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from t2ilearn import weights
from t2ilearn.data import CaptionedPictures, CaptionTokenizer, TinyShapes, WordTokenizer
from t2ilearn.data.bpe import SHARED_LENGTH
from t2ilearn.data.captions import CaptionError
from t2ilearn.data.grammar import WORLDS, ReadCaption
from t2ilearn.data.pixels import pictures_from_bytes
from t2ilearn.judging.clip import embed_captions, embed_pictures
from t2ilearn.judging.counting import mean_of_pictures
from t2ilearn.models.clip import CLIP
from t2ilearn.models.dalle2 import Decoder, slerp, text_difference
from t2ilearn.models.diffusion_prior import (
    CANDIDATES,
    TIMES,
    DiffusionPrior,
    DiffusionPriorConfig,
    diffusion_prior_loss,
    no_embedding,
    prior_process,
    sample_image_embedding,
)
from t2ilearn.models.tokens import NULL
from t2ilearn.models.transformer import drop_captions
from t2ilearn.systems.base import Caption, Request, Scorer, System, check_range, shortened
from t2ilearn.systems.clip import CLIP_STAGE, without_padding
from t2ilearn.systems.dalle2_decoder import DECODER_STAGE, clip_of, decode, network_of
from t2ilearn.systems.diffusion import MEASURED, DiffusionOptions
from t2ilearn.systems.diffusion import STAGE as DIFFUSION_STAGE
from t2ilearn.systems.evaluation import evaluate_system
from t2ilearn.systems.registry import load_parent, load_part, register
from t2ilearn.systems.reranking import TrainedCLIP, clip_scorer, load_clip
from t2ilearn.systems.stage import Job, Recipe, Stage
from t2ilearn.systems.token_training import (
    DROP_CAPTIONS,
    PICTURES_PER_WORLD,
    both_worlds_for_priors,
)
from t2ilearn.systems.tokens import by_reader, encode_captions, reader_reads
from t2ilearn.training import TrainConfig, TrainResult
from t2ilearn.weights import Weights, WeightsError

NEIGHBOURS = 5000  # training pairs among which the nearest neighbour of a text is looked for
EMBEDDINGS = ("predicted", "text", "none")


# --- training: the prior -----------------------------------------------------------------------


def embed_world(clip: CLIP, world: CaptionedPictures, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scenes (n, facts) and the embeddings (n, E) of their pictures, computed once."""
    generator = torch.Generator().manual_seed(seed)
    scenes = world.scenes(n, "train", generator=generator)
    parts = []
    with tqdm(total=n, desc="embeddings", unit="picture", delay=2) as bar:
        for part in scenes.split(250):
            parts.append(embed_pictures(clip, world.pictures(part, generator)))
            bar.update(len(part))
    return scenes, torch.cat(parts)


def _train_prior(job: Job) -> TrainResult:
    """Pictures are embedded once, captions anew for each step; a share of the texts is left out."""
    world, recipe, words, clip = job.world, job.recipe, job.text_tokenizer, clip_of(job)
    seed, process = recipe.train.seed, prior_process()
    scenes, embeddings = embed_world(clip, world, PICTURES_PER_WORLD[world.name], seed)
    torch.manual_seed(seed)
    prior = DiffusionPrior(recipe.model)
    prior.image_scale.fit(embeddings)
    any_seed, some = torch.Generator().manual_seed(seed), scenes[:NEIGHBOURS]
    captions = world.mixed_captions(some, any_seed)
    prior.text_scale.fit(embed_captions(clip, words.encode, captions))
    embeddings = prior.image_scale(embeddings)

    @torch.no_grad()
    def make_batch(step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(scenes), (recipe.train.batch_size,), generator=generator)
        ids = words.encode(world.mixed_captions(scenes[rows], generator))
        text = clip.encode_text(without_padding(ids))
        ids = drop_captions(ids, recipe.settings["drop_captions"], generator)
        given = (ids[:, :1] != NULL).to(text)  # caption and embedding are left out together
        return embeddings[rows], text * given, ids

    def compute_loss(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
        embedding, text, ids = batch
        return diffusion_prior_loss(model, embedding, text, ids, process, generator=generator)

    return job.train(prior, make_batch, compute_loss)


def _evaluate_prior(job: Job, model: nn.Module) -> dict[str, Any]:
    """Cosines of the prior's embeddings, and the figures of the whole system."""
    if not isinstance(model, DiffusionPrior):
        raise TypeError(f"{type(model).__name__} is no DiffusionPrior.")
    clip, found = TrainedCLIP(clip_of(job), job.text_tokenizer, ()), dict[str, Any]()
    for world in job.world.worlds:
        found |= evaluate_prior(model, clip, world, MEASURED)
    conditioning = load_parent(job, DECODER_STAGE.name)
    decoder = Decoder(network_of(job), conditioning).eval()  # type: ignore[arg-type]
    system = DALLE2System(clip, model, decoder, "", ())
    return found | evaluate_system(system, job.world.worlds, n=MEASURED)


@torch.no_grad()
def evaluate_prior(
    prior: DiffusionPrior, clip: TrainedCLIP, world: CaptionedPictures, n: int
) -> dict[str, Any]:
    """The cosine of the true image embedding with four others, over test pictures: the predicted
    one, the first sample without a choice, the text's own, and that of the training picture whose
    caption is most similar to the text."""
    metrics: dict[str, Any] = {}
    encode, generator = clip.text_tokenizer.encode, torch.Generator().manual_seed(0)
    scenes = world.scenes(NEIGHBOURS, "train", generator=generator)
    known = embed_pictures(clip.model, world.pictures(scenes, generator))
    captions = embed_captions(clip.model, encode, world.mixed_captions(scenes, generator))
    for name in world.test_sets:
        real = world.test_set(name, n)
        true = embed_pictures(clip.model, real.pictures)
        text = embed_captions(clip.model, encode, real.captions)
        ids, process = encode(real.captions), prior_process()
        sampled = [
            sample_image_embedding(prior, text, ids, process, generator, candidates=count)
            for count in (CANDIDATES, 1)
        ]
        found = {
            f"predicted, the more similar of {CANDIDATES}": sampled[0],
            "predicted, one sample": sampled[1],
            "text embedding": text,
            "nearest neighbour": known[(text @ captions.T).argmax(1)],
        }
        groups = world.groups(name, n)
        numbers = (
            torch.arange(n) if groups is None else groups.unique(dim=0, return_inverse=True)[1]
        )
        for what, embeddings in found.items():
            cosine = (embeddings * true).sum(1)
            figure = mean_of_pictures(cosine, numbers, generator)
            metrics[f"{world.label}cosine to the true embedding: {what}, {name}"] = figure
    return metrics


def _build_prior(stored: Weights) -> dict[str, nn.Module]:
    prior = DiffusionPrior(weights.make_config(DiffusionPriorConfig, stored))
    weights.load_into(prior, stored)
    return {"prior": prior.eval()}


PRIOR_STAGE = Stage(
    "dalle2-prior",
    {
        "tiny": Recipe(
            TinyShapes,
            DiffusionPriorConfig(64, 96, 2, WordTokenizer.vocabulary, WordTokenizer.length),
            TrainConfig(4000, 64, 2e-3, ema_decay=0.998),
            settings={"drop_captions": DROP_CAPTIONS},
        ),
        "book": Recipe(
            both_worlds_for_priors,
            DiffusionPriorConfig(text_length=SHARED_LENGTH),
            TrainConfig(20_000, 128, 1e-3, ema_decay=0.999),
            text_tokenizer=CaptionTokenizer.shared,
            settings={"drop_captions": DROP_CAPTIONS},
        ),
    },
    _train_prior,
    _evaluate_prior,
    _build_prior,
    needs=(CLIP_STAGE.name, DIFFUSION_STAGE.name, DECODER_STAGE.name),  # the latter two to measure
    reads_captions=True,
)


# --- the system --------------------------------------------------------------------------------


@dataclass(frozen=True)
class DALLE2Options(DiffusionOptions):
    """How embeddings and pictures are sampled; the decoder's are those of `DiffusionOptions`.

    Args:
        embedding: what the decoder is given: the one that the prior predicts, the text's own in
            its place, or none.
        use_caption: whether the decoder reads the caption as well.
        prior_steps: of the prior's sampler.
        prior_guidance: of the prior; 1 is the prior as it learned.
        candidates: embeddings that are sampled, of which the most similar to the text is kept.
        blend: whether two start pictures are blended; the first drawing is of the first picture's
            embedding, the last of the second's, the others lie between at equal angles.
        difference: how far an embedding is turned where prompts have weights, 0 (not) … 1.

    Raises:
        ValueError: for a value out of range, or options that do not go together.
    """

    embedding: str = "predicted"
    use_caption: bool = True
    prior_steps: int = 32
    prior_guidance: float = 1.0
    candidates: int = CANDIDATES
    blend: bool = False
    difference: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("number of prior steps", self.prior_steps, 1, TIMES)
        check_range("prior guidance", self.prior_guidance, 0, 20)
        check_range("number of candidates", self.candidates, 1, 64)
        check_range("difference", self.difference, 0, 1)
        if self.embedding not in EMBEDDINGS:
            known = ", ".join(EMBEDDINGS)
            raise ValueError(f"The embedding is {known}, not {shortened(self.embedding)}.")


@register
class DALLE2System(System):
    """The CLIP of chapter 6, a prior over its embeddings, and the decoder on chapter 9's network.

    Prompts with weights turn an embedding: the first one names the picture, or a start picture
    does, and the rest of the prompts, added with their weights, name a direction.

    Args:
        clip: embeds captions and pictures.
        prior: text embedding → image embedding.
        decoder: image embedding → picture.
        weights_id, worlds: see `System`.
    """

    name, title, chapter = "dalle2", "DALL·E 2", 10
    shows = "words, an image embedding, a picture"
    Options = DALLE2Options
    stages = (CLIP_STAGE, DIFFUSION_STAGE, DECODER_STAGE, PRIOR_STAGE)
    takes_start, varies = True, True

    def __init__(
        self,
        clip: TrainedCLIP,
        prior: DiffusionPrior,
        decoder: Decoder,
        weights_id: str,
        worlds: tuple[str, ...],
    ) -> None:
        self.clip, self.prior, self.decoder = clip, prior, decoder
        self.weights_id, self.worlds = weights_id, worlds
        self.resolution = decoder.network.config.resolution
        self.prior_process = prior_process()
        self.parts: Mapping[str, nn.Module] = {
            "clip": clip.model,
            "prior": prior,
            "decoder": decoder,
        }

    @classmethod
    def load(cls, files: Mapping[str, Path]) -> "DALLE2System":
        """All four from their weights.

        Raises:
            WeightsError: if weights are missing or damaged, or prior and decoder were trained on
                top of another CLIP or network than these.
        """
        cards = {name: weights.read_card(f.with_suffix(".json")) for name, f in files.items()}
        for name in (DECODER_STAGE.name, PRIOR_STAGE.name):
            for parent, wanted in cards[name].parents.items():
                if parent in cards and wanted != cards[parent].sha256:
                    raise WeightsError(
                        f"{files[name]} was trained on top of another {parent} "
                        f"({str(wanted)[:8]}) than {files[parent]} ({cards[parent].sha256[:8]}), "
                        "whose numbers mean something else. Train it again."
                    )
        clip, network = load_clip(files[CLIP_STAGE.name]), load_part(files[DIFFUSION_STAGE.name])
        prior, conditioning = (load_part(files[s.name]) for s in (PRIOR_STAGE, DECODER_STAGE))
        decoder = Decoder(network, conditioning)  # type: ignore[arg-type]
        worlds = tuple(world for world in clip.worlds if world in WORLDS)
        digests = "-".join(card.sha256[:8] for card in cards.values())
        return cls(clip, prior, decoder.eval(), digests, worlds)  # type: ignore[arg-type]

    def steps(self, request: Request, generator: torch.Generator) -> Iterator[Tensor]:
        """The picture x̂ that each step's mixture may become, from a blur to the picture."""
        options = request.options
        if not isinstance(options, DALLE2Options):
            raise ValueError(f"{self.name} takes DALLE2Options, not {type(options).__name__}.")
        if request.rows:
            raise ValueError(
                f"{self.name} makes variations of a start picture: rows of it cannot stay. Use a "
                "system that writes tokens to complete pictures."
            )
        captions = [c for c in request.captions for _ in range(request.best_of)]
        embeddings = self.image_embeddings(request, captions, options, generator)
        from_text = request.start is None
        texts = [_named(c, from_text) if options.use_caption else "" for c in captions]
        length = self.decoder.network.config.text_length
        ids = encode_captions(self.clip.text_tokenizer, texts, length)
        for step in decode(self.decoder, embeddings, ids, options, generator):
            yield step.x.clamp(-1, 1).cpu()

    @torch.no_grad()
    def image_embeddings(
        self,
        request: Request,
        captions: Sequence[Caption],
        options: DALLE2Options,
        generator: torch.Generator,
    ) -> Tensor:
        """The embedding (B, E) that each picture is decoded from."""
        if request.start is not None:
            base = self._start_embeddings(request, len(captions), options)
        elif options.blend:
            raise ValueError("To blend takes two start pictures.")
        else:
            base = self.predict([_named(caption, True) for caption in captions], options, generator)
        skip = int(request.start is None)  # the prompts that name the picture itself
        rows = []
        for embedding, caption in zip(base.split(1), captions, strict=True):
            prompts = [] if isinstance(caption, str) else list(caption)[skip:]
            rows.append(self._turned(embedding, prompts, options.difference))
        return torch.cat(rows)

    def predict(
        self, texts: Sequence[str], options: DALLE2Options, generator: torch.Generator
    ) -> Tensor:
        """z_I of captions: by the prior, or what the options put in its place."""
        device = next(self.prior.parameters()).device
        ids = self.ids(texts).to(device)
        text = self.clip.model.encode_text(ids)
        if options.embedding == "text":
            return text
        if options.embedding == "none":
            return no_embedding(text)
        return sample_image_embedding(
            self.prior,
            text,
            ids,
            self.prior_process,
            generator,
            options.prior_steps,
            options.prior_guidance,
            options.candidates,
        )

    def _start_embeddings(self, request: Request, count: int, options: DALLE2Options) -> Tensor:
        """z_I of start pictures, repeated for the candidates; for a blend, those between two."""
        assert request.start is not None
        pictures = pictures_from_bytes(request.start)
        found = embed_pictures(self.clip.model, pictures)
        if not options.blend:
            if len(found) not in (1, request.count):
                raise ValueError("Two start pictures are for a blend: set blend.")
            return found.repeat_interleave(count // len(found), 0)
        if len(found) != 2:
            raise ValueError(f"To blend takes two start pictures, not {len(found)}.")
        weights_of = torch.linspace(0, 1, request.count).tolist()
        path = torch.cat([slerp(found[:1], found[1:], weight) for weight in weights_of])
        return path.repeat_interleave(count // request.count, 0)

    def _turned(self, embedding: Tensor, prompts: Sequence[Any], weight: float) -> Tensor:
        """An embedding (1, E) turned towards what prompts name, added with their weights."""
        if not prompts:
            return embedding
        texts = [prompt.text for prompt in prompts]
        found = self.clip.model.encode_text(self.ids(texts).to(embedding.device))
        factors = torch.tensor([prompt.weight for prompt in prompts]).to(found)[:, None]
        more = (factors.clamp(min=0) * found).sum(0, keepdim=True)
        less = (-factors.clamp(max=0) * found).sum(0, keepdim=True)
        return text_difference(embedding, less, more, weight)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, T) of captions; those of an empty caption are the unconditional ones."""
        return encode_captions(self.clip.text_tokenizer, texts, self.prior.config.text_length)

    def read(self, caption: str) -> ReadCaption | None:
        """See `System.read`; of your own pictures any caption can be asked for, but not none."""
        if not self.worlds and not caption.strip():
            raise CaptionError("The caption is empty: say what to draw.")
        return super().read(caption)

    def scorers(self) -> dict[str, Callable[[System], Scorer]]:
        """The training reader of the world, and the CLIP that drew."""
        return {"reader": by_reader, "clip": lambda _: clip_scorer(self.clip)}

    def default_scorer(self, captions: Sequence[ReadCaption | None]) -> str:
        """The reader where the captions' world has one, else CLIP."""
        return "reader" if reader_reads(captions) else "clip"


def _named(caption: Caption, from_text: bool) -> str:
    """The text that names a picture: of several prompts the first, or none beside a start picture.

    Raises:
        ValueError: if that prompt has a weight.
    """
    if isinstance(caption, str):
        return caption
    if not from_text:
        return ""
    if caption[0].weight != 1:
        raise ValueError(
            "The first prompt names the picture, so its weight must be 1, not "
            f"{caption[0].weight:g}. Those after it say how to change it."
        )
    return caption[0].text
