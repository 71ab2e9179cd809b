"""CLIP's towers, logits and loss are the peers', in values and in gradients."""

import pytest
import torch

from t2ilearn.models.clip import ImageTowerConfig, TextTowerConfig, clip_loss, logits
from t2ilearn.pretrained.clip import RELEASED, clip_from_state

IMAGE = ImageTowerConfig(16, 8, 32, 2, 2, 24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TEXT = TextTowerConfig(50, 9, 24, 2, 3, 24, end_token=49)


def agree(ours, theirs, tolerance=1e-9):
    """Equal up to a share of the largest number."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)
    assert difference <= tolerance, f"{difference:.1e}"


def hugging_face(image, text):
    """Transformers' CLIP of these sizes, with random weights."""
    peer = pytest.importorskip("transformers")
    config = peer.CLIPConfig(
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.dim,
            "intermediate_size": 4 * text.dim,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "max_position_embeddings": text.text_length,
            "projection_dim": text.embed_dim,
            "eos_token_id": text.end_token,
            "bos_token_id": 0,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": image.dim,
            "intermediate_size": 4 * image.dim,
            "num_hidden_layers": image.num_layers,
            "num_attention_heads": image.num_heads,
            "image_size": image.resolution,
            "patch_size": image.patch,
            "projection_dim": image.embed_dim,
        },
        projection_dim=text.embed_dim,
    )
    return peer.CLIPModel(config).eval()


def open_clip(image, text):
    """open_clip's CLIP of these sizes, with random weights."""
    peer = pytest.importorskip("open_clip.model")
    vision = peer.CLIPVisionCfg(
        layers=image.num_layers,
        width=image.dim,
        head_width=image.dim // image.num_heads,
        patch_size=image.patch,
        image_size=image.resolution,
    )
    words = peer.CLIPTextCfg(
        context_length=text.text_length,
        vocab_size=text.vocabulary,
        width=text.dim,
        heads=text.num_heads,
        layers=text.num_layers,
    )
    return peer.CLIP(text.embed_dim, vision, words, quick_gelu=True).eval()


def outputs_of(peer, pictures, captions):
    """Embeddings of length 1 and the logits, one row a picture."""
    if hasattr(peer, "vision_model"):
        out = peer(input_ids=captions, pixel_values=pictures)
        return out.image_embeds, out.text_embeds, out.logits_per_image
    image, text, scale = peer(pictures, captions)
    return image, text, scale * image @ text.T


PEERS = pytest.mark.parametrize(
    "make", [hugging_face, open_clip], ids=["transformers", "open_clip"]
)


def batch(image, text, generator, dtype=torch.float32, n=3):
    """Pictures for us, the same normalised for the peers, and captions of different lengths."""
    pictures = 2 * torch.rand(n, 3, image.resolution, image.resolution, generator=generator) - 1
    pictures = pictures.to(dtype)
    mean, std = (pictures.new_tensor(value).view(3, 1, 1) for value in (image.mean, image.std))
    captions = torch.randint(1, text.end_token, (n, text.text_length), generator=generator)
    for row in range(n):
        captions[row, text.text_length - 1 - row] = text.end_token
        captions[row, text.text_length - row :] = 0
    return pictures, ((pictures + 1) / 2 - mean) / std, captions


def randomise(peer):
    """Weights at which nothing hides: biases and gains are not those of the start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return peer


@PEERS
def test_values_and_every_gradient_are_the_peer_s_in_float64(make, generator):
    peer = randomise(make(IMAGE, TEXT)).double()
    ours = clip_from_state(peer.state_dict(), IMAGE, TEXT)
    pictures, normalised, captions = batch(IMAGE, TEXT, generator, torch.float64)
    inputs = [t.clone().requires_grad_() for t in (pictures, normalised)]
    out = ours(inputs[0], captions)
    image, text, s = outputs_of(peer, inputs[1], captions)
    agree(out.image, image)
    agree(out.text, text)
    agree(logits(*out), s)

    right = torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    theirs = (cross_entropy(s, right) + cross_entropy(s.T, right)) / 2
    loss = clip_loss(out)
    agree(loss.total, theirs)
    agree(loss.image_to_text, cross_entropy(s, right))
    agree(loss.text_to_image, cross_entropy(s.T, right))

    loss.total.backward()
    theirs.backward()
    grads = {name: p.grad for name, p in peer.named_parameters()}
    zero = {name: torch.zeros_like(p) for name, p in peer.named_parameters()}
    ours_as_theirs = clip_from_state(
        {name: zero[name] if g is None else g for name, g in grads.items()}, IMAGE, TEXT
    )
    for (name, a), b in zip(ours.named_parameters(), ours_as_theirs.parameters(), strict=True):
        assert a.grad is not None and a.grad.any(), name
        agree(a.grad, b)
    std = pictures.new_tensor(IMAGE.std).view(3, 1, 1)
    agree(inputs[0].grad, inputs[1].grad / (2 * std))


@PEERS
def test_the_loss_is_the_peer_s_own(make, generator):
    peer = randomise(make(IMAGE, TEXT)).double()
    ours = clip_from_state(peer.state_dict(), IMAGE, TEXT)
    pictures, normalised, captions = batch(IMAGE, TEXT, generator, torch.float64)
    loss = clip_loss(ours(pictures, captions)).total
    if make is hugging_face:
        out = peer(input_ids=captions, pixel_values=normalised, return_loss=True)
        agree(loss, out.loss)
    else:
        from open_clip.loss import ClipLoss

        agree(loss, ClipLoss()(*peer(normalised, captions)))


@pytest.mark.slow
@PEERS
def test_vit_b_32_at_full_size_computes_what_the_peer_computes(make, generator):
    image, text = RELEASED["ViT-B-32"]
    peer = make(image, text)
    ours = clip_from_state(peer.state_dict(), image, text)
    pictures, normalised, captions = batch(image, text, generator, n=2)
    with torch.no_grad():
        out = ours(pictures, captions)
        theirs = outputs_of(peer, normalised, captions)
    for mine, wanted in zip((out.image, out.text, logits(*out)), theirs, strict=True):
        agree(mine, wanted, 1e-4)
    wanted = torch.nn.functional.cross_entropy
    right = torch.arange(2)
    s = theirs[2]
    agree(clip_loss(out).total, (wanted(s, right) + wanted(s.T, right)) / 2, 1e-4)
    assert sum(p.numel() for p in ours.parameters()) == 151_277_313


def test_the_initial_temperature_is_the_peer_s():
    peer = pytest.importorskip("open_clip.model")
    from t2ilearn.models.clip import CLIP

    model = CLIP(IMAGE, TEXT)
    theirs = open_clip(IMAGE, TEXT)
    assert peer and model.logit_scale.item() == pytest.approx(theirs.logit_scale.item(), rel=1e-7)
