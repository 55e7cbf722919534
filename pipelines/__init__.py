"""Tasks on real model families: diffusion, language, 3D geometry."""
