"""From a caption to pictures, with the weights that ship.

drawing = draw("a small red star above a large striped blue ring", seed=1)
drawing.save("star.png")        # the file remembers caption, system, seed and weights
redraw("star.png")              # and can be drawn again, pixel for pixel
"""

import base64
import hashlib
import html
import io
import json
import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from t2ilearn import __version__, weights
from t2ilearn.dalle import DALLE, DVAE, Candidates, DVAEConfig, Scorer, beginning, keep_best
from t2ilearn.data.bpe import CaptionTokenizer
from t2ilearn.data.captions import CaptionError, Stated, WordTokenizer
from t2ilearn.data.emoji_captions import StatedEmoji
from t2ilearn.data.grammar import GRAMMARS, read_caption
from t2ilearn.data.interface import Tokenizer
from t2ilearn.data.together import worlds_in
from t2ilearn.prior import PixelCNN, Prior, PriorConfig, TransformerPrior, log_likelihood, sample
from t2ilearn.reader import Reader, ReaderConfig, aligned, aligned_emoji, score
from t2ilearn.tokens import null_caption
from t2ilearn.vqgan import VQGAN, Critic, CriticConfig
from t2ilearn.vqvae import VQVAE, PictureCodes, VQVAEConfig

SYSTEMS = {
    "vqvae": ("vqvae-book", "prior-book"),
    "vqvae-tiny": ("vqvae-tiny", "prior-tiny"),
    "vqgan": ("vqgan-book", "vqgan-prior-book"),
    "dalle": ("vqgan-book", "dalle-book"),
    "dalle-dvae": ("dvae-book", "dalle-dvae-book"),
}
PRIORS: dict[str, type[Prior]] = {
    "prior": TransformerPrior,
    "pixelcnn": PixelCNN,
    "vqgan-prior": TransformerPrior,
    "dalle": DALLE,
    "dalle-dvae": DALLE,
}
CODES_OF = {
    "prior": "vqvae",
    "pixelcnn": "vqvae",
    "vqgan-prior": "vqgan",
    "dalle": "vqgan",
    "dalle-dvae": "dvae",
}
# How `draw` samples unless told otherwise: the caption insisted on, the unlikeliest codes left out.
GUIDANCE_SCALE, TOP_P = 2.0, 0.9
METADATA_KEY = "t2ilearn"
MAX_COUNT = 64


class System(NamedTuple):
    """A VQ-VAE, the prior over its codes, how captions reach it, and an id of all weights.

    `worlds` are those of our own that it learned, whose captions and pictures can be read; there
    are none where it learned pictures of your own.
    """

    vqvae: PictureCodes
    prior: Prior
    tokenizer: Tokenizer
    weights_id: str
    worlds: tuple[str, ...]


def _config(kind: type, values: dict) -> Any:
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**lists)


def load_vqvae(name: str | Path) -> PictureCodes:
    """A VQ-VAE, a VQGAN without its critic, or a dVAE, from shipped weights (or a path), in
    evaluation mode."""
    stored = weights.load(name)
    if "critic" in stored.card:
        return load_players(name)[0]
    if stored.card["system"] == "dvae":
        dvae = DVAE(_config(DVAEConfig, stored.card["config"]))
        weights.load_into(dvae, stored)
        return dvae.eval()
    model = VQVAE(_config(VQVAEConfig, stored.card["config"]))
    weights.load_into(model, stored)
    return model.eval()


def load_players(name: str | Path) -> tuple[VQGAN, Critic]:
    """A VQGAN and its critic from shipped weights (or a path), in evaluation mode."""
    stored = weights.load(name)
    players = nn.ModuleDict(
        {
            "generator": VQGAN(_config(VQVAEConfig, stored.card["config"])),
            "critic": Critic(_config(CriticConfig, stored.card["critic"])),
        }
    )
    weights.load_into(players, stored)
    generator, critic = players.eval().values()
    assert isinstance(generator, VQGAN) and isinstance(critic, Critic)
    return generator, critic


def load_prior(name: str | Path) -> Prior:
    """A prior of either kind from shipped weights (or a path), in evaluation mode."""
    stored = weights.load(name)
    model = PRIORS[stored.card["system"]](_config(PriorConfig, stored.card["config"]))
    weights.load_into(model, stored)
    return model.eval()


