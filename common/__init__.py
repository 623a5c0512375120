"""What the four trainers share: latents, flow matching, LoRA files and checkpoints, validation."""
