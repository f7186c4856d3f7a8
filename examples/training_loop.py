"""A training loop of your own, without the trainer: what every step has to do.

python examples/training_loop.py --text book.txt --preset mor-token --steps 200
"""

import argparse

import torch

import morex
from morex.data.loader import Loader
from morex.data.prepare import prepare


def main() -> None:
    """Trains a model on a text file and prints what it writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a UTF-8 text file")
    parser.add_argument("--preset", default="mor-token")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seq-len", type=int, default=64)
    options = parser.parse_args()

    changes = [f"data.corpus={options.text}", "data.tokenizer.kind=byte", "model.vocab_size=257", "model.d_model=64"]
    config = morex.load_config(options.preset, changes)
    data = prepare(config.data, config.model.vocab_size, options.seq_len)
    loader = Loader(data.train, options.seq_len, batch_size=8)
    model = morex.build_model(config.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, options.steps + 1):
        batch = loader.next_batch()
        out = model(batch.tokens, labels=batch.labels)
        out.loss.backward()  # the language-model loss and the weighted losses of the routers
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_routers(out.stats, step)  # thresholds, biases, warm-ups: after the step, never in a forward pass
        if step == 1 or step % 20 == 0:
            losses = ", ".join(f"{name} {loss.item():.3f}" for name, loss in out.losses.items())
            print(f"step {step}: {losses}")
    (ids,) = model.generate([data.tokenizer.encode("The ")], max_new_tokens=40, temperature=0.8, seed=0)
    print(data.tokenizer.decode(ids))


if __name__ == "__main__":
    main()
