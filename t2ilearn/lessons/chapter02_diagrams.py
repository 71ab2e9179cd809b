"""The diagrams of chapter 2: the pipeline, and one for each new block.

| diagram | shows |
|---|---|
| `PIPELINE` | the whole VQ-VAE, with its three loss terms |
| `VAE` | the variational autoencoder, with the reparameterisation trick |
| `QUANTIZER` | the look-up in the codebook, and the straight-through estimator |
| `RESIDUAL_BLOCK` | the block of encoder and decoder |
| `networks(config)` | encoder and decoder, layer by layer, for a model's own sizes |
"""

from t2ilearn.diagrams import Arrow, Box, Diagram
from t2ilearn.models.autoencoder import AutoencoderConfig

PIPELINE = Diagram(
    [
        Box("x", "picture x", "B × 3 × H × W", (0, 0), "data"),
        Box("encoder", "encoder", "convolutions", (0, 1)),
        Box("z", "encodings z", "B × D × h × w", (0, 2), "data"),
        Box("commitment", "commitment loss", "compares z with e", (1, 2), "loss"),
        Box("nearest", "nearest", "of K code vectors", (0, 3), "operation"),
        Box("q", "tokens q", "B × h × w integers", (0, 4), "data"),
        Box("codebook", "codebook", "K × D", (1, 4), "table"),
        Box("lookup", "look-up", "row q of the table", (0, 5), "operation"),
        Box("e", "code vectors e", "B × D × h × w", (0, 6), "data"),
        Box("codebook loss", "codebook loss", "compares e with z", (1, 6), "loss"),
        Box("decoder", "decoder", "convolutions", (0, 7)),
        Box("x_hat", "reconstruction x̂", "B × 3 × H × W", (0, 8), "data"),
        Box("reconstruction", "reconstruction loss", "compares x̂ with x", (1, 8), "loss"),
    ],
    [
        *(
            Arrow(start, end)
            for start, end in (
                ("x", "encoder"),
                ("encoder", "z"),
                ("z", "nearest"),
                ("nearest", "q"),
                ("q", "lookup"),
                ("lookup", "e"),
                ("e", "decoder"),
                ("decoder", "x_hat"),
                ("codebook", "nearest"),
                ("codebook", "lookup"),
            )
        ),
        Arrow("z", "commitment", dashed=True),
        Arrow("e", "codebook loss", dashed=True),
        Arrow("x_hat", "reconstruction", dashed=True),
    ],
    alt=(
        "Pipeline of a VQ-VAE, from top to bottom. A picture x goes through the encoder, which "
        "returns a grid of encodings z. Each encoding is replaced by the index of the nearest "
        "of K code vectors: these are the tokens q. A look-up in the codebook turns the tokens "
        "into code vectors e. The decoder turns them into the reconstruction. Three losses "
        "stand beside it: the commitment loss compares z with its code vectors e, the codebook "
        "loss compares e with z, and the reconstruction loss compares the reconstruction with "
        "the picture. All parts are trained."
    ),
    row=78,
)

VAE = Diagram(
    [
        Box("x", "picture x", "B × 3 × H × W", (0, 0), "data"),
        Box("encoder", "encoder", at=(0, 1)),
        Box("posterior", "posterior: μ, σ", "B × D × h × w each", (0, 2), "data"),
        Box("kl", "KL term", "compares with N(0, 1)", (1, 2), "loss"),
        Box("trick", "z = μ + σ ε", "reparameterisation", (0, 3), "operation"),
        Box("noise", "noise ε", "sampled from N(0, 1)", (1, 3), "data"),
        Box("decoder", "decoder", at=(0, 4)),
        Box("x_hat", "reconstruction x̂", "B × 3 × H × W", (0, 5), "data"),
        Box("reconstruction", "reconstruction loss", "compares x̂ with x", (1, 5), "loss"),
    ],
    [
        Arrow("x", "encoder"),
        Arrow("encoder", "posterior"),
        Arrow("posterior", "trick"),
        Arrow("noise", "trick"),
        Arrow("trick", "decoder"),
        Arrow("decoder", "x_hat"),
        Arrow("posterior", "kl", dashed=True),
        Arrow("x_hat", "reconstruction", dashed=True),
    ],
    alt=(
        "Pipeline of a variational autoencoder. The encoder predicts a mean and a standard "
        "deviation for each number. The latent z is the mean plus the standard deviation times "
        "noise, which is the reparameterisation trick. The decoder turns z into the "
        "reconstruction. The KL term compares the predicted Gaussian with the prior N(0, 1), "
        "and the reconstruction loss compares the reconstruction with the picture."
    ),
    row=78,
)

