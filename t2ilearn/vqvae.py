"""VQ-VAE: a picture as a few discrete codes (van den Oord, Vinyals & Kavukcuoglu 2017).

    x → encoder → z → the nearest code of a codebook → z_q → decoder → x̂

The loss has three terms (Eq. 3), and each has its own parameter to move:

    L  =  ‖x − x̂‖²   +   ‖sg[z] − e‖²   +   β ‖z − sg[e]‖²
        reconstruction     codebook           commitment
      encoder and decoder  the codes only     the encoder only

| symbol | name |
|---|---|
| x, x̂ | `x`, `reconstruction` |
| z_e(x) | `z`, what the encoder says |
| e | `codebook`, K codes of D numbers; also the nearest one, for each place of the picture |
| z_q(x) | `z_q`, what the decoder hears: e, but with the gradient of z |
| sg[·] | `.detach()` |
| β | `beta` |
| γ, N, m | `decay`, `counts`, `sums`: the moving averages of appendix A.1 |

Differs from the paper in: squares are means over numbers, not sums; with `cosine` encodings and
codes are compared on the unit sphere (Yu et al. 2022); codes start at the centres of real
encodings and those that fall out of use are revived (Dhariwal et al. 2020). The chapter's other
models are here too: `Autoencoder` and `VAE` (Kingma & Welling 2014) before it, `FSQ` (Mentzer et
al. 2023), which needs no codebook, after it.

Letters: B batch, H and W picture, h and w grid of codes, N = h · w, K codes, D numbers in a code.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from t2ilearn.layers import GROUPS


@dataclass(frozen=True)
class CodesConfig:
    """Sizes of a model that makes codes of pictures.

    Args:
        resolution: side of the picture, H = W.
        channels: one entry a level; each level halves the side, so that h = H / 2^levels.
        blocks: residual blocks in the coarsest level; the finer, dearer ones have one.
        codes: K.
        code_dim: D.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    resolution: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    blocks: int = 2
    codes: int = 1024
    code_dim: int = 32

    def __post_init__(self) -> None:
        if not self.channels or any(c < 1 or c % GROUPS for c in self.channels):
            raise ValueError(f"channels must be multiples of {GROUPS}, not {self.channels}.")
        shrink = 2 ** len(self.channels)
        if self.resolution < shrink or self.resolution % shrink:
            raise ValueError(
                f"{len(self.channels)} levels halve the side {len(self.channels)} times: the "
                f"resolution must be a multiple of {shrink}, not {self.resolution}."
            )
        if min(self.codes - 1, self.code_dim, self.blocks) < 1:
            raise ValueError("At least two codes, one number in each, and one block, please.")

    @property
    def side(self) -> int:
        """h = w, the side of the grid of codes."""
        return self.resolution // 2 ** len(self.channels)


@dataclass(frozen=True)
class VQVAEConfig(CodesConfig):
    """Sizes of a VQ-VAE, and of the autoencoders that lead up to it.

    Args:
        resolution, channels, blocks, codes, code_dim: see `CodesConfig`. For "fsq" K must be the
            D-th power of a whole number: 512 = 8³.
        quantizer: how the codes learn: "ema", "gradient", or not at all, "fsq".
        cosine: compare directions only; "fsq" has no use for it.
        beta: β, weight of the commitment.

    Raises:
        ValueError: if the sizes do not fit together.
    """

    quantizer: str = "ema"
    cosine: bool = True
    beta: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer is one of {QUANTIZERS}, not {self.quantizer!r}.")
        if self.beta < 0:
            raise ValueError(f"β must be 0 or more, not {self.beta}.")


QUANTIZERS = ("ema", "gradient", "fsq")


# --- from pictures to a small grid of vectors, and back ----------------------------------------


def _blocks_per_level(config: CodesConfig) -> list[int]:
    return [1] * (len(config.channels) - 1) + [config.blocks]


