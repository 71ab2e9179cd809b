"""The released CLIP ViT-B/32, read into our `CLIP`.

"Learning Transferable Visual Models From Natural Language Supervision" (Radford et al. 2021). The
same numbers are released in three files, and `load_clip` reads each of them:

| file | layout |
|---|---|
| `ViT-B-32.pt` of OpenAI | TorchScript, in half precision; `torchscript` reads its tensors |
| checkpoints of open_clip | `torch.save`, with OpenAI's names |
| `model.safetensors` of Hugging Face | names of Transformers; queries, keys and values are apart |

| ours | OpenAI, open_clip | Hugging Face |
|---|---|---|
| `image_tower.patches` | `visual.conv1` | `vision_model.embeddings.patch_embedding` |
| `*.attention.qkv` | `*.attn.in_proj_*` | `*.self_attn.{q,k,v}_proj` |
| `*.projection.weight` | `visual.proj`, `text_projection`, transposed | `*_projection.weight` |

Differs from the paper in: nothing; the numbers are those of the file, in float32.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from t2ilearn.models.clip import CLIP, ImageTowerConfig, TextTowerConfig
from t2ilearn.pretrained.checkpoints import is_torchscript, read_checkpoint
from t2ilearn.pretrained.torchscript import read_torchscript
from t2ilearn.weights import (
    WeightsError,
    check_default_dtype,
    check_state,
    read_tensors,
    without_wrappers,
)

# Mean and standard deviation of red, green and blue over OpenAI's training pictures.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RELEASED = {
    "ViT-B-32": (
        ImageTowerConfig(224, 32, 768, 12, 12, 512, _MEAN, _STD),
        TextTowerConfig(49408, 77, 512, 12, 8, 512, end_token=49407),
    ),
}
# What such files also hold and no model needs: sizes, the causal mask, the numbers 0, 1, 2, …
_DROPPED = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids"}


class _Layout(NamedTuple):
    """How one family of files names what we have.

    Args:
        marker: a tensor that only such files have.
        patterns: a pattern of our names, and what theirs have in its place, in this order.
        transposed: whether they store projections as (D, E).
    """

    marker: str
    patterns: tuple[tuple[str, str], ...]
    transposed: bool


_OPENAI = _Layout(
    "visual.conv1.weight",
    (
        (r"^image_tower\.patches", "visual.conv1"),
        (r"^image_tower\.class_token", "visual.class_embedding"),
        (r"^image_tower\.position", "visual.positional_embedding"),
        (r"^image_tower\.norm_", "visual.ln_"),
        (r"^image_tower\.projection\.weight", "visual.proj"),
        (r"^image_tower\.blocks", "visual.transformer.resblocks"),
        (r"^text_tower\.embedding", "token_embedding"),
        (r"^text_tower\.position", "positional_embedding"),
        (r"^text_tower\.norm\.", "ln_final."),
        (r"^text_tower\.projection\.weight", "text_projection"),
        (r"^text_tower\.blocks", "transformer.resblocks"),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"\.attention\.qkv\.", ".attn.in_proj_"),
        (r"\.attention\.out\.", ".attn.out_proj."),
        (r"\.mlp\.0\.", ".mlp.c_fc."),
        (r"\.mlp\.2\.", ".mlp.c_proj."),
    ),
    transposed=True,
)
_HUGGING_FACE = _Layout(
    "vision_model.embeddings.patch_embedding.weight",
    (
        (r"^image_tower\.patches", "vision_model.embeddings.patch_embedding"),
        (r"^image_tower\.class_token", "vision_model.embeddings.class_embedding"),
        (r"^image_tower\.position", "vision_model.embeddings.position_embedding.weight"),
        (r"^image_tower\.norm_pre", "vision_model.pre_layrnorm"),  # so it is spelt there
        (r"^image_tower\.norm_post", "vision_model.post_layernorm"),
        (r"^image_tower\.projection", "visual_projection"),
        (r"^image_tower\.blocks", "vision_model.encoder.layers"),
        (r"^text_tower\.embedding", "text_model.embeddings.token_embedding"),
        (r"^text_tower\.position", "text_model.embeddings.position_embedding.weight"),
        (r"^text_tower\.norm\.", "text_model.final_layer_norm."),
        (r"^text_tower\.projection", "text_projection"),
        (r"^text_tower\.blocks", "text_model.encoder.layers"),
        (r"\.norm(\d)\.", r".layer_norm\1."),
        (r"\.attention\.out\.", ".self_attn.out_proj."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.2\.", ".mlp.fc2."),
    ),
    transposed=False,
)


def load_clip(path: str | Path, name: str = "ViT-B-32") -> CLIP:
    """A released CLIP, in evaluation mode on the CPU, in float32.

    Args:
        path: one of the files in the table above; `download.download("ViT-B-32")` fetches the
            first.
        name: which model that is, one of `RELEASED`.

    Raises:
        WeightsError: if the name is unknown, the file is missing or damaged, or its tensors are
            not exactly those of that model.
    """
    if name not in RELEASED:
        raise WeightsError(
            f"No released CLIP is called {name!r}. There are: {', '.join(RELEASED)}."
        )
    check_default_dtype()
    owner = f"{name!r}; {path} is a checkpoint of another configuration"
    return clip_from_state(read_released(Path(path)), *RELEASED[name], owner)


def read_released(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names there; nothing that it holds is run.

    Raises:
        WeightsError: if it is missing, damaged or of another kind.
    """
    if path.suffix == ".safetensors":
        return {without_wrappers(key): t for key, t in read_tensors(path).items()}
    return read_torchscript(path) if is_torchscript(path) else read_checkpoint(path)


