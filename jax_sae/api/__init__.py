"""What a program calls, all of it behind `jax_sae.`."""
