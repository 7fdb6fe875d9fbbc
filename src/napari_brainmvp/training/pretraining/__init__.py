"""Pre-training by the three tasks of BrainMVP (Rui et al., CVPR 2025)."""