def clip_from_state(
    state: Mapping[str, Tensor],
    image_config: ImageTowerConfig,
    text_config: TextTowerConfig,
    owner: str = "CLIP",
) -> CLIP:
    """A CLIP of these sizes from tensors under OpenAI's or Hugging Face's names.

    Args:
        state: half precision becomes float32; float64 stays.
        owner: of the tensors, for errors.

    Raises:
        WeightsError: naming tensors that are missing, left over, or of another shape, or if the
            names are of neither layout.
    """
    layouts = [layout for layout in (_OPENAI, _HUGGING_FACE) if layout.marker in state]
    if not layouts:
        raise WeightsError(
            f"These are not the tensors of {owner}: there is neither {_OPENAI.marker} (OpenAI, "
            f"open_clip) nor {_HUGGING_FACE.marker} (Hugging Face) among them."
        )
    layout = layouts[0]
    with torch.device("meta"):  # sizes only: the given tensors become the parameters
        model = CLIP(image_config, text_config)
    found = {key: t for key, t in state.items() if key.rpartition(".")[2] not in _DROPPED}
    wanted: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        names = _their_names(key, layout)
        turned = tensor.mT if _is_turned(key, layout) else tensor
        parts = turned.chunk(3) if len(names) == 3 else (turned,)
        wanted |= dict(zip(names, parts, strict=True))
    check_state(found, wanted, owner)
    model.load_state_dict(
        {key: _joined(key, found, layout) for key in model.state_dict()}, strict=True, assign=True
    )
    return model.requires_grad_(True).eval()


def _their_names(ours: str, layout: _Layout) -> tuple[str, ...]:
    """What a layout calls a tensor of ours; three names where q, k and v are apart."""
    name = ours
    for pattern, theirs in layout.patterns:
        name = re.sub(pattern, theirs, name)
    if ".attention.qkv." not in name:
        return (name,)
    return tuple(name.replace(".attention.qkv.", f".self_attn.{part}_proj.") for part in "qkv")


def _is_turned(ours: str, layout: _Layout) -> bool:
    """Whether a layout stores the transpose of a tensor of ours."""
    return layout.transposed and ours.endswith("projection.weight")


def _joined(ours: str, found: Mapping[str, Tensor], layout: _Layout) -> Tensor:
    """One tensor of ours from theirs, at least in float32."""
    parts = [found[name] for name in _their_names(ours, layout)]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (tensor.mT if _is_turned(ours, layout) else tensor).contiguous()