class PlainBlock(nn.Module):
    """x + f(x), where f is two 3×3 convolutions without any normalisation, and starts at 0.

    The paper's blocks have none either. In short trial runs on captioned shapes these learned
    faster than blocks with group norms, but diverged at a learning rate of 2e-3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Float[Tensor, "b _ h w"]) -> Float[Tensor, "b _ h w"]:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Encoder(nn.Sequential):
    """(B, 3, H, W) → (B, outputs, h, w); by default D outputs."""

    def __init__(self, config: CodesConfig, outputs: int | None = None) -> None:
        layers: list[nn.Module] = []
        before = 3
        for width, count in zip(config.channels, _blocks_per_level(config), strict=True):
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            layers += [PlainBlock(width) for _ in range(count)]
            before = width
        layers += [nn.GroupNorm(GROUPS, before), nn.SiLU()]
        layers.append(nn.Conv2d(before, outputs or config.code_dim, 1))
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """(B, D, h, w) → (B, outputs, H, W), the encoder's mirror; by default 3 outputs, a picture that
    nothing clamps to [−1, 1]."""

    def __init__(self, config: CodesConfig, outputs: int = 3) -> None:
        channels, counts = config.channels[::-1], _blocks_per_level(config)[::-1]
        layers: list[nn.Module] = [nn.Conv2d(config.code_dim, channels[0], 3, padding=1)]
        for width, after, count in zip(channels, (*channels[1:], 0), counts, strict=True):
            layers += [PlainBlock(width) for _ in range(count)]
            if after:
                layers.append(nn.ConvTranspose2d(width, after, 4, stride=2, padding=1))
        layers += [nn.GroupNorm(GROUPS, channels[-1]), nn.SiLU()]
        layers.append(nn.ConvTranspose2d(channels[-1], outputs, 4, stride=2, padding=1))
        super().__init__(*layers)


def check_pictures(x: Tensor, config: CodesConfig) -> None:
    """Raise ValueError if these are not pictures of the config's resolution."""
    wanted = (3, config.resolution, config.resolution)
    if x.ndim != 4 or tuple(x.shape[1:]) != wanted or not x.is_floating_point():
        raise ValueError(
            f"Pictures are float tensors of shape (B, {', '.join(map(str, wanted))}) with values "
            f"in [−1, 1]; this is {x.dtype} of shape {tuple(x.shape)}."
        )


