"""Memory of what AdamW trains for new tokens, at the shapes of FLUX.1-dev's CLIP and T5, on the meta device.

    python tests/benchmarks/pivotal_memory.py

Parameters in float32 with two moments: our rows beside the whole table, which a table that requires gradients costs.
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2]))

from train_dreambooth_flux_advanced import ExtendedEmbedding


def main():
    for name, vocabulary, width in (("CLIP-L", 49408, 768), ("T5-XXL", 32128, 4096)):
        table = torch.nn.Embedding(vocabulary, width, device="meta").requires_grad_(False)
        new_tokens = ExtendedEmbedding(table, vocabulary, torch.empty(2, width, device="meta"))
        rows = sum(parameter.numel() for parameter in new_tokens.parameters() if parameter.requires_grad)
        sizes = (12 * count / 2**20 for count in (rows, table.weight.numel()))
        print("{}: two new rows {:.3f} MiB, the whole table {:.0f} MiB".format(name, *sizes))


if __name__ == "__main__":
    main()