@lru_cache(maxsize=4)
def load_reader(name: str = "reader") -> Reader:
    """The training reader ("reader") or a judge ("judge", "emoji-judge"), in evaluation mode."""
    stored = weights.load(name)
    model = Reader(_config(ReaderConfig, stored.card["config"]))
    weights.load_into(model, stored)
    return model.eval()


def load_tokenizer(prior: str | Path) -> Tokenizer:
    """The tokenizer that a prior learned its captions through, by its card.

    Raises:
        WeightsError: if its file is not the one that the prior learned from.
    """
    stated = weights.load(prior).card.get("tokenizer")
    if stated is None:
        return WordTokenizer()
    path = weights.find(prior).with_name(stated["file"])
    try:
        tokenizer = CaptionTokenizer.load(path, stated["length"])
    except ValueError as error:
        raise weights.WeightsError(str(error)) from None
    if hashlib.sha256(path.read_bytes()).hexdigest() != stated["sha256"]:
        raise weights.WeightsError(f"{path} is not the tokenizer that this prior learned from.")
    return tokenizer


def find_parts(system: str) -> tuple[str | Path, str | Path]:
    """The weights of a system's VQ-VAE and prior: names that ship, or files of own runs.

    Raises:
        ValueError: if the system is neither in `SYSTEMS` nor the folder of a prior's run.
    """
    if system in SYSTEMS:
        return SYSTEMS[system]
    run = Path(system)
    kind, _, preset = run.name.rpartition("-")
    if kind not in PRIORS or not preset or not run.is_dir():
        raise ValueError(
            f"Unknown system {system!r}; one of {', '.join(SYSTEMS)}, or the folder of a prior "
            "that you trained, such as runs/prior-tiny."
        )
    vqvae = run.with_name(f"{CODES_OF[kind]}-{preset}")
    return vqvae / f"{vqvae.name}.safetensors", run / f"{run.name}.safetensors"


@lru_cache(maxsize=4)
def load_system(name: str = "vqvae") -> System:
    """A complete text-to-image system.

    Args:
        name: one of `SYSTEMS`, or the folder of a prior's run; the run of its VQ-VAE lies beside
            it.

    Raises:
        ValueError: if there is no such system.
        WeightsError: if weights are missing or damaged, or the prior learned other codes.
    """
    first, second = find_parts(name)
    cards = [weights.load(part).card for part in (first, second)]
    learned = cards[1].get("metrics", {}).get("vqvae")
    if learned not in (None, cards[0]["sha256"]):
        raise weights.WeightsError(
            f"{second} learned the codes of another VQ-VAE ({learned[:8]}) than {first} "
            f"({cards[0]['sha256'][:8]}): its codes would mean nothing there."
        )
    return System(
        load_vqvae(first),
        load_prior(second),
        load_tokenizer(second),
        "-".join(card["sha256"][:8] for card in cards),
        tuple(world for world in worlds_in(cards[1]["data"]["world"]) if world in GRAMMARS),
    )