def precise(x: Tensor) -> Tensor:
    """At least float32: half precision loses small distances, and with them codes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- two ancestors: a plain autoencoder, and one that can be sampled ---------------------------


class AutoencoderLoss(NamedTuple):
    """What an autoencoder minimises."""

    reconstruction: Float[Tensor, ""]
    total: Float[Tensor, ""]


class Autoencoder(nn.Module):
    """Encoder and decoder with a narrow waist of (D, h, w) numbers, and nothing else."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The reconstruction x̂.

        Raises:
            ValueError: for pictures of another resolution.
        """
        check_pictures(x, self.config)
        return self.decoder(self.encoder(x))


def autoencoder_loss(
    x: Float[Tensor, "b 3 h w"], reconstruction: Float[Tensor, "b 3 h w"]
) -> AutoencoderLoss:
    """‖x − x̂‖², as a mean over pictures, colours and pixels."""
    error = F.mse_loss(precise(reconstruction), x)
    return AutoencoderLoss(error, total=error)


class VAEOutput(NamedTuple):
    """x̂, and the Gaussian that the encoder answers with: its mean μ and ln σ²."""

    reconstruction: Float[Tensor, "b 3 H W"]
    mean: Float[Tensor, "b d h w"]
    log_variance: Float[Tensor, "b d h w"]


class VAELoss(NamedTuple):
    """The two terms of the bound, and their weighted sum."""

    reconstruction: Float[Tensor, ""]
    divergence: Float[Tensor, ""]
    total: Float[Tensor, ""]


class VAE(nn.Module):
    """An autoencoder whose encoder answers with a Gaussian (Kingma & Welling 2014)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config, 2 * config.code_dim), Decoder(config)

    def forward(self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> VAEOutput:
        """z = μ + σ ε with ε ~ N(0, 1), so that gradients reach μ and σ (section 2.4).

        Raises:
            ValueError: for pictures of another resolution.
        """
        check_pictures(x, self.config)
        mean, log_variance = precise(self.encoder(x)).chunk(2, dim=1)  # (B, D, h, w) each
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        z = mean + (log_variance / 2).exp() * noise
        return VAEOutput(self.decoder(z), mean, log_variance)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
        """Pictures from nothing but noise."""
        side, weight = self.config.side, next(self.decoder.parameters())
        z = torch.randn(count, self.config.code_dim, side, side, generator=generator)
        return self.decoder(z.to(weight))


def vae_loss(x: Float[Tensor, "b 3 h w"], output: VAEOutput, sigma: float = 0.1) -> VAELoss:
    """The negative evidence bound (Eq. 7 with appendix B), times 2σ² over the numbers in x.

    Args:
        sigma: how far a decoded pixel may be off, as standard deviation of a Gaussian. Large σ:
            the divergence rules, and all pictures get the same z.
    """
    mean, log_variance = output.mean, output.log_variance
    per_picture = (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2
    reconstruction = F.mse_loss(precise(output.reconstruction), x)
    divergence = per_picture.mean() / x[0].numel()  # KL(q ‖ N(0, 1)), in nats a number of x
    total = reconstruction + 2 * sigma**2 * divergence
    return VAELoss(reconstruction, divergence, total)


# --- quantizers: the step that makes codes -----------------------------------------------------


class Quantized(NamedTuple):
    """z_q for the decoder, the codes' numbers, and the quantizer's two terms of Eq. 3."""

    z_q: Float[Tensor, "b d h w"]
    codes: Int[Tensor, "b h w"]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]


class VectorQuantizer(nn.Module):
    """Each vector becomes the nearest of K codes; the codes learn by gradient (section 3.2).

    Args:
        codes, code_dim: K and D.
        cosine: put encodings and codes on the unit sphere first.
        decay: γ of the running counts, by which dead codes are known.
    """

    def __init__(
        self, codes: int, code_dim: int, cosine: bool = False, decay: float = 0.99
    ) -> None:
        super().__init__()
        self.cosine, self.decay = cosine, decay
        start = torch.randn(codes, code_dim)
        start = F.normalize(start, dim=1) if cosine else start / code_dim**0.5
        self.codebook: Tensor
        self.counts: Tensor
        self._make_codebook(start)
        self.register_buffer("counts", torch.ones(codes))  # uses a step, lately

    def _make_codebook(self, start: Float[Tensor, "k d"]) -> None:
        self.codebook = nn.Parameter(start)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        z = self.project(z)
        codes = self.nearest(z)  # (B, h, w)
        e = self.look_up(codes)  # (B, D, h, w)

        codebook, commitment = self.terms(z, e)
        z_q = z + (e - z).detach()  # straight through: e's value, z's gradient

        if self.training:
            self.observe(z, codes)
        return Quantized(z_q, codes, codebook, commitment)

    def terms(
        self, z: Float[Tensor, "b d h w"], e: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Eq. 3, second and third: who stands still is detached."""
        codebook = F.mse_loss(e, z.detach())
        commitment = F.mse_loss(z, e.detach())
        return codebook, commitment

    def project(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """z as the codes meet it: in float32 or better, on the unit sphere if `cosine`."""
        z = precise(z)
        return F.normalize(z, dim=1) if self.cosine else z

    def rows(self) -> Float[Tensor, "k d"]:
        """The codes as they meet z: on the unit sphere if `cosine`."""
        return F.normalize(self.codebook, dim=1) if self.cosine else self.codebook

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """argmin_k ‖z − e_k‖² (Eq. 1), without ‖z‖², which is the same for every k."""
        e = self.rows()
        with torch.autocast(z.device.type, enabled=False):
            distances = (e**2).sum(1) - 2 * z.movedim(1, -1) @ e.T  # (B, h, w, K)
        return distances.argmin(-1)

    def look_up(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Codes' numbers → the codes themselves (Eq. 2)."""
        return F.embedding(codes, self.rows()).movedim(-1, 1)

    @torch.no_grad()
    def observe(self, z: Float[Tensor, "b d h w"], codes: Int[Tensor, "b h w"]) -> None:
        """Count which codes a batch uses: N ← γ N + (1 − γ) n."""
        uses = torch.bincount(codes.flatten(), minlength=len(self.counts)).to(self.counts)
        self.counts.lerp_(summed_over_ranks(uses), 1 - self.decay)

    @torch.no_grad()
    def replace(self, which: Int[Tensor, " m"], rows: Float[Tensor, "m d"]) -> None:
        """Overwrite codes, and forget how often the old ones were used."""
        self.codebook[which] = rows
        self.counts[which] = 1.0

    @torch.no_grad()
    def revive(
        self, z: Float[Tensor, "b d h w"], generator: torch.Generator, threshold: float = 0.03
    ) -> int:
        """Move codes that hardly anything uses onto encodings of a batch (Dhariwal et al. 2020).

        Args:
            z: encodings. A dead code lands on one of them, rather on one far from all codes:
                evenly drawn, most would land where the codes are crowded already.
            threshold: a code is dead below so many uses a step. A code that nothing uses gets
                there after ln(threshold) / ln(decay) steps, 350 of them by default.

        Returns:
            How many codes were moved.
        """
        z = _of_all_ranks(self.project(z))
        dead = (self.counts < threshold).nonzero()[:, 0][: len(_flat(z))]
        self.replace(dead, _from_first_rank(self._badly_served(z, len(dead), generator)))
        return len(dead)

    @torch.no_grad()
    def kmeans_start(
        self, z: Float[Tensor, "b d h w"], generator: torch.Generator, rounds: int = 10
    ) -> None:
        """Put the codes at the centres of encodings, by Lloyd's algorithm, before training.

        A random codebook lies where no encoding is; then a few codes win everything.

        Raises:
            ValueError: if there are fewer encodings than codes.
        """
        z = _of_all_ranks(self.project(z))
        flat, size = _flat(z), len(self.codebook)
        if len(flat) < size:
            raise ValueError(
                f"{size} codes need at least {size} encodings to start from, and these are "
                f"{len(flat)}: give more pictures."
            )
        everyone = torch.arange(size, device=flat.device)
        self.replace(everyone, flat[torch.randperm(len(flat), generator=generator)[:size]])
        for _ in range(rounds):
            counts, sums = _count_and_sum(self.nearest(z), z, size)
            used = counts > 0
            centres = sums / counts.clamp(min=1)[:, None]
            centres[~used] = self._badly_served(z, int((~used).sum()), generator)
            self.replace(everyone, centres)
        self.replace(everyone, _from_first_rank(self.codebook.detach().clone()))

    def _badly_served(
        self, z: Float[Tensor, "b d h w"], count: int, generator: torch.Generator
    ) -> Float[Tensor, "{count} d"]:
        """Encodings drawn with probability ∝ squared distance from the nearest code (k-means++,
        Arthur & Vassilvitskii 2007)."""
        error = (z - self.look_up(self.nearest(z))).square().sum(1).flatten()  # (B h w,)
        chance = (error + 1e-6 * error.mean() + 1e-12).cpu()  # never 0: there may be many to draw
        if count == 0:
            return z.new_zeros(0, z.shape[1])
        chosen = torch.multinomial(chance, count, generator=generator)
        return _flat(z)[chosen.to(z.device)]


class EMAQuantizer(VectorQuantizer):
    """Codes that follow the mean of their encodings, by moving averages (appendix A.1).

    Without debiasing: the averages start at count 1 and sum e, and forget that by themselves.
    In evaluation mode nothing moves.
    """

    def _make_codebook(self, start: Float[Tensor, "k d"]) -> None:
        self.register_buffer("codebook", start)
        self.register_buffer("sums", start.clone())
        self.sums: Tensor

    def terms(
        self, z: Float[Tensor, "b d h w"], e: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The moving averages stand in for the codebook term: it is 0."""
        return z.new_zeros(()), F.mse_loss(z, e.detach())

    @torch.no_grad()
    def observe(self, z: Float[Tensor, "b d h w"], codes: Int[Tensor, "b h w"]) -> None:
        """Eqs. 6–8: N ← γ N + (1 − γ) n,  m ← γ m + (1 − γ) Σ z,  e ← m / N."""
        counts, sums = _count_and_sum(codes, z, len(self.counts))
        self.counts.lerp_(summed_over_ranks(counts), 1 - self.decay)
        self.sums.lerp_(summed_over_ranks(sums), 1 - self.decay)
        total, epsilon = self.counts.sum(), 1e-5
        # Laplace smoothing, as in DeepMind's own code: no division by 0 for an unused code.
        smooth = total * (self.counts + epsilon) / (total + len(self.counts) * epsilon)
        self.codebook.copy_(self.sums / smooth[:, None])

    @torch.no_grad()
    def replace(self, which: Int[Tensor, " m"], rows: Float[Tensor, "m d"]) -> None:
        """Also the sum starts anew: else the next step brings the old code back."""
        super().replace(which, rows)
        self.sums[which] = rows


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023): round each of D numbers to L levels.

    A grid of K = L^D codes, with no codebook to learn, to start or to revive.

    Raises:
        ValueError: if K is not L^D for a whole L of at least 3.
    """

    def __init__(self, codes: int, code_dim: int) -> None:
        super().__init__()
        self.levels = round(codes ** (1 / code_dim))
        self.code_dim = code_dim
        if self.levels**code_dim != codes or self.levels < 3:
            fits = ", ".join(f"{n**code_dim}" for n in range(3, 9))
            raise ValueError(f"FSQ with {code_dim} numbers has {fits} … codes, not {codes}.")
        middle, numbers = self.levels // 2, torch.arange(codes)[:, None]
        digits = numbers // self.levels ** torch.arange(code_dim) % self.levels
        self.grid: Tensor
        self.register_buffer("grid", (digits - middle) / middle, persistent=False)

    def forward(self, z: Float[Tensor, "b d h w"]) -> Quantized:
        z = self.project(z)
        codes = self.nearest(z)  # (B, h, w)
        e = self.look_up(codes)  # (B, D, h, w)
        z_q = z + (e - z).detach()  # straight through: e's value, z's gradient
        return Quantized(z_q, codes, z.new_zeros(()), z.new_zeros(()))

    def project(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Squash z so that rounding gives L levels, and scale them to [−1, 1] (appendix A.1)."""
        half = (self.levels - 1) * 1.001 / 2  # a hair wider: the last level must be in reach
        offset = 0.0 if self.levels % 2 else 0.5
        shift = torch.atanh(torch.tensor(offset / half, dtype=torch.float64)).item()
        return (torch.tanh(precise(z) + shift) * half - offset) / (self.levels // 2)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "b d h w"]) -> Int[Tensor, "b h w"]:
        """Round; the levels are the digits of the code's number, the first one counting units."""
        middle = self.levels // 2
        digits = (z * middle).round().long() + middle
        places = self.levels ** torch.arange(self.code_dim, device=z.device)
        return (digits * places[:, None, None]).sum(1)

    def rows(self) -> Float[Tensor, "k d"]:
        """All K codes of the grid."""
        return self.grid

    def look_up(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b d h w"]:
        """Codes' numbers → points of the grid."""
        return F.embedding(codes, self.rows()).movedim(-1, 1)


def _flat(z: Float[Tensor, "b d h w"]) -> Float[Tensor, "n d"]:
    return z.movedim(1, -1).flatten(0, 2)


def _count_and_sum(
    codes: Int[Tensor, "b h w"], z: Float[Tensor, "b d h w"], size: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
    """How many encodings chose each code, and their sum."""
    sums = z.new_zeros(size, z.shape[1]).index_add_(0, codes.flatten(), _flat(z))
    return torch.bincount(codes.flatten(), minlength=size).to(z), sums


def ranks() -> int:
    """How many processes train together, each on its own part of a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed_over_ranks(x: Tensor) -> Tensor:
    """In data-parallel training all processes must see the same statistics. Changes x."""
    if ranks() > 1:
        dist.all_reduce(x)
    return x


def _from_first_rank(x: Tensor) -> Tensor:
    """In data-parallel training all processes must put a code at the same place. Changes x."""
    if ranks() > 1:
        dist.broadcast(x, src=0)
    return x


def _of_all_ranks(z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b_all d h w"]:
    """The encodings of the joint batch, in the order of the processes."""
    if ranks() == 1:
        return z
    parts = [torch.empty_like(z, memory_format=torch.contiguous_format) for _ in range(ranks())]
    dist.all_gather(parts, z.contiguous())
    return torch.cat(parts)


# --- the whole ---------------------------------------------------------------------------------


class VQVAEOutput(NamedTuple):
    """x̂, and what the quantizer says."""

    reconstruction: Float[Tensor, "b 3 H W"]
    quantized: Quantized


class VQVAELoss(NamedTuple):
    """The three terms of Eq. 3, and their weighted sum."""

    reconstruction: Float[Tensor, ""]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]
    total: Float[Tensor, ""]


def make_quantizer(config: VQVAEConfig) -> VectorQuantizer | FSQ:
    """The quantizer that a config names."""
    size = (config.codes, config.code_dim)
    if config.quantizer == "fsq":
        return FSQ(*size)
    kind = EMAQuantizer if config.quantizer == "ema" else VectorQuantizer
    return kind(*size, cosine=config.cosine)


class PictureCodes(nn.Module):
    """What every model offers that writes a picture as N = h · w codes: the way there and back."""

    config: Any  # its sizes: `resolution`, `side` and `codes` at least

    def tokens(self, x: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b n"]:
        """The picture's codes, row by row.

        Raises:
            ValueError: for pictures of another resolution.
        """
        raise NotImplementedError

    def decode_tokens(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b 3 H W"]:
        """Codes row by row → pictures, not clamped.

        Raises:
            ValueError: if their number is not h · w, or one is outside 0 … K − 1.
        """
        side, last = self.config.side, self.config.codes - 1
        if codes.ndim != 2 or codes.shape[1] != side**2:
            raise ValueError(
                f"A picture has {side}² codes: (B, {side**2}), not {tuple(codes.shape)}."
            )
        if codes.numel() and not 0 <= codes.min() <= codes.max() <= last:
            wrong = f"{codes.min().item()} … {codes.max().item()}"
            raise ValueError(f"Codes are numbers from 0 to {last}; these are {wrong}.")
        return self.decode_grid(codes.unflatten(1, (side, side)))

    def decode_grid(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """A grid of valid codes → pictures, not clamped."""
        raise NotImplementedError


class VQVAE(PictureCodes):
    """Encoder, quantizer, decoder. All that training changes is in parameters and buffers."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = make_quantizer(config)

    def forward(self, x: Float[Tensor, "b 3 h w"], quantize: bool = True) -> VQVAEOutput:
        """Reconstruct pictures; in training mode an EMA codebook moves.

        Args:
            quantize: False lets the decoder hear z itself: for the first steps of a training, so
                that the codebook can start from encodings that already mean something.

        Raises:
            ValueError: for pictures of another resolution.
        """
        if quantize:
            quantized = self.quantizer(self.encode(x))
        else:
            z = self.quantizer.project(self.encode(x))
            # Data-parallel training waits for a gradient of every parameter, even one of 0.
            unused = 0 * self.quantizer.rows().sum()
            quantized = Quantized(z, self.quantizer.nearest(z), unused, z.new_zeros(()))
        return VQVAEOutput(self.decoder(quantized.z_q), quantized)

    def encode(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """z, before it is quantized. Raises ValueError for pictures of another resolution."""
        check_pictures(x, self.config)
        return self.encoder(x)

    def tokens(self, x: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b n"]:
        """The picture's codes, row by row. The codebook never moves.

        Raises:
            ValueError: for pictures of another resolution.
        """
        return self.quantizer.nearest(self.quantizer.project(self.encode(x))).flatten(1)

    def decode_grid(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """A grid of valid codes → pictures, not clamped."""
        return self.decoder(self.quantizer.look_up(codes))

    @torch.no_grad()
    def kmeans_start(self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> None:
        """Start the codes at the centres of these pictures' encodings; before training."""
        if isinstance(self.quantizer, VectorQuantizer):
            self.quantizer.kmeans_start(self.encode(x), generator)

    @torch.no_grad()
    def revive(self, x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> int:
        """Move dead codes onto encodings of these pictures; returns how many. Every 50 steps or so,
        and not to the end: a code needs time to settle."""
        if isinstance(self.quantizer, VectorQuantizer):
            return self.quantizer.revive(self.encode(x), generator)
        return 0


def vqvae_loss(x: Float[Tensor, "b 3 h w"], output: VQVAEOutput, beta: float = 0.25) -> VQVAELoss:
    """Eq. 3.

    Args:
        x: the pictures that `output` is about.
        beta: β. The paper finds no difference from 0.1 to 2.0.
    """
    reconstruction = F.mse_loss(precise(output.reconstruction), x)
    codebook, commitment = output.quantized.codebook, output.quantized.commitment
    total = reconstruction + codebook + beta * commitment
    return VQVAELoss(reconstruction, codebook, commitment, total)
