"""Shows how many recursions each token of a text takes in a trained model.

python examples/depth_of_tokens.py runs/first "The people of the United States"
"""

import argparse

import torch

import morex


def main() -> None:
    """Prints one line for each token: its depth as a bar, and the token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("text")
    options = parser.parse_args()
    model, tokenizer = morex.load(options.run)
    tokens = tokenizer.encode(options.text)
    with torch.no_grad():
        trace = model(torch.tensor([tokens]), return_trace=True).trace
    for token, depth in zip(tokens, trace.depth[0].tolist(), strict=True):
        print(f"{depth:>3} {'#' * depth:<8} {tokenizer.decode([token])!r}")
    for group, active in trace.active.items():
        shares = ", ".join(f"{mask.double().mean().item():.0%}" for mask in active)
        print(f"{group}: {shares} of the tokens take recursion 1, 2, ...")


if __name__ == "__main__":
    main()
