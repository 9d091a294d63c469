"""From semantic ops to what runs: Triton kernels, bodies traced for inductor, or the native body. Entry: `inductor`."""
