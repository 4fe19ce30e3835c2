"""Training: coefficients of schedulers for a frozen model (`distill`), and the bundled model (`pretrain`)."""
