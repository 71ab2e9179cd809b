"""Quantizers: each vector z of a grid becomes one of K code vectors, and its number is the token.

    z → project → the index of the nearest code vector → lookup → e;   z_q = z + sg[e − z]

Papers: VQ-VAE (van den Oord, Vinyals & Kavukcuoglu 2017), finite scalar quantisation (Mentzer et
al. 2023).

| symbol | name |
|---|---|
| z_e(x) | `z`, the encoder's output |
| e | a code vector: a row of the `codebook`, K × D |
| k | `indices`, the tokens: numbers of code vectors |
| z_q(x) | `z_q`, the decoder's input: the value of e with the gradient of z |
| sg[·] | `.detach()` |
| γ, N, m | `decay`, `counts`, `sums`: the moving averages of appendix A.1 |

Differs from the papers in: squares are means over numbers, not sums; with `cosine` encodings and
code vectors are compared on the unit sphere (Yu et al. 2022); code vectors can start at the centres
of real encodings, and those that are no longer used are restarted (Dhariwal et al. 2020).

Letters: B batch, h and w grid, K code vectors, D numbers in each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .distributed import broadcast_from_first_rank, gather_ranks, sum_over_ranks
from .layers import at_least_float32

QUANTIZERS = ("ema", "gradient", "fsq")


class Quantized(NamedTuple):
    """z_q for the decoder, the tokens, and the quantizer's two terms of Eq. 3."""

    z_q: Float[Tensor, "b d h w"]
    indices: Int[Tensor, "b h w"]
    codebook_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]