@dataclass(frozen=True)
class Request:
    """Everything that decides a drawing; `start` are codes of a picture to go on from."""

    caption: str
    system: str = "vqvae"
    seed: int = 0
    count: int = 4
    guidance_scale: float = GUIDANCE_SCALE
    best_of: int = 1
    temperature: float = 1.0
    top_p: float | None = TOP_P
    top_k: int | None = None
    scorer: str | None = None
    start: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise `CaptionError` or `ValueError` if this cannot be drawn."""
        find_parts(self.system)
        worlds = load_system(self.system).worlds
        if self.caption or not self.start:  # a picture that is begun may go on without a word
            if worlds:
                read_caption(self.caption, worlds)
            elif not self.caption.strip():  # of your own pictures any caption can be asked for
                raise CaptionError("The caption is empty: say what to draw.")
        if not 1 <= self.count * self.best_of <= MAX_COUNT or self.count < 1:
            raise ValueError(
                f"count × best-of must be 1 … {MAX_COUNT}, not {self.count} × {self.best_of}."
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"The seed must be 0 … 2^63 − 1, not {self.seed}.")
        if self.scorer not in (None, *SCORERS):
            raise ValueError(f"A scorer is one of {', '.join(SCORERS)}, not {self.scorer!r}.")
        if not 0 <= self.guidance_scale <= 20:
            raise ValueError(f"The guidance scale must be 0 … 20, not {self.guidance_scale}.")


@dataclass(frozen=True)
class Drawing:
    """Pictures drawn for one caption, and what the judge read in them.

    `aligned` is empty where there is no judge: for pictures of your own.
    """

    pictures: Float[Tensor, "n 3 h w"]
    request: Request
    weights_id: str
    aligned: list[bool] = field(default_factory=list)

    def image(self, columns: int | None = None) -> Image.Image:
        """The pictures side by side."""
        n, _, height, width = self.pictures.shape
        columns = columns or n
        sheet = Image.new("RGB", (columns * width, -(-n // columns) * height))
        for i, picture in enumerate(_bytes(self.pictures)):
            at = (i % columns * width, i // columns * height)
            sheet.paste(Image.fromarray(picture.numpy()), at)
        return sheet

    def metadata(self) -> dict:
        """What the file remembers: the request, the weights' id and the package's version."""
        return {**asdict(self.request), "weights": self.weights_id, "version": __version__}

    def save(self, path: str | Path) -> Path:
        """Write a PNG file whose metadata carry what `redraw` needs. An existing file is only
        replaced once the new one is complete.

        Raises:
            OSError: if the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise ValueError(f"Pictures are saved as .png, not {path.suffix or 'without ending'}.")
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(self.metadata()))
        partial = path.with_name(path.name + ".part")
        try:
            self.image().save(partial, format="PNG", pnginfo=info)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def verdict(self) -> str:
        """How many pictures there are, and how many show what the caption states."""
        count = f"{len(self.pictures)} pictures"
        return f"{sum(self.aligned)} of {count} as stated" if self.aligned else count

    def __repr__(self) -> str:
        return f"Drawing({self.request.caption!r}, {self.verdict()})"

    def _repr_html_(self) -> str:
        """For notebooks. The caption is escaped: it is somebody's text, not markup."""
        buffer = io.BytesIO()
        self.image().save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        caption = html.escape(self.request.caption)
        note = f"{caption} · {self.verdict()}"
        count, height = len(self.pictures), 2 * self.pictures.shape[-2]
        return (
            f'<figure style="margin:0"><img alt="{count} pictures drawn for: {caption}" '
            f'src="data:image/png;base64,{data}" style="height:{height}px;'
            f'image-rendering:pixelated"><figcaption>{note}</figcaption></figure>'
        )


def _bytes(pictures: Float[Tensor, "n 3 h w"]) -> Tensor:
    """(n, h, w, 3) uint8."""
    return pictures.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def draw(
    caption: str,
    *,
    system: str = "vqvae",
    seed: int = 0,
    count: int = 4,
    guidance_scale: float = GUIDANCE_SCALE,
    best_of: int = 1,
    temperature: float = 1.0,
    top_p: float | None = TOP_P,
    top_k: int | None = None,
    scorer: str | None = None,
) -> Drawing:
    """Draw pictures for a caption.

    Args:
        caption: a sentence of a world that the system learned, e.g. "a small red star above a blue
            ring" or "a dodo, outline, on a sky background"; any caption, if it learned pictures of
            your own.
        system: which model draws: one of `SYSTEMS`, or the folder of a prior you trained.
        seed: the same seed, system and weights give the same pictures on the same machine.
        count: how many pictures.
        guidance_scale: 1 follows the caption as learned, more insists, 0 ignores it.
        best_of: draw this many for each picture kept.
        temperature, top_p, top_k: sharpen or truncate the distribution over codes; temperature 0
            always takes the likeliest code, so that all pictures are the same.
        scorer: who chooses the best, one of `SCORERS`. By default the training reader among shapes,
            and of what it cannot read what the prior finds likeliest.

    Raises:
        CaptionError: if the caption cannot be read.
        ValueError: if an argument is out of its range.
        WeightsError: if weights are missing or damaged.
    """
    how = (guidance_scale, best_of, temperature, top_p, top_k, scorer)
    return _drawn(Request(caption, system, seed, count, *how))


def complete(
    picture: Float[Tensor, "3 h w"],
    caption: str | None = None,
    *,
    rows: int = 4,
    system: str = "dalle",
    **how: Any,
) -> Drawing:
    """Finish a picture of which the upper part is given, so that it shows what the caption says.

    Args:
        picture: at the system's resolution, in [−1, 1]. What is below the rows kept is not looked
            at.
        caption: None goes on as the system likes.
        rows: rows of codes to keep, from above.
        system: which model draws.
        how: seed, count, guidance_scale and all else that `draw` takes.

    Raises:
        CaptionError, ValueError, WeightsError: as `draw`, and for a picture of another size or
            range, or no row left to draw.
    """
    if picture.ndim != 3:
        raise ValueError(f"One picture is of shape (3, H, W), not {tuple(picture.shape)}.")
    kept = beginning(load_system(system).vqvae, picture[None], rows)[0]
    return _drawn(Request(caption or "", system, start=tuple(kept.tolist()), **how))


