"""Many autoencoders at once: members, update, checkpoints, the loop, use."""
