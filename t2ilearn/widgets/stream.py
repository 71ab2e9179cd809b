"""From text to image tokens: Gumbel-softmax samples, and a picture sampled token by token."""

import base64
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
import traitlets
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from t2ilearn.data.bpe import CaptionTokenizer
from t2ilearn.data.captions import words_of
from t2ilearn.models.layers import Attention
from t2ilearn.models.tokens import PAD, null_caption
from t2ilearn.models.transformer import Prior
from t2ilearn.systems import System
from t2ilearn.training.flight import contact_sheet
from t2ilearn.widgets.base import Widget, joined, listed, numbers, points
from t2ilearn.widgets.pictures import data_uri

LOGITS = (1.2, 0.4, -0.6, 0.8, -1.5, -0.2)
EDGE, PLANE = 3.0, 2.4  # the Gumbel lab shows logits to ±3, code vectors to ±2.4 both ways,
MIN_TEMPERATURE, MAX_TEMPERATURE = 1 / 16, 4.0  # and τ between these


class GumbelLab(Widget):
    """A Gumbel-softmax sample of K tokens: noise, softmax at temperature τ, the decoder's input.

    Args:
        logits: l, of two to eight tokens, in −3 … 3.
        code_vectors: their vectors (K, 2) in −2.4 … 2.4; by default on a circle.
        temperature: τ at the start, 1/16 … 4.
        seed: of the noise.

    Raises:
        ValueError: for a number out of its range, or not as many code vectors as logits.
    """

    _esm = joined("shared", "plane", "gumbel")
    logits = listed()
    code_vectors = listed()
    temperature = traitlets.Float().tag(sync=True)
    seed = traitlets.Int().tag(sync=True)

    def __init__(
        self,
        logits: Any = LOGITS,
        code_vectors: Any = None,
        temperature: float = 1.0,
        seed: int = 6,
    ) -> None:
        row = numbers(logits, "logits", -EDGE, EDGE)
        turns = [2 * math.pi * k / len(row) for k in range(len(row))]
        circle = [(2 * math.sin(turn), 2 * math.cos(turn)) for turn in turns]
        places = points(circle if code_vectors is None else code_vectors, "code_vectors", PLANE)
        fallback = "Gumbel lab: Gumbel-softmax samples; logits, noise and temperature."
        traits = {"logits": row, "code_vectors": places, "temperature": temperature, "seed": seed}
        super().__init__(fallback=fallback, **traits)

    @traitlets.validate("logits", "code_vectors")
    def _check_code_vectors(self, proposal: Any) -> list:
        name, value, count = proposal["trait"].name, proposal["value"], len(self.logits)
        if not 2 <= count <= 8 or len(self.code_vectors) != count:
            raise ValueError(
                f"{count} logits for {len(self.code_vectors)} code vectors; two to eight of each."
            )
        logits = name == "logits"
        return numbers(value, name, -EDGE, EDGE) if logits else points(value, name, PLANE)

    @traitlets.validate("temperature")
    def _check_temperature(self, proposal: Any) -> float:
        return numbers([proposal["value"]], "temperature", MIN_TEMPERATURE, MAX_TEMPERATURE)[0]


# --- a picture as a sentence ---------------------------------------------------------------------


class TokenSampler(Widget):
    """Tokens sampled one by one: the next one's probabilities, and its query's attention.

    It opens when half of the first drawing is done.

    Args:
        drawings: one or more, from `record_drawing`.

    Raises:
        ValueError: if there is none, one is damaged, or all are too large for a page.
    """

    _esm = joined("shared", "sampler")
    drawings = listed()

    def __init__(self, drawings: Sequence[dict[str, Any]]) -> None:
        captions = ", ".join(one["caption"] for one in drawings)
        fallback = f"Token sampler: {captions}; token by token, with attention."
        super().__init__(drawings=list(drawings), fallback=fallback)

    @traitlets.validate("drawings")
    def _check_drawings(self, proposal: Any) -> list[dict[str, Any]]:
        if not proposal["value"]:
            raise ValueError("A token sampler needs one drawing at least: see record_drawing.")
        for one in proposal["value"]:
            n = len(one["tokens"])
            wanted = n * (len(one["text"]) + 2) + n * (n - 1) // 2
            sizes = {len(base64.b64decode(text)) for heads in one["attention"] for text in heads}
            lengths = {len(one[name]) for name in ("likeliest", "chances", "chosen")}
            if sizes != {wanted} or lengths != {n} or len(one["layers"]) != len(one["attention"]):
                raise ValueError(f"The drawing of {one['caption']!r} is damaged: record it anew.")
        return proposal["value"]


@torch.no_grad()
def attention_weights(
    model: Prior, indices: Int[Tensor, "b n"], caption: Int[Tensor, "b t"]
) -> Float[Tensor, "depth b heads s s"]:
    """The attention weights softmax(q kᵀ / √d) of every block and head, over all tokens.

    Returns:
        Rows are queries, columns keys. The last N queries predict the N image tokens.

    Raises:
        ValueError: if the model has no such stream.
    """
    found: list[Tensor] = []

    def keep(layer: Attention, given: tuple, named: dict) -> None:
        found.append(_weights(layer, *given, **named))

    with ExitStack() as hooks:
        for block in getattr(model, "blocks", ()):
            hooks.enter_context(block.attention.register_forward_pre_hook(keep, with_kwargs=True))
        model(indices, caption)
    if not found:
        raise ValueError("This model has no attention between tokens: give a Transformer.")
    return torch.stack(found)