QUANTIZER = Diagram(
    [
        Box("z", "encodings z", "B × D × h × w", (0, 0), "data"),
        Box("distance", "squared distance", "to each code vector", (0, 1), "operation"),
        Box("codebook", "codebook", "K × D", (1, 1.5), "table"),
        Box("q", "arg min: token q", "B × h × w", (0, 2), "data"),
        Box("e", "look-up: e", "B × D × h × w", (0, 3), "data"),
        Box("st", "z + sg[e − z]", "straight-through", (0, 4), "operation"),
        Box("z_q", "z_q, with the value of e", "B × D × h × w", (0, 5), "data"),
    ],
    [
        Arrow("z", "distance"),
        Arrow("codebook", "distance"),
        Arrow("distance", "q"),
        Arrow("q", "e"),
        Arrow("codebook", "e"),
        Arrow("e", "st"),
        Arrow("st", "z_q"),
        Arrow("z_q", "z", bend=-18, gradient=True),
    ],
    alt=(
        "The quantizer. In the forward pass, encodings z are compared with all K code vectors, "
        "the index of the nearest one is the token q, and a look-up returns its code vector e. "
        "The straight-through line returns z_q, which has the value of e. In the backward pass "
        "the gradient at z_q is copied to z, past the arg min and the look-up; the codebook "
        "receives none of it."
    ),
    row=78,
)

RESIDUAL_BLOCK = Diagram(
    [
        Box("x", "input", "B × C × h × w", (0, 0), "data"),
        Box("first", "SiLU, convolution", "3 × 3", (0, 1)),
        Box("second", "SiLU, convolution", "3 × 3, starts at 0", (0, 2)),
        Box("sum", "+", at=(0, 3), kind="operation"),
        Box("y", "output", "B × C × h × w", (0, 4), "data"),
    ],
    [
        Arrow("x", "first"),
        Arrow("first", "second"),
        Arrow("second", "sum"),
        Arrow("x", "sum", "unchanged", bend=30),
        Arrow("sum", "y"),
    ],
    alt=(
        "A residual block. The input goes through an activation and a 3 by 3 convolution, "
        "twice. The result is added to the unchanged input, which reaches the sum by a skip "
        "connection. The second convolution starts at 0, so a new block returns its input."
    ),
    row=66,
)


def networks(config: AutoencoderConfig) -> Diagram:
    """Encoder and decoder layer by layer, with the shapes of a model of these sizes."""
    side, last = config.resolution, len(config.channels) - 1
    boxes = [Box("x", "picture x", f"3 × {side} × {side}", (0, 0), "data")]
    mirror = [Box("x_hat", "reconstruction x̂", f"3 × {side} × {side}", (1, 0), "data")]
    for level, channels in enumerate(config.channels):
        count = config.blocks if level == last else 1
        blocks = f"{count} residual block{'s' if count > 1 else ''}"
        side //= 2
        shape = f"{channels} × {side} × {side}"
        boxes.append(Box(f"down{level}", f"halve, {blocks}", shape, (0, level + 1)))
        mirror.append(Box(f"up{level}", f"{blocks}, double", shape, (1, level + 1)))
    shape = f"{config.code_dim} × {side} × {side}"
    boxes.append(Box("z", "encodings z", shape, (0, last + 2), "data"))
    mirror.append(Box("z_q", "code vectors z_q", shape, (1, last + 2), "data"))
    down = [Arrow(a.name, b.name) for a, b in zip(boxes, boxes[1:], strict=False)]
    up = [Arrow(b.name, a.name) for a, b in zip(mirror, mirror[1:], strict=False)]
    return Diagram(
        [*boxes, *mirror],
        [*down, *up, Arrow("z", "z_q")],
        alt=(
            "Encoder on the left, from the top down, and decoder on the right, from the bottom up. "
            f"The encoder halves the side of the picture {last + 1} times, each time with residual "
            f"blocks, and ends with {config.code_dim} numbers for each of {side} by {side} places. "
            "The decoder is its mirror image. The quantizer stands between them at the bottom."
        ),
        row=72,
    )
