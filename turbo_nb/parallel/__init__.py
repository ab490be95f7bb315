"""One clip on several GPUs: the ranks, and how a step and the VAE are split over them."""