class Quantizer(nn.Module):
    """What every quantizer offers: z → `Quantized`, and the way there in steps."""

    def project(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """z as it is compared with the code vectors, in float32 or better."""
        raise NotImplementedError

    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """The token of each projected z."""
        raise NotImplementedError

    def embeddings(self) -> Float[Tensor, "k d"]:
        """The K code vectors, as z is compared with them."""
        raise NotImplementedError

    def lookup(self, indices: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Tokens → code vectors (Eq. 2 of the VQ-VAE paper)."""
        return F.embedding(indices, self.embeddings()).movedim(-1, 1)


class VectorQuantizer(Quantizer):
    """Each z becomes the nearest of K code vectors, which learn by gradient (section 3.2).

    Args:
        codebook_size, code_dim: K and D.
        cosine: put encodings and code vectors on the unit sphere first.
        decay: γ of the running counts, by which dead code vectors are recognised.
    """

    def __init__(
        self, codebook_size: int, code_dim: int, cosine: bool = False, decay: float = 0.99
    ) -> None:
        super().__init__()
        self.cosine, self.decay = cosine, decay
        start = torch.randn(codebook_size, code_dim)
        start = F.normalize(start, dim=1) if cosine else start / code_dim**0.5
        self.codebook: Tensor
        self.counts: Tensor
        self._make_codebook(start)
        self.register_buffer("counts", torch.ones(codebook_size))  # recent uses per step

    def _make_codebook(self, start: Float[Tensor, "k d"]) -> None:
        self.codebook = nn.Parameter(start)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        z = self.project(z)
        indices = self.nearest(z)  # (B, h, w)
        e = self.lookup(indices)  # (B, D, h, w)

        codebook_loss, commitment_loss = self.losses(z, e)
        z_q = z + (e - z).detach()  # straight through: the value of e, the gradient of z

        if self.training:
            self.update_statistics(z, indices)
        return Quantized(z_q, indices, codebook_loss, commitment_loss)

    def losses(
        self, z: Float[Tensor, "b d h w"], e: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The second and the third term of Eq. 3; the detached side receives no gradient."""
        codebook_loss = F.mse_loss(e, z.detach())
        commitment_loss = F.mse_loss(z, e.detach())
        return codebook_loss, commitment_loss

    def project(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """z as it is compared: in float32 or better, on the unit sphere if `cosine`."""
        z = at_least_float32(z)
        return F.normalize(z, dim=1) if self.cosine else z

    def embeddings(self) -> Float[Tensor, "k d"]:
        """The K code vectors as they are compared: on the unit sphere if `cosine`."""
        return F.normalize(self.codebook, dim=1) if self.cosine else self.codebook

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """argmin_k ‖z − e_k‖² (Eq. 1), without ‖z‖², which is the same for every k."""
        e = self.embeddings()
        with torch.autocast(z.device.type, enabled=False):
            distances = (e**2).sum(1) - 2 * z.movedim(1, -1) @ e.T  # (B, h, w, K)
        return distances.argmin(-1)

    @torch.no_grad()
    def update_statistics(self, z: Float[Tensor, "b d h w"], indices: Int[Tensor, "b h w"]) -> None:
        """Count how often a batch uses each code vector, n:  N ← γ N + (1 − γ) n."""
        uses = torch.bincount(indices.flatten(), minlength=len(self.counts)).to(self.counts)
        self.counts.lerp_(sum_over_ranks(uses), 1 - self.decay)

    @torch.no_grad()
    def replace_codes(self, which: Int[Tensor, " m"], vectors: Float[Tensor, "m d"]) -> None:
        """Overwrite some code vectors, and start their counts again at 1."""
        self.codebook[which] = vectors
        self.counts[which] = 1.0

    @torch.no_grad()
    def restart_dead_codes(
        self, z: Float[Tensor, "b d h w"], generator: torch.Generator, threshold: float = 0.03
    ) -> int:
        """Move code vectors that are hardly used onto encodings of a batch (Dhariwal et al. 2020).

        Args:
            z: encodings, of which those far from every code vector are more likely to be chosen.
                From a uniform choice, most would lie where code vectors are crowded already.
            threshold: a code vector with fewer uses per step is dead. One that is never used falls
                below it after ln(threshold) / ln(decay) steps, 350 of them by default.

        Returns:
            The number of code vectors that were moved.
        """
        z = gather_ranks(self.project(z))
        dead = (self.counts < threshold).nonzero()[:, 0][: len(_flat(z))]
        vectors = broadcast_from_first_rank(self._sample_distant(z, len(dead), generator))
        self.replace_codes(dead, vectors)
        return len(dead)

    @torch.no_grad()
    def kmeans_init(
        self, z: Float[Tensor, "b d h w"], generator: torch.Generator, rounds: int = 10
    ) -> None:
        """Put the code vectors at the centres of encodings, by Lloyd's algorithm, before training.

        Random code vectors lie where no encoding is; then a few of them are used for everything.

        Raises:
            ValueError: if there are fewer encodings than code vectors.
        """
        z = gather_ranks(self.project(z))
        flat, size = _flat(z), len(self.codebook)
        if len(flat) < size:
            raise ValueError(
                f"{size} code vectors need at least {size} encodings to start from, and these are "
                f"{len(flat)}: give more pictures."
            )
        all_codes = torch.arange(size, device=flat.device)
        self.replace_codes(all_codes, flat[torch.randperm(len(flat), generator=generator)[:size]])
        for _ in range(rounds):
            counts, sums = count_and_sum(self.nearest(z), z, size)
            used = counts > 0
            centres = sums / counts.clamp(min=1)[:, None]
            centres[~used] = self._sample_distant(z, int((~used).sum()), generator)
            self.replace_codes(all_codes, centres)
        self.replace_codes(all_codes, broadcast_from_first_rank(self.codebook.detach().clone()))

    def _sample_distant(
        self, z: Float[Tensor, "b d h w"], count: int, generator: torch.Generator
    ) -> Float[Tensor, "{count} d"]:
        """Encodings drawn with probability ∝ squared distance from the nearest code vector
        (k-means++, Arthur & Vassilvitskii 2007)."""
        error = (z - self.lookup(self.nearest(z))).square().sum(1).flatten()  # (B h w,)
        chance = (error + 1e-6 * error.mean() + 1e-12).cpu()  # never 0: there may be many to draw
        if count == 0:
            return z.new_zeros(0, z.shape[1])
        chosen = torch.multinomial(chance, count, generator=generator)
        return _flat(z)[chosen.to(z.device)]


class EMAQuantizer(VectorQuantizer):
    """Code vectors that follow the mean of their encodings, by moving averages (appendix A.1).

    There is no debiasing: the averages start at count 1 and sum e, a start whose weight decays. In
    evaluation mode nothing changes.
    """

    def _make_codebook(self, start: Float[Tensor, "k d"]) -> None:
        self.register_buffer("codebook", start)
        self.register_buffer("sums", start.clone())
        self.sums: Tensor

    def losses(
        self, z: Float[Tensor, "b d h w"], e: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The moving averages replace the codebook loss, which is 0."""
        return z.new_zeros(()), F.mse_loss(z, e.detach())

    @torch.no_grad()
    def update_statistics(self, z: Float[Tensor, "b d h w"], indices: Int[Tensor, "b h w"]) -> None:
        """Eqs. 6–8: N ← γ N + (1 − γ) n,  m ← γ m + (1 − γ) Σ z,  e ← m / N."""
        counts, sums = count_and_sum(indices, z, len(self.counts))  # n, (K,) and Σ z, (K, D)
        self.counts.lerp_(sum_over_ranks(counts), 1 - self.decay)
        self.sums.lerp_(sum_over_ranks(sums), 1 - self.decay)
        self.codebook.copy_(self.sums / self.smoothed_counts()[:, None])

    def smoothed_counts(self) -> Float[Tensor, " k"]:
        """N with Laplace smoothing, as in DeepMind's own code: no division by 0 for an unused code
        vector."""
        total, epsilon = self.counts.sum(), 1e-5
        return total * (self.counts + epsilon) / (total + len(self.counts) * epsilon)

    @torch.no_grad()
    def replace_codes(self, which: Int[Tensor, " m"], vectors: Float[Tensor, "m d"]) -> None:
        """Start the sums again as well: else the next step brings the old code vectors back."""
        super().replace_codes(which, vectors)
        self.sums[which] = vectors


class FSQ(Quantizer):
    """Finite scalar quantisation (Mentzer et al. 2023): round each of D numbers to L levels.

    The code vectors are a grid of K = L^D points: nothing is learned, initialised or restarted.

    Raises:
        ValueError: if K is not L^D for a whole number L of at least 3.
    """

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.levels = round(codebook_size ** (1 / code_dim))
        self.code_dim = code_dim
        if self.levels**code_dim != codebook_size or self.levels < 3:
            fits = ", ".join(f"{n**code_dim}" for n in range(3, 9))
            raise ValueError(
                f"FSQ with {code_dim} numbers has {fits} … code vectors, not {codebook_size}."
            )
        middle, numbers = self.levels // 2, torch.arange(codebook_size)[:, None]
        digits = numbers // self.levels ** torch.arange(code_dim) % self.levels
        self.grid: Tensor
        self.register_buffer("grid", (digits - middle) / middle, persistent=False)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        z = self.project(z)
        indices = self.nearest(z)  # (B, h, w)
        e = self.lookup(indices)  # (B, D, h, w)
        z_q = z + (e - z).detach()  # straight through: the value of e, the gradient of z
        return Quantized(z_q, indices, z.new_zeros(()), z.new_zeros(()))

    def project(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Bound z so that rounding gives L levels, and scale it to [−1, 1] (appendix A.1)."""
        half = (self.levels - 1) * 1.001 / 2  # slightly wider, so that the last level is reached
        offset = 0.0 if self.levels % 2 else 0.5
        shift = torch.atanh(torch.tensor(offset / half, dtype=torch.float64)).item()
        return (torch.tanh(at_least_float32(z) + shift) * half - offset) / (self.levels // 2)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """Round; the levels are the digits of the token, the first one counting units."""
        middle = self.levels // 2
        digits = (z * middle).round().long() + middle
        places = self.levels ** torch.arange(self.code_dim, device=z.device)
        return (digits * places[:, None, None]).sum(1)

    def embeddings(self) -> Float[Tensor, "k d"]:
        """The K points of the grid."""
        return self.grid


def make_quantizer(kind: str, codebook_size: int, code_dim: int, cosine: bool = False) -> Quantizer:
    """A quantizer by its name, one of `QUANTIZERS`.

    Raises:
        ValueError: for another name, or sizes that FSQ does not have.
    """
    if kind == "fsq":
        return FSQ(codebook_size, code_dim)
    if kind == "ema":
        return EMAQuantizer(codebook_size, code_dim, cosine)
    if kind == "gradient":
        return VectorQuantizer(codebook_size, code_dim, cosine)
    raise ValueError(f"quantizer is one of {QUANTIZERS}, not {kind!r}.")


def _flat(z: Float[Tensor, "b d h w"]) -> Float[Tensor, "n d"]:
    return z.movedim(1, -1).flatten(0, 2)


def count_and_sum(
    indices: Int[Tensor, "b h w"], z: Float[Tensor, "b d h w"], size: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """How many encodings have each token, and their sum."""
    sums = z.new_zeros(size, z.shape[1]).index_add_(0, indices.flatten(), _flat(z))
    return torch.bincount(indices.flatten(), minlength=size).to(z), sums
