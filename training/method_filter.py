"""`learn2pd` of `distill.py`: a filter that says which predictions are final. See `learn2pd.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from discrete_schedulers import DiscreteScheduler, Learn2PDScheduler
from discrete_schedulers.sampling import uniforms
from discrete_schedulers.schedulers.scheduling_learn2pd import filter_log_odds
from discrete_schedulers.training.data import batches, generators
from discrete_schedulers.training.learn2pd import Decoded, block_states, fit_filter, threshold_for, with_masks
from discrete_schedulers.training.run import KNOWN, Run


def learn2pd(run: Run) -> DiscreteScheduler:
    """A filter that says which predictions are final, learned from the network's own decoding of partly known sequences; other
    sequences give the threshold. See `learn2pd.py`.

    It is learned on the most probable tokens, while the config keeps the model's temperature: `temperature=0` decodes as it was
    learned, and with another one a token that is drawn, but not the most probable, looks less final to the filter.
    """
    args, tensors, width = run.args, run.tensors, run.args.block_length or run.length
    data = run.data[: 2 * args.num_samples]
    if "confidence" not in tensors:
        share = run.share(len(data))
        parts, decoded = [], {}
        for rows in batches(len(share), args.train_batch_size):
            indices = share[rows.start : rows.stop]
            start = partly_known(
                data[indices.start : indices.stop : indices.step], args.seed, indices, run.mask_token_id
            )
            parts.append(block_states(run.denoiser, start, run.mask_token_id, width))
        for name, part in zip(Decoded._fields, zip(*parts, strict=True), strict=True):
            states = torch.cat(part)  # (B, T, w)
            found = run.gather(states.flatten(1).to(torch.float64 if name == "confidence" else torch.uint8), len(data))
            decoded[name] = found.view(-1, *states.shape[1:]).to(states.dtype)
        run.add_evaluations()
        tensors |= decoded
        run.save(None)
    fit, heldout = (with_masks(Decoded(*(tensors[name][half::2] for name in Decoded._fields))) for half in (0, 1))
    (generator,) = generators(args.seed, KNOWN, range(len(data), len(data) + 1))
    floats = fit_filter(fit, args.hidden_units, args.num_epochs, generator, args.learning_rate)
    settings = {"filter": floats, "block_length": args.block_length, "learned_for": run.learned_for}
    scheduler = Learn2PDScheduler.from_config(run.base, **settings)
    assert scheduler.layers is not None
    probability = filter_log_odds(scheduler.layers, heldout.confidence).sigmoid()
    threshold = threshold_for(probability, heldout, args.final_share)
    accepted = heldout.is_masked & (probability > threshold)
    share_accepted = float(accepted.sum() / heldout.is_masked.sum())
    run.accelerator.print(f"threshold {threshold}: accepts {share_accepted:.3f} of the predictions")
    return Learn2PDScheduler.from_config(run.base, threshold=threshold, **settings)


def partly_known(x_0: Tensor, seed: int, indices: range, mask_token_id: int) -> Tensor:
    """Sequences of which an eighth of the positions, at least one, is known, at random places: what decoding starts from."""
    length = x_0.shape[1]
    u = uniforms(tuple(x_0.shape), generators(seed, KNOWN, indices), x_0.device)
    return torch.where(u.argsort(1).argsort(1) < max(1, length // 8), x_0, mask_token_id)