def _weights(
    layer: Attention, x: Tensor, mask: Any = None, cache: Any = None, is_causal: bool = False
) -> Float[Tensor, "b heads s s"]:
    """The weights of attention: its output when the values are unit vectors."""
    b, s, _ = x.shape
    q, k, _ = layer.qkv(x).view(b, s, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    v = torch.eye(s, dtype=q.dtype, device=q.device).expand(b, layer.num_heads, s, s)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


@torch.no_grad()
def record_drawing(
    system: System,
    caption: str,
    tokens: Int[Tensor, " n"],
    guidance_scale: float = 1.0,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A drawing for `TokenSampler`: probabilities, canvases and attention of every step.

    Args:
        system: whose prior is conditioned on the caption; from `systems.load`.
        tokens: the image tokens, for example from `sample`.
        guidance_scale: s of the probabilities, which are those before top-k or top-p. Attention is
            that of the stream with the caption.
        layers: whose attention is kept, counting from 0; by default of the middle and the last.
            Six heads over 64 tokens take some 24 KB per layer.

    Raises:
        ValueError: for other numbers of tokens or other layers than the prior has.
        CaptionError: for a caption that the tokenizer cannot encode.
    """
    model = system.parts["prior"]
    depth, n = model.config.num_layers, model.config.num_image_tokens
    layers = sorted({depth // 2, depth - 1}) if layers is None else list(layers)
    if len(tokens) != n or not set(layers) <= set(range(depth)) or not layers:
        raise ValueError(
            f"A drawing has {n} tokens, and layers are 0 … {depth - 1}; these are {len(tokens)} "
            f"tokens and layers {layers}."
        )
    ids = system.text_tokenizer.encode([caption]).to(tokens.device)
    empty = null_caption(*ids.shape).to(tokens.device)
    c, u = (model.code_logits(tokens[None], given)[0] for given in (ids, empty))
    p = (u + guidance_scale * (c - u)).softmax(-1)  # (N, K)
    best = p.topk(min(5, p.shape[1]))
    text = _readable(system, caption)
    sizes = len(tokens), len(text), ids.shape[1]
    weights = attention_weights(model, tokens[None], ids)[layers, 0]  # (layers, heads, S, S)
    return {
        "caption": caption,
        "text": text,
        "padding": int((ids == PAD).sum()),
        "tokens": tokens.tolist(),
        "likeliest": best.indices.tolist(),
        "chances": [numbers(row, "chances") for row in best.values],
        "chosen": numbers(p.gather(1, tokens[:, None])[:, 0], "chosen"),
        "layers": layers,
        "attention": [[_packed(w, *sizes) for w in heads] for heads in weights],
        "sheet": data_uri(_canvases(system, tokens), 70),
    }


def _readable(system: System, caption: str) -> list[str]:
    """The text of each id of a caption; a piece that continues a word begins with a dot."""
    if not isinstance(system.text_tokenizer, CaptionTokenizer):
        return [*words_of(caption), "end"]
    pieces = system.text_tokenizer.pieces(caption)  # a new word begins with a blank
    return [(p[1:] or "␣") if p[0] == " " else f"·{p}" for p in pieces] + ["end"]


def _packed(weights: Float[Tensor, "s s"], n: int, text: int, length: int) -> str:
    """The attention of n queries to start tokens, text, padding and image: roots, as bytes.

    Args:
        text: how many ids of the caption's `length` are no padding.
    """
    begin = len(weights) - n  # the image's start token, whose query predicts the first image token
    first = begin - length  # of the caption: 1 after a start token of its own, 0 without
    rows = []
    for i, row in enumerate(weights[begin:]):
        start = row[:first].sum() + row[begin]
        to_text, padding = row[first : first + text], row[first + text : begin].sum()
        rows += [start[None], to_text, padding[None], row[begin + 1 : begin + 1 + i]]
    roots = (255 * torch.cat(rows).sqrt()).round().byte()
    return base64.b64encode(bytes(roots.tolist())).decode("ascii")


def _canvases(system: System, tokens: Int[Tensor, " n"]) -> Image.Image:
    """The picture after 0 … N tokens, the rest grey: row by row, no fewer columns than rows.

    The decoder needs all tokens, so it gets the first one wherever none is sampled yet.
    """
    decoder = system.parts["tokenizer"]
    n, side = len(tokens), decoder.config.side
    known = torch.ones(n + 1, n, dtype=torch.bool, device=tokens.device).tril(-1)
    pictures = decoder.decode_tokens(torch.where(known, tokens, tokens[0]))
    shown = F.interpolate(known.float().view(-1, 1, side, side), pictures.shape[-2:])
    columns = math.ceil(math.sqrt(n + 1))
    sheet = F.pad(pictures * shown, (0, 0) * 3 + (0, -(n + 1) % columns))
    sheet = sheet.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # (3, rows, H, columns, W)
    return contact_sheet(sheet.flatten(3).flatten(1, 2)[None])
