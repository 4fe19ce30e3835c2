"""Training: coefficients of schedulers for a frozen model (`distill`), the bundled models (`pretrain`, `pretrain_images`)."""