@torch.no_grad()
def _drawn(request: Request) -> Drawing:
    """The pictures that a request decides."""
    request.check()
    system, caption = load_system(request.system), request.caption
    stated = read_caption(caption, system.worlds) if caption and system.worlds else None
    name = request.scorer or ("reader" if isinstance(stated, Stated) else "likelihood")
    if name == "reader" and not isinstance(stated, Stated):
        raise ValueError("The training reader reads captions of shapes; let likelihood choose.")
    n = request.count * request.best_of
    codes = sample(
        system.prior,
        _ids(system, [caption] * n),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        guidance_scale=request.guidance_scale,
        start=torch.tensor([request.start], dtype=torch.int64).expand(n, -1),
        generator=torch.Generator().manual_seed(request.seed),
    )
    pictures = system.vqvae.decode_tokens(codes).clamp(-1, 1)
    if request.best_of > 1:
        candidates = Candidates(pictures, codes, [caption] * n)
        pictures, _ = keep_best(candidates, request.best_of, SCORERS[name](system))
    return Drawing(pictures, request, system.weights_id, _read_by_judge(pictures, caption, stated))


def by_reader(system: System) -> Scorer:
    """How surely the training reader finds in a picture what its caption says: shapes only."""
    return lambda among: score(load_reader("reader"), among.pictures, among.captions)


def by_likelihood(system: System) -> Scorer:
    """How likely the prior finds a picture's codes, given its caption."""

    return lambda among: log_likelihood(system.prior, among.codes, _ids(system, among.captions))


def _ids(system: System, captions: list[str]) -> Int[Tensor, "n t"]:
    """Captions as the system reads them; an empty one says nothing at all."""
    ids = null_caption(len(captions), system.prior.config.words)
    said = [number for number, caption in enumerate(captions) if caption]
    if said:
        ids[said] = system.tokenizer.encode([captions[number] for number in said])
    return ids


# Who may choose among drawings; the judges may not, for they judge what was chosen.
SCORERS: dict[str, Callable[[System], Scorer]] = {
    "reader": by_reader,
    "likelihood": by_likelihood,
}


def _read_by_judge(
    pictures: Float[Tensor, "n 3 h w"], caption: str, stated: Stated | StatedEmoji | None
) -> list[bool]:
    """Which pictures show what the caption states; nothing where no judge can read them."""
    if isinstance(stated, Stated):
        return aligned(load_reader("judge"), pictures, [caption] * len(pictures)).tolist()
    if isinstance(stated, StatedEmoji):
        found = aligned_emoji(load_reader("emoji-judge"), pictures, [stated] * len(pictures))
        return found.tolist()
    return []


def redraw(path: str | Path) -> Drawing:
    """Draw again what a file made by `Drawing.save` remembers.

    Raises:
        ValueError: if the file carries no metadata of ours, or damaged ones.
        WeightsError: if it was drawn with other weights than those installed.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(METADATA_KEY)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable picture: {error}.") from None
    if text is None:
        raise ValueError(f"{path} was not drawn by t2ilearn: it carries no caption and seed.")
    try:
        stored = json.loads(text)
        weights_id = stored.pop("weights")
        stored.pop("version")
        stored["start"] = tuple(map(operator.index, stored.get("start", ())))
        request = replace(Request(stored["caption"]), **stored)
        _check_kinds(request)
        request.check()
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"The metadata of {path} are damaged: {error}.") from None
    if load_system(request.system).weights_id != weights_id:
        raise weights.WeightsError(
            f"{path} was drawn with weights {weights_id}, but "
            f"{load_system(request.system).weights_id} are installed; the picture would differ."
        )
    return _drawn(request)


def _check_kinds(request: Request) -> None:
    """Raise TypeError for a word where a number belongs: files can hold anything."""
    for whole in (request.seed, request.count, request.best_of, request.top_k):
        operator.index(0 if whole is None else whole)
    for number in (request.guidance_scale, request.temperature, request.top_p):
        math.isfinite(1 if number is None else number)
