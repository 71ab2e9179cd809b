"""The released VQGANs of "Taming Transformers", read into our `VQVAE`.

"Taming Transformers for High-Resolution Image Synthesis" (Esser, Rombach & Ommer 2021) came with
checkpoints of PyTorch Lightning. `models.taming.make_taming_vqgan` builds the same networks under
our names; `load_taming` fills them from such a file.

| in the file | here |
|---|---|
| `encoder.*`, `quant_conv` | `TamingEncoder` |
| `quantize.embedding.weight` or `quantize.*` | the codebook, or the Gumbel quantizer |
| `post_quant_conv`, `decoder.*` | `TamingDecoder` |
| `loss.*` | dropped: the discriminator and the perceptual trunk, which only training needs |

Differs from the paper in: nothing; the numbers are those of the file.
"""

import re
from pathlib import Path

import torch

from t2ilearn.models.taming import RELEASED, make_taming_vqgan
from t2ilearn.models.vqvae import VQVAE
from t2ilearn.pretrained.checkpoints import read_checkpoint
from t2ilearn.weights import WeightsError, check_default_dtype, check_state

_DROPPED = ("loss.",)
_OWN = {"quantizer.counts"}  # how often each code was used lately: no released file has it
_TAMING = (  # a pattern of our names, and what their names have in its place, in this order
    (r"^encoder\.quant_conv", "quant_conv"),
    (r"^decoder\.post_quant_conv", "post_quant_conv"),
    (r"^quantizer\.codebook", "quantize.embedding.weight"),
    (r"^quantizer", "quantize"),
    (r"^encoder\.levels\.(\d)\.resize\.1", r"encoder.down.\1.downsample.conv"),
    (r"^decoder\.levels\.(\d)\.resize\.1", r"decoder.up.\1.upsample.conv"),
    (r"^encoder\.levels", "encoder.down"),
    (r"^decoder\.levels", "decoder.up"),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.0", ".mid.block_1"),
    (r"\.middle\.1", ".mid.attn_1"),
    (r"\.middle\.2", ".mid.block_2"),
    (r"\.skip\.", ".nin_shortcut."),
    (r"\.out\.", ".proj_out."),
)


def taming_key(ours: str) -> str:
    """The name that a checkpoint of "Taming Transformers" gives to a tensor of our model."""
    for pattern, theirs in _TAMING:
        ours = re.sub(pattern, theirs, ours)
    return ours


def load_taming(path: str | Path, name: str = "f16-16384") -> VQVAE:
    """A released VQGAN of "Taming Transformers", in evaluation mode on the CPU.

    Args:
        path: the authors' `last.ckpt`.
        name: which model that is, one of `models.taming.RELEASED`.

    Raises:
        WeightsError: if the name is unknown, the file cannot be read (see `read_checkpoint`), or
            its tensors are not exactly those of that model.
    """
    if name not in RELEASED:
        raise WeightsError(
            f"No released VQGAN is called {name!r}. There are: {', '.join(RELEASED)}."
        )
    check_default_dtype()
    found = {k: t for k, t in read_checkpoint(path).items() if not k.startswith(_DROPPED)}
    with torch.device("meta"):  # sizes only: the file's own tensors become the parameters
        model = make_taming_vqgan(RELEASED[name])
    wanted = {key: t for key, t in model.state_dict().items() if key not in _OWN}
    owner = f"{name!r}; {path} is a checkpoint of another configuration"
    check_state(found, {taming_key(key): t for key, t in wanted.items()}, owner)
    state = {key: found[taming_key(key)].float().contiguous() for key in wanted}
    for key in _OWN & model.state_dict().keys():
        state[key] = torch.ones(model.state_dict()[key].shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()
