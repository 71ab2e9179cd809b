"""The models that the chapters explain: networks, losses and samplers, and nothing else.

A module here imports torch, torchvision, jaxtyping and its siblings only, so that a file copied
elsewhere, with the siblings that it imports, still runs.

| chapter | modules |
|---|---|
| 2 VQ-VAE | `autoencoder`, `quantizers`, `vqvae` |
| 3 autoregressive priors | `transformer`, `pixelcnn`, `sampling` |
| 4 VQGAN | `lpips`, `vqgan` (and `taming`, the networks of the released models) |
| 5 DALL·E | `dvae`, `dalle` |
| 6 CLIP | `clip` |
| 7 VQGAN-CLIP | `cutouts`, `vqgan_clip` |
| 8 diffusion | `noise_schedules`, `diffusion`, `diffusion_samplers` |
| 9 text-to-image diffusion | `conditioning`, `dit`, `unet` |
| all | `layers`, `tokens`, `distributed` |
"""
